"""DeepSpeed, imported once, when it has been told which accelerator to use: what it finds by itself may be another."""

from __future__ import annotations

import os
from typing import Any

from dspref.engine import builds

os.environ["DS_ACCELERATOR"] = builds.accelerator(os.environ, __import__("torch").cuda.is_available())

import deepspeed
from deepspeed.accelerator import get_accelerator

ACCELERATOR: Any = get_accelerator()

__all__ = ["ACCELERATOR", "deepspeed"]

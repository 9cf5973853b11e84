"""DeepSpeed, imported once, when it has been told which accelerator to use: what it finds by itself may be another."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if __import__("torch").cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator

ACCELERATOR: Any = get_accelerator()

__all__ = ["ACCELERATOR", "deepspeed"]

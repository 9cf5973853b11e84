"""DeepSpeed is told which accelerator to use before any of it is imported, whichever file of the room comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dspref

PROGRAM = """
import sys
from dspref.errors import EnvironmentFault
for name in sys.argv[1:]:
    try:
        __import__(f"dspref.engine.{name}")
    except EnvironmentFault as fault:
        print(fault)
    assert "deepspeed" not in sys.modules, name
"""


def test_no_file_imports_deepspeed_before() -> None:
    names = sorted(path.stem for path in (Path(dspref.__file__).parent / "engine").glob("[a-z]*.py"))
    env = {**os.environ, "DS_ACCELERATOR": "banana"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *names], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DS_ACCELERATOR: 'banana' is no accelerator; unset it, or set cpu or cuda") >= 4, done.stdout

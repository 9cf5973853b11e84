"""Fixtures for all tests: private caches, shared ranks, the data beside the repository."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Before anything imports torch. A stale build lock in the user's own cache would hang DeepSpeed for ever, silently.
_scratch = tempfile.mkdtemp(prefix="dspref-tests-")
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
os.environ["TORCH_EXTENSIONS_DIR"] = f"{_scratch}/torch_extensions"
os.environ["DSPREF_CACHE"] = f"{_scratch}/cache"
os.environ["HF_MODULES_CACHE"] = f"{_scratch}/modules"  # code of models' own
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from more, and threads that spin for a core that others hold make a minute of a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
# Files of tests help each other, by their names alone.
sys.path[:0] = [str(ROOT / "tests" / "distributed"), *map(str, (ROOT / "tests" / "unit").glob("[a-z]*/"))]

# Half the time of collection were walks through all that torch and the tests define, which stays.
gc.disable()

from forked import Forked  # noqa: E402  (needs the path above)
from workers import Workers  # noqa: E402


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """GPU tests share no ranks, and spend their time in processes of their own: `pytest -m gpu -n 8` runs eight at a time,
    though all lie in one file."""
    if config.option.markexpr != "gpu":
        return None
    from xdist.scheduler import LoadScheduling

    return LoadScheduling(config, log)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in the root of the repository, wherever pytest was started, and how wide its terminal is."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real preference pairs and a real tokenizer, which lie beside the repository for its developers and in CI."""
    if not SHARED.exists():
        pytest.skip("the real data lies in ../shared, which only developers and CI have")
    return SHARED


@pytest.fixture(scope="session")
def all_workers(forked: Forked) -> Iterator[dict[int, Workers]]:
    workers = {size: Workers(size, forked) for size in (1, 2, 4)}  # which start when they are first asked
    yield workers
    for group in workers.values():
        group.stop()


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Ranks that may die."""
    server = Forked()
    yield server
    server.stop()

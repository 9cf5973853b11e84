"""What is read by name is never waited for: a pipe that nobody writes is refused, or passed over, wherever a file would be.

A test that waits is ended by its time limit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tiny, save_tokenizer, tiny_config
from typer.testing import CliRunner

from dspref import config as configuration
from dspref import slurm
from dspref.cli import app
from dspref.config import Config
from dspref.data import cache, splits
from dspref.data.sources import Source, find
from dspref.errors import ConfigError, DataError, EnvironmentFault
from dspref.machine import footprint, preflight
from dspref.machine.context import CheckContext
from dspref.machine.machine import FAIL
from dspref.model import digests
from dspref.reference.store import KEY_BYTES, ReferenceStore
from dspref.run import manifest, record, status
from dspref.run.folder import RunFolder
from dspref.run.settings import refuse_changes
from dspref.watch import lock

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("qwen2", save_tokenizer(folder)), seed=0)
    return folder


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What a config names, to `dspref check`


def with_model(name: str) -> Callable[[Path, Path], list[str]]:
    """The overrides of a run whose model has a pipe for one file."""

    def prepare(folder: Path, model: Path) -> list[str]:
        for file in model.iterdir():
            (folder / "m" / file.name).parent.mkdir(exist_ok=True)
            (folder / "m" / file.name).symlink_to(file)
        pipe(folder / "m" / name)
        return ["model.name_or_path=m"]

    return prepare


def with_adapter(name: str) -> Callable[[Path, Path], list[str]]:
    def prepare(folder: Path, model: Path) -> list[str]:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / "a").mkdir(exist_ok=True)
            (folder / "a" / file).write_text("{}")
        pipe(folder / "a" / name)
        return ["model.lora.path=a"]

    return prepare


def with_pipe(name: str, override: str) -> Callable[[Path, Path], list[str]]:
    def prepare(folder: Path, model: Path) -> list[str]:
        pipe(folder / name)
        return [override]

    return prepare


NAMED = {
    "data": (with_pipe("q.jsonl", "data.train.path=q.jsonl"), "data.train.path: q.jsonl: is a pipe, not a file"),
    "zipped data": (with_pipe("q.csv.gz", "data.eval=q.csv.gz"), "data.eval.path: q.csv.gz: is a pipe, not a file"),
    "one of several": (with_pipe("q1.jsonl", "data.train=[p.jsonl, q1.jsonl]"), "is a pipe, not a file"),
    "a folder of it": (with_pipe("q/train.jsonl", "data.train=q"), "the folder holds no data file"),
    "a template": (with_pipe("t.jinja", "model.chat_template=t.jinja"), "model.chat_template: t.jinja: is a pipe"),
    "a strategy": (with_pipe("s.json", "deepspeed=s.json"), "deepspeed: s.json"),
    "a model's config": (with_model("config.json"), "holds no config.json"),
    "its weights": (with_model("model.safetensors"), "model.safetensors is a pipe, not a file"),
    "a shard": (with_model("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors is a pipe"),
    "its settings of generation": (with_model("generation_config.json"), "generation_config.json is not a JSON object"),
    "an adapter's config": (with_adapter("adapter_config.json"), "holds no adapter_config.json"),
    "an adapter's weights": (with_adapter("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
    "metrics": (with_pipe("o/metrics.jsonl", "output_dir=o"), "output_dir: "),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_pipe_that_a_config_names_is_one_line(case, model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, said = NAMED[case]
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    run = {"model": {"name_or_path": str(model)}, "data": {"train": "p.jsonl"}, "output_dir": "out"}
    Path("run.yaml").write_text(json.dumps(run))
    result = CliRunner().invoke(app, ["check", "run.yaml", *prepare(tmp_path, model)])
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1, result.output


# ---------------------------------------------------------------------------------------------------------------------
# What is read where it lies


def of(folder: Path, **model: Any) -> Config:
    own = {"model": {"name_or_path": str(folder / "m"), **model}, "data": {"train": "p"}, "output_dir": str(folder / "o")}
    return Config.model_validate(own)


def refused(kind: type[Exception], look: Callable[[], Any]) -> None:
    with pytest.raises(kind, match="a pipe, not a file"):
        look()


def shard(folder: Path) -> None:
    store = ReferenceStore(folder, {})
    keys = np.arange(2 * KEY_BYTES, dtype=np.uint8).reshape(2, KEY_BYTES)
    path = store.append(keys, np.zeros((2, 2), np.float32), np.ones(2, np.int32))
    assert path
    pipe(path)
    found = ReferenceStore(folder, {})
    assert len(found) == 0 and found.damaged == [path.name]


def holder(folder: Path) -> None:
    """Nobody's: it goes when it is old."""
    left = folder / f"{cache.BUILDING}x"
    pipe(left / cache.HOLDER)
    assert not cache._is_left(left)
    old = time.time() - 2 * cache.STALE_SECONDS
    for path in (left / cache.HOLDER, left):
        os.utime(path, (old, old))
    assert cache._is_left(left)


def netrc(folder: Path) -> None:
    config = Config.model_validate({**of(folder).model_dump(), "log": {"trackers": "wandb"}})
    assert "no key" in preflight.check_tracker(CheckContext(config, {"NETRC": str(pipe(folder / "netrc"))})).text


def readme(folder: Path) -> None:
    pipe(folder / "README.md")
    assert splits.declared(folder) == {}


def records(folder: Path) -> None:
    for name in ("run.json", "events.jsonl", "metrics.jsonl", "scoring.json", "submit/job.json", "config.resolved.yaml"):
        pipe(folder / name)
    (folder / "submit/config.yaml").touch()
    assert "is a pipe" in record.read(folder)[1] and status.read(folder)["state"] == "damaged"


def step(folder: Path) -> None:
    pipe(folder / "step-000004" / manifest.NAME)
    assert manifest.read(folder / "step-000004") is None and manifest.newest(folder) is None


def held(folder: Path) -> None:
    """Whose it is cannot be seen: it is named."""
    pipe(folder / record.LOCK)
    with pytest.raises(EnvironmentFault, match=r"\.lock \(delete it where"):
        lock.refuse_held(folder)


def described(folder: Path) -> None:
    pipe(folder / "m/config.json")
    assert footprint.count_weights(of(folder, init="random").model) is None


def grows(folder: Path) -> None:
    for name in record.APPENDED:
        pipe(folder / "o" / name)
        verdict = preflight.check_folders(CheckContext(of(folder)))
        assert verdict.level == FAIL and f"{name} is a pipe, not a file" in verdict.text
        (folder / "o" / name).unlink()


READ: dict[str, Callable[[Path], Any]] = {
    "the report of a cached store": lambda f: refused(OSError, lambda: cache.report_of(pipe(f / cache.REPORT).parent, True)),
    "a file of one": lambda f: refused(OSError, lambda: cache.digest(pipe(f / "tokens.npy"))),
    "who builds one": holder,
    "a shard of the reference store": shard,
    "a README beside data": readme,
    "a data file": lambda f: refused(DataError, lambda: find(Source(str(pipe(f / "q.jsonl"))))),
    "a large file whose digest is asked": lambda f: refused(OSError, lambda: digests.sha256(pipe(f / "x"))),
    "a model's config, for its size": described,
    "records of a run": records,
    "settings of a run": lambda f: refuse_changes(
        RunFolder(pipe(f / "config.resolved.yaml").parent), configuration.resolved(of(f)), {}
    ),
    "a manifest": step,
    "a lock": held,
    "metrics and events": grows,
    "a sweep": lambda f: refused(ConfigError, lambda: slurm.load_sweep(f / "run.yaml", [], pipe(f / "x.sweep"), "o")),
    "a file of passwords": netrc,
}


@pytest.mark.parametrize("case", READ)
def test_a_pipe_where_a_file_would_be_is_not_waited_for(case: str, tmp_path: Path) -> None:
    READ[case](tmp_path)

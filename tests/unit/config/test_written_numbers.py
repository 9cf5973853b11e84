"""Numbers as people write them, where a key takes a number, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dspref import config
from dspref.errors import ConfigError

TEXT = "model: {name_or_path: m}\ndata: {train: p.jsonl}\noutput_dir: out\n"


def load(tmp_path: Path, *overrides: str) -> config.Config:
    (tmp_path / "x.yaml").write_text(TEXT)
    return config.load(tmp_path / "x.yaml", overrides)


# Written -> (key, what it is).
NUMBERS: dict[str, tuple[str, Any]] = {
    "16k": ("data.max_length", 16384), "64K": ("data.tokens_per_pack", 65536), "1M": ("data.tokens_per_pack", 2**20),
    "2^20": ("data.tokens_per_pack", 2**20), "2**14": ("data.max_length", 16384), "1.5k": ("data.max_prompt_length", 1536),
    "16_384": ("data.max_length", 16384), "4k": ("reference.tokens_per_pack", 4096), "2k": ("train.max_steps", 2000),
    "10k": ("data.train.max_samples", 10000), "1_000": ("train.pairs_per_step", 1000),
    "1e3": ("checkpoint.save_every", 1000),
    "1e-6": ("train.learning_rate", 1e-6), "5e-7": ("train.learning_rate", 5e-7), "1_0.5": ("train.max_grad_norm", 10.5),
    "3k": ("train.hang_timeout", 3000.0), "1k": ("log.every", 1000), "1e0": ("objective.beta", 1.0),
    "2^3": ("model.lora.r", 8), "1e1": ("model.lora.lora_alpha", 10.0), "2^8": ("train.seed", 256),
}  # fmt: skip


@pytest.mark.parametrize("written", NUMBERS)
def test_numbers_are_read_as_people_mean_them(written: str, tmp_path: Path) -> None:
    """In the file, in an override, and in what `check --show` prints and a run folder keeps."""
    key, value = NUMBERS[written]
    loaded = load(tmp_path, f"{key}={written}")
    (tmp_path / "resolved.yaml").write_text(config.dump(loaded))
    nested: Any = written
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    whole = {"data.train.max_samples": "{data: {train: {path: p.jsonl, max_samples: 10k}}}"}.get(key, nested)
    base = yaml.safe_load(TEXT)
    section = key.split(".")[0]
    inside = [f"{name}: {json.dumps(part)}" for name, part in base.get(section, {}).items() if name not in whole]
    text = "".join(f"{name}: {json.dumps(part)}\n" for name, part in base.items() if name != section)
    (tmp_path / "y.yaml").write_text(text + f"{section}: {{{', '.join([*inside, whole[len(section) + 4 : -2]])}}}\n")
    for one in (loaded, config.load(tmp_path / "resolved.yaml"), config.load(tmp_path / "y.yaml")):
        found: Any = one
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value and type(found) is type(value)


def test_text_stays_text(tmp_path: Path) -> None:
    keys = ("log.run_name=16k", "output_dir=1_000", "model.revision=2^3", "model.lora.target_modules=[1k, q]",
            "data.eval={10k: {path: 5k}}", "data.train=[16k, {path: 1_0}]", "log.project=1k")  # fmt: skip
    loaded = load(tmp_path, *keys)
    assert (loaded.log.run_name, loaded.output_dir, loaded.model.revision) == ("16k", "1_000", "2^3")
    assert loaded.model.lora and loaded.model.lora.target_modules == ["1k", "q"]
    assert [source.path for source in loaded.data.train_sources] == ["16k", "1_0"]
    assert list(loaded.data.eval_sources) == ["eval_10k_"]
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    again = config.load(tmp_path / "again.yaml")
    assert (again.model, again.data, again.log, again.output_dir) == (
        loaded.model,
        loaded.data,
        loaded.log,
        loaded.output_dir,
    )


def test_numbers_within_mappings_of_any_kind(tmp_path: Path) -> None:
    strategy = "deepspeed={zero_optimization: {stage: 2, overlap_comm: true, reduce_bucket_size: 500k, offload_optimizer: "
    loaded = load(tmp_path, strategy + "{device: cpu}}}", "model.lora={r: 2^2, rank_pattern: {q: 2^3}}")
    assert loaded.strategy["zero_optimization"]["reduce_bucket_size"] == 500_000
    assert loaded.model.lora and (loaded.model.lora.r, loaded.model.lora.rank_pattern) == (4, {"q": 8})
    loaded = load(tmp_path, "objective.loss_type=[sigmoid, sft]", "objective.loss_weights=[1_0, 1e0]")
    assert loaded.objective.loss_weights == [10.0, 1.0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.max_length='16k'", "not '16k'; write 16384"),
        ("train.max_steps='2k'", "not '2k'; write 2000"),
        ("data.max_length=1.0001k", "must be an integer, not 1024.1024"),
        ("data.max_length=9^999", "not '9^999'"),
        ("data.max_length=16kb", "not '16kb'"),
        ("data.max_length=2^^3", "not '2^^3'"),
        ("data.max_length=1__0k", None),
        ("data.max_length=1e400", "an integer, not inf"),
        ("train.max_steps=-1k", "greater than 0, not -1000"),
        ("train.max_steps=1e30", "must be an integer"),
        ("train.max_steps=${N}", "variables are not expanded"),
        ("train.learning_rate=$LR", "variables are not expanded"),
        ("model.trust_remote_code=1k", "true or false, not '1k'"),
        ("train.optim=8k", "not '8k'"),
    ],
)
def test_what_is_no_number_is_refused(override: str, said: str | None, tmp_path: Path) -> None:
    if said is None:
        assert load(tmp_path, override).data.max_length == 10240
        return
    with pytest.raises(ConfigError) as error:
        load(tmp_path, override)
    message = str(error.value)
    assert any(words in message for words in said.split("|")) and message.count("\n") == 0, message

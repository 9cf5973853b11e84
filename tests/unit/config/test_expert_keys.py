"""What does not go together with experts that ranks share: one line each, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dspref import config as configuration
from dspref.errors import ConfigError

SPREAD = {"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": True, "autoep_size": 2}}


def loaded(folder: Path, deepspeed: dict[str, Any], **changes: Any) -> configuration.Config:
    values = {
        "model": {"name_or_path": "model", **changes.pop("model", {})},
        "data": {"train": "pairs.jsonl"},
        "deepspeed": deepspeed,
        "output_dir": "run",
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return configuration.load(folder / "run.yaml", [])


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"model": {"lora": {"r": 4}}}, "model.lora", "no adapter can be put on experts"),
        ({"model": {"freeze": ["*embed*"]}}, "model.freeze", "lack frozen weights"),
        ({"parallel": {"sequence": 2}}, "parallel.sequence", "use 1, or drop deepspeed.expert_parallel"),
        ({"reference": {"mode": "engine", "sync_ref_model": True}}, "reference.sync_ref_model", "must lie alike"),
        ({"reference": {"mode": "engine", "bema": {}}}, "reference.bema", "must lie alike"),
        ({"train": {"optim": "adamw_8bit"}}, "train.optim", "use adamw, or drop deepspeed.expert_parallel"),
    ],
)
def test_what_does_not_go_with_shared_experts(changes: dict[str, Any], key: str, reason: str, tmp_path: Path) -> None:
    loaded(tmp_path, {"zero_optimization": {"stage": 3}}, **changes)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, SPREAD, **changes)
    said = str(caught.value)
    assert key in said and reason in said and "\n" not in said


def test_what_goes_with_shared_experts(tmp_path: Path) -> None:
    assert loaded(tmp_path, SPREAD, reference={"mode": "engine", "offload": "cpu"}).zero_stage == 3

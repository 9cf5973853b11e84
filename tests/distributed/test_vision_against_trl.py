"""The first step of DPO with a vision-language model is TRL 1.16's, on the same rows (golden/make_trl_vision.py).

The rows are whole conversations, some without an image, and nothing is cut. A pair that is too long TRL cuts from its end:
answers first, then image tokens, whose features stay; dspref cuts text and never an image. TRL scores what the template
writes behind an answer (`data.scored: all`).
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_vision import save_vision, trl_vision_rows

FIXTURE = json.loads((Path(__file__).parents[1] / "golden" / "trl_vision.json").read_text())
# NLL differs in name only: TRL adds a loss "sft" where dspref says rpo_alpha.
VARIANTS = {"sigmoid": [], "sigmoid_sft": ["objective.rpo_alpha=0.5"]}


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None,
    reason="torchvision is here: it makes slightly other pixels (1e-3 of a reward) than Pillow, which made the fixture",
)
@pytest.mark.parametrize(
    "kind", ["llava", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava_next", "idefics3"))]
)
def test_the_first_step_of_a_vision_model_equals_trl(kind: str, tmp_path: Path, all_workers) -> None:
    for name in ("policy", "reference"):
        save_vision(tmp_path / name, kind, FIXTURE[f"{name}_seed"])
    rows = trl_vision_rows(tmp_path, FIXTURE["pairs"], in_parts=kind == "idefics3")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model": {"name_or_path": f"{tmp_path}/policy", "dtype": "float32"},
        "reference": {"mode": "engine", "name_or_path": f"{tmp_path}/reference"},
        "data": {
            "train": {"path": f"{tmp_path}/rows.jsonl"}, "shuffle": False, "max_length": 512, "tokens_per_pack": 400,
            "scored": "all",
        },
        "objective": {"name": "dpo", "beta": FIXTURE["beta"]},
        "train": {"pairs_per_step": FIXTURE["pairs"], "max_steps": 1, "max_grad_norm": 0},
        "output_dir": f"{tmp_path}/run",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = all_workers[2].run("cases:first_steps", config_path=str(tmp_path / "run.yaml"), variants=list(VARIANTS.values()))
    for name, result in zip(VARIANTS, ranks[0], strict=True):
        result["grad_norm"] = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in result["gradients"].values()))
        for metric, theirs in FIXTURE["kinds"][kind][name]["metrics"].items():
            found = result[metric]
            assert math.isclose(found, theirs, rel_tol=1e-4, abs_tol=1e-6), (name, metric, found, theirs)

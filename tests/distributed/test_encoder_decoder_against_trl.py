"""The first step of CPO, SimPO and ORPO with a T5 is TRL 1.16's, on the same rows (golden/make_trl_encoder_decoder.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml
from tiny import save_tiny, tiny_encoder_decoder
from transformers import AutoTokenizer

FIXTURE = json.loads((Path(__file__).parents[1] / "golden" / "trl_encoder_decoder.json").read_text())
EXAMPLE = Path(__file__).parents[2] / "launch" / "quickstart" / "spelling"
NAMES = {"cpo": "cpo", "cpo_simpo": "cpo", "orpo": "orpo"}


def test_the_first_step_equals_trl(tmp_path, all_workers):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "tokenizer")
    save_tiny(tmp_path / "model", tiny_encoder_decoder("t5", len(tokenizer)), FIXTURE["seed"])
    lines = (EXAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[: FIXTURE["pairs"]]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    template = {"prompt": "Spell {letters}", "chosen": "{good}", "rejected": "{bad}"}
    values = {
        "model": {"name_or_path": f"{tmp_path}/model", "tokenizer_name_or_path": f"{EXAMPLE}/tokenizer", "dtype": "float32"},
        "data": {
            "train": {"path": f"{tmp_path}/rows.jsonl", "template": template},
            "shuffle": False,
            "tokens_per_pack": 100,
        },
        "train": {"pairs_per_step": FIXTURE["pairs"], "max_steps": 1, "max_grad_norm": 0},
        "output_dir": f"{tmp_path}/run",
    }
    for name, variant in FIXTURE["variants"].items():
        more = {"nll_on_prompt": False} if name == "orpo" else {}
        values["objective"] = {"name": NAMES[name], **variant["options"], **more}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        ranks = all_workers[2].run(
            "cases:first_steps", config_path=str(tmp_path / "run.yaml"), variants=[[]], gradients=False
        )
        for metric, theirs in variant["metrics"].items():
            found = ranks[0][0][metric]
            assert math.isclose(found, theirs, rel_tol=1e-4, abs_tol=1e-6), (name, metric, found, theirs)

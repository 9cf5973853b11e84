"""The loss trace of a small run. A refactoring leaves it unchanged; a change of the maths explains itself and renews it:

python tests/distributed/test_golden.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

TRACE = Path(__file__).parents[1] / "golden" / "dpo_sigmoid.json"
NAMES = ("loss", "nll_loss", "grad_norm", "rewards/margins", "logps/chosen", "logits/rejected")


def run_small(workers, folder: Path) -> list[dict[str, float]]:
    import yaml
    from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config

    save_tiny(folder / "model", tiny_config("qwen2", save_tokenizer(folder / "tokenizer")), seed=11)
    for name, rows, seed in (("pairs", 20, 12), ("held_out", 6, 13)):
        text = "".join(json.dumps(row) + "\n" for row in preference_rows(rows, seed))
        (folder / f"{name}.jsonl").write_text(text)
    values = {
        "model": {
            "name_or_path": f"{folder}/model",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
        },
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl", "weight": 1.5},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "scored": "all",
        },
        "objective": {"name": "dpo", "label_smoothing": 0.05, "rpo_alpha": 0.2},
        "train": {"pairs_per_step": 8, "num_train_epochs": 2, "learning_rate": 2e-3, "lr_scheduler_type": "cosine"},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert workers.run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=[]) == [0] * workers.size
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_trace_is_the_golden_one(world, all_workers, tmp_path):
    golden = json.loads(TRACE.read_text())
    records = run_small(all_workers[world], tmp_path)
    assert len(records) == len(golden)
    for record, expected in zip(records, golden, strict=True):
        assert record["step"] == expected["step"]
        for name in expected:
            assert record[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6), (record["step"], name)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    from workers import Workers

    group = Workers(1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = run_small(group, Path(scratch))
    group.stop()
    kept = [{"step": r["step"]} | {k: v for k, v in r.items() if k.removeprefix("eval_") in NAMES} for r in lines]
    TRACE.write_text(json.dumps(kept, indent=1) + "\n")

"""What TRL's CPOTrainer and ORPOTrainer compute at their first step with a T5: trl_encoder_decoder.json beside this file.

Run by hand: `python tests/golden/make_trl_encoder_decoder.py`. Needs the extra `bench` (trl, datasets). The first sixteen
rows of the encoder-decoder example, one batch, in file order; a tiny T5, float32, CPU, learning rate 0.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parents[1] / "launch" / "quickstart" / "spelling"
sys.path.insert(0, str(HERE.parent))

from datasets import Dataset  # noqa: E402
from tiny import tiny_encoder_decoder, tiny_model, weights_digest  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

PAIRS, SEED = 16, 1
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cpo": (CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 1.0}),
    "cpo_simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.5}),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "nll_loss")


def rows() -> list[dict[str, str]]:
    lines = (EXAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[:PAIRS]
    read = [json.loads(line) for line in lines]
    return [{"prompt": f"Spell {row['letters']}", "chosen": row["good"], "rejected": row["bad"]} for row in read]


def first_step(trainer: Any, settings: Any, options: dict[str, Any]) -> dict[str, float]:
    """What a trainer logs of one optimizer step at learning rate 0."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "tokenizer")
    policy = tiny_model(tiny_encoder_decoder("t5", len(tokenizer)), SEED)
    before = weights_digest(policy)
    with tempfile.TemporaryDirectory() as folder:
        args = settings(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=64,
            max_completion_length=64, per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential",
            learning_rate=0.0, weight_decay=0.0, max_grad_norm=1e9, max_steps=1, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **options,
        )  # fmt: skip
        run = trainer(model=policy, args=args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer)
        run.train()
    assert weights_digest(policy) == before, "learning rate 0 must leave the weights alone"
    return {name: float(run.state.log_history[0][name]) for name in METRICS}


def main() -> None:
    result: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("trl", "transformers", "torch")},
        "pairs": PAIRS,
        "seed": SEED,
        "variants": {name: {"options": row[2], "metrics": first_step(*row)} for name, row in VARIANTS.items()},
    }
    (HERE / "trl_encoder_decoder.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

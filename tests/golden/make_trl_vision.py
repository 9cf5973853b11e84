"""What TRL's DPOTrainer computes at its first step with vision-language models: trl_vision.json beside this file.

Run by hand: `python tests/golden/make_trl_vision.py`. Needs the extra `bench` (trl, datasets), and no
torchvision, which resizes images slightly otherwise than Pillow. The rows of
`trl_vision_rows`, one batch, in their order; policy and reference are two tiny models; float32, CPU, learning rate 0.

TRL cuts a batch at `max_length` from its end, image tokens too, whose features then have no place; dspref never cuts an
image. Here nothing is cut.
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
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import PIL.Image  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import weights_digest  # noqa: E402
from tiny_vision import save_vision, trl_vision_rows  # noqa: E402
from transformers import AutoProcessor  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

PAIRS, BETA, POLICY_SEED, REFERENCE_SEED = 8, 0.3, 1, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},  # dspref: rpo_alpha: 0.5
}
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "grad_norm",
)  # fmt: skip


class RecordingTrainer(DPOTrainer):
    """DPOTrainer, unchanged, which also keeps what it computed before anything is rounded for the log."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.recorded = {name: values[-1] for name, values in self._metrics["train"].items()} | {"loss": loss.item()}
        return loss

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        self.recorded["grad_norm"] = torch.stack(squares).sum().sqrt().item()
        return loss


def first_step(kind: str, options: dict[str, Any]) -> dict[str, float]:
    """One optimizer step of DPOTrainer at learning rate 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = save_vision(folder / "reference", kind, REFERENCE_SEED)
        policy = save_vision(folder / "policy", kind, POLICY_SEED)
        before = weights_digest(policy)
        rows = trl_vision_rows(folder, PAIRS, in_parts=kind == "idefics3")
        for row in rows:
            row["images"] = [PIL.Image.open(folder / image) for image in row["images"]]
        args = DPOConfig(
            output_dir=f"{folder}/run", use_cpu=True, bf16=False, gradient_checkpointing=False, beta=BETA, max_length=None,
            per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential", disable_dropout=True, learning_rate=0.0,
            weight_decay=0.0, max_grad_norm=1e9, max_steps=1, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, **options,
        )  # fmt: skip
        trainer = RecordingTrainer(
            model=policy,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(folder / "policy"),
        )
        trainer.train()
        assert weights_digest(policy) == before, "learning rate 0 must leave the weights alone"
    return {name: trainer.recorded[name] for name in METRICS}


def main() -> None:
    kinds = {
        kind: {name: {"options": options, "metrics": first_step(kind, options)} for name, options in VARIANTS.items()}
        for kind in ("llava", "llava_next", "idefics3")
    }
    result: dict[str, Any] = {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("trl", "transformers", "torch", "pillow")},
        "pairs": PAIRS,
        "beta": BETA,
        "policy_seed": POLICY_SEED,
        "reference_seed": REFERENCE_SEED,
        "kinds": kinds,
    }
    (HERE / "trl_vision.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

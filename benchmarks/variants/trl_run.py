"""TRL: DPOTrainer, and its experimental CPOTrainer (SimPO too) and ORPOTrainer.

The two experimental trainers would add a second terminator to every answer that does not end with one, and then train on
other tokens than everybody else; they are given the same token ids instead. All else is TRL's, unchanged.
"""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.measure import Measurement, main, spent
from benchmarks.workload import Spec, Tokens, read_rows, split


class SameTokens:
    """Mixed into CPOTrainer and ORPOTrainer: tokens as DPOTrainer makes them, from the column `tokens`."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        pair = Tokens(**feature["tokens"])
        row = {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row[f"{side}_input_ids"] = pair.prompt + answer
            row[f"{side}_attention_mask"] = [1] * len(pair.prompt + answer)
            row[f"{side}_labels"] = [-100] * len(pair.prompt) + answer
        return row


class CPO(SameTokens, CPOTrainer):
    pass


class ORPO(SameTokens, ORPOTrainer):
    pass


TRAINERS = {
    "dpo": (DPOConfig, DPOTrainer),
    "cpo": (CPOConfig, CPO),
    "simpo": (CPOConfig, CPO),
    "orpo": (ORPOConfig, ORPO),
}


class Timer(TrainerCallback):
    """Times each optimizer step, without the making of its batch, and keeps the losses that TRL logs."""

    def __init__(self) -> None:
        self.found = Measurement()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.found.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.found.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.found.losses.append(float(logs["loss"]))


def settings(objective: dict[str, Any]) -> dict[str, Any]:
    """dspref's objective section in TRL's words."""
    values = {key: value for key, value in objective.items() if key != "name"}
    if objective["name"] == "simpo":
        return {"loss_type": "simpo", "cpo_alpha": 0.0} | values
    if objective["name"] == "dpo":
        return values | {"loss_type": [values.get("loss_type", "sigmoid")]}
    return values


def useful_tokens(rows: Dataset) -> list[int]:
    """Tokens of prompt + chosen and prompt + rejected of each row of a trainer's data set."""
    if "prompt_ids" in rows.column_names:
        return [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    return [len(r["chosen_input_ids"]) + len(r["rejected_input_ids"]) for r in rows]


def build(spec: Spec, folder: str) -> Any:
    """The trainer, with its data tokenized and, where the reference is stored, scored."""
    config, trainer = TRAINERS[spec.objective["name"]]
    options, models = settings(spec.objective), {"model": load(spec)}
    if spec.objective["name"] == "dpo":
        options["precompute_ref_log_probs"] = spec.reference == "stored"
        models |= {"ref_model": load(spec)} if spec.reference == "live" else {}
    arguments = config(
        output_dir=folder, use_cpu=spec.device == "cpu", bf16=spec.dtype == "bfloat16", disable_dropout=True,
        gradient_checkpointing=spec.checkpointing, max_length=spec.max_length, max_steps=spec.steps,
        per_device_train_batch_size=spec.pairs_per_step, train_sampling_strategy="sequential",
        learning_rate=spec.learning_rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none",
        dataset_num_proc=spec.workers, disable_tqdm=True, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rows = list(islice(read_rows(Path(spec.data)), spec.steps * spec.pairs_per_step))
    if spec.objective["name"] != "dpo":
        rows = [row | {"tokens": split(tokenizer, row)._asdict()} for row in rows]
    return trainer(**models, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def load(spec: Spec) -> Any:
    return AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.dtype)


def run(spec: Spec) -> Measurement:
    timer = Timer()
    timed = partial(spent, timer.found.extra)
    with (
        tempfile.TemporaryDirectory(dir=spec.work) as folder,
        timed(DPOTrainer, "_precompute_ref_logps", "reference"),
        timed(DPOTrainer, "_prepare_dataset", "tokens"),
    ):
        trainer = build(spec, folder)
        trainer.add_callback(timer)
        trainer.train()
    tokens, size = useful_tokens(trainer.train_dataset), spec.pairs_per_step
    timer.found.useful_tokens = [sum(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return timer.found


if __name__ == "__main__":
    main(run)

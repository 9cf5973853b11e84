"""Runs of long pairs, and the memory that their steps take beyond what stays between them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from test_measured_memory import MODEL, Case, two_steps

SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}


def long_run(folder: Path, words: dict[str, int], recompute: bool, pairs_per_step: int, **data: Any) -> dict[str, Any]:
    """A config for pairs of so many words in each part, some four tokens a word, whose model and rows are in `folder`."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL | SMALL | {"max_position_embeddings": 32_768}))
    draw = random.Random(1)

    def text(count: int) -> str:
        return " ".join("".join(draw.choice("abcdefghijklmnop") for _ in range(4)) for _ in range(count))

    rows = [{part: text(count) for part, count in words.items()} for _ in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {
            "name_or_path": str(folder / "model"),
            "tokenizer_name_or_path": "launch/quickstart/tokenizer",
            "init": "random",
            "dtype": "float32",
            "gradient_checkpointing": recompute,
        },
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": None, **data},
        "objective": {"name": "simpo"},
        "train": {"pairs_per_step": pairs_per_step, "max_steps": 2, "learning_rate": 1e-6},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }


def needed(folder: Path, run: dict[str, Any], ranks: int, name: str) -> tuple[int, dict[str, Any]]:
    """Bytes of a rank at most, beyond what stays between steps, and all that was found."""
    (folder / "run.yaml").write_text(yaml.safe_dump(run | {"output_dir": str(folder / name)}))
    found = two_steps(Case(ranks, 1, False, run["model"]["gradient_checkpointing"]), folder)
    (folder / "found.json").unlink()
    own = found["peak"] - found["after"]
    print(name, f"{own >> 20} MiB", found["tokens"], found["scored"], found["places"])
    return own, found

"""What `dspref plan` estimates is what runs need: measured on CPU, each run in processes of its own.

A case takes some 15 s; `pytest -m slow` runs a part of them that has every value of every dimension, `pytest -m soak` all.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dspref.config import ModelSection
from dspref.machine import footprint, memory_plan, shapes
from dspref.machine.layers import Layout, Live, Pack

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 0.15
# 25 million weights in layers, embedding and head; a pack of 2,048 tokens keeps 0.5 GiB in fp32.
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 16_384,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


MOVES = {"sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1}, "bema": {"bema": {"update_freq": 1}}}


class Case(NamedTuple):
    ranks: int
    stage: int
    lora: bool
    checkpointing: bool
    dtype: str = "float32"
    packs: int = 1
    reference: bool = False
    moves: str = ""
    """The key that lets the reference follow the policy, at every step."""

    @property
    def name(self) -> str:
        extra = ["lora"] * self.lora + ["checkpointing"] * self.checkpointing + ["reference"] * self.reference
        extra += [self.moves] if self.moves else []
        return "-".join([f"{self.ranks}r", f"zero{self.stage}", self.dtype, f"{self.packs}p", *extra])


EVERY = [Case(*values) for values in product((1, 2), (1, 2, 3), (False, True), (False, True))]
OTHERS = [
    Case(1, 0, False, False),
    Case(1, 1, False, False, "bfloat16", 2),
    Case(2, 2, False, True, "bfloat16"),
    Case(2, 3, False, False, "bfloat16"),
    Case(1, 2, False, False, "float32", 2),
    Case(2, 3, False, True, "float32", 1, True),
    Case(1, 3, True, True, "bfloat16"),
    Case(2, 1, False, True, "bfloat16", 1, True, "sync_ref_model"),
    Case(2, 3, False, True, "float32", 1, True, "bema"),
    Case(1, 2, False, True, "bfloat16", 1, True, "bema"),
]
# Each value of each dimension, and most pairs of values.
PART = [
    Case(1, 1, True, True),
    Case(1, 2, False, False),
    Case(1, 3, False, True),
    Case(2, 1, False, True),
    Case(2, 2, True, False),
    Case(2, 3, False, False),
    Case(2, 3, False, False, "bfloat16"),
    Case(1, 1, False, False, "bfloat16", 2),
]


def held(case: Case, tmp_path: Path) -> tuple[float, int, int]:
    """(estimate over measured peak, bytes estimated, bytes measured)."""
    found = measured(case, tmp_path)
    section = ModelSection(name_or_path=str(tmp_path / "model"), init="random", lora={} if case.lora else None)
    shape = shapes.of_section(section)
    value = footprint.BYTES[case.dtype]
    beside = {"sync_ref_model": {"masters": 4 if value == 2 else 0}, "bema": {"history": 4 + value}}.get(case.moves, {})
    reference = Live(shape, value, case.stage == 3, **beside) if case.reference else None
    layout = Layout(
        "cpu", value, case.ranks, case.stage, case.packs, case.checkpointing, kernel="sdpa", reference=reference
    )  # fmt: skip
    pack = Pack(found["tokens"], found["scored"], found["keys"] / found["tokens"])
    estimated = memory_plan.estimate(shape, layout, pack)
    print(
        f"{case.name}: {estimated.total / 2**20:.0f} MiB estimated, {found['peak'] / 2**20:.0f} measured", estimated, found
    )
    return estimated.total / found["peak"], estimated.total, found["peak"]


def measured(case: Case, tmp_path: Path) -> dict[str, Any]:
    """Two steps in processes of their own."""
    write_run(case, tmp_path)
    return two_steps(case, tmp_path)


def two_steps(case: Case, tmp_path: Path) -> dict[str, Any]:
    """Of the run that is there."""
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "tests/distributed/measured.py", str(tmp_path / "run.yaml"), str(tmp_path / "found.json")]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=(tmp_path / f"{rank}.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(case.ranks)
    ]  # fmt: skip
    try:
        for rank in ranks:
            rank.wait(240)
    finally:
        for rank in ranks:
            rank.kill()
    said = "".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(case.ranks))
    assert (tmp_path / "found.json").exists(), said
    return json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))


def write_run(case: Case, folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    draw = random.Random(1)

    def words(tokens: int) -> str:
        return " ".join("".join(draw.choice("abcdefghijklmnop") for _ in range(4)) for _ in range(tokens // 5))

    rows = [
        {"prompt": words(120), "chosen": words(draw.randint(60, 110)), "rejected": words(draw.randint(60, 110))}
        for _ in range(200)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = {
        "name_or_path": str(folder / "model"), "tokenizer_name_or_path": "launch/quickstart/tokenizer", "init": "random",
        "dtype": case.dtype, "gradient_checkpointing": case.checkpointing, "lora": case.lora,
    }  # fmt: skip
    run = {
        "model": model,
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 1024, "tokens_per_pack": 2048},
        "objective": {"name": "dpo" if case.reference else "simpo"},
        # Seven pairs of these lengths fill a pack.
        "train": {"pairs_per_step": 7 * case.ranks * case.packs, "max_steps": 2, "learning_rate": 1e-6},
        "deepspeed": {"zero_optimization": {"stage": case.stage, "contiguous_gradients": True}},
        "output_dir": str(folder / "out"),
        **({"reference": {"mode": "engine", **MOVES.get(case.moves, {})}} if case.reference else {}),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


@pytest.mark.slow
@pytest.mark.parametrize("case", PART, ids=lambda case: case.name)
def test_the_estimate_is_what_a_run_needs(case: Case, tmp_path: Path) -> None:
    assert held(case, tmp_path)[0] == pytest.approx(1, abs=WITHIN)


@pytest.mark.soak
@pytest.mark.parametrize("case", [case for case in EVERY + OTHERS if case not in PART], ids=lambda case: case.name)
def test_every_other_layout_too(case: Case, tmp_path: Path) -> None:
    assert held(case, tmp_path)[0] == pytest.approx(1, abs=WITHIN)

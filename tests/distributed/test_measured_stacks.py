"""What `dspref plan` says of a run of an encoder-decoder model is what it needs: measured on CPU, as in `measured`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_measured_memory import WITHIN, Case, two_steps
from typer.testing import CliRunner

from dspref.cli import app

# Some 20 million weights each.
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": 8192, "d_model": 384}
MODELS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_kv": 64, "d_ff": 1536, "num_heads": 6, "num_layers": 4, "num_decoder_layers": 4, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    },
    "bart": {
        "bos_token_id": 2, "max_position_embeddings": 1024, "encoder_layers": 4, "decoder_layers": 4,
        "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "encoder_attention_heads": 6, "decoder_attention_heads": 6,
        "dropout": 0.0, "forced_eos_token_id": None,
    },
}  # fmt: skip
CASES = [
    ("t5", Case(1, 1, False, False)),
    ("t5", Case(1, 2, False, True)),
    ("bart", Case(1, 2, False, False)),
    ("bart", Case(2, 3, False, True)),
    ("bart", Case(1, 1, True, False)),
    ("t5", Case(1, 1, False, False, "bfloat16", 2)),
]


def write(model_type: str, case: Case, folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({"model_type": model_type, "is_encoder_decoder": True, **ENDS, **MODELS[model_type]})
    )
    draw = random.Random(1)

    def words(tokens: int) -> str:
        return " ".join("".join(draw.choice("abcdefghijklmnop") for _ in range(4)) for _ in range(tokens // 5))

    rows = [{"prompt": words(250), "chosen": words(80), "rejected": words(90)} for _ in range(100)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {
        "model": {
            "name_or_path": str(folder / "model"), "tokenizer_name_or_path": "launch/quickstart/tokenizer", "init": "random",
            "dtype": case.dtype, "gradient_checkpointing": case.checkpointing, "lora": case.lora,
        },
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 1024, "tokens_per_pack": 2048},
        "objective": {"name": "simpo"},
        "train": {"pairs_per_step": 4 * case.ranks * case.packs, "max_steps": 2, "learning_rate": 1e-6},
        "deepspeed": {"zero_optimization": {"stage": case.stage, "contiguous_gradients": True}},
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def planned(case: Case, folder: Path) -> dict[str, Any]:
    asked = ["plan", str(folder / "run.yaml"), "--gpu", "cpu", "--gpus", str(case.ranks), "--format", "json"]
    said = CliRunner().invoke(app, asked, prog_name="dspref")
    assert said.exit_code == 0, said.output
    return json.loads(said.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "case"), CASES, ids=lambda part: part if isinstance(part, str) else part.name)
def test_the_plan_is_what_a_run_needs(model_type: str, case: Case, tmp_path: Path) -> None:
    write(model_type, case, tmp_path)
    plan, found = planned(case, tmp_path), two_steps(case, tmp_path)
    memory = plan["memory"]
    print(f"{model_type} {case.name}: {memory['bytes'] / 2**20:.0f} MiB planned, {found['peak'] / 2**20:.0f} measured")
    print(memory["moment"], {name: n // 2**20 for name, n in memory["parts"].items() if n}, found["places"])
    assert memory["bytes"] / found["peak"] == pytest.approx(1, abs=WITHIN)

"""Whole runs as a user starts them: the quick start, and real pairs with a real tokenizer. Minutes each."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")

pytestmark = pytest.mark.slow


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
def test_the_quick_start_learns_and_shows_it(tmp_path):
    run = tmp_path / "run"
    command = [DEEPSPEED, "launch/train.py", "--config", "launch/configs/quickstart.yaml", f"output_dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    last = [record for record in metrics(run) if "eval_loss" in record][-1]
    assert last["eval_rewards/accuracies"] >= 0.9
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["step"] == 0 and len({row["step"] for row in samples}) > 2
    samples = [row for row in samples if row["step"] == last["step"]]
    assert sum(row["policy"].strip() == row["chosen"].strip() for row in samples) >= len(samples) - 1
    assert not any(row["reference"].strip() == row["chosen"].strip() for row in samples)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "this run is finished" in again.stdout


@pytest.mark.timeout(900)
def test_the_encoder_decoder_example_learns_and_plain_transformers_translates_with_it(tmp_path):
    run = tmp_path / "run"
    config = "launch/configs/quickstart_encoder_decoder.yaml"
    command = [DEEPSPEED, "launch/train.py", "--config", config, f"output_dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    last = [record for record in metrics(run) if "eval_loss" in record][-1]
    assert last["eval_rewards/accuracies"] >= 0.9
    lm: Any = AutoModelForSeq2SeqLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    rows = [json.loads(line) for line in Path("launch/quickstart/spelling/eval.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        asked = tokenizer(f"Spell {row['letters']}", return_tensors="pt")["input_ids"]
        said = lm.generate(input_ids=asked, max_new_tokens=12, do_sample=False, num_beams=1)[0]
        right += tokenizer.decode(said, skip_special_tokens=True) == row["good"]
    assert right >= 0.9 * len(rows)


@pytest.mark.timeout(1800)
def test_real_pairs_on_two_ranks(shared, tmp_path):
    """2,048 real pairs, the GPT-2 vocabulary, ten million parameters, ZeRO-3: 12 steps of 16 pairs, then held-out pairs."""
    shape = {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 6, "tie_word_embeddings": True}
    shape |= {"num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 2048, "vocab_size": 50_259}
    AutoConfig.for_model("qwen2", **shape, bos_token_id=None, eos_token_id=50_257).save_pretrained(tmp_path / "model")
    tokenizer = str((shared / "tokenizer" / "gpt2-chatml").resolve())
    model = {"name_or_path": f"{tmp_path}/model", "tokenizer_name_or_path": tokenizer, "init": "random", "dtype": "float32"}
    values = {
        "model": {**model, "gradient_checkpointing": False},
        "reference": {"mode": "engine"},  # scores the 192 pairs of the run, where `stored` would score all 2,048
        "data": {
            "train": {"path": str(shared / "data" / "alpacaeval_train.jsonl")},
            "eval": {"path": str(shared / "data" / "alpacaeval_test.jsonl"), "max_samples": 64},
            "max_length": 512,
            "tokens_per_pack": 8192,
        },
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {"pairs_per_step": 16, "max_steps": 12, "learning_rate": 5e-4, "lr_scheduler_type": "cosine"},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{tmp_path}/run",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [DEEPSPEED, "--num_gpus", "2", "launch/train.py", "--config", f"{tmp_path}/run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    records = metrics(tmp_path / "run")
    training = [record for record in records if "loss" in record]
    assert math.isclose(training[0]["loss"], math.log(2), abs_tol=1e-5) and len(training) == 12
    assert records[-1]["eval_loss"] < 0.6 and records[-1]["eval_rewards/accuracies"] > 0.7
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert sum(p.numel() for p in lm.parameters()) == pytest.approx(10e6, rel=0.01)

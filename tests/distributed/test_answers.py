"""Answers on the way, by the trained engine in shards: those of plain transformers, and nothing is trained otherwise."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from test_layout_invariance import zero
from test_moe import FAMILIES
from test_preemption import arguments, committed, in_phase
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, save_tokenizer, tiny_config, tiny_model, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

HELD_OUT, NEW = 5, 12
OWN = [
    {"prompt": "and now"},
    {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "what is it that"}], "chosen": "this"},
]
LORA = "model.lora={r: 4, lora_alpha: 16, init_lora_weights: false}"
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen2": ("qwen2", {}, []),
    "another": ("qwen2", {}, ["reference.name_or_path={folder}/other"]),
    "live": ("llama", {"tie_word_embeddings": True}, ["reference={mode: engine, name_or_path: '{folder}/other'}"]),
    "moving": ("qwen2", {}, ["reference={sync_ref_model: true, ref_model_mixup_alpha: 1.0, ref_model_sync_steps: 4}"]),
    "moe": ("qwen3_moe", FAMILIES["qwen3_moe"], []),
    "lora": ("qwen2", {}, [LORA, "reference.mode=adapter"]),
    "lora none": ("qwen2", {}, [LORA, "objective={name: simpo, beta: 2.0}"]),
}
SOME = (f"log.samples={HELD_OUT - 2}", f"log.generation.max_new_tokens={NEW}")


def talkative(model_type: str, vocabulary: int, tokenizer: Any, seed: int = 4, **shape: Any) -> PreTrainedModel:
    """A model that says many things, all of them in printable ASCII, so that texts tell tokens apart; long answers to some
    prompts, short ones to others."""
    lm = tiny_model(tiny_config(model_type, vocabulary, **shape), seed)
    said = [tokenizer.decode([i]) for i in range(vocabulary)]
    mute = torch.tensor([not (text.isascii() and text.isprintable() and len(text) == 1) for text in said])
    mute[tokenizer.eos_token_id] = False
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and "lm_head" not in name:
                parameter *= 3
        lm.get_output_embeddings().weight[mute] *= 0.01
    return lm


def make(folder: Path, kind: str = "qwen2") -> Path:
    run_file = write_run(folder)
    vocabulary, tokenizer = save_tokenizer(folder / "tokenizer"), AutoTokenizer.from_pretrained(folder / "tokenizer")
    model_type, shape, _ = KINDS[kind]
    shutil.rmtree(folder / "model")
    lm = talkative(model_type, vocabulary, tokenizer, attention_dropout=0.1, **shape)
    # Beside the tokenizer's end token, which ends no turn of these models: a letter.
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("e")]
    lm.save_pretrained(folder / "model")
    if kind in ("another", "live"):
        other = talkative(model_type, vocabulary, tokenizer, seed=5, **shape)
        other.save_pretrained(folder / "other")
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OWN))
    return run_file


def train(workers: Any, run_file: Path, run: Path, *overrides: str) -> None:
    world = workers.size
    changes = [f"output_dir={run}", *overrides]
    assert workers.run("cases:run_training", config_path=str(run_file), overrides=changes) == [0] * world


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """As anyone would render them."""
    held_out = [oracle.render(row, tokenizer)[0] for row in preference_rows(HELD_OUT, seed=HELD_OUT)[: HELD_OUT - 2]]
    turns = [
        [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"] for row in OWN
    ]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return held_out + [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def answers_of(lm: PreTrainedModel, tokenizer: Any, **settings: Any) -> list[str]:
    """By `generate`, one prompt at a time."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    texts = []
    for prompt in prompts_of(tokenizer):
        ids = torch.tensor([prompt])
        answer = lm.eval().generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


FAST, SLOW = (
    {("qwen2", 2, 3), ("lora", 1, 2)},
    {("moe", 2, 3), ("another", 2, 3), ("live", 1, 3), ("moving", 2, 2), ("lora", 2, 3)},
)
MATRIX = [
    pytest.param(
        *case, marks=() if case in FAST else pytest.mark.slow if case[0] == "qwen2" or case in SLOW else pytest.mark.soak
    )
    for case in itertools.product(KINDS, (1, 2), (1, 2, 3))
]


@pytest.mark.parametrize(("kind", "world", "stage"), MATRIX)
def test_answers_are_those_of_plain_transformers(kind, world, stage, all_workers, tmp_path):
    """At each moment: the initial model's and the final one's, beside the reference's."""
    run_file, run = make(tmp_path, kind), tmp_path / "run"
    changes = [zero(stage), *SOME, f"log.samples_file={tmp_path}/own.jsonl", "data.tokens_per_pack=120"]
    changes += [change.replace("{folder}", str(tmp_path)) for change in KINDS[kind][2]]
    train(all_workers[world], run_file, run, *changes, "train.learning_rate=2e-3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    initial = answers_of(base, tokenizer)
    final = base
    if "lora" in kind:
        final = PeftModel.from_pretrained(base, str(run / "final"))
    else:
        final = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    expected = {"policy": answers_of(final, tokenizer), "reference": initial}
    if kind in ("another", "live"):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
        other.generation_config.eos_token_id = base.generation_config.eos_token_id  # an answer ends as the policy's
        expected["reference"] = answers_of(other, tokenizer)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4) for _ in range(len(OWN) + HELD_OUT - 2)]
    first, last = ([row for row in rows if row["step"] == step] for step in (0, 4))
    assert [row["policy"] for row in last] == expected["policy"]
    assert [row["reference"] for row in first] == expected["reference"]
    assert [row["reference"] for row in last] == expected["policy" if kind == "moving" else "reference"]
    if "lora" not in kind:  # whose B is random from the start
        assert [row["policy"] for row in first] == initial
    assert expected["policy"] != expected["reference"] and len(set(expected["policy"])) > 2, "something was learned"
    assert any(answer.endswith("e") for answer in [*expected["policy"], *expected["reference"]]), "the model's own end token"
    assert [row["source"] for row in first] == ["eval"] * 3 + [f"{tmp_path}/own.jsonl:{line}" for line in (1, 2)]
    assert [row["chosen"] for row in first][3:] == [None, "this"] and "what is it that" in first[4]["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage"),
    [(2, 3), (1, 0), (1, 2), (2, 1), (1, 3)],
)
def test_training_is_the_same_to_the_bit_and_goes_on_with_each_answer_once(world, stage, all_workers, tmp_path):
    """With dropout, and answers that are drawn: no generator of the run is touched."""
    run_file, plain, run = make(tmp_path), tmp_path / "plain", tmp_path / "run"
    drawn = [*SOME, "log.generation={temperature: 1.3, top_p: 0.9, max_new_tokens: 9}", "log.sample_every=1"]
    train(all_workers[world], run_file, plain, zero(stage))
    train(all_workers[world], run_file, run, zero(stage), *drawn)
    assert training_records(run) == training_records(plain) and not (plain / "samples.jsonl").exists()
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (plain, run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [step for step in range(5) for _ in range(3)]
    assert len({row["policy"] for row in rows}) > 3 and all(
        row["reference"] == rows[i % 3]["reference"] for i, row in enumerate(rows)
    )
    forget_everything_after(run, 2)
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "prompt": "half of')
    train(all_workers[world], run_file, run, zero(stage), *drawn)
    assert rows_of(run) == rows and training_records(run) == training_records(plain)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "steps"), [("answers", [2]), ("first answers", [])])
def test_a_signal_while_prompts_are_answered(phase, steps, forked, tmp_path):
    """As in an evaluation: the step is committed, and the answers that were not given come later; before the first step
    there is nothing to commit."""
    run_file, run, whole, marks = make(tmp_path), tmp_path / "run", tmp_path / "whole", tmp_path / "marks"
    marks.mkdir()
    assert forked.wait(forked.start(2, arguments(run_file, whole, *SOME))) == [0, 0]
    ranks = forked.start(2, arguments(run_file, run, *SOME), "hooks:slow_answers", into=str(marks), first=phase != "answers")
    in_phase("answers", ranks, marks)
    ranks.signal(signal.SIGTERM, 1)
    assert forked.wait(ranks) == [75, 75], ranks.said()
    assert "stopped by SIGTERM" in ranks.said() and "Traceback" not in ranks.said()
    assert (
        committed(run) == steps and {row["step"] for row in rows_of(run)} == {0}
        if steps
        else not (run / "samples.jsonl").exists()
    )
    assert forked.wait(forked.start(2, arguments(run_file, run, *SOME))) == [0, 0]
    assert rows_of(run) == rows_of(whole) and training_records(run) == training_records(whole)

"""Runs of encoder-decoder models: loss and gradients of a step whatever the ranks, packs, ZeRO stage and sharing, against a
plain loop over single examples with transformers in float64; and a run that is interrupted, goes on, and is exported."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config, tiny_encoder_decoder
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dspref.model import unpacked

PAIRS = 8
OBJECTIVE = {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.4}
# Of two ways in which families differ, the others are in the unit test: each takes a quarter of a minute here.
FAMILIES = ["t5", "bart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mt5", "m2m_100"))]
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def text_rows(count: int) -> list[dict[str, Any]]:
    """Rows of which three have one prompt, and two of these an answer in common."""
    rows = [row for row in preference_rows(3 * count, seed=3) if isinstance(row["prompt"], str)][:count]
    rows[2] |= {"prompt": rows[1]["prompt"], "chosen": rows[1]["chosen"]}
    rows[5] |= {"prompt": rows[1]["prompt"], "chosen": rows[2]["rejected"], "rejected": rows[1]["rejected"]}
    return rows


def write(folder: Path, family: str, **sections: Any) -> Path:
    vocabulary = save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    own = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_encoder_decoder(family, vocabulary, decoder_start_token_id=tokenizer.pad_token_id, **own)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = 256
    for name, seed in (("policy", 1), ("reference", 2)):
        save_tiny(folder / name, config, seed)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(PAIRS)))
    values = {
        "model": {"name_or_path": f"{folder}/policy", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"},
        "reference": {"mode": "engine", "name_or_path": f"{folder}/reference"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "shuffle": False, "max_length": 200},
        "objective": OBJECTIVE,
        "train": {"pairs_per_step": PAIRS, "max_steps": 1, "max_grad_norm": 0},
        "deepspeed": ZERO3,
        "output_dir": f"{folder}/run",
    } | sections
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def run_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


def score(lm: Any, prompt: list[int], labels: list[int]) -> oracle.Scores:
    logits = lm(input_ids=torch.tensor([prompt]), labels=torch.tensor([labels])).logits[0].double()
    logps = logits.log_softmax(-1).gather(1, torch.tensor(labels)[:, None])[:, 0]
    return oracle.Scores(list(logps.unbind()), [torch.zeros(())] * len(labels), [])


@pytest.fixture(scope="module")
def expected(run_files: Path) -> dict[str, Any]:
    """By the book: one forward per example, no pack, no engine."""
    policy, reference = (
        AutoModelForSeq2SeqLM.from_pretrained(run_files / name, dtype=torch.float64).eval()
        for name in ("policy", "reference")
    )
    with torch.no_grad():
        base = plain_scores(run_files, reference)
    result = oracle.loss_of_scores(plain_scores(run_files, policy), base, OBJECTIVE)
    result["loss"].backward()
    gradients = {name: p.grad.numpy() for name, p in policy.named_parameters() if p.grad is not None}
    return result | {"loss": result["loss"].item(), "gradients": gradients}


def variant(stage: int, tokens: int, shared: str, recompute: str) -> list[str]:
    return [
        f"deepspeed.zero_optimization.stage={stage}",
        f"data.tokens_per_pack={tokens}",
        f"data.prefix_sharing={shared}",
        f"model.gradient_checkpointing={recompute}",
    ]


# One pair per pack, a few packs, one pack.
VARIANTS = [
    variant(3, 1, "true", "true"),
    variant(3, 250, "auto", "false"),
    variant(3, 100_000, "true", "true"),
    variant(3, 250, "false", "true"),
    variant(1, 250, "true", "false"),
    variant(1, 1, "true", "true"),
    variant(2, 250, "true", "true"),
    [*variant(0, 250, "true", "true"), "reference.mode=stored"],
]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_loss_and_gradients_are_those_of_single_examples_in_every_layout(world, run_files, expected, all_workers):
    ranks = all_workers[world].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=VARIANTS)
    for overrides, result in zip(VARIANTS, ranks[0], strict=True):
        for name in ("loss", "nll_loss", "rewards/accuracies"):
            assert math.isclose(result[name], expected[name], rel_tol=1e-5), (overrides, name, result[name], expected[name])
        whole = math.sqrt(sum(float((g**2).sum()) for g in expected["gradients"].values()))
        assert set(result["gradients"]) == set(expected["gradients"])
        for name, gradient in expected["gradients"].items():
            difference = np.linalg.norm(result["gradients"][name].astype(np.float64).reshape(gradient.shape) - gradient)
            assert difference <= 1e-5 * np.linalg.norm(gradient) + 1e-7 * whole, (overrides, name)
    assert len({result["packs"] for result in ranks[0]}) > 2, "the budgets should give different packs"


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "cpo", "beta": 0.3},
        {"name": "orpo", "beta": 0.3, "nll_on_prompt": False},
        {"name": "simpo", "beta": 2.0},
        {"name": "dpo", "loss_type": "aot", "beta": 0.3},
    ],
    ids=["cpo", "orpo", "simpo", "aot"],
)
def test_every_kind_of_objective_is_that_of_single_examples(objective, tmp_path, all_workers):
    write(tmp_path, "t5", objective=objective, reference={})
    lm = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "policy", dtype=torch.float64).eval()
    scores = plain_scores(tmp_path, lm)
    reference = scores if objective["name"] == "dpo" else None
    wanted = oracle.loss_of_scores(scores, reference, objective)["loss"].item()
    variants = [["data.tokens_per_pack=1"], ["data.tokens_per_pack=250"]]
    ranks = all_workers[2].run(
        "cases:first_steps", config_path=str(tmp_path / "run.yaml"), variants=variants, gradients=False
    )
    assert all(math.isclose(result["loss"], wanted, rel_tol=1e-5) for result in ranks[0])


KTO = {"name": "kto", "beta": 0.3, "desirable_weight": 1.5}


@pytest.mark.slow
def test_single_answers_are_those_of_single_examples(tmp_path, all_workers):
    """KTO: an encoder reads each prompt before an answer to another, which is not cut; what a decoder begins with is scored
    of no answer, and there for none that is not."""
    run_files, sides = write(tmp_path, "t5"), ("chosen", "rejected", "rejected")
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(text_rows(PAIRS), sides * 3)
    ]
    (run_files / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, load = AutoTokenizer.from_pretrained(run_files / "tokenizer"), AutoModelForSeq2SeqLM.from_pretrained
    models = ("reference", "policy")  # this way round the reference point is not clamped
    policy, reference = (load(run_files / name, dtype=torch.float64).eval() for name in models)
    examples = []
    for row in rows:
        answer = tokenizer(text_target=row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        both = (answer, []) if row["label"] else ([], answer)
        examples.append([tokenizer(row["prompt"])["input_ids"], *both])

    def scores(lm: Any, of: list[Any]) -> list[Any]:
        return [tuple(score(lm, prompt, answer) if answer else None for answer in answers) for prompt, *answers in of]

    with torch.no_grad():
        others = [scores(lm, oracle.mismatched(examples, longest=10**6)) for lm in (policy, reference)]
        sums = [sum(float(sum(side.answer)) for pair in of for side in pair if side) for of in others]
        base = scores(reference, examples)
    point = max(0.0, (sums[0] - sums[1]) / len(rows))
    assert point > 0, "clamped, it says nothing"
    wanted = oracle.loss_of_scores(scores(policy, examples), base, KTO, point=point)
    wanted["loss"].backward()
    wanted["loss"] = wanted["loss"].item()
    common = [f"objective={json.dumps(KTO)}", f"data.train={run_files}/answers.jsonl"]
    common += [f"{section}.name_or_path={run_files}/{name}" for section, name in zip(("model", "reference"), models)]
    variants = [[*common, *layout] for layout in (VARIANTS[0], VARIANTS[3], VARIANTS[4], VARIANTS[7])]
    ranks = all_workers[2].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=variants)
    for overrides, result in zip(variants, ranks[0], strict=True):
        for name in ("loss", "kl", "rewards/accuracies", "logps/rejected"):
            assert math.isclose(result[name], wanted[name], rel_tol=1e-4, abs_tol=1e-5), (overrides, name)
        whole = math.sqrt(sum(float((p.grad**2).sum()) for p in policy.parameters() if p.grad is not None))
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:
                found = result["gradients"][name].astype(np.float64).reshape(parameter.shape)
                assert np.linalg.norm(found - parameter.grad.numpy()) <= 1e-4 * whole, (overrides, name)


def plain_scores(folder: Path, lm: Any) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = []
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = [
            tokenizer(text_target=row[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")
        ]
        found.append(tuple(score(lm, prompt, labels) for labels in answers))
    return found


def train(workers: Any, folder: Path, *overrides: str) -> list[int]:
    return workers.run("cases:run_training", config_path=str(folder / "run.yaml"), overrides=list(overrides))


LONG = {"pairs_per_step": 3, "max_steps": 4, "learning_rate": 3e-3}


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_run_goes_on_to_the_bit_and_plain_transformers_generates_with_it(family, tmp_path, all_workers):
    """With dropout, so that the random generators matter; on two ranks under ZeRO-3."""
    write(tmp_path, family, train=LONG, checkpoint={"save_every": 2, "keep_last": 9}, reference={})
    settings = json.loads((tmp_path / "policy" / "config.json").read_text())
    rates = {name: 0.1 for name in settings if name in ("dropout", "dropout_rate", "attention_dropout")}
    (tmp_path / "policy" / "config.json").write_text(json.dumps(settings | rates))
    overrides = ["model.disable_dropout=false"]
    assert train(all_workers[2], tmp_path, *overrides) == [0, 0]
    whole, parts = load_file(tmp_path / "run" / "final" / "model.safetensors"), tmp_path / "parts"
    assert train(all_workers[2], tmp_path, *overrides, f"output_dir={parts}") == [0, 0]
    for folder in (parts / "checkpoints").glob("step-*4"):
        shutil.rmtree(folder)
    shutil.rmtree(parts / "final")
    state = json.loads((parts / "run.json").read_text())
    (parts / "run.json").write_text(json.dumps({k: v for k, v in state.items() if k != "summary"} | {"state": "running"}))
    assert train(all_workers[2], tmp_path, *overrides, f"output_dir={parts}") == [0, 0]
    again = load_file(parts / "final" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)

    lm: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "final")
    assert type(lm).__name__ == {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[family]
    assert lm.config.to_dict().items() >= rates.items(), "dropout is off in the run alone"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    answer = lm.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert 1 < answer.shape[1] <= 7


@pytest.mark.parametrize("merge", ["true", "false"])
def test_lora_trains_and_its_adapter_is_exported(merge, tmp_path, all_workers):
    write(tmp_path, "t5", train=LONG, reference={})
    lora = f"model.lora={{r: 4, target_modules: [q, v], merge_on_export: {merge}}}"
    assert train(all_workers[1], tmp_path, lora) == [0]
    final = tmp_path / "run" / "final"
    lm = unpacked.load_plain(str(final))
    before = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "policy")
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        moved = (lm(input_ids=ids, labels=ids).logits - before(input_ids=ids, labels=ids).logits).abs().max()
    assert moved > 1e-4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isclose(lines[0]["loss"], math.log(2) * 0.9 + math.log(2) * 0.1 + lines[0]["nll_loss"] * 0.4, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["objective={name: orpo}", "reference={}"], 2, "objective.nll_on_prompt: true, but"),
        (["data.max_length=300", "model.name_or_path={folder}/bart"], 2, "beyond the model's 64 positions"),
        (["model.name_or_path={folder}/led"], 2, "led is an encoder-decoder model, and of these only"),
        (["reference.name_or_path={folder}/causal"], 2, "reference.name_or_path: .* is no encoder-decoder model"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_in_one_line(overrides, code, said, tmp_path, all_workers):
    write(tmp_path, "t5")
    tiny_encoder_decoder("bart", 259).save_pretrained(tmp_path / "bart")
    save_tiny(tmp_path / "causal", tiny_config("qwen2", 259), seed=1)
    (tmp_path / "led").mkdir()
    (tmp_path / "led" / "config.json").write_text(json.dumps({"model_type": "led", "vocab_size": 259}))
    overrides = [word.replace("{folder}", str(tmp_path)) for word in overrides]
    line = ["--config", str(tmp_path / "run.yaml"), *overrides]
    [[(found, told)]] = all_workers[1].run("cases:command_line", arguments=[line])
    assert found == code and re.search(said, told) and told.count("\n") == 1, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "family", [pytest.param("t5", marks=pytest.mark.slow), pytest.param("bart", marks=pytest.mark.slow), "m2m_100"]
)
def test_held_out_prompts_and_own_ones_are_answered_as_plain_transformers_does(family, tmp_path, all_workers):
    """Prompts of unequal lengths in one batch, on two ranks under ZeRO-3: token for token what `generate` makes of each."""
    write(tmp_path, family, train=LONG, reference={}, log={"samples": 3, "samples_file": f"{tmp_path}/asked.jsonl"})
    lm: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "policy")
    for parameter in lm.parameters():  # with smaller weights all answers would be alike
        parameter.data.mul_(6 if parameter.dim() > 1 and parameter.requires_grad else 1)
    lm.save_pretrained(tmp_path / "policy")
    rows = [{**row, "prompt": row["prompt"] + "?"} for row in text_rows(PAIRS)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "ab cd"}\n{"prompt": "a longer one, of my own"}\n')
    overrides = [f"data.eval={tmp_path}/held_out.jsonl", "log.generation.max_new_tokens=12"]
    assert train(all_workers[2], tmp_path, *overrides) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == 4]
    assert len(last) == 5
    lm = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    for row in last:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answer = lm.generate(input_ids=ids, max_new_tokens=12, do_sample=False, num_beams=1)[0]
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["policy"]
    assert len({row["policy"] for row in last}) > 1

"""Runs and the store that they share: what is recomputed, and only that; kills, flipped bytes, false values, `dspref score`.

Policy and reference start equal and the learning rate moves nothing, so that the first loss and every evaluation are ln 2 if
what the store holds for the run's pairs is right, whatever it was filled by.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config
from transformers import AutoTokenizer, PretrainedConfig
from workers import Workers

from dspref.reference.store import ReferenceStore

LN2 = math.log(2)
TRAIN, HELD_OUT = 12, 5
ALL = TRAIN + HELD_OUT
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


class Outcome(NamedTuple):
    scored: int
    pairs: int
    loss: float
    eval_losses: list[float]
    log: str


def model_config(vocabulary: int = 259, **overrides: Any) -> PretrainedConfig:
    return tiny_config("qwen2", vocabulary, num_hidden_layers=1, **overrides)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store-runs")
    save_tiny(folder / "model", model_config(save_tokenizer(folder / "tokenizer")), seed=1)
    write_rows(folder / "pairs.jsonl", preference_rows(TRAIN, seed=3))
    write_rows(folder / "held_out.jsonl", preference_rows(HELD_OUT, seed=4))
    values = {
        "model": {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"},
        "reference": {"mode": "stored", "store": f"{folder}/store"},
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "tokens_per_pack": 300,
        },
        "objective": {"name": "dpo", "beta": 0.5},
        "train": {"pairs_per_step": TRAIN, "max_steps": 1, "learning_rate": 1e-12},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def filled(folder: Path, all_workers: dict[int, Workers]) -> Path:
    """A store that one run has filled."""
    outcome = run(all_workers[1], folder, folder / "first")
    assert (outcome.scored, outcome.pairs) == (ALL, ALL)
    assert_ln2(outcome)
    return folder / "store"


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled store."""
    return Path(shutil.copytree(filled, tmp_path / "store"))


def run(workers: Workers, folder: Path, output: Path, *overrides: str) -> Outcome:
    arguments = {"config_path": f"{folder}/run.yaml", "overrides": [*overrides, f"output_dir={output}"]}
    assert workers.run("cases:run_training", **arguments) == [0] * workers.size
    log = (output / "logs" / "rank-0.log").read_text()
    ((scored, pairs),) = re.findall(r"reference: scored (\d+) of (\d+) pairs, kept in \S+", log)
    training, *evaluation = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = [value for record in evaluation for name, value in record.items() if re.fullmatch("eval_(.*_)?loss", name)]
    assert len(evaluated) == log.count("held out")
    return Outcome(int(scored), int(pairs), training["loss"], evaluated, log)


def score(
    workers: Workers, folder: Path, store: Path | str, *overrides: str, share: tuple[int, int] = (0, 1), verify: int = 0
) -> tuple[int, str]:
    """`dspref score`: (exit code, what rank 0 said)."""
    arguments = {"overrides": [f"reference.store={store}", *overrides], "share": share, "verify": verify}
    answers = workers.run("cases:score_reference", config_path=f"{folder}/run.yaml", **arguments)
    assert len({code for code, _ in answers}) == 1
    return answers[0]


def assert_ln2(outcome: Outcome) -> None:
    for loss in (outcome.loss, *outcome.eval_losses):
        assert math.isclose(loss, LN2, abs_tol=1e-5), outcome


def shards(store: Path) -> dict[str, bytes]:
    """Sound shards of all identities, by their path in the store."""
    found = {path.relative_to(store).as_posix(): path for path in store.rglob("*.safetensors")}
    return {name: path.read_bytes() for name, path in found.items() if "damaged-" not in name}


def sequences(store: Path) -> int:
    """How many values a store holds, whole and repeated ones alike."""
    return sum(len(load_file(store / name)["keys"]) for name in shards(store))


def values_of(store: Path) -> dict[bytes, bytes]:
    """What a store holds of every sequence, whatever the shards that it lies in."""
    sound = [load_file(store / name) for name in sorted(shards(store), reverse=True)]
    return {k.tobytes(): v.tobytes() for shard in sound for k, v in zip(shard["keys"], shard["values"])}


def token_ids(folder: Path, name: str) -> list[list[list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [oracle.render(json.loads(line), tokenizer) for line in (folder / name).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# What changes no value


def swapped(folder: Path, tmp_path: Path) -> list[str]:
    return ["data.train.columns.chosen=rejected", "data.train.columns.rejected=chosen"]


def reordered(folder: Path, tmp_path: Path) -> list[str]:
    write_rows(tmp_path / "moved.jsonl", preference_rows(TRAIN, seed=3)[::-1])
    return [f"data.train.path={tmp_path}/moved.jsonl"]


def copied(folder: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(folder / "model", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("the same weights")
    return [f"model.name_or_path={tmp_path}/elsewhere"]


def copied_reference(folder: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(folder / "model", tmp_path / "elsewhere")
    return [f"reference.name_or_path={tmp_path}/elsewhere"]


def short_enough(folder: Path, tmp_path: Path) -> list[str]:
    ids = token_ids(folder, "pairs.jsonl") + token_ids(folder, "held_out.jsonl")
    return [f"data.max_length={max(len(prompt) + max(map(len, answers)) for prompt, *answers in ids)}"]


def evaluated_on_itself(folder: Path, tmp_path: Path) -> list[str]:
    return [f"data.eval={{again: {{path: {folder}/pairs.jsonl, split: train}}, eval: {{path: {folder}/held_out.jsonl}}}}"]


# name -> (world, overrides, or what makes them)
HARMLESS: dict[str, tuple[int, list[str] | Callable[[Path, Path], list[str]]]] = {
    "learning rate and output folder": (1, ["train.learning_rate=1e-11", "train.lr_scheduler_type=cosine"]),
    "objective": (1, ["objective={name: dpo, loss_type: [aot, sigmoid], loss_weights: [0, 1], beta: 0.1, ld_alpha: 0.5}"]),
    "world size": (2, []),
    "ZeRO stage, packs, sharing, checkpointing, seed": (
        2, ["deepspeed.zero_optimization.stage=3", "data.tokens_per_pack=100", "data.prefix_sharing=false",
            "model.gradient_checkpointing=false", "train.seed=7", "data.shuffle=false"],
    ),
    "an adapter is trained": (1, ["model.lora={r: 4, lora_alpha: 16}"]),
    "sides": (1, swapped),
    "path and order of the rows": (1, reordered),
    "path of the weights": (1, copied),
    "path of the reference": (1, copied_reference),
    "a length that cuts nothing": (1, short_enough),
    "evaluation on the training pairs": (1, evaluated_on_itself),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_is_recomputed_for_what_decides_no_value(name, folder, filled, store, all_workers, tmp_path):
    world, overrides = HARMLESS[name]
    overrides = overrides(folder, tmp_path) if callable(overrides) else overrides
    outcome = run(all_workers[world], folder, tmp_path / "run", f"reference.store={store}", *overrides)
    assert outcome.scored == 0
    assert_ln2(outcome)
    assert shards(store) == shards(filled)


# ---------------------------------------------------------------------------------------------------------------------
# What changes values


def another_tokenizer(folder: Path, tmp_path: Path) -> list[str]:
    """The letters have exchanged their ids."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    ids = [vocabulary[letter] for letter in letters]
    vocabulary |= dict(zip(letters, ids[::-1]))
    path.write_text(json.dumps(content))
    return [f"model.tokenizer_name_or_path={tmp_path}/tokenizer"]


def another_template(folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return [f"model.chat_template={tmp_path}/template.jinja"]


def another_row(folder: Path, tmp_path: Path) -> list[str]:
    rows = preference_rows(TRAIN, seed=3)
    rows[3] |= {"prompt": "fade:", "chosen": " a bag", "rejected": " a cab"}
    write_rows(tmp_path / "pairs.jsonl", rows)
    return [f"data.train.path={tmp_path}/pairs.jsonl"]


def another_answer(folder: Path, tmp_path: Path) -> list[str]:
    """Of one side, with as many tokens: the other side is known."""
    rows = preference_rows(TRAIN, seed=3)
    assert isinstance(rows[3]["chosen"], str)
    rows[3]["chosen"] = "x" * len(rows[3]["chosen"])
    write_rows(tmp_path / "pairs.jsonl", rows)
    return [f"data.train.path={tmp_path}/pairs.jsonl"]


def a_mixture(folder: Path, tmp_path: Path) -> list[str]:
    """Four new pairs, one of them twice, beside two that are known."""
    new = preference_rows(4, seed=9)
    write_rows(tmp_path / "more.jsonl", [*new, *preference_rows(2, seed=3), new[1]])
    return [f"data.train=[{{path: {folder}/pairs.jsonl}}, {{path: {tmp_path}/more.jsonl}}]", "train.pairs_per_step=19"]


def another_evaluation(folder: Path, tmp_path: Path) -> list[str]:
    write_rows(tmp_path / "more.jsonl", preference_rows(3, seed=8))
    return [f"data.eval={{eval: {{path: {folder}/held_out.jsonl}}, more: {{path: {tmp_path}/more.jsonl}}}}"]


def another_config(folder: Path, tmp_path: Path) -> list[str]:
    """The same weight files under a config that makes another function of them."""
    shutil.copytree(folder / "model", tmp_path / "model")
    model_config(rms_norm_eps=1e-2).save_pretrained(tmp_path / "model")
    return [f"model.name_or_path={tmp_path}/model"]


def conversations(folder: Path) -> int:
    rows = preference_rows(TRAIN, seed=3) + preference_rows(HELD_OUT, seed=4)
    count = sum(isinstance(row["prompt"], list) for row in rows)
    assert 0 < count < ALL
    return count


# name -> (overrides, or what makes them; how many pairs are scored)
HARMFUL: dict[str, tuple[list[str] | Callable[[Path, Path], list[str]], int | Callable[[Path], int]]] = {
    "tokenizer": (another_tokenizer, ALL),
    "template": (another_template, conversations),
    "a row": (another_row, 1),
    "an answer": (another_answer, 1),
    "a data set more": (a_mixture, 4),
    "an evaluation more": (another_evaluation, 3),
    "config of the model": (another_config, ALL),
    "type": (["model.dtype=bfloat16"], ALL),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_has_changed_is_recomputed_and_nothing_else(name, folder, filled, store, all_workers, tmp_path):
    overrides, expected = HARMFUL[name]
    overrides = overrides(folder, tmp_path) if callable(overrides) else overrides
    expected = expected(folder) if callable(expected) else expected
    world = 2 if expected == 4 else 1
    outcome = run(all_workers[world], folder, tmp_path / "run", f"reference.store={store}", *overrides)
    assert outcome.scored == expected
    if name != "type":  # where bfloat16 rounds
        assert_ln2(outcome)
    assert shards(filled).items() <= shards(store).items()
    assert sequences(store) - sequences(filled) == (2 * expected if name != "an answer" else 1)


def cut(pair: list[list[int]], limit: int, keep_end: bool = True) -> tuple[list[int], ...]:
    prompt, chosen, rejected = pair
    room = max(1, limit - max(len(chosen), len(rejected)))
    if len(prompt) > room:
        prompt = prompt[-room:] if keep_end else prompt[:room]
    return prompt, chosen[: limit - len(prompt)], rejected[: limit - len(prompt)]


def test_of_other_limits_only_what_they_cut_is_recomputed(folder, store, all_workers, tmp_path):
    ids = token_ids(folder, "pairs.jsonl") + token_ids(folder, "held_out.jsonl")
    lengths = sorted(len(prompt) + max(map(len, answers)) for prompt, *answers in ids)
    limit, short = lengths[ALL // 2], lengths[ALL // 4]
    held = [f"reference.store={store}", f"data.max_length={limit}"]

    def differ(one: list, other: list) -> int:
        return sum(a != b for a, b in zip(one, other, strict=True))

    whole = [tuple(pair) for pair in ids]
    at_limit, from_start = ([cut(pair, limit, keep_end) for pair in ids] for keep_end in (True, False))
    shorter = [cut(pair, short) for pair in ids]
    counts = [differ(at_limit, whole), differ(from_start, at_limit), differ(shorter, at_limit)]
    assert all(0 < count < ALL for count in counts), counts
    for name, overrides, count in (
        ("limit", held, counts[0]),
        ("again", held, 0),
        ("truncation", [*held, "data.truncation_mode=keep_start"], counts[1]),
        ("shorter", [*held, f"data.max_length={short}"], counts[2]),
    ):
        outcome = run(all_workers[1], folder, tmp_path / name, *overrides)
        assert outcome.scored == count, name
        assert_ln2(outcome)


def test_an_evaluation_set_that_is_added_is_all_that_is_scored(folder, all_workers, tmp_path):
    held = f"reference.store={tmp_path}/store"
    before = run(all_workers[1], folder, tmp_path / "before", held, "data.eval=null")
    after = run(all_workers[1], folder, tmp_path / "after", held)
    assert (before.scored, before.pairs, after.scored, after.pairs) == (TRAIN, TRAIN, HELD_OUT, ALL)
    assert_ln2(after)


def test_a_run_scores_what_its_steps_need(folder, all_workers, tmp_path):
    """Four pairs a step; then more steps of the same run; a second epoch; and where the store is lost, what is left."""
    held = [f"reference.store={tmp_path}/store", "train.pairs_per_step=4", "checkpoint.save_every=1"]
    found = []
    for name, world, steps in (("run", 1, 1), ("run", 2, 2), ("other", 1, 5), ("run", 1, 3)):
        if found[2:]:
            shutil.rmtree(tmp_path / "store")
        overrides = [*held, f"train.max_steps={steps}", f"output_dir={tmp_path}/{name}"]
        assert (
            all_workers[world].run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=overrides)
            == [0] * world
        )
        log = (tmp_path / name / "logs" / "rank-0.log").read_text()
        found.append(re.findall(r"reference: scored (\d+) of (\d+) pairs, kept in \S+", log)[-1])
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "loss" in record] == list(range(1, steps + 1))
        for loss in (record.get("loss", record.get("eval_loss")) for record in records):
            assert math.isclose(loss, LN2, abs_tol=1e-5)
    assert found == [("9", "9"), ("4", "9"), ("4", "17"), ("9", "9")], "the last: of the third step alone"


def test_of_a_reference_point_all_that_a_run_needs_is_scored_beforehand(folder, all_workers, tmp_path):
    """Mismatched pairs of every step of both epochs and of the evaluation: the run then scores nothing, and KTO's loss is a
    half where the policy is the reference."""
    overrides = ["objective={name: kto, beta: 0.5}", "train.pairs_per_step=5", "train.max_steps=5", "log.every=1"]
    code, said = score(all_workers[2], folder, tmp_path / "store", *overrides)
    assert code == 0, said
    overrides += [f"reference.store={tmp_path}/store", f"output_dir={tmp_path}/run"]
    assert all_workers[1].run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=overrides) == [0]
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    ((scored, pairs),) = re.findall(r"reference: scored (\d+) of (\d+) pairs, kept in \S+", log)
    mismatched = 5 + 5 + 2 + 5 + 5
    assert (scored, int(pairs)) == ("0", ALL + mismatched + HELD_OUT)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 6
    for record in records:
        prefix = "" if "loss" in record else "eval_"
        assert record[f"{prefix}loss"] == pytest.approx(0.5, abs=1e-5)
        assert record[f"{prefix}kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("how", ["saved anew", "in place, with the old time"])
def test_other_weights_at_the_same_path_are_noticed(how, folder, all_workers, tmp_path):
    """The digest of the file is remembered, so nothing but the file's state can tell."""
    weights = tmp_path / "model" / "model.safetensors"
    overrides = [f"model.name_or_path={tmp_path}/model", f"reference.store={tmp_path}/store"]
    save_tiny(tmp_path / "model", model_config(), seed=1)
    memory = Path(os.environ["DSPREF_CACHE"]) / "digests.json"
    time.sleep(2.5)  # a file so young is not remembered
    assert run(all_workers[1], folder, tmp_path / "first", *overrides).scored == ALL
    assert str(weights.resolve()) in json.loads(memory.read_text())
    before = weights.stat()
    if how == "saved anew":
        save_tiny(tmp_path / "model", model_config(), seed=2)
    else:
        save_tiny(tmp_path / "draft", model_config(), seed=2)
        weights.write_bytes((tmp_path / "draft" / "model.safetensors").read_bytes())
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert weights.stat().st_size == before.st_size
    outcome = run(all_workers[1], folder, tmp_path / "second", *overrides)
    assert outcome.scored == ALL
    assert_ln2(outcome)
    # And once more, at once: what was written so shortly before must not have been remembered as it was.
    save_tiny(tmp_path / "model", model_config(), seed=3)
    outcome = run(all_workers[1], folder, tmp_path / "third", *overrides)
    assert outcome.scored == ALL
    assert_ln2(outcome)
    save_tiny(tmp_path / "model", model_config(), seed=1)
    assert run(all_workers[1], folder, tmp_path / "back", *overrides).scored == 0


def test_another_reference_has_values_of_its_own(folder, store, all_workers, tmp_path):
    save_tiny(tmp_path / "other", model_config(), seed=2)
    for reference in (f"reference.name_or_path={tmp_path}/other", "reference.dtype=bfloat16"):
        name = reference.partition("=")[2].rpartition("/")[2]
        anew = run(all_workers[1], folder, tmp_path / f"{name}-anew", reference, f"reference.store={tmp_path}/{name}-store")
        beside = run(all_workers[1], folder, tmp_path / f"{name}-beside", reference, f"reference.store={store}")
        again = run(all_workers[2], folder, tmp_path / f"{name}-again", reference, f"reference.store={store}")
        assert (anew.scored, beside.scored, again.scored) == (ALL, ALL, 0)
        assert anew.loss == beside.loss != LN2
        assert again.loss == pytest.approx(anew.loss, rel=1e-5)
    assert len({path.parent for path in store.rglob("*.safetensors")}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_flipped_byte_is_found_before_training(folder, filled, store, all_workers, tmp_path):
    """Wherever it lies: in the header, among the keys, among the values, at the end."""
    sound = shards(filled)
    assert len(sound) == 2, "the training pairs and the held-out ones"
    for k, place in enumerate((3, 0.3, 0.9, -1)):
        name = sorted(sound)[k % 2]
        data = bytearray(sound[name])
        data[place if isinstance(place, int) else int(place * len(data))] ^= 1
        (store / name).write_bytes(data)
        outcome = run(all_workers[1 + k % 2], folder, tmp_path / str(k), f"reference.store={store}")
        assert outcome.scored in (TRAIN, HELD_OUT)
        assert_ln2(outcome)
        assert outcome.log.index(f"{Path(name).name} is damaged") < outcome.log.index("step 1/1")
        if k % 2 == 0:  # the world that had filled it
            assert shards(store) == sound
        assert (store / name).with_name(f"damaged-{Path(name).name}").read_bytes() == data


def test_false_values_are_found_by_verify(folder, store, all_workers, tmp_path):
    """Either value of a sequence, of one pair among many; in a part of the pairs, and in all of them, right ones pass."""
    for world, verify in ((1, 100), (2, 3)):
        code, said = score(all_workers[world], folder, store, verify=verify)
        assert code == 0
        assert f"reference: scored 0 of {ALL} pairs" in said
        assert f"reference: {min(verify, ALL)} pairs scored again" in said
    identity = next(store.iterdir())
    described = json.loads((identity / "identity.json").read_text())["described"]
    sound = [load_file(path) for path in identity.glob("*.safetensors")]
    keys, values, tokens = (np.concatenate([shard[name] for shard in sound]) for name in ("keys", "values", "tokens"))
    for column in (0, 1):
        false = values.copy()
        false[7, column] += 0.01 * tokens[7]
        root = tmp_path / f"false-{column}"
        ReferenceStore(root, described).append(keys, false, tokens)
        assert sequences(root) == 2 * ALL
        code, said = score(all_workers[1 + column], folder, root, verify=ALL)
        assert code == 5
        assert "largest difference 0.01 nats" in said


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dspref.cli", "score", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_jobs_that_share_the_work_fill_the_store_that_one_job_fills(folder, filled, all_workers, tmp_path):
    """Several ranks, then one, then the command itself."""
    held, path = f"reference.store={tmp_path}/store", f"{folder}/run.yaml"
    for k, world, work in ((0, 2, TRAIN), (2, 1, 0)):
        code, said = score(all_workers[world], folder, tmp_path / "store", share=(k, 3), verify=50)
        assert code == 0
        assert f"reference: scored {work} of {ALL} pairs" in said
        assert f"reference: {TRAIN} pairs scored again" in said, "of the others there is nothing to compare with"
        assert sequences(tmp_path / "store") == 2 * TRAIN
    done = command(path, held, "--share", "1/3", "--verify", "50")
    assert done.returncode == 0, done.stderr
    assert f"reference: scored {HELD_OUT} of {ALL} pairs" in done.stdout
    assert f"reference: {ALL} pairs scored again" in done.stdout
    assert sequences(tmp_path / "store") == 2 * ALL
    assert not list((tmp_path / "store").rglob(".draft-*"))
    outcome = run(all_workers[2], folder, tmp_path / "run", held)
    assert outcome.scored == 0
    assert_ln2(outcome)


@pytest.mark.parametrize("share", ["3/3", "1", "-1/3", "0/0", "a/b", "1/2/3", ""])
def test_a_share_that_makes_no_sense_is_one_line(share, folder, tmp_path):
    done = command(f"{folder}/run.yaml", f"reference.store={tmp_path}/store", f"--share={share}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("--share: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_where_nothing_can_be_stored_the_command_says_so(folder, all_workers, tmp_path):
    for overrides, reason in (
        (["objective={name: simpo}", "reference={mode: auto}"], "objective.name: simpo needs no reference"),
        (["reference={mode: engine}"], "reference.mode: engine keeps"),
        (["reference={sync_ref_model: true}"], "reference.mode: engine keeps"),
        (["model.init=random"], "model.init: random"),
    ):
        arguments = {"config_path": f"{folder}/run.yaml", "overrides": overrides}
        ((code, said),) = all_workers[1].run("cases:score_reference", **arguments)
        assert code == 2, overrides
        assert reason in said and said.count("\n") == 1, said


def test_a_store_that_cannot_be_had_is_one_line(folder, filled, all_workers, tmp_path):
    """A file lies where a folder should be, or there can be no folder."""
    (tmp_path / "store").mkdir()
    for blocked in (tmp_path / "notes", tmp_path / "store" / next(filled.iterdir()).name):
        blocked.write_text("someone's notes")
    before = sorted(tmp_path.rglob("*"))
    done = command(f"{folder}/run.yaml", f"reference.store={tmp_path}/notes")
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith(f"{tmp_path}/notes: ") and done.stderr.count("\n") == 1
    assert "set reference.store" in done.stderr
    for root, world, verb in (("/proc/no", 1, "write"), (tmp_path / "store", 2, "read"), (tmp_path / "notes", 1, "read")):
        code, said = score(all_workers[world], folder, root)
        assert code == 4
        assert re.search(rf"^{root}\S*: cannot {verb} the reference store .* set reference.store$", said, re.MULTILINE), said
    assert sorted(tmp_path.rglob("*")) == before
    assert {path.read_text() for path in before if path.is_file()} == {"someone's notes"}


# ---------------------------------------------------------------------------------------------------------------------
# Kills. Whatever a job leaves behind, the next one forms the same packs, hence the same values.

BLOCKS = 12


@pytest.fixture(scope="module")
def many(folder: Path, all_workers: dict[int, Workers]) -> tuple[list[str], dict[bytes, bytes]]:
    """Overrides for twelve blocks of very short pairs, and the values that one undisturbed job makes of them."""
    rows = [{"prompt": f"{i:x}:", "chosen": f" {i % 7}", "rejected": f" {i % 11}b"} for i in range(1000 * BLOCKS)]
    overrides = [f"data.train.path={write_rows(folder / 'many.jsonl', rows)}", "data.eval=null", "data.tokens_per_pack=400"]
    code, said = score(all_workers[1], folder, folder / "whole", *overrides)
    assert code == 0
    assert f"reference: scored {1000 * BLOCKS} of {1000 * BLOCKS} pairs" in said
    assert len(shards(folder / "whole")) >= BLOCKS
    return overrides, values_of(folder / "whole")


def start(folder: Path, store: Path, overrides: Sequence[str], *options: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "dspref.cli", "score", f"{folder}/run.yaml", f"reference.store={store}", *overrides]
    return subprocess.Popen([*line, *options], stdout=subprocess.PIPE, text=True)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_job_that_is_killed_ten_times_leaves_the_values_of_one_that_was_not(folder, many, tmp_path):
    overrides, expected = many
    store, draws, left = tmp_path / "store", random.Random(5), []
    for kill in range(10):
        job, before = start(folder, store, overrides), len(shards(store))
        assert any("whole on each rank" in line for line in job.stdout), "the reference is loaded, and scoring begins"
        deadline = time.monotonic() + (60 if kill % 2 else draws.choice([0.0, 0.1, 0.3]))
        while time.monotonic() < deadline and len(shards(store)) == before:
            time.sleep(0.001)
        job.kill()
        assert job.wait() == -9, "killed, not finished"
        job.stdout.close()
        left.append(len(shards(store)))
        assert values_of(store).items() < expected.items()
    assert len(set(left)) >= 5, "every other kill waits for a shard"
    with start(folder, store, overrides, "--verify", "50") as job:
        said = job.stdout.read()
    assert job.returncode == 0
    assert f"of {1000 * BLOCKS} pairs, kept" in said
    assert values_of(store) == expected


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_jobs_at_the_same_time_leave_the_values_of_one(folder, many, tmp_path):
    """Two that share the work, and one that does all of it."""
    overrides, expected = many
    store = tmp_path / "store"
    jobs = [start(folder, store, overrides, "--share", share) for share in ("0/2", "1/2", "0/1")]
    for job in jobs:
        job.communicate()
        assert job.returncode == 0
    assert values_of(store) == expected
    assert not [path for path in store.rglob("*") if path.name.startswith(("damaged-", ".draft-"))]

"""KTO and BCO end to end, on single answers, on pairs and on both: steps in DeepSpeed, whole runs and evaluations are those
of the oracle (tests/oracle.py), which sees one sequence at a time and makes the mismatched pairs by itself."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_every_objective import compare, compare_gradients, first_steps, written
from tiny import rows_that_share, save_tokenizer, write_one_step
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Workers

OBJECTIVES: dict[str, dict[str, Any]] = {
    "kto": {"name": "kto", "beta": 0.3},
    "kto weighted": {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.4},
    "apo_zero_unpaired": {"name": "kto", "loss_type": "apo_zero_unpaired", "beta": 0.2},
    "bco": {"name": "bco", "beta": 0.3},
}
KINDS = ("singles", "pairs", "mixed", "undesirable")
# (ZeRO stage, tokens_per_pack, prefix_sharing)
LAYOUTS = ((3, 200, "true"), (1, 200, "false"), (3, 1, "true"), (1, 100_000, "true"), (2, 1, "false"))


def singles() -> list[dict[str, Any]]:
    """Texts and conversations, labels as people write them; several of one prompt, beside one another and not; and a prompt
    so long that the answer which it meets is cut."""

    def chat(*turns: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)]

    return [
        {"prompt": "a cab?", "completion": " bad bad egg", "label": True},
        {
            "prompt": chat("fade " * 20, "aha", "which bead?"),
            "completion": chat("", "the blue one, a bee said so to the hedge")[1:],
            "label": 0,
        },
        {"prompt": "name a gag:", "completion": " cage", "label": "false"},
        {"prompt": "name a gag:", "completion": " a deaf bee, a fed cab", "label": 1},
        {"prompt": "name a gag:", "completion": " egg", "label": False},
        {"messages": chat("hi", "what", "a bag?", "a bad bag"), "label": False},
        {"prompt": chat("fade", "aha", "and then?"), "completion": chat("", "ebb")[1:], "label": "True"},
        {"messages": chat("feed me", "an egg, a fig" + ", a bad bag, and a badge beside a bed" * 3), "label": True},
        {"prompt": "a cab?", "completion": " no, a bag", "label": False},
    ]


def rows_of(kind: str) -> list[dict[str, Any]]:
    alone, pairs = singles(), rows_that_share(6, seed=3)
    mixed = [row for both in zip(alone, pairs) for row in both] + alone[len(pairs) :]
    undesirable = [row for row in alone if str(row["label"]).lower() in ("0", "false")]
    return {"singles": alone, "pairs": pairs, "mixed": mixed, "undesirable": undesirable, "held_out": mixed[1:8]}[kind]


def steps_of(rows: list[Any], size: int, count: int) -> list[list[Any]]:
    """The examples of each step, epoch after epoch, in the order of the file."""
    epoch = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [epoch[k % len(epoch)] for k in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpaired")
    for kind in (*KINDS, "held_out"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    save_tokenizer(folder / "tokenizer")
    data = {"train": {"path": f"{folder}/mixed.jsonl"}, "max_length": longest_in(folder)}
    write_one_step(folder, data, {"pairs_per_step": 64})
    return folder


def examples_in(folder: Path) -> dict[str, list[Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return {kind: [oracle.render(row, tokenizer) for row in rows_of(kind)] for kind in (*KINDS, "held_out")}


def longest_in(folder: Path) -> int:
    """So many tokens has the longest example: with this limit none is cut but mismatched ones."""
    return max(map(oracle.longest_of, examples_in(folder).values()))


class Book:
    """What the oracle says of steps. Every sequence is scored once for all objectives."""

    def __init__(self, folder: Path) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.policy, self.reference = (load(folder / name, dtype=torch.float64) for name in ("policy", "reference"))
        self.examples = examples_in(folder)
        self.longest = longest_in(folder)
        self.scored = cache(self._scored)
        self.point = cache(self._point)

    def _scored(self, kind: str) -> tuple[list[Any], list[Any]]:
        with torch.no_grad():
            theirs = oracle.score_pairs(self.reference, self.examples[kind])
        return oracle.score_pairs(self.policy, self.examples[kind]), theirs

    def _point(self, kind: str, rows: tuple[int, ...]) -> float:
        examples = self.examples[kind]
        return oracle.reference_point(self.policy, self.reference, [examples[i] for i in rows], self.longest)

    def step(self, kind: str, rows: list[int], objective: dict[str, Any], delta: float | None = None) -> dict[str, Any]:
        ours, theirs = ([table[i] for i in rows] for table in self.scored(kind))
        point = self.point(kind, tuple(rows)) if objective["name"] == "kto" else None
        return oracle.loss_of_scores(ours, theirs, objective, delta, point=point)

    def whole(self, kind: str, objective: dict[str, Any]) -> dict[str, Any]:
        """A step over all examples, with gradients."""
        result = self.step(kind, list(range(len(self.examples[kind]))), objective)
        parameters = dict(self.policy.named_parameters())
        gradients = torch.autograd.grad(result["loss"], list(parameters.values()), retain_graph=True)
        result["gradients"] = {name: gradient.numpy() for name, gradient in zip(parameters, gradients)}
        return result | {"loss": result["loss"].item()}


@pytest.fixture(scope="module")
def book(folder: Path) -> Book:
    return Book(folder)


def test_the_oracle_has_something_to_tell(book: Book) -> None:
    """A reference point that is not clamped, mismatched answers that are cut, and examples of every kind."""
    for kind in ("singles", "pairs", "mixed"):
        examples = book.examples[kind]
        assert book.point(kind, tuple(range(len(examples)))) > 0.05, kind
    alone = book.examples["singles"]
    assert [sum(map(bool, answers)) for _, *answers in alone] == [1] * 9
    own, others = ([answers for _, *answers in examples] for examples in (alone, oracle.mismatched(alone, book.longest)))
    assert [own.index(answers) if answers in own else -1 for answers in others] == [5, -1, 0, 8, 1, 2, 3, 4, 6]
    assert others[1][0] == own[7][0][: len(others[1][0])] != own[7][0], "an answer loses its end behind a long prompt"
    assert {bool(chosen) + bool(rejected) for _, chosen, rejected in book.examples["mixed"]} == {1, 2}


def plans() -> list[tuple[str, str, tuple[int, int, str]]]:
    """Every objective on all kinds of data, in one layout each, in turn."""
    cases = list(product(OBJECTIVES, KINDS))
    return [(*case, LAYOUTS[k % len(LAYOUTS)]) for k, case in enumerate(cases)]


FEW = [("kto", "singles", LAYOUTS[0]), ("kto weighted", "mixed", LAYOUTS[1]), ("bco", "mixed", LAYOUTS[2])]


@pytest.mark.parametrize(
    ("world", "plan"),
    [(2, FEW), *(pytest.param(world, plans(), marks=pytest.mark.slow) for world in (1, 2))],
    ids=["few", "all-1", "all-2"],
)
def test_steps_are_those_of_the_oracle(world: int, plan: list[Any], folder: Path, book: Book, all_workers) -> None:
    """Loss, metrics and gradients of single answers, of pairs, and of both in one step."""
    variants = [
        [
            f"objective={json.dumps(OBJECTIVES[name])}",
            f"data.train={folder}/{kind}.jsonl",
            f"deepspeed.zero_optimization.stage={stage}",
            f"data.tokens_per_pack={tokens}",
            f"data.prefix_sharing={sharing}",
        ]
        for name, kind, (stage, tokens, sharing) in plan
    ]
    faults = []
    for (name, kind, layout), found in zip(plan, first_steps(all_workers[world], folder, variants), strict=True):
        wanted = book.whole(kind, OBJECTIVES[name])
        faults += compare(found, wanted, 1e-4, f"{name} {kind} {layout}")
        faults += compare_gradients(found, wanted, 1e-4, f"{name} {kind} {layout}")
        if kind == "undesirable":
            assert not any(name.endswith(("/chosen", "/margins")) for name in found), "means over no answer at all"
    assert not faults, "\n".join(faults)


RUNS = [("kto", 2, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in
        (("kto", 1, 1), ("bco", 1, 3), ("bco", 2, 1), ("apo_zero_unpaired", 2, 1)))]  # fmt: skip
SIZE, STEPS = 7, 4


@pytest.mark.parametrize(("name", "world", "stage"), RUNS)
def test_runs_are_those_of_the_oracle(name: str, world: int, stage: int, folder: Path, book: Book, all_workers, tmp_path):
    """Four steps that move nothing, of which the third begins the second epoch anew and the last evaluates: each has a
    reference point of its own, and BCO's threshold is the mean over steps."""
    overrides = [
        f"objective={json.dumps(OBJECTIVES[name])}",
        f"train={{pairs_per_step: {SIZE}, max_steps: {STEPS}, learning_rate: 1.0e-30, eval_every: 3, max_grad_norm: 0}}",
        f"data.eval={folder}/held_out.jsonl",
        f"deepspeed.zero_optimization.stage={stage}",
        f"output_dir={tmp_path}/run",
        f"reference.store={tmp_path}/store",
    ]
    workers: Workers = all_workers[world]
    assert workers.run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=overrides) == [0] * world
    steps, evaluations = written(tmp_path / "run")
    rows = list(range(len(book.examples["mixed"])))
    held_out = list(range(len(book.examples["held_out"])))
    faults: list[str] = []
    deltas: list[float] = []
    for number, step in enumerate(steps_of(rows, SIZE, STEPS), 1):
        own = book.step("mixed", step, OBJECTIVES[name])
        deltas += [own["bco_delta"]] if "bco_delta" in own else []
        delta = sum(deltas) / len(deltas) if deltas else None
        wanted = book.step("mixed", step, OBJECTIVES[name], delta)
        faults += compare(steps[number - 1], floats(wanted), 1e-4, f"step {number}")
        if number in (3, STEPS):
            wanted = book.step("held_out", held_out, OBJECTIVES[name], delta)
            faults += compare(evaluations[number], floats(wanted), 1e-4, f"evaluation at step {number}")
    assert not faults, "\n".join(faults)
    assert len(steps) == STEPS and evaluations.keys() == {3, STEPS}


def floats(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"loss": result["loss"].item()}


@pytest.mark.slow
def test_a_run_without_a_desirable_answer_says_so_by_what_it_leaves_out(folder: Path, all_workers, tmp_path: Path) -> None:
    """In training and in evaluation: no mean over nothing, no margin, and the best is what there is."""
    rows = [{"prompt": "a bead?", "completion": f" {word}", "label": False} for word in ("bed", "cab", "egg")]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        'objective={"name": "kto"}',
        "train={pairs_per_step: 4, max_steps: 2, eval_every: 1, learning_rate: 1.0e-3}",
        f"data={{train: {folder}/undesirable.jsonl, eval: {tmp_path}/held_out.jsonl, tokens_per_pack: 200}}",
        "checkpoint={keep_best: eval_rewards/margins, save_every: 1}",
        f"output_dir={tmp_path}/run",
        f"reference.store={tmp_path}/store",
    ]
    assert all_workers[2].run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=overrides) == [0, 0]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and not any("/chosen" in line or "margins" in line or "null" in line for line in lines)
    assert all("rewards/rejected" in line and "rewards/accuracies" in line for line in lines)
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "nan" not in log.replace("finan", "") and "eval  loss" in log

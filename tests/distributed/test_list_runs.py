"""Lists of answers and gold answers end to end: steps in DeepSpeed, whole runs and evaluations are those of the oracle
(tests/oracle.py), which sees one sequence at a time, however the lists lie in packs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_every_objective import compare, compare_gradients, first_steps, written
from tiny import write_one_step
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Workers

OBJECTIVES: dict[str, dict[str, Any]] = {
    "plackett_luce": {"name": "listwise", "beta": 0.3},
    "weighed plackett_luce": {"name": "listwise", "loss_type": "plackett_luce", "beta": 0.1},
    "lipo_lambda": {"name": "listwise", "loss_type": "lipo_lambda", "beta": 0.3, "score_scale": 0.7},
    "tpo": {"name": "tpo", "beta": 0.1, "tpo_alpha": 0.5},
    "weighed tpo hinge": {"name": "tpo", "loss_type": "hinge", "beta": 0.05},
    "tpo ipo": {"name": "tpo", "loss_type": "ipo", "beta": 0.5},
    "tpo_l": {"name": "tpo", "loss_type": "tpo_l", "beta": 2.0, "tpo_l_gamma": 0.3, "label_smoothing": 0.1},
}
# (ZeRO stage, tokens_per_pack, prefix_sharing): one example per pack, so that no list has room; a few packs; one.
LAYOUTS = ((3, 1, "true"), (1, 150, "false"), (2, 100_000, "true"), (3, 150, "true"), (1, 1, "false"), (0, 100_000, "false"))


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)]


def lists() -> list[dict[str, Any]]:
    """Texts and conversations, scores and ranks, equal ones among them, pairs; and two lists of one prompt."""
    return [
        {
            "prompt": "a cab?",
            "completions": [" bad bad egg", " a bag", " fed", " ace"],
            "scores": [0.2, 0.9, 0.2, 0.5],
            "w": 2,
        },
        {"prompt": chat("which bead?"), "completions": [chat("", "the blue one")[1:], chat("", "b")[1:]], "scores": [1, 0]},
        {
            "prompt": "name a gag:",
            "completions": [f" {word}" for word in ("cage", "a deaf bee, a fed cab", "egg", "ebb", "dad", "a bad badge")],
            "ranks": [2, 1, 3, 3, 6, 5],
            "w": 0.5,
        },
        {"prompt": "a cab?", "completions": [" no, a bag", " bad bad egg"], "scores": [0.1, 1.0]},
        {"prompt": "fade", "chosen": " a fad", "rejected": " decade"},
        {
            "prompt": chat("fade", "aha", "and then?"),
            "completions": [{"role": "assistant", "content": text} for text in ("ebb", "a bed beside a badge", "hid")],
            "scores": [0.3, 0.6, 0.6],
            "w": 0,
        },
        {"prompt": "feed me:", "completions": [" an egg", " a fig, a bad bag and a badge"], "scores": [0.4, 0.8]},
    ]


def triples() -> list[dict[str, Any]]:
    """Texts, conversations, a history without a prompt column, a whole conversation as the gold answer."""
    history = chat("which bead?", "a bed", "no, a bead")
    return [
        {
            "prompt": "a cab?",
            "reference": " a cab, indeed a big cab",
            "chosen": " a bag",
            "rejected": " bad bad egg",
            "w": 2,
        },
        {"prompt": chat("hi"), "reference": "a fine day", "chosen": chat("", "a bee")[1:], "rejected": chat("", "b")[1:]},
        {
            "reference": [*history, *chat("", "the blue bead")[1:]],
            "chosen": [*history, *chat("", "egg")[1:]],
            "rejected": [*history, *chat("", "age")[1:]],
            "w": 0.5,
        },
        {"prompt": "name a gag:", "reference": " a deaf bee, a fed cab", "chosen": " egg", "rejected": " ebb"},
        {"prompt": "a cab?", "reference": " no", "chosen": " a fed dad", "rejected": " a bag"},
    ]


KINDS = {"lists": lists(), "triples": triples()}
Example = tuple[list[list[list[int]]], dict[str, Any]]
"""[prompt, answer] of each answer, and what is given of them."""


def example_of(row: dict[str, Any], tokenizer: Any) -> Example:
    if "reference" in row:
        pair = oracle.explicit(row)
        gold = row["reference"][len(pair[0]) :] if "prompt" not in row else row["reference"]
        gold = chat("", gold)[1:] if isinstance(gold, str) and isinstance(pair[0], list) else gold
        completions, labels = [*pair[1:], gold], []
        prompt = pair[0]
    elif "completions" in row:
        prompt, completions = row["prompt"], [[item] if isinstance(item, dict) else item for item in row["completions"]]
        labels = row.get("scores") or [sum(r > own for r in row["ranks"]) / len(row["ranks"]) for own in row["ranks"]]
    else:
        prompt, completions, labels = row["prompt"], [row["chosen"], row["rejected"]], [0.5, 0.0]
    rows = [{"prompt": prompt, "completion": completion, "label": True} for completion in completions]
    return [oracle.render(one, tokenizer)[:2] for one in rows], {"labels": labels, "weight": row.get("w", 1.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for kind, rows in KINDS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"held_out_{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:5]))
    write_one_step(folder, {"train": {"path": f"{folder}/lists.jsonl"}, "tokens_per_pack": 150}, {"pairs_per_step": 64})
    return folder


class Book:
    """What the oracle says of steps. Every sequence is scored once for all objectives."""

    def __init__(self, folder: Path) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.policy, self.reference = (load(folder / name, dtype=torch.float64) for name in ("policy", "reference"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.examples = {kind: [example_of(row, tokenizer) for row in rows] for kind, rows in KINDS.items()}
        self.scored = cache(self._scored)

    def _scored(self, kind: str) -> tuple[list[Any], list[Any]]:
        def scores(lm: torch.nn.Module) -> list[Any]:
            return [[oracle.score(lm, *answer) for answer in answers] for answers, _ in self.examples[kind]]

        with torch.no_grad():
            theirs = scores(self.reference)
        return scores(self.policy), theirs

    def step(self, case: str, rows: list[int]) -> dict[str, Any]:
        kind = kind_of(case)
        given = [self.examples[kind][i][1] for i in rows]
        given = given if "weighed" in case else [{"labels": of_row["labels"]} for of_row in given]
        ours, theirs = ([table[i] for i in rows] for table in self.scored(kind))
        return oracle.loss_of_scores(ours, theirs, OBJECTIVES[case], given=given)

    def whole(self, case: str) -> dict[str, Any]:
        """A step over all rows, with gradients."""
        result = self.step(case, list(range(len(self.examples[kind_of(case)]))))
        parameters = dict(self.policy.named_parameters())
        gradients = torch.autograd.grad(result["loss"], list(parameters.values()), retain_graph=True)
        result["gradients"] = {name: gradient.numpy() for name, gradient in zip(parameters, gradients)}
        return result | {"loss": result["loss"].item()}


def kind_of(case: str) -> str:
    return "triples" if "tpo" in case else "lists"


def overrides(case: str, folder: Path) -> list[str]:
    source = {"path": f"{folder}/{kind_of(case)}.jsonl"} | ({"columns": {"weight": "w"}} if "weighed" in case else {})
    mode = "auto" if "tpo" in case else "stored"
    reference = "reference={mode: auto}" if "tpo" in case else f"reference.mode={mode}"
    return [f"objective={json.dumps(OBJECTIVES[case])}", f"data.train={json.dumps(source)}", reference]


@pytest.fixture(scope="module")
def book(folder: Path) -> Book:
    return Book(folder)


def plans(world: int) -> list[tuple[str, tuple[int, int, str]]]:
    """Every objective in three layouts of each world, and those of lists in all six."""
    return [(case, layout) for case in OBJECTIVES for layout in (LAYOUTS if "tpo" not in case else LAYOUTS[world - 1 :: 2])]


FEW = [
    *(("plackett_luce", layout) for layout in (LAYOUTS[0], LAYOUTS[1])),
    *(("lipo_lambda", layout) for layout in (LAYOUTS[3], LAYOUTS[4])),
    ("weighed plackett_luce", LAYOUTS[2]),
    ("tpo", LAYOUTS[3]),
    ("tpo_l", LAYOUTS[4]),
]


@pytest.mark.parametrize(
    ("world", "plan"),
    [(2, FEW), *(pytest.param(world, plans(world), marks=pytest.mark.slow) for world in (1, 2))],
    ids=["few", "all-1", "all-2"],
)
def test_steps_are_those_of_the_oracle(world: int, plan: list[Any], folder: Path, book: Book, all_workers) -> None:
    """Loss, metrics and gradients; a list that no pack has room for lies in several, and changes nothing."""
    variants = [
        [
            *overrides(case, folder),
            f"deepspeed.zero_optimization.stage={stage}",
            f"data.tokens_per_pack={tokens}",
            f"data.prefix_sharing={sharing}",
        ]
        for case, (stage, tokens, sharing) in plan
    ]
    faults, packs = [], set()
    for (case, layout), found in zip(plan, first_steps(all_workers[world], folder, variants), strict=True):
        wanted = book.whole(case)
        faults += compare(found, wanted, 2e-5, f"{case} {layout}")
        faults += compare_gradients(found, wanted, 5e-5, f"{case} {layout}")
        packs.add(found["packs"])
    assert not faults, "\n".join(faults)
    assert min(packs) == 1 and max(packs) > 8 // world and len(packs) > 2, packs


@pytest.mark.parametrize(
    ("case", "tokens"),
    [("plackett_luce", 1), *(pytest.param(case, 80, marks=pytest.mark.slow) for case in ("lipo_lambda", "tpo_l"))],
)
def test_ranks_that_hold_packs_between_them_take_the_same_step(
    case: str, tokens: int, folder: Path, book: Book, all_workers
) -> None:
    """A list in one pack, and in several."""
    layouts = [[f"data.tokens_per_pack={room}", "parallel.sequence=2"] for room in (tokens, 100_000)]
    variants = [[*overrides(case, folder), *layout] for layout in layouts]
    faults, wanted, found = [], book.whole(case), first_steps(all_workers[2], folder, variants)
    for layout, step in zip(layouts, found, strict=True):
        faults += compare(step, wanted, 2e-5, f"{case} {layout}")
        faults += compare_gradients(step, wanted, 5e-5, f"{case} {layout}")
    assert not faults, "\n".join(faults)
    assert found[0]["packs"] > found[1]["packs"] == 1


RUNS = [("plackett_luce", 2, 3, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in
        (("lipo_lambda", 2, 1, 150), ("lipo_lambda", 1, 3, 1), ("tpo", 2, 3, 150), ("tpo_l", 1, 1, 150)))]  # fmt: skip
SIZE, STEPS = 3, 4


@pytest.mark.parametrize(("case", "world", "stage", "tokens"), RUNS)
def test_runs_are_those_of_the_oracle(
    case: str, world: int, stage: int, tokens: int, folder: Path, book: Book, all_workers, tmp_path: Path
) -> None:
    """Four steps of three rows each, whatever their number of answers, that move nothing; with evaluations."""
    settings = [
        *overrides(case, folder),
        f"train={{pairs_per_step: {SIZE}, max_steps: {STEPS}, learning_rate: 1.0e-30, eval_every: 3, max_grad_norm: 0}}",
        f"data.eval={folder}/held_out_{kind_of(case)}.jsonl",
        f"data.tokens_per_pack={tokens}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"output_dir={tmp_path}/run",
        *([] if "tpo" in case else [f"reference.store={tmp_path}/store"]),
    ]
    workers: Workers = all_workers[world]
    assert workers.run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=settings) == [0] * world
    steps, evaluations = written(tmp_path / "run")
    rows = len(KINDS[kind_of(case)])
    epoch = [list(range(start, min(start + SIZE, rows))) for start in range(0, rows, SIZE)]
    faults: list[str] = []
    for number in range(STEPS):
        wanted = book.step(case, epoch[number % len(epoch)])
        faults += compare(steps[number], wanted | {"loss": wanted["loss"].item()}, 1e-4, f"step {number + 1}")
    wanted = book.step(case, [2, 3, 4])
    for number, record in evaluations.items():
        faults += compare(record, wanted | {"loss": wanted["loss"].item()}, 1e-4, f"evaluation at step {number}")
    assert not faults, "\n".join(faults)
    assert len(steps) == STEPS and evaluations.keys() == {3, STEPS}

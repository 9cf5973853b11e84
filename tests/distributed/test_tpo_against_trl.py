"""The first two steps of TPO equal TRL 1.16's (golden/make_trl_tpo.py).

Whole runs over rows with a gold answer, of which the second step follows an update.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_kto_against_trl import steps_of
from tiny import save_tiny, tiny_config, weights_digest
from triples import triple_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIXTURE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "trl_tpo.json").read_text(encoding="utf-8"))
VARIANTS: dict[str, dict[str, Any]] = FIXTURE["variants"]
LOSSES = {"tpo-l": "tpo_l"}
METRICS = {
    "loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/accuracies", "rewards/margins", "rewards/chosen",
    "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and a file of rows for each kind."""
    made = tmp_path_factory.mktemp("trl-tpo")
    recipe = FIXTURE["model"]
    model = save_tiny(made / "policy", tiny_config(recipe["family"], vocab_size=50_259), recipe["seed"])
    assert weights_digest(model) == recipe["weights_sha256"]
    lines = (shared / "data" / Path(FIXTURE["data"]["file"]).name).read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    for kind in ("chat", "text"):
        rows = triple_rows(pairs, FIXTURE["rows"], kind)
        (made / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


def metrics_of(workers: Any, folder: Path, tokenizer: Path, name: str, run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl holds of the variant's steps."""
    objective = VARIANTS[name]["objective"]
    loss_type = objective["loss_type"]
    return steps_of(
        workers,
        run,
        {"name_or_path": f"{folder}/policy", "tokenizer_name_or_path": str(tokenizer.resolve())},
        f"{folder}/{VARIANTS[name]['kind']}.jsonl",
        objective | {"name": "tpo", "loss_type": LOSSES.get(loss_type, loss_type)},
        {"pairs_per_step": FIXTURE["rows_per_step"], "learning_rate": FIXTURE["learning_rate"]},
    )


def differences(ours: dict[str, Any], theirs: dict[str, float]) -> list[str]:
    """Of TRL's numbers, those that are not ours to 1e-4."""
    return [
        f"{name}: {ours.get(name)}, not {value}"
        for name, value in theirs.items()
        if not math.isclose(ours.get(name, math.nan), value, rel_tol=1e-4, abs_tol=1e-6)
    ]


@pytest.mark.parametrize(("world", "name"), [*((2, name) for name in VARIANTS), (1, "sigmoid_smoothed")])
def test_two_steps_equal_trl(
    world: int, name: str, folder: Path, shared: Path, all_workers: dict[int, Any], tmp_path: Path
) -> None:
    found = metrics_of(all_workers[world], folder, shared / "tokenizer" / "gpt2-chatml", name, tmp_path)
    steps = VARIANTS[name]["steps"]
    assert len(found) == len(steps) == 2 and steps[1].keys() == METRICS
    for ours, theirs, nll in zip(found, steps, VARIANTS[name]["nll"], strict=True):
        assert not differences(ours, theirs | {"loss/nll": nll})


def test_the_fixture_has_each_loss_and_what_weighs_it() -> None:
    objectives = [variant["objective"] for variant in VARIANTS.values()]
    assert {of["loss_type"] for of in objectives} == {"sigmoid", "hinge", "ipo", "tpo-l"}
    assert {of["loss_type"] for of in objectives if of.get("label_smoothing")} == {"sigmoid", "tpo-l"}
    assert {of.get("tpo_alpha", 1.0) for of in objectives} > {1.0, 0.5}

"""The first two steps of KTO equal TRL 1.16's, and of BCO TRL 1.13's, the last that had one (golden/make_trl_unpaired.py).

Whole runs over labelled answers, of which the second step follows an update; KTO's KL is of answers to other prompts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import save_tiny, tiny_config, weights_digest
from unpaired import unpaired_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIXTURE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "trl_unpaired.json").read_text(encoding="utf-8")
)
VARIANTS: dict[str, dict[str, Any]] = {
    name: variant for trainer in ("kto", "bco") for name, variant in FIXTURE[trainer]["variants"].items()
}
NAMES = {"delta": "bco_delta"}
# A step without a rejected answer has no margin.
BOTH = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, and a file of rows for each kind and order, with a longer row behind those of the steps. `alone-...` is
    without it, and a mismatched pair of the second step is longer than any of its rows."""
    made = tmp_path_factory.mktemp("trl-unpaired")
    for name, recipe in FIXTURE["models"].items():
        model = save_tiny(made / name, tiny_config(recipe["family"], vocab_size=50_259), recipe["seed"])
        assert weights_digest(model) == recipe["weights_sha256"]
    lines = (shared / "data" / Path(FIXTURE["data"]["file"]).name).read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(lines[int(number)]) for number in FIXTURE["rows"].split()]
    for kind in ("chat", "text"):
        for name, order in FIXTURE["orders"].items():
            rows = [
                json.dumps(row) + "\n" for row in unpaired_rows([*pairs, longer(pairs[0])], f"{order} {len(pairs)}+", kind)
            ]
            (made / f"{kind}-{name}.jsonl").write_text("".join(rows), encoding="utf-8")
            (made / f"alone-{kind}-{name}.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    return made


def longer(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with its chosen answer said eight times."""
    (message,) = pair["chosen"]
    return pair | {"chosen": [message | {"content": " ".join([message["content"]] * 8)}]}


def metrics_of(
    workers: Any, folder: Path, tokenizer: Path, name: str, run: Path, prefix: str = ""
) -> list[dict[str, float]]:
    """What metrics.jsonl holds of the variant's steps."""
    variant = VARIANTS[name]
    policy = variant["policy"]
    (reference,) = FIXTURE["models"].keys() - {policy}
    return steps_of(
        workers,
        run,
        {"name_or_path": f"{folder}/{policy}", "tokenizer_name_or_path": str(tokenizer.resolve())},
        f"{folder}/{prefix}{variant['kind']}-{variant['order']}.jsonl",
        {"name": variant["trainer"], **variant["objective"]},
        {"pairs_per_step": FIXTURE["examples_per_step"], "learning_rate": FIXTURE["learning_rate"]},
        reference={"mode": "engine", "name_or_path": f"{folder}/{reference}"},
    )


def steps_of(
    workers: Any,
    run: Path,
    model: dict[str, Any],
    train_on: str,
    objective: dict[str, Any],
    train: dict[str, Any],
    **more: dict[str, Any],
) -> list[dict[str, float]]:
    """What metrics.jsonl holds of two steps over the rows of `train_on`, in order, as TRL takes them: a constant rate, no
    clipping, everything behind the prompt scored."""
    values = {
        "model": model | {"dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": {"path": train_on}, "shuffle": False, "tokens_per_pack": 1024, "scored": "all"},
        "objective": objective,
        "train": {"max_steps": 2, "lr_scheduler_type": "constant", "warmup_ratio": 0, "max_grad_norm": 0, **train},
        "output_dir": f"{run}/run",
        **more,
    }
    (run / "run.yaml").write_text(yaml.safe_dump(values))
    assert workers.run("cases:run_training", config_path=f"{run}/run.yaml", overrides=[]) == [0] * workers.size
    records = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "loss" in record]


def differences(ours: dict[str, Any], theirs: dict[str, float]) -> list[str]:
    """Of TRL's numbers, those that are not ours to 1e-4. What is a difference of sums of log-probs is known in float32 as
    well as these are."""
    nats = 2e-7 * max(abs(value) for name, value in theirs.items() if name.startswith("logps/"))
    return [
        f"{name}: {ours.get(NAMES.get(name, name))}, not {value}"
        for name, value in theirs.items()
        if not math.isclose(
            ours.get(NAMES.get(name, name), math.nan),
            value,
            rel_tol=1e-4,
            abs_tol=nats if name == "kl" or name.startswith("rewards/") else 1e-7,
        )
    ]


AGREED = [name for name, variant in VARIANTS.items() if "specification" not in variant]


@pytest.mark.parametrize(
    ("world", "name"), [(2, name) for name in AGREED] + [(1, "kto"), (1, "kto_text_exchanged"), (1, "bco")]
)
def test_two_steps_equal_trl(
    world: int, name: str, folder: Path, shared: Path, all_workers: dict[int, Any], tmp_path: Path
) -> None:
    found = metrics_of(all_workers[world], folder, shared / "tokenizer" / "gpt2-chatml", name, tmp_path)
    steps = VARIANTS[name]["steps"]
    point = {"kl"} if VARIANTS[name]["trainer"] == "kto" else {"delta"}
    assert len(found) == len(steps) == 2 and steps[1].keys() >= BOTH | point
    # Where no KL is taken, TRL logs that it is 0, and dspref nothing.
    without = {"kl"} if VARIANTS[name]["objective"].get("loss_type") == "apo_zero_unpaired" else set()
    for ours, theirs in zip(found, steps, strict=True):
        assert not differences(ours, {metric: value for metric, value in theirs.items() if metric not in without})


def test_an_answer_behind_a_longer_prompt_is_whole(
    folder: Path, shared: Path, all_workers: dict[int, Any], tmp_path: Path
) -> None:
    """Up to max_length: what is longest among the rows says nothing of what is read together here."""
    found = metrics_of(all_workers[2], folder, shared / "tokenizer" / "gpt2-chatml", "kto", tmp_path, "alone-")
    assert not differences(found[1], VARIANTS["kto"]["steps"][1])


def test_no_prompt_is_given_an_answer_to_itself(
    folder: Path, shared: Path, all_workers: dict[int, Any], tmp_path: Path
) -> None:
    """Where TRL is not followed: beside its own other answer, a prompt gets that one in TRL."""
    name = "kto_side_by_side"
    found = metrics_of(all_workers[2], folder, shared / "tokenizer" / "gpt2-chatml", name, tmp_path)
    for ours, theirs, ruled in zip(found, VARIANTS[name]["steps"], VARIANTS[name]["specification"], strict=True):
        assert not differences(ours, {metric: value for metric, value in ruled.items() if metric != "kl_unclamped"})
        assert ours["kl"] != pytest.approx(theirs["kl"], rel=1e-2)


def test_the_fixture_has_a_kl_above_0_and_one_that_is_clamped() -> None:
    steps = [
        (theirs["kl"], unclamped)
        for variant in VARIANTS.values()
        for theirs, unclamped in zip(variant["steps"], variant.get("kl_unclamped", []))
    ]
    assert any(kl > 1 and math.isclose(kl, unclamped, rel_tol=1e-4) for kl, unclamped in steps)
    assert any(kl == 0 and unclamped < -1 for kl, unclamped in steps)

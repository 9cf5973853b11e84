"""BEMA: the reference is the mean that the formula gives, on every layout, across a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_resume import forget_everything_after
from test_trust_region import LAYOUTS, SLOW, rounded, stage, train, write_run
from tiny import save_tiny, tiny_config

# It begins at step 1, is brought up to date at steps 3 and 5, and moves the reference at 5.
LATE = {"update_freq": 2, "update_after": 1, "lag": 2, "ema_power": 0.7, "bias_power": 0.4, "ref_model_update_freq": 4}
# From the initial policy on, at every step.
AT_ONCE = {"update_freq": 1, "lag": 3, "multiplier": 0.5, "min_ema_multiplier": 0.5}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The beginning is step 1, the first update, which does not move it yet, step 2, and so on.
    reference = {"bema": {"update_freq": 1, "update_after": 1, "lag": 2, "ref_model_update_freq": 2}}
    return write_run(tmp_path_factory.mktemp("bema"), reference)


def override(values: dict) -> str:
    return "reference.bema={" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


def by_the_formula(policies: list[dict[str, np.ndarray]], bema: dict) -> list[dict[str, np.ndarray] | None]:
    """The reference after each step, of policies of all steps from 0 on, in float64; None where it is still the first."""
    settings = {"ema_power": 0.5, "bias_power": 0.2, "multiplier": 1, "min_ema_multiplier": 0, "update_after": 0, **bema}
    begin, every = settings["update_after"], settings["update_freq"]
    theta_0 = ema = policies[begin]
    found, now = [], None
    for step in range(1, len(policies)):
        if step > begin and (step - begin) % every == 0:
            age = settings["lag"] + settings["multiplier"] * step
            beta = max(1 / age ** settings["ema_power"], settings["min_ema_multiplier"])
            ema = {name: (1 - beta) * ema[name] + beta * theta for name, theta in policies[step].items()}
            if (step - begin) % settings.get("ref_model_update_freq", every) == 0:
                way = {name: theta - theta_0[name] for name, theta in policies[step].items()}
                now = {name: ema[name] + way[name] / age ** settings["bias_power"] for name in ema}
        found.append(now)
    return found


@pytest.mark.parametrize(("world", "zero", "more"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "bema"), [("float32", LATE), ("bfloat16", AT_ONCE)])
def test_the_reference_is_what_the_formula_gives(dtype, bema, world, zero, more, run_file, all_workers):
    if dtype == "bfloat16" and "stage: 0" in zero:
        zero = stage(1)
    rate = "train.learning_rate=1e-3" if dtype == "float32" else "train.learning_rate=2e-2"
    overrides = [zero, *more, f"model.dtype={dtype}", override(bema), rate, "train.max_steps=6"]
    arguments = {"config_path": str(run_file), "overrides": overrides, "steps": 6}
    states = all_workers[world].run("cases:followed_reference", **arguments)[0]
    read = load_file(run_file.parent / "model/model.safetensors")
    names = states[0]["policy"].keys() & read.keys()
    first = {name: rounded(read[name]) if dtype == "bfloat16" else read[name].astype(np.float64) for name in names}
    policies = [first] + [{name: state["policy"][name].astype(np.float64) for name in names} for state in states]
    for number, (state, expected) in enumerate(zip(states, by_the_formula(policies, bema), strict=True), start=1):
        for name, value in (expected or first).items():
            # In 16 bits a value that lies half-way may be rounded to either side.
            kwargs = {"rtol": 0, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-7}
            assert np.allclose(state["reference"][name], value, **kwargs), (number, name)
    moved = [name for name in names if not np.array_equal(states[0]["reference"][name], states[-1]["reference"][name])]
    apart = [name for name in names if not np.array_equal(states[-1]["policy"][name], states[-1]["reference"][name])]
    assert len(names) > 10 and len(moved) > len(names) / 2 and len(apart) > len(names) / 2


@pytest.mark.parametrize(
    ("world", "zero", "more"),
    [
        (2, stage(3, 10**6), ("model.dtype=bfloat16",)),
        (1, stage(2), ()),
        pytest.param(2, stage(1), ("reference.zero_stage=3", "model.dtype=bfloat16"), marks=SLOW),
        pytest.param(2, stage(3), ("reference.offload=cpu",), marks=SLOW),
        pytest.param(2, stage(2), (override({"update_freq": 1, "update_after": 4}),), marks=SLOW),
    ],
)
def test_a_resume_across_moves_ends_bit_identical(world, zero, more, run_file, all_workers, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    records = train(all_workers[world], run_file, whole, zero, *more)
    shutil.copytree(whole, resumed)
    forget_everything_after(resumed, 3)
    assert train(all_workers[world], run_file, resumed, zero, *more) == records
    one, other = (run / "final" / "model.safetensors" for run in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()
    last = [sorted((run / "checkpoints/step-000006").glob("reference*")) for run in (whole, resumed)]
    sharded = "stage: 3" in zero or "reference.zero_stage=3" in more
    assert [len(files) for files in last] == [2 if sharded else 1] * 2
    for one, other in zip(*last, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_losses_tell_that_the_reference_moves(run_file, all_workers, tmp_path):
    """Until step 3 all is as with a reference that stays; behind it the policy is compared with the average."""
    follows, stays = (
        [r["loss"] for r in train(all_workers[1], run_file, tmp_path / name, stage(0), *more) if "loss" in r]
        for name, more in (("follows", ()), ("stays", ("reference={mode: engine}",)))
    )
    assert follows[:3] == stays[:3] and not np.isclose(follows[3:], stays[3:], atol=1e-4).any()


def test_a_reference_that_is_made_otherwise_cannot_follow(run_file, all_workers, tmp_path):
    vocabulary = json.loads((run_file.parent / "model/config.json").read_text())["vocab_size"]
    save_tiny(tmp_path / "untied", tiny_config("qwen2", vocabulary, tie_word_embeddings=False), seed=1)
    line = ["--config", str(run_file), f"reference.name_or_path={tmp_path}/untied", f"output_dir={tmp_path}/run"]
    ((code, said),) = all_workers[1].run("cases:command_line", arguments=[line])[0]
    assert code == 2 and "reference.bema: lm_head.weight is not alike in policy and reference" in said, said

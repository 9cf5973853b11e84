"""BEMA's update, by numbers that were worked out by hand, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dspref.config import BemaSection
from dspref.reference.bema import Bema, weights_at
from dspref.reference.moving import MovingReference, Sides

# beta_t = 1 / (1 + t) and alpha_t = 1 / (1 + t)^2.
BY_HAND = BemaSection(update_freq=1, ema_power=1.0, bias_power=2.0, lag=1)


class Scalar(nn.Module):
    """A model of one weight."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=dtype))


def moving_reference(policy: Scalar, reference: Scalar, section: BemaSection) -> MovingReference:
    sides = Sides(policy, reference, "reference.bema")
    return MovingReference(sides, Bema(sides, section))


def set_to(model: Scalar, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def followed(section: BemaSection, path: dict[int, float], begin: float, other: float | None = None) -> dict[int, float]:
    """The reference after each of the policy's steps; it begins as `other`, else as the policy."""
    policy, reference = Scalar(begin), Scalar(begin if other is None else other)
    moving, found = moving_reference(policy, reference, section), {}
    for step, value in path.items():
        set_to(policy, value)
        moving.follow(step)
        found[step] = reference.weight.item()
    return found


@pytest.mark.parametrize(
    ("section", "path", "expected"),
    [
        # EMA: 1/2 1 + 1/2 3 = 2; 2/3 2 + 1/3 6 = 10/3; 3/4 10/3 + 1/4 4 = 7/2.
        # Added: 1/4 (3 - 1) = 1/2; 1/9 (6 - 1) = 5/9; 1/16 (4 - 1) = 3/16.
        (BY_HAND, {1: 3.0, 2: 6.0, 3: 4.0}, {1: 5 / 2, 2: 35 / 9, 3: 59 / 16}),
        # theta_0 = EMA = 3 after step 1; then 2/3 3 + 1/3 6 = 4, 1/9 (6 - 3) = 1/3; 3/4 4 + 1/4 4 = 4, 1/16 (4 - 3).
        (BY_HAND.model_copy(update={"update_after": 1}), {1: 3.0, 2: 6.0, 3: 4.0}, {1: 1.0, 2: 13 / 3, 3: 65 / 16}),
        # Of steps 2 and 4 only: 2/3 1 + 1/3 7 = 3, 1/9 (7 - 1) = 2/3; 4/5 3 + 1/5 8 = 4, 1/25 (8 - 1) = 7/25.
        (
            BY_HAND.model_copy(update={"update_freq": 2}),
            {1: 9.0, 2: 7.0, 3: 9.0, 4: 8.0},
            {1: 1, 2: 11 / 3, 3: 11 / 3, 4: 107 / 25},
        ),
        # The same average moves the reference at step 4 alone.
        (
            BY_HAND.model_copy(update={"update_freq": 2, "ref_model_update_freq": 4}),
            {2: 7.0, 4: 8.0, 6: 9.0},
            {2: 1.0, 4: 107 / 25, 6: 107 / 25},
        ),
        # beta is no less than 1/2: 1/2 1 + 1/2 3 = 2; 1/2 2 + 1/2 6 = 4; with what is added as in the first row.
        (BY_HAND.model_copy(update={"min_ema_multiplier": 0.5}), {1: 3.0, 2: 6.0}, {1: 5 / 2, 2: 41 / 9}),
        # No average, and all of the way added: 2 theta - theta_0.
        (BemaSection(update_freq=1, ema_power=0.0, bias_power=0.0), {1: 3.0, 2: -4.0}, {1: 5.0, 2: -9.0}),
        # A constant share, 1 / sqrt(4), and 1 / 4^2 of the way.
        (BemaSection(update_freq=1, multiplier=0.0, lag=4, bias_power=2.0), {1: 3.0, 2: 5.0}, {1: 2.125, 2: 3.75}),
    ],
)
def test_the_reference_by_hand(section: BemaSection, path: dict[int, float], expected: dict[int, float]) -> None:
    assert followed(section, path, 1.0) == pytest.approx(expected, rel=1e-6)


def test_defaults_weigh_as_the_formulas_say() -> None:
    # 410^-0.2 = e^(-0.2 x 6.0161571597) = 0.301194212 x 0.996773785, and 410^-0.5 = 1 / 20.2484567313.
    assert weights_at(400, BemaSection()) == pytest.approx((0.30022249, 0.0493864798), rel=1e-6)
    assert weights_at(0, BemaSection(lag=1)) == (1.0, 1.0)


def test_another_model_is_the_reference_until_the_average_takes_its_place() -> None:
    section = BY_HAND.model_copy(update={"update_freq": 2})
    assert followed(section, {1: 3.0, 2: 7.0}, 1.0, other=50.0) == pytest.approx({1: 50.0, 2: 11 / 3})


def test_a_beginning_that_was_skipped_is_made_up_for() -> None:
    """No update without a theta_0: what is skipped leaves the policy as it was, and the next step begins."""
    section = BY_HAND.model_copy(update={"update_after": 2})
    found = followed(section, {1: 3.0, 3: 6.0, 4: 11.0}, 1.0)
    # theta_0 = EMA = 6; 4/5 6 + 1/5 11 = 7, 1/25 (11 - 6) = 1/5.
    assert found == pytest.approx({1: 1.0, 3: 1.0, 4: 7.2})


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_what_is_saved_goes_on_to_the_bit(stop: int, tmp_path: Path) -> None:
    """Before the beginning at step 2, at it, and between two moves."""
    section = BemaSection(update_freq=2, update_after=2)
    path = {step: 1 + math.sin(step) for step in range(1, 9)}
    policy, reference = Scalar(1.0, torch.bfloat16), Scalar(1.0, torch.bfloat16)
    whole = moving_reference(policy, reference, section)
    for step, value in path.items():
        set_to(policy, value)
        whole.follow(step)
        if step == stop:
            whole.save(tmp_path)
    fresh, resumed = Scalar(1.0, torch.bfloat16), Scalar(1.0, torch.bfloat16)
    going_on = moving_reference(fresh, resumed, section)
    going_on.load(tmp_path)
    for step in range(stop + 1, 9):
        set_to(fresh, path[step])
        going_on.follow(step)
    assert resumed.weight.item() == reference.weight.item() != 1.0
    assert all(torch.equal(part, going_on.rule.held()[name]) for name, part in whole.rule.held().items())


def test_a_checkpoint_holds_the_beginning_in_the_policys_type(tmp_path: Path) -> None:
    moving_reference(Scalar(1.0, torch.bfloat16), Scalar(1.0), BY_HAND).save(tmp_path)
    with safe_open(tmp_path / "reference.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert types == {"weight": torch.float32, "ema/weight": torch.float32, "theta_0/weight": torch.bfloat16}

"""Alarms: loss spikes that were planted, and no others; runs that have ended in ruins, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from dspref.training.numbers import Spikes, ran_off


def falling(seed: int, steps: int = 1000) -> np.ndarray:
    """Losses as a run has them: falling, with the noise of small batches, which has a long tail."""
    noise = np.random.default_rng(seed).standard_t(df=8, size=steps)
    return 0.69 * np.exp(-np.arange(steps) / 600) + 0.03 * noise


def test_planted_spikes_are_found():
    losses = falling(seed=0)
    planted = {200: 1.5, 555: 2.0, 900: 1.2}
    for step, loss in planted.items():
        losses[step] = loss
    guard = Spikes(6.0)
    found = {step for step, loss in enumerate(losses) if guard.watch(step, float(loss))}
    assert found >= planted.keys() and len(found) == 3


def test_clean_series_have_none():
    for seed in range(10):
        guard = Spikes(6.0)
        assert not [step for step, loss in enumerate(falling(seed + 1)) if guard.watch(step, float(loss))], seed


def test_off_by_default_and_blind_to_nan():
    off, on = Spikes(None), Spikes(3.0)
    assert not any(off.watch(step, 1.0 + 100 * (step == 50)) for step in range(99))
    assert not any(on.watch(step, float("nan") if step % 2 else 1.0) for step in range(99))
    assert on.watch(99, 2.0)


# vocabulary 32,000: random tokens have -10.37 nats. (first, last) of loss and chosen log-probs of 100 tokens.
ENDS = {
    "learns": ((0.69, 0.3), (-150, -180), None),
    "learns nothing": ((0.69, 0.71), (-150, -150), None),
    "displaced": ((0.69, 0.1), (-150, -600), None),
    "overshoots a little": ((0.69, 3.0), (-150, -500), None),
    "first loss near 0": ((0.001, 0.6), (-150, -150), None),
    "a loss in hundreds that falls": ((250.0, 90.0), (-150, -200), None),
    "random weights that learn": ((10.9, 9.0), (-1040, -900), None),
    "random weights that learn nothing": ((10.9, 11.2), (-1040, -1060), None),
    "the loss explodes": ((0.69, 4000.0), (-150, -150), "run off, from 0.69 to 4000"),
    "log-probs fall to nothing, the loss to 0": ((0.69, 0.0), (-150, -90_000), "less likely than random tokens: -900 nats"),
    "all tokens are alike": ((0.69, 0.7), (-150, -1040), "less likely than random tokens: -10.4 nats per token, -1.5 at"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_ruined_model_is_told_and_a_poor_one_is_not(name):
    loss, logps, expected = ENDS[name]
    found = ran_off({"loss": loss, "logps/chosen": logps, "lengths/chosen": (100.0, 100.0)}, 32_000)
    assert (found is None) == (expected is None), found
    if expected:
        assert expected in found and "lower train.learning_rate" in found


def test_what_was_not_logged_gives_no_alarm():
    assert ran_off({}, 32_000) is None
    assert ran_off({"loss": (None, 1e9), "logps/chosen": (None, -1e9), "lengths/chosen": (None, 1.0)}, 32_000) is None
    assert ran_off({"loss": (0.7, 0.7), "logps/chosen": (-10.0, -1e9)}, 32_000) is None

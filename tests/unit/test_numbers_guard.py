"""The watch for loss spikes: those that were planted, and no others."""

from __future__ import annotations

import numpy as np

from dspref.numbers import Spikes


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

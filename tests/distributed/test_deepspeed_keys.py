"""Every key of DeepSpeed that dspref lets through, trained with on CPU ranks: docs/deepspeed.md names these tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from ds_settings import EXACT, IN_TWO_PLACES, ROUNDED, SECOND, Settings, printed, zero
from safetensors.torch import load_file
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config
from workers import SECONDS_PER_CASE, Workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Of fp32 sums in another order. Adam divides by the size of the gradient, so where that is tiny rounding weighs more.
SAME = 1e-6
STEPS = 4


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of several packs per rank, whose gradients are clipped or not."""
    folder = tmp_path_factory.mktemp("keys")
    save_tiny(folder / "model", tiny_config("llama", save_tokenizer(folder / "tokenizer")), seed=4)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(12, seed=7)))
    model = {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"}
    schedule = {"max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    values = {
        "model": model,
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "tokens_per_pack": 400},
        "objective": {"name": "dpo", "beta": 0.5},
        "train": {"pairs_per_step": 8, **schedule},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


class Trained:
    """What came of a run: loss and gradient norm of each step, and the weights."""

    def __init__(self, run: Path) -> None:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.traces = np.array([[step["loss"], step["grad_norm"]] for step in steps if "loss" in step])
        self.weights = {name: w.float().numpy() for name, w in load_file(run / "final" / "model.safetensors").items()}


def train(
    workers: Workers, run_file: Path, run: Path, settings: Settings, *overrides: str, seconds: float = SECONDS_PER_CASE
) -> Trained:
    arguments = {"config_path": str(run_file), "overrides": [*chosen(settings, run), *overrides]}
    assert workers.run("cases:run_training", seconds=seconds, **arguments) == [0] * workers.size
    return Trained(run)


def chosen(settings: Settings, run: Path) -> list[str]:
    return [f"deepspeed={json.dumps(settings.strategy)}", f"model.dtype={settings.dtype}", f"output_dir={run}"]


@pytest.fixture(scope="module")
def without(run_file, all_workers, tmp_path_factory) -> Callable[..., Trained]:
    """The run without the keys: the same stage, dtype and number of ranks."""

    @functools.cache
    def trained(stage: int, dtype: str, ranks: int = 2) -> Trained:
        run = tmp_path_factory.mktemp("without") / "run"
        return train(all_workers[ranks], run_file, run, Settings(zero(stage), dtype))

    return trained


def assert_same(found: Trained, expected: Trained, tolerance: float = SAME) -> None:
    """The gradient's norm too, which Adam and clipping would hide."""
    assert len(expected.traces) == STEPS and expected.traces[1, 0] != expected.traces[0, 0]
    assert np.allclose(found.traces, expected.traces, rtol=1e-4, atol=1e-6)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert np.abs(found.weights[name] - weight).max() <= tolerance, name


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_a_key_leaves_the_numbers_as_they_are(settings, run_file, without, all_workers, tmp_path) -> None:
    found = train(all_workers[2], run_file, tmp_path / "run", settings)
    assert_same(found, without(settings.stage, settings.dtype))


@pytest.mark.parametrize("settings", ROUNDED.values(), ids=ROUNDED)
def test_a_type_of_communication_rounds_and_learns(settings, run_file, without, all_workers, tmp_path) -> None:
    found, expected = train(all_workers[2], run_file, tmp_path / "run", settings), without(settings.stage, "float32")
    assert np.isfinite(found.traces).all() and found.traces[-1, 0] < 0.1 < found.traces[0, 0]
    assert np.allclose(found.traces, expected.traces, rtol=0.05)
    assert (found.traces[1:] != expected.traces[1:]).any()  # it does round


@pytest.mark.parametrize("settings", SECOND.values(), ids=SECOND)
def test_second_shards_leave_the_numbers_as_they_are(settings, run_file, without, forked, tmp_path) -> None:
    """Two groups of two ranks, each of which has all weights once more. DeepSpeed makes the groups once in a process."""
    arguments = {"config_path": str(run_file), "overrides": [f"deepspeed={json.dumps(settings.strategy)}"]}
    for case in ("look", "train"):
        ranks = Workers(4, forked)
        try:
            if case == "look":
                (there, of), *others = ranks.run("cases:second_shards", **arguments)
                assert there == of > 0 and others == [(there, of)] * 3
            else:
                found = train(ranks, run_file, tmp_path / "run", settings)
        finally:
            ranks.stop()
    assert_same(found, without(settings.stage, settings.dtype, ranks=4))


def test_second_shards_that_the_ranks_cannot_have_are_refused(run_file, all_workers, tmp_path) -> None:
    """DeepSpeed would take two ranks for three, in silence."""
    overrides = chosen(Settings(zero(3, zero_hpz_partition_size=3)), tmp_path / "run")
    assert all_workers[2].run("cases:run_training", config_path=str(run_file), overrides=overrides) == [2, 2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", IN_TWO_PLACES.values(), ids=IN_TWO_PLACES)
def test_states_in_two_places_leave_the_numbers_as_they_are(settings, run_file, without, all_workers, tmp_path) -> None:
    """With DeepSpeed's own Adam, which is compiled on first use: a minute, or several beside other work."""
    found = train(all_workers[2], run_file, tmp_path / "run", settings, "train.optim=cpu_adam", seconds=800)
    assert_same(found, without(settings.stage, settings.dtype))


@pytest.mark.parametrize("stage", range(4))
def test_what_deepspeed_prints_of_a_step(stage, run_file, without, all_workers, tmp_path) -> None:
    overrides = chosen(printed(str(tmp_path))[str(stage)], tmp_path / "run")
    answers = all_workers[2].run("cases:said_by_training", config_path=str(run_file), overrides=overrides)
    assert [code for code, _ in answers] == [0, 0]
    assert_same(Trained(tmp_path / "run"), without(stage, "float32"))
    profile = (tmp_path / "profile.txt").read_text()
    assert "Profile Summary at step 3:" in profile and "PackedCausalLM" in profile
    said = [text for _, text in answers]
    assert said[0].count("fwd_microstep") == said[0].count("bwd_microstep") == STEPS and "microstep" not in said[1]

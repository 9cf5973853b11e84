"""A run that goes on with another number of ranks, or between ZeRO 1 and 2, ends where the undisturbed one does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config

STEPS = 8
SLOW = pytest.mark.slow
# BCO's mean goes through the checkpoint. Weight decay makes two groups of parameters; DeepSpeed's stage 3 mixes them up when
# it reads the universal format: one step counter for both, and decay for norms.
COUPLED = "objective={name: dpo, loss_type: [aot, bco_pair, sft], beta: 0.3}"
TR_DPO = "reference={sync_ref_model: true, ref_model_mixup_alpha: 0.6, ref_model_sync_steps: 3}"
BEMA = "reference={bema: {update_freq: 1, update_after: 3, lag: 2, ref_model_update_freq: 2}}"  # moves at 5 and 7
ROUND_ROBIN = "deepspeed.zero_optimization.round_robin_gradients=true"
FREEZE = "model.freeze=[embed_tokens, layers.0, 'mlp.*_proj']"
LORA = "model.lora={r: 4, lora_alpha: 8}"
OFFLOAD = "deepspeed.zero_optimization.offload_optimizer={device: cpu}"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    # Odd sizes: no number of ranks divides all weights.
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), tie_word_embeddings=True, intermediate_size=75)
    save_tiny(folder / "model", config, seed=4)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(18, seed=5)))
    values = {
        "model": {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "tokens_per_pack": 300},
        "objective": {"name": "dpo", "rpo_alpha": 0.5},
        "train": {"pairs_per_step": 4, "max_steps": STEPS, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
        | {"weight_decay": 0.3},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
        "checkpoint": {"save_every": 2, "keep_last": 9},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def train(workers, run_file: Path, run: Path, *overrides: str) -> list[int]:
    arguments = {"config_path": str(run_file), "overrides": [*overrides, f"output_dir={run}"]}
    return workers.run("cases:run_training", **arguments)


def refusal(workers, run_file: Path, run: Path, *overrides: str) -> tuple[int, str]:
    """(exit code, what stood on standard error) of a run that all ranks leave alike."""
    line = ["--config", str(run_file), *overrides, f"output_dir={run}"]
    answers = [ranks[0] for ranks in workers.run("cases:command_line", arguments=[line])]
    assert len({code for code, _ in answers}) == 1, answers
    return answers[0][0], "".join(text for _, text in answers)


def stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


def go_on(all_workers, run_file: Path, run: Path, legs: list[tuple[int, tuple[str, ...]]]) -> None:
    """Train to the end on the first leg's ranks; then as if killed after step 2, 4, ..., go on to the end on the next's."""
    for number, (ranks, overrides) in enumerate(legs):
        if number:
            forget_everything_after(run, 2 * number)
            (run / f"checkpoints/.universal-step-{2 * number:06d}/engine").mkdir(parents=True)  # as a kill leaves it
        assert train(all_workers[ranks], run_file, run, *overrides) == [0] * ranks
    assert all(folder.name.startswith("step-") for folder in (run / "checkpoints").iterdir()), "a conversion was left"
    resumed = [event["step"] for event in events(run) if event["event"] == "resume"]
    assert resumed == [2 * number for number in range(1, len(legs))]


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def distance(one: Path, other: Path, file: str = "model.safetensors") -> float:
    """Relative L2 distance of two runs' final weights."""
    a, b = (load_file(run / "final" / file) for run in (one, other))
    assert a.keys() == b.keys()
    apart = sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for name in a)
    return math.sqrt(apart / sum(float(np.square(a[name].astype(np.float64)).sum()) for name in a))


def assert_same_steps(run: Path, whole: Path, tolerance: float = 1e-5) -> None:
    """Each step once, over the same pairs."""
    ours, theirs = training_records(run), training_records(whole)
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1)) == [record["step"] for record in theirs]
    for name in ("loss", "logps/chosen", "logps/rejected", "learning_rate"):
        mine, others = ([record[name] for record in records] for records in (ours, theirs))
        assert np.allclose(mine, others, rtol=tolerance, atol=tolerance), name


def test_one_rank_instead_of_two_and_two_again(run_file, all_workers, tmp_path):
    compare(3, (COUPLED,), (2, 1, 2), run_file, all_workers, tmp_path)


@SLOW
@pytest.mark.parametrize(
    ("zero", "more"),
    [
        *[(zero, ()) for zero in (0, 1, 2, 3)],
        *[(2, (COUPLED, TR_DPO)), (3, (TR_DPO,)), (1, (TR_DPO, "reference.zero_stage=3"))],
        *[(2, (BEMA,)), (3, (BEMA,)), (1, (BEMA, "reference.zero_stage=3"))],
        *[(zero, (OFFLOAD,)) for zero in (2, 3)],
        *[(zero, (FREEZE,)) for zero in (0, 1, 2, 3)],
    ],
)
def test_other_numbers_of_ranks_change_nothing(zero, more, run_file, all_workers, tmp_path):
    compare(zero, more, (2, 1, 2, 4), run_file, all_workers, tmp_path)


def compare(zero, more, ranks, run_file, all_workers, tmp_path) -> None:
    """A run that changes its number of ranks, with one that stays on the first."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    same = (stage(zero), *more)
    assert train(all_workers[ranks[0]], run_file, whole, *same) == [0] * ranks[0]
    go_on(all_workers, run_file, run, [(number, same) for number in ranks])
    print("relative distance", distance(run, whole))
    assert distance(run, whole) < 1e-6
    assert_same_steps(run, whole)


SEQUENCE = "parallel.sequence={}".format


@pytest.mark.parametrize(
    ("zero", "more", "legs"),
    [
        (3, (COUPLED,), ((2, 2), (2, 1), (2, 2))),
        *[pytest.param(zero, (TR_DPO,), ((2, 2), (1, 1), (4, 2), (4, 4)), marks=SLOW) for zero in (1, 2, 3)],
        pytest.param(2, (LORA,), ((4, 2), (2, 1), (2, 2)), marks=SLOW),
        pytest.param(3, (BEMA,), ((2, 2), (2, 1)), marks=SLOW),
        pytest.param(2, (OFFLOAD,), ((2, 2), (2, 1)), marks=SLOW),
    ],
)
def test_ranks_that_hold_packs_between_them_go_on_where_others_were(zero, more, legs, run_file, all_workers, tmp_path):
    """Another `parallel.sequence` is as another number of ranks. `legs`: (ranks, those of a pack)."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    same = (stage(zero), *more)
    assert train(all_workers[2], run_file, whole, *same) == [0, 0]
    go_on(all_workers, run_file, run, [(ranks, (*same, SEQUENCE(of_pack))) for ranks, of_pack in legs])
    file = "adapter_model.safetensors" if LORA in more else "model.safetensors"
    print("relative distance", distance(run, whole, file))
    assert distance(run, whole, file) < 1e-6
    assert_same_steps(run, whole)


def test_what_is_frozen_stays_over_ranks_and_a_resume(run_file, all_workers, tmp_path):
    compare(3, (FREEZE,), (2, 1), run_file, all_workers, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (run_file.parent / "model", tmp_path / "run/final"))
    for name in before:
        still = any(part in name for part in ("embed_tokens", "layers.0.", "_proj")) and ".1.self_attn" not in name
        assert np.array_equal(before[name], after[name]) == still, name


@SLOW
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_other_numbers_of_ranks_in_16_bits(zero, run_file, all_workers, tmp_path):
    """fp32 masters and moments pass exactly; sums in another order are rounded to 16 bits otherwise."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    same = (stage(zero), "model.dtype=bfloat16")
    assert train(all_workers[2], run_file, whole, *same) == [0, 0]
    go_on(all_workers, run_file, run, [(2, same), (1, same), (2, same), (4, same)])
    print("relative distance", bf16_distance(run, whole))
    assert bf16_distance(run, whole) < 5e-3
    assert_same_steps(run, whole, 2e-2)


def bf16_distance(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    a, b = (load_file(run / "final/model.safetensors") for run in (one, other))
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return math.sqrt(apart / sum(float(a[name].double().square().sum()) for name in a))


@SLOW
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_adapter_alone(zero, run_file, all_workers, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    same = (stage(zero), LORA, "train.learning_rate=1e-2")
    assert train(all_workers[2], run_file, whole, *same) == [0, 0]
    go_on(all_workers, run_file, run, [(2, same), (1, same), (4, same)])
    print("relative distance", distance(run, whole, "adapter_model.safetensors"))
    assert distance(run, whole, "adapter_model.safetensors") < 1e-6
    assert_same_steps(run, whole)


@pytest.mark.parametrize(
    ("dtype", "ranks"), [pytest.param("float32", (2, 2, 1), marks=SLOW), pytest.param("bfloat16", (2, 2, 2), marks=SLOW)]
)
def test_between_stage_1_and_2(dtype, ranks, run_file, all_workers, tmp_path):
    """In bf16 DeepSpeed has another optimizer at stage 1, with files of its own."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    precision = f"model.dtype={dtype}"
    assert train(all_workers[2], run_file, whole, stage(1), precision) == [0, 0]
    go_on(all_workers, run_file, run, [(n, (stage(k), precision)) for n, k in zip(ranks, (1, 2, 1))])
    print("relative distance", bf16_distance(run, whole))
    assert bf16_distance(run, whole) < (1e-6 if dtype == "float32" else 5e-3)
    assert_same_steps(run, whole, 1e-5 if dtype == "float32" else 2e-2)


@SLOW
@pytest.mark.parametrize(
    ("zero", "keys"),
    [
        (3, {"stage3_param_persistence_threshold": 10**6, "stage3_prefetch_bucket_size": 1000, "reduce_bucket_size": 5000}),
        (2, {"reduce_bucket_size": 5000, "allgather_bucket_size": 3000, "contiguous_gradients": False}),
    ],
)
def test_keys_of_memory_may_change_and_change_nothing(zero, keys, run_file, all_workers, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    changed = [f"deepspeed.zero_optimization.{key}={json.dumps(value)}" for key, value in keys.items()]
    assert train(all_workers[2], run_file, whole, stage(zero)) == [0, 0]
    go_on(all_workers, run_file, run, [(2, (stage(zero),)), (2, (stage(zero), *changed))])
    assert distance(run, whole) == 0


def test_what_cannot_be_converted_is_refused_before_anything_is_trained(run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    assert train(all_workers[1], run_file, run, stage(2), "train.max_steps=2") == [0]
    kept = (run / "final/model.safetensors").read_bytes()
    for number in (3, 0):
        code, said = refusal(all_workers[1], run_file, run, stage(number), "train.max_steps=4")
        assert code == 2 and said.count("\n") == 1, said
        assert f"dspref export {run}/checkpoints/step-000002 --to FOLDER" in said and "model.name_or_path=FOLDER" in said
    assert train(all_workers[1], run_file, run, stage(2), ROUND_ROBIN) == [2], "the order of weights in the shards"
    assert (run / "final/model.safetensors").read_bytes() == kept
    assert training_records(run)[-1]["step"] == 2


@SLOW
def test_wrong_addresses_are_not_converted(run_file, all_workers, tmp_path):
    """DeepSpeed notes where a weight lies as if round_robin_gradients had not moved it."""
    run = tmp_path / "run"
    assert train(all_workers[2], run_file, run, stage(2), ROUND_ROBIN) == [0, 0]
    forget_everything_after(run, 4)
    code, said = refusal(all_workers[1], run_file, run, stage(2), ROUND_ROBIN)
    assert code == 4 and said.count("\n") == 1 and "ZeRO-2 on 2 ranks" in said and "round_robin_gradients" in said, said
    assert train(all_workers[2], run_file, run, stage(2), ROUND_ROBIN) == [0, 0]


@SLOW
def test_dropout_on_other_ranks_is_drawn_by_seed_and_step(run_file, all_workers, tmp_path):
    """Where the ranks' generators cannot go on, what they draw is still the same every time."""
    dropout = (stage(2), "model.lora={r: 4, lora_alpha: 8, lora_dropout: 0.3}", "train.learning_rate=1e-2")
    whole, ends = tmp_path / "whole", []
    assert train(all_workers[2], run_file, whole, *dropout) == [0, 0]
    for name in ("one", "other"):
        run = Path(shutil.copytree(whole, tmp_path / name))
        forget_everything_after(run, 4)
        if ends:  # the process has drawn other numbers before
            assert train(all_workers[1], run_file, tmp_path / "elsewhere", "train.max_steps=1") == [0]
        assert train(all_workers[1], run_file, run, *dropout) == [0]
        ends.append((run / "final/adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] != (whole / "final/adapter_model.safetensors").read_bytes()

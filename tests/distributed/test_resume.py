"""A run that stops and goes on ends like one that never stopped: same weights to the bit, each step logged once."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config

STEPS = 7
ROWS = 18  # four per step: an epoch of five steps whose last is short, crossed by the run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), attention_dropout=0.1).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(ROWS, seed=5)))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(5, seed=6)))
    answers = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": k % 3 > 0}
        for k, row in enumerate(preference_rows(ROWS, seed=5))
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    lists = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], row["chosen"] + " bad"],
            "scores": [2, 0, 1],
        }
        for row in preference_rows(ROWS, seed=5)
        if isinstance(row["chosen"], str)
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    model = {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "init": "random"}
    train = {"pairs_per_step": 4, "max_steps": STEPS, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "eval_every": 3}
    values = {
        "model": {**model, "dtype": "float32", "disable_dropout": False},  # so that the random generators matter
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "tokens_per_pack": 300,
        },
        "objective": {"name": "dpo", "rpo_alpha": 0.5},
        "train": train,
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "checkpoint": {"save_every": 2, "keep_last": 9},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def train(workers, run_file: Path, *overrides: str) -> list[int]:
    return workers.run("cases:run_training", config_path=str(run_file), overrides=list(overrides))


def training_records(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides, and without a line that is still being written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records]


def forget_everything_after(run: Path, step: int) -> None:
    """Leave the folder as a kill just after this checkpoint would have left it: later lines are in metrics.jsonl."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "final")
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in state.items() if k != "summary"} | {"state": "running"}))


# BCO carries its delta through a checkpoint; it and aot draw the random numbers of their two passes.
OBJECTIVES = {
    "dpo": "{name: dpo, rpo_alpha: 0.5}",
    "mpo": "{name: dpo, loss_type: [aot, bco_pair, sft], beta: 0.3}",
    "orpo": "{name: orpo}",
    "kto": "{name: kto, beta: 0.5}",
    "bco": "{name: bco, beta: 0.5}",
    "listwise": "{name: listwise, loss_type: lipo_lambda, beta: 0.5}",
}


@pytest.mark.parametrize(
    ("world", "stage", "objective"),
    [
        *[(1, 2, "mpo"), (2, 3, "dpo"), (2, 1, "dpo"), (1, 0, "dpo"), (2, 3, "orpo")],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2, "dpo"), (1, 3, "dpo"), (2, 2, "dpo"))],
        pytest.param(2, 3, "mpo", marks=pytest.mark.slow),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3, "kto"), (1, 2, "kto"), (2, 1, "bco"))],
        pytest.param(2, 3, "listwise", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_bit_identical(world, stage, objective, run_file, all_workers, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    changes = [f"deepspeed.zero_optimization.stage={stage}", f"objective={OBJECTIVES[objective]}"]
    if objective in ("kto", "bco", "listwise"):
        rows = "lists" if objective == "listwise" else "answers"
        changes += [f"data.train={run_file.parent}/{rows}.jsonl", f"reference.store={tmp_path}/store"]
    assert train(all_workers[world], run_file, *changes, f"output_dir={whole}") == [0] * world
    expected = load_file(whole / "final" / "model.safetensors")
    records = training_records(whole)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert records[0]["loss"] != records[-2]["loss"]
    for step in (4, 2):
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(whole, resumed)
        forget_everything_after(resumed, step)
        assert train(all_workers[world], run_file, *changes, f"output_dir={resumed}") == [0] * world
        assert training_records(resumed) == records
        final = load_file(resumed / "final" / "model.safetensors")
        assert final.keys() == expected.keys()
        assert all((final[name] == expected[name]).all() for name in expected)
        events = [json.loads(line)["event"] for line in (resumed / "events.jsonl").read_text().splitlines()]
        assert "resume" in events


LORA = "model.lora={r: 4, lora_alpha: 8, lora_dropout: 0.1}"


# The four in CI differ in everything; the other 44 are for the soak.
IN_CI = {("dpo", 3, 2, True), ("simpo", 2, 1, False), ("orpo", 1, 2, True), ("cpo", 3, 1, False)}
MATRIX = [
    pytest.param(*case[:3], (LORA,) if case[3] else (), marks=pytest.mark.slow if case in IN_CI else pytest.mark.soak)
    for case in itertools.product(("dpo", "simpo", "orpo", "cpo"), (1, 2, 3), (1, 2), (False, True))
]


@pytest.mark.parametrize(("objective", "stage", "world", "more"), MATRIX)
def test_every_save_point_resumes_to_the_bit(objective, stage, world, more, run_file, all_workers, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    changes = (f"deepspeed.zero_optimization.stage={stage}", f"objective={{name: {objective}}}", *more)
    assert train(all_workers[world], run_file, *changes, f"output_dir={whole}") == [0] * world
    (weights,) = (whole / "final").glob("*model.safetensors")
    for step in (6, 4, 2):
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(whole, resumed)
        forget_everything_after(resumed, step)
        assert train(all_workers[world], run_file, *changes, f"output_dir={resumed}") == [0] * world
        assert training_records(resumed) == training_records(whole)
        assert (resumed / "final" / weights.name).read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("part", ["shard", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(part, run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    assert train(all_workers[1], run_file, f"output_dir={run}", f"reference.store={tmp_path}/store") == [0]
    records = training_records(run)
    forget_everything_after(run, 4)
    damaged = run / "checkpoints" / "step-000004"
    if part == "shard":
        shard = next((damaged / "engine").glob("*optim_states.pt"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        (damaged / "manifest.json").write_text('{"step": 4')
    shards = list((tmp_path / "store").glob("*/*.safetensors"))
    assert shards
    for shard in shards:
        shard.write_bytes(b"cut short")  # scored again, from the initial weights
    assert train(all_workers[1], run_file, f"output_dir={run}", f"reference.store={tmp_path}/store") == [0]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    assert training_records(run) == records


def test_a_finished_run_is_not_trained_again(run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    assert train(all_workers[2], run_file, f"output_dir={run}") == [0, 0]
    before = (run / "final" / "model.safetensors").stat().st_mtime_ns
    assert train(all_workers[2], run_file, f"output_dir={run}") == [0, 0]
    assert (run / "final" / "model.safetensors").stat().st_mtime_ns == before
    assert train(all_workers[2], run_file, f"output_dir={run}", "train.learning_rate=1e-5") == [2, 2], "another run's folder"
    assert train(all_workers[2], run_file, f"output_dir={run}", f"train.max_steps={STEPS - 2}") == [2, 2], "already beyond"
    # More steps go on from the last checkpoint.
    assert train(all_workers[2], run_file, f"output_dir={run}", f"train.max_steps={STEPS + 2}") == [0, 0]
    steps = [record["step"] for record in training_records(run) if "loss" in record]
    assert steps == list(range(1, STEPS + 3))
    rates = [record["learning_rate"] for record in training_records(run) if "loss" in record]
    behind_warmup = [(done - 1) / (STEPS + 2 - 1) for done in (STEPS, STEPS + 1)]  # of one step
    cosine = [1.5e-3 * (1 + math.cos(math.pi * share)) for share in behind_warmup]
    assert rates[STEPS:] == pytest.approx(cosine), "of the longer schedule, the first of them too"
    assert train(all_workers[2], run_file, f"output_dir={run}", "checkpoint.resume=never") == [0, 0]
    assert len(list(run.glob("previous-*"))) == 1


def test_changed_pairs_and_changed_weights_are_refused(run_file, all_workers, tmp_path):
    run, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    rows = preference_rows(8, seed=5)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(run_file.parent / "tokenizer", tmp_path / "tokenizer")
    config = tiny_config("qwen2", 260)
    save_tiny(tmp_path / "model", config, seed=1)
    overrides = [f"output_dir={run}", "train.max_steps=2", f"data.train.path={pairs}"]
    overrides += [f"model.name_or_path={tmp_path}/model", "model.init=pretrained", "model.disable_dropout=true"]
    assert train(all_workers[2], run_file, *overrides) == [0, 0]
    forget_everything_after(run, 0)
    save_tiny(tmp_path / "model", config, seed=2)
    assert train(all_workers[2], run_file, *overrides) == [3, 3], "other weights in the same folder"
    save_tiny(tmp_path / "model", config, seed=1)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert train(all_workers[2], run_file, *overrides) == [3, 3], "other pairs in the same file"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(all_workers[2], run_file, *overrides) == [0, 0]

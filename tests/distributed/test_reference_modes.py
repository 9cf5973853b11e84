"""Wherever reference log-probs come from, a run is the same: losses, rewards and evaluations, while the policy moves away.

`engine` keeps a second model and is what the other modes are held to; what it says of the first step and of the last
evaluation is held to plain transformers and peft models in float64 (tests/oracle.py).
"""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Workers

STEPS, PAIRS_PER_STEP = 5, 6
BETA = 0.5
LN2 = math.log(2)

FULL = {
    "engine": ["reference.mode=engine"],
    "offloaded": ["reference.mode=engine", "reference.offload=cpu"],
    "stored": ["reference.mode=stored"],
}
LORA = {
    "engine": ["reference.mode=engine"],
    "stored": ["reference.mode=stored"],
    "adapter": ["reference.mode=adapter"],
}
FRESH_ADAPTER = "model.lora={r: 4, lora_alpha: 16}"
LAYOUTS = [(world, stage) for world in (1, 2) for stage in (1, 2, 3)]


def layouts(*every_time: tuple[int, int]) -> list[Any]:
    """All worlds and stages; those that are not named wait for the slow tests."""
    return [pytest.param(*layout, marks=() if layout in every_time else pytest.mark.slow) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters, pairs and `run.yaml`: steps so large that the policy leaves the reference at once."""
    folder = tmp_path_factory.mktemp("modes")
    vocabulary = save_tokenizer(folder / "tokenizer")
    config = tiny_config("qwen2", vocabulary, num_hidden_layers=1, attention_dropout=0.3)
    save_tiny(folder / "model", config, seed=1)
    save_tiny(folder / "other", config, seed=2)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.1}
    save_tiny(folder / "moe", tiny_config("qwen3_moe", vocabulary, num_hidden_layers=1, **experts), seed=3)
    save_adapters(folder / "adapters", folder / "model")
    for name, count, seed in (("pairs", 12, 3), ("held_out", 5, 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(count, seed)))
    values = {
        "model": {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"},
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "tokens_per_pack": 300,
            "shuffle": False,
        },
        "objective": {"name": "dpo", "beta": BETA},
        "train": {
            "pairs_per_step": PAIRS_PER_STEP,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        },
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def save_adapters(folder: Path, base: Path) -> None:
    """Two adapters as peft saves several: `default` at the root, `second` in a folder of its own."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        lm: Any = AutoModelForCausalLM.from_pretrained(base)
        both = get_peft_model(lm, LoraConfig(init_lora_weights=False, **settings))
        both.add_adapter("second", LoraConfig(init_lora_weights=False, **settings | {"r": 8, "target_modules": ["q_proj"]}))
    both.save_pretrained(str(folder))
    assert {path.parent.name for path in folder.rglob("adapter_config.json")} == {folder.name, "second"}


@pytest.fixture(scope="module")
def groups(folder: Path, all_workers: dict[int, Workers]) -> dict[int, Workers]:
    for workers in all_workers.values():
        workers.run("cases:first_steps", config_path=f"{folder}/run.yaml", variants=[])
        workers.run("gc:freeze")  # ZeRO-3 collects garbage whenever an engine starts, and would walk all imports
    return all_workers


def train(workers: Workers, folder: Path, run: Path, *overrides: str) -> list[dict[str, float]]:
    """The run's lines of metrics: one for each step, then the evaluation."""
    arguments = {"config_path": f"{folder}/run.yaml", "overrides": [*overrides, f"output_dir={run}"]}
    assert workers.run("cases:run_training", **arguments) == [0] * workers.size
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(1, STEPS + 1), STEPS]
    return records


def train_in_each(
    modes: dict[str, list[str]], workers: Workers, folder: Path, tmp_path: Path, *overrides: str
) -> dict[str, list[dict[str, float]]]:
    """Runs that differ in nothing but the mode, after a look at whether they are the same, and have something to show."""
    stores = {"stored": [f"reference.store={tmp_path}/store"]}
    traces = {
        name: train(workers, folder, tmp_path / name, *own, *stores.get(name, []), *overrides) for name, own in modes.items()
    }
    moves(traces["engine"])
    for name in traces:
        assert_same(traces[name], traces["engine"], name)
    return traces


def moves(trace: list[dict[str, float]]) -> None:
    losses = [record["loss"] for record in trace if "loss" in record]
    assert min(abs(one - other) for one, other in pairwise(losses)) > 1e-3, losses
    for record, prefix, least in ((trace[STEPS - 1], "", 0.1), (trace[-1], "eval_", 0.02)):
        farthest = max(abs(record[f"{prefix}rewards/{side}"]) for side in ("chosen", "rejected"))
        assert farthest > least, "the policy is where the reference is"


def assert_same(found: list[dict[str, float]], wanted: list[dict[str, float]], context: str) -> None:
    """Losses to 1e-5; rewards, which are differences of sums of some hundred nats in float32, to 1e-4."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys(), context
        for name in one:
            if name.startswith("perf/") or (name == "rewards/accuracies" and one["step"] == 1):  # there a tie, in theory
                continue
            tolerance = 1e-5 if name in ("loss", "eval_loss") else 1e-4
            assert math.isclose(one[name], other[name], rel_tol=tolerance, abs_tol=tolerance), (
                f"{context}, step {one['step']}: {name} is {one[name]}, {other[name]} with a second model"
            )


@cache
def scored(lm: Path, adapter: Path | None, pairs: Path, count: int) -> list[Any]:
    """The first pairs of a file under a plain model, with an adapter of peft in it. (Experts know no float64.)"""
    dtype = torch.float32 if lm.name == "moe" else torch.float64
    plain: Any = AutoModelForCausalLM.from_pretrained(lm, dtype=dtype)
    if adapter:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, str(adapter)).to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(pairs.parent / "tokenizer")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:count]]
    with torch.no_grad():
        return oracle.score_pairs(plain.eval(), [oracle.render(row, tokenizer) for row in rows])


def assert_is_the_oracles(
    trace: list[dict[str, float]],
    folder: Path,
    final: Path,
    policy: tuple[str, str | None],
    reference: tuple[str, str | None],
    lora: bool = True,
) -> None:
    """`policy`, `reference`: (model, adapter) in `folder` with which the run began. First loss and last evaluation."""
    objective = {"name": "dpo", "beta": BETA}

    def of(source: tuple[str, str | None], pairs: str, count: int) -> list[Any]:
        model, adapter = source
        return scored(folder / model, folder / adapter if adapter else None, folder / pairs, count)

    first = oracle.loss_of_scores(*(of(which, "pairs.jsonl", PAIRS_PER_STEP) for which in (policy, reference)), objective)
    assert trace[0]["loss"] == pytest.approx(first["loss"].item(), rel=1e-4)
    assert trace[0]["rewards/margins"] == pytest.approx(first["rewards/margins"], rel=1e-4, abs=1e-4)
    trained = (policy[0], str(final)) if lora else (str(final), None)
    last = oracle.loss_of_scores(*(of(which, "held_out.jsonl", 5) for which in (trained, reference)), objective)
    assert trace[-1]["eval_loss"] == pytest.approx(last["loss"].item(), rel=1e-4)
    assert trace[-1]["eval_rewards/chosen"] == pytest.approx(last["rewards/chosen"], rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The reference is where the policy began


@pytest.mark.parametrize(("world", "stage"), layouts((1, 1), (2, 3)))
def test_full_fine_tuning_is_the_same_in_every_mode(world, stage, folder, groups, tmp_path):
    zero = f"deepspeed.zero_optimization.stage={stage}"
    traces = train_in_each(FULL, groups[world], folder, tmp_path, zero)
    for trace in traces.values():
        assert math.isclose(trace[0]["loss"], LN2, abs_tol=1e-5), trace[0]
    whole = tmp_path / "stored" / "final"
    assert_is_the_oracles(traces["stored"], folder, whole, ("model", None), ("model", None), lora=False)


@pytest.mark.parametrize(("world", "stage"), layouts((1, 2), (2, 3)))
def test_an_adapters_training_is_the_same_in_every_mode(world, stage, folder, groups, tmp_path):
    zero = f"deepspeed.zero_optimization.stage={stage}"
    traces = train_in_each(LORA, groups[world], folder, tmp_path, zero, FRESH_ADAPTER)
    for trace in traces.values():
        assert math.isclose(trace[0]["loss"], LN2, abs_tol=1e-5), trace[0]
    final = tmp_path / "adapter" / "final"
    assert_is_the_oracles(traces["adapter"], folder, final, ("model", None), ("model", None))


@pytest.mark.slow
def test_an_adapter_beside_a_head_that_is_trained_whole(folder, groups, tmp_path):
    """The reference's head is the model's, the policy's is the one that is trained and saved with the adapter."""
    lora = "model.lora={r: 4, lora_alpha: 16, modules_to_save: [lm_head]}"
    traces = train_in_each(LORA, groups[1], folder, tmp_path, lora)
    final = tmp_path / "adapter" / "final"
    assert_is_the_oracles(traces["adapter"], folder, final, ("model", None), ("model", None))


# ---------------------------------------------------------------------------------------------------------------------
# The reference is another model, or has another adapter

TWO_MODELS = {name: FULL[name] for name in ("engine", "stored")}
# name -> (overrides, modes, (model, adapter) of the policy, and of the reference); {} is the folder of the fixture.
OTHERS: dict[str, tuple[list[str], dict[str, list[str]], tuple[str, str | None], tuple[str, str | None]]] = {
    "a model": (["reference.name_or_path={}/other"], FULL, ("model", None), ("other", None)),
    "a model beside an adapter": (
        [FRESH_ADAPTER, "reference.name_or_path={}/other"], TWO_MODELS, ("model", None), ("other", None),
    ),
    "an adapter on the model that is trained": (
        ["reference.name_or_path={}/adapters"], TWO_MODELS, ("model", None), ("model", "adapters"),
    ),
    "a saved adapter": ([FRESH_ADAPTER, "reference.name_or_path={}/adapters"], LORA, ("model", None), ("model", "adapters")),
    "the second of a folder": (
        [FRESH_ADAPTER, "reference.name_or_path={}/adapters", "reference.adapter_name=second"], LORA,
        ("model", None), ("model", "adapters/second"),
    ),
    "the adapter that goes on": (["model.lora={path: {}/first}"], LORA, ("model", "first"), ("model", "first")),
    "the second adapter, which goes on": (
        ["model.lora={path: {}/adapters}", "model.adapter_name=second"], LORA,
        ("model", "adapters/second"), ("model", "adapters/second"),
    ),
    "base below an adapter that goes on": (
        ["model.lora={path: {}/first}", "reference.adapter_name=base"], LORA, ("model", "first"), ("model", None),
    ),
    "beside the adapter that goes on": (
        ["model.lora={path: {}/adapters}", "model.adapter_name=second", "reference.adapter_name=default"], LORA,
        ("model", "adapters/second"), ("model", "adapters"),
    ),
}  # fmt: skip
OTHER_LAYOUTS = [(1, 2), (2, 1), (1, 3), (2, 3)]


@pytest.fixture(scope="module")
def first(folder: Path, groups: dict[int, Workers]) -> Path:
    """The adapter that a run has left."""
    train(groups[1], folder, folder / "first-run", FRESH_ADAPTER, "model.adapter_name=mine", "reference.mode=adapter")
    return Path(shutil.copytree(folder / "first-run" / "final", folder / "first"))


def other_cases() -> list[Any]:
    """Every case in one layout, and in all by the slow tests."""
    return [
        pytest.param(name, *layout, marks=() if layout == OTHER_LAYOUTS[k % 3] else pytest.mark.slow)
        for k, name in enumerate(OTHERS)
        for layout in OTHER_LAYOUTS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world", "stage"), other_cases())
def test_another_reference_is_the_same_in_every_mode(name, world, stage, folder, first, groups, tmp_path):
    overrides, modes, policy, reference = OTHERS[name]
    zero = f"deepspeed.zero_optimization.stage={stage}"
    traces = train_in_each(
        modes, groups[world], folder, tmp_path, zero, *(key.replace("{}", str(folder)) for key in overrides)
    )
    mode = list(modes)[-1]
    lora = any(key.startswith("model.lora") for key in overrides)
    assert_is_the_oracles(traces[mode], folder, tmp_path / mode / "final", policy, reference, lora=lora)
    assert math.isclose(traces[mode][0]["loss"], LN2, abs_tol=1e-5) == (policy == reference)


# ---------------------------------------------------------------------------------------------------------------------
# The policy's own model as the reference, where that is most intricate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "world", "stage"),
    [
        *[("[aot]", 2, 2), ("[bco_pair, sigmoid]", 1, 1)],
        *[pytest.param(name, 2, 3, marks=pytest.mark.slow) for name in ("[aot]", "[bco_pair, sigmoid]")],
    ],
)
def test_objectives_of_two_passes_are_the_same_in_every_mode(objective, world, stage, folder, groups, tmp_path):
    """In the first pass policy and reference alternate; the second runs after all of them."""
    section = f"objective={{name: dpo, beta: {BETA}, loss_type: {objective}}}"
    continued = [f"model.lora={{path: {folder}/adapters}}", "reference.adapter_name=second", "data.tokens_per_pack=150"]
    zero = f"deepspeed.zero_optimization.stage={stage}"
    traces = train_in_each(LORA, groups[world], folder, tmp_path, section, zero, *continued)
    assert traces["adapter"][0]["perf/packs"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(2, 3), (1, 1)])
def test_a_reference_point_is_the_same_in_every_mode(world, stage, folder, groups, tmp_path):
    """KTO on single answers and on pairs: mismatched pairs are asked about too, in training and in evaluation."""
    rows = preference_rows(24, seed=3)
    alone = [{"prompt": row["prompt"], "completion": row["rejected"], "label": k % 2} for k, row in enumerate(rows[12:])]
    mixed = [row for both in zip(rows, alone) for row in both]
    for name, part in (("mixed", mixed[:-5]), ("mixed_held_out", mixed[-5:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    overrides = [
        f"objective={{name: kto, beta: {BETA}, undesirable_weight: 0.1}}",
        f"deepspeed.zero_optimization.stage={stage}",
        FRESH_ADAPTER,
    ]
    overrides += [f"data.{of}={folder}/{name}.jsonl" for of, name in (("train", "mixed"), ("eval", "mixed_held_out"))]
    traces = train_in_each(LORA, groups[world], folder, tmp_path, *overrides)
    for trace in traces.values():  # half a weight each: four desirable answers, and five others
        assert trace[0]["loss"] == pytest.approx(0.25, abs=1e-5) and trace[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert max(record.get("kl", 0.0) for record in traces["engine"]) > 0.05, "a point of 0 says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["true", "false"])
def test_experts_are_the_same_in_every_mode(recompute, folder, groups, tmp_path):
    """ZeRO-3 gathers experts whole, and routers whose loss is trained are asked for it by the policy's own passes alone.

    Where the backward pass recomputes, it must do so with the adapter that the forward had.
    """
    overrides = [f"model.name_or_path={folder}/moe", "model.lora={r: 4, lora_alpha: 16, target_modules: [q_proj, o_proj]}"]
    world, stage = (2, 3) if recompute == "true" else (1, 2)
    overrides += [f"model.gradient_checkpointing={recompute}", f"deepspeed.zero_optimization.stage={stage}"]
    traces = train_in_each(LORA, groups[world], folder, tmp_path, *overrides)
    assert all("aux_loss" in record for record in traces["adapter"][:STEPS])
    final = tmp_path / "adapter" / "final"
    without_routers = [record | {"loss": record.get("loss/sigmoid")} for record in traces["adapter"]]
    without_routers[-1]["eval_loss"] = traces["adapter"][-1]["eval_loss/sigmoid"]
    assert_is_the_oracles(without_routers, folder, final, ("moe", None), ("moe", None))


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_a_reference_has_no_dropout_while_the_policys_adapter_has(world, stage, folder, groups, tmp_path):
    """Both saved adapters say lora_dropout 0.3; the policy is in the middle of training."""
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    for path in (tmp_path / "adapters").rglob("adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.3}))
    common = [f"model.lora={{path: {tmp_path}/adapters}}", f"deepspeed.zero_optimization.stage={stage}"]
    variants = [
        [*common, f"reference.adapter_name={reference}", f"reference.mode={mode}"]
        for reference in ("base", "second")
        for mode in (LORA if world == 1 else ["adapter"])
    ]
    variants += [[*common, "reference.mode=stored", f"reference.store={tmp_path}/store"]]  # by the policy itself
    found = groups[world].run("cases:reference_values", config_path=f"{folder}/run.yaml", variants=variants)[0]
    adapters = {"base": None, "second": "adapters/second", "default": "adapters"}
    modes = len(variants) // 2
    references = ["base"] * modes + ["second"] * modes + ["default"]
    for reference, variant, values in zip(references, variants, found, strict=True):
        adapter = adapters[reference]
        pairs = scored(folder / "model", folder / adapter if adapter else None, folder / "pairs.jsonl", 12)
        sums = [[sum(token.item() for token in side.answer) for side in pair] for pair in pairs]
        once, again = values["reference"]
        assert np.array_equal(once, again), variant
        assert np.allclose(once[:, :2], sums, rtol=1e-5, atol=1e-3), variant
        assert np.abs(values["policy"][0] - values["policy"][1]).max() > 0.01, "the policy should have dropout"


def test_the_policys_dropout_does_not_depend_on_the_mode(folder, groups, tmp_path):
    """Nor on what a store holds already: whatever loads a reference, and whoever scores with it, draws no random number."""
    lora = "model.lora={r: 4, lora_alpha: 16, lora_dropout: 0.3}"
    overrides = [lora, f"reference.name_or_path={folder}/adapters", "deepspeed.zero_optimization.stage=2"]
    traces = train_in_each(LORA, groups[1], folder, tmp_path, *overrides)
    again = train(groups[1], folder, tmp_path / "again", *LORA["stored"], f"reference.store={tmp_path}/store", *overrides)
    assert_same(again, traces["engine"], "stored before")
    without = train(groups[1], folder, tmp_path / "without", *LORA["adapter"], *overrides, "model.lora.lora_dropout=0")
    assert abs(without[1]["loss"] - again[1]["loss"]) > 1e-3, "there should be dropout"

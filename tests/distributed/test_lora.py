"""LoRA end to end, under every ZeRO stage: what is trained, what stays as it was, what is written, how it goes on.

The oracle is plain peft: float64, one unpadded sequence at a time. Saved adapters come from peft alone, with random weights.
"""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from test_layout_invariance import zero
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from workers import Failed, Workers

from dspref.model.unpacked import load_plain

LN2 = math.log(2)
DPO = {"name": "dpo", "beta": 0.4}
ROWS, HELD_OUT, STEPS = 14, 5, 4
# Kinds of adapters, as peft's LoraConfig has them.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 2.0}},
    "much at once": {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}},
}


# -------------------------------------------------------------------------------------------------------------- files


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path) -> dict[str, Any]:
    return {
        "model": {
            "name_or_path": f"{folder}/model",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
            "lora": {"r": 4, "lora_alpha": 8},
        },
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "tokens_per_pack": 300},
        "objective": DPO,
        "train": {
            "pairs_per_step": 4,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        },
        "deepspeed": {"zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model whose attention has biases, pairs, held-out pairs, and run.yaml with a fresh adapter."""
    folder = tmp_path_factory.mktemp("lora")
    save_tiny(folder / "model", tiny_config("qwen2", save_tokenizer(folder / "tokenizer")), seed=4)
    write_rows(folder / "pairs.jsonl", preference_rows(ROWS, seed=7))
    write_rows(folder / "held_out.jsonl", preference_rows(HELD_OUT, seed=8))
    (folder / "run.yaml").write_text(yaml.safe_dump(config_of(folder)))
    return folder


def lora(kind: str = "lora", **more: Any) -> str:
    """The override that makes a fresh adapter of a kind."""
    return f"model.lora={json.dumps({'r': 4, 'lora_alpha': 8, **KINDS[kind], **more})}"


def a_saved_adapter(folder: Path, kind: str, seed: int, **more: Any) -> Path:
    """An adapter by plain peft, all of whose weights are random; made once."""
    path = folder / f"adapter {kind} {seed} {more}"
    if not path.exists():
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **KINDS[kind], **more}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
            with torch.no_grad():
                for name, parameter in lm.named_parameters():
                    if parameter.requires_grad and "lora_A" not in name:
                        parameter += 0.04 * torch.randn_like(parameter)
        lm.save_pretrained(str(path), save_embedding_layers=False)
    return path


def going_on(adapter: Path, **more: Any) -> str:
    return f"model.lora={json.dumps({'path': str(adapter), **more})}"


def pairs_of(folder: Path, name: str = "pairs.jsonl") -> list[list[list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [oracle.render(json.loads(line), tokenizer) for line in (folder / name).read_text().splitlines()]


def train(workers: Workers, folder: Path, run: Path, *overrides: str, pack: int = 300) -> list[float]:
    """A whole run; its losses."""
    arguments = [*overrides, f"data.tokens_per_pack={pack}", f"output_dir={run}"]
    codes = workers.run("cases:run_training", config_path=f"{folder}/run.yaml", overrides=arguments)
    assert codes == [0] * workers.size
    return [record["loss"] for record in training_records(run) if "loss" in record]


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "final" / "adapter_model.safetensors")


def same_adapters(left: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        difference = np.abs(left[name].astype(np.float64) - right[name].astype(np.float64)).max()
        assert difference <= tolerance, (name, difference)


# --------------------------------------------------------------------------------------------------- where it begins


def first_losses(workers: Workers, folder: Path, variants: list[list[str]]) -> list[float]:
    variants = [[*variant, "train.max_grad_norm=0"] for variant in variants]
    ranks = workers.run("cases:first_steps", config_path=f"{folder}/run.yaml", variants=variants)
    for name in ("loss", "grad_norm"):
        assert len({tuple(result[name] for result in rank) for rank in ranks}) == 1, "ranks disagree"
    assert all(result["grad_norm"] > 0 for result in ranks[0])
    return [result["loss"] for result in ranks[0]]


def assert_ln2(workers: Workers, folder: Path, variants: list[list[str]], tolerance: float = 1e-6) -> None:
    for variant, loss in zip(variants, first_losses(workers, folder, variants), strict=True):
        assert abs(loss - LN2) <= tolerance, (variant, loss)


BEGINNINGS = ["lora", "rslora", "dora", "head", "embedding and head"]


def test_with_adapters_at_zero_the_first_loss_is_ln_2(folder, all_workers):
    live = "reference.mode=adapter"
    assert_ln2(all_workers[1], folder, [[lora("dora"), zero(0), live], [lora("head"), zero(1), live]])
    assert_ln2(all_workers[2], folder, [[lora("rslora"), zero(2), live], [lora("embedding and head"), zero(3), live]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", BEGINNINGS)
@pytest.mark.parametrize("world", [1, 2])
def test_with_adapters_at_zero_the_first_loss_is_ln_2_everywhere(world, kind, folder, all_workers, tmp_path):
    """Each reference is scored anew: a shared store would answer for the stage at hand."""
    variants = [
        [lora(kind), zero(stage), f"reference.mode={mode}"]
        + ([f"reference.store={tmp_path}/{stage}"] if mode == "stored" else [])
        for stage, mode in product((0, 1, 2, 3) if world == 1 else (1, 2, 3), ("stored", "adapter", "engine"))
    ]
    assert_ln2(all_workers[world], folder, variants)


def test_a_random_adapter_does_not_begin_at_ln_2(folder, all_workers):
    (loss,) = first_losses(all_workers[1], folder, [[lora(init_lora_weights=False)]])
    assert abs(loss - LN2) > 1e-3


HALVES = {("lora", 1, 1), ("dora", 1, 3), ("head", 2, 2)}  # each kind and each stage; the others are slow


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        pytest.param(kind, *ranks, marks=() if (kind, *ranks) in HALVES else pytest.mark.slow)
        for ranks in ((1, 1), (2, 2), (1, 3), (2, 3))
        for kind in ("lora", "dora", "head")
    ],
)
def test_half_precision_begins_at_ln_2(kind, world, stage, folder, all_workers, tmp_path):
    losses = train(
        all_workers[world], folder, tmp_path / "run", lora(kind), zero(stage), "model.dtype=bfloat16", "train.max_steps=2"
    )
    assert abs(losses[0] - LN2) <= 1e-3 and losses[1] != losses[0]
    types = {str(tensor.dtype) for tensor in adapter_of_any_type(tmp_path / "run").values()}
    assert types == {"torch.bfloat16"}, "the adapter is of the run's type"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "engine", "stored"])
@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_half_precision_goes_on_at_ln_2(world, stage, mode, folder, all_workers, tmp_path):
    """To what other packs round: a trained adapter, unlike a fresh one, has something to round."""
    saved = a_saved_adapter(folder, "much at once", seed=1)
    change = [going_on(saved), zero(stage), "model.dtype=bfloat16", f"reference.mode={mode}", "train.max_steps=2"]
    losses = train(all_workers[world], folder, tmp_path / "run", *change)
    assert abs(losses[0] - LN2) <= 1e-2 and losses[1] != losses[0]
    assert {str(tensor.dtype) for tensor in adapter_of_any_type(tmp_path / "run").values()} == {"torch.bfloat16"}


def adapter_of_any_type(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "final" / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------- in whatever layout


@pytest.fixture(scope="module")
def expected_run(folder, all_workers, tmp_path_factory) -> tuple[list[float], dict[str, np.ndarray]]:
    run = tmp_path_factory.mktemp("expected") / "run"
    trace = train(all_workers[1], folder, run, zero(0), f"reference.store={run}.store")
    assert abs(trace[0] - LN2) <= 1e-6
    assert all(abs(loss - LN2) > 1e-3 for loss in trace[1:])
    final = adapter_of(run)
    assert len(final) == 2 * 7 * 2 and all(np.abs(weight).max() > 1e-3 for weight in final.values())
    return trace, final


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_losses_and_adapters_are_the_same_in_every_layout(world, stage, folder, expected_run, all_workers, tmp_path):
    """Fresh adapters are drawn alike everywhere, and trained alike."""
    pack = 100_000 if stage == 2 else 300
    trace = train(all_workers[world], folder, tmp_path / "run", zero(stage), f"reference.store={tmp_path}/store", pack=pack)
    assert np.allclose(trace, expected_run[0], rtol=1e-5, atol=0)
    same_adapters(adapter_of(tmp_path / "run"), expected_run[1], tolerance=2e-5)


def test_the_seed_alone_decides_how_adapters_are_drawn(folder, all_workers, tmp_path):
    """Seen after a step too small to move a weight."""

    def drawn(world: int, stage: int, seed: int) -> dict[str, np.ndarray]:
        run = tmp_path / f"{world}-{stage}-{seed}"
        still = ["train.max_steps=1", "train.learning_rate=1e-30", f"train.seed={seed}", zero(stage)]
        train(all_workers[world], folder, run, *still)
        return {name: weight for name, weight in adapter_of(run).items() if "lora_A" in name}

    first = drawn(1, 2, seed=9)
    same_adapters(drawn(1, 3, seed=9), first)
    same_adapters(drawn(2, 2, seed=9), first)
    for name, weight in drawn(1, 2, seed=10).items():
        assert np.abs(first[name] - weight).max() > 0.01, name


# ------------------------------------------------------------------------------------------------------- by the book


def by_the_book(folder: Path, kind: str, reference: Path | None, objective: dict[str, Any]) -> dict[str, Any]:
    """Loss and adapter gradients of plain peft, by their names in the model below peft's own."""

    def float64(adapter: Path | None) -> torch.nn.Module:
        lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        if adapter is None:
            return lm
        return PeftModel.from_pretrained(lm, str(adapter), is_trainable=True, autocast_adapter_dtype=False).double().eval()

    policy = float64(a_saved_adapter(folder, kind, seed=1))
    result = oracle.step(policy, float64(reference), pairs_of(folder), objective)
    result["loss"].backward()
    gradients = {
        name.removeprefix("base_model.model."): parameter.grad.numpy()
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return result | {"loss": result["loss"].item(), "gradients": gradients}


def assert_by_the_book(
    workers: Workers,
    folder: Path,
    kind: str,
    layouts: list[list[str]],
    reference: Path | None = None,
    objective: dict[str, Any] = DPO,
) -> None:
    wanted = by_the_book(folder, kind, reference, objective)
    assert abs(wanted["loss"] - LN2) > 1e-3 and wanted["gradients"]
    whose = ["reference.adapter_name=base"] if reference is None else [f"reference.name_or_path={reference}"]
    if objective["name"] == "orpo":
        whose = []
    common = [
        going_on(a_saved_adapter(folder, kind, seed=1)), f"objective={json.dumps(objective)}", "data.shuffle=false",
        f"train.pairs_per_step={ROWS}", "train.max_steps=1", "train.max_grad_norm=0", *whose,
    ]  # fmt: skip
    variants = [[*common, *layout] for layout in layouts]
    ranks = workers.run("cases:first_steps", config_path=f"{folder}/run.yaml", variants=variants)
    for layout, result in zip(layouts, ranks[0], strict=True):
        assert math.isclose(result["loss"], wanted["loss"], rel_tol=1e-5), (layout, result["loss"], wanted["loss"])
        assert result["gradients"].keys() == wanted["gradients"].keys()
        whole = math.sqrt(sum(float((gradient**2).sum()) for gradient in wanted["gradients"].values()))
        for name, gradient in wanted["gradients"].items():
            difference = float(
                np.linalg.norm(result["gradients"][name].astype(np.float64).reshape(gradient.shape) - gradient)
            )
            assert difference <= 2e-5 * float(np.linalg.norm(gradient)) + 1e-7 * whole, (layout, name, difference)


def layout(stage: int, recompute: bool, sharing: bool, tokens: int, mode: str) -> list[str]:
    return [
        zero(stage), f"model.gradient_checkpointing={json.dumps(recompute)}", f"data.prefix_sharing={json.dumps(sharing)}",
        f"data.tokens_per_pack={tokens}", f"reference.mode={mode}",
    ]  # fmt: skip


FEW_LAYOUTS = [
    layout(1, True, True, 300, "adapter"),
    layout(2, False, True, 100_000, "stored"),
    layout(3, True, True, 300, "adapter"),
    layout(3, False, True, 1, "stored"),
]


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "much at once"])
def test_loss_and_gradients_are_those_of_plain_peft(kind, folder, all_workers):
    assert_by_the_book(all_workers[2], folder, kind, FEW_LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_peft_in_every_layout(kind, world, folder, all_workers):
    layouts = [
        layout(stage, recompute, sharing, tokens, mode)
        for stage, recompute, (sharing, tokens, mode) in product(
            (0, 1, 2, 3), (True, False), ((True, 1, "adapter"), (True, 300, "stored"), (False, 100_000, "adapter"))
        )
        if stage == 3 or recompute == (tokens == 300)
    ]
    assert_by_the_book(all_workers[world], folder, kind, layouts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [{"name": "orpo"}, {"name": "dpo", "loss_type": "aot", "beta": 0.4}], ids=["orpo", "aot"]
)
def test_other_objectives_train_adapters_too(objective, folder, all_workers):
    """One without a reference, and one that couples pairs, with a pass before the one that counts."""
    mode = "none" if objective["name"] == "orpo" else "adapter"
    assert_by_the_book(all_workers[2], folder, "lora", [layout(3, True, True, 300, mode)], objective=objective)


@pytest.mark.parametrize("kind", ["lora", pytest.param("much at once", marks=pytest.mark.slow)])
def test_the_reference_is_another_named_adapter(kind, folder, all_workers):
    """Two adapters in one model, which take turns; or the second in a model of its own."""
    other = a_saved_adapter(folder, kind, seed=2)
    layouts = [layout(3, True, True, 300, "adapter"), layout(2, True, True, 300, "engine")]
    if kind != "lora":
        layouts += [layout(2, True, True, 300, "adapter"), layout(3, False, True, 300, "stored")]
    assert_by_the_book(all_workers[2], folder, kind, layouts, reference=other)


def test_two_adapters_of_one_folder(folder, all_workers, tmp_path):
    """`left` is trained, `right` is its reference; peft saves them in folders of their own."""
    both = tmp_path / "both"
    for name, seed in (("left", 1), ("right", 2)):
        shutil.copytree(a_saved_adapter(folder, "lora", seed), both / name)
    names = ["model.adapter_name=left", "reference.adapter_name=right"]
    live, stored, own, base = first_losses(
        all_workers[1], folder,
        [
            [going_on(both), *names, "reference.mode=adapter"],
            [going_on(both), *names, "reference.mode=stored"],
            [going_on(both), names[0]],
            [going_on(both), names[0], "reference.adapter_name=base"],
        ],
    )  # fmt: skip
    assert math.isclose(live, stored, rel_tol=1e-5)
    assert abs(own - LN2) <= 1e-6, "the reference is the adapter that training goes on from"
    assert abs(base - LN2) > 1e-3 and abs(base - live) > 1e-3 and abs(live - LN2) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage"), [("much at once", 2), *[pytest.param(kind, 3, marks=pytest.mark.slow) for kind in BEGINNINGS]]
)
def test_a_live_reference_gives_the_losses_of_a_stored_one(kind, stage, folder, all_workers, tmp_path):
    """Step after step: what is switched off for the reference is all that has been trained."""
    change = [lora(kind), zero(stage)]
    live, stored = (
        train(all_workers[2], folder, tmp_path / mode, *change, f"reference.mode={mode}") for mode in ("adapter", "stored")
    )
    assert np.allclose(live, stored, rtol=1e-5, atol=0) and abs(live[-1] - LN2) > 1e-3


# ------------------------------------------------------------------------------------------------ what stays the same


@pytest.mark.parametrize("kind", ["lora", "much at once"])
@pytest.mark.parametrize("stage", [2, 3])
def test_base_weights_are_the_same_to_the_bit_after_training(kind, stage, folder, all_workers):
    overrides = [lora(kind), zero(stage), "reference.mode=adapter", "train.weight_decay=0.1"]
    after, nothing = all_workers[2].run(
        "cases:weights_after", config_path=f"{folder}/run.yaml", overrides=overrides, steps=3
    )
    assert nothing == {}
    files = load_file(folder / "model" / "model.safetensors")
    plain = {name.replace(".base_layer", "").replace(".original_module", ""): name for name in after}
    assert files.keys() <= plain.keys()
    for name, weight in files.items():
        assert np.array_equal(after[plain[name]], weight), name
    trained = after.keys() - {plain[name] for name in files}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert all(after[name].any() for name in trained), "B has left 0"
    if kind == "much at once":
        head = next(name for name in trained if "lm_head" in name)
        assert not np.array_equal(after[head], files["lm_head.weight"]), "the head that is trained is a copy"


# ------------------------------------------------------------------------------------------------------------ exports


def scores_of(lm: torch.nn.Module, folder: Path) -> list[tuple[oracle.Scores, oracle.Scores]]:
    with torch.no_grad():
        return oracle.score_pairs(lm.eval(), pairs_of(folder, "held_out.jsonl"))


def logps_of(lm: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Log-probs of all answer tokens of the held-out pairs."""
    scored = scores_of(lm, folder)
    return torch.stack([logp for pair in scored for side in pair for logp in side.answer])


def plain_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


WRITTEN = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        ("patterns", 1, 2),
        *[pytest.param(kind, 2, 3, marks=pytest.mark.slow) for kind in KINDS],
        *[pytest.param(kind, 1, 2, marks=pytest.mark.slow) for kind in KINDS if kind != "patterns"],
        *[pytest.param("much at once", 1, stage, marks=pytest.mark.slow) for stage in (0, 1, 3)],
    ],
)
def test_the_exported_adapter_and_the_merged_model_are_the_trained_one(kind, world, stage, folder, all_workers, tmp_path):
    held_out = f"data.eval={{path: '{folder}/held_out.jsonl'}}"
    change = [zero(stage), held_out, "train.max_steps=3", "train.learning_rate=1e-2", "log.samples=1"]
    train(all_workers[world], folder, tmp_path / "adapted", lora(kind), *change)
    train(all_workers[world], folder, tmp_path / "merged", lora(kind, merge_on_export=True), *change)

    final = tmp_path / "adapted" / "final"
    assert {path.name for path in final.iterdir()} == WRITTEN | ADAPTER
    card = (final / "README.md").read_text()
    assert "library_name: peft" in card and "| adapter | " in card
    assert ("DoRA" if KINDS[kind].get("use_dora") else "rsLoRA" if KINDS[kind].get("use_rslora") else "LoRA, r 4") in card
    whole = tuple(KINDS[kind].get("modules_to_save", ())) or ("nothing",)
    weights = adapter_of(tmp_path / "adapted")
    assert all("lora_" in name or any(part in name for part in whole) for name in weights), "no base weights"
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"{folder}/model" and settings["inference_mode"] is True
    assert AutoTokenizer.from_pretrained(final).chat_template
    assert len((tmp_path / "adapted" / "samples.jsonl").read_text().splitlines()) == 2  # at step 0, and at the end

    merged = tmp_path / "merged" / "final"
    assert {path.name for path in merged.iterdir()} - {"generation_config.json"} == WRITTEN | {
        "config.json",
        "model.safetensors",
    }
    assert "library_name: transformers" in (merged / "README.md").read_text()
    assert load_file(merged / "model.safetensors").keys() == load_file(folder / "model" / "model.safetensors").keys()
    beside = tmp_path / "merged" / "adapter"
    assert {path.name for path in beside.iterdir()} == WRITTEN | ADAPTER
    same_adapters(load_file(beside / "adapter_model.safetensors"), weights)

    expected = logps_of(plain_model(merged), folder)
    base = plain_model(folder / "model")
    assert (logps_of(base, folder) - expected).abs().max() > 0.1, "something was learned"
    # As an export is read, and as users of peft do.
    for lm in (load_plain(str(final)), PeftModel.from_pretrained(base, str(final))):
        assert (logps_of(lm, folder) - expected).abs().max() <= 1e-5
    if not KINDS[kind].get("use_dora"):  # transformers 5.23 leaves the magnitudes of any DoRA file out
        assert (logps_of(plain_model(final), folder) - expected).abs().max() <= 1e-5
    last = training_records(tmp_path / "merged")[-1]
    scored = scores_of(plain_model(merged), folder)
    for side, name in enumerate(("chosen", "rejected")):
        mean = sum(float(sum(pair[side].answer)) for pair in scored) / len(scored)
        assert math.isclose(last[f"eval_logps/{name}"], mean, abs_tol=2e-4), "as the run itself saw its last weights"


@pytest.mark.slow
def test_an_adapter_of_another_name_lies_at_the_root_of_its_folder_too(folder, all_workers, tmp_path):
    renamed = train(all_workers[1], folder, tmp_path / "named", "model.adapter_name=other", "train.max_steps=2")
    default = train(all_workers[1], folder, tmp_path / "default", "train.max_steps=2")
    assert renamed == default
    final = tmp_path / "named" / "final"
    assert {path.name for path in final.iterdir()} == WRITTEN | ADAPTER
    same_adapters(adapter_of(tmp_path / "named"), adapter_of(tmp_path / "default"))
    assert (
        logps_of(plain_model(final), folder) - logps_of(plain_model(tmp_path / "default" / "final"), folder)
    ).abs().max() == 0


# -------------------------------------------------------------------------------------------------------- checkpoints


def bytes_of(weights: dict[str, np.ndarray], name: str) -> bytes:
    """Some consecutive bytes of a weight, as any file that holds it has them."""
    return np.ascontiguousarray(weights[name]).tobytes()[:64]


RESUMES = [(1, 1), (1, 2), (2, 3), *[pytest.param(*it, marks=pytest.mark.slow) for it in ((1, 0), (1, 3), (2, 1), (2, 2))]]


@pytest.mark.parametrize(("world", "stage"), RESUMES)
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_to_the_bit(world, stage, folder, all_workers, tmp_path):
    """With dropout in the adapter, so that the random generators matter, and a head that is trained whole."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    change = [
        lora("much at once", modules_to_save=None, lora_dropout=0.1), zero(stage), "train.max_steps=5",
        "checkpoint.save_every=2", "checkpoint.keep_last=9", f"data.eval={{path: '{folder}/held_out.jsonl'}}",
    ]  # fmt: skip
    train(all_workers[world], folder, whole, *change)
    final, records = adapter_of(whole), training_records(whole)

    base = load_file(folder / "model" / "model.safetensors")
    files = [path for path in (whole / "checkpoints" / "step-000005").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert any(bytes_of(final, name) in content for name in final), "the adapter of step 5 is found where it lies"
    for name in base:
        assert bytes_of(base, name) not in content, name
    own = sum(weight.nbytes for weight in final.values())
    # Weights, masters and two moments; the rest is names and padding.
    assert max(path.stat().st_size for path in files) <= 4 * own + 60_000 < sum(weight.nbytes for weight in base.values())

    shutil.copytree(whole, resumed)
    forget_everything_after(resumed, 2)
    train(all_workers[world], folder, resumed, *change)
    assert training_records(resumed) == records
    same_adapters(adapter_of(resumed), final)
    assert (resumed / "final" / "adapter_model.safetensors").read_bytes() == (
        whole / "final" / "adapter_model.safetensors"
    ).read_bytes()
    events = [json.loads(line) for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_adapter_that_goes_on_resumes_to_the_bit(stage, folder, all_workers, tmp_path):
    """Two adapters in the model, the head trained whole: of what is loaded again only the trained one moves."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    change = [
        going_on(a_saved_adapter(folder, "much at once", 1)), zero(stage), "reference.mode=adapter",
        "train.max_steps=4", "checkpoint.save_every=2", "checkpoint.keep_last=9",
    ]  # fmt: skip
    train(all_workers[2], folder, whole, *change)
    shutil.copytree(whole, resumed)
    forget_everything_after(resumed, 2)
    train(all_workers[2], folder, resumed, *change)
    assert training_records(resumed) == training_records(whole)
    same_adapters(adapter_of(resumed), adapter_of(whole))


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_dora_resumes_under_zero3(recompute, folder, all_workers, tmp_path):
    """DoRA reads weights of its parts, which ZeRO-3 has to be told: recomputed after a resume they would be empty."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    change = [lora("dora"), zero(3), f"model.gradient_checkpointing={recompute}", "train.max_steps=3"]
    change += ["checkpoint.save_every=2", "checkpoint.keep_last=9"]
    train(all_workers[1], folder, whole, *change)
    shutil.copytree(whole, resumed)
    forget_everything_after(resumed, 2)
    train(all_workers[1], folder, resumed, *change)
    assert training_records(resumed) == training_records(whole)


def test_a_resume_refuses_other_settings_of_the_adapter_that_goes_on(folder, all_workers, tmp_path):
    """They are read from its folder at every start, and no checkpoint holds them."""
    adapter = tmp_path / "adapter"
    shutil.copytree(a_saved_adapter(folder, "lora", 1), adapter)
    change = [going_on(adapter), zero(2), "objective={name: orpo}", "train.max_steps=2", "checkpoint.save_every=1"]
    train(all_workers[1], folder, tmp_path / "run", *change)
    forget_everything_after(tmp_path / "run", 1)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 64}))
    arguments = {"config_path": f"{folder}/run.yaml", "overrides": [*change, f"output_dir={tmp_path}/run"]}
    assert all_workers[1].run("cases:run_training", **arguments) == [3]


# ---------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        ("much at once", 2, 2),
        ("lora", 1, 3),
        *[pytest.param(kind, 2, 3, marks=pytest.mark.slow) for kind in ("dora", "embedding and head", "patterns")],
    ],
)
def test_training_goes_on_from_a_saved_adapter(kind, world, stage, folder, all_workers, tmp_path):
    """Which is the reference, and brings its rank, its scale and what it targets."""
    saved = a_saved_adapter(folder, kind, seed=1, target_modules=["q_proj", "up_proj"], r=6, lora_alpha=11)
    trace = train(all_workers[world], folder, tmp_path / "run", going_on(saved), zero(stage))
    assert abs(trace[0] - LN2) <= 1e-6 and max(abs(loss - LN2) for loss in trace[1:]) > 1e-3
    before, after = load_file(saved / "adapter_model.safetensors"), adapter_of(tmp_path / "run")
    assert before.keys() == after.keys()
    for name in before:
        assert 0 < np.abs(after[name] - before[name]).max() < 0.1, name
    settings, own = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "run" / "final", saved))
    assert (own["r"], own["lora_alpha"]) == (6, 11)
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        assert settings[key] == own[key], key
    assert "continued from" in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_goes_on_from_the_final_adapter_of_another(folder, all_workers, tmp_path):
    """Its own export is what it reads: merged, the second run's base is the first run's model with nothing lost."""
    train(all_workers[1], folder, tmp_path / "first", lora("head"))
    first = tmp_path / "first" / "final"
    again = train(all_workers[1], folder, tmp_path / "second", going_on(first), zero(3))
    assert abs(again[0] - LN2) <= 1e-6
    merged = train(all_workers[1], folder, tmp_path / "third", going_on(first, merge_on_export=True), zero(2))
    assert np.allclose(merged, again, rtol=1e-5)
    lm = plain_model(tmp_path / "third" / "final")
    assert (logps_of(lm, folder) - logps_of(plain_model(tmp_path / "second" / "final"), folder)).abs().max() <= 1e-4


def test_disable_dropout_leaves_the_adapters_dropout_alone_unless_told(folder, all_workers, tmp_path):
    saved, silent = (a_saved_adapter(folder, "lora", 1, lora_dropout=rate) for rate in (0.5, 0.0))

    def losses(name: str, adapter: Path, disable: str, **more: Any) -> list[float]:
        change = [going_on(adapter, **more), f"model.disable_dropout={disable}", "train.max_steps=2"]
        return train(all_workers[1], folder, tmp_path / name, *change)

    none = losses("none", silent, "true")
    assert losses("all", saved, "all") == none and abs(none[0] - LN2) <= 1e-6
    on = losses("on", saved, "true")
    assert abs(on[0] - LN2) > 1e-4, "dropout is on in the policy and off in its reference"
    assert losses("off", saved, "false") == on, "the base model has none"
    assert losses("overruled", silent, "true", lora_dropout=0.5) == on, "the YAML's rate replaces the adapter's"
    fresh = [lora(lora_dropout=0.5), "train.max_steps=2"]
    trace = train(all_workers[1], folder, tmp_path / "fresh", *fresh)
    quiet = train(all_workers[1], folder, tmp_path / "quiet", lora(), "train.max_steps=2")
    assert abs(trace[0] - LN2) <= 1e-6 and trace[1] != quiet[1]


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    vocabulary = save_tokenizer(folder / "tokenizer")
    config = tiny_config("qwen3_moe", vocabulary, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    lm = tiny_model(config, seed=1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("gate.weight"):
                parameter *= 6  # routers that have preferences
    lm.save_pretrained(folder / "model")
    write_rows(folder / "pairs.jsonl", preference_rows(ROWS, seed=7))
    write_rows(folder / "held_out.jsonl", preference_rows(HELD_OUT, seed=8))
    (folder / "run.yaml").write_text(yaml.safe_dump(config_of(folder)))
    return folder


EXPERTS = ["model.router_aux_loss_coef=0.05", "train.max_steps=3"]


@pytest.mark.slow
def test_experts_and_routers_get_adapters_under_zero3(moe, all_workers, tmp_path):
    """Ranks route differently, and neither hangs; the losses are those of ZeRO-2."""
    sharded = train(all_workers[2], moe, tmp_path / "sharded", zero(3), *EXPERTS)
    whole = train(all_workers[2], moe, tmp_path / "whole", zero(2), *EXPERTS)
    records = [record for record in training_records(tmp_path / "sharded") if "loss" in record]
    assert all(record["aux_loss"] > 0 for record in records)
    assert abs(records[0]["loss"] - 0.05 * records[0]["aux_loss"] - LN2) <= 1e-5
    assert np.allclose(sharded, whole, rtol=1e-5) and abs(sharded[2] - sharded[0]) > 1e-3
    final = adapter_of(tmp_path / "sharded")
    assert any("experts" in name for name in final) and any("q_proj" in name for name in final)
    same_adapters(final, adapter_of(tmp_path / "whole"), tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_of_experts_are_exported_and_merged(stage, moe, all_workers, tmp_path):
    change = [zero(stage), *EXPERTS, "train.learning_rate=1e-2"]
    train(all_workers[2], moe, tmp_path / "adapted", lora(), *change)
    train(all_workers[2], moe, tmp_path / "merged", lora(merge_on_export=True), *change)
    base = plain_model(moe / "model")
    expected = logps_of(plain_model(tmp_path / "merged" / "final"), moe)
    assert (logps_of(base, moe) - expected).abs().max() > 0.1
    final = tmp_path / "adapted" / "final"
    assert (logps_of(PeftModel.from_pretrained(base, str(final)), moe) - expected).abs().max() <= 1e-5
    assert (logps_of(plain_model(final), moe) - expected).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------------------------- mistakes


def assert_refused(workers: Workers, folder: Path, scratch: Path, cases: list[tuple[list[str], int, str]]) -> None:
    """Each of (overrides, exit code, key to blame) is one line that begins with its key or section, and no run folder."""
    wrong = []
    for k, (overrides, code, key) in enumerate(cases):
        out = scratch / f"out-{k}"
        line = ["--config", f"{folder}/run.yaml", *overrides, "train.max_steps=1", f"output_dir={out}"]
        try:
            ((got, said),) = workers.run("cases:command_line", arguments=[line])[0]
        except Failed as error:
            got, said = -1, str(error).strip().splitlines()[-1]
        if got == 0:
            workers.stop()  # a run that ends well ends its process group
        if got != code or not said.removeprefix(f"override '{overrides[-1]}': ").startswith(key):
            wrong.append(f"{overrides}: {got} {said}")
        if said.count("\n") > 1:
            wrong.append(f"{overrides}: {said.count(chr(10))} lines: {said}")
        if out.exists():
            wrong.append(f"{overrides}: {said.strip()}: it wrote into output_dir, which then refuses the corrected run")
    assert not wrong, "\n".join(wrong)


def test_mistakes_that_files_and_machine_show_are_one_line(folder, all_workers, tmp_path):
    saved = a_saved_adapter(folder, "lora", 1)
    cases = [
        (["model.adapter_name=train"], 2, "model.adapter_name"),
        ([going_on(folder / "model")], 2, "model.lora.path"),
        ([going_on(Path("/no/such"))], 2, "model.lora.path"),
        ([going_on(saved, r=3)], 2, "model.lora.r"),
        ([f"model.name_or_path={saved}"], 2, "model.name_or_path"),
        (["model.load_in_4bit=true"], 4, "model.load_in_4bit"),
        (["train.optim=adamw_8bit"], 4, "train.optim"),
        ([f"reference.name_or_path={folder}/model", "reference.mode=adapter"], 2, "reference.name_or_path"),
        ([f"reference.name_or_path={folder}/model", "reference.adapter_name=gone"], 2, "reference.name_or_path"),
    ]
    assert_refused(all_workers[1], folder, tmp_path, cases)


def test_a_reference_adapter_that_the_folder_has_not_is_refused(folder, all_workers, tmp_path):
    both = tmp_path / "both"
    for name, seed in (("left", 1), ("right", 2)):
        shutil.copytree(a_saved_adapter(folder, "lora", seed), both / name)
    gone = "reference.adapter_name=gone"
    cases = [
        ([f"reference.name_or_path={both}", gone], 2, "reference.name_or_path"),
        ([going_on(both), "model.adapter_name=left", gone], 2, "reference.adapter_name"),
        ([going_on(both), "model.adapter_name=left", "reference.mode=adapter", gone], 2, "reference.adapter_name"),
        ([gone], 2, "reference.adapter_name"),
    ]
    assert_refused(all_workers[1], folder, tmp_path, cases)


def test_mistakes_that_the_model_shows_are_one_line_and_leave_nothing_behind(folder, all_workers, tmp_path):
    save_tiny(tmp_path / "tied", tiny_config("qwen2", 260, tie_word_embeddings=True), seed=1)
    tied = f"model.name_or_path={tmp_path}/tied"
    cases = [
        ([lora(target_modules=["nothing"])], 2, "model.lora"),
        ([lora(target_modules="[(")], 2, "model.lora"),
        ([lora(target_modules=["lm_head"])], 2, "model.lora"),
        ([lora(target_modules=["q_proj", "lm_head"])], 2, "model.lora"),
        ([lora(modules_to_save=["nothing"])], 2, "model.lora"),
        ([lora(exclude_modules=".*")], 2, "model.lora"),
        ([lora(target_modules=["q_proj"], layers_to_transform=[7])], 2, "model.lora"),
        ([tied, lora(modules_to_save=["lm_head"])], 2, "model.lora"),
        ([tied, lora(target_modules=["embed_tokens"])], 2, "model.lora"),
    ]
    assert_refused(all_workers[1], folder, tmp_path, cases)

"""Adapters by themselves: where they lie, what they are, how they are switched and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspref.config import ModelSection
from dspref.errors import ConfigError
from dspref.model import adapters
from dspref.model.adapters import Adapters, Saved
from dspref.model.loading import content_digest
from dspref.model.unpacked import load_named

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_tiny(path, tiny_config("llama", hidden_size=32, intermediate_size=48), seed=1)
    return path


def model_of(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def saved(base: Path, folder: Path, seed: int, name: str = "default", **settings: Any) -> Path:
    """A random adapter, as peft saves it: `default` at the root of the folder, another name below it."""
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        | settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = get_peft_model(model_of(base), config, name)
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    lm.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def section(base: Path, **keys: Any) -> ModelSection:
    return ModelSection(
        **{"name_or_path": str(base), "dtype": "float32", "lora": {"r": 2, "target_modules": ["q_proj"]}} | keys
    )


def logits(lm: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(IDS).logits


# ------------------------------------------------------------------------------------------------- where adapters lie


def test_an_adapter_is_found_at_the_root_or_in_the_folder_of_its_name(base: Path, tmp_path: Path) -> None:
    root = saved(base, tmp_path, seed=1)
    saved(base, tmp_path, seed=2, name="left")
    assert adapters.folder_of(Saved(str(root), "left")) == root / "left"
    assert adapters.folder_of(Saved(str(root), "default")) == root
    assert adapters.folder_of(Saved(str(root / "left"), "left")) == root / "left"
    assert adapters.is_saved(str(root), "left") and adapters.is_saved(str(root), "default")
    (root / adapters.CONFIG).unlink()
    assert adapters.is_saved(str(root), "left") and not adapters.is_saved(str(root), "default")


@pytest.mark.parametrize("missing", [adapters.CONFIG, adapters.WEIGHTS])
def test_half_an_adapter_is_none(missing: str, base: Path, tmp_path: Path) -> None:
    root = saved(base, tmp_path / "adapter", seed=1)
    (root / missing).unlink()
    with pytest.raises(ConfigError, match="holds no adapter 'default'") as refusal:
        adapters.folder_of(Saved(str(root), "default"))
    assert "\n" not in str(refusal.value)


def test_a_model_and_an_absent_folder_hold_no_adapter(base: Path, tmp_path: Path) -> None:
    assert not adapters.is_saved(str(base), "default")
    assert not adapters.is_saved(str(tmp_path / "absent"), "default")
    with pytest.raises(ConfigError, match="holds no adapter"):
        adapters.folder_of(Saved(str(base), "default"))


# -------------------------------------------------------------------------------------------------- what an adapter is


def changed_settings(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / adapters.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def one_bit(folder: Path) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    next(iter(tensors.values())).view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, folder / adapters.WEIGHTS, {"format": "pt"})


def digest_after(change: Callable[[Path], None], adapter: Path, scratch: Path) -> str:
    shutil.copytree(adapter, scratch)
    change(scratch)
    return adapters.digest(Saved(str(scratch), "default"))


@pytest.mark.parametrize(
    "settings",
    [
        {"base_model_name_or_path": "elsewhere"},
        {"lora_dropout": 0.5},
        {"inference_mode": False},
        {"peft_version": "0.1"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_does_not_act_leaves_the_digest(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", seed=1)
    before = json.loads((adapter / adapters.CONFIG).read_text())
    assert any(before[key] != value for key, value in settings.items()), "nothing would change"
    same = digest_after(changed_settings(**settings), adapter, tmp_path / "copy")
    assert same == adapters.digest(Saved(str(adapter), "default"))


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        changed_settings(lora_alpha=5),
        changed_settings(use_rslora=True),
        changed_settings(alpha_pattern={"q_proj": 9}),
    ],
    ids=["a bit of a weight", "lora_alpha", "use_rslora", "alpha_pattern"],
)
def test_what_acts_changes_the_digest(change: Callable[[Path], None], base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", seed=1)
    assert digest_after(change, adapter, tmp_path / "copy") != adapters.digest(Saved(str(adapter), "default"))


def test_the_order_of_settings_and_the_name_of_the_folder_leave_the_digest(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", seed=1)

    def reverse(folder: Path) -> None:
        path = folder / adapters.CONFIG
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))

    assert digest_after(reverse, adapter, tmp_path / "copy") == adapters.digest(Saved(str(adapter), "default"))


# ----------------------------------------------------------------------------------------------------------- switching


def switched(
    base: Path, tmp_path: Path, reference: str, kind: dict[str, Any]
) -> tuple[PreTrainedModel, Adapters, torch.Tensor]:
    """A model with a trained adapter, and what it computes as its reference."""
    trained = saved(base, tmp_path / "trained", seed=1, **kind)
    lm, keys = model_of(base), section(base, lora={"path": str(trained)})
    if reference == "another":
        other = saved(base, tmp_path / "other", seed=2, **kind)
        held = adapters.for_training(lm, keys, 0, Saved(str(other), "default"), live=True)
        expected = logits(PeftModel.from_pretrained(model_of(base), str(other)))
    else:
        held = adapters.for_training(lm, keys, 0)
        expected = logits(model_of(base))
    return lm, held, expected


def state_of(lm: PreTrainedModel) -> tuple[dict[str, bool], list[tuple[list[str], bool]]]:
    """What is trained, and which adapters of each layer are on."""
    layers = [part for part in lm.modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper)]
    grads = {name: parameter.requires_grad for name, parameter in lm.named_parameters()}
    return grads, [(list(part.active_adapters), part.disable_adapters) for part in layers]


class Stop(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True], ids=["well", "raising"])
@pytest.mark.parametrize("reference", ["base", "another"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}], ids=["lora", "dora and head"])
def test_as_reference_computes_the_reference_and_leaves_all_as_it_was(
    kind: dict[str, Any], reference: str, raises: bool, base: Path, tmp_path: Path
) -> None:
    lm, held, expected = switched(base, tmp_path, reference, kind)
    before, state = logits(lm), state_of(lm)
    assert any(state[0].values()) and len(state[1]) == 2 + len(kind.get("modules_to_save", ()))
    inside = None
    try:
        with held.as_reference():
            inside = logits(lm)
            if raises:
                raise Stop
    except Stop:
        pass
    assert inside is not None
    torch.testing.assert_close(inside, expected, rtol=0, atol=2e-6)
    assert (inside - before).abs().max() > 1e-3
    assert state_of(lm) == state
    assert torch.equal(logits(lm), before)


def test_a_reference_that_is_the_trained_adapter_is_the_model_as_it_is(base: Path, tmp_path: Path) -> None:
    """It serves until the first step moves it."""
    path = str(saved(base, tmp_path, seed=1))
    lm = model_of(base)
    held = adapters.for_training(lm, section(base, lora={"path": path}), 0, Saved(path, "default"))
    before = logits(lm)
    with held.as_reference():
        assert torch.equal(logits(lm), before)
    assert (before - logits(model_of(base))).abs().max() > 1e-3


def test_only_the_trained_adapter_is_trained(base: Path, tmp_path: Path) -> None:
    lm, _, _ = switched(base, tmp_path, "another", {"modules_to_save": ["lm_head"]})
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 + 1 and all(".default." in name for name in trained)


# ---------------------------------------------------------------------------------------------------- into and out of


def test_fresh_adapters_come_from_the_seed_alone_and_leave_the_generator(base: Path) -> None:
    drawn = []
    for before in (3, 4):
        torch.manual_seed(before)
        left = torch.get_rng_state()
        lm = model_of(base)
        torch.set_rng_state(left)
        adapters.for_training(lm, section(base), seed=7)
        assert torch.equal(torch.get_rng_state(), left)
        drawn.append({name: p.detach() for name, p in lm.named_parameters() if p.requires_grad})
    other = model_of(base)
    adapters.for_training(other, section(base), seed=8)
    assert len(drawn[0]) == 4
    for name, weight in drawn[0].items():
        assert torch.equal(drawn[1][name], weight)
        assert ("lora_A" in name) == bool(weight.any()), "B starts at 0"
        assert ("lora_A" in name) != torch.equal(other.get_parameter(name), weight)


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"rank_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
    ids=["lora", "dora", "whole modules", "patterns"],
)
def test_what_is_saved_reads_back_in_peft(kind: dict[str, Any], name: str, base: Path, tmp_path: Path) -> None:
    source = saved(base, tmp_path / "source", seed=1, lora_dropout=0.25, **kind)
    lm = model_of(base)
    held = adapters.for_training(lm, section(base, lora={"path": str(source)}, adapter_name=name), 0)
    state = {key: parameter.detach() for key, parameter in lm.named_parameters() if parameter.requires_grad}
    shutil.copytree(base, tmp_path / "moved")
    written = adapters.save(held, state, tmp_path / "again", str(tmp_path / "moved"))
    again = adapters.read(tmp_path / "again")
    original = load_file(source / adapters.WEIGHTS)
    assert again.keys() == written.keys() == original.keys() and len(again) == len(state)
    assert all(torch.equal(again[key], written[key]) and torch.equal(again[key], original[key]) for key in again)
    settings = json.loads((tmp_path / "again" / adapters.CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "moved") and settings["inference_mode"] is True
    assert settings["lora_dropout"] == 0.25, "as the saved adapter says"
    assert adapters.digest(Saved(str(tmp_path / "again"), name)) == adapters.digest(Saved(str(source), "default"))
    expected = logits(lm)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model_of(base), str(tmp_path / "again"))), expected)
    plain = adapters.merged(model_of(base), tmp_path / "again")
    assert not any("lora" in key or "base_layer" in key for key in plain.state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-6)


def test_a_frozen_adapter_has_no_gradient_and_computes_as_peft_does(base: Path, tmp_path: Path) -> None:
    source = saved(base, tmp_path, seed=1)
    lm = model_of(base)
    held = adapters.frozen(lm, Saved(str(source), "default"))
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    expected = logits(PeftModel.from_pretrained(model_of(base), str(source)))
    assert torch.equal(logits(lm), expected)
    with held.as_reference():
        assert torch.equal(logits(lm), expected)


def test_words_of_torch_are_refused_as_names(base: Path) -> None:
    """peft keeps adapters in a ModuleDict, by name."""
    for name in ("train", "keys", "parameters"):
        with pytest.raises(ConfigError, match=f"model.adapter_name: {name}"):
            adapters.check(section(base, adapter_name=name))
    for name in ("default", "left", "train_2"):
        adapters.check(section(base, adapter_name=name))
    adapters.check(ModelSection(name_or_path=str(base)))


# ---------------------------------------------------------------------------------------------- what is not understood


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"peft_type": "PROMPT_TUNING"}, "is PROMPT_TUNING, and only LoRA"),
    ],
)
def test_an_adapter_that_changes_the_model_below_it_is_refused(settings, reason, base: Path, tmp_path: Path) -> None:
    """Off, it would not be the reference: its values would stand in the store under the name of the plain model."""
    adapter = saved(base, tmp_path / "adapter", seed=1)
    changed_settings(**settings)(adapter)
    for use in (
        lambda: adapters.check(section(base, lora={"path": str(adapter)})),
        lambda: adapters.digest(own_of(adapter)),
    ):
        with pytest.raises(ConfigError, match=reason) as error:
            use()
        assert "\n" not in str(error.value)


def own_of(adapter: Path) -> Saved:
    return Saved(str(adapter), "default")


@pytest.mark.parametrize("change", ["missing", "foreign"])
def test_an_adapter_that_does_not_fit_the_model_is_refused(change: str, base: Path, tmp_path: Path) -> None:
    """peft would warn, and go on with fresh weights in the place of those that it did not find."""
    adapter = saved(base, tmp_path / "adapter", seed=1)
    tensors = load_file(adapter / adapters.WEIGHTS)
    name = next(iter(tensors))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, adapter / adapters.WEIGHTS, {"format": "pt"})
    for put in (
        lambda: adapters.frozen(model_of(base), own_of(adapter)),
        lambda: adapters.for_training(model_of(base), section(base, lora={"path": str(adapter)}), seed=1),
        lambda: adapters.for_training(model_of(base), section(base), seed=1, reference=own_of(adapter), live=True),
    ):
        with pytest.raises(ConfigError, match="is no adapter of this model"):
            put()


def test_a_misspelt_name_is_not_the_adapter_at_the_root(base: Path, tmp_path: Path) -> None:
    root = saved(base, tmp_path, seed=1)
    assert adapters.folder_of(Saved(str(root), "any")) == root, "an adapter that lies alone may be called anything"
    saved(base, tmp_path, seed=2, name="left")
    with pytest.raises(ConfigError, match=r"holds no adapter 'lift' .*; it has left"):
        adapters.folder_of(Saved(str(root), "lift"))


def test_reading_an_adapter_leaves_the_random_generator(base: Path, tmp_path: Path) -> None:
    adapter = own_of(saved(base, tmp_path / "adapter", seed=1))
    before = torch.get_rng_state()
    adapters.frozen(model_of(base), adapter)
    adapters.for_training(model_of(base), section(base), seed=1, reference=adapter, live=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "key, idle, fitting",
    [
        ("rank_pattern", {"v_proj": 4}, {"q_proj": 4}),
        ("alpha_pattern", {"layers.7.self_attn.q_proj": 8.0}, {r"layers\.0\.self_attn\.q_proj": 8.0}),
        ("exclude_modules", ["w_proj"], ["layers.0.self_attn.q_proj"]),
        ("exclude_modules", r".*\.w_proj", r".*layers\.0\..*"),
        ("modules_to_save", ["hed"], ["lm_head"]),
    ],
)
def test_a_name_that_fits_no_module_is_refused(base, key, idle, fitting):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    adapters.try_on(model_of(base), section(base, lora=lora | {key: fitting}))
    with pytest.raises(ConfigError, match=rf"^model\.lora\.{key}: "):
        adapters.try_on(model_of(base), section(base, lora=lora | {key: idle}))


def test_weights_of_another_kind_of_file_cannot_be_told_apart(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    assert content_digest(section(tmp_path / "copy")) == content_digest(section(base))
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        content_digest(section(tmp_path / "copy"))


def test_a_folder_of_an_adapter_names_the_model_with_it(base, tmp_path):
    folder = saved(base, tmp_path / "adapter", seed=3)
    fresh, going_on = load_named(str(base)), load_named(str(folder))
    assert torch.equal(logits(fresh), logits(model_of(base)))
    assert torch.equal(logits(going_on), logits(PeftModel.from_pretrained(model_of(base), str(folder))))
    assert not torch.allclose(logits(going_on), logits(fresh), atol=1e-3)


def test_a_saved_adapter_names_the_revision_of_its_model(base, tmp_path):
    lm = model_of(base)
    own = adapters.for_training(lm, section(base), seed=1)
    state = {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad}
    adapters.save(own, state, tmp_path / "saved", "some/model", "v2")
    assert adapters.base_of(str(tmp_path / "saved")) == ("some/model", "v2")
    adapters.save(own, state, tmp_path / "other", str(base))
    assert adapters.base_of(str(tmp_path / "other")) == (str(base), None)

"""LoRA, by peft: adapters are put into a causal LM, switched for the reference, taken out, merged.

peft replaces layers inside the model, so the model keeps its class and its forward; what is here knows which adapter is
trained and which one is the reference.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dspref.config import LoraSection, ModelSection
from dspref.errors import ConfigError, EnvironmentFault, UserError
from dspref.model import vision
from dspref.model.adapter_files import CONFIG, WEIGHTS, Saved, base_of, digest, folder_of, is_saved
from dspref.terminal import first_line, printable

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

__all__ = [
    "CONFIG", "WEIGHTS", "Adapters", "Saved", "base_of", "check", "digest", "folder_of", "for_training", "frozen",
    "is_saved", "merged", "name_in", "own", "plain", "read", "save", "try_on",
]  # fmt: skip


@dataclass(frozen=True)
class Adapters:
    """The adapters inside a model. `reference`: which of them is on when the model is the reference; None: no one."""

    peft: PeftModel
    trained: str
    reference: str | None = None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """While open, the model computes as the reference does."""
        layers: Any = self.peft.base_model
        if self.reference is None:
            layers.disable_adapter_layers()
        elif self.reference != self.trained:
            self.peft.set_adapter(self.reference, inference_mode=True)
        try:
            yield
        finally:
            if self.reference is None:
                layers.enable_adapter_layers()
            elif self.reference != self.trained:
                self.peft.set_adapter(self.trained)


# ---------------------------------------------------------------------------------------------------------------------
# Into a model


def for_training(
    lm: PreTrainedModel, section: ModelSection, seed: int, reference: Saved | None = None, live: bool = False
) -> Adapters:
    """Put the adapter that is trained into `lm`: a fresh one, drawn from `seed` alone, or a saved one.

    `reference`: the adapter that the reference has. With `live` it is loaded too, and stays as it is; without, it serves
    only while the trained one has not moved away from it.
    """
    name = section.adapter_name
    with _drawn_from(seed), _blamed("model.lora"):
        peft_model = _continued(lm, section) if own(section) else _fresh(lm, section)
    _refuse_loose_ends(lm)
    if reference is None:
        return Adapters(peft_model, name)
    if not live:
        return Adapters(peft_model, name, name if reference == own(section) else None)
    second = f"{name}_reference"
    folder = folder_of(reference)
    with _drawn_from(seed), _blamed("reference.adapter_name"):
        peft_model.load_adapter(str(folder), adapter_name=second, is_trainable=False, autocast_adapter_dtype=False)
        _refuse_misfit(peft_model, second, folder)
    return Adapters(peft_model, name, second)


def frozen(lm: PreTrainedModel, source: Saved) -> Adapters:
    """Put a saved adapter into a model that is not trained."""
    from peft import PeftModel

    folder = folder_of(source)
    with _drawn_from(0), _blamed("reference.adapter_name"):
        peft_model = PeftModel.from_pretrained(lm, str(folder), source.name, autocast_adapter_dtype=False)
        _refuse_misfit(peft_model, source.name, folder)
    return Adapters(peft_model, source.name, source.name)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Adapters are drawn alike on every rank and at every ZeRO stage, and what is drawn later does not depend on them; peft
    draws saved ones too, before it reads them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def own(section: ModelSection) -> Saved | None:
    """The saved adapter that training goes on from; None for a fresh one, or where the whole model is trained."""
    return Saved(section.lora.path, section.adapter_name) if section.lora and section.lora.path else None


def _fresh(lm: PreTrainedModel, section: ModelSection) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    given = _lora(section).model_dump(exclude={"path", "merge_on_export"}) | {"lora_dropout": _dropout(section) or 0.0}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if vision.is_vision(lm.config) and _names_no_tower(settings):
        settings["exclude_modules"] = vision.outside_language_model(lm)
    elif settings.get("target_modules", "all-linear") == "all-linear" and (fused := _fused(lm)):
        settings.setdefault("exclude_modules", fused)
    kind = "SEQ_2_SEQ_LM" if getattr(lm.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    config = LoraConfig(task_type=kind, **settings)
    # In the type of the model, as modules_to_save are: DeepSpeed wants one type, and keeps fp32 masters.
    return get_peft_model(lm, config, section.adapter_name, autocast_adapter_dtype=False)


def _fused(lm: PreTrainedModel) -> list[str]:
    """The last layer of every Mamba mixer, whose weight its kernels on CUDA read past an adapter; peft refuses it."""
    mixers = (name for name, part in lm.named_modules() if "Mamba" in type(part).__name__ and hasattr(part, "out_proj"))
    return [f"{name}.out_proj" for name in mixers]


def _names_no_tower(settings: Mapping[str, Any]) -> bool:
    """Whether layers are named by what language model and tower both call theirs, and the tower is not asked for."""
    targets = settings.get("target_modules", "all-linear")
    simple = targets == "all-linear" if isinstance(targets, str) else not any("." in name for name in targets)
    return simple and "exclude_modules" not in settings


def _continued(lm: PreTrainedModel, section: ModelSection) -> PeftModel:
    from peft import PeftConfig, PeftModel

    name = section.adapter_name
    folder = folder_of(Saved(str(_lora(section).path), name))
    config: Any = PeftConfig.from_pretrained(str(folder))
    if (dropout := _dropout(section)) is not None:
        config.lora_dropout = dropout
    options = {"is_trainable": True, "config": config, "autocast_adapter_dtype": False}
    peft_model = PeftModel.from_pretrained(lm, str(folder), name, **options)
    _refuse_misfit(peft_model, name, folder)
    return peft_model


def _dropout(section: ModelSection) -> float | None:
    """Rate of the adapter's own dropout; None: as a saved adapter says, or none."""
    return 0.0 if section.disable_dropout == "all" else _lora(section).lora_dropout


def _lora(section: ModelSection) -> LoraSection:
    assert section.lora is not None
    return section.lora


def _refuse_loose_ends(lm: PreTrainedModel) -> None:
    """Raise ConfigError for adapters that the packed forward, or a merge, would leave out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            "model.lora.target_modules: the head is read as one matrix and takes no adapter; train it whole by "
            "modules_to_save, or leave it out"
        )
    if lm.config.get_text_config().tie_word_embeddings:
        for part, name in ((head, "head"), (embedding, "embedding")):
            if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper):
                raise ConfigError(f"model.lora: {lm.config.model_type} ties head and embedding here; leave the {name} out")


def _refuse_misfit(peft_model: PeftModel, name: str, folder: Path) -> None:
    """Raise ConfigError where tensors of a saved adapter found no place, or places no tensor: peft only warns."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    if different := sorted(expected ^ set(read(folder))):
        raise ConfigError(f"{folder}: is no adapter of this model: {len(different)} tensors differ, first {different[0]}")


@contextmanager
def _blamed(key: str) -> Iterator[None]:
    """peft's complaints about settings that do not suit the model, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is refused, here or below
            yield
    except UserError:
        raise
    except Exception as error:  # peft and torch have one of their own for each
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        telling = next((line for line in lines if "size mismatch" in line), first_line(error))
        raise ConfigError(f"{key}: {telling[:500]}") from None


def name_in(tensor: str) -> str | None:
    """The adapter that a tensor of a model belongs to, by its name there; None for one of the model's own."""
    found = re.search(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)", tensor)
    return found[1] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def check(section: ModelSection) -> None:
    """Refuse, before anything is built, adapters that cannot be had here."""
    if section.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise EnvironmentFault("model.lora: peft is not installed; pip install 'dspref[peft]'")
    if hasattr(nn.ModuleDict(), section.adapter_name):  # where peft keeps adapters by name
        raise ConfigError(f"model.adapter_name: {section.adapter_name} is a word of torch's own; choose another name")
    try:
        if source := own(section):
            folder_of(source)
    except ConfigError as error:
        raise ConfigError(f"model.lora.path: {error}") from None


def try_on(lm: PreTrainedModel, section: ModelSection) -> None:
    """Put a fresh adapter into a model without weights, to find settings that do not suit it. Raises ConfigError."""
    if section.lora and not section.lora.path:
        names = [name for name, _ in lm.named_modules()]
        _refuse_unknown(lm, "modules_to_save", section.lora.modules_to_save or (), names)
        targets = section.lora.target_modules
        if isinstance(targets, list):
            _refuse_unknown(lm, "target_modules", targets, names)
        elif targets != "all-linear":
            _refuse_idle_pattern(lm, targets, names)
        with _blamed("model.lora"):
            _fresh(lm, section)
        _refuse_loose_ends(lm)
        _refuse_idle_names(lm, section.lora, names)


def _refuse_idle_names(lm: PreTrainedModel, section: LoraSection, names: list[str]) -> None:
    """Raise ConfigError for a name or pattern that fits no module: peft would only warn, and go on without it."""
    adapted = [name for name, part in lm.named_modules() if hasattr(part, "lora_A")]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise ConfigError(f"model.lora.{key}: {pattern}: no module that has an adapter is called so")
    excluded = section.exclude_modules
    if isinstance(excluded, list):
        _refuse_unknown(lm, "exclude_modules", excluded, names)
    elif excluded is not None and not any(re.fullmatch(excluded, name) for name in names):
        raise ConfigError(f"model.lora.exclude_modules: {excluded}: {lm.config.model_type} has no such module")


def _refuse_unknown(lm: PreTrainedModel, key: str, wanted: Iterable[str], names: list[str]) -> None:
    for whole in wanted:
        if not any(name == whole or name.endswith(f".{whole}") for name in names):
            known = _linear(lm) if key == "target_modules" else sorted({name.rpartition(".")[2] for name in names if name})
            raise ConfigError(f"model.lora.{key}: {whole}: {lm.config.model_type} has no such module{_hint(whole, known)}")


def _refuse_idle_pattern(lm: PreTrainedModel, pattern: str, names: list[str]) -> None:
    try:
        fits = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        shown, reason = printable(pattern), printable(str(error))
        raise ConfigError(f"model.lora.target_modules: {shown}: is no regular expression ({reason}); mend it") from None
    if not fits:
        listed = ", ".join(_linear(lm))
        raise ConfigError(f"model.lora.target_modules: {pattern}: fits no module of {lm.config.model_type}; it has {listed}")


def _linear(lm: PreTrainedModel) -> list[str]:
    """Last names of the layers that may have an adapter."""
    head = lm.get_output_embeddings()
    layers = (nn.Linear, Conv1D)
    return sorted(
        {name.rpartition(".")[2] for name, part in lm.named_modules() if isinstance(part, layers) and part is not head}
    )


def _hint(word: str, known: list[str]) -> str:
    """The name that was meant, if one is near, and those there are."""
    close = difflib.get_close_matches(word.rpartition(".")[2], known, n=1)
    listed = ", ".join(name for name in known if not name.isdecimal())
    return f"; did you mean {close[0]}?" if close else f"; it has {listed}" if listed else ""


def save(
    adapters: Adapters, state: Mapping[str, Tensor], folder: Path, base: str, revision: str | None = None
) -> dict[str, Tensor]:
    """Write the trained adapter as peft does; its tensors by their names in the file. `state`: the same by their names in
    the model; `base`, `revision`: the model that it is for."""
    from peft import get_peft_model_state_dict

    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    found = get_peft_model_state_dict(adapters.peft, named, adapters.trained, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(adapters.peft.peft_config[adapters.trained])
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision = revision
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    return load_file(folder / WEIGHTS)


def plain(base: PreTrainedModel, folder: str) -> Any:
    """A model with a saved adapter on it, by peft: transformers 5.23 leaves DoRA's magnitudes out."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


def merged(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The plain model with a saved adapter added to its weights, in the type of `base`."""
    return plain(base, folder).merge_and_unload(safe_merge=True)

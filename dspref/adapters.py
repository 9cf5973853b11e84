"""LoRA, by peft: adapters are put into a causal LM, switched for the reference, taken out, merged.

peft replaces layers inside the model, so the model keeps its class and its forward; what is here knows which adapter is
trained and which one is the reference.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from dspref.config import LoraSection, ModelSection
from dspref.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter's config says beside how the adapter acts.
INCIDENTAL = ("base_model_name_or_path", "inference_mode", "revision", "lora_dropout", "peft_version", "task_type")


class Saved(NamedTuple):
    """An adapter on disk or on the hub: a folder, and the adapter's name where the folder holds several."""

    path: str
    name: str


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
    with torch.random.fork_rng(devices=[]), _blamed("model.lora"):
        # Alike on every rank and at every ZeRO stage, whatever was drawn while the model was loaded.
        torch.manual_seed(seed)
        peft_model = _continued(lm, section) if own(section) else _fresh(lm, section)
    _refuse_loose_ends(lm)
    if reference is None:
        return Adapters(peft_model, name)
    if not live:
        return Adapters(peft_model, name, name if reference == own(section) else None)
    second = f"{name}_reference"
    with _blamed("reference.adapter_name"):
        peft_model.load_adapter(str(folder_of(reference)), adapter_name=second, is_trainable=False)
    return Adapters(peft_model, name, second)


def frozen(lm: PreTrainedModel, source: Saved) -> Adapters:
    """Put a saved adapter into a model that is not trained."""
    from peft import PeftModel

    with _blamed("reference.adapter_name"):
        peft_model = PeftModel.from_pretrained(lm, str(folder_of(source)), adapter_name=source.name)
    return Adapters(peft_model, source.name, source.name)


def own(section: ModelSection) -> Saved | None:
    """The saved adapter that training goes on from; None for a fresh one, or where the whole model is trained."""
    return Saved(section.lora.path, section.adapter_name) if section.lora and section.lora.path else None


def _fresh(lm: PreTrainedModel, section: ModelSection) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    given = _lora(section).model_dump(exclude={"path", "merge_on_export"}) | {"lora_dropout": _dropout(section) or 0.0}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **settings), section.adapter_name)


def _continued(lm: PreTrainedModel, section: ModelSection) -> PeftModel:
    from peft import PeftConfig, PeftModel

    folder = str(folder_of(Saved(str(_lora(section).path), section.adapter_name)))
    config: Any = PeftConfig.from_pretrained(folder)
    if (dropout := _dropout(section)) is not None:
        config.lora_dropout = dropout
    return PeftModel.from_pretrained(lm, folder, adapter_name=section.adapter_name, is_trainable=True, config=config)


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


@contextmanager
def _blamed(key: str) -> Iterator[None]:
    """peft's complaints about settings that do not suit the model, in one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[0]}") from None


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
    if source := own(section):
        folder_of(source)


def is_saved(path: str, name: str) -> bool:
    """Whether a folder holds an adapter."""
    return any((folder / CONFIG).is_file() for folder in (Path(path) / name, Path(path)))


def folder_of(source: Saved) -> Path:
    """The folder with the adapter's own files, downloaded first where `path` is a hub id.

    peft saves `default` at the root and adapters of other names in folders of their own.
    """
    root = Path(source.path)
    if not root.is_dir():
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(source.path, allow_patterns=[f"**{CONFIG}", f"**{WEIGHTS}"]))
        except Exception as error:  # offline, gated, misspelt: each has its own exception
            raise ConfigError(f"{source.path}: no LoRA adapter there: {str(error).strip().splitlines()[0]}") from None
    for folder in (root / source.name, root):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise ConfigError(f"{source.path}: holds no adapter {source.name!r} ({CONFIG} beside {WEIGHTS})")


def digest(source: Saved) -> str:
    """sha256 over the bytes of the adapter's weights and what its config says of how it acts."""
    folder = folder_of(source)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    acts = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    found = hashlib.sha256(json.dumps(acts, sort_keys=True).encode())
    found.update((folder / WEIGHTS).read_bytes())
    return found.hexdigest()


def save(adapters: Adapters, state: Mapping[str, Tensor], folder: Path, base: str) -> dict[str, Tensor]:
    """Write the trained adapter as peft does; its tensors by their names in the file. `state`: the same by their names in
    the model; `base`: the model that it is for."""
    from peft import get_peft_model_state_dict

    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    found = get_peft_model_state_dict(adapters.peft, named, adapters.trained, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(adapters.peft.peft_config[adapters.trained])
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    return load_file(folder / WEIGHTS)


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The plain model with a saved adapter added to its weights, in the type of `base`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)  # type: ignore[return-value]

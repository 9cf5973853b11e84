"""Plain models, as a user loads them: without packs, ranks and DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dspref.config import ModelSection
from dspref.model import adapters, families, weights
from dspref.model.loading import load_config


def load_plain(folder: str, trust_remote_code: bool = False, dtype: str = "auto") -> Any:
    """`from_pretrained` of a folder's own safetensors, on the CPU; of an adapter's, the model with the adapter on it."""
    if adapters.is_saved(folder, ""):
        base, revision = adapters.base_of(folder)
        section = ModelSection(name_or_path=base, revision=revision, trust_remote_code=trust_remote_code)
        return adapters.plain(load_original(section, base, dtype), folder)
    weights.files_of(Path(folder))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return families.auto_class(config).from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )


def load_named(name: str, trust_remote_code: bool = False) -> Any:
    """The plain model of a folder, an adapter's or of weights, or of a hub id, in its own type."""
    if adapters.is_saved(name, ""):
        return load_plain(name, trust_remote_code)
    return load_original(ModelSection(name_or_path=name, trust_remote_code=trust_remote_code), name)


def load_original(section: ModelSection, source: str, dtype: str = "auto") -> Any:
    """The plain model of a folder or hub id, by the rules of a policy's."""
    section = section.model_copy(update={"name_or_path": source})
    config = load_config(section)
    weights.fetch(section)
    return families.auto_class(config).from_pretrained(
        str(weights.folder_of(section)), config=config, dtype=dtype, trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
    )  # fmt: skip

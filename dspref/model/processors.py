"""The processor of a vision-language model: whether it is the model's own, and what it makes of images for the tower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from dspref.data.images import RowImages
from dspref.data.sight import Sight, see, sight_of
from dspref.errors import ConfigError
from dspref.model.vision import as_arguments, family_of, image_layout, row_images, taken, unequal


def teach(
    tokenizer: Any, processor: Any, skeleton: PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool = False
) -> None:
    """From now on a tokenizer, with its chat template, is that of a model that reads images, by the processor that goes with
    it. Raises ConfigError as `sight`."""
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    see(tokenizer, sight(processor, skeleton, dtype, trust_remote_code))


def sight(processor: Any, skeleton: PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool = False) -> Sight:
    """How a model reads the images of rows, by its processor; pixels in its own type, as they wait in host memory. Raises
    ConfigError where the two do not go together."""
    config, family = skeleton.config, family_of(skeleton.config)
    _refuse_other_familys(processor, config.model_type)
    _complete(processor, config)
    token, own = config.image_token_id, getattr(processor, "image_token_id", None)
    if own is not None and own != token:
        raise ConfigError(
            f"model.tokenizer_name_or_path: its processor writes images by token {own}, and the model has {token} "
            "(image_token_id); use the model's own"
        )
    word, written = processor.tokenizer.convert_ids_to_tokens(token), getattr(processor, "image_token", None)
    if written is not None and word != str(written):
        has = f"its token {token} is {word!r}" if word else f"it has no token {token}"
        raise ConfigError(
            f"model.tokenizer_name_or_path: {has}, and the model's images are {str(written)!r} "
            "(image_token_id); use the model's own"
        )

    def to_tower(made: Mapping[str, Any], digest: bytes) -> RowImages:
        found = row_images(made, config, digest)
        as_read = {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.tensors.items()}
        return RowImages(as_read, digest)

    def reading(runs: np.ndarray) -> Mapping[str, float]:
        return family.reading(runs, config)

    lay_out = partial(image_layout, skeleton)
    return Sight(processor, token, family.in_one_row, to_tower, lay_out, trust_remote_code, reading)


@torch.no_grad()
def try_on(lm: PreTrainedModel, sight: Sight) -> None:
    """Have a model read a blank image, outside of packs. Raises ConfigError where its processor is not made for it."""
    base: Any = lm.base_model
    read = {name: x.to(lm.device) for name, x in as_arguments(sight.layout.blank.tensors, lm.config).items()}
    made = taken(lambda: base.get_image_features(**read, return_dict=True).pooler_output)
    features = len((made if isinstance(made, torch.Tensor) else torch.cat(list(made))).flatten(0, -2))
    if (tokens := int(sight.of_blank.sum())) != features:
        raise unequal(tokens, features)


def _refuse_other_familys(processor: Any, kind: str) -> None:
    """Raise ConfigError for the processor of another family, whose tensors mean something else."""
    known, name = PROCESSOR_MAPPING_NAMES.get(kind), type(processor).__name__
    if known and name != known and name in PROCESSOR_MAPPING_NAMES.values():
        raise ConfigError(
            f"model.tokenizer_name_or_path: its processor is a {name}, and a {kind} reads by a {known}; use the model's own"
        )


def _complete(processor: Any, config: PretrainedConfig) -> None:
    """Older folders of LLaVA leave to the model's config how many tokens an image becomes."""
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy


def save_tokenizer(tokenizer: Any, folder: Path) -> str | None:
    """Write a tokenizer, and of a vision-language model all of its processor, which is then loaded as a user would and has
    to read an image and a text; what comes out otherwise, or None."""
    own = sight_of(tokenizer)
    if own is None:
        tokenizer.save_pretrained(folder)
        return None
    own.processor.save_pretrained(folder)
    expected, found = own.probe(), own.as_reloaded(str(folder)).probe()
    same = (name in found and torch.equal(torch.as_tensor(x), torch.as_tensor(found[name])) for name, x in expected.items())
    return next((name for name, is_same in zip(expected, same) if not is_same), None)

"""Vision-language families whose packs can be run: what their towers read, and what each has of its own.

transformers runs the tower, puts its features where the image tokens are, and hands the attention of the language model to
`attention.packed_attention`; the tower's own attention, in which images do not meet, stays as its authors wrote it. What is
told of a pack here is which feature each image token takes, as an image may stand in several sequences and is read once.
Positions of three axes are computed per sequence on the host, where packs are made: the families' own functions loop over
tokens and ask their tensors for numbers, which on a GPU would wait for it in every forward.
Features of d numbers, I image tokens of a pack, n tokens of a sequence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from dspref.data.images import ImageLayout, Images, Positions, RowImages
from dspref.data.rows import one_line
from dspref.errors import ConfigError
from dspref.model.attention import PACKED
from dspref.model.pieces import FEATURES, PATCHES, PLACES, WINDOWS

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
# (tokens of images that lie in a row, of each; config) -> what the tower reads for them, by names of `pieces`.
Reading = Callable[["np.ndarray", PretrainedConfig], Mapping[str, float]]


@dataclass(frozen=True)
class VisionFamily:
    """What a family of vision-language models has of its own."""

    reads: tuple[str, ...]
    """What its processor makes of images for the tower."""
    joined: Callable[[Tensors, PretrainedConfig], Tensors] = lambda made, config: made
    """The processor's tensors of one row -> the same, to be joined to other rows' along the first dimension."""
    in_one_row: bool = False
    """The tower wants a dimension in front, of rows."""
    axes: bool = False
    """Positions have three: time, height, width."""
    reading: Reading = lambda runs, config: tiles(float(runs.sum()), config)
    """What a tower reads for image tokens: their number says how many patches there are."""


# ---------------------------------------------------------------------------------------------------------------------
# What a tower computes


def tiles(tokens: float, config: PretrainedConfig, count: float | None = None) -> dict[str, float]:
    """Of images in tiles of one size, `count` of them, or as many as have so many tokens."""
    tower = config.vision_config
    (height, width), (high, wide) = _pair(tower.image_size), _pair(tower.patch_size)
    patches = (height // high) * (width // wide)
    before = tower.model_type in ("clip_vision_model", "internvl_vision")  # a token of the tower's own
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    shrunk = getattr(config, "downsample_ratio", 1.0) if config.model_type == "internvl" else 1 / _scale(config)
    features = (patches + (before and whole)) * shrunk**2
    number, places = tokens / features if count is None else count, patches + before
    return {
        PATCHES: number * patches, PLACES: number * places, FEATURES: number * features,
        "image_attention": number * places**2,
    }  # fmt: skip


def _scale(config: PretrainedConfig) -> int:
    return getattr(config, "scale_factor", 1) if config.model_type in ("idefics3", "smolvlm") else 1


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def _in_a_grid(runs: np.ndarray, config: PretrainedConfig) -> dict[str, float]:
    """LLaVA-NeXT: an image once whole, and in tiles of a grid, of which lines or columns in the margin have no tokens, and
    each line one more at its end: the smallest grid that an image of so many tokens can come from."""
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    grids = sorted(((h // side, w // side) for h, w in config.image_grid_pinpoints), key=math.prod)

    def fits(tokens: int, high: int, wide: int) -> bool:
        lines, columns = patches * high, patches * wide
        whole_lines = tokens % (columns + 1) == 0 and tokens // (columns + 1) <= lines
        return whole_lines or (tokens % lines == 0 and tokens // lines <= columns + 1)

    others = (int(run) - patches**2 for run in runs)
    count = sum(1 + math.prod(next((g for g in grids if fits(n, *g)), grids[-1])) for n in others)
    return tiles(0.0, config, count)


def _merged(runs: np.ndarray, config: PretrainedConfig) -> dict[str, float]:
    """Qwen: four patches a token, each image by itself; windows as if all were whole."""
    tower = config.vision_config
    patches = runs.astype(np.float64) * tower.spatial_merge_size**2
    window = (getattr(tower, "window_size", 0) // tower.patch_size) ** 2
    total = float(patches.sum())
    return {
        PATCHES: total, PLACES: total, FEATURES: float(runs.sum()), "image_attention": float((patches**2).sum()),
        WINDOWS: float((patches * np.minimum(patches, window)).sum()),
    }  # fmt: skip


def _without_padding(made: Tensors, config: PretrainedConfig) -> Tensors:
    """LLaVA-NeXT's processor pads the tiles [images, tiles, ...] of each image to the most of any; its model takes them in a
    row too."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    size, grid = config.vision_config.image_size, config.image_grid_pinpoints
    counts = [image_size_to_num_patches(image, grid, size) for image in made["image_sizes"]]
    tiles = torch.cat([image[:count] for image, count in zip(made["pixel_values"], counts)])
    return {**made, "pixel_values": tiles}


def _first_row(made: Tensors, config: PretrainedConfig) -> Tensors:
    """Idefics3's processor makes [rows, tiles, ...]."""
    return {name: tensor[0] for name, tensor in made.items()}


_QWEN = VisionFamily(("pixel_values", "image_grid_thw"), axes=True, reading=_merged)
_IDEFICS = VisionFamily(("pixel_values", "pixel_attention_mask"), _first_row, in_one_row=True)
FAMILIES: dict[str, VisionFamily] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava": VisionFamily(("pixel_values",)),
    "llava_next": VisionFamily(("pixel_values", "image_sizes"), _without_padding, reading=_in_a_grid),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": VisionFamily(("pixel_values",)),
}
BLOCKS = "lets the tokens of an image see each other in both directions, which the packed kernels do not know"
REFUSED = {"paligemma": BLOCKS, "gemma3": BLOCKS}
# Towers that make features by the sizes of their images, of a tensor as large as the largest one.
REFUSED_TOWERS = {"pixtral": "has a tower for images of many sizes in one tensor, which cannot be joined to others"}


def is_vision(config: PretrainedConfig) -> bool:
    """Whether a model reads images beside text, by its config; those that transformers loads as causal ones do not count."""
    kind = type(config)
    return kind in AutoModelForImageTextToText._model_mapping and kind not in AutoModelForCausalLM._model_mapping


def family_of(config: PretrainedConfig) -> VisionFamily:
    """Raises ConfigError for a model whose packs cannot hold images."""
    kind = config.model_type
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if reason := REFUSED.get(kind) or REFUSED_TOWERS.get(str(tower)):
        raise ConfigError(f"model.name_or_path: {kind} {reason}; use another model")
    if kind not in FAMILIES:
        raise ConfigError(
            f"model.name_or_path: {kind} is not known to read images in a pack; families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def implementations(config: PretrainedConfig) -> dict[str, str]:
    """`attn_implementation` of a vision-language model: packs in the language model, torch's own attention in the tower."""
    parts = {name: PACKED if name == "text_config" else "sdpa" for name in config.sub_configs}
    return {"": PACKED, **parts}


# ---------------------------------------------------------------------------------------------------------------------
# From rows to packs, on the host


def row_images(processed: Tensors, config: PretrainedConfig, digest: bytes) -> RowImages:
    """The images of one row as its family's processor makes them, ready to be joined to other rows' images."""
    family = family_of(config)
    made = {name: torch.as_tensor(processed[name]) for name in family.reads if name in processed}
    return RowImages(dict(family.joined(made, config)), digest)


def image_layout(lm: PreTrainedModel, blank: RowImages) -> ImageLayout:
    """How packs of a model are laid out. Of `lm` nothing but its config is used: it needs no weights."""
    return ImageLayout(lm.config.image_token_id, blank, _three_axes(lm) if family_of(lm.config).axes else None)


def _three_axes(lm: PreTrainedModel) -> Positions:
    base: Any = lm.base_model
    token = lm.config.image_token_id

    def positions(ids: Int[Tensor, "n"], tensors: Tensors) -> Int[Tensor, "3 n"]:
        grids = tensors.get("image_grid_thw")
        features = 0 if grids is None else int(grids.prod(-1).sum()) // lm.config.vision_config.spatial_merge_size**2
        if (tokens := int((ids == token).sum())) != features:
            raise unequal(tokens, features)
        found, _ = base.get_rope_index(ids[None], (ids == token).int()[None], image_grid_thw=grids)
        return found[:, 0]

    return positions


def taken(read: Callable[[], Any]) -> Any:
    """What a tower makes of images. Raises ConfigError where it refuses what the processor makes."""
    try:
        return read()
    except ValueError as error:
        raise ConfigError(
            f"model.name_or_path: its tower does not take what its processor makes: {one_line(error, 200)}; fix: set in "
            "preprocessor_config.json what the model's config says (crop_size, size, patch_size)"
        ) from None


def as_arguments(tensors: Tensors, config: PretrainedConfig) -> dict[str, Tensor]:
    """Images, of rows that were joined, as a model's forward takes them."""
    return {name: tensor[None] if family_of(config).in_one_row else tensor for name, tensor in tensors.items()}


def unequal(tokens: int, features: int) -> ConfigError:
    return ConfigError(
        f"model.name_or_path: its processor writes {tokens} tokens for images of which its tower makes {features} features; "
        "fix: set in processor_config.json what the model's config says (patch_size, merge_size, image_seq_len, "
        "num_additional_image_tokens, vision_feature_select_strategy)"
    )


def outside_language_model(lm: PreTrainedModel) -> str:
    """A regular expression of all modules that do not read packs: the tower, and what joins it to the language model."""
    own = next(name for name, part in lm.named_modules() if part is language_model(lm))
    return rf"(?!{re.escape(own)}\.).*"


def language_model(lm: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that reads packs."""
    base: Any = lm.base_model
    return getattr(base, "language_model", None) or base.text_model


# ---------------------------------------------------------------------------------------------------------------------
# The tower, told of a pack


class PackedImages:
    """Of a model with a tower: the features that a pack's image tokens take, where one is told, and not those of its images
    in order. Here, and not before its forward: under ZeRO-3 parameters of the model itself (LLaVA-NeXT's end of a line) are
    there only within."""

    of_pack: Images | None = None

    def get_image_features(self, *args: Any, **options: Any) -> Any:
        if self.of_pack is None:
            return super().get_image_features(*args, **options)  # type: ignore[misc]
        options.pop("segments", None)  # some hand on all that they are given
        outputs = taken(partial(super().get_image_features, *args, **options))  # type: ignore[misc]
        outputs.pooler_output = self._picked(outputs.pooler_output)
        if (deeper := getattr(outputs, "deepstack_features", None)) is not None:  # Qwen3-VL: added to later layers
            outputs.deepstack_features = [self._picked(layer) for layer in deeper]
        return outputs

    def _picked(self, features: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Of a tensor [..., d] or of several, in the same form: families, and versions of transformers, differ in it."""
        assert self.of_pack is not None
        joined = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        made, tokens = joined.flatten(0, -2), self.of_pack.features
        if tokens not in (0, len(made)):
            raise unequal(tokens, len(made))
        picked = made.index_select(0, self.of_pack.feature_index)
        if not isinstance(features, torch.Tensor):
            return [picked]
        tile = joined.shape[1:-1]  # an image's tokens, or those of a tile, lie in one prompt together
        return picked.unflatten(0, (len(picked) // math.prod(tile), *tile))


@cache
def _told(kind: type) -> type:
    return type(kind.__name__, (PackedImages, kind), {})


def tell(lm: PreTrainedModel) -> None:
    """Have a model ask which features its image tokens take; without a pack it does as before."""
    base: Any = lm.base_model
    if not isinstance(base, PackedImages):
        base.__class__ = _told(type(base))


@contextmanager
def shown(lm: PreTrainedModel, images: Images | None) -> Iterator[dict[str, Tensor]]:
    """While open, the image tokens of a forward take the features of these images, which it is given as arguments."""
    base: Any = lm.base_model
    if images is None:
        yield {}
        return
    base.of_pack = images
    try:
        yield as_arguments(images.tensors, lm.config)
    finally:
        base.of_pack = None

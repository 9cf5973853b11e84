"""How a vision-language model reads the images of a prompt: its processor, which goes with its tokenizer.

A template writes one token for an image. As many as the tower makes features of it, and what else the family writes around
them, depend on the image's size alone: they are learned from the processor by a blank image of that size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dspref import hub
from dspref.data.image_files import Picture
from dspref.data.images import ImageLayout, RowImages
from dspref.data.rows import RowError, one_line
from dspref.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

DIGEST_BYTES = 16
# Pixels of the image for packs without one.
BLANK = (32, 32)
# So many sizes are tried before a processor's own count is believed.
TRIED = 4
NO_PLACE = "set model.chat_template to one that writes images"


@dataclass
class Sight:
    """What must be known of a model to read images of rows."""

    processor: Any
    token: int
    """The token that stands for an image, and for each of its features."""
    nested: bool
    """Whether the processor wants images by rows."""
    to_tower: Callable[[Mapping[str, Any], bytes], RowImages]
    """(what the processor makes of the images of a row, their digest) -> what the tower reads."""
    lay_out: Callable[[RowImages], ImageLayout]
    """(a blank image) -> how packs are laid out."""
    trust_remote_code: bool = False
    """Whether the processor may have code of its own, which an export's has too."""
    reading: Callable[[np.ndarray], Mapping[str, float]] = lambda runs: {}
    """(tokens of images that lie in a row, of each [n]) -> what the tower computes for them, by names of its own."""
    _known: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _counts: bool = True
    """Whether an image is nothing but as many tokens as the processor counts."""

    @cached_property
    def word(self) -> str:
        """The text of the token."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.token))

    @cached_property
    def layout(self) -> ImageLayout:
        import PIL.Image

        try:
            return self.lay_out(self.to_tower(self._processed([PIL.Image.new("RGB", BLANK)]), b""))
        except Exception as error:  # a processor's own complaint
            reason = f"its {type(self.processor).__name__} reads no image: {one_line(error, 200)}"
            raise ConfigError(f"model.name_or_path: {reason}; fix: mend its processor_config.json") from None

    @cached_property
    def digest(self) -> str:
        """sha256 over all that turns an image into what the tower reads, but for the image."""
        own = self.processor
        saids = [own.image_processor.to_dict(), own.to_dict()]
        for said in saids:
            for name in ("_name_or_path", "transformers_version", "processor_class", "chat_template", "image_processor"):
                said.pop(name, None)
        parts = [type(own).__name__, type(own.image_processor).__name__, *saids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def digest_of(self, pictures: Sequence[Picture]) -> bytes:
        """Of the images of a row, as this model reads them."""
        parts = [self.digest, *(picture.digest for picture in pictures)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=DIGEST_BYTES).digest()

    def read(self, images: Sequence[Image], digest: bytes) -> RowImages:
        """The images of a row, as the tower reads them. Raises RowError."""
        try:
            return self.to_tower(self._processed(images), digest)
        except Exception as error:  # a processor's own complaint
            raise _untaken(error) from None

    def expanded(self, prompt: np.ndarray, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """A prompt with all tokens of its images, and which they are: int32 [n], bool [n]. Raises RowError."""
        places = np.flatnonzero(prompt == self.token)
        if len(places) != len(pictures):
            there = f"{len(places)} image tokens in the prompt, and {len(pictures)} images"
            fix = NO_PLACE if len(places) < len(pictures) else f"take {self.word!r} out of the text"
            raise RowError("images", there, fix)
        parts, masks, done = [], [], 0
        for place, picture in zip(places.tolist(), pictures):
            own = self._tokens((picture.height, picture.width))
            parts += [prompt[done:place], own]
            masks += [np.zeros(place - done, dtype=bool), np.ones(len(own), dtype=bool)]
            done = place + 1
        parts, masks = [*parts, prompt[done:]], [*masks, np.zeros(len(prompt) - done, dtype=bool)]
        return np.concatenate(parts).astype(np.int32), np.concatenate(masks)

    def collapsed(self, prompt: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        """A prompt as `expanded` got it, with one token for each image: int32 [n]."""
        parts, done = [], 0
        for picture in pictures:
            own = self._tokens((picture.height, picture.width))
            starts = done + np.flatnonzero(prompt[done : len(prompt) - len(own) + 1] == own[0])
            start = next((k for k in starts.tolist() if np.array_equal(prompt[k : k + len(own)], own)), None)
            if start is None:
                break
            parts += [prompt[done:start], np.array([self.token])]
            done = start + len(own)
        return np.concatenate([*parts, prompt[done:]]).astype(np.int32)

    def given(self, prompt: np.ndarray, images: Sequence[Image]) -> dict[str, Any]:
        """What a plain model is given beside the tokens of an `expanded` prompt: what the processor makes of its images, and
        which tokens are theirs, where the family asks for that. Raises RowError."""
        import torch

        if not images:
            return {}
        try:
            made = self._processed(images)
        except Exception as error:  # a processor's own complaint
            raise _untaken(error) from None
        of_tokens = {name for name, x in made.items() if x.shape == made["input_ids"].shape}
        found = {name: x for name, x in made.items() if name not in of_tokens}
        if "mm_token_type_ids" in of_tokens:
            found["mm_token_type_ids"] = torch.from_numpy(prompt == self.token).int()[None]
        return found

    def probe(self) -> Mapping[str, Any]:
        """What the processor makes of a gradient of colours and its place."""
        import PIL.Image

        colours = np.indices((48, 64)).sum(axis=0, dtype=np.uint8)[..., None].repeat(3, axis=-1)
        return self._processed([PIL.Image.fromarray(colours)])

    def as_reloaded(self, folder: str) -> Sight:
        """The same with the processor of a folder."""
        return replace(self, processor=load_processor(folder, None, self.trust_remote_code), _known={}, _counts=True)

    @cached_property
    def of_blank(self) -> np.ndarray:
        """Tokens in a row of the image of packs without one: [n]."""
        return runs_of(self._tokens(BLANK) == self.token)

    def _tokens(self, size: tuple[int, int]) -> np.ndarray:
        """What an image of (height, width) pixels becomes."""
        if size not in self._known:
            try:
                self._known[size] = self._learned(size)
            except Exception as error:  # a processor's own complaint
                reason = f"the model's processor takes no image of {size[1]} x {size[0]} pixels: {one_line(error)}"
                raise RowError("images", reason) from None
        return self._known[size]

    def _learned(self, size: tuple[int, int]) -> np.ndarray:
        import PIL.Image

        counted = self._counted(size) if self._counts else None
        if counted is not None and len(self._known) >= TRIED:
            return counted
        made = self._processed([PIL.Image.new("RGB", (size[1], size[0]))])["input_ids"]
        found = np.asarray(made[0], dtype=np.int32)
        self._counts = counted is not None and np.array_equal(found, counted)
        return found

    def _counted(self, size: tuple[int, int]) -> np.ndarray | None:
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return None
        return np.full(count(image_sizes=[list(size)])["num_image_tokens"][0], self.token, dtype=np.int32)

    def _processed(self, images: Sequence[Image]) -> Mapping[str, Any]:
        given = [list(images)] if self.nested else list(images)
        text = [self.word * len(images)]
        return self.processor(text=text, images=given, add_special_tokens=False, return_tensors="pt")


def _untaken(error: Exception) -> RowError:
    return RowError("images", f"the model's processor does not take them: {one_line(error)}")


def runs_of(mask: np.ndarray) -> np.ndarray:
    """How many lie side by side, of each run: bool [n] -> int64 [k]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return edges[1::2] - edges[::2]


def see(tokenizer: PreTrainedTokenizerBase, sight: Sight) -> None:
    """From now on the tokenizer is that of a vision-language model."""
    tokenizer.sight = sight  # type: ignore[attr-defined]


def sight_of(tokenizer: PreTrainedTokenizerBase) -> Sight | None:
    """How images are read, where they are."""
    return vars(tokenizer).get("sight")


def has_processor(name_or_path: str) -> bool:
    """Whether a folder holds one, beside its tokenizer; of a hub id nobody knows before it is fetched."""
    files = ("processor_config.json", "preprocessor_config.json")
    return not os.path.isdir(name_or_path) or any(os.path.exists(os.path.join(name_or_path, file)) for file in files)


def load_processor(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub id. Raises ConfigError in one line."""
    from transformers import AutoProcessor

    try:
        folder = name_or_path
        if not os.path.isdir(folder):
            code = ["*.py"] * trust_remote_code
            folder = str(hub.snapshot(folder, revision, (*hub.TOKENIZER, *code)))
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not hasattr(found, "image_processor"):
            raise ValueError(f"it has a {type(found).__name__} alone, and no processor of images")
        return found
    except Exception as error:  # missing files, missing libraries: each has its own
        reason, fix = _reason(error)
        raise ConfigError(
            f"model.name_or_path: no processor of images loads from {name_or_path!r}: {reason}; fix: {fix}"
        ) from None


def _reason(error: Exception) -> tuple[str, str]:
    """Why a processor does not load, and what helps."""
    reason, said = one_line(error, 200), str(error).lower()
    lacks = {name for name in ("PIL", "torchvision", "num2words") if importlib.util.find_spec(name) is None}
    for_videos = "torchvision" in said or "video" in said
    if "PIL" in lacks or ("torchvision" in lacks and for_videos) or ("num2words" in lacks and "num2words" in said):
        return reason, "pip install 'dspref[vision]'"
    if "custom code" in said:
        return "it has code of its own", "set model.trust_remote_code: true if you trust it"
    return reason, "fetch the model's processor files too"

"""Images of a pack: what a model's tower reads, each image once, and which of its features every image token takes.

An image belongs to a prompt, in which the family's processor has put as many image tokens as the tower makes features of it.
So rows are laid out as rows of text are; only their images, and positions of several axes, come from here.
T tokens of a pack, I image tokens among them, n tokens of a sequence, A axes of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

Positions = Callable[["Int[Tensor, 'n']", Mapping[str, "Tensor"]], "Int[Tensor, 'A n']"]


@dataclass(frozen=True)
class RowImages:
    """All images of one row, in the order of its prompt."""

    tensors: Mapping[str, Tensor]
    """What the tower takes, by name. Rows are joined along the first dimension: over images, tiles or patches."""
    digest: bytes
    """Says which rows have the same images: these are computed once, and prompts with other images are other prompts."""


@dataclass(frozen=True)
class ImageLayout:
    """What must be known of a model to lay out rows with images."""

    token: int
    """Its image token."""
    blank: RowImages
    """Some small image, for packs without one: where parameters or gradients are in shards, the tower has to run on every
    rank or on none. No token takes its features, and its gradient is zero."""
    positions: Positions | None = None
    """(token ids, images' tensors) -> positions, where they have several axes; a prefix's do not depend on what follows."""


@dataclass(frozen=True)
class Images:
    """The images of a pack, on their way through the tower."""

    tensors: Mapping[str, Tensor]
    feature_index: Int[Tensor, "I"]
    """Which feature, of all that the tower makes, each image token of the pack takes."""
    features: int = 0
    """How many the tower is to make: the image tokens of all its images; 0: of a pack without one, whatever it makes."""

    def to(self, device: torch.device) -> Images:
        tensors = {name: x.to(device) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, feature_index=self.feature_index.to(device))


class Laid(NamedTuple):
    """A prompt as it lies in a pack, with all its answers: token ids, and which pair has it first."""

    pair: int
    prompt: np.ndarray
    answers: list[np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """The images of P pairs that are to be laid out in a pack; None: of a pair without one."""

    rows: Sequence[RowImages | None]
    layout: ImageLayout

    @property
    def digests(self) -> list[bytes]:
        return [row.digest if row else b"" for row in self.rows]

    def images(self, prompts: Sequence[Laid]) -> Images:
        """The images of a pack's prompts. Raises ValueError for a prompt whose image tokens are not those of its images."""
        held: dict[bytes, RowImages] = {}
        places: dict[bytes, np.ndarray] = {}
        taken, done = [np.arange(0)], 0
        for laid in prompts:
            row, count = self.rows[laid.pair], int((laid.prompt == self.layout.token).sum())
            if (row is None) != (count == 0) or any((answer == self.layout.token).any() for answer in laid.answers):
                raise ValueError(f"pair {laid.pair} of a pack: image tokens without an image, or an image without tokens")
            if row is None:
                continue
            if row.digest not in held:
                held[row.digest], places[row.digest] = row, np.arange(done, done + count)
                done += count
            if len(places[row.digest]) != count:
                raise ValueError(
                    f"pair {laid.pair} of a pack: {count} image tokens, and elsewhere another number for its images"
                )
            taken.append(places[row.digest])
        rows = list(held.values()) or [self.layout.blank]
        tensors = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
        return Images(tensors, torch.from_numpy(np.concatenate(taken)), done)

    def position_ids(self, prompts: Sequence[Laid]) -> Int[Tensor, "A T"] | None:
        """Positions of a pack's tokens by the model's own function, which is asked once for each prompt; None: the usual.

        Answers are text: whatever their number, they go on, on all axes, from where one more token would stand.
        """
        if self.layout.positions is None:
            return None
        parts = []
        for laid in prompts:
            found = self.axes(laid.pair, laid.prompt)
            parts.append(found[:, :-1])
            parts += [found[:, -1:] + torch.arange(len(answer)) for answer in laid.answers]
        if not parts:  # a filler
            return self.layout.positions(torch.zeros(4, dtype=torch.int64), {})
        return torch.cat(parts, dim=1)

    def axes(self, pair: int, prompt: np.ndarray) -> Int[Tensor, "A n+1"]:
        """Positions of a prompt's n tokens, and of one behind them: on one axis, where the model has no other."""
        positions, row = self.layout.positions, self.rows[pair]
        if positions is None:
            return torch.arange(len(prompt) + 1)[None]
        text = int(self.layout.token == 0)  # any token but the image's
        ids = torch.from_numpy(np.append(prompt, text).astype(np.int64))
        return positions(ids, row.tensors if row else {})

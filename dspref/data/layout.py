"""Where the prompts and answers of a pack lie, and which keys each of them sees: the pack of `batch`, to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dspref.data.batch import CHOSEN, groups_of
from dspref.data.truncate import TokenizedPair


class Piece(NamedTuple):
    """A prompt or an answer in a pack, from token `start` on."""

    kind: str
    """prompt, chosen, rejected, or both: an answer that is chosen in one pair and rejected in another."""
    start: int
    tokens: int
    group: int
    """Prompts are numbered; an answer has the number of its own."""
    pairs: tuple[int, ...]
    """The pairs that it is in, by their places in the pack."""
    keys: tuple[tuple[int, int], ...]
    """What its last token sees: tokens from one place up to another."""

    @property
    def stop(self) -> int:
        return self.start + self.tokens


def layout(
    pairs: Sequence[TokenizedPair],
    prefix_sharing: bool,
    encoder_decoder: bool = False,
    digests: Sequence[bytes] | None = None,
) -> list[Piece]:
    """The pieces of a pack, in order; of an encoder-decoder model as if prompts and answers lay in one row, and answers
    without their last token, which is not read. `digests`: of the images of each pair's prompt."""
    found: list[Piece] = []
    at = 0
    for number, group in enumerate(groups_of(pairs, prefix_sharing, digests=digests)):
        first, stop = at, at + len(group.prompt)
        of_group = sorted({span % len(pairs) for answer in group.answers for span in answer.spans})
        found.append(Piece("prompt", first, stop - first, number, tuple(of_group), ((first, stop),)))
        at = stop
        for answer in group.answers:
            end = at + len(answer.tokens) - int(encoder_decoder)
            sides = {span // len(pairs) == CHOSEN for span in answer.spans}
            kind = "both" if len(sides) > 1 else "chosen" if True in sides else "rejected"
            members = tuple(sorted({span % len(pairs) for span in answer.spans}))
            keys = ((first, end),) if at == stop else ((first, stop), (at, end))
            found.append(Piece(kind, at, end - at, number, members, keys))
            at = end
    return found

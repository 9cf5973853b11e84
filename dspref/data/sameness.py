"""Which prompts and sequences of a data set are the same: digests of what decides it, and numbers for these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from dspref.data.truncate import TokenizedPair

DIGEST_BYTES = 16


def content_of(pair: TokenizedPair, images: bytes = b"") -> Iterator[bytes]:
    """Digests of (prompt, prompt + chosen, prompt + rejected), what is scored included: equal where these are. `images`: a
    digest of those of the prompt."""
    prompt = hashlib.blake2b(len(pair.prompt).to_bytes(4, "little"), digest_size=DIGEST_BYTES)
    prompt.update(pair.prompt.tobytes() + images)
    yield prompt.digest()
    for answer, mask in zip(pair[1:3], (*pair[3:], None, None)):
        own = prompt.copy()
        own.update(answer.tobytes())
        if mask is not None and not mask.all():
            own.update(b"scored" + np.packbits(mask).tobytes())
        yield own.digest()


def numbered(digests: np.ndarray) -> np.ndarray:
    """Numbers int64 [m] for digests uint64 [m, 2], equal where these are equal."""
    first, second = digests.T
    order = np.lexsort((second, first))
    steps = np.zeros(len(order), dtype=np.int64)
    for part in (first[order], second[order]):
        steps[1:] |= part[1:] != part[:-1]
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(steps)
    return numbers

"""How many logits may be alive at once: the numbers that `logps` works by, and estimates of memory. Loads no torch."""

from __future__ import annotations

# fp32 logits alive at once, whatever the batch and the vocabulary: 256 MB feed a GPU, 16 MB stay near a CPU's caches.
LOGITS_PER_CHUNK = 2**26
LOGITS_PER_CPU_CHUNK = 2**22
# Rows of the head that the backward pass meets at a time, at least: each part of the vocabulary is added to the gradients of
# all hidden states, so that many small ones would cost more than their matrix products.
PART = 4096
# GPUs multiply in tiles.
TILE = 128
# fp32 probabilities that may stay until the backward pass, which then needs no second look at the head: 512 and 256 MB.
KEPT, KEPT_ON_CPU = 2**27, 2**26


def fits(scored: int, vocabulary: int, device_type: str) -> bool:
    """Whether the probabilities of so many tokens are kept for the backward pass."""
    return scored * vocabulary <= (KEPT_ON_CPU if device_type == "cpu" else KEPT)


def room(device_type: str) -> int:
    """fp32 logits alive at once."""
    return LOGITS_PER_CPU_CHUNK if device_type == "cpu" else LOGITS_PER_CHUNK

"""Log-probs of many scored tokens: the memory of their backward pass grows with tokens times hidden size, and with the
vocabulary by a chunk alone; and scores of a long segment are there in blocks.
Bytes of live tensors are counted, and so are exact."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dspref.data.batch import collate
from dspref.data.truncate import TokenizedPair
from dspref.model import head_room
from dspref.model.attention import PACKED
from dspref.model.logps import scored_logps
from dspref.model.packed import PackedCausalLM
from dspref.model.sdpa import Options, calls_of, sdpa

VOCABULARY, HIDDEN = 32_768, 16
# Too many to keep their probabilities.
SCORED = 2_304
CHUNK = 4 * head_room.LOGITS_PER_CPU_CHUNK


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made while it is open: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return found

    def add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, place, size)

    def drop(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def peak(work: Callable[[], Any]) -> int:
    with Live() as live:
        work()
    return live.most


def test_live_bytes_are_counted() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second.view(10, 100) * 2
        del second, third
        torch.ones(500)

    assert peak(work) == 8000


def of_head(scored: int) -> int:
    assert not head_room.fits(scored, VOCABULARY, "cpu")
    draws = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=draws).requires_grad_() for n in (scored, VOCABULARY))
    targets = torch.randint(0, VOCABULARY, (scored,), generator=draws)
    return peak(lambda: scored_logps(hidden, weight, None, targets).logps.sum().backward())


def test_the_backward_is_linear_in_scored_tokens() -> None:
    once, twice = of_head(SCORED), of_head(2 * SCORED)
    # Gradients of the head and of a part of it, and some chunks of logits.
    assert once < 3 * CHUNK + 2 * 4 * VOCABULARY * HIDDEN + 100 * SCORED * HIDDEN
    # Of a token some vectors and numbers; all of its logits would be 131 kB.
    assert twice - once < SCORED * (5 * 4 * HIDDEN + 64)


def test_tokens_that_are_not_scored_meet_no_head() -> None:
    lm = tiny_model(tiny_config("llama", VOCABULARY, hidden_size=HIDDEN, max_position_embeddings=4096), seed=1)
    lm.set_attn_implementation(PACKED)
    packed = PackedCausalLM(lm, "sdpa").train()
    answer = np.arange(40, dtype=np.int32)

    def of_prompt(length: int) -> int:
        pair = TokenizedPair(np.arange(length, dtype=np.int32), answer, answer)
        batch = collate([pair], [0], prefix_sharing=False)
        assert len(batch.targets) == 80
        return peak(lambda: packed(batch)[0].logps.sum().backward())

    few, many = of_prompt(500), of_prompt(1000)
    assert (many - few) / 1000 < 4 * VOCABULARY / 10


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (900, None), (None, 5.0)])
def test_scores_of_a_long_segment_are_never_all_there(window: int | None, softcap: float | None) -> None:
    """Answers behind a shared prompt, sliding windows and softcaps: forward and backward hold blocks of scores."""
    queries, keys, heads, at_once = 1536, 3072, 2, 2**18
    q = torch.randn(queries, heads, 8, requires_grad=True)
    k, v = (torch.randn(keys, heads, 8, requires_grad=True) for _ in range(2))
    calls = calls_of([queries], [keys], q.device, side_by_side=False)
    most = peak(lambda: sdpa(q, k, v, calls, True, Options(0.5, 0.0, window, softcap), at_once).sum().backward())
    assert most < 16 * 4 * at_once < 4 * queries * keys * 0.9

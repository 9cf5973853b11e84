"""Reading one sequence per forward, for models whose layers cannot be told of a pack (`alone` says which).

The pack is what it is for all models, and so is all that comes behind the hidden states. Only these are made otherwise:
each answer behind its own prompt is a forward of its own, as the authors wrote it, without mask or cache. No prompt is
computed once for several answers. Exact for whatever a layer does with what lies before a token; and slow, as short
sequences fill no GPU. T tokens of a pack, of hidden size d; B sequences of a passage.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from dspref.data.batch import FILLER_TOKENS, PackedBatch
from dspref.model.admission import backbone_of
from dspref.model.alone import ALONE
from dspref.model.attention import Segments
from dspref.model.generation import Passage

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def read(lm: PreTrainedModel, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
    """Hidden states [1, T, d] in the order of the pack, and behind them those of fillers: every rank makes as many forwards
    as the one that has most sequences, since under ZeRO-3 all gather a layer's weights together."""
    segments.seen.append(ALONE)  # by nothing else is a sequence of its own
    states, routers, own = [], [], list(_sequences(batch))
    asked = {"output_router_logits": True} if routed else {}
    for tokens, count in own:
        outputs = _forward(lm, batch.input_ids[tokens][None], **asked)
        states.append(outputs.last_hidden_state[0, -count:])
        routers += [[logits.flatten(0, -2)[-count:] for logits in outputs.router_logits or ()]] if routed else []
    for _ in range(batch.sequences - len(own)):
        states.append(_forward(lm, batch.input_ids.new_zeros(1, FILLER_TOKENS)).last_hidden_state[0])
    layers = [torch.cat(parts) for parts in zip(*routers)] if routed else None
    return SimpleNamespace(last_hidden_state=torch.cat(states)[None], router_logits=layers)


def _sequences(batch: PackedBatch) -> Iterator[tuple[Int[Tensor, "n"], int]]:
    """Of each segment: where in the pack its prompt and answer are, and how many of these, at the end, are its own."""
    queries, keys = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    every = torch.arange(len(batch.input_ids), device=batch.input_ids.device) if batch.kv_index is None else batch.kv_index
    for start, end, first, last in zip(queries, queries[1:], keys, keys[1:]):
        yield every[first:last], end - start


def read_on(lm: PreTrainedModel, passage: Passage) -> tuple[Any, Any]:
    """Whole sequences again for each token, padded behind their ends, which no token before sees: caches differ by family,
    and recurrent layers read padding before a sequence. The cache is what has been read."""
    if passage.cache is None:
        lengths, width = passage.attention_mask.sum(dim=1), passage.input_ids.shape[1]
        places = (torch.arange(width, device=lengths.device) + width - lengths[:, None]) % width
        ids = passage.input_ids.gather(1, places)
    else:
        ids, lengths = passage.cache
        ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1).scatter(1, lengths[:, None], passage.input_ids)
        lengths = lengths + 1
    states = _forward(lm, ids).last_hidden_state
    last = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[-1])
    return SimpleNamespace(last_hidden_state=states.gather(1, last)), (ids, lengths)


def _forward(lm: Any, ids: Int[Tensor, "B n"], **asked: Any) -> Any:
    backbone = backbone_of(lm)
    return backbone(input_ids=ids, **_without_cache(type(backbone)), **asked)


@cache
def _without_cache(backbone: type) -> dict[str, bool]:
    """The argument by which a backbone keeps nothing, where it has one."""
    takes = inspect.signature(backbone.forward).parameters
    return {name: False for name in ("use_cache",) if name in takes}

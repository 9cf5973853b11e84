"""Prefix sharing by FlexAttention, as github.com/frankxwang/dpo-prefix-sharing does it (Wang and Hegde, arXiv:2410.20305).

A pair lies as `[prompt | chosen | rejected]`; a block mask lets the rejected answer see the prompt, not the chosen one.
Packs have a fixed length, a multiple of 128, so that one compiled kernel serves all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.gpu.clock import Stopwatch
from benchmarks.measure import Measurement
from benchmarks.variants import loop
from benchmarks.workload import Spec, Tokens, steps_of

BLOCK = 128
NAME = "flex_prefix_sharing"
PROMPT, CHOSEN, REJECTED = 0, 1, 2


@cache
def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The kernel on a GPU; elsewhere plain torch operations, which can do no backward pass."""
    return torch.compile(function, dynamic=False) if device_type == "cuda" else function


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    block_mask: BlockMask, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function for transformers."""
    return attend(query, key, value, block_mask, scaling).transpose(1, 2).contiguous(), None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None) -> Tensor:
    """q [1,H,T,D], k and v [1,G,T,D] -> [1,H,T,D]"""
    groups = query.shape[1] // key.shape[1]
    if query.shape[1] & (query.shape[1] - 1):  # the kernel's own grouping wants a power of two
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    kernel = compiled(flex_attention, query.device.type)
    return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1])


def rounded(tokens: int) -> int:
    """The length of a pack with room for so many tokens."""
    return -(-tokens // BLOCK) * BLOCK


def places(pairs: Sequence[Tokens], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pair, part, position) of each token of a pack, [length]; the padding at its end is a pair of its own."""
    owner, part, position = [], [], []
    for k, pair in enumerate(pairs):
        sizes = (len(pair.prompt), len(pair.chosen), len(pair.rejected))
        owner += [k] * sum(sizes)
        part += [PROMPT] * sizes[0] + [CHOSEN] * sizes[1] + [REJECTED] * sizes[2]
        position += [*range(sizes[0] + sizes[1]), *range(sizes[0], sizes[0] + sizes[2])]
    rest = length - len(owner)
    columns = (owner + [len(pairs)] * rest, part + [PROMPT] * rest, [*position, *range(rest)])
    return tuple(torch.tensor(column) for column in columns)  # type: ignore[return-value]


def prefix_mask(owner: Tensor, part: Tensor) -> BlockMask:
    """Causal within a pair; the rejected answer does not see the chosen one."""

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        hidden = (part[q] == REJECTED) & (part[k] == CHOSEN)
        return (owner[q] == owner[k]) & (q >= k) & ~hidden

    length, device = len(owner), owner.device
    return compiled(create_block_mask, device.type)(sees, None, None, length, length, device=str(device))


def collate(pairs: Sequence[Tokens], length: int, device: str) -> loop.Batch:
    """A pack for `loop.logps`: all chosen answers before all rejected ones."""
    owner, part, position = (column.to(device) for column in places(pairs, length))
    tokens = [token for pair in pairs for token in (*pair.prompt, *pair.chosen, *pair.rejected)]
    ids = torch.tensor(tokens + [0] * (length - len(tokens)), device=device)
    scored = part.ne(PROMPT).nonzero()[:, 0]
    before = torch.cat([part.new_full((1,), -1), part[:-1]])
    # The first token of the rejected answer is predicted at the last of the prompt, not at the one before it.
    ends = torch.tensor([len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs], device=device)
    prompts = torch.tensor([len(pair.prompt) for pair in pairs], device=device)
    last_of_prompt = ends.cumsum(0) - ends + prompts - 1
    first_rejected = (part[scored] == REJECTED) & (before[scored] != REJECTED)
    predictors = torch.where(first_rejected, last_of_prompt[owner[scored]], scored - 1)
    sequences = owner[scored] + len(pairs) * (part[scored] == REJECTED)
    inputs = {"input_ids": ids[None], "position_ids": position[None], "block_mask": prefix_mask(owner, part)}
    return loop.Batch(inputs, predictors, ids[scored], sequences, 2 * len(pairs))


def run(spec: Spec) -> tuple[Measurement, list[float]]:
    """DPO with a live reference, and the mean log-prob of the chosen answers in each step. Weights and optimizer states are
    in the spec's dtype: less work than dspref's fp32 masters."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    AttentionInterface.register(NAME, attention)
    steps = steps_of(spec, AutoTokenizer.from_pretrained(spec.model))
    load: Any = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(spec.model, dtype=spec.dtype, attn_implementation=NAME).to(spec.device) for _ in range(2))
    reference.requires_grad_(False)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=spec.learning_rate, weight_decay=0.0, fused=True)
    length = max(rounded(sum(pair.useful - len(pair.prompt) for pair in pairs)) for pairs in steps)

    found, chosen, watch = Measurement(), [], Stopwatch(spec.device)
    for pairs in steps:
        batch = collate(pairs, length, spec.device)  # on nobody's clock, as TRL's
        watch.start()
        with torch.no_grad():
            expected = loop.logps(reference, batch)
        logps = loop.logps(policy, batch)
        loss = loop.dpo(logps, expected, spec.objective["beta"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.item())
        watch.stop()
        chosen.append(logps.detach()[: len(pairs)].mean().item())
        found.useful_tokens.append(sum(pair.useful for pair in pairs))
    found.seconds = watch.read()
    return found, chosen

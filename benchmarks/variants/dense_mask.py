"""DPO by transformers' own packing: one row, positions that restart, and the dense block mask that it makes of them."""

from __future__ import annotations

from itertools import accumulate

import torch

from benchmarks.measure import Measurement, main
from benchmarks.variants import loop
from benchmarks.workload import Spec


def collate(sequences: list[tuple[list[int], list[int]]], device: str) -> loop.Batch:
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
    ids = torch.tensor([token for prompt, answer in sequences for token in prompt + answer], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    starts = [0, *accumulate(lengths)]
    spans = [torch.arange(start + len(prompt), start + len(prompt) + len(answer)) for start, (prompt, answer)
             in zip(starts, sequences)]  # fmt: skip
    at = torch.cat(spans).to(device)
    owners = torch.cat([torch.full_like(span, k) for k, span in enumerate(spans)]).to(device)
    # Without a mask, transformers takes the sequences' bounds from the positions; with one, it would ignore them.
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": None}
    return loop.Batch(inputs, at - 1, ids[at], owners, len(sequences))


def run(spec: Spec) -> Measurement:
    return loop.run(spec, collate)


if __name__ == "__main__":
    main(run)

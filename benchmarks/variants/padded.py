"""DPO by padding: chosen and rejected in one right-padded batch, as long as its longest sequence, SDPA with a mask."""

from __future__ import annotations

import torch

from benchmarks.measure import Measurement, main
from benchmarks.variants import loop
from benchmarks.workload import Spec


def collate(sequences: list[tuple[list[int], list[int]]], device: str) -> loop.Batch:
    rows = [torch.tensor(prompt + answer, device=device) for prompt, answer in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        scored[row, len(prompt) : len(prompt) + len(answer)] = True
    at = scored.flatten().nonzero()[:, 0]
    inputs = {"input_ids": ids, "attention_mask": mask}
    return loop.Batch(inputs, at - 1, ids.flatten()[at], at // ids.shape[1], len(sequences))


def run(spec: Spec) -> Measurement:
    return loop.run(spec, collate)


if __name__ == "__main__":
    main(run)

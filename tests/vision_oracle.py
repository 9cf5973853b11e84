"""Rows with images for tiny vision-language models, packed, and their log-probs by one plain forward per sequence."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny_vision import IMAGE, image, image_processor
from torch import Tensor

from dspref.data.batch import PackedBatch, collate
from dspref.data.images import ImageLayout, Pictures, RowImages
from dspref.data.truncate import TokenizedPair
from dspref.model import vision

SIZES = {"large": (56, 84), "small": (30, 90), "wide": (20, 60), "blank": (28, 28)}


@dataclass
class Row:
    """A pair, and its images as the processor makes them."""

    pair: TokenizedPair
    processed: dict[str, Tensor]
    images: RowImages | None


def processed(kind: str, names: list[str]) -> dict[str, Tensor]:
    images = [image(*SIZES[name], seed=k) for k, name in enumerate(names)]
    made = image_processor(kind)(images=[images] if vision.FAMILIES[kind].in_one_row else images, return_tensors="pt")
    return {name: made[name] for name in vision.FAMILIES[kind].reads}


@torch.no_grad()
def features_of(lm: Any, tensors: dict[str, Tensor]) -> list[int]:
    """How many features the tower makes of each image, or tile."""
    return [len(features) for features in lm.base_model.get_image_features(**tensors, return_dict=True).pooler_output]


def row_of(lm: Any, names: list[str], seed: int, sizes: tuple[int, int, int]) -> Row:
    """Random text around the images of a prompt; `sizes` counts the tokens of text."""
    draws = np.random.default_rng(seed)
    before, chosen, rejected = (draws.integers(1, 240, size).astype(np.int32) for size in sizes)
    kind, prompt, tensors, images = lm.config.model_type, before, {}, None
    if names:
        tensors = processed(kind, names)
        images = vision.row_images(tensors, lm.config, ",".join(names).encode())
        for count in features_of(lm, tensors):
            prompt = np.concatenate([prompt, np.full(count, IMAGE), draws.integers(1, 240, 3)]).astype(np.int32)
    return Row(TokenizedPair(prompt, chosen, rejected), tensors, images)


def some_rows(lm: Any) -> list[Row]:
    """Two images, none, one, and then that row with another answer, and that text with another image."""
    rows = [
        row_of(lm, ["large", "small"], 1, (5, 7, 3)),
        row_of(lm, [], 2, (6, 4, 9)),
        row_of(lm, ["wide"], 3, (2, 6, 5)),
    ]
    again = row_of(lm, ["wide"], 3, (2, 6, 5))
    again.pair = again.pair._replace(rejected=np.arange(3, 11, dtype=np.int32))
    other = copy.deepcopy(again)
    other.processed["pixel_values"] = other.processed["pixel_values"].flip(-1)
    other.images = vision.row_images(other.processed, lm.config, b"other")
    return [*rows, again, other]


def layout_of(lm: Any) -> ImageLayout:
    blank = vision.row_images(processed(lm.config.model_type, ["blank"]), lm.config, b"blank")
    return vision.image_layout(lm, blank)


def packed_rows(lm: Any, rows: list[Row], prefix_sharing: bool) -> PackedBatch:
    pictures = Pictures([row.images for row in rows], layout_of(lm))
    pairs = [row.pair for row in rows]
    return collate(pairs, range(len(pairs)), prefix_sharing=prefix_sharing, pictures=pictures)


def plain_logps(lm: Any, rows: list[Row]) -> Tensor:
    """log p of each answer token, one forward per sequence, of the chosen and then the rejected answers."""
    found = []
    for row, answer in [(row, row.pair.chosen) for row in rows] + [(row, row.pair.rejected) for row in rows]:
        ids = torch.from_numpy(np.concatenate([row.pair.prompt, answer])).long()[None]
        types = (
            {"mm_token_type_ids": (ids == lm.config.image_token_id).int()} if lm.config.model_type.startswith("qwen") else {}
        )
        logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **row.processed, **types).logits[0]
        picked = logits[-len(answer) - 1 : -1].log_softmax(-1)
        found.append(picked.gather(1, ids[0, -len(answer) :, None])[:, 0])
    return torch.cat(found)


def by_side(logps: Tensor, batch: PackedBatch) -> Tensor:
    """Of scored tokens, one for each pair that has them, in the order of `plain_logps`."""
    return logps[torch.argsort(batch.span_index, stable=True)]


def gradients(lm: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has a weight of its own."""
    return gradients_of_sum(lm, logps * torch.linspace(-1.0, 2.0, len(logps)))


def gradients_of_sum(lm: torch.nn.Module, values: Tensor) -> dict[str, Tensor]:
    lm.zero_grad()
    values.sum().backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

"""The shape of a model with several stacks of layers, from the model itself, which may have no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dspref.config import LoraSection
from dspref.machine import flops, shapes
from dspref.machine.shapes import ModelShape, Stack
from dspref.model.pieces import PLACES, PROMPTS, SCORED, TOKENS, Piece, numbers_of, pieces_of

READS = {"text": TOKENS, "encoder": PROMPTS, "tower": PLACES}


def of_model(lm: Any, kind: str, elements: Callable[[Any], int], lora: LoraSection | None) -> ModelShape:
    """`kind`: encoder-decoder | vision; `elements`: of a parameter, when it is whole; `lora`: of an adapter that is not
    there yet. What is trained are the parameters that ask for a gradient, or that adapter."""
    pieces = pieces_of(lm, kind, elements, 1.0)
    if lora is not None:
        pieces = [piece._replace(trained=False) for piece in pieces]
        pieces += [
            piece._replace(weights=weights, trained=True, name="")
            for piece in pieces
            if piece.reads not in ("", SCORED) and (weights := _adapter(piece, lora))
        ]
    size, parameters = flops.size_of(pieces), {id(p): p for p in lm.parameters()}.values()
    own = sum(math.prod(p.shape) and elements(p) for p in parameters)
    trained = sum(elements(p) for p in parameters if p.requires_grad)
    if lora is not None:
        trained = round(sum(piece.weights for piece in pieces if piece.trained))
    text, *others = [
        Stack(reads=READS[name], still_norms=lora is not None, **numbers)
        for name, numbers in sorted(numbers_of(lm, kind).items(), key=lambda item: item[0] != "text")
    ]
    used = [with_gradient(stack, size) for stack in others]
    head = lm.get_output_embeddings().weight
    return ModelShape(
        **{name: getattr(text, name) for name in Stack.__dataclass_fields__},
        weights=own,
        head=elements(head),
        tied=head is lm.get_input_embeddings().weight,
        vocabulary=elements(head) // text.hidden,
        largest=max(elements(p) for p in parameters),
        trained=trained,
        body=size.body,
        frozen_base=lora is not None,
        others=tuple(stack for stack in used if stack.layers),
        size=size,
    )


def with_gradient(stack: Stack, size: flops.ModelSize) -> Stack:
    """Of a stack's layers those that a gradient comes to: others keep nothing. They are alike."""
    met = size.met.get(stack.reads, flops.Met())
    return replace(stack, layers=round(stack.layers * met.again / met.weights) if met.weights else 0)


def _adapter(piece: Piece, lora: LoraSection) -> int:
    """An adapter of all linear layers, or of plain names, is one of the language model's."""
    targets = lora.target_modules
    plain = targets == "all-linear" or (isinstance(targets, list) and not any("." in name for name in targets))
    if plain and piece.stack not in ("text", "encoder"):
        return 0
    return shapes.adapter_of(piece.name, piece.shape, lora)

"""The shape of a model, in numbers, before it is loaded: from config.json, and from the headers of its safetensors files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.config import LoraSection, ModelSection
from dspref.errors import ConfigError, UserError
from dspref.machine import flops, footprint
from dspref.machine.flops import ModelSize
from dspref.machine.footprint import EXPERTS, number_of
from dspref.model import freezing
from dspref.model.pieces import ATTENTION, SCORED, TOKENS, Piece, depth_of

Tensors = Mapping[str, tuple[int, ...]]

# What families call the embedding and the head.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
PER_TOKEN = ("num_experts_per_tok", "moe_k", "top_k")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Numbers of layers that are alike. `inner` is the width of their MLP, of the experts that a token meets together where
    there are experts; `copies` how often a token's vector is copied for its experts (0: a dense model)."""

    layers: int
    hidden: int
    queries: int
    """Channels of all query heads."""
    keys: int
    """Channels of all key heads; as many are of values."""
    inner: int
    gated: bool
    query_norms: bool = False
    root_norms: bool = True
    """RMS norms; else LayerNorm."""
    copies: int = 0
    activation: int = 2
    """Vectors of the MLP's width that its activation keeps for the backward pass."""
    reads: str = TOKENS
    """Which count of a pack."""
    crossed: int = 0
    """Channels of queries that attend to an encoder's output, with as many of its keys."""
    biased: int = 0
    """Heads, where each score has a bias (T5): all scores are kept, in fp32."""
    extra: int = 0
    """Vectors of its width that a family keeps beside these: of rotated queries and keys, of scaled outputs."""
    still_norms: bool = False
    """Whether norms are not trained."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(Stack):
    """Numbers of a model, of which its decoder is a stack, and others may be beside it."""

    weights: int
    head: int
    tied: bool
    vocabulary: int
    largest: int
    """Weights of the largest tensor."""
    trained: int
    """Weights that are trained: all, or an adapter's, which are then beside `weights`."""
    body: float
    """Weights of matrices that a token meets in the layers."""
    frozen_base: bool = False
    """Whether the model itself is frozen below an adapter."""
    others: tuple[Stack, ...] = ()
    """An encoder, or a tower."""
    size: ModelSize | None = None
    """What it computes; None: by the numbers here."""

    @property
    def frozen(self) -> int:
        return self.weights if self.frozen_base else self.weights - self.trained

    @property
    def work(self) -> ModelSize:
        """For counting operations."""
        if self.size is not None:
            return self.size
        channels = float(self.layers * self.queries)
        if not self.frozen_base:
            return ModelSize.of_text(self.body, self.head, self.body, self.head, channels)
        return ModelSize.of_text(self.body + self.trained, self.head, self.trained, 0, channels)


def of_section(section: ModelSection) -> ModelShape:
    """Raises ConfigError where the model's config.json is not on this machine, or tells no sizes."""
    text, tensors = footprint.read_config(section), None
    name = f"model.name_or_path: {section.name_or_path}"
    if not text:
        raise ConfigError(
            f"{name}: no config.json of it on this machine, and the sizes are read from there; "
            f"fetch it first: hf download {section.name_or_path} config.json"
        )
    if section.init == "pretrained" and (folder := footprint.model_folder(section)):
        try:
            tensors = footprint.in_files(section, folder)
        except (OSError, UserError):
            tensors = None  # config.json is enough
    try:
        imagined = footprint.imagined(text)
        freezing.frozen({*imagined, *(tensors or ())}, section.freeze)
        return of_tensors(tensors or imagined, text, as_saved(section.lora), section.freeze)
    except (ValueError, ArithmeticError):
        raise ConfigError(
            f"{name}: config.json tells no sizes (hidden_size, num_hidden_layers, ...); fetch it again"
        ) from None


def of_tensors(
    tensors: Tensors, text: Mapping[str, Any], lora: LoraSection | None, freeze: Sequence[str] = ()
) -> ModelShape:
    """The shape of a model of these tensors, by name, whose config says `text`; `freeze`: as in `model.freeze`. Raises
    ValueError where the config lacks sizes."""
    config = dict(text)
    hidden, layers = number_of(config, "hidden_size", "n_embd"), number_of(config, "num_hidden_layers", "n_layer")
    vocabulary = number_of(config, "vocab_size")
    if not (hidden and layers and vocabulary):
        raise ValueError("no sizes")
    heads = number_of(config, "num_attention_heads", "n_head", default=1)
    width = number_of(config, "head_dim", default=hidden // heads)
    experts = number_of(config, *EXPERTS, default=1)
    met = number_of(config, *PER_TOKEN, default=experts) if experts > 1 else 0
    inner = number_of(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    if met:
        shared = number_of(config, "shared_expert_intermediate_size")
        inner = met * number_of(config, "moe_intermediate_size", default=inner) + shared
    embedding = [name for name in tensors if name.endswith(EMBEDDINGS)]
    own_head = [name for name in tensors if name.endswith(HEADS)]
    matrices = {n: shape for n, shape in tensors.items() if len(shape) >= 2 and n not in (*embedding, *own_head)}
    met_by_token = {n: math.prod(shape) * (met / experts if ".experts." in n else 1) for n, shape in matrices.items()}
    total = sum(map(math.prod, tensors.values()))
    still = freezing.chosen(tensors, freeze)
    trained = adapted(matrices, lora) + whole(tensors, lora) if lora else total - sum(math.prod(tensors[n]) for n in still)
    tied, gated = not own_head, "n_embd" not in config and any("gate" in name for name in tensors)
    heads_at = embedding if tied else own_head
    pieces = [Piece(SCORED, vocabulary * hidden, not lora and still.isdisjoint(heads_at))]
    for n in tensors:
        pieces.append(
            Piece(TOKENS if n in matrices else "", met_by_token.get(n, 0.0), not lora and n not in still, depth=depth_of(n))
        )
    for n in matrices if lora is not None else ():
        assert lora is not None
        pieces.append(Piece(TOKENS, adapter_of(n, matrices[n], lora), True, depth=depth_of(n)))
    pieces += [Piece(ATTENTION, 2.0 * heads * width, False, depth=n, is_attention=True) for n in range(layers)]
    return ModelShape(
        weights=total,
        head=vocabulary * hidden,
        tied=tied,
        layers=layers,
        hidden=hidden,
        queries=heads * width,
        keys=number_of(config, "num_key_value_heads", default=heads) * width,
        inner=inner,
        gated=gated,
        activation=2 if gated else 5,  # GPT-2's, in parts
        vocabulary=vocabulary,
        largest=max(map(math.prod, tensors.values())),
        trained=trained,
        body=sum(met_by_token.values()),
        query_norms=any("q_norm" in name for name in tensors),
        root_norms="n_embd" not in config and not any(name.endswith("norm.bias") for name in tensors),
        copies=met,
        still_norms=lora is not None,
        frozen_base=lora is not None,
        size=flops.size_of([piece for piece in pieces if piece.weights or piece.trained]),
    )


def as_saved(lora: LoraSection | None) -> LoraSection | None:
    """The settings of an adapter: a saved one brings its own, as far as they decide its size."""
    if lora is None or lora.path is None:
        return lora
    try:
        saved = reading.read_json(Path(lora.path) / "adapter_config.json", strict=False)
    except (OSError, ValueError):
        return lora  # on the hub, or broken: told where it is loaded
    keys = ("r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "rank_pattern", "use_dora")
    found = {key: saved[key] for key in keys if saved.get(key)} if isinstance(saved, dict) else {}
    return lora.model_copy(update=found)


def adapted(matrices: Tensors, lora: LoraSection) -> int:
    """Weights of an adapter: a matrix of m x n gets two thin ones of r x n and m x r (and with DoRA m magnitudes)."""
    return sum(adapter_of(name, shape, lora) for name, shape in matrices.items())


def adapter_of(name: str, shape: tuple[int, ...], lora: LoraSection) -> int:
    """Of one matrix; 0 where it gets none."""
    module = name.removesuffix(".weight")
    if len(shape) != 2 or ".experts." in name or "norm" in module or not targeted(module, lora):
        return 0
    r = next((r for words, r in lora.rank_pattern.items() if re.search(rf"(^|\.){words}$", module)), lora.r)
    return r * sum(shape) + shape[0] * lora.use_dora


def whole(tensors: Tensors, lora: LoraSection) -> int:
    """Weights of modules that are trained whole beside an adapter, which peft copies."""
    saved = lora.modules_to_save or []
    return sum(math.prod(shape) for name, shape in tensors.items() if any(f".{module}." in f".{name}" for module in saved))


def targeted(module: str, lora: LoraSection) -> bool:
    """Whether a module gets an adapter, by peft's rules: a list has last words of names."""

    def named(rule: str | list[str] | None) -> bool:
        if isinstance(rule, str):
            return rule == "all-linear" or re.fullmatch(rule, module) is not None
        return any(module == word or module.endswith(f".{word}") for word in rule or [])

    number = re.search(r"\.(\d+)\.", module)
    chosen = lora.layers_to_transform is None or (number is not None and int(number[1]) in lora.layers_to_transform)
    return chosen and named(lora.target_modules) and not named(lora.exclude_modules)

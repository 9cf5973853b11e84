"""What of a model meets what of a pack: its matrices and its attention, piece by piece, in the order they compute in.

Of a decoder every token meets all layers. An encoder-decoder model has two stacks of them, for prompts and for answers; a
vision-language one a tower, whose layers meet patches, and what joins features to the language model. How families call
these is in tables here; sizes come from the modules. Loads no torch before it is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Counts of a pack: `tokens` of the decoder, those that are `scored`, `prompts` of an encoder; `patches` of images, `places`
# in a tower's layers (patches, and what the family puts before them), `features` that are joined to the text. And (query,
# key) pairs of attention of each kind.
ATTENTION = "attention"
SELF = {"text": ATTENTION, "encoder": "prompt_attention", "tower": "image_attention"}
CROSS, WINDOWS = "cross_attention", "window_attention"
TOKENS, SCORED, PROMPTS = "tokens", "scored", "prompts"
PATCHES, PLACES, FEATURES = "patches", "places", "features"


class Piece(NamedTuple):
    """A matrix, or the attention of a layer."""

    reads: str
    """Of which count each meets it; empty: a parameter that is in no product, such as a norm."""
    weights: float
    """That one of these meets: of experts, those that it is sent to; of attention, 2 for each channel."""
    trained: bool
    stack: str = "text"
    """text | encoder | tower"""
    depth: float = math.inf
    """Layers of its stack below it; -infinity: what comes before all layers, infinity: behind them."""
    below: str = ""
    """The stack whose output it reads, where that is another than its own."""
    is_attention: bool = False
    name: str = ""
    shape: tuple[int, ...] = ()


class Place(NamedTuple):
    """Where a parameter is by its name."""

    stack: str
    reads: str
    below: str = ""
    later: float = 0.0
    """Of its layer, this share is below it."""


TEXT = Place("text", TOKENS)
# The first pattern that is in a name decides.
PLACES_OF: dict[str, tuple[tuple[str, Place], ...]] = {
    "decoder": (),
    "encoder-decoder": (
        (r"(EncDecAttention|encoder_attn)\.[kv](_proj)?\.", Place("text", PROMPTS, "encoder", later=0.5)),
        (r"(^|\.)encoder\.", Place("encoder", PROMPTS)),
        (r"self_attn|SelfAttention|(EncDecAttention|encoder_attn)\.q", TEXT),
        # Behind these a decoder's layer has read the encoder's output.
        (r"(^|\.)decoder\.", Place("text", TOKENS, later=0.5)),
    ),
    "vision": (
        (r"(^|\.)(patch_embed|patch_embedding|patch_embeddings)\.", Place("tower", PATCHES)),
        (r"(^|\.)(merger|deepstack_merger_list|multi_modal_projector|connector)\.", Place("tower", FEATURES)),
        (r"(^|\.)(visual|vision_tower|vision_model)\.", Place("tower", PLACES)),
    ),
}
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
# Matrices whose output has the queries of a layer, alone or with keys and values.
QUERIES = {"q_proj": 1, "q": 1, "qkv": 3}
OF_CROSS = re.compile(r"(EncDecAttention|encoder_attn)\.")


def depth_of(name: str) -> float:
    """How many layers of its stack are below a parameter."""
    if found := LAYER.search(name):
        return int(found[1])
    return -math.inf if re.search(r"embed|wte|wpe|shared\.|pre_layrnorm", name) else math.inf


def place_of(name: str, kind: str) -> Place:
    return next((place for pattern, place in PLACES_OF[kind] if re.search(pattern, name)), TEXT)


def pieces_of(lm: Any, kind: str, elements: Callable[[Any], int], expert_share: float) -> list[Piece]:
    """The pieces of a model of transformers, which may have no weights, or shards of them. `kind`: a key of `PLACES_OF`;
    `elements`: of a parameter, when it is whole; `expert_share`: of a layer's experts, which a token is sent to."""
    from torch import nn

    head, inputs = lm.get_output_embeddings(), lm.get_input_embeddings()
    tables = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found = [Piece(SCORED, elements(head.weight), head.weight.requires_grad)]
    for name, parameter in lm.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        place, is_table = place_of(name, kind), id(parameter) in tables
        if parameter is head.weight and not is_table:
            continue
        # Positions that are one row, and a token of a tower's own, are added.
        is_matrix = len(shape) >= 2 and shape[0] > 1 and not is_table
        weights = elements(parameter) * (expert_share if ".experts." in name else 1.0)
        reads = place.reads if is_matrix else ""
        depth = depth_of(f"embed.{name}" if is_table else name) + place.later
        stacks = ("encoder", "text") if kind == "encoder-decoder" and parameter is inputs.weight else (place.stack,)
        of = (parameter.requires_grad,)
        found += [Piece(reads, weights, *of, stack, depth, place.below, name=name, shape=shape) for stack in stacks]
    found += [] if kind == "decoder" else _attention(lm, kind)
    return without_gradient(found, _layers_used(lm.config))


def _attention(lm: Any, kind: str) -> Iterable[Piece]:
    """Of the layers whose queries come from a matrix of a known name."""
    full = getattr(getattr(lm.config, "vision_config", None), "fullatt_block_indexes", None)
    for name, module in lm.named_modules():
        if (share := QUERIES.get(name.rpartition(".")[2])) is None or not hasattr(module, "out_features"):
            continue
        stack, depth, is_cross = place_of(f"{name}.", kind).stack, depth_of(name), OF_CROSS.search(name)
        reads = CROSS if is_cross else SELF[stack]
        if stack == "tower" and full is not None and depth not in full:
            reads = WINDOWS
        depth += 0.5 if is_cross else 0.0
        yield Piece(reads, 2.0 * module.out_features / share, False, stack, depth, is_attention=True)


def _layers_used(config: Any) -> float:
    """How many layers of its tower a model takes features of; those above are computed, and have no gradient."""
    layer, tower = getattr(config, "vision_feature_layer", None), getattr(config, "vision_config", None)
    layers = getattr(tower, "num_hidden_layers", None)
    if layer is None or layers is None:
        return math.inf
    return max(n if n >= 0 else layers + 1 + n for n in (layer if isinstance(layer, list | tuple) else [layer]))


def without_gradient(pieces: Iterable[Piece], used: float) -> list[Piece]:
    """The same, where a tower's layers from `used` on compute for nothing."""
    unused = "unused"
    return [
        p._replace(stack=unused, trained=False) if p.stack == "tower" and used <= p.depth < math.inf else p for p in pieces
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Layers, in numbers

INNER = ("up_proj", "fc1", "wi", "wi_0", "linear_fc1")
GATES = ("gate_proj", "wi_1")
# Vectors that an activation keeps for the backward pass, by the name of its class.
ACTIVATIONS = {"ReLU": 1, "NewGELUActivation": 5, "QuickGELUActivation": 3}


def numbers_of(lm: Any, kind: str) -> dict[str, dict[str, Any]]:
    """Of each stack of layers, what a `Stack` has of it, read off its first layer's matrices: outputs of queries, keys and
    the MLP."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in lm.named_modules():
        place, depth, last = place_of(f"{name}.", kind), depth_of(f"{name}."), name.rpartition(".")[2]
        if not math.isfinite(depth):
            continue
        stack = "text" if place.below else place.stack
        own = found.setdefault(stack, {"layers": 0, "gated": False, "crossed": 0, "biased": 0, "root_norms": False})
        own["layers"] = max(own["layers"], int(depth) + 1)
        width, kind_of_module = getattr(module, "out_features", 0), type(module).__name__
        if last in QUERIES and width:
            channels = width // QUERIES[last]
            own |= {"crossed": channels} if OF_CROSS.search(name) else {"queries": channels, "hidden": module.in_features}
            if last == "qkv":
                own |= {"keys": channels, "extra": 3}  # Qwen's towers, which rotate them in parts
        elif last in ("k_proj", "k") and width and not OF_CROSS.search(name):
            own["keys"] = width
        elif last in INNER and width:
            own["inner"] = width
        if hasattr(module, "lambda_1"):
            own["extra"] = 2
        own["gated"] |= last in GATES
        own["root_norms"] |= kind_of_module.endswith(("RMSNorm", "T5LayerNorm"))
        own["biased"] = max(own["biased"], getattr(module, "n_heads", 0) if "T5Attention" in kind_of_module else 0)
        if "activation" not in own and last in ("act", "act_fn", "activation_fn"):
            own["activation"] = next((n for known, n in ACTIVATIONS.items() if kind_of_module == known), 2)
    return found

"""The memory that a pack needs on its way through the layers of a model, by what each layer keeps: arithmetic on numbers.

What a layer keeps was read in the source of families, and counted in real layers: tests/unit/report/test_advice.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dspref.machine.shapes import ModelShape, Stack
from dspref.model import head_room
from dspref.model.pieces import ATTENTION, PLACES, PROMPTS, SELF, TOKENS

# DeepSpeed's defaults, in elements.
DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}


@dataclass(frozen=True)
class Live:
    """A second model that stays in memory."""

    shape: ModelShape
    value: int
    sharded: bool
    offloaded: bool = False
    masters: int = 0
    """Bytes for each of its weights that lie beside it, so that it can move: fp32 masters (TR-DPO)."""
    history: int = 0
    """The same in host memory: its mean in fp32, and the policy as it began (BEMA)."""
    saved: int = 0
    """Bytes for each of its weights in a checkpoint."""

    def weights_on(self, ranks: int) -> float:
        """Its weights that a rank holds; what is offloaded is sharded."""
        return self.shape.weights / (ranks if self.sharded or self.offloaded else 1)


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over its ranks."""

    device: str
    """cuda | cpu"""
    value: int
    """Bytes of a weight in forward and backward: v."""
    ranks: int
    stage: int
    packs: int = 1
    """In a step, of each rank."""
    checkpointing: bool = True
    inputs_on: str = "gpu"
    """With checkpointing, where the inputs of layers wait for the backward pass: gpu | cpu."""
    tile: int = 0
    """Tokens over which a layer's MLP runs at a time; 0: all."""
    moments: int = 8
    """Bytes of the optimizer's states for each weight."""
    states_on: str = "gpu"
    """Where masters and states are: gpu, cpu or nvme."""
    weights_on: str = "gpu"
    bucket: int = int(DEFAULTS["reduce_bucket_size"])
    overlap: bool = False
    contiguous: bool = True
    live: int = int(DEFAULTS["stage3_max_live_parameters"])
    sub_group: int = int(DEFAULTS["sub_group_size"])
    kernel: str = "fused"
    """fused | sdpa, which keeps the output of each sequence and all of them once more."""
    liger: bool = False
    four_bits: bool = False
    reference: Live | None = None


@dataclass(frozen=True)
class Pack:
    """What a rank computes at a time: tokens, those that meet the head, and keys that are attended to for each token (more
    than 1 where answers share a prompt)."""

    tokens: int
    scored: int
    keys_per_token: float = 1.0
    more: Mapping[str, float] = field(default_factory=dict)
    """What an encoder or a tower reads, by the names of `dspref.model.pieces`: `prompts` are of the tokens too."""

    def count(self, name: str) -> float:
        own = {TOKENS: self.tokens - self.more.get(PROMPTS, 0), ATTENTION: self.attention}
        return own[name] if name in own else self.more.get(name, 0)

    @property
    def cross_keys(self) -> float:
        """Keys of prompts, for each answer of them."""
        return max(self.tokens * self.keys_per_token - self.count(TOKENS), 0.0)

    @property
    def attention(self) -> float:
        """(query, key) pairs of answers with themselves, where scores are kept: as of answers of one length."""
        return self.more.get(ATTENTION, 0)


def scaled(pack: Pack, tokens: int) -> Pack:
    """The same pack with another number of tokens."""
    share = tokens / max(pack.tokens, 1)
    more = {name: count * share for name, count in pack.more.items()}
    return replace(pack, tokens=tokens, scored=round(pack.scored * share), more=more)


def kept_per_token(stack: Stack, layout: Layout, keys_per_token: float = 1.0) -> float:
    """Bytes that one layer keeps for each token until its backward pass.

    Norm: in fp32 its input (the residual stream), the normalized input (if its weight is trained) and its output: 3 h v. In
    16 bits the input is copied to fp32: 4 h + 2 h + 2 h; T5's keeps it as it is too. LayerNorm and Liger's norms: input and
    output, 2 h v. Attention: queries, the keys and values of each query's own pack, and the output (sdpa: each sequence's,
    and all of them; with a bias, all of them, and the others in fp32). Norms of queries and keys as above, but for their
    output. Cross-attention: a norm, queries and output. MLP: what its activation keeps, and where it is gated, up and their
    product; experts copy the token, and scale their output.
    """
    v, hidden, trained_norms = layout.value, stack.hidden, 0 if stack.still_norms else 1
    per_channel = (2 + trained_norms) * v if v == 4 else 4 + 2 * trained_norms + 2 + 2 * bool(stack.biased)
    norm = hidden * (per_channel if stack.root_norms and not layout.liger else 2 * v)
    # A tower's attention is transformers' own, which joins no sequences.
    outputs = 2 if layout.kernel == "sdpa" and stack.reads != PLACES else 1
    if stack.biased:
        attention = 4.0 * (stack.queries + 2 * stack.keys) + v * stack.queries
    else:
        attention = v * (stack.queries * (1 + outputs) + 2 * stack.keys * keys_per_token)
    if stack.query_norms:
        attention += (stack.queries + stack.keys) * (per_channel - v)
    crossed = norm + v * stack.crossed * (1 + outputs) if stack.crossed else 0.0
    return 2 * norm + attention + crossed + mlp_per_token(stack, layout) + v * stack.extra * hidden


def mlp_per_token(stack: Stack, layout: Layout) -> float:
    """Of these bytes, those of the MLP."""
    width = 3 if layout.liger and stack.gated else stack.activation + 2 * stack.gated
    return layout.value * (width * stack.inner + 2 * stack.copies * stack.hidden)


def in_tiles(stack: Stack, layout: Layout, pack: Pack) -> bool:
    """Whether the MLPs of these layers are run over a part of the pack at a time, and recomputed: they keep nothing."""
    return stack.reads == TOKENS and 0 < layout.tile < pack.count(TOKENS)


def kept(stack: Stack, layout: Layout, pack: Pack) -> float:
    """Bytes that one layer keeps for a pack: for its tokens, for the keys that answers have of their prompts, and where
    scores have a bias, these and which bias each has."""
    keys = pack.keys_per_token if stack.reads == TOKENS and not pack.more.get(PROMPTS) else 1.0
    found = pack.count(stack.reads) * kept_per_token(stack, layout, keys)
    if in_tiles(stack, layout, pack):
        found -= pack.count(stack.reads) * mlp_per_token(stack, layout)
    if stack.crossed:
        found += pack.cross_keys * 2 * stack.crossed * layout.value
    if stack.biased:
        found += pack.count(ATTENTION if stack.reads == TOKENS else SELF["encoder"]) * (4 * stack.biased + 8)
    return found


def activations(shape: ModelShape, layout: Layout, pack: Pack) -> float:
    """All layers', and those of the last norm of each stack; with checkpointing, of each layer its input; where these go to
    host memory, one that is on its way and one that is computed from."""
    v, found = layout.value, 0.0
    for stack in (shape, *shape.others):
        last = stack.hidden * (3 * v if v == 4 else 8) if stack.root_norms else 2 * v * stack.hidden
        count = pack.count(stack.reads)
        each = v * stack.hidden * count if layout.checkpointing else kept(stack, layout, pack)
        found += (min(stack.layers, 2) if inputs_go(layout) else stack.layers) * each + last * count
    return found


def inputs_go(layout: Layout) -> bool:
    """Whether inputs of layers are in host memory and not on the device."""
    return layout.checkpointing and layout.inputs_on == "cpu" and layout.device == "cuda"


def inputs(shape: ModelShape, layout: Layout, pack: Pack) -> float:
    """Bytes of the inputs of all layers."""
    return sum(layout.value * s.layers * s.hidden * pack.count(s.reads) for s in (shape, *shape.others))


def in_a_layer(shape: ModelShape, layout: Layout, pack: Pack) -> float:
    """Of the layer whose backward pass runs: gradients in its MLP, with checkpointing also what is recomputed."""
    own, tokens = kept(shape, layout, pack) if layout.checkpointing else 0.0, pack.count(shape.reads)
    wide = tokens
    if in_tiles(shape, layout, pack):
        wide = layout.tile
        # What a tile recomputes; the sum over tiles of what they give to the weights is beside what the last one gives.
        own += wide * mlp_per_token(shape, layout)
        own += 0 if shape.frozen_base else layout.value * shape.inner * shape.hidden
    return own + layout.value * 2 * (wide * shape.inner + tokens * shape.hidden)


def head(shape: ModelShape, layout: Layout, pack: Pack) -> float:
    """The LM head in its backward pass, as `model/logps.py` does it: C scored tokens, V words, hidden size d.

    Probabilities kept: 4 C V, a copy in 16 bits where v = 2. Else chunks of them. The gradient of the head: v V d (none
    below an adapter), of the hidden states 4 C d and their product 4 C d, and v T d where it is spread over all tokens.
    """
    scored, words, hidden, v = pack.scored, shape.vocabulary, shape.hidden, layout.value
    if head_room.fits(scored, words, layout.device):
        logits = scored * words * (4 + (v if v == 2 else 0))
    else:
        room = head_room.room(layout.device)
        in_blocks = scored > room // head_room.PART  # then gradients of a part of the head are summed in fp32
        logits = room * 12 + (4 * head_room.PART * hidden if in_blocks else 0)
    whole = 0 if shape.frozen_base else v * words * hidden
    return logits + whole + scored * hidden * (8 + v)

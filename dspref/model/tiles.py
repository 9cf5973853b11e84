"""MLPs of decoder layers in tiles of tokens (`model.tiled_mlp`), so that nothing of their width exists for all tokens of a
pack (Arctic long sequence training, arXiv:2506.13996, section 3.2.1).

Each tile is recomputed in its backward pass. DeepSpeed's own `TiledMLP` runs a backward pass for each tile, and tells ZeRO
by flags on parameters which of them counts; here tiles are checkpoints of one graph, so that autograd sums what they give
to a weight before anything hears of it, and dropout is drawn again as it was.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dspref.errors import ConfigError
from dspref.model import families, tiling, vision

if TYPE_CHECKING:
    from jaxtyping import Float

KEY = "model.tiled_mlp"
# What families call the MLP of a layer.
NAMES = re.compile("mlp|feed_forward|ffn")


class Tiled:
    """The forward of an MLP, a tile of at most `tokens` tokens at a time."""

    def __init__(self, whole: Callable[[Tensor], Tensor], tokens: int) -> None:
        self.whole, self.tokens = whole, tokens

    def __call__(self, hidden: Float[Tensor, "1 T d"]) -> Float[Tensor, "1 T d"]:
        count = hidden.shape[-2]
        if count <= self.tokens:
            return self.whole(hidden)
        tiles = hidden.split(-(-count // -(-count // self.tokens)), dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([self.whole(tile) for tile in tiles], dim=-2)
        return torch.cat([_recomputed(self.whole, tile) for tile in tiles], dim=-2)


def _recomputed(whole: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
    found: Any = checkpoint(whole, tile, use_reentrant=False)
    return found


def put_into(lm: PreTrainedModel, asked: bool | int) -> None:
    """Have every layer's MLP run in tiles: of `asked` tokens, or with True of as many as `tiling` says. Raises
    ConfigError as `check`."""
    if asked is False:
        return
    tokens = tiling.tokens_of(asked, lm.config.get_text_config().hidden_size)
    check(lm)
    for mlp in _mlps(lm):
        mlp.forward = Tiled(mlp.forward, tokens)


def check(lm: PreTrainedModel) -> None:
    """Raise ConfigError where a layer has no MLP that is a function of each token alone."""
    if why := why_not(lm):
        raise ConfigError(f"{KEY}: {why}; drop the key")


def why_not(lm: PreTrainedModel) -> str | None:
    """Why the MLPs of a model are not run in tiles, in a sentence; None where they can be."""
    if families.is_encoder_decoder(lm.config):
        return f"{lm.config.model_type} has an encoder, and its MLPs are not tiled"
    if None in (_mlps(lm) or [None]):
        kind = lm.config.get_text_config().model_type
        return f"not every layer of {kind} has an MLP that is a function of each token alone"
    return None


def _mlps(lm: PreTrainedModel) -> list[Any]:
    """Of every layer of the decoder; None for one that has none."""
    text = vision.language_model(lm) if vision.is_vision(lm.config) else lm
    count = lm.config.get_text_config().num_hidden_layers
    lists = (part for part in text.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return [_mlp_of(layer) for layer in next(lists, [])]


def _mlp_of(layer: nn.Module) -> nn.Module | None:
    """The child that is one: linear maps and activations, of one argument. Experts have routers, which count tokens."""
    named = [part for name, part in layer.named_children() if NAMES.fullmatch(name)]
    return named[0] if len(named) == 1 and _is_plain(named[0]) else None


def _is_plain(part: nn.Module) -> bool:
    holders = list(_holders(part))
    takes = inspect.signature(part.forward).parameters
    return 2 <= len(holders) <= 3 and len(takes) == 1 and all(isinstance(one, nn.Linear | Conv1D) for one in holders)


def _holders(part: nn.Module) -> Iterator[nn.Module]:
    """Modules below one that have parameters themselves."""
    return (one for one in part.modules() if next(one.parameters(recurse=False), None) is not None)

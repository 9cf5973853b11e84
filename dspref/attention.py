"""One attention function for packed batches, over several kernels.

transformers hands every attention layer's queries, keys and values to the function registered as `PACKED`; the layout of
the pack comes along as `segments`. T queries, K keys, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from dspref.data.batch import PackedBatch
from dspref.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# No mask is registered under this name: transformers then builds none, and no padding mask can be dropped silently,
# because `packed_attention` refuses any.
PACKED = "dspref_packed"


@dataclass(frozen=True)
class Segments:
    """Where a pack's sequences begin and end, and which kernel computes them. One object serves all layers."""

    batch: PackedBatch
    kernel: str
    seen: list[str] = field(default_factory=list)
    """Layers that were computed with this layout: none, and the model has attention of its own."""

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Numbers of queries and of keys of each segment, on the host: one device sync per forward, not per layer."""
        return self.batch.cu_seqlens_q.diff().tolist(), self.batch.cu_seqlens_k.diff().tolist()


@dataclass(frozen=True)
class Options:
    """What a layer asks of a kernel beyond causal attention; `window` counts the query's own position."""

    scale: float
    dropout: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Kernel:
    """`compute(q [T,H,D], k [K,G,D], v [K,G,D], segments, options) -> [T,H,D]`, the options it can honour, the device
    type it runs on (None: any), and whether this installation has it."""

    compute: Callable[..., Tensor]
    honours: frozenset[str]
    device: str | None
    installed: Callable[[], bool]
    capability: tuple[int, int] = (0, 0)
    """Lowest CUDA compute capability."""


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 G T D"],
    value: Float[Tensor, "1 G T D"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 T H D"], None]:
    """Causal attention within each segment of a pack. Raises ConfigError where the kernel cannot do what the layer asks."""
    if segments is None:
        raise ConfigError(f"model.name_or_path: {type(module).__name__} does not pass a pack's layout on to its attention")
    if attention_mask is not None:
        raise ConfigError(f"model.name_or_path: {type(module).__name__} makes an attention_mask; a pack has no padding")
    if s_aux is not None:
        raise ConfigError(f"model.name_or_path: {type(module).__name__} has attention sinks (s_aux), unknown to the kernels")
    segments.seen.append(type(module).__name__)
    batch = segments.batch
    if sliding_window is not None and sliding_window >= batch.max_seqlen_k:
        sliding_window = None  # no segment is long enough for the window to matter
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = Options(scale, dropout, sliding_window, softcap)
    if reason := cannot(segments.kernel, window=sliding_window, softcap=softcap, dropout=dropout):
        raise ConfigError(f"model.attn_implementation: {reason}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if batch.kv_index is not None:
        k, v = k.index_select(0, batch.kv_index), v.index_select(0, batch.kv_index)
    # Latent attention has values narrower than its keys; the varlen kernels want one size, and zeros change nothing.
    v = torch.nn.functional.pad(v, (0, narrower)) if (narrower := q.shape[-1] - value.shape[-1]) > 0 else v
    return KERNELS[segments.kernel].compute(q, k, v, segments, options)[None, ..., : value.shape[-1]], None


def cannot(kernel: str, **asked: float | None) -> str | None:
    """The first option that is set and that `kernel` does not honour, as a reason; None if it can do all."""
    for name, value in asked.items():
        if value and name not in KERNELS[kernel].honours:
            able = [other for other, row in KERNELS.items() if name in row.honours]
            return f"attention kernel {kernel} cannot do {name} ({value}); kernels that can: {', '.join(able)}"
    return None


def available(device_type: str) -> list[str]:
    """Kernels that run on a device of this type here, fastest first."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else HOPPER
    return [
        name
        for name, row in KERNELS.items()
        if row.device in (None, device_type) and capability >= row.capability and row.installed()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, *_lengths(segments), dropout_p=options.dropout, softmax_scale=options.scale, causal=True,
        window_size=_window(options), softcap=options.softcap or 0.0,
    )  # fmt: skip


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        q, k, v, *_lengths(segments), softmax_scale=options.scale, causal=True,
        window_size=_window(options), softcap=options.softcap or 0.0,
    )  # fmt: skip
    return output[0] if isinstance(output, tuple) else output  # some builds add the normalizers


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Three signatures so far: is_causal (2.10), window_size (2.11), window_size with enable_gqa (2.12 on).
    takes = inspect.signature(varlen_attn).parameters
    left = -1 if options.window is None else options.window - 1
    causal: dict[str, Any] = {"window_size": (left, 0)} if "window_size" in takes else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in takes:
            causal["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in takes:
        causal["scale"] = options.scale
    elif options.scale != q.shape[-1] ** -0.5:
        q = q * (options.scale * q.shape[-1] ** 0.5)
    compute: Any = varlen_attn
    return compute(q.contiguous(), k.contiguous(), v.contiguous(), *_lengths(segments), **causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    """torch's scaled_dot_product_attention, one sequence at a time: linear in the length of the pack, on any device."""
    if not q.is_cpu:
        # On CUDA only the kernel that holds all scores takes a mask together with fewer key-value heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, keys = segments.lengths
    outputs = []
    # split, not slices: the backward of a slice fills and adds a gradient as long as the pack.
    for own, seen, values in zip(q.split(queries), k.split(keys), v.split(keys)):
        plain = len(own) == len(seen) and options.window is None
        mask = None if plain else causal_mask(len(own), len(seen), options.window, q.device)
        own, seen, values = (x.transpose(0, 1)[None] for x in (own, seen, values))
        output = torch.nn.functional.scaled_dot_product_attention(
            own, seen, values, attn_mask=mask, is_causal=plain, dropout_p=options.dropout, scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may see a key: causal, aligned at the bottom right, at most `window` keys back."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _lengths(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    batch = segments.batch
    return batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_seqlen_q, batch.max_seqlen_k


def _window(options: Options) -> tuple[int, int]:
    return (-1, -1) if options.window is None else (options.window - 1, 0)


def _has(module: str, function: str) -> Callable[[], bool]:
    # Asks for the function too: PyPI holds an unrelated package under FlashAttention 3's module name.
    def installed() -> bool:
        if importlib.util.find_spec(module) is None:
            return False
        try:
            return hasattr(importlib.import_module(module), function)
        except Exception:  # built for another torch: its import raises whatever its loader raises
            return False

    return installed


AMPERE, HOPPER = (8, 0), (9, 0)
KERNELS: dict[str, Kernel] = {  # fastest first
    "flash_attention_3": Kernel(
        _flash_attention_3,
        frozenset({"window", "softcap"}),
        "cuda",
        _has("flash_attn_interface", "flash_attn_varlen_func"),
        HOPPER,
    ),
    "flash_attention_2": Kernel(
        _flash_attention_2,
        frozenset({"window", "softcap", "dropout"}),
        "cuda",
        _has("flash_attn", "flash_attn_varlen_func"),
        AMPERE,
    ),
    "torch_varlen": Kernel(
        _torch_varlen, frozenset({"window"}), "cuda", _has("torch.nn.attention.varlen", "varlen_attn"), AMPERE
    ),
    "sdpa": Kernel(_sdpa, frozenset({"window", "dropout"}), None, lambda: True),
}

AttentionInterface.register(PACKED, packed_attention)

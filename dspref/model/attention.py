"""One attention function for packed batches, over several kernels.

transformers hands every attention layer's queries, keys and values to the function registered as `PACKED`; the layout of
the pack comes along as `segments`. T queries, K keys, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from dspref.data.batch import Layout, PackedBatch
from dspref.errors import ConfigError
from dspref.model import exchange
from dspref.model.exchange import Group
from dspref.model.sdpa import Calls, Options, calls_of, sdpa

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# No mask is registered under this name: transformers then builds none, and no padding mask can be dropped silently,
# because `packed_attention` refuses any.
PACKED = "dspref_packed"


@dataclass(frozen=True)
class Segments:
    """Where a pack's sequences begin and end, and which kernel computes them. One object serves all layers."""

    batch: PackedBatch | Layout
    kernel: str
    seen: list[str] = field(default_factory=list)
    """Layers that were computed with this layout: none, and the model has attention of its own."""
    causal: bool = True
    """Aligned at the bottom right; else every query of a segment sees all its keys."""
    group: Group | None = None
    """Of a pack that several ranks hold between them: the layer has this rank's tokens."""

    @cached_property
    def _of_prompts(self) -> tuple[Segments, Segments] | None:
        """An encoder's attention, and a decoder's to what that has read."""
        prompts = self.batch.prompts if isinstance(self.batch, PackedBatch) else None
        parts = (prompts.own, prompts.of_answers) if prompts else ()
        return tuple(Segments(part, self.kernel, self.seen, False) for part in parts) or None  # type: ignore[return-value]

    def of(self, layer: Any) -> Segments:
        """The segments of an attention layer: of a decoder to itself, unless the layer says otherwise."""
        if self._of_prompts is None or layer.is_causal:
            return self
        return self._of_prompts[int(layer.is_decoder)]

    @cached_property
    def calls(self) -> Calls:
        """Of sdpa, which wants lengths on the host: one device sync per forward, not per layer."""
        device = self.batch.cu_seqlens_q.device
        queries, keys = self.batch.cu_seqlens_q.diff().tolist(), self.batch.cu_seqlens_k.diff().tolist()
        return calls_of(queries, keys, device, side_by_side=device.type != "cpu")


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
    below: tuple[int, int] = (1000, 0)
    """The first capability beyond those that it is written for."""
    takes: Callable[[int], bool] = lambda size: True
    """Whether it can compute heads of this size, D."""


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
    position_bias: Float[Tensor, "H 2L+1"] | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 T H D"], None]:
    """Attention within each segment of a pack. Raises ConfigError where the kernel cannot do what the layer asks."""
    if segments is None:
        raise ConfigError(f"model.name_or_path: {type(module).__name__} does not pass a pack's layout on to its attention")
    if attention_mask is not None:
        raise ConfigError(f"model.name_or_path: {type(module).__name__} makes an attention_mask; a pack has no padding")
    segments.seen.append(type(module).__name__)
    segments = segments.of(module)
    batch = segments.batch
    if sliding_window is not None and sliding_window >= batch.max_seqlen_k:
        sliding_window = None  # no segment is long enough for the window to matter
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    asked = {"window": sliding_window, "softcap": softcap, "dropout": dropout}
    asked |= {"position_bias": position_bias is not None, "sinks": s_aux is not None}
    if reason := cannot(segments.kernel, {query.shape[-1]}, **asked):
        raise ConfigError(f"model.attn_implementation: {reason}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if group := segments.group:
        assert isinstance(batch, PackedBatch), "of an encoder's packs each rank has its own"
        q, k, v = exchange.by_heads(q, k, v, len(batch.input_ids), group)
        position_bias, s_aux = (exchange.own_heads(x, group) for x in (position_bias, s_aux))
    if batch.kv_index is not None:
        k, v = k.index_select(0, batch.kv_index), v.index_select(0, batch.kv_index)
    # Latent attention has values narrower than its keys; the varlen kernels want one size, and zeros change nothing.
    v = torch.nn.functional.pad(v, (0, narrower)) if (narrower := q.shape[-1] - value.shape[-1]) > 0 else v
    options = Options(scale, dropout, sliding_window, softcap, position_bias, s_aux)
    output = KERNELS[segments.kernel].compute(q, k, v, segments, options)[..., : value.shape[-1]]
    return (exchange.by_tokens(output, group) if group else output)[None], None


def cannot(kernel: str, head_sizes: Iterable[int] = (), **asked: float | None) -> str | None:
    """The first head size that `kernel` does not take, or option that it does not honour and that is set, as a reason; None
    if it can do all."""
    for size in sorted(head_sizes):
        if not KERNELS[kernel].takes(size):
            able = [other for other, row in KERNELS.items() if row.takes(size)]
            return f"attention kernel {kernel} takes no heads of size {size}; kernels that do: {', '.join(able)}"
    for name, value in asked.items():
        if value and name not in KERNELS[kernel].honours:
            able = [other for other, row in KERNELS.items() if name in row.honours]
            return f"attention kernel {kernel} cannot do {name} ({value}); kernels that can: {', '.join(able)}"
    return None


def available(device_type: str) -> list[str]:
    """Kernels that run on a device of this type here, fastest first."""
    here = _capability()
    return [
        name
        for name, row in KERNELS.items()
        if row.device in (None, device_type) and row.capability <= here < row.below and row.installed()
    ]


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else HOPPER


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _flash_attention_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, *_lengths(segments), dropout_p=options.dropout, softmax_scale=options.scale,
        causal=segments.causal, window_size=_window(options), softcap=options.softcap or 0.0,
    )  # fmt: skip


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        q, k, v, *_lengths(segments), softmax_scale=options.scale, causal=segments.causal,
        window_size=_window(options), softcap=options.softcap or 0.0,
    )  # fmt: skip
    return output[0] if isinstance(output, tuple) else output  # some builds add the normalizers


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = _lengths(segments)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=options.scale, causal=segments.causal, window_size=_window(options),
    )[0]  # fmt: skip


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    takes = _parameters(varlen_attn)
    left = -1 if options.window is None else options.window - 1
    window = (left, 0 if segments.causal else -1)
    causal: dict[str, Any] = {"window_size": window} if "window_size" in takes else {"is_causal": segments.causal}
    if q.shape[1] != k.shape[1] and "enable_gqa" in takes:  # before, fewer key-value heads are taken without a word
        causal["enable_gqa"] = True
    if "scale" in takes:
        causal["scale"] = options.scale
    elif options.scale != q.shape[-1] ** -0.5:
        q = q * (options.scale * q.shape[-1] ** 0.5)
    compute: Any = varlen_attn
    return compute(q.contiguous(), k.contiguous(), v.contiguous(), *_lengths(segments), **causal)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Of varlen_attn, which had three signatures so far: is_causal (torch 2.10), window_size (2.11), window_size with
    enable_gqa (2.12 on)."""
    return frozenset(inspect.signature(function).parameters)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
    return sdpa(q, k, v, segments.calls, segments.causal, options)


def _lengths(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    batch = segments.batch
    return batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_seqlen_q, batch.max_seqlen_k


def _window(options: Options) -> tuple[int, int]:
    return (-1, -1) if options.window is None else (options.window - 1, 0)


def _has(module: str, function: str) -> Callable[[], bool]:
    # Asks for the function too: PyPI holds an unrelated package under FlashAttention 3's module name, and FlashAttention 4
    # lies within that of 2, which need not be there.
    def installed() -> bool:
        try:
            return hasattr(importlib.import_module(module), function)
        except Exception:  # not there, or built for another torch: its import raises whatever its loader raises
            return False

    return installed


def _trains_3() -> bool:
    """Whether FlashAttention 3 is here, and built with all that a row of the table promises: wheels on PyPI have no
    backward."""
    lacks = {flag for flag, off in _build_of_3().items() if off}
    needs = {f"FLASHATTENTION_DISABLE_{part}" for part in ("BACKWARD", "VARLEN", "LOCAL", "SOFTCAP")}
    return _has("flash_attn_interface", "flash_attn_varlen_func")() and not lacks & needs


def _build_of_3() -> dict[str, bool]:
    """What was left out of this build of FlashAttention 3, as far as it says."""
    try:
        return dict(importlib.import_module("flash_attn_config").CONFIG["build_flags"])
    except Exception:  # older builds say nothing, and have all
        return {}


def _eights(size: int, largest: int = 256) -> bool:
    return size % 8 == 0 and size <= largest


def _takes_3(size: int) -> bool:
    build = _build_of_3()
    built = (n for n in (64, 96, 128, 192, 256) if not build.get(f"FLASHATTENTION_DISABLE_HDIM{n}"))
    return _eights(size, max(built, default=0))


def _takes_4(size: int) -> bool:
    return _eights(size) if _capability() < BLACKWELL else _eights(size, 128) or size == 256


AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
KERNELS: dict[str, Kernel] = {  # fastest first
    "flash_attention_3": Kernel(
        _flash_attention_3, frozenset({"window", "softcap"}), "cuda", _trains_3, HOPPER, BLACKWELL, _takes_3
    ),
    # Of its backward, softcaps with heads of 256 are left out; heads of 256 do not fit the memory of what comes after 11.0.
    "flash_attention_4": Kernel(
        _flash_attention_4,
        frozenset({"window"}),
        "cuda",
        _has("flash_attn.cute", "flash_attn_varlen_func"),
        HOPPER,
        (12, 0),
        _takes_4,
    ),
    "flash_attention_2": Kernel(
        _flash_attention_2,
        frozenset({"window", "softcap", "dropout"}),
        "cuda",
        _has("flash_attn", "flash_attn_varlen_func"),
        AMPERE,
        takes=_eights,
    ),
    "torch_varlen": Kernel(
        _torch_varlen,
        frozenset({"window"}),
        "cuda",
        _has("torch.nn.attention.varlen", "varlen_attn"),
        AMPERE,
        takes=_eights,
    ),
    "sdpa": Kernel(_sdpa, frozenset({"window", "softcap", "dropout", "position_bias", "sinks"}), None, lambda: True),
}

AttentionInterface.register(PACKED, packed_attention)

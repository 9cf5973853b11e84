"""G3, G5 and G6: what their processes are asked for, and the figures out of what they found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.child import ask
from benchmarks.gpu.figures import CUT, Figure, Sizes, measured, ratio
from benchmarks.races import at_least, at_most

Left = Callable[[], float]


def micro_steps(sizes: Sizes, left: Left) -> dict[str, Any]:
    tokens = [128, 256] if sizes.tiny else [8192, 16384, 32768]
    arguments = {
        "shape": "8B slice", "tiny": sizes.tiny, "device": sizes.device, "dtype": sizes.dtype, "tokens": tokens,
        "max_length": sizes.max_length, "warmups": sizes.warmups, "steps": sizes.steps,
    }  # fmt: skip
    raw = ask("micro_steps", arguments, work=sizes.work, device=sizes.device, limit=left())
    figures = [utilization(raw, "like_ultrafeedback", "executed", n, 45) for n in tokens]
    figures += [utilization(raw, "prompt_heavy", "useful", n, 60) for n in tokens]
    figures += [of_ceiling(raw, n) for n in tokens]
    figures.append(measured("square matrix product", raw["ceiling_flops"], "flops_per_second", 1e-12, " TFLOP/s"))
    return {"figures": [figure.record() for figure in figures], "raw": raw}


def utilization(raw: dict[str, Any], data: str, kind: str, tokens: int, bound: float) -> Figure:
    """Model FLOPs over the device's peak."""
    what = f"MFU, {kind} tokens, {data.replace('_', '-')} pairs, {tokens:,} tokens per micro-step"
    if not raw["peak_flops"]:
        return Figure(what, None, " %", target=at_least(bound), reason="the peak of this device is not known")
    found = raw.get(f"{data} {tokens}", CUT)
    return measured(what, found, f"{kind}_flops_per_second", 100 / raw["peak_flops"], " %", at_least(bound))


def of_ceiling(raw: dict[str, Any], tokens: int) -> Figure:
    """Executed FLOPs over those of a matrix product in the same process."""
    most = raw["ceiling_flops"].get("flops_per_second")
    what, found = f"executed FLOPs, {tokens:,} tokens per micro-step", raw.get(f"like_ultrafeedback {tokens}", CUT)
    if not most:
        return Figure(what, None, " %", "of a matrix product", reason=raw["ceiling_flops"]["reason"])
    return measured(what, found, "executed_flops_per_second", 100 / most, " % of a matrix product")


def attention_kernels(sizes: Sizes, left: Left) -> dict[str, Any]:
    heads, kv_heads, width = (4, 2, 16) if sizes.tiny else (32, 8, 128)
    tokens = [128, 256] if sizes.tiny else [16384, 32768, 65536]
    arguments = {
        "tiny": sizes.tiny, "device": sizes.device, "dtype": sizes.dtype, "tokens": tokens, "heads": heads,
        "kv_heads": kv_heads, "width": width, "warmups": sizes.warmups, "steps": sizes.steps,
    }  # fmt: skip
    raw = ask("attention_kernels", arguments, work=sizes.work, device=sizes.device, limit=left())
    figures = [
        ratio(raw, f"flex {n}", f"torch_varlen {n}", f"torch_varlen, {n:,} tokens", "Flex", at_least(1.15)) for n in tokens
    ]
    figures += [
        measured(f"{name} tokens, forward and backward", found, "flops_per_second", 1e-12, " TFLOP/s")
        for name, found in raw.items()
    ]
    return {"figures": [figure.record() for figure in figures], "raw": raw}


def heads(sizes: Sizes, left: Left) -> dict[str, Any]:
    # The widths are those of Llama-3.1-8B, Qwen3-8B and Gemma-3-12B.
    shapes = [(512, 32), (768, 32)] if sizes.tiny else [(128_256, 4096), (151_936, 4096), (262_144, 3840)]
    arguments = {
        "device": sizes.device, "dtype": sizes.dtype, "sizes": shapes, "positions": 64 if sizes.tiny else 8192,
        "warmups": sizes.warmups, "steps": sizes.steps,
    }  # fmt: skip
    raw = ask("heads", arguments, work=sizes.work, device=sizes.device, limit=left())
    figures = []
    for size, _ in shapes:
        ours, what = f"dspref {size}", f"LM head, vocabulary {size:,}"
        figures += [
            measured(f"{what}: memory beyond gradients", raw.get(ours, CUT), "extra_bytes", 1e-9, " GB", at_most(1.0)),
            measured(f"{what}: the same, head not trained", raw.get(ours, CUT), "extra_bytes_frozen", 1e-9, " GB"),
        ]
        for peer in ("TRL", "TRL, as its DPO calls it", "full logits", "Liger"):
            target, theirs = at_most(1.05) if peer.startswith("TRL") else None, f"{peer} {size}"
            figures.append(ratio(raw, ours, theirs, f"{what}: time", peer, target))
            figures.append(measured(f"{what}: memory of {peer}", raw.get(theirs, CUT), "extra_bytes", 1e-9, " GB"))
    return {"figures": [figure.record() for figure in figures], "raw": raw}


PARTS = {"G3": micro_steps, "G5": attention_kernels, "G6": heads}

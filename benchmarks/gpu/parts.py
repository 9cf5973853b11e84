"""What is no race of whole runs: micro-steps of an 8B slice (G3), attention kernels (G5), the LM head (G6).

Each is a plain function of its sizes, in a process of its own. Where memory ends, or a kernel is not there, one line says so
in place of the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.clock import extra_bytes, reason, settle, timed
from benchmarks.workload import SEED


def tell(result: dict[str, Any]) -> None:
    """Say what was found so far: it counts if there is no time for more."""
    print("\n" + json.dumps(result), flush=True)


def attempt(job: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What a job found, or `reason`; in either case its memory is free again."""
    try:
        return job()
    except Exception as error:  # each kernel and library has its own
        return {"reason": reason(error)}
    finally:
        settle(device)


# ---------------------------------------------------------------------------------------------------------------------
# G3: micro-steps


def micro_steps(
    shape: str, tiny: bool, device: str, dtype: str, tokens: Sequence[int], max_length: int, warmups: int, steps: int
) -> dict[str, Any]:
    """Forward, DPO loss and backward of one pack, without an update: of UltraFeedback-like and of prompt-heavy pairs."""
    from transformers import AutoModelForCausalLM

    from dspref.model import attention
    from dspref.model.packed import PackedCausalLM
    from dspref.report.performance import peak_flops

    torch.manual_seed(SEED)
    config = models.config_of(shape, tiny)
    with torch.device(device):
        settings: Any = {"dtype": getattr(torch, dtype), "attn_implementation": attention.PACKED}
        lm = AutoModelForCausalLM.from_config(config, **settings)
    kernel = attention.available(device)[0]
    model = PackedCausalLM(lm, kernel).train()
    result: dict[str, Any] = {
        "kernel": kernel,
        "peak_flops": peak_flops(torch.device(device), dtype),
        "ceiling_flops": attempt(partial(ceiling, device, dtype, 256 if tiny else 8192, warmups, steps), device),
    }
    for data in ("like_ultrafeedback", "prompt_heavy"):
        drawn = models.with_template(getattr(models, data)(max_length))
        for n in tokens:
            result[f"{data} {n}"] = attempt(partial(micro_step, model, filling(drawn, n), warmups, steps), device)
            tell(result)
    return result


def filling(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """The first pairs that fit into a pack of so many tokens, with each prompt once."""
    return lengths[: max(1, int((lengths.sum(axis=1).cumsum() <= tokens).sum()))]


def micro_step(model: Any, lengths: np.ndarray, warmups: int, steps: int) -> dict[str, Any]:
    from dspref.data.batch import collate
    from dspref.model.logps import pair_logps
    from dspref.report.performance import Work, size_of

    weight = next(model.parameters())
    batch = collate(random_pairs(lengths, weight.shape[0]), range(len(lengths)), prefix_sharing=True).to(weight.device)
    losses = []

    def step() -> None:
        logps = pair_logps(model(batch)[0], batch)
        loss = -F.logsigmoid(0.1 * ((logps.chosen - logps.chosen.detach()) - (logps.rejected - logps.rejected.detach())))
        loss.mean().backward()
        losses.append(loss.mean().detach())
        for parameter in model.parameters():
            parameter.grad = None

    found = timed(step, weight.device.type, warmups, steps, limit=5.0)
    size = size_of(model)
    flops = {
        name: size.forward(work) + size.backward(work)
        for name, work in (("executed", Work(*models.shared(lengths))), ("useful", Work(*models.separate(lengths))))
    }
    if not all(torch.isfinite(loss) for loss in losses):
        raise ValueError("the loss is not finite")
    return found | {
        "tokens": len(batch.input_ids),
        "pairs": len(lengths),
        **{f"{name}_flops": value for name, value in flops.items()},
        **{f"{name}_flops_per_second": value / found["median_seconds"] for name, value in flops.items()},
        "peak_bytes": torch.cuda.max_memory_allocated() if weight.is_cuda else None,
    }


def random_pairs(lengths: np.ndarray, vocabulary: int) -> list[Any]:
    from dspref.data.truncate import TokenizedPair

    draws = np.random.default_rng(SEED)
    rows = [[draws.integers(0, vocabulary, size=n).astype(np.int32) for n in row] for row in lengths.tolist()]
    return [TokenizedPair(prompt, chosen, rejected) for prompt, chosen, rejected in rows]


def ceiling(device: str, dtype: str, size: int, warmups: int, steps: int) -> dict[str, Any]:
    """FLOP/s of a square matrix product: what this device can do at best."""
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    found = timed(lambda: a @ b, device, warmups, steps)
    return found | {"flops_per_second": 2 * size**3 / found["median_seconds"]}


# ---------------------------------------------------------------------------------------------------------------------
# G5: attention

SEQUENCES = (4096, 2048, 1024, 1024)
"""Of every 16,384 tokens there are two of each of these sequences."""
TRAINING = 3.5
"""Forward and backward over the forward alone, as FlashAttention's papers count: the backward makes the scores again."""


def attention_kernels(
    tiny: bool,
    device: str,
    dtype: str,
    tokens: Sequence[int],
    heads: int,
    kv_heads: int,
    width: int,
    warmups: int,
    steps: int,
) -> dict[str, Any]:
    """Forward and backward of every kernel that is here on the same packs; outputs and gradients must agree."""
    unit = sum(SEQUENCES) * 2 // min(tokens)
    result = {}
    for count in tokens:
        lengths = [n // unit if tiny else n for n in SEQUENCES] * (count // min(tokens))
        torch.manual_seed(SEED)
        shapes = [(count, heads, width), (count, kv_heads, width), (count, kv_heads, width)]
        inputs = [torch.randn(s, device=device, dtype=getattr(torch, dtype)).requires_grad_() for s in shapes]
        flops = TRAINING * 4 * heads * width * sum(n * (n + 1) for n in lengths)  # each length twice
        expected: list[Tensor] = []
        for name, kernel in kernels(lengths, device).items():
            found = attempt(partial(attention_kernel, kernel, inputs, expected, device, warmups, steps), device)
            if "median_seconds" in found:
                found["flops_per_second"] = flops / found["median_seconds"]
            result[f"{name} {count}"] = found
            tell(result)
    return result


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernels(lengths: Sequence[int], device: str) -> dict[str, Callable[[], Attend]]:
    """Makers of `attend(q [T,H,D], k [T,G,D], v [T,G,D])` for sequences of these lengths, each of which is there twice."""
    from dspref.model.attention import KERNELS

    rows = np.array([[n // 2, n - n // 2, n - n // 2] for n in lengths])
    varlen = {name: partial(packed_kernel, name, rows, device) for name in sorted(KERNELS, key="sdpa".__ne__)}
    owner = torch.repeat_interleave(torch.tensor([n for n in lengths for _ in range(2)])).to(device)
    return varlen | {"flex": partial(flex_kernel, owner), "dense": partial(dense_kernel, owner)}


def packed_kernel(name: str, rows: np.ndarray, device: str) -> Attend:
    from dspref.data.batch import collate
    from dspref.model.attention import KERNELS, Options, Segments, available

    if name not in available(device):
        raise RuntimeError(f"{name} is not available here")
    segments = Segments(collate(random_pairs(rows, 2), range(len(rows)), prefix_sharing=False).to(device), name)
    return lambda q, k, v: KERNELS[name].compute(q, k, v, segments, Options(q.shape[-1] ** -0.5, 0.0, None, None))


def flex_kernel(owner: Tensor) -> Attend:
    from benchmarks.gpu import flex

    mask = flex.prefix_mask(owner, torch.zeros_like(owner))
    return lambda q, k, v: flex.attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=mask)[0].transpose(0, 1)


def dense_kernel(owner: Tensor) -> Attend:
    order = torch.arange(len(owner), device=owner.device)
    mask = (owner[:, None] == owner[None]) & (order[:, None] >= order[None])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


def attention_kernel(
    make: Callable[[], Attend], inputs: list[Tensor], expected: list[Tensor], device: str, warmups: int, steps: int
) -> dict[str, Any]:
    """Times of a kernel. The first one's output and gradients fill `expected`; the others' must be near them."""
    attend = make()
    slope = torch.ones_like(inputs[0])

    def job() -> list[Tensor]:
        output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, slope)]

    got = job()
    if not expected:
        expected.extend(got)
    error = max(relative(a, b) for a, b in zip(got, expected))
    if not error <= (1e-4 if inputs[0].dtype == torch.float32 else 5e-2):
        raise ValueError(f"output or gradients are {error:.2g} away from those of the first kernel")
    return timed(job, device, warmups, steps, limit=3.0) | {"error": error}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# G6: the LM head


def heads(
    device: str, dtype: str, sizes: Sequence[Sequence[int]], positions: int, warmups: int, steps: int
) -> dict[str, Any]:
    """Log-probs of `positions` targets and their gradients, by every function, for heads of (vocabulary, hidden size)."""
    result = {}
    for vocabulary, width in sizes:
        torch.manual_seed(SEED)
        kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
        hidden = torch.randn(positions, width, **kind).requires_grad_()
        weight = (torch.randn(vocabulary, width, **kind) * 0.02).requires_grad_()
        targets = torch.randint(0, vocabulary, (positions,), device=device)
        expected: list[Tensor] = []
        for name, function in HEADS.items():
            job = partial(head, function, hidden, weight, targets, expected, warmups, steps)
            result[f"{name} {vocabulary}"] = attempt(job, device)
            tell(result)
    return result


def head(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    expected: list[Tensor],
    warmups: int,
    steps: int,
) -> dict[str, Any]:
    """Time, and memory beyond inputs and gradients: with a head that is trained, and with one that is not."""
    device = hidden.device.type

    def trained() -> list[Tensor]:
        logps = function(hidden, weight, targets)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))]

    def frozen() -> Tensor:
        return torch.autograd.grad(function(hidden, weight.detach(), targets).sum(), hidden)[0]

    logps = trained()[0]
    if not expected:
        expected.append(logps)
    if not (error := relative(logps, expected[0])) <= (1e-5 if hidden.dtype == torch.float32 else 1e-2):
        raise ValueError(f"log-probs are {error:.2g} away from those of the first function")
    gradients = [sum(x.numel() * x.element_size() for x in some) for some in ((hidden, weight), (hidden,))]
    memory = [extra_bytes(job, device) for job in (trained, frozen)]
    extra = [None if peak is None else max(peak - own, 0) for peak, own in zip(memory, gradients)]
    return timed(trained, device, warmups, steps, limit=4.0) | {
        "extra_bytes": extra[0],
        "extra_bytes_frozen": extra[1],
        "error": error,
    }


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from dspref.model.logps import scored_logps

    return scored_logps(hidden, weight, None, targets).logps


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Tensor:
    from trl.trainer import utils

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)[0]  # type: ignore


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    result = Fused.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")
    return -(result[0] if isinstance(result, tuple) else result)


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dspref": chunked,
    "TRL": partial(trl_chunked, outputs=("log_probs",)),
    "TRL, as its DPO calls it": partial(trl_chunked, outputs=("log_probs", "entropy", "mean_logits", "is_top1")),
    "full logits": full_logits,
    "Liger": liger,
}

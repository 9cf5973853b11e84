"""Chunked log-probs against log_softmax and gather, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspref import logps as module
from dspref.logps import HeadTransform, pair_logps, scored_logps

C, D, V = 23, 16, 50

TRANSFORMS = [
    HeadTransform(),
    HeadTransform(scale=0.25),
    HeadTransform(softcap=2.0),
    HeadTransform(scale=3.0, softcap=1.5),
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time: 23 scored tokens make four whole chunks and a rest."""
    monkeypatch.setattr(module, "LOGITS_PER_CPU_CHUNK", 5 * V + 1)


def head(
    count: int = C, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draws = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, generator=draws).to(dtype) for shape in ((count, D), (V, D), (V,)))
    targets = torch.randint(0, V, (count,), generator=draws)
    return hidden.requires_grad_(), weight.requires_grad_(), offset.requires_grad_() if bias else None, targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> tuple[Tensor, Tensor]:
    """The formula, written for reading."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0], logits.mean(dim=-1)


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    """Relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_and_gradients_are_those_of_log_softmax(transform: HeadTransform, bias: bool, small_chunks: None) -> None:
    hidden, weight, offset, targets = head(bias=bias)
    assert len(module._chunks(hidden, weight)) == 5
    upstream = torch.linspace(-2.0, 3.0, C)  # what a loss sends back differs from token to token, zero included
    inputs = [x for x in (hidden, weight, offset) if x is not None]

    ours, our_means = scored_logps(hidden, weight, offset, targets, transform)
    theirs, their_means = plain(hidden, weight, offset, targets, transform)
    assert ours.dtype == our_means.dtype == torch.float32
    assert_close(ours, theirs)
    assert_close(our_means, their_means)
    assert not our_means.requires_grad

    our_grads = torch.autograd.grad(ours, inputs, upstream)
    for mine, reference in zip(our_grads, torch.autograd.grad(theirs, inputs, upstream)):
        assert_close(mine, reference)


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
def test_chunk_size_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, offset, targets = head()
    whole, _ = scored_logps(hidden, weight, offset, targets)
    expected = torch.autograd.grad(whole.sum(), (hidden, weight, offset))
    monkeypatch.setattr(module, "LOGITS_PER_CPU_CHUNK", rows * V)
    chunked, _ = scored_logps(hidden, weight, offset, targets)
    assert_close(chunked, whole)
    for ours, theirs in zip(torch.autograd.grad(chunked.sum(), (hidden, weight, offset)), expected):
        assert_close(ours, theirs)


def test_a_vocabulary_larger_than_a_chunk_still_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_CPU_CHUNK", 1)
    hidden, weight, offset, targets = head(count=3)
    assert_close(
        scored_logps(hidden, weight, offset, targets)[0], plain(hidden, weight, offset, targets, HeadTransform())[0]
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_scored_tokens_keep_the_graph_alive(transform: HeadTransform) -> None:
    """A filler pack must run its backward like any other: zero gradients, no missing ones."""
    hidden, weight, offset, targets = head(count=0)
    ours, means = scored_logps(hidden, weight, offset, targets, transform)
    assert ours.shape == means.shape == (0,)
    assert ours.requires_grad
    ours.sum().backward()
    for parameter in (hidden, weight, offset):
        assert parameter is not None
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


@pytest.mark.parametrize("frozen", [{"weight", "offset"}, {"hidden"}, {"weight"}, {"offset"}])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: set[str], small_chunks: None) -> None:
    """A frozen head (LoRA) or frozen body."""
    hidden, weight, offset, targets = head()
    assert offset is not None
    named = {"hidden": hidden, "weight": weight, "offset": offset}
    expected = torch.autograd.grad(plain(hidden, weight, offset, targets, HeadTransform())[0].sum(), list(named.values()))
    for name in frozen:
        named[name].requires_grad_(False)
    scored_logps(hidden, weight, offset, targets)[0].sum().backward()
    for (name, tensor), gradient in zip(named.items(), expected):
        if name in frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            assert_close(tensor.grad, gradient)


def test_bf16_inputs_are_reduced_in_fp32(small_chunks: None) -> None:
    """Log-probs are fp32; gradients come back in the type of what they belong to, near those of the fp32 formula."""
    hidden, weight, offset, targets = head(dtype=torch.bfloat16)
    ours, means = scored_logps(hidden, weight, offset, targets)
    assert ours.dtype == means.dtype == torch.float32
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, offset)]  # type: ignore[union-attr]
    theirs, _ = plain(*exact, targets, HeadTransform())
    assert_close(ours, theirs, 1e-2)
    for mine, reference in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight, offset)), torch.autograd.grad(theirs.sum(), exact)
    ):
        assert mine.dtype == torch.bfloat16
        assert_close(mine.float(), reference, 2e-2)


def test_gradients_accumulate_in_fp32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, 128 + 0.5 is 128: hundreds of equal chunks would stop adding up."""
    monkeypatch.setattr(module, "LOGITS_PER_CPU_CHUNK", 1)
    count = 400
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    scored_logps(hidden, weight, None, torch.zeros(count, dtype=torch.int64))[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [200.0, -200.0]


def test_far_apart_logits_stay_finite() -> None:
    """log p = -2000 of an impossible token, 0 of a certain one."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1000.0], [-1000.0]])
    ours, _ = scored_logps(hidden, weight, None, torch.tensor([0, 1]))
    assert ours.tolist() == [0.0, -2000.0]
    ours.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_pair_logps_sums_and_counts_each_answer() -> None:
    pairs, draws = 5, torch.Generator().manual_seed(1)
    spans = torch.randint(0, 2 * pairs, (40,), generator=draws)
    spans = spans[spans != 3]  # an answer without a scored token
    values = torch.randn(len(spans), generator=draws, requires_grad=True)
    result = pair_logps(values, spans, pairs)
    for side, (sums, counts) in enumerate(
        ((result.chosen, result.chosen_tokens), (result.rejected, result.rejected_tokens))
    ):
        for k in range(pairs):
            own = [value.item() for value, span in zip(values, spans.tolist()) if span == side * pairs + k]
            assert sums[k].item() == pytest.approx(sum(own), abs=1e-5)
            assert counts[k].item() == len(own)
    (gradient,) = torch.autograd.grad((result.chosen * torch.arange(1.0, pairs + 1)).sum() - result.rejected.sum(), values)
    assert gradient.tolist() == [span + 1.0 if span < pairs else -1.0 for span in spans.tolist()]


def test_pair_logps_of_a_filler() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    result = pair_logps(nothing, torch.zeros(0, dtype=torch.int64), 0)
    assert [len(x) for x in (result.chosen, result.rejected, result.chosen_tokens, result.rejected_tokens)] == [0] * 4
    assert result.chosen.requires_grad

"""Chunked log-probs against log_softmax and gather, in values and in every gradient; their sums by pair and side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspref.data.batch import CHOSEN, PROMPT, REJECTED, PackedBatch, collate
from dspref.data.truncate import TokenizedPair
from dspref.model import head_room
from dspref.model import logits as logits_of
from dspref.model import logps as module
from dspref.model.logps import HeadTransform, TokenLogps, pair_logps, scored_logps, scored_tokens

C, D, V = 23, 16, 50

TRANSFORMS = [
    HeadTransform(),
    HeadTransform(scale=0.25),
    HeadTransform(softcap=2.0),
    HeadTransform(scale=3.0, softcap=1.5),
]


@pytest.fixture(params=["kept", "made again", "made again in blocks"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time: 23 scored tokens make four whole chunks and a rest; with probabilities that stay until the
    backward pass, and with ones that are made again, for ten words of the vocabulary and all tokens at a time, or for thirty
    words and eight tokens."""
    monkeypatch.setattr(head_room, "LOGITS_PER_CPU_CHUNK", 5 * V + 1)
    if request.param != "kept":
        monkeypatch.setattr(head_room, "KEPT_ON_CPU", 0)
        monkeypatch.setattr(module, "PART", 30 if request.param == "made again in blocks" else 1)


def head(
    count: int = C, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draws = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, generator=draws).to(dtype) for shape in ((count, D), (V, D), (V,)))
    targets = torch.randint(0, V, (count,), generator=draws)
    return hidden.requires_grad_(), weight.requires_grad_(), offset.requires_grad_() if bias else None, targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas, written for reading: log-probs, mean logits, collision entropies."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    collision = -(logits.softmax(dim=-1) ** 2).sum(dim=-1).log()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0], logits.mean(dim=-1), collision


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    """Relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("with_collision", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_and_gradients_are_those_of_log_softmax(
    transform: HeadTransform, bias: bool, with_collision: bool, small_chunks: None
) -> None:
    """Asking for collision entropies, which carry no gradient, changes neither log-probs nor theirs."""
    hidden, weight, offset, targets = head(bias=bias)
    assert len(module._chunks(hidden, weight)) == 5
    upstream = torch.linspace(-2.0, 3.0, C)  # what a loss sends back differs from token to token, zero included
    inputs = [x for x in (hidden, weight, offset) if x is not None]

    ours, our_means, our_collision, *_ = scored_logps(hidden, weight, offset, targets, transform, with_collision)
    theirs, their_means, their_collision = plain(hidden, weight, offset, targets, transform)
    assert ours.dtype == our_means.dtype == torch.float32
    assert_close(ours, theirs)
    assert_close(our_means, their_means)
    assert not our_means.requires_grad
    if with_collision:
        assert our_collision is not None
        assert our_collision.dtype == torch.float32
        assert_close(our_collision, their_collision)
        assert not our_collision.requires_grad
    else:
        assert our_collision is None

    our_grads = torch.autograd.grad(ours, inputs, upstream)
    for mine, reference in zip(our_grads, torch.autograd.grad(theirs, inputs, upstream)):
        assert_close(mine, reference)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_entropies_and_hits_are_those_of_the_formula(transform: HeadTransform, small_chunks: None) -> None:
    """Every fifth target is the most likely token; asking changes neither log-probs nor their gradients."""
    hidden, weight, offset, targets = head()
    logits = transform(torch.nn.functional.linear(hidden.detach(), weight.detach(), offset.detach()))  # type: ignore[union-attr]
    targets[::5] = logits[::5].argmax(dim=-1)
    plain_tokens = scored_logps(hidden, weight, offset, targets, transform)
    tokens = scored_logps(hidden, weight, offset, targets, transform, with_statistics=True)
    assert plain_tokens.entropy is None and plain_tokens.hit is None and tokens.collision is None
    assert tokens.entropy is not None and tokens.hit is not None
    chances = logits.double().softmax(dim=-1)
    assert_close(tokens.entropy, -(chances * chances.log()).sum(dim=-1))
    most = logits.amax(dim=-1)  # where the cap is reached, of several
    assert tokens.hit.tolist() == (logits.gather(-1, targets[:, None])[:, 0] == most).float().tolist()
    assert 5 <= tokens.hit.sum() < C and not tokens.entropy.requires_grad and not tokens.hit.requires_grad
    found = [torch.autograd.grad(one.logps.sum(), (hidden, weight)) for one in (plain_tokens, tokens)]
    assert torch.equal(tokens.logps, plain_tokens.logps) and all(map(torch.equal, *found))


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
def test_chunk_size_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, offset, targets = head()
    whole = scored_logps(hidden, weight, offset, targets, with_collision=True)
    expected = torch.autograd.grad(whole.logps.sum(), (hidden, weight, offset))
    monkeypatch.setattr(head_room, "LOGITS_PER_CPU_CHUNK", rows * V)
    monkeypatch.setattr(head_room, "KEPT_ON_CPU", 0)
    chunked = scored_logps(hidden, weight, offset, targets, with_collision=True)
    for ours, theirs in zip(chunked[:3], whole[:3]):
        assert_close(ours, theirs)
    for ours, theirs in zip(torch.autograd.grad(chunked.logps.sum(), (hidden, weight, offset)), expected):
        assert_close(ours, theirs)


def test_a_vocabulary_larger_than_a_chunk_still_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_room, "LOGITS_PER_CPU_CHUNK", 1)
    hidden, weight, offset, targets = head(count=3)
    ours, theirs = scored_logps(hidden, weight, offset, targets), plain(hidden, weight, offset, targets, HeadTransform())
    assert_close(ours.logps, theirs[0])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_scored_tokens_keep_the_graph_alive(transform: HeadTransform) -> None:
    """A filler pack must run its backward like any other: zero gradients, no missing ones."""
    hidden, weight, offset, targets = head(count=0)
    ours, means, collision, *_ = scored_logps(hidden, weight, offset, targets, transform, with_collision=True)
    assert collision is not None
    assert ours.shape == means.shape == collision.shape == (0,)
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
    scored_logps(hidden, weight, offset, targets).logps.sum().backward()
    for (name, tensor), gradient in zip(named.items(), expected):
        if name in frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            assert_close(tensor.grad, gradient)


def test_bf16_inputs_are_reduced_in_fp32(small_chunks: None) -> None:
    """Log-probs are fp32; gradients come back in the type of what they belong to, near those of the fp32 formula."""
    hidden, weight, offset, targets = head(dtype=torch.bfloat16)
    ours, means, collision, *_ = scored_logps(hidden, weight, offset, targets, with_collision=True)
    assert collision is not None
    assert ours.dtype == means.dtype == collision.dtype == torch.float32
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, offset)]  # type: ignore[union-attr]
    theirs, _, their_collision = plain(*exact, targets, HeadTransform())
    assert_close(ours, theirs, 1e-2)
    assert_close(collision, their_collision, 1e-2)
    for mine, reference in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight, offset)), torch.autograd.grad(theirs.sum(), exact)
    ):
        assert mine.dtype == torch.bfloat16
        assert_close(mine.float(), reference, 2e-2)


@pytest.mark.parametrize("kept", [0, 10**6])
def test_of_a_nearly_certain_token_bf16_keeps_what_is_left(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 0.9975 is 1 in bf16, and the gradient is its distance from 1."""
    monkeypatch.setattr(head_room, "KEPT_ON_CPU", kept)
    weight = torch.tensor([[6.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    scored_logps(hidden, weight, None, torch.zeros(1, dtype=torch.int64)).logps.sum().backward()
    left = 1 / (1 + float(np.exp(6.0)))
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([left, -left], rel=2**-8)


@pytest.mark.parametrize(("kept", "part"), [(0, 1), (0, 2), (10**6, 1)])
def test_gradients_accumulate_in_fp32(kept: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, 128 + 0.5 is 128: hundreds of equal shares, of tokens or of parts of the vocabulary, would stop adding up."""
    monkeypatch.setattr(head_room, "LOGITS_PER_CPU_CHUNK", 1)
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr(head_room, "KEPT_ON_CPU", kept)
    count = 400
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    scored_logps(hidden, weight, None, torch.zeros(count, dtype=torch.int64)).logps.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [200.0, -200.0]

    one = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    words = torch.full((512, 1), 0.5 * 512, dtype=torch.bfloat16)
    words[0] = 0  # the target: the gradient is minus the mean of all the others
    scored_logps(one, words, None, torch.zeros(1, dtype=torch.int64)).logps.sum().backward()
    assert one.grad is not None
    assert one.grad.item() == pytest.approx(-0.5 * 511, rel=2**-8)


class Written(TorchDispatchMode):
    """Counts the elements that operators write."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += result.numel() if isinstance(result, Tensor) and not func.is_view else 0
        return result


@pytest.mark.parametrize("tokens", [56_250, pytest.param(225_000, marks=pytest.mark.slow)])
def test_the_work_of_the_backward_pass_grows_with_the_scored_tokens(tokens: int) -> None:
    """Twice the tokens of a large step write twice as much, and little beside the logits themselves. Nothing is computed on
    the meta device, which takes a GPU's sizes."""
    width, vocabulary, written = 4096, 151_936, {}
    for count in (tokens, 2 * tokens):
        hidden = torch.empty(count, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        logps = scored_logps(hidden, weight, None, torch.empty(count, dtype=torch.int64, device="meta")).logps
        with Written() as counter:
            logps.sum().backward()
        written[count] = counter.elements
        assert counter.elements < 15 * count * vocabulary
    assert written[2 * tokens] < 2.05 * written[tokens]


@pytest.mark.parametrize("transform", [HeadTransform(), HeadTransform(2.0, 30.0)])
@pytest.mark.parametrize("count", [0, 640, 20_000])
def test_torch_has_the_operators_that_a_gpu_is_asked_for(
    count: int, transform: HeadTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bf16 matrices into fp32, into a tensor that is there too. Types and shapes alone are computed."""
    monkeypatch.setattr(logits_of, "multiplies_into_fp32", lambda matrix: True)
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    inputs = [torch.empty(*shape, **kind) for shape in ((count, 256), (32_064, 256), (32_064,))]
    ours = scored_logps(*inputs, torch.empty(count, dtype=torch.int64, device="meta"), transform, with_collision=True)
    assert ours.collision is not None and ours.logps.dtype == ours.mean_logits.dtype == ours.collision.dtype == torch.float32
    for one, gradient in zip(inputs, torch.autograd.grad(ours.logps.sum(), inputs)):
        assert gradient.dtype == torch.bfloat16 and gradient.shape == one.shape


def test_blocks_are_whole_tiles_on_a_gpu() -> None:
    """Of at least 4,096 words, and all tokens at once where they are few; every token and every word is in one."""
    for count, vocabulary in ((450_000, 151_936), (2_000, 128_256), (9, 151_936), (8_192, 262_144), (3_000, 700), (0, 999)):
        hidden, weight = (torch.empty(n, 8, device="meta") for n in (count, vocabulary))
        chunks = module._chunks(hidden, weight)
        parts, blocks = module._blocks(hidden, weight)
        for slices, of in ((chunks, count), (parts, vocabulary), (blocks, count)):
            assert [s.start for s in slices] == [0, *(s.stop for s in slices)][: len(slices)]
            assert of == (slices[-1].stop if slices else 0)
            assert all((s.stop - s.start) % 128 == 0 for s in slices[:-1])
        assert parts[0].stop >= min(4096, vocabulary)
        assert len(blocks) <= 1 or parts[0].stop == 4096
        assert parts[0].stop * max((b.stop - b.start for b in blocks), default=0) <= head_room.LOGITS_PER_CHUNK


@pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("keep", [False, True])
def test_both_ways_to_normalize_agree(keep: bool, asked: tuple[bool, bool]) -> None:
    """In place, as on a CPU, and by torch's kernel, as elsewhere."""
    logits = 30 * torch.randn(C, V, generator=torch.Generator().manual_seed(3))
    logits[:, 0] = -1e6  # a word that is masked out
    targets = torch.arange(1, C + 1)[:, None]
    found = []
    for normalize in (logits_of.by_powers, logits_of.by_log_softmax):
        kept = logits.clone()
        found.append((*normalize(kept, targets, kept if keep else None, logits_of.Extras(*asked)), kept if keep else None))
    for ours, theirs in zip(*found):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_16_bit_logits_are_rounded_only_where_torch_must(bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no product of bf16 matrices into fp32: there logits are what bf16 has of them. A GPU has one, for which the
    fp32 product of the same numbers stands in: log-probs are off by what fp32 rounds."""
    monkeypatch.setattr(head_room, "LOGITS_PER_CPU_CHUNK", 5 * V + 1)
    monkeypatch.setattr(head_room, "KEPT_ON_CPU", kept)
    monkeypatch.setattr(module, "PART", 30)
    hidden, weight, offset, targets = head(bias=bias, dtype=torch.bfloat16)
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = plain(exact[0], exact[1], exact[2] if bias else None, targets, HeadTransform())[0]
    gradients = torch.autograd.grad(expected.sum(), exact)

    rounded = torch.nn.functional.linear(hidden, weight, offset).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored_logps(hidden, weight, offset, targets).logps, rounded, rtol=1e-6, atol=1e-6)
    assert (rounded - expected).abs().max() > 5e-3

    def into_fp32(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return multiply(a, b) if out is None else multiply(a, b, out=out)
        product = multiply(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    def added_in_fp32(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(total + into_fp32(a, b, out_dtype=out_dtype))

    multiply = torch.mm
    monkeypatch.setattr(logits_of, "multiplies_into_fp32", lambda matrix: True)
    monkeypatch.setattr(torch, "mm", into_fp32)
    monkeypatch.setattr(torch, "addmm", added_in_fp32)
    ours = scored_logps(hidden, weight, offset, targets).logps
    assert (ours - expected).abs().max() < 2e-5
    for mine, reference in zip(torch.autograd.grad(ours.sum(), inputs), gradients):
        assert_close(mine.double(), reference, 1e-2)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_second_backward_pass_is_like_the_first(transform: HeadTransform) -> None:
    """Kept probabilities become the gradient in place; whoever keeps the graph gets them made again."""
    hidden, weight, offset, targets = head()
    ours = scored_logps(hidden, weight, offset, targets, transform).logps
    first, second = (torch.autograd.grad(ours.sum(), (hidden, weight, offset), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second):
        assert_close(one, other)


def test_far_apart_logits_stay_finite() -> None:
    """log p = -2000 of an impossible token, 0 of a certain one; nothing is left to collide with."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1000.0], [-1000.0]])
    ours, _, collision, *_ = scored_logps(hidden, weight, None, torch.tensor([0, 1]), with_collision=True)
    assert ours.tolist() == [0.0, -2000.0]
    assert collision is not None
    assert collision.tolist() == [0.0, 0.0]
    ours.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_the_collision_entropy_of_equal_chances_is_that_of_a_die(small_chunks: None) -> None:
    """-log sum_v (1/V)^2 = log V, the most that it can be; WPO's weight of a pair is 1 there."""
    tokens = scored_logps(torch.zeros(C, D), torch.randn(V, D), None, torch.zeros(C, dtype=torch.int64), with_collision=True)
    assert tokens.collision is not None
    torch.testing.assert_close(tokens.collision, torch.full((C,), float(np.log(V))))


# ---------------------------------------------------------------------------------------------------- sums by pair

ZEROS = torch.zeros(0)


def pack(count: int, seed: int, score_prompt: bool, longest: int = 9) -> tuple[list[TokenizedPair], PackedBatch]:
    """Pairs whose answers and prompts have 1 to `longest` tokens."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, longest + 1, (count, 3)).tolist()
    pairs = [TokenizedPair(*(draws.integers(0, 99, n).astype(np.int32) for n in of_pair)) for of_pair in lengths]
    return pairs, collate(pairs, range(count), prefix_sharing=bool(seed % 2), score_prompt=score_prompt)


def some_tokens(batch: PackedBatch, with_collision: bool = True) -> TokenLogps:
    draws = torch.Generator().manual_seed(1)
    logps, collision = (torch.randn(len(batch.span_index), generator=draws) for _ in range(2))
    return TokenLogps(logps.requires_grad_(), ZEROS, collision if with_collision else None)


@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_pair_logps_against_a_slow_loop(seed: int, score_prompt: bool) -> None:
    """Sums, counts, sums over the length that both answers have, sums over prompts and of collision entropies; and each
    token's gradient is that of the sums it is in."""
    pairs, batch = pack(5, seed, score_prompt)
    tokens = some_tokens(batch)
    result = pair_logps(tokens, batch)
    spans, assigned = batch.span_index.tolist(), torch.zeros(len(batch.span_index))
    weights = {"chosen": 1.0, "rejected": -2.0, "chosen_common": 0.5, "rejected_common": 4.0, "prompt": 0.25}
    for k, pair in enumerate(pairs):
        shorter = min(len(pair.chosen), len(pair.rejected))
        for name, side in (("chosen", CHOSEN), ("rejected", REJECTED), ("prompt", PROMPT)):
            own = [t for t, span in enumerate(spans) if span == side * 5 + k]
            # Every span is a run of its answer's tokens in order.
            for field, members in ((name, own), (f"{name}_common", own[:shorter])):
                if field in weights:
                    assert getattr(result, field)[k].item() == pytest.approx(tokens.logps[members].sum().item(), abs=1e-5)
                    assigned[members] += weights[field] * (k + 1)
            assert getattr(result, f"{name}_tokens")[k].item() == len(own)
            if name != "prompt":
                collision = getattr(result, f"{name}_collision")
                assert tokens.collision is not None
                assert collision[k].item() == pytest.approx(tokens.collision[own].sum().item(), abs=1e-5)
                assert not collision.requires_grad
        assert result.chosen_tokens[k] == len(pair.chosen)
        assert result.rejected_tokens[k] == len(pair.rejected)
        assert result.prompt_tokens is not None
        assert result.prompt_tokens[k] == (len(pair.prompt) - 1 if score_prompt else 0)
    mixed = sum(weight * (getattr(result, name) * torch.arange(1.0, 6)).sum() for name, weight in weights.items())
    (gradient,) = torch.autograd.grad(mixed, tokens.logps)
    torch.testing.assert_close(gradient, assigned)


def test_some_answers_are_longer_than_their_rivals() -> None:
    """On either side, and some prompts have one token: the test above would say nothing otherwise."""
    pairs = [pair for seed in range(6) for pair in pack(5, seed, True)[0]]
    signs = {int(np.sign(len(pair.chosen) - len(pair.rejected))) for pair in pairs}
    assert signs == {-1, 0, 1}
    assert min(len(pair.prompt) for pair in pairs) == 1 < max(len(pair.prompt) for pair in pairs)


def test_scored_tokens_are_the_counts_of_pair_logps() -> None:
    _, batch = pack(5, seed=0, score_prompt=True)
    result = pair_logps(some_tokens(batch), batch)
    counts = [result.chosen_tokens, result.rejected_tokens, result.prompt_tokens]
    assert scored_tokens(batch).tolist() == [c.tolist() for c in counts if c is not None]
    assert scored_tokens(batch).dtype == torch.int64


def test_collision_sums_are_none_where_they_were_not_asked_for() -> None:
    _, batch = pack(3, seed=1, score_prompt=False)
    result = pair_logps(some_tokens(batch, with_collision=False), batch)
    assert result.chosen_collision is result.rejected_collision is None


@pytest.mark.parametrize("with_collision", [False, True])
def test_pair_logps_of_a_filler(with_collision: bool) -> None:
    batch = collate([], [], prefix_sharing=False, score_prompt=True)
    result = pair_logps(some_tokens(batch, with_collision), batch)
    present = {name: value for name, value in vars(result).items() if value is not None}
    assert ("chosen_collision" in present) == with_collision
    assert all(len(value) == 0 for value in present.values())
    assert result.chosen.requires_grad

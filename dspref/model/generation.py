"""Answers to prompts: in batches by a model in the middle of its training, or token by token by a plain one.

The first are made with a cache of keys and values; the tokens are those of transformers' `generate`, greedy or drawn, with
its end tokens and its repetition penalty; how a forward is made is the caller's, as under ZeRO-3 all ranks must make it
together. A plain model is asked by `generate` itself, with all that its generation config says. B sequences, T new tokens of
each, K tokens so far, V vocabulary.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dspref.data.images import Images, Laid, Pictures
from dspref.model import admission, alone

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Tokens of an answer where neither the caller nor the model says how many.
MOST_TOKENS = 512


@dataclass(frozen=True)
class Passage:
    """What a model reads next of some sequences, behind what `cache` holds of them; sequences end together, and begin with
    padding."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B K"]
    position_ids: Int[Tensor, "B T"] | Int[Tensor, "A B T"]
    """Where a model has positions of several axes, of each."""
    cache: Any = None
    begins: Int[Tensor, "B n"] | None = None
    """What a decoder reads first, where the prompts are its encoder's."""
    images: Images | None = None
    """Of all sequences, for a model that reads images; its feature_index goes through the image tokens row by row."""


@dataclass(frozen=True)
class Style:
    """How answers are written."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, and belong to it."""
    repetition_penalty: float = 1.0
    positions: int | None = None
    """Tokens of prompt and answer that the model has positions for."""


def style_of(lm: PreTrainedModel, max_new_tokens: int, temperature: float, top_p: float, ends: Sequence[int]) -> Style:
    """With what the model's generation config says beside: further end tokens, and the penalty of what was said before."""
    penalty = getattr(getattr(lm, "generation_config", None), "repetition_penalty", None)
    return Style(
        max_new_tokens,
        temperature,
        top_p,
        frozenset(ends_of(lm, ends)),
        float(penalty) if isinstance(penalty, int | float) and penalty > 0 else 1.0,
        admission.positions_of(lm.config),
    )


def ends_of(lm: Any, more: Sequence[int | None]) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, or else of its config, and `more`."""
    own = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    own = getattr(lm.config.get_text_config(), "eos_token_id", None) if own is None else own
    listed = own if isinstance(own, list | tuple) else [own]
    return list(dict.fromkeys(end for end in (*listed, *more) if isinstance(end, int)))


# Passages -> (logits of the token behind each sequence [B, V], the cache with what was read)
Forward = Callable[[Passage], "tuple[Float[Tensor, 'B V'], Any]"]


@torch.no_grad()
def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    style: Style,
    device: torch.device,
    any_goes_on: Callable[[bool], bool] = lambda own: own,
    seeds: Sequence[int] | None = None,
    begins: Sequence[Sequence[int]] | None = None,
    pictures: Pictures | None = None,
) -> list[list[int]]:
    """An answer to each prompt (token ids), up to its end token.

    `any_goes_on`: after each token, told whether an answer here goes on; whether there will be another forward, by which all
    ranks make as many. `seeds`: of each prompt, for the numbers by which tokens are drawn: an answer depends on no other in
    the batch, and no generator of the process is touched. `begins`: what a decoder reads before each answer, where an
    encoder reads the prompts. `pictures`: the images of each prompt, for a model that reads images, with or without.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions, behind = _positions(prompts, width, device, pictures)
    images = None
    if pictures is not None:
        laid = [Laid(k, np.asarray(prompt), []) for k, prompt in enumerate(prompts)]
        images = pictures.images(laid).to(device)
    first = None
    if begins is not None:  # as many tokens of each: a tokenizer begins all texts alike
        first = torch.tensor([list(own)[: min(map(len, begins))] for own in begins], device=device)
    before = prompts if begins is None else begins
    room = [min(style.max_new_tokens, (style.positions or 2**62) - len(own)) for own in before]
    draws = _draws(seeds, style) if style.temperature else None
    answers: list[list[int]] = [[] for _ in prompts]
    goes_on = [left > 0 for left in room]
    cache = None
    for number in range(style.max_new_tokens):
        begin = (first, images) if number == 0 else (None, None)
        logits, cache = forward(Passage(ids, mask, positions, cache, *begin))
        logits = _penalised(logits, [[*b, *a] for b, a in zip(before, answers)], style.repetition_penalty)
        chosen = logits.argmax(dim=-1) if draws is None else draw(logits, draws[number].to(device), style)
        for row, token in enumerate(chosen.tolist()):
            if goes_on[row]:
                answers[row].append(token)
                goes_on[row] = token not in style.ends and len(answers[row]) < room[row]
        if not any_goes_on(any(goes_on)):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        # A sequence that is done is read on beside the others, and has no position behind its last.
        positions, behind = behind.clamp(max=(style.positions or 2**62) - 1), behind + 1
    return answers


def _positions(
    prompts: Sequence[Sequence[int]], width: int, device: torch.device, pictures: Pictures | None
) -> tuple[Tensor, Tensor]:
    """Of prompts that end together, [B, T] or [A, B, T], and of one token behind each."""
    if pictures is None:
        found = [torch.arange(len(prompt) + 1)[None] for prompt in prompts]
    else:
        found = [pictures.axes(k, np.asarray(prompt)) for k, prompt in enumerate(prompts)]
    padded = [torch.nn.functional.pad(own, (width + 1 - own.shape[1], 0)) for own in found]
    axes = torch.stack(padded, dim=1).to(device)
    every = axes if len(axes) > 1 else axes[0]
    return every[..., :-1], every[..., -1:]


def _draws(seeds: Sequence[int] | None, style: Style) -> Float[Tensor, "n B"]:
    """Numbers in [0, 1) for the n-th token of each answer."""
    assert seeds is not None, "tokens are drawn by a seed of each prompt"
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        columns.append(torch.rand(style.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(columns, dim=1)


def draw(logits: Float[Tensor, "B V"], number: Float[Tensor, "B"], style: Style) -> Int[Tensor, "B"]:
    """The token at `number` (in [0, 1)) of the tokens' probabilities, the likeliest first, cut to the fewest that have
    `top_p` together."""
    probabilities, tokens = (logits.double() / style.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    sums = probabilities.cumsum(dim=-1)
    kept: Bool[Tensor, "B V"] = sums - probabilities < style.top_p  # the likeliest always
    whole = (probabilities * kept).sum(dim=-1)
    place = (sums <= (number * whole)[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return tokens.gather(1, torch.minimum(place, kept.sum(dim=-1) - 1)[:, None])[:, 0]


def _penalised(logits: Float[Tensor, "B V"], said: Sequence[Sequence[int]], penalty: float) -> Float[Tensor, "B V"]:
    """Less of the tokens that a sequence has (Keskar et al. 2019, arXiv:1909.05858), as transformers has it."""
    if penalty == 1.0:
        return logits
    for row, tokens in enumerate(said):
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        own = logits[row, seen]
        logits[row, seen] = torch.where(own < 0, own * penalty, own / penalty)
    return logits


@contextmanager
def plain_attention(lm: PreTrainedModel) -> Iterator[None]:
    """While open, the model attends to a batch of sequences with padding, as its authors have it, and not to a pack."""
    kernel = alone.implementation(lm, lm.config)
    configs: Any = [part.config for part in lm.modules() if isinstance(getattr(part, "config", None), PretrainedConfig)]
    before = [(config, config._attn_implementation) for config in {id(config): config for config in configs}.values()]
    try:
        for config, _ in before:
            config._attn_implementation = kernel
        yield
    finally:
        for config, packed in before:
            config._attn_implementation = packed


# ---------------------------------------------------------------------------------------------------------------------
# A plain model


class Asked(NamedTuple):
    """How answers are drawn; what is None is as the model's generation config has it."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    greedy: bool = False


def config_of(lm: Any, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> GenerationConfig:
    """The model's own generation config with what is asked for; it stops at the tokenizer's end token too."""
    how: Any = copy.deepcopy(lm.generation_config)
    eos: Any = tokenizer.eos_token_id
    ends = ends_of(lm, [eos])
    how.eos_token_id = ends or None
    how.pad_token_id = how.pad_token_id if how.pad_token_id is not None else next(iter(ends), 0)
    how.max_new_tokens, how.max_length = asked.max_tokens or how.max_new_tokens or MOST_TOKENS, None
    how.num_beams = 1  # several cannot be shown as they grow
    if asked.greedy or asked.temperature == 0:
        how.do_sample, how.temperature, how.top_p, how.top_k = False, None, None, None
    elif asked.temperature is not None or asked.top_p is not None:
        how.do_sample = True
        how.temperature = asked.temperature if asked.temperature is not None else how.temperature
        how.top_p = asked.top_p if asked.top_p is not None else how.top_p
    return how


class _Tokens(BaseStreamer):
    """Hands on each new token; what comes first is the prompt."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue, self._begun = queue, False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._queue.put(int(value.reshape(-1)[0]))
        self._begun = True

    def end(self) -> None:
        pass


def stream(
    lm: Any, ids: Sequence[int], how: GenerationConfig, given: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[int]:
    """The tokens of an answer as they are made, in a thread of its own, which ends when this is closed. `given`: what the
    model reads beside the prompt's tokens, such as the pixels of its images."""
    queue: SimpleQueue[Any] = SimpleQueue()
    stopped = threading.Event()
    prompt = torch.tensor([list(ids)], device=lm.device)
    beside = {name: x.to(lm.device, lm.dtype if x.is_floating_point() else x.dtype) for name, x in given.items()}

    def make() -> None:
        try:
            stopping: Any = StoppingCriteriaList([lambda ids, scores, **_: ids.new_full((1,), stopped.is_set()).bool()])
            with torch.no_grad():
                lm.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=how, streamer=_Tokens(queue),
                    stopping_criteria=stopping, **beside,
                )  # fmt: skip
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = threading.Thread(target=make, name="answer", daemon=True)
    thread.start()
    try:
        while (found := queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()
        thread.join()

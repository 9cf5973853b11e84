"""Model shapes, a tokenizer whose words are one token each, lengths of pairs, and files of random words with those lengths.

Weights are random and nothing is downloaded: speed and memory depend on shapes and lengths only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.workload import SEED

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Lengths = np.ndarray | Sequence[Sequence[int]]  # tokens of (prompt, chosen, rejected) of each pair

# ---------------------------------------------------------------------------------------------------------------------
# Shapes

SHAPES: dict[str, dict[str, Any]] = {
    # Qwen2.5-1.5B
    "1.5B": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960, "tie_word_embeddings": True,
        "max_position_embeddings": 2**21,
    },
    # Llama-3.1-8B with 8 of its 32 layers and its whole head
    "8B slice": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "tie_word_embeddings": False,
        "max_position_embeddings": 2**17,
    },
    # Qwen3-30B-A3B with 3 of its 48 layers: with fp32 masters and a reference 6 would not fit into 78 GiB
    "MoE slice": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 3, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "output_router_logits": True, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        "max_position_embeddings": 2**15,
    },
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # fmt: skip
SMALL_EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}


def config_of(shape: str, tiny: bool) -> PretrainedConfig:
    """The config of a shape, or of a model of its kind that a CPU can run in no time."""
    from transformers import AutoConfig

    settings = dict(SHAPES[shape])
    if tiny:
        settings |= SMALL | (SMALL_EXPERTS if "num_experts" in settings else {})
    special = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}  # as in SPECIAL
    return AutoConfig.for_model(settings.pop("model_type"), **settings, **special)


def model_folder(work: Path, shape: str, tiny: bool, device: str, dtype: str) -> Path:
    """A model of this shape with random weights and its tokenizer, made at the first call."""
    folder = work / f"{shape.replace(' ', '-')}{'-tiny' if tiny else ''}"
    if not (folder / "complete").exists():
        import torch
        from transformers import AutoModelForCausalLM

        config = config_of(shape, tiny)
        torch.manual_seed(SEED)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        word_tokenizer(config.vocab_size).save_pretrained(folder)
        (folder / "complete").touch()
    return folder


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
TEMPLATE = np.array([3, 1, 1])
"""Tokens that this chat template adds to a prompt and to an answer."""


def vocabulary_of(size: int) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """(tokens, merges, words) of a byte-level BPE: a word is a space and syllables such as `ba`, and is one token. Beside a
    Qwen2 model transformers makes a BPE of any tokenizer, so that one that just lists words would not do."""
    from tokenizers import pre_tokenizers

    merges = [(consonant, vowel) for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiouy"]
    syllables = [consonant + vowel for consonant, vowel in merges]
    tokens, words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *syllables], ["Ġ"]
    for stem in words:  # which grows
        for syllable in syllables[: size - len(tokens)]:
            merges.append((stem, syllable))
            words.append(stem + syllable)
            tokens.append(stem + syllable)
        if len(tokens) == size:
            break
    return tokens, merges, words[1:]


def word_tokenizer(size: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges, _ = vocabulary_of(size)
    backend: Any = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special: Any = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "additional_special_tokens": [SPECIAL[1]]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TURNS
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Lengths

DRAWN = 4000
"""Pairs drawn, out of which a step is chosen that is like all of them."""


def like_ultrafeedback(max_length: int, seed: int = SEED) -> np.ndarray:
    """[DRAWN, 3], much as UltraFeedback has them at 2,048: prompts of 105 tokens in the median, 181 in the mean, answers of
    339 and 310; shorter in proportion where `max_length` is less."""
    draws, scale, spread, together = np.random.default_rng(seed), max_length / 2048, 0.7, 0.7
    common, *own = draws.standard_normal((3, DRAWN))
    answers = [np.exp(spread * (together * common + (1 - together**2) ** 0.5 * z) - spread**2 / 2) for z in own]
    prompts = draws.lognormal(np.log(105), 1.04, DRAWN)
    return _fitted(scale * np.array([prompts, 339 * answers[0], 310 * answers[1]]), max_length)


def prompt_heavy(max_length: int, seed: int = SEED) -> np.ndarray:
    """[DRAWN, 3]: prompts four times as long as their answers, which are a tenth of `max_length` in the median."""
    draws = np.random.default_rng(seed)
    answers = draws.lognormal(np.log(max_length / 10), 0.5, (2, DRAWN))
    return _fitted(np.array([4 * answers.mean(axis=0), *answers]), max_length)


def _fitted(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Whole numbers that leave room for the template; the prompt has what it needs first, up to five sixths."""
    room = max_length - TEMPLATE.sum()
    lengths = np.ceil(lengths).astype(int)
    lengths[0] = np.clip(lengths[0], 1, room * 5 // 6)
    lengths[1:] = np.clip(lengths[1:], 1, room - lengths[0])
    return lengths.T


def ordinary_step(lengths: np.ndarray, pairs: int) -> np.ndarray:
    """The `pairs` neighbours whose length, padding and share of prompts are most nearly those of all: every step of a race
    has these lengths, so that a median over its steps stands for the data."""

    def ratios(some: np.ndarray) -> np.ndarray:
        prompt, chosen, rejected = np.moveaxis(some, -1, 0)  # each [steps, pairs]
        useful = (2 * prompt + chosen + rejected).sum(axis=1)
        padded = 2 * pairs * (prompt + np.maximum(chosen, rejected)).max(axis=1)
        return np.stack([useful, padded, useful - prompt.sum(axis=1)], axis=1).astype(float)

    steps = lengths[: len(lengths) // pairs * pairs].reshape(-1, pairs, 3)
    found = ratios(steps)
    return steps[np.abs(np.log(found / found.mean(axis=0))).sum(axis=1).argmin()]


def doubling(shortest: int, longest: int) -> np.ndarray:
    """Pairs whose longer sequence has shortest, 2 x shortest, ... tokens with the template: half of it prompt; the other
    answer is three quarters as long, as answers differ."""
    totals = [shortest * 2**k for k in range(longest.bit_length()) if shortest * 2**k <= longest]
    return np.array([[n // 2, n - n // 2, 3 * (n - n // 2) // 4] for n in totals]) - TEMPLATE


def with_template(lengths: Lengths) -> np.ndarray:
    """What a model gets to see of pairs with so many words."""
    return np.asarray(lengths) + TEMPLATE


def write_pairs(path: Path, vocabulary: int, lengths: Lengths, count: int) -> Path:
    """`count` pairs of random words; pair k has `lengths[k % len(lengths)]` words in its prompt and its answers."""
    draws = np.random.default_rng(SEED)
    words = np.array([word.replace("Ġ", " ") for word in vocabulary_of(vocabulary)[2]])
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            of_pair = lengths[k % len(lengths)]
            texts = ["".join(draws.choice(words, size=n)) for n in of_pair]
            roles = ("user", "assistant", "assistant")
            messages = [[{"role": role, "content": text}] for role, text in zip(roles, texts)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), messages))) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, and (query, key) pairs of causal attention; `lengths` as a model sees them


def separate(lengths: Lengths) -> tuple[int, int, int]:
    """(tokens, scored tokens, attention) where every prompt is computed with each of its answers: what is useful."""
    prompt, chosen, rejected = np.asarray(lengths).T
    first, second = prompt + chosen, prompt + rejected
    attention = (first * (first + 1) + second * (second + 1)).sum() // 2
    return int((first + second).sum()), int((chosen + rejected).sum()), int(attention)


def shared(lengths: Lengths) -> tuple[int, int, int]:
    """The same where every prompt is computed once."""
    prompt = np.asarray(lengths).T[0]
    tokens, scored, attention = separate(lengths)
    return tokens - int(prompt.sum()), scored, attention - int((prompt * (prompt + 1)).sum()) // 2


def padded(lengths: Lengths) -> tuple[int, int, int]:
    """The same where all sequences are as long as the longest."""
    prompt, chosen, rejected = np.asarray(lengths).T
    longest, rows = int((prompt + np.maximum(chosen, rejected)).max()), 2 * len(lengths)
    return rows * longest, int((chosen + rejected).sum()), rows * longest * (longest + 1) // 2

"""What is measured: the models, tokenizers and pairs of the benchmarks, and `Spec`, which says all about one run.

Everything is made once, from fixed seeds, into a work folder: all variants of a benchmark start from the same bytes.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from math import dist, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SINGLE_TURN, MULTI_TURN = "alpacaeval_train.jsonl", "multiturn_train.jsonl"
SEED = 7

Row = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One measured run, for every variant alike. What a variant has no use for (packs, ZeRO) it does not read."""

    model: str
    """Folder of a model and its tokenizer."""
    data: str
    """JSONL file of conversational pairs; step k trains on rows (k-1)P .. kP-1."""
    work: str
    """Folder for what the run writes, and removes again."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo", "loss_type": "sigmoid", "beta": 0.1})
    """The `objective` section of dspref's YAML."""
    pairs_per_step: int = 4
    steps: int = 5
    max_length: int = 512
    """No sequence of `data` is longer: truncation, which variants do differently, never happens."""
    learning_rate: float = 1e-4
    reference: str = "live"
    """live | stored | none"""
    checkpointing: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "auto"
    """dspref's kernel."""
    prefix_sharing: bool | str = "auto"
    tokens_per_pack: int = 2048
    save_every: int | None = None
    """Steps between dspref's checkpoints."""
    zero_stage: int = 0
    """No peer shards anything on one rank; B16 compares the stages."""
    workers: int | None = None
    """Processes in which TRL tokenizes."""
    first_loss: float | None = None
    """What the first loss must be, where policy and reference say."""

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def load_spec(path: str | Path) -> Spec:
    return Spec(**json.loads(Path(path).read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _qwen2(vocabulary: int, hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 16384, "tie_word_embeddings": False,
    }  # fmt: skip


# A is heavy in its head (58 % of the matmul weights), B in its body (91 %), as large models are.
MODELS: dict[str, dict[str, Any]] = {
    "A": _qwen2(32_000, hidden=256, layers=8, intermediate=704),
    "B": _qwen2(4_000, hidden=384, layers=10, intermediate=1056),
    "small": _qwen2(4_000, hidden=128, layers=4, intermediate=352),
    "MoE": _qwen2(4_000, hidden=256, layers=6, intermediate=704)
    | {
        "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "decoder_sparse_step": 1, "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    },
}  # fmt: skip


def model_folder(name: str, work: Path, data: Path = DATA) -> Path:
    """The model called `name` with a tokenizer of its vocabulary, made at the first call."""
    folder = work / f"model-{name}"
    if not (folder / "complete").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(MODELS[name])
        tokenizer = _train_tokenizer(data / SINGLE_TURN, settings["vocab_size"])
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings, **special)
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "complete").touch()
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _train_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with a ChatML template, from the text of the pairs at `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    messages = (message for row in read_rows(path) for column in row.values() for message in column)
    backend.train_from_iterator((message["content"] for message in messages), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


class Tokens(NamedTuple):
    """Token ids of one pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def useful(self) -> int:
        """Tokens of prompt + chosen and of prompt + rejected, without any padding."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, without the columns that are no part of a pair."""
    if not path.exists():
        raise SystemExit(f"{path}: no such file; give the folder of the pairs as --data (see benchmarks/README.md)")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield {column: row[column] for column in ("prompt", "chosen", "rejected")}


def split(tokenizer: PreTrainedTokenizerBase, row: Row) -> Tokens:
    """Render whole conversations, tokenize, and split where the three token sequences part: as TRL and dspref do."""

    def ids(messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(row["prompt"], add_generation_prompt=True)
    chosen, rejected = ids(row["prompt"] + row["chosen"]), ids(row["prompt"] + row["rejected"])
    n = min(len(os.path.commonprefix([prompt, answer])) for answer in (chosen, rejected))
    return Tokens(prompt[:n], chosen[n:], rejected[n:])


def steps_of(spec: Spec, tokenizer: PreTrainedTokenizerBase) -> list[list[Tokens]]:
    """The pairs of every step of a run, in the order of the file."""
    pairs = [split(tokenizer, row) for row in islice(read_rows(Path(spec.data)), spec.steps * spec.pairs_per_step)]
    return [pairs[i : i + spec.pairs_per_step] for i in range(0, len(pairs), spec.pairs_per_step)]


def one_pair_per_prompt(rows: Iterator[Row]) -> Iterator[Row]:
    """The first pair of each prompt, so that no variant gains from a prompt that it meets twice."""
    seen: set[str] = set()
    for row in rows:
        prompt = json.dumps(row["prompt"])
        if prompt not in seen:
            seen.add(prompt)
            yield row


def six_pairs_of_four(rows: Iterator[Row]) -> Iterator[Row]:
    """All six pairs of the first four answers to each prompt that has so many, side by side; which is the better answer
    of a pair makes no difference to its cost."""
    answers: dict[str, dict[str, list]] = defaultdict(dict)
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            answers[json.dumps(row["prompt"])].setdefault(json.dumps(answer), answer)
    for prompt, several in answers.items():
        if len(several) >= 4:
            for chosen, rejected in combinations(list(several.values())[:4], 2):
                yield {"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected}


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are one token each when a space precedes them."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    words = [text[1:] for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    return [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]


def ultrafeedback_lengths(pairs: int, seed: int = SEED) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, [pairs, 3], much as UltraFeedback has them: lognormal, prompts 105 tokens (mean
    180), answers 270 (mean 323); a prompt is at most 512 long, a sequence 1,024."""
    draws = np.random.default_rng(seed)
    prompt = np.minimum(draws.lognormal(np.log(105), 1.04, pairs), 512)
    answers = np.minimum(draws.lognormal(np.log(270), 0.6, (2, pairs)), 1024 - prompt)
    return np.ceil([prompt, *answers]).astype(np.int64).T


def invented_file(model: Path, count: int, lengths: Sequence[tuple[int, int, int]]) -> Path:
    """A file, beside the model, of `count` pairs of random words: pair k has `lengths[k % len(lengths)]` words in its prompt
    and answers, so that any run of len(lengths) pairs costs the same."""
    path = model / f"invented-{len(lengths)}-{count}.jsonl"
    if path.exists():
        return path
    from transformers import AutoTokenizer

    words, draws = words_of(AutoTokenizer.from_pretrained(model)), random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            texts = [" ".join(["", *draws.choices(words, k=length)]) for length in lengths[k % len(lengths)]]
            roles = ("user", "assistant", "assistant")
            messages = [[{"role": role, "content": text}] for role, text in zip(roles, texts)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), messages))) + "\n")
    return path


def pairs_file(
    model: Path,
    count: int,
    per_step: int,
    max_length: int,
    source: Path,
    arrange: Callable[[Iterator[Row]], Iterator[Row]] = one_pair_per_prompt,
    group: int = 1,
) -> Path:
    """A file, beside the model, of `count` pairs that fit into `max_length` tokens of the model's tokenizer: a stretch
    of the source that is like the whole. Of `group` pairs in a row all or none are taken."""
    path = model / f"{source.stem}-{arrange.__name__}-{count}-{per_step}-{max_length}.jsonl"
    if path.exists():
        return path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, kept, tokens = arrange(read_rows(source)), [], []
    while candidates := list(islice(rows, group)):
        pairs = [split(tokenizer, row) for row in candidates]
        if all(pair.longest <= max_length for pair in pairs):
            kept += candidates
            tokens += pairs
    if len(kept) < count:
        raise SystemExit(f"{source}: only {len(kept)} pairs of at most {max_length} tokens; {count} are needed")
    start = most_ordinary(tokens, count, per_step)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept[start : start + count]), encoding="utf-8")
    return path


def most_ordinary(pairs: Sequence[Tokens], count: int, per_step: int) -> int:
    """Where the `count` pairs begin that have most nearly the length, padding and prompts of all: a few steps taken anywhere
    may have much more padding than usual, or much less. As in a measurement, their first step does not count."""

    def shape(some: Sequence[Tokens]) -> list[float]:
        tokens = count_tokens(some[i : i + per_step] for i in range(0, len(some), per_step))
        ratios = (tokens["useful"] / len(some), tokens["padded"] / tokens["useful"], tokens["useful"] / tokens["shared"])
        return [log(ratio) for ratio in ratios]

    whole = shape(pairs)
    starts = range(0, len(pairs) - count + 1, per_step)
    return min(starts, key=lambda start: dist(shape(pairs[start + per_step : start + count]), whole))


def count_tokens(steps: Iterable[Sequence[Tokens]]) -> dict[str, int]:
    """Tokens of some steps: as padded batches hold them, without padding, with every prompt once per pair, and those of the
    answers alone."""
    total: Counter[str] = Counter()
    for pairs in steps:
        total["padded"] += 2 * len(pairs) * max(pair.longest for pair in pairs)
        total["useful"] += sum(pair.useful for pair in pairs)
        total["shared"] += sum(pair.useful - len(pair.prompt) for pair in pairs)
        total["answers"] += sum(pair.useful - 2 * len(pair.prompt) for pair in pairs)
    return dict(total)


def describe(spec: Spec) -> dict[str, int]:
    """The tokens of the steps of a run that count: those after the first."""
    from transformers import AutoTokenizer

    return count_tokens(steps_of(spec, AutoTokenizer.from_pretrained(spec.model))[1:])

"""Pairs of an encoder-decoder model: the prompt is its encoder's text, and each answer one of its decoder's.

Nothing is cut out of a whole here: prompt and answers are tokenized each by itself, as transformers trains such models
(`tokenizer(prompt)`, `tokenizer(text_target=answer)`), answers with the token that the decoder starts with before them. How
that is, goes with the tokenizer, as its chat template does: both say what becomes of a pair's texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dspref.data.rows import Languages, RowError, one_line
from dspref.data.truncate import TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ids of each text, by whether a decoder reads it, and its language.
ApartIds = dict[tuple[bool, str | None], dict[str, np.ndarray]]


class Texts(Protocol):
    """What is told here of a rendered pair."""

    @property
    def prompt(self) -> str: ...
    @property
    def chosen(self) -> str: ...
    @property
    def rejected(self) -> str: ...
    @property
    def label(self) -> bool | None: ...
    @property
    def languages(self) -> Languages | None: ...


NAME_LANGUAGE = "name the column of its code: data.train.columns.{}"


@dataclass(frozen=True)
class Start:
    """The token that a decoder reads before an answer; None: the answer's last one, its language (mBART)."""

    token: int | None


def read_apart(tokenizer: PreTrainedTokenizerBase, start: Start) -> None:
    """From now on the tokenizer is that of an encoder-decoder model."""
    tokenizer.answers_start = start  # type: ignore[attr-defined]


def start_of(tokenizer: PreTrainedTokenizerBase) -> Start | None:
    """How answers start, where prompts are read apart from them."""
    return vars(tokenizer).get("answers_start")


# ---------------------------------------------------------------------------------------------------------- languages


def refuse_languages(tokenizer: PreTrainedTokenizerBase, languages: Languages) -> None:
    """Raise RowError for languages that the tokenizer does not know, and where it needs one that is not given."""
    own: Any = tokenizer
    has = hasattr(own, "src_lang") or hasattr(own, "tgt_lang")
    for field, code in zip(("source_language", "target_language"), languages):
        if code is not None and not has:
            raise RowError(f"columns.{field}", "has no effect: the tokenizer knows no languages", "drop it")
        if code is not None and not _knows(own, code):
            raise RowError(
                field, f"{one_line(code, 40)!r} is no language of the tokenizer", "write its code as the model has it"
            )
    if has and languages[1] is None and getattr(own, "tgt_lang", None) is None:
        reason = "the tokenizer writes a language before or behind an answer, and none is given"
        raise RowError("target_language", reason, NAME_LANGUAGE.format("target_language"))


def _knows(tokenizer: Any, code: str) -> bool:
    known = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "lang_code_to_token", None)
    return code in known if known else tokenizer.convert_tokens_to_ids(code) not in (None, tokenizer.unk_token_id)


@contextmanager
def _speaking(tokenizer: Any, is_target: bool, language: str | None) -> Iterator[None]:
    """While open, the tokenizer takes texts to be in a language."""
    if language is None:
        yield
        return
    name = "tgt_lang" if is_target else "src_lang"
    before = getattr(tokenizer, name)
    setattr(tokenizer, name, language)
    try:
        yield
    finally:
        setattr(tokenizer, name, before)


# --------------------------------------------------------------------------------------------------------------- ids


def ids_apart(renderings: Iterable[Texts | RowError], tokenizer: PreTrainedTokenizerBase) -> ApartIds:
    """The token ids of all texts of rendered pairs, by one call of the tokenizer for each language."""
    texts: dict[tuple[bool, str | None], dict[str, None]] = {}
    for item in renderings:
        if not isinstance(item, RowError) and item.languages is not None:
            source, target = item.languages
            texts.setdefault((False, source), {})[item.prompt] = None
            texts.setdefault((True, target), {}).update({item.chosen: None, item.rejected: None})
    return {key: dict(zip(own, _ids(tokenizer, *key, list(own)))) for key, own in texts.items()}


def asked(rendering: Texts, tokenizer: PreTrainedTokenizerBase, start: Start) -> tuple[list[int], list[int]]:
    """What an encoder reads of a rendered prompt, and what its decoder reads before an answer. Raises RowError."""
    found = split_apart(rendering, ids_apart([rendering], tokenizer), start, tokenizer.all_special_ids)
    if isinstance(found, RowError):
        raise found
    pair = started(found[0], found[-1])
    return pair.prompt.tolist(), opening(pair.chosen, tokenizer)


def _ids(tokenizer: Any, is_target: bool, language: str | None, texts: list[str]) -> list[np.ndarray]:
    how = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    with _speaking(tokenizer, is_target, language):
        found = tokenizer(**{"text_target" if is_target else "text": texts}, **how)["input_ids"]
    eos = tokenizer.eos_token_id
    return [np.asarray(_ended(ids, eos) if is_target else _once(ids, eos), dtype=np.int32) for ids in found]


def _ended(ids: list[int], eos: int) -> list[int]:
    """An answer's tokens with its end token, where the tokenizer does not add it."""
    return _once(ids, eos) if eos in ids else [*ids, eos]


def _once(ids: list[int], eos: int) -> list[int]:
    """Without the second end token that the tokenizer adds to a text that has it."""
    return ids[:-1] if ids[-2:] == [eos, eos] else ids


def split_apart(
    item: Texts, ids: ApartIds, start: Start, special: Sequence[int]
) -> tuple[TokenizedPair, int, int, int] | RowError:
    """(prompt and answers, special tokens at the beginning of the prompt and at its end, the decoder's first token)."""
    assert item.languages is not None
    source, target = item.languages
    prompt, chosen, rejected = (
        ids[False, source][item.prompt],
        ids[True, target][item.chosen],
        ids[True, target][item.rejected],
    )
    if not len(prompt):
        return RowError("prompt", "it has no tokens, and an encoder needs one", "write a prompt")
    if item.label is None and np.array_equal(chosen, rejected):
        return RowError("rejected", "identical to chosen after tokenization")
    plain = ~np.isin(prompt, special)
    head = int(plain.argmax()) if plain.any() else len(prompt)
    tail = int(plain[::-1].argmax()) if plain.any() else 0
    first = int(chosen[-1]) if start.token is None else start.token
    return TokenizedPair(prompt, chosen, rejected), head, tail, first


def opening(answer: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What of an answer is not the model's to choose: the decoder's first token, and the language behind it."""
    own: Any = tokenizer
    fixed = set(own.all_special_ids) - {own.eos_token_id}
    size = next((k for k, token in enumerate(answer.tolist()) if k and token not in fixed), len(answer))
    return answer[:size].tolist()


def started(pair: TokenizedPair, first: int | None) -> TokenizedPair:
    """A pair with what the decoder reads before each answer, which is not scored; None: as it is."""
    if first is None:
        return pair
    answers = [np.concatenate([[first], answer]).astype(np.int32) if len(answer) else answer for answer in pair[1:3]]
    return TokenizedPair(pair.prompt, *answers, *(np.arange(len(answer)) > 0 for answer in answers))

"""A `Preference` becomes a `TokenizedPair`: render, tokenize whole texts, split, truncate.

The prompt, prompt + chosen and prompt + rejected are each rendered and tokenized as a whole, because the
tokens of a whole are not the tokens of its parts. The answers start where the three token sequences part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from dspref import reading
from dspref.data.formats import Preference, RowError, one_line
from dspref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 500
# Keys of a row's chat_template_kwargs that would change what is rendered instead of how.
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)


class TokenizedPair(NamedTuple):
    """Token ids, int32 `[n]` each. The prompt is shared and has at least one token; answers are scored."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class Limits:
    """Token limits, None for none. `truncation_mode`: keep_end | keep_start, of the prompt."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"


def load_tokenizer(
    name_or_path: str,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; `chat_template` is a path or a template's text. Raises ConfigError in one line."""
    from transformers import AutoTokenizer

    key = "model.tokenizer_name_or_path"
    try:
        if os.path.isdir(name_or_path):
            for entry in os.scandir(name_or_path):  # which a library opens by name, and would wait for
                if not entry.is_dir() and os.path.exists(entry.path):
                    reading.refuse_kind(entry.stat(), entry.path, 2**63)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except BaseException as error:  # missing folder, hub, network: each has its own; Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = f"no tokenizer loads from {name_or_path!r}: {one_line(error)}"
        raise ConfigError(f"{key}: {reason}; fix: check the folder or the hub name") from None
    if chat_template is not None:
        tokenizer.chat_template, key = _template_text(chat_template), "model.chat_template"
    own: Any = tokenizer.chat_template
    for template in own.values() if isinstance(own, dict) else [own]:
        _refuse_broken_template(template, key)
    return tokenizer


def _template_text(chat_template: str) -> str:
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        text = reading.read_text(Path(chat_template).expanduser())
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: a ~name of nobody
        said = one_line(error) if isinstance(error, RuntimeError) else reading.words(error)
        reason = f"cannot read {one_line(chat_template)!r}: {said}"
        raise ConfigError(f"model.chat_template: {reason}; fix: give a path to a Jinja file") from None
    if not text.strip():
        raise ConfigError(f"model.chat_template: {one_line(chat_template)!r} is empty; fix: give a path to a Jinja file")
    return text


def _refuse_broken_template(template: Any, key: str) -> None:
    """Raise ConfigError for what is no Jinja: once, and not for every row that is rendered with it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if not template:
        return
    try:
        _compile_jinja_template(template)
    except Exception as error:  # Python's own too, of what Jinja makes of it
        number = getattr(error, "lineno", None)
        place = f"line {number}: " if number else ""
        reason = f"the chat template is no valid Jinja: {place}{one_line(error)}"
        raise ConfigError(f"{key}: {reason}; fix: mend it, or give another by model.chat_template") from None


def encode(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[TokenizedPair | RowError]:
    """Tokenize and truncate; result i is the pair of preference i, or why it cannot be one."""
    return [item if isinstance(item, RowError) else _truncated(item, limits) for item in tokenize(preferences, tokenizer)]


def _truncated(pair: TokenizedPair, limits: Limits) -> TokenizedPair | RowError:
    try:
        return truncate(pair, limits)
    except RowError as error:
        return error


# ---------------------------------------------------------------------------------------- render and tokenize


class Rendering(NamedTuple):
    """The three texts of one pair. `special` tells whether the tokenizer adds its own special tokens."""

    texts: tuple[str, str, str]
    special: bool


def tokenize(preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPair | RowError]:
    """Tokenize without limits. Raises DataError when chat rows meet a tokenizer without a chat template."""
    return split([_render(preference, tokenizer) for preference in preferences], tokenizer)


def render(preference: Preference | RowError, tokenizer: PreTrainedTokenizerBase) -> Rendering | RowError:
    """The texts of a pair, or why there are none. Raises as `tokenize` does."""
    return _render(preference, tokenizer) if isinstance(preference, Preference) else preference


def split(renderings: Sequence[Rendering | RowError], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPair | RowError]:
    """Token ids of rendered pairs, by one call of the tokenizer for each kind of them."""
    ids = {special: _batch_ids(renderings, tokenizer, special) for special in (False, True)}
    return [item if isinstance(item, RowError) else _split(*next(ids[item.special])) for item in renderings]


def _render(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Rendering | RowError:
    if isinstance(preference.prompt, str):
        eos = cast("str | None", tokenizer.eos_token) or ""
        answers = (cast(str, preference.chosen), cast(str, preference.rejected))
        chosen, rejected = (preference.prompt + (text if text.endswith(eos) else text + eos) for text in answers)
        return Rendering((preference.prompt, chosen, rejected), special=True)
    if tokenizer.chat_template is None:
        reason = "the rows are conversations and the tokenizer has no chat template"
        raise DataError(f"model.chat_template: {reason}; fix: set model.chat_template to a Jinja file")
    try:
        return _render_chat(preference, tokenizer)
    except Exception as error:  # a template is a program: it may raise anything
        return error if isinstance(error, RowError) else RowError("chat_template", f"{type(error).__name__}: {error}")


def _render_chat(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    prompt, chosen, rejected = (
        cast("list[dict[str, Any]]", part) for part in (preference.prompt, preference.chosen, preference.rejected)
    )
    kwargs = preference.chat_template_kwargs or {}
    if reserved := sorted(RESERVED_KWARGS & set(kwargs)):
        raise RowError("chat_template_kwargs", f"{reserved[0]!r} is not for a row to set", "remove the key")

    def render(messages: list[dict[str, Any]], **ending: bool) -> str:
        text = tokenizer.apply_chat_template(messages, tools=preference.tools, tokenize=False, **ending, **kwargs)
        return cast(str, text)

    unfinished = prompt[-1]["role"] == "assistant"
    opening = render(prompt, continue_final_message=True) if unfinished else render(prompt, add_generation_prompt=True)
    return Rendering((opening, render(prompt + chosen), render(prompt + rejected)), special=False)


def _batch_ids(
    renderings: Sequence[Rendering | RowError], tokenizer: PreTrainedTokenizerBase, special: bool
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of the three texts of every rendering of one kind, from one call of the tokenizer."""
    chosen = (item for item in renderings if isinstance(item, Rendering) and item.special == special)
    texts = [text for item in chosen for text in item.texts]
    if not texts:
        return iter(())
    # Rows of one prompt repeat it, and pairs made of several answers repeat those.
    distinct = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    ids = _ids(tokenizer, list(distinct), special)
    if special:
        ids = _without_doubles(ids, tokenizer)
    of_texts = [ids[distinct[text]] for text in texts]
    return zip(of_texts[0::3], of_texts[1::3], of_texts[2::3], strict=True)


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts[: 1 if _is_plain(tokenizer) else None],
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    if not _is_plain(tokenizer):
        return encoded["input_ids"]
    # The call above has set the backend up; asked directly, it leaves out where each token lies in the text.
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer does nothing beside what its Rust backend does."""
    from transformers import PreTrainedTokenizerFast

    own = getattr(type(tokenizer), "_encode_plus", None)
    return own is not None and own is getattr(PreTrainedTokenizerFast, "_encode_plus", None)


def _without_doubles(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Drop what the tokenizer adds to a text that has it: a BOS written there, the EOS of `_render`."""
    (bare,), (full,) = _ids(tokenizer, ["a"], special=False), _ids(tokenizer, ["a"], special=True)
    bos, eos = cast("tuple[int | None, int | None]", (tokenizer.bos_token_id, tokenizer.eos_token_id))
    if eos is not None and full[-1:] == [eos] != bare[-1:]:
        ids = [tokens[:-1] for tokens in ids]
    if bos is not None and full[:1] == [bos] != bare[:1]:
        ids = [tokens[1:] if tokens[:2] == [bos, bos] else tokens for tokens in ids]
    return ids


# ----------------------------------------------------------------------------------------- split and truncate


def _split(prompt: list[int], with_chosen: list[int], with_rejected: list[int]) -> TokenizedPair | RowError:
    """Split where the prompt stops being a prefix of both full texts, but after at least one token."""
    prompt_ids, chosen, rejected = (np.asarray(ids, dtype=np.int32) for ids in (prompt, with_chosen, with_rejected))
    boundary = min(_common_prefix(prompt_ids, chosen), _common_prefix(prompt_ids, rejected))
    if boundary == 0:
        # The first token of a text has no predecessor that could predict it. It may differ between the sides.
        if not np.array_equal(chosen[:1], rejected[:1]):
            return RowError("prompt", "no token precedes the answers", "write a prompt, or use a tokenizer with BOS")
        boundary = 1
    if np.array_equal(chosen, rejected):
        return RowError("rejected", "identical to chosen after tokenization")
    for field, ids in (("chosen", chosen), ("rejected", rejected)):
        if len(ids) <= boundary:
            return RowError(field, "no token of the answer is left to score")
    return TokenizedPair(chosen[:boundary], chosen[boundary:], rejected[boundary:])


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size


def truncate(pair: TokenizedPair, limits: Limits) -> TokenizedPair:
    """Cut a pair to the limits; both sides keep the same prompt, and answers lose their end.

    Raises RowError when a side keeps no scored token, or (droppable) when both sides become equal.
    """
    prompt, chosen, rejected = pair
    if limits.max_prompt_length is not None:
        prompt = _kept(prompt, limits.max_prompt_length, limits.truncation_mode)
    if limits.max_completion_length is not None:
        chosen, rejected = chosen[: limits.max_completion_length], rejected[: limits.max_completion_length]
    if limits.max_length is not None:
        longer = max(len(chosen), len(rejected))
        if len(prompt) + longer > limits.max_length:
            prompt = _kept(prompt, limits.max_length - longer, limits.truncation_mode)
            room = max(0, limits.max_length - len(prompt))
            chosen, rejected = chosen[:room], rejected[:room]
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) == 0:
            raise RowError(field, "no scored token is left after truncation", "raise data.max_length")
    if np.array_equal(chosen, rejected):
        raise RowError("rejected", "identical to chosen after truncation", "raise data.max_length", droppable=True)
    return TokenizedPair(prompt, chosen, rejected)


def _kept(prompt: np.ndarray, size: int, truncation_mode: str) -> np.ndarray:
    size = min(len(prompt), max(1, size))
    return prompt[:size] if truncation_mode == "keep_start" else prompt[len(prompt) - size :]


# ----------------------------------------------------------------------------------------------------- digest


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that turns text into tokens; the folder it came from does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Every padded or truncated call leaves its settings in there, and sets them anew.
        backend.no_truncation()
        backend.no_padding()
        content = hashlib.sha256(backend.to_str().encode()).hexdigest()
    else:
        content = sorted(tokenizer.get_vocab().items())
    flags = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")}
    parts = {
        "class": type(tokenizer).__name__,
        "content": content,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "flags": flags,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

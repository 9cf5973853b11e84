"""A `Preference` becomes a `TokenizedPair`: render, tokenize whole texts, split, mark what is scored.

The prompt, prompt + chosen and prompt + rejected are each rendered and tokenized as a whole, because the
tokens of a whole are not the tokens of its parts. The answers start where the three token sequences part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from dspref import hub, reading
from dspref.data.apart import Start, ids_apart, split_apart, start_of, started
from dspref.data.formats import Preference, RowError, one_line, to_preference
from dspref.data.labelled import of_one
from dspref.data.manners import Learned
from dspref.data.pieces import Encoder
from dspref.data.sight import Sight, sight_of
from dspref.data.template import Rendering, render
from dspref.data.truncate import Limits, TokenizedPair, labelled, refuse_cut_images, truncate, written
from dspref.data.turns import NO_END, Turn
from dspref.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    name_or_path: str,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; `chat_template`: a path, or a template's text. Raises ConfigError in one line."""
    from transformers import AutoTokenizer

    key = "model.tokenizer_name_or_path"
    try:
        if not os.path.isdir(name_or_path) and hub.ID.fullmatch(name_or_path):
            name_or_path = str(hub.snapshot(name_or_path, revision, (*hub.TOKENIZER, *["*.py"] * trust_remote_code)))
        if os.path.isdir(name_or_path):
            for entry in os.scandir(name_or_path):  # which a library opens by name, and would wait for
                if not entry.is_dir() and os.path.exists(entry.path):
                    reading.refuse_kind(entry.stat(), entry.path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except BaseException as error:  # missing folder, hub, network: each has its own; Rust's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interruption
        reason = f"no tokenizer loads from {name_or_path!r}: {one_line(error)}"
        raise ConfigError(f"{key}: {reason}; fix: check the folder or the hub name") from None
    if chat_template is not None:
        tokenizer.chat_template, key = _template_text(chat_template), "model.chat_template"
    if isinstance(tokenizer.chat_template, str):
        # A mark of the byte order is an editor's, and would stand before every prompt.
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
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


class Whole(NamedTuple):
    """A pair before truncation; the first `head` tokens of its prompt are the template's own, before any content, and the
    last `tail` ones an encoder's. `first`: what a decoder reads before an answer, where prompts are read apart."""

    pair: TokenizedPair
    head: int
    tail: int = 0
    first: int | None = None
    images: np.ndarray | None = None
    """bool [n]: which of the prompt's tokens are those of images, where it has some."""

    def cut(self, limits: Limits, beside: int = 0) -> TokenizedPair:
        """The pair as it is trained on. Raises RowError as `truncate` does. `beside`: tokens of the longest answer to the
        prompt in other pairs of the row, which is to stay the same in all where it is cut."""
        pair = truncate(self.pair, limits, self.head, self.tail, beside if limits.on_overlong == "truncate" else 0)
        if self.images is not None:
            refuse_cut_images(self.images, len(pair.prompt), limits, self.head)
        return started(pair, self.first)

    @property
    def longest(self) -> int:
        """Tokens of the longer answer."""
        return max(len(self.pair.chosen), len(self.pair.rejected))

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt, chosen and rejected, with the decoder's first."""
        prompt, *answers = map(len, self.pair[:3])
        return [prompt, *(n and n + (self.first is not None) for n in answers)]


def encode(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, limits: Limits, scored: str = "assistant"
) -> list[TokenizedPair | RowError]:
    """Tokenize and truncate; result i is the pair of preference i, or why it cannot be one.

    Raises DataError when chat rows meet a tokenizer without a chat template.
    """
    learned, encoder = Learned(tokenizer), Encoder(tokenizer)
    renderings = [render(preference, tokenizer, learned, scored) for preference in preferences]
    return [_truncated(item, limits) for item in split(renderings, ids_of(renderings, encoder), encoder)]


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits | None = None,
    scored: str = "assistant",
) -> list[TokenizedPair]:
    """Rows of two answers, in any layout that a file may have, as a run tokenizes them. Raises RowError for the first that
    is no pair."""
    chat_model = tokenizer.chat_template is not None
    found = encode([to_preference(row, chat_model=chat_model) for row in rows], tokenizer, limits or Limits(), scored)
    for pair in found:
        if isinstance(pair, RowError):
            raise pair
    return found  # type: ignore[return-value]


def _truncated(item: Whole | RowError, limits: Limits) -> TokenizedPair | RowError:
    if isinstance(item, RowError):
        return item
    try:
        return item.cut(limits)
    except RowError as error:
        return error


# ---------------------------------------------------------------------------------------------------------------- split


# int32 [n] of each text that some renderings hold, by whether the tokenizer adds its special tokens, and by text; where
# prompts are read apart, by who reads it.
Ids = dict[Any, dict[str, np.ndarray]]


def ids_of(renderings: Sequence[Rendering | RowError], encoder: Encoder) -> Ids:
    """The token ids of all texts of rendered pairs, by one call of the tokenizer for each kind of them."""
    if encoder.start is not None:
        return ids_apart(renderings, encoder.tokenizer)
    return {special: _ids(renderings, encoder, special) for special in (False, True)}


def split(renderings: Sequence[Rendering | RowError], ids: Ids, encoder: Encoder) -> list[Whole | RowError]:
    """Rendered pairs as token ids: prompt and answers, with what is scored of these."""
    found = [item if isinstance(item, RowError) else _split_one(item, ids, encoder) for item in renderings]
    return found if encoder.sight is None else [_seen(*both, encoder.sight) for both in zip(renderings, found)]


def _split_one(item: Rendering, ids: Ids, encoder: Encoder) -> Whole | RowError:
    found = _apart(item, ids, encoder) if encoder.start is not None else _split(item, ids[item.special], encoder)
    return of_one(found) if isinstance(found, RowError) and item.label is not None else found


def _seen(item: Rendering | RowError, whole: Whole | RowError, sight: Sight) -> Whole | RowError:
    """A pair with all tokens of the images of its prompt."""
    if isinstance(item, RowError) or isinstance(whole, RowError):
        return whole
    if any((answer == sight.token).any() for answer in whole.pair[1:3]):
        return RowError("images", "an image token in an answer", f"take {sight.word!r} out of the text")
    try:
        prompt, images = sight.expanded(whole.pair.prompt, item.images)
    except RowError as error:
        return error
    return whole._replace(pair=whole.pair._replace(prompt=prompt), images=images if item.images else None)


def _apart(item: Rendering, ids: Ids, encoder: Encoder) -> Whole | RowError:
    found = split_apart(item, ids, cast(Start, encoder.start), encoder.tokenizer.all_special_ids)
    return found if isinstance(found, RowError) else Whole(labelled(found[0], item.label), *found[1:])


def _ids(renderings: Sequence[Rendering | RowError], encoder: Encoder, special: bool) -> dict[str, np.ndarray]:
    """int32 [n] of every text that renderings of one kind hold."""
    texts: dict[str, None] = {}
    for item in renderings:
        if isinstance(item, Rendering) and item.special == special:
            texts |= dict.fromkeys((item.prompt, item.chosen, item.rejected))
            if not special:
                texts[item.head] = None
                turns = [turn for side in item.turns or () for turn in side]
                texts |= dict.fromkeys(text for turn in turns for text in (turn.opening, turn.closing) if text is not None)
    return dict(zip(texts, encoder(list(texts), special))) if texts else {}


def _split(item: Rendering, ids: dict[str, np.ndarray], encoder: Encoder) -> Whole | RowError:
    """Split where the prompt stops being a prefix of both full texts, but after at least one token."""
    prompt, chosen, rejected = ids[item.prompt], ids[item.chosen], ids[item.rejected]
    boundary = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    if boundary == 0:
        # The first token of a text has no predecessor that could predict it. It may differ between the sides.
        if not np.array_equal(chosen[:1], rejected[:1]):
            if len(prompt) and item.special:
                reason = "its tokens become others where an answer follows, so that none precedes the answers"
                return RowError(
                    "prompt", reason, "begin the answers with a space or a new line, or use a tokenizer with BOS"
                )
            return RowError("prompt", "no token precedes the answers", "write a prompt, or use a tokenizer with BOS")
        boundary = 1
    if item.label is None and np.array_equal(chosen, rejected):
        return RowError("rejected", "identical to chosen after tokenization")
    answers, masks = [], []
    for k, (field, full) in enumerate((("chosen", chosen), ("rejected", rejected))):
        answer, mask = full[boundary:], None
        if item.turns is not None:
            mask = _mask(item.turns[k], full, boundary, ids, encoder)
            if mask is None:
                return NO_END
            answer, mask = written(answer, mask)
        if not len(answer):
            return RowError(field, "no token of the answer is left to score")
        answers.append(answer)
        masks.append(mask)
    if item.label is None and np.array_equal(*answers):
        return RowError("rejected", "identical to chosen after tokenization")
    pair = labelled(TokenizedPair(chosen[:boundary], *answers, *masks), item.label)
    return Whole(pair, _head(item, ids, chosen[:boundary], encoder))


def _head(item: Rendering, ids: dict[str, np.ndarray], prompt: np.ndarray, encoder: Encoder) -> int:
    begins = int(prompt[0] == encoder.special_ids()[0])
    if not item.special:
        return max(begins, _common_prefix(ids[item.head], prompt))
    return begins


def _mask(
    turns: Sequence[Turn], full: np.ndarray, boundary: int, ids: dict[str, np.ndarray], encoder: Encoder
) -> np.ndarray | None:
    """bool [n - boundary]: the tokens that the model writes, from the end of each turn's opening to the token that ends it;
    None where that is missing."""
    mask = np.zeros(len(full), dtype=bool)
    for turn in turns:
        start = _behind(ids[turn.opening], full, encoder)
        stop = len(full) if turn.closing is None else _common_prefix(ids[turn.closing], full)
        ends = start + np.flatnonzero(np.logical_or.reduce([full[start:stop] == end for end in encoder.ids_of(turn.ends)]))
        if len(ends) <= turn.inside:
            return None
        mask[start : ends[turn.inside if turn.closing is None else -1] + 1] = True
    return mask[boundary:]


def _behind(opening: np.ndarray, full: np.ndarray, encoder: Encoder) -> int:
    """How many tokens of a text its opening takes up. They are others than the opening's own where a word follows its end,
    such as two line ends that are one token by themselves; a token with text of both is the answer's."""
    stop = _common_prefix(opening, full)
    left = "".join(encoder.names_of(opening[stop:]))
    for token in encoder.names_of(full[stop : stop + len(left)]):
        if not left.startswith(token):
            break
        left, stop = left[len(token) :], stop + 1
    return stop


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size


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
    if (start := start_of(tokenizer)) is not None:
        parts["answers"] = ["apart", start.token, getattr(tokenizer, "src_lang", None), getattr(tokenizer, "tgt_lang", None)]
    if (sight := sight_of(tokenizer)) is not None:
        parts["images"] = [sight.token, sight.digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

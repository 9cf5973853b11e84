"""Token ids of texts, each distinct piece between two special tokens encoded once.

A tokenizer of the Rust library first cuts a text at its added tokens and then treats each piece by itself: the ids of a
text are those of its pieces, one behind the other. Prompts stand in both texts of a pair, so most pieces come several times.
Where a tokenizer does more than that, or a sample of the texts shows a difference, whole texts are encoded. What was encoded
lately is remembered: data sets repeat prompts and answers from row to row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dspref.data.apart import start_of
from dspref.data.sight import sight_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the texts of a call, so many are encoded whole as well.
SAMPLE = 4
# Bytes of pieces that are remembered, about: a piece has so many beside its characters and ids.
REMEMBERED, BYTES_PER_PIECE = 2**26, 300
PROBES = ("word", " word", "\nword two", "  ", "\n\n", "é漢字", "a.b 12 'tis")


class Encoder:
    """Texts -> token ids, by one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = self._tokenizer = cast(Any, tokenizer)
        self.start = start_of(tokenizer)
        """How answers start, where prompts are read apart from them: whole texts then, by `apart`."""
        self.sight = sight_of(tokenizer)
        """How images are read, where they are."""
        self._plain = _is_plain(tokenizer)
        self._cuts = _cuts(tokenizer) if self._plain else {}
        longest_first = sorted(self._cuts, key=len, reverse=True)
        self._at_cuts = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # In front of a piece that does not begin its text, for tokenizers that treat a beginning otherwise.
        self._before: str = ""
        self._known: dict[str, np.ndarray] = {}
        self._room = REMEMBERED
        if self._cuts:
            self._settle()

    def __call__(self, texts: Sequence[str], special: bool) -> list[np.ndarray]:
        """int32 [n] of each text; `special`: with the tokens that the tokenizer adds, none of them twice."""
        distinct = list(dict.fromkeys(texts))
        if special:
            found = [np.asarray(ids, dtype=np.int32) for ids in _without_doubles(self._whole(distinct, True), self)]
        else:
            found = self._joined(distinct) if self._cuts else self._arrays(distinct)
        of_text = dict(zip(distinct, found, strict=True))
        return [of_text[text] for text in texts]

    def bare_and_full(self) -> tuple[list[int], list[int]]:
        """Ids of the text `a` without and with the tokens that the tokenizer adds."""
        (bare,), (full,) = self._whole(["a"], False), self._whole(["a"], True)
        return bare, full

    def special_ids(self) -> tuple[int | None, int | None]:
        """(BOS, EOS)."""
        return self._tokenizer.bos_token_id, self._tokenizer.eos_token_id

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens by their names."""
        return [self._tokenizer.convert_tokens_to_ids(token) for token in tokens]

    def names_of(self, ids: np.ndarray) -> list[str]:
        """Tokens as the tokenizer's vocabulary writes them: together, the same for a text however it is cut."""
        return self._tokenizer.convert_ids_to_tokens(ids.tolist()) if len(ids) else []

    def _settle(self) -> None:
        """Choose what stands before a piece; without any that is exact, encode whole texts."""
        (cut,) = list(self._cuts)[:1]
        texts = [cut.join(("", probe, probe)) for probe in PROBES] + [cut.join((probe, "")) for probe in PROBES]
        whole = self._whole(texts, special=False)
        for self._before in ("", cut):
            self._known = {}
            if [ids.tolist() for ids in self._pieced(texts)] == whole:
                return
        self._cuts = {}

    def _joined(self, texts: list[str]) -> list[np.ndarray]:
        found = self._pieced(texts)
        sample = range(0, len(texts), max(1, len(texts) // SAMPLE))
        if any(found[i].tolist() != ids for i, ids in zip(sample, self._whole([texts[i] for i in sample], False))):
            self._cuts = {}
            return self._arrays(texts)
        return found

    def _pieced(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text from those of its pieces: [text, added token, text, ..., text]."""
        parts = [self._at_cuts.split(text) for text in texts]
        first = dict.fromkeys(part[0] for part in parts if part[0])
        self._learn({piece: None for part in parts for piece in part[2::2] if piece and piece not in self._known})
        of_first, known, cuts = dict(zip(first, self._arrays(list(first)))), self._known, self._cuts
        found = []
        for part in parts:
            ids = [of_first[part[0]]] if part[0] else []
            for cut, piece in zip(part[1::2], part[2::2]):
                ids.append(cuts[cut])
                if piece:
                    ids.append(known[piece])
            found.append(np.concatenate(ids) if ids else np.empty(0, dtype=np.int32))
        if self._room < 0:
            self._known, self._room = {}, REMEMBERED
        return found

    def _learn(self, pieces: dict[str, None]) -> None:
        """Encode pieces that follow an added token."""
        skipped = int(bool(self._before))
        self._known |= zip(pieces, (ids[skipped:] for ids in self._arrays([self._before + piece for piece in pieces])))
        self._room -= sum(2 * len(piece) + BYTES_PER_PIECE for piece in pieces)

    def _arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._whole(texts, special=False)]

    def _whole(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        tokenizer = self._tokenizer
        encoded = tokenizer(
            texts[: 1 if self._plain else None],
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        if not self._plain:
            return encoded["input_ids"]
        # The call above has set the backend up; asked directly, it leaves out where each token lies in the text.
        return [
            encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        ]


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer does nothing beside what its Rust backend does."""
    from transformers import PreTrainedTokenizerFast

    own = getattr(type(tokenizer), "_encode_plus", None)
    return own is not None and own is getattr(PreTrainedTokenizerFast, "_encode_plus", None)


def _cuts(tokenizer: Any) -> dict[str, np.ndarray]:
    """Added tokens at which every text is cut, whatever stands beside them, each with its id as int32 [1]."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    if getattr(tokenizer, "split_special_tokens", False):
        return {}
    plain = {i for i, token in added.items() if not (token.normalized or token.lstrip or token.rstrip or token.single_word)}
    others = [token.content for i, token in added.items() if i not in plain]
    contents = {i: added[i].content for i in plain}
    return {
        content: np.array([i], dtype=np.int32)
        for i, content in contents.items()
        if content and not any(_overlap(content, other) for other in others)
    }


def _overlap(left: str, right: str) -> bool:
    """Whether two tokens could share characters of a text."""
    if left in right or right in left:
        return True
    return any(left.endswith(right[:n]) or right.endswith(left[:n]) for n in range(1, min(len(left), len(right))))


def _without_doubles(ids: list[list[int]], encoder: Encoder) -> list[list[int]]:
    """Drop what the tokenizer adds to a text that has it: a BOS written there, the EOS of a text row."""
    (bare, full), (bos, eos) = encoder.bare_and_full(), encoder.special_ids()
    if eos is not None and full[-1:] == [eos] != bare[-1:]:
        ids = [tokens[:-1] for tokens in ids]
    if bos is not None and full[:1] == [bos] != bare[:1]:
        ids = [tokens[1:] if tokens[:2] == [bos, bos] else tokens for tokens in ids]
    return ids

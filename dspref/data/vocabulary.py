"""Tokenizers as their files say them: AutoTokenizer makes another one of some, by the type of the model beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspref import reading
from dspref.data.tokenize import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
# By one of these a folder is known to hold a tokenizer.
FILES = (FILE, "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in FILES)


def written(folder: str) -> dict[str, int] | None:
    """Token -> id, as the folder's tokenizer.json says; None where there is no such file, or it cannot be read."""
    try:
        said = reading.read_json(Path(folder) / FILE, reading.TABLE, strict=False)
        model, added = said["model"]["vocab"], said.get("added_tokens") or []
        vocabulary = {row[0]: k for k, row in enumerate(model)} if isinstance(model, list) else dict(model)
        return vocabulary | {token["content"]: token["id"] for token in added}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def vocabulary(name_or_path: str, trust_remote_code: bool = False) -> dict[str, int]:
    """Token -> id of a tokenizer, by its own file where that is here. Raises ConfigError where there is none."""
    own = written(name_or_path)
    return own if own is not None else load_tokenizer(name_or_path, trust_remote_code=trust_remote_code).get_vocab()


def load_as_written(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id as its own file has it. Raises ConfigError where none loads."""
    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    own = written(folder)
    if own is None or own == tokenizer.get_vocab():
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)

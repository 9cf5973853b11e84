"""What a conversion leaves to a person: values that are computed there, or that theirs does not say. They are FILL_IN in the
result, which `dspref check` refuses until they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dspref.config import hints
from dspref.config.absent import NOT_NEEDED
from dspref.config.foreign import FOREIGN_KEYS, place_of
from dspref.config.hints import FILL_IN
from dspref.config.sections import section_at
from dspref.convert.draft import Draft
from dspref.convert.theirs import PARSERS
from dspref.secrets import redact
from dspref.terminal import shown

LONGEST = 160
BATCH = {
    "per_device_train_batch_size", "per_gpu_train_batch_size", "micro_batch_size", "batch_size", "train_batch_size",
    "train.batch_size", "gradient_accumulation_steps",
}  # fmt: skip
# `data.train: {path: ..., split: ...}` -> the source, and the key of it.
OF_SOURCE = re.compile(r"(data\.(?:train|eval)): \{(?:path: \.\.\., )?(\w+): [^{]*\}\Z")
# What stands behind FILL_IN/ where a path is wanted that is looked at before a run.
WORDS = {"name_or_path": "model", "tokenizer_name_or_path": "tokenizer", "chat_template": "template.jinja", "path": "pairs"}


def fill_in(draft: Draft) -> None:
    """Write FILL_IN, with their code above it, for what is computed there; what has no place here is told at the foot."""
    for key, code in draft.unread.items():
        said = f"{draft.name(key)}: {_short(code)} -- is computed there"
        path = home(draft, key)
        path = None if path == "train.eval_every" and draft.get("data.eval") is None else path
        if path and (draft.get(path) is None or not _is_given(draft, path) or key in BATCH):
            if path not in draft.opened:
                _forget(draft, path)
                draft.opened.append(path)
            word = WORDS.get(path.split(".")[-1])
            said += f"; here it is per GPU x accumulated x {draft.gpus} GPUs" if key in BATCH else ""
            draft.put(path, f"{FILL_IN}/{word}" if word else FILL_IN, f"{said}; write the value")
        else:
            draft.leave_code(key, _short(code), _reason(draft, key, path))
    for path, (value, said) in draft.later.items():
        draft.put(path, value, said)
    for key, text in draft.remarks.items():
        path = home(draft, key)
        if path and draft.get(path) is not None:
            draft.note(path, f"{draft.name(key)}: {_short(text)}")


def leave_open(draft: Draft, path: str, reason: str) -> None:
    """Tell of what is computed there for a key that this config may not have."""
    for key, code in draft.unread.items():
        if home(draft, key) == path:
            draft.leave_code(key, _short(code), f"is computed there; {path}: {reason}")


def home(draft: Draft, key: str) -> str | None:
    """The one key of ours that one of theirs sets, where this config may have it."""
    if key in BATCH:
        return "train.pairs_per_step"
    place, homes = place_of(key), hints.homes_of(key)
    source = OF_SOURCE.match(FOREIGN_KEYS.get(key, ""))
    path = ".".join(place[0]) if place else f"{source[1]}.{source[2]}" if source else homes[0] if len(homes) == 1 else None
    if path is None or (path.startswith("model.lora.") and not isinstance(draft.get("model.lora"), Mapping)):
        return None
    *above, last = path.split(".")
    if above[:1] == ["data"] and len(above) > 1 and isinstance(draft.get(".".join(above)), list):
        return None
    section = section_at(tuple(above), draft.document)
    return path if section and last in section.model_fields else None


def open_paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys of a document that are still to be filled in."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(value, str) and (value == FILL_IN or value.startswith(f"{FILL_IN}/")):
            yield ".".join((*path, str(key)))
        else:
            yield from open_paths(value, (*path, str(key)))


def _is_given(draft: Draft, path: str) -> bool:
    """Whether a key of ours has its value of one that theirs gives, and not of what their trainer takes by itself."""
    return path in draft.opened or any(key not in draft.unread for key in draft.sources(path, above=False))


def _forget(draft: Draft, path: str) -> None:
    """What is told of the value that a key had."""
    keys = tuple(path.split("."))
    for depth in range(1, len(keys) + 1):
        draft.notes[keys[:depth]] = [
            text for text in draft.notes.get(keys[:depth], []) if "theirs does not say" not in text and depth < len(keys)
        ]


def _reason(draft: Draft, key: str, path: str | None) -> str:
    if key in PARSERS:
        return "has its settings from the command line: convert that, in a shell script, or the YAML file that it names"
    if why := NOT_NEEDED.get(key):
        return f"is computed there; {why}"
    if path and draft.get(path) is not None and (sources := draft.sources(path, above=False)):
        return f"is computed there; {path} has the value of {draft.name(sources[0])}"
    where = FOREIGN_KEYS.get(key) or " or ".join(hints.homes_of(key))
    return "is computed there; " + (f"in dspref this is {where}" if where else "write the value where it belongs")


def _short(code: str) -> str:
    text = " ".join(shown(redact(code)).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."

"""The data of another trainer's config: its data sets with splits, weights and columns become sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.convert.draft import Draft, as_list, is_empty, of_pairs

Source = dict[str, Any]

# axolotl's `type: STRATEGY.NAME` -> columns of such rows.
AXOLOTL: dict[str, dict[str, str]] = {
    "intel": {"prompt": "question"},
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "ultra": {}, "prompt_pairs": {}, "argilla_chat": {}, "default": {}, "nectar": {},
}  # fmt: skip

# The same of its strategies of single answers, which read `completion` and `label`.
AXOLOTL_KTO: dict[str, dict[str, str]] = {"argilla": {"prompt": "instruction"}, "intel": {"prompt": "question"}}
# What a source calls its texts; of single answers.
PAIRED, SINGLE = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
# Conversations that are found by these names.
CONVERSATIONS = ("messages", "conversations", "conversation")


def data(draft: Draft) -> None:
    """data.train and data.eval."""
    train, held_out = READERS[draft.dialect](draft)
    if not train and draft.dialect != "trl":
        train, held_out = _plain(draft)
    columns = {ours: draft.take(f"{ours}_key", f"data.{ours}_key") for ours in PAIRED}
    if _is_single(draft):
        columns |= _keys_of_single(draft)
    columns = {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}
    most = draft.take("max_samples", "max_train_samples", "data.max_samples")
    if most is not None and (isinstance(most, bool | str | list | dict) or not 0 < most < 1e6):
        if not isinstance(most, int | float) or isinstance(most, bool):
            draft.leave("max_samples", most, "give it to a source: data.train: {path: ..., max_samples: ...}")
        most = None
    for source in train:
        if columns:
            source.setdefault("columns", columns)
        if most is not None:
            source.setdefault("max_samples", int(most))
    if len(train) > 1 and most is not None:
        draft.note("data.train", "max_samples is of each source")
    for path, sources in (("data.train", train), ("data.eval", held_out)):
        sources = [{key: value for key, value in source.items() if not is_empty(value)} for source in sources]
        if path == "data.eval" and len(sources) > 1:
            draft.put(path, {_name(source, number): source for number, source in enumerate(sources)})
        elif sources:
            draft.put(path, sources[0] if len(sources) == 1 else sources)


def _is_single(draft: Draft) -> bool:
    """Whether rows have one answer with a label."""
    return draft.objective in ("kto", "bco") and not of_pairs(draft.given)


def _keys_of_single(draft: Draft) -> dict[str, Any]:
    """OpenRLHF's columns, where it is told which: else it reads instruction, response and score."""
    given = draft.has("output_key")
    completion, label = draft.take("output_key"), draft.take("label_key", default=given)
    prompt = draft.take("input_key", default=given)
    if draft.dialect == "openrlhf" and not given and not draft.computes("output_key"):
        return {"prompt": "instruction", "completion": "response", "label": "score"}
    found = {"completion": completion, "label": label}
    return found | ({"prompt": prompt} if prompt else {})


def _name(source: Source, number: int) -> str:
    word = "".join(c if c.isalnum() else "_" for c in str(source.get("path", "")).rsplit("/", 1)[-1]).strip("_")
    return f"{word or 'set'}_{number}"


def _evaluates(draft: Draft) -> bool:
    strategy = draft.theirs.get("eval_strategy", draft.theirs.get("evaluation_strategy"))
    asked = draft.has("eval_steps", "do_eval", "evals_per_epoch", "eval.steps")
    return strategy not in (None, "no", False) or (strategy is None and asked)


def _plain(draft: Draft) -> tuple[list[Source], list[Source]]:
    """dataset_name with its splits, or a mixture."""
    evaluates = _evaluates(draft)
    train, held_out = _mixture(draft)
    name = draft.take("dataset_config", "dataset_config_name")
    split, test = draft.take("dataset_train_split", "train_split"), draft.take("dataset_test_split", "eval_split")
    path = draft.take("dataset_name", "train_file", "dataset", "train_dataset", "data_path")
    other = draft.take("eval_dataset", "eval_file", "validation_file", "test_dataset")
    if isinstance(path, str) and not train:
        train = [{"path": path, "name": name, "split": split}]
        if evaluates and (other or test or draft.dialect == "trl"):
            held_out = [{"path": other or path, "name": name, "split": test or (None if other else "test")}]
    elif path is not None:
        draft.leave("dataset_name", path, "the mixture goes before it" if train else "is no path")
    if test and not held_out:
        draft.leave("dataset_test_split", test, "nothing evaluates: set data.eval and train.eval_every")
    return train, held_out


def _mixture(draft: Draft) -> tuple[list[Source], list[Source]]:
    """alignment-handbook's and TRL's mixtures."""
    train: list[Source] = []
    held_out: list[Source] = []
    splits = as_list(draft.take("dataset_splits")) or []
    splits = [splits] if isinstance(splits, str) else splits
    names = as_list(draft.take("dataset_configs")) or []
    mixer = draft.take("dataset_mixer")
    if isinstance(mixer, Mapping):
        given = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        training = [split for split in given if "train" in split] or ([] if given else [None])
        for number, (path, weight) in enumerate(mixer.items()):
            name = names[number] if isinstance(names, list) and number < len(names) else None
            train += [_weighed({"path": path, "name": name, "split": split}, weight) for split in training]
            held_out += [{"path": path, "name": name, "split": split} for split in given if "train" not in split]
        if any(isinstance(weight, float) and weight < 1 for weight in mixer.values()):
            draft.note("data.train", "dataset_mixer draws a fraction of the rows once; a weight draws it anew in each epoch")
    mixture = draft.take("dataset_mixture") or {}
    listed = mixture.get("datasets") if isinstance(mixture, Mapping) else None
    if listed is None and draft.dialect in ("trl", "alignment-handbook"):
        listed = draft.take("datasets")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            train.append({"path": item})
        elif isinstance(item, Mapping):
            train.append(_listed(draft, dict(item)))
    for key in ("test_split_size", "seed"):
        if isinstance(mixture, Mapping) and not is_empty(mixture.get(key)):
            draft.leave(f"dataset_mixture.{key}", mixture[key], "split the file, and name the held-out part in data.eval")
    return train, held_out


def _listed(draft: Draft, item: dict[str, Any]) -> Source:
    files = item.pop("data_files", None)
    path = item.pop("id", None) or item.pop("path", None)
    if files and path in ("json", "csv", "parquet", None):
        path = files if isinstance(files, str) else files[0] if isinstance(files, list) and len(files) == 1 else path
    source: Source = {
        "path": path,
        "name": item.pop("config", None) or item.pop("name", None),
        "split": item.pop("split", None),
    }
    source |= {key: item.pop(key) for key in ("data_dir", "revision") if key in item}
    weight = item.pop("weight", item.pop("fraction", None))
    columns = item.pop("columns", None)
    if isinstance(columns, list) and not {*columns} <= {"prompt", "chosen", "rejected", "messages"}:
        draft.leave("columns", columns, "name them in data.train: {columns: {chosen: ..., rejected: ...}}")
    for key, value in item.items():
        if not is_empty(value):
            draft.leave(f"datasets.{key}", value, "a source has no such key")
    if source["name"] == "default":
        source["name"] = None
    return _weighed(source, weight)


def _weighed(source: Source, weight: Any) -> Source:
    """A weight of up to 1 is a share of the rows, a larger whole number a count of them."""
    try:
        number = float(weight)
    except (TypeError, ValueError):
        return source
    if number > 1 and number.is_integer() and (number > 10 or isinstance(weight, int)):
        return source | {"max_samples": int(number)}
    return source | ({"weight": number} if number != 1 and number > 0 else {})


def _axolotl(draft: Draft) -> tuple[list[Source], list[Source]]:
    sets: list[list[Source]] = []
    for key in ("datasets", "test_datasets"):
        listed = draft.take(key)
        items = listed if isinstance(listed, list) else [listed] if listed else []
        sets.append([_of_axolotl(draft, key, dict(i) if isinstance(i, Mapping) else {"path": i}) for i in items])
    return sets[0], sets[1]


def _of_axolotl(draft: Draft, where: str, item: dict[str, Any]) -> Source:
    kind = item.pop("type", None)
    item.pop("ds_type", None)
    files = item.pop("data_files", None)
    path = item.pop("path", None)
    if files and path in ("json", "csv", "parquet", "arrow", None):
        path = files if isinstance(files, str) else files[0]
    source: Source = {"path": path} | {key: item.pop(key, None) for key in ("name", "split", "revision")}
    single = _is_single(draft)
    columns = {key: item.pop(f"field_{key}", None) for key in (SINGLE if single else PAIRED)[1:]}
    columns["prompt"] = item.pop("field_messages", None)
    if isinstance(kind, Mapping) and single:
        source["columns"] = {name: kind[f"field_{name}"] for name in SINGLE if kind.get(f"field_{name}", name) != name}
        for key in ("prompt_format", "completion_format"):
            if kind.get(key):
                draft.leave(f"{where}.type.{key}", kind[key], "a template makes pairs; write such texts into the rows")
    elif isinstance(kind, Mapping):
        source |= _user_defined(kind)
    elif isinstance(kind, str):
        name = kind.rsplit(".", 1)[-1] if not kind.startswith("chat_template") else "default"
        known = (AXOLOTL_KTO if single else AXOLOTL).get(name, {})
        columns |= {key: value for key, value in known.items() if not columns.get(key)}
        said = f"type: {kind} writes the tokens of a template itself; here the model's chat template does, of messages"
        draft.note(f"data.{'train' if where == 'datasets' else 'eval'}", said)
    named = {key: value for key, value in columns.items() if value and value != key}
    if named and "template" not in source:
        source["columns"] = source.get("columns", {}) | named
    for key, value in item.items():
        if not is_empty(value):
            draft.leave(
                f"{where}.{key}", value, "a source has no such key; docs/rows.md has the rows that are read, and format"
            )
    return source


def _user_defined(kind: Mapping[str, Any]) -> Source:
    """axolotl's field_* and *_format."""
    fields = {name: kind.get(f"field_{name}") or name for name in ("system", "prompt", "chosen", "rejected")}
    formats = {name: str(kind.get(f"{name}_format") or f"{{{name}}}") for name in ("prompt", "chosen", "rejected")}
    if any(formats[name] != f"{{{name}}}" for name in formats):
        made = {}
        for name, text in formats.items():
            for field, column in fields.items():
                text = text.replace(f"{{{field}}}", f"{{{column}}}")
            made[name] = text
        return {"template": made, "as": "text"}
    return {"columns": {name: fields[name] for name in formats if fields[name] != name}}


def _llamafactory(draft: Draft) -> tuple[list[Source], list[Source]]:
    """Names of data/dataset_info.json, which is read where it lies."""
    folder = str(draft.take("dataset_dir") or "data")
    try:
        info = reading.parse_json((Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = {}
    sets: list[list[Source]] = []
    for key, where in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        named = draft.take(key)
        names = named if isinstance(named, list) else str(named).split(",") if named else []
        sets.append([_registered(folder, str(name).strip(), info, draft, where) for name in names])
    weights = draft.take("interleave_probs")
    if weights:
        draft.leave(
            "interleave_probs", weights, "give each source a weight, in passes per epoch: data.train: [{path, weight}]"
        )
    return sets[0], sets[1]


def _registered(folder: str, name: str, info: Any, draft: Draft, where: str) -> Source:
    entry = info.get(name) if isinstance(info, Mapping) else None
    if not isinstance(entry, Mapping):
        draft.note(where, f"{name} is a name of {folder}/dataset_info.json: write the file or the hub id that it has there")
        return {"path": f"{folder}/{name}.json"}
    path = entry.get("hf_hub_url") or f"{folder}/{entry.get('file_name', name)}"
    given = entry.get("columns")
    columns: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    kept = {ours: columns[ours] for ours in ("prompt", "chosen", "rejected", "system") if ours in columns}
    if _is_single(draft):
        kept = _registered_single(entry, columns)
        if "prompt" in kept:
            query = columns.get("query", "input")
            draft.note(where, f"{name}: theirs adds the column {query} to the prompt, where it is filled")
    elif "messages" in columns:
        kept["prompt"] = columns["messages"]
    return {"path": path, "name": entry.get("subset"), "split": entry.get("split"),
            "columns": {ours: theirs for ours, theirs in kept.items() if ours != theirs}}  # fmt: skip


def _registered_single(entry: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Of rows with one answer: those of alpaca have it in `output`; a conversation ends with it."""
    kept = {"label": columns.get("kto_tag", "kto_tag")} | {k: columns[k] for k in ("system", "tools") if k in columns}
    if entry.get("formatting") == "sharegpt":
        name = columns.get("messages", "conversations")
        return kept if name in CONVERSATIONS else kept | {"completion": name}
    return kept | {"prompt": columns.get("prompt", "instruction"), "completion": columns.get("response", "output")}


def _open_instruct(draft: Draft) -> tuple[list[Source], list[Source]]:
    listed = draft.take("dataset_mixer_list", "mixer_list")
    splits = draft.take("dataset_mixer_list_splits", "mixer_list_splits") or []
    mixer = draft.theirs.get("dataset_mixer")
    if not isinstance(listed, list):
        return ([], []) if isinstance(mixer, Mapping) or not isinstance(listed, str) else ([{"path": listed}], [])
    pairs = list(zip(listed[::2], listed[1::2]))
    split = [splits[n] if n < len(splits) else splits[-1] if splits else None for n in range(len(pairs))]
    train = [
        _weighed({"path": path, "split": None if split[n] == "train" else split[n]}, weight)
        for n, (path, weight) in enumerate(pairs)
    ]
    if any(isinstance(source.get("weight"), float) for source in train):
        draft.note("data.train", "a fraction is drawn once there; a weight draws it anew in each epoch")
    return train, []


def _openrlhf(draft: Draft) -> tuple[list[Source], list[Source]]:
    split = draft.take("dataset_split", "data.dataset_split", "train_split")
    chat = draft.flag("apply_chat_template", "data.apply_chat_template")
    weights = draft.take("dataset_probs", "data.dataset_probs")
    paths = [path for path in str(draft.take("dataset", "data.dataset") or "").split(",") if path]
    train: list[Source] = [{"path": path.strip(), "split": None if split == "train" else split} for path in paths]
    template = draft.take("input_template", "data.input_template")
    if template:
        draft.leave("input_template", template, "write it with the columns: data.train: {template: {prompt: ...}, as: text}")
    if chat and train and not template:
        draft.note("data.train", "--apply_chat_template: messages are rendered by the chat template, as always here")
    if weights and len(train) > 1:
        draft.leave("dataset_probs", weights, "give each source a weight, in passes per epoch")
    test = draft.take("eval_split", "eval.split")
    other = draft.take("eval_dataset", "eval.dataset")
    return train, [{"path": path.strip(), "split": test} for path in str(other).split(",")] if other else []


READERS: dict[str, Callable[[Draft], tuple[list[Source], list[Source]]]] = {
    "trl": _plain, "alignment-handbook": _plain, "axolotl": _axolotl, "llamafactory": _llamafactory,
    "open-instruct": _open_instruct, "openrlhf": _openrlhf,
}  # fmt: skip

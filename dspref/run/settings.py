"""Whether a run may go on with changed settings: which may change, and what differs from those of its newest checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspref import config as configuration
from dspref import distributed
from dspref.config.strategy import problems, stage_of
from dspref.errors import ConfigError
from dspref.own_code import Used, kept_at
from dspref.run import manifest, record
from dspref.run.folder import RESOLVED, RunFolder, content_key, environment
from dspref.secrets import redact
from dspref.terminal import command, first_line

# Keys that may differ between a run and its continuation: they change speed, memory, reports or the length of the run (and
# with it the learning rates of the schedule), but neither the pairs of a step nor what is computed from them. (The router
# loss with scope `micro` is the exception: other packs balance experts over other tokens.)
MAY_CHANGE = (
    "data.tokens_per_pack", "data.prefix_sharing", "model.attn_implementation", "model.liger",
    "model.gradient_checkpointing", "model.tiled_mlp",
    "model.name_or_path", "model.lora.path", "model.lora.merge_on_export", "reference.store",
    "train.max_steps", "train.num_train_epochs", "train.eval_every", "train.eval_at_start", "train.max_skipped_steps",
    "train.hang_timeout", "train.dry_run", "train.spike_sigmas", "train.stop_when",
    "train.profile",
    "parallel", "checkpoint", "export", "log", "output_dir",
    # How DeepSpeed lays out memory and talks (stage3_... are among these); of the stage see `_refuse_stage`. What decides
    # the order of weights in its shards is not here: sub_group_size, round_robin_gradients, offloading.
    "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.reduce_bucket_size",
    "deepspeed.zero_optimization.allgather_bucket_size", "deepspeed.zero_optimization.overlap_comm",
    "deepspeed.zero_optimization.contiguous_gradients", "deepspeed.wall_clock_breakdown", "deepspeed.flops_profiler",
    "deepspeed.unproven",
)  # fmt: skip


def refuse_changes(run: RunFolder, settings: dict[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What differs from the settings of the run in a folder, as lines to show. Raises ConfigError for a key that
    decides what a step computes, and where nothing tells any more what the settings were.

    `settings`: every key, resolved; `asked`: those of them that the user has set.
    """
    if record.read(run.path)[0].get("aside"):
        return []
    said = manifest.newest(run.checkpoints, run.run.get("run_id"))
    new, old = flatten(settings), _settings_before(run, said, settings)
    if old is None:
        return []
    _refuse_stage(run, old.get("deepspeed.zero_optimization.stage", 0), settings)
    changed = [key for key in sorted({*old, *new}) if not _alike(old.get(key), new.get(key))]
    gone = _refused_by_now(old)
    refused = [key for key in changed if not key.startswith(MAY_CHANGE) and not (key not in new and key.startswith(gone))]
    if refused:
        raise ConfigError(
            f"{_difference(refused, old, new, flatten(asked), run.path)}, or start anew with another output_dir= or "
            "checkpoint.resume=never"
        )
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]


def refuse_other_code(run: RunFolder, own: Sequence[Used]) -> None:
    """Raise ConfigError where a function of the user's is not what it was when the run in a folder took its first step."""
    if record.read(run.path)[0].get("aside") or not run.has_steps:
        return
    began = run.run.get("content", {})
    for used in own:
        now = used.source
        if (before := began.get(content_key(used), now.sha256)) != now.sha256:
            raise ConfigError(
                f"{used.key}: {used.name}: {now.path} has sha256 {now.sha256[:12]}, but the run in {run.path} "
                f"began with {before[:12]}; restore it from {kept_at(run.path, used.kind, used.name)}, or start anew with "
                "another output_dir= or checkpoint.resume=never"
            )


def _settings_before(run: RunFolder, said: Mapping[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """By the newest manifest, else by config.resolved.yaml; None where nothing has been computed with any."""
    if said and isinstance(said.get("settings"), dict):
        return flatten(settings_of(said["settings"]))
    path = run.path / RESOLVED
    try:
        return flatten(configuration.resolved(configuration.load(path)))
    except ConfigError as error:
        if not said and not run.is_finished:
            return None
        # The manifest of an older dspref, which holds no more than a digest.
        if said and said["config"] == digest_of(settings):
            return flatten(settings)
        raise ConfigError(
            f"{path}: cannot be read, so nothing tells whether the settings are still the run's ({first_line(error)}); "
            "restore it, or start anew with another output_dir= or checkpoint.resume=never"
        ) from None


def _refused_by_now(old: Mapping[str, Any]) -> tuple[str, ...]:
    """Of flat settings, the keys of DeepSpeed that an older dspref let through: without them a run may go on."""
    strategy: dict[str, Any] = {}
    for key, value in old.items():
        first, *path = key.split(".")
        if first == "deepspeed" and path:
            node = strategy
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = value
    return tuple(f"deepspeed.{'.'.join(found.path)}" for found in problems(strategy, str(old.get("model.dtype"))))


def _refuse_stage(run: RunFolder, before: int, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where optimizer states would have to pass between stages that keep them otherwise."""
    saved, now = manifest.committed(run.checkpoints), stage_of(settings["deepspeed"])
    if before == now or {before, now} == {1, 2} or not saved:
        return
    lora = settings["model"]["lora"]
    key = "model.lora.path" if lora and not lora["merge_on_export"] else "model.name_or_path"
    raise ConfigError(
        f"deepspeed.zero_optimization.stage: {now}, but the run in {run.path} has {before}, and of its "
        "optimizer only stages 1 and 2 read each other; restore it, or "
        f"`{command('dspref', 'export', saved[-1])} --to FOLDER` "
        f"and begin there with {key}=FOLDER and another output_dir="
    )


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that a manifest holds, with the keys that dspref has now."""
    try:
        return configuration.resolved_anew(values)
    except ValueError:  # of another version
        return values


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Of resolved settings, by dotted key, those that may not change."""
    return {key: value for key, value in flatten(settings).items() if not key.startswith(MAY_CHANGE)}


def digest_of(settings: Mapping[str, Any]) -> str:
    """sha256 of resolved settings, as YAML."""
    return hashlib.sha256(configuration.as_yaml(settings).encode()).hexdigest()


# What other settings depend on, with defaults that differ: named first, as a change of it changes these too.
SELECTING = ("objective.name", "objective.loss_type", "reference.mode")


def _difference(
    keys: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any], asked: Mapping[str, Any], folder: Path
) -> str:
    """The settings that differ from those of the run in a folder, and what restores the first, which is one that the user
    has set (`asked`), where there is any. A section that one of them lacks is one difference."""
    found = list(dict.fromkeys(_section_of(key, old, new) for key in keys))
    found.sort(key=lambda key: (key not in SELECTING, not any(name == key or name.startswith(f"{key}.") for name in asked)))
    key, *others = found
    more = f" ({', '.join(others[:5])}{', ...' if others[5:] else ''} too)" if others else ""
    before, now = (_in_words(key, values) for values in (old, new))
    restore = f"restore it{more}" if before != "null" else f"leave it out{more}"
    return f"{key}: {now}, but the run in {folder} has {before}; {restore}"


def _section_of(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The outermost section of a key that only one of two settings has, else the key."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(1, len(parts)))
    lacking = (name for name in sections if any(name in values and values[name] is None for values in (old, new)))
    return next(lacking, key)


def _in_words(key: str, values: Mapping[str, Any]) -> str:
    if any(name.startswith(f"{key}.") for name in values):
        return "one with settings"
    return repr(value) if (value := values.get(key)) is not None else "null"


def _alike(before: Any, now: Any) -> bool:
    """Equal, but for secrets, which no file of a run holds."""
    return before == now or (isinstance(before, str) and isinstance(now, str) and before == redact(now))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {k: v for key, inner in values.items() for k, v in flatten(inner, f"{prefix}.{key}" if prefix else key).items()}


def facts_of(run: RunFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifests of a run say of it, beside the step; on rank 0."""
    if distributed.world().rank != 0:
        return {}
    known = run.run
    return {
        "run_id": known.get("run_id"),
        "content": known.get("content", {}),
        "config": digest_of(settings),
        "settings": json.loads(redact(json.dumps(settings))),
        "zero_stage": stage_of(settings["deepspeed"]),
        "dtype": settings["model"]["dtype"],
        "packages": environment()["packages"],
    }

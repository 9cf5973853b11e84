"""A run's model on the Hugging Face hub: weights or adapter as the run wrote them, and the card with its metadata.

Loads no torch. The token is huggingface_hub's own business ($HF_TOKEN, or `hf auth login`), and is in nothing that is said.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dspref import hub, reading
from dspref.config import ModelSection, outcome_checks
from dspref.errors import ConfigError, EnvironmentFault, IOFault, UserError
from dspref.model import digests
from dspref.run import curves, record
from dspref.secrets import redact
from dspref.terminal import command, first_line

FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
CARD = "README.md"
METRICS_FILE = "metrics.jsonl"
# What a card may say of accuracies: its name among the hub's metrics.
METRICS = ["accuracy"]


def finished_model(run: Path) -> Path:
    """The model of a finished run, once every file has been found as the run wrote it. Raises ConfigError, IOFault."""
    found, damage = record.read(run)
    if damage or not found:
        raise ConfigError(f"{run}: is no run ({damage or 'it has no run.json'}); give the output_dir of one")
    final = run / "final"
    if found.get("state") != "finished" or not final.is_dir():
        export = command("dspref", "export", run, "--to", "FOLDER")
        raise ConfigError(f"{run}: is not finished; wait, or `{export}` and push that folder by `hf upload`")
    for name, (size, digest) in found.get("exported", {}).items():
        path = run / name
        if not path.is_file() or path.stat().st_size != size or digests.sha256(path) != digest:
            raise IOFault(f"{path}: is not what the run wrote; restore it, or train again")
    return final


def push(folder: Path, repo: str, public: bool, metadata: Mapping[str, Any]) -> str:
    """Upload the files of a folder in one commit, with `metadata` in its card; the address. A new repository is private, but
    where `public`; one that is public already is left alone unless `public` says so.

    Raises ConfigError, EnvironmentFault where the hub or a token cannot be had, IOFault where the upload fails.
    """
    if not outcome_checks.is_repository(repo):
        raise ConfigError(f"{repo}: is no repository of the hub; write it as owner/name")
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFault("HF_HUB_OFFLINE is set; unset it to upload")
    if not get_token():
        raise EnvironmentFault("the hub needs a token: export HF_TOKEN, or run `hf auth login`")
    disable_progress_bars()
    api = HfApi(library_name="dspref")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with said_in_one_line(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        if not api.model_info(repo).private and not public:
            raise ConfigError(f"{repo}: is there already, and public; give --public, or another name")
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items() if name != CARD]
        known = dict(metadata) | license_of(metadata.get("base_model"), api)
        card = with_metadata(text_of(files.get(CARD)), known)
        operations.append(CommitOperationAdd(CARD, redact(card).encode()))
        api.create_commit(repo, operations, commit_message="Upload by dspref")
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def said_in_one_line(repo: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of huggingface_hub, httpx, hf_xet: each has its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = redact(first_line(error))
        if status in (401, 403):
            raise EnvironmentFault(f"{repo}: the hub refuses the token ({status}); it must allow to write there") from None
        raise IOFault(f"{repo}: not uploaded: {said}; the same command tries again") from None


# ---------------------------------------------------------------------------------------------------------------------
# The card


def held_out_of(run: Path, summary: Mapping[str, Any]) -> dict[str, float]:
    """What the evaluation of the exported weights found, by the summary of a run."""
    if summary.get("weights_of", summary.get("step")) != summary.get("step"):
        return curves.evaluation_of(run / METRICS_FILE, summary["weights_of"])
    learned = summary.get("learned", {})
    return {name: last for name, (_, last) in learned.items() if name.startswith("eval_") and last is not None}


def metadata_of(
    model: ModelSection, data: Sequence[str], objective: str, name: str, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What the hub reads of a card: the model that it was made from and data sets that are on the hub, tags, and accuracies
    on held-out pairs. `data`: paths; `metrics`: of evaluations, by name."""
    adapter = model.lora is not None and not model.lora.merge_on_export
    found: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dspref", "preference-optimization", objective],
    }
    if model.init == "pretrained" and is_on_hub(model.name_or_path):
        found |= {"base_model": model.name_or_path, "base_model_relation": "adapter" if adapter else "finetune"}
    if sets := sorted({path for path in data if is_on_hub(path)}):
        found["datasets"] = sets
    if results := [result_of(key, value) for key, value in metrics.items() if key.endswith("rewards/accuracies")]:
        found |= {"metrics": METRICS, "model-index": [{"name": name, "results": results}]}
    return found


def is_on_hub(path: str) -> bool:
    """Whether a path of a config can only be an id of the hub."""
    return bool(hub.ID.fullmatch(path)) and "/" in path and not Path(path).exists()


def result_of(key: str, value: float) -> dict[str, Any]:
    """One accuracy, in the form of a model-index."""
    held_out = key.removesuffix("rewards/accuracies").rstrip("_")
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"held-out pairs ({held_out})", "type": "preference"},
        "metrics": [{"type": METRICS[0], "name": key, "value": round(value, 4)}],
    }


def license_of(base: str | None, api: Any) -> dict[str, str]:
    """The license that the base model's card on the hub tells; {} where it is not had."""
    if base:
        with contextlib.suppress(Exception):  # offline, gated, gone: the card does without
            said = api.model_info(base).card_data.license
            return {"license": said} if isinstance(said, str) else {}
    return {}


def text_of(file: Path | None) -> str:
    return reading.read_text(file) if file else ""


def with_metadata(card: str, metadata: Mapping[str, Any]) -> str:
    """A card with these values in its front matter, in place of those it has."""
    found = FRONT.match(card)
    try:
        before = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        before = {}
    whole = (before if isinstance(before, dict) else {}) | dict(metadata)
    front = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{card[found.end() :] if found else card}"

"""The trackers there are. Each is opened by a function that returns its own name for the run, and what sends it a record.

They are told the metrics, the settings and the answers to prompts, and nothing else: no code, no command line, no changes of
a working tree. Where one would ask for a key on the terminal it is refused instead.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dspref.config import LogSection
from dspref.secrets import redact_words

Send = Callable[[Mapping[str, Any] | None], None]
Opened = tuple[str | None, Send]

# Of a record that has answers to prompts, their rows.
SAMPLES = "samples"


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn as a curve."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}


def _wandb(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    import wandb

    # It keeps the command line word for word, and would add the working tree's code, changes and origin.
    sys.argv[:] = redact_words(sys.argv)
    quiet = wandb.Settings(silent=True, console="off", init_timeout=30, save_code=False, disable_code=True, disable_git=True)
    run = wandb.init(
        project=log.project, name=log.run_name or folder.name, dir=str(folder), id=run_id,
        resume="allow" if run_id else None, config=dict(settings), settings=quiet,
    )  # fmt: skip

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return run.finish()
        shown = dict(record)
        if rows := shown.pop(SAMPLES, None):
            shown[SAMPLES] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log(shown, step=record["step"])

    return run.id, send


def _tensorboard(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return writer.close()
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        for number, row in enumerate(record.get(SAMPLES, ())):
            writer.add_text(f"{SAMPLES}/{number}", in_markdown(row), record["step"])
        writer.flush()

    return None, send


def _mlflow(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    """To the server of MLFLOW_TRACKING_URI, or into a data base in the run folder."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    own = None if os.environ.get("MLFLOW_TRACKING_URI") else folder.resolve()
    client = MlflowClient(tracking_uri=f"sqlite:///{own}/mlflow.db" if own else None)
    if run_id:
        client.update_run(run_id, status="RUNNING")
    else:
        known = client.get_experiment_by_name(log.project)
        place = (own / "mlflow").as_uri() if own else None
        experiment = known.experiment_id if known else client.create_experiment(log.project, artifact_location=place)
        run_id = client.create_run(experiment, run_name=log.run_name or folder.name).info.run_id
        params = [Param(name, str(value)[:6000]) for name, value in flat(settings)]
        for start in range(0, len(params), 100):  # as many as it takes at once
            client.log_batch(run_id, params=params[start : start + 100])

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return client.set_terminated(run_id)
        now = int(time.time() * 1000)
        # A source may have any name; of these characters only does a name of theirs consist.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in scalars(record).items()}
        client.log_batch(run_id, [Metric(name, float(value), now, record["step"]) for name, value in named.items()])
        if rows := record.get(SAMPLES):
            client.log_table(run_id, {name: [row[name] for row in rows] for name in rows[0]}, f"{SAMPLES}.json")

    return run_id, send


def _trackio(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    """Into the folder of TRACKIO_DIR; `run_id` is the name of the run, by which it goes on."""
    import trackio

    name = run_id or f"{log.run_name or folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with contextlib.redirect_stdout(io.StringIO()):  # six lines
        run = apart(
            trackio.init, project=log.project, name=name, config=dict(settings), resume="allow" if run_id else "never",
            embed=False,
        )  # fmt: skip

    return name, sender(run, lambda rows: trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows]))


def _comet(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    """Online with COMET_API_KEY; into the run folder with COMET_START_ONLINE=0."""
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
    os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
    import comet_ml
    from comet_ml.config import get_config

    online = os.environ.get("COMET_START_ONLINE", "1").lower() not in ("0", "false")
    if online and not get_config("comet.api_key"):
        raise RuntimeError("has no key; export COMET_API_KEY, or COMET_START_ONLINE=0 to keep it in the run folder")
    said = "log_code log_graph parse_args log_git_metadata log_git_patch auto_param_logging auto_metric_logging "
    said += "auto_log_co2 log_env_details"  # the latter: the command line too
    quiet = comet_ml.ExperimentConfig(
        name=log.run_name or folder.name, offline_directory=str(folder / "comet"), auto_output_logging="",
        display_summary_level=0, **dict.fromkeys(said.split(), False),
    )  # fmt: skip
    run = comet_ml.start(project=log.project, experiment_key=run_id, online=online, experiment_config=quiet)
    if run_id is None:
        run.log_parameters(dict(flat(settings)))

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return run.end()
        run.log_metrics(scalars(record), step=record["step"])
        if rows := record.get(SAMPLES):
            texts = [list(row.values()) for row in rows]
            run.log_table(f"{SAMPLES}-{record['step']}.csv", texts, headers=list(rows[0]))

    return run.get_key(), send


def _swanlab(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    """Online with SWANLAB_API_KEY; into the run folder with SWANLAB_MODE=offline."""
    import swanlab

    quiet = swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}, probe={"runtime": False, "git": False})  # type: ignore[arg-type]
    place = folder / "swanlab"
    place.mkdir(exist_ok=True)
    run = apart(
        swanlab.init, project=log.project, name=log.run_name or folder.name, id=run_id, resume="allow" if run_id else None,
        config=dict(settings), log_dir=str(place), settings=quiet,
    )  # fmt: skip

    return run.id, sender(run, lambda rows: [swanlab.Text(in_markdown(row)) for row in rows])


def sender(run: Any, of_samples: Callable[[Sequence[Mapping[str, Any]]], Any]) -> Send:
    """What sends to a run that has `log` and `finish`, as wandb's has; `of_samples`: answers, as its tracker shows them."""

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return run.finish()
        shown: dict[str, Any] = scalars(record)
        if rows := record.get(SAMPLES):
            shown[SAMPLES] = of_samples(rows)
        run.log(shown, step=record["step"])

    return send


def apart(make: Callable[..., Any], **how: Any) -> Any:
    """What `make` makes in a thread: there it takes no Ctrl-C, and nothing at the end of the main thread ends it anew."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make, **how).result()


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The settings one by one, as `train.learning_rate`."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def in_markdown(row: Mapping[str, Any]) -> str:
    """A row of texts, each as it stands: what is in a code block is neither laid out nor followed."""
    parts = []
    for name, text in row.items():
        if isinstance(text, str):
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            parts.append(f"**{name}**\n\n{fence}\n{text}\n{fence}")
    return "\n\n".join(parts)


# Each opens a tracker; None as a record closes it.
TRACKERS = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "comet": _comet,
    "swanlab": _swanlab,
}

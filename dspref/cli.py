"""The `dspref` command. Each command loads what it needs and no more: `--help` no config, `check` no torch."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspref import looking as looking  # whose commands come first
from dspref.commandline import (
    NOTHING_LOST,
    File,
    OfRun,
    Overrides,
    app,
    expanded,
    faults_in_one_line,
    tell_repeated,
    whole,
)
from dspref.errors import ConfigError, UserError
from dspref.terminal import shown

ShellFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A shell file to source first.", callback=whole)]
SweepFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A job array: a run per line.", callback=whole)]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or its checkpoints/step-N.", callback=whole)
]
Asked = Annotated[str | None, typer.Option(help="As sbatch takes it.")]


@app.command(cls=OfRun)
def train(
    file: File,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: the GPUs of this machine, or one.")] = None,
) -> None:
    """Train on this machine, by one process for each GPU. On several machines: deepspeed, torchrun, or dspref submit."""
    from dspref import launcher

    arguments = ["--config", str(file), *(overrides or [])]
    with faults_in_one_line():
        count = ranks_here(ranks)
    if count == 1:
        raise typer.Exit(launcher.main(arguments))

    from dspref import config as configuration
    from dspref.ranks import starting

    with faults_in_one_line():
        configuration.load(file, overrides or [])  # once for all
    script = configuration.shipped("launch/train.py").resolve()
    raise typer.Exit(starting.start([sys.executable, "-P", str(script), *arguments], count))


def ranks_here(asked: int | None) -> int:
    """How many ranks this command is to start: none but itself, where a launcher has started it. Raises ConfigError."""
    if "RANK" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        if asked:
            raise ConfigError("--ranks: this process is a rank of a launcher already; leave it out, or start it without")
        return 1
    if asked or os.environ.get("DS_ACCELERATOR") == "cpu":
        return asked or 1

    from dspref.machine import machine

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",") if visible else machine.gpus().names if visible is None else []) or 1


@app.command(cls=OfRun)
def score(
    file: File,
    overrides: Overrides = None,
    share: Annotated[str, typer.Option(metavar="K/N", help="Do the K-th of N parts, from 0: a job array.")] = "0/1",
    verify: Annotated[int, typer.Option(min=0, help="Score so many pairs, drawn at random, again, and compare.")] = 0,
) -> None:
    """Fill the reference store ahead of the run. Several ranks: srun, or torchrun --no-python, before this command."""
    from dspref import config as configuration
    from dspref import launcher

    try:
        part = parse_share(share)
        if launcher.first_rank(os.environ):
            tell_repeated(overrides)
        launcher.prepare(os.environ)
        config = configuration.load(file, overrides or [])
    except UserError as error:
        raise typer.Exit(launcher.refused(error)) from None

    def job() -> None:
        from dspref.training import scorer

        scorer.score(config, part, verify)

    raise typer.Exit(launcher.guarded(job, "while it scored; the same command goes on"))


@app.command(cls=OfRun)
def submit(
    file: File,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="As many ranks run on each node.")] = 8,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="For each rank.")] = 8,
    time: Annotated[str, typer.Option(help="Longest duration of one start.")] = "24:00:00",
    partition: Asked = None,
    account: Asked = None,
    qos: Asked = None,
    constraint: Asked = None,
    reservation: Asked = None,
    job_name: Annotated[str | None, typer.Option(help="Default: dspref- and the run folder's name.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Share the nodes with nobody.")] = False,
    signal_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="Commit a checkpoint so long before the end. Default: 300, or --time / 5."),
    ] = None,
    max_requeue: Annotated[int, typer.Option(min=0, help="Go on so often, each time only if a step was committed.")] = 20,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the ranks; repeatable.")] = None,
    setup: ShellFile = None,
    sweep: SweepFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and show the job script, and stop there.")] = False,
) -> None:
    """Submit a run to SLURM: check it, write a job script into its folder, show that, and hand it to sbatch.

    One task per GPU under srun. Before its time ends the job commits a checkpoint, queues again and goes on.
    """
    from dspref import slurm

    with faults_in_one_line():
        tell_repeated(overrides)
        job = slurm.Job(
            nodes=nodes, gpus_per_node=gpus_per_node, cpus_per_task=cpus_per_task, time=time, partition=partition,
            account=account, qos=qos, constraint=constraint, reservation=reservation, job_name=job_name, mem=mem,
            exclusive=exclusive, signal_seconds=signal_seconds, max_requeue=max_requeue, env=tuple(env or ()),
            setup=Path(os.path.abspath(setup)) if setup else None,
        )  # fmt: skip
        slurm.submit(file, overrides or [], job, sweep, dry_run)


class Precision(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


@app.command()
def export(
    source: RunOrCheckpoint,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that is not there yet.", callback=whole)],
    dtype: Annotated[Precision | None, typer.Option(help="Default: the run's model.dtype.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the LoRA adapter to its model: no peft is needed then.")
    ] = False,
) -> None:
    """Write the model of a run or a checkpoint as from_pretrained loads it; of any ZeRO stage and number of ranks, without a
    GPU."""
    from dspref import launcher

    def job() -> None:
        from dspref.training import exporting

        found = exporting.write(source, to, dtype.value if dtype else None, merge)
        print(shown(f"{found} -> {to}"))

    raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a checkpoint, a model's or adapter's folder.", callback=expanded)
    ],
    versus: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Both answer, side by side.", callback=expanded)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Press 1, 2 or s: a preference row.", callback=whole)
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.001, max=1, help="Default: the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer. Default: the model's own, or 512.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn.")] = None,
    as_rows: Annotated[bool, typer.Option("--json", help="Piped: each answer a row, {line, prompt, answers}.")] = False,
) -> None:
    """Talk to a model, with its chat template and generation config. Piped: a prompt a line in, an answer a block out.

    /image PATH shows an image with your next message, /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from dspref import launcher

    with faults_in_one_line():
        if greedy and (temperature or top_p):
            raise ConfigError(f"--greedy: draws nothing; leave out {'--temperature' if temperature else '--top-p'}")

    def job() -> None:
        from dspref.chat import talk

        names = [model, versus] if versus else [model]
        talk.chat(names, talk.Asked(temperature, top_p, max_tokens, greedy), system, save, seed, as_rows)

    raise typer.Exit(launcher.guarded(job, NOTHING_LOST))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.", callback=whole)],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Default: private.")] = False,
) -> None:
    """Upload a finished run's model, or its adapter, to the Hugging Face hub, with its card. Private, but with --public.

    The token is $HF_TOKEN, or that of `hf auth login`."""
    from dspref.training import publishing

    with faults_in_one_line():
        address, warnings = publishing.push(run, repo, public)
        for line in warnings:
            print(shown(line), file=sys.stderr)
        print(shown(f"{run / 'final'} -> {address}"))


def parse_share(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ConfigError(f"--share: must be K/N with K from 0 to N - 1, such as 0/8, not {text!r}")
    return int(k), int(n)


if __name__ == "__main__":
    app()

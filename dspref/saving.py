"""Saves: all ranks write, training goes on, and what they wrote is flushed to disk, hashed and committed beside it.

Training waits until the bytes are handed to the system, which keeps them as they were; the disk and the hashes take longer.
That is done by a thread of each rank. The threads talk through the job's key-value store: a collective of theirs would meet
one of the main threads'.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from safetensors import SafetensorError

import dspref
from dspref import checkpoint, distributed
from dspref.checkpoint import Part, Progress
from dspref.config import Config
from dspref.errors import IOFault
from dspref.files import sync_folder, write_atomically
from dspref.run_folder import RunFolder

# What a file is, to a manifest: its size and its sha256.
Hashes = dict[str, tuple[int, str]]


class Saver:
    """Saves the checkpoints of a run. Made, and each method called, on all ranks at the same time."""

    def __init__(self, run: RunFolder, parts: Sequence[Part], config: Config, beat: Callable[[str], None]) -> None:
        """`parts`: what has a state to save; `beat`: told of every phase."""
        self._run, self._parts, self._rules, self._beat = run, parts, config.checkpoint, beat
        self._facts = checkpoint.facts_of(run, config)
        self._channel = distributed.Channel("commit")
        self._commit: Commit | None = None
        self._news: SimpleQueue[str] = SimpleQueue()

    def save(self, progress: Progress, metrics: Mapping[str, float], at_once: bool) -> None:
        """Write a checkpoint of all ranks. It is committed when this returns (`at_once`), or soon; `wait` tells.

        `metrics`: those of this step's evaluation, for `keep_best`. What goes wrong on any rank ends the attempt on all.
        A second attempt follows: now, or where the commit failed later on, with the next save. Raises IOFault when that
        fails too; earlier checkpoints stay.
        """
        at_once |= not self.wait()
        for _ in range(2):
            complaint = self._write(progress, metrics)
            if complaint is None and (not at_once or self.wait()):
                return
            if complaint:
                self._warn(progress.step, complaint)
        kept = checkpoint.committed_folders(self._run)
        last = f"{kept[-1].name} is kept" if kept else "there is no earlier one"
        raise IOFault(f"{self._run.checkpoints}: the checkpoint of step {progress.step} cannot be written; {last}")

    def wait(self) -> bool:
        """Wait for the commit that is on its way. False where it failed, with a warning."""
        commit, self._commit = self._commit, None
        complaint = commit.outcome() if commit else None
        if commit and complaint:
            self._warn(commit.draft.step, complaint)
        return complaint is None

    def news(self) -> list[str]:
        """What has been committed since the last call, in words, on rank 0."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def _warn(self, step: int, complaint: str) -> None:
        distributed.log(f"warning: step {step}: checkpoint not written ({complaint})", stamp=True)

    def _write(self, progress: Progress, metrics: Mapping[str, float]) -> str | None:
        """Write all files, and let the commit follow; what went wrong, on whichever rank. Phases end together, so that no
        rank waits for one that gave up."""
        facts = {**self._facts, "metrics": dict(metrics)}
        draft = Draft(self._run, progress.step, facts, time.monotonic(), [])
        phases = [lambda part=part: draft.files.extend(part.save(draft.folder)) for part in self._parts]
        for phase in (draft.begin, *phases, lambda: draft.write_progress(progress)):
            self._beat("checkpoint")
            if complaint := _together(phase):
                distributed.on_main(draft.discard)
                return complaint
        written = time.monotonic()
        self._commit = Commit(draft, self._channel, lambda hashes: self._publish(draft, hashes, written))
        self._commit.start()
        return None

    def _publish(self, draft: Draft, hashes: Hashes, written: float) -> None:
        """Commit what all ranks have brought to disk (rank 0)."""
        draft.publish(hashes)
        size, seconds = sum(size for size, _ in hashes.values()), time.monotonic() - draft.started
        waited = written - draft.started
        self._run.event("commit", step=draft.step, bytes=size, seconds=round(seconds, 2), waited=round(waited, 2))
        self._news.put(f"step {draft.step}: checkpoint committed ({size / 2**20:,.1f} MiB; training waited {waited:.1f} s)")
        checkpoint.prune(self._run, self._rules)


@dataclass
class Draft:
    """A checkpoint that is not committed yet."""

    run: RunFolder
    step: int
    facts: Mapping[str, Any]
    """What the manifest says beside the files."""
    started: float
    files: list[Path]
    """Those of this rank."""

    @property
    def committed(self) -> Path:
        """The folder that it will be."""
        return checkpoint.folder_of(self.run, self.step)

    @property
    def folder(self) -> Path:
        return self.committed.with_name(f".saving-{self.committed.name}")

    def begin(self) -> None:
        if distributed.world().rank == 0:
            self.discard()
            self.folder.mkdir(parents=True)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_progress(self, progress: Progress) -> None:
        """This rank's random generators, and once for all ranks, how far the run is."""
        generators, state = self.folder / f"rng-rank-{distributed.world().rank}.safetensors", self.folder / "state.json"
        checkpoint.save_rng(generators)
        self.files.append(generators)
        if distributed.world().rank == 0:
            write_atomically(state, json.dumps(asdict(progress), indent=2) + "\n")
            self.files.append(state)

    def hashes(self) -> Hashes:
        """Of this rank's files, which are on disk by then. Who wrote a file flushes it: another machine could not."""
        found = {str(path.relative_to(self.folder)): _hash(path) for path in self.files}
        for folder in {path.parent for path in self.files}:
            sync_folder(folder)
        return found

    def publish(self, hashes: Hashes) -> None:
        """Write the manifest, and give the folder its name."""
        manifest = {**self.facts, "step": self.step, "world_size": distributed.world().size, "dspref": dspref.__version__}
        manifest["files"] = dict(sorted(hashes.items()))
        write_atomically(self.folder / "manifest.json", json.dumps(checkpoint.signed(manifest), indent=1) + "\n")
        if self.committed.exists():  # left by a run that was resumed from an earlier step
            self.committed.rename(self.committed.with_name(f".trash-{self.committed.name}"))
        os.rename(self.folder, self.committed)
        sync_folder(self.run.checkpoints)


class Commit(Thread):
    """A draft on its way to disk: this rank's share, and on rank 0 what follows when all have done theirs."""

    def __init__(self, draft: Draft, channel: distributed.Channel, publish: Callable[[Hashes], None]) -> None:
        super().__init__(name="commit", daemon=True)
        self.draft = draft
        self._publish = publish
        self._meeting = channel.meeting()
        self._outcome: str | None = None
        self._bug: BaseException | None = None

    def run(self) -> None:
        try:
            self._outcome = self._bring_to_disk()
        except BaseException as error:  # shown by the main thread
            self._bug = error

    def outcome(self) -> str | None:
        """What went wrong, on whichever rank; waits for it. Called by the main threads of all ranks."""
        self.join()
        if self._bug:
            raise self._bug
        return self._meeting.verdict(self._outcome)

    def _bring_to_disk(self) -> str | None:
        hashes: Hashes = {}
        complaint = _complaint_of(lambda: hashes.update(self.draft.hashes()))
        reports = self._meeting.report({"complaint": complaint, "hashes": hashes})
        if reports is None:
            return None  # rank 0 does the rest
        for report in reports:
            hashes |= report["hashes"]
        complaint = next((report["complaint"] for report in reports if report["complaint"]), None)
        complaint = complaint or _complaint_of(lambda: self._publish(hashes))
        if complaint:
            self.draft.discard()
        return complaint


def _together(work: Callable[[], None]) -> str | None:
    """What the first rank that failed says of it; None where all did their work."""
    return next((said for said in distributed.gather_objects(_complaint_of(work)) if said), None)


def _complaint_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except SafetensorError as error:  # what safetensors makes of a full disk
        return str(error)
    return None


def _hash(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()

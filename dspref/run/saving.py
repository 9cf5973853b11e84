"""Saves: all ranks write, training goes on, and what they wrote is flushed to disk, hashed and committed beside it.

Training waits until the bytes are handed to the system, which keeps them as they were; the disk and the hashes take longer,
and are left to a thread of each rank.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from safetensors import SafetensorError

import dspref
from dspref import distributed
from dspref.config import CheckpointSection
from dspref.errors import IOFault
from dspref.files import Hashes, flushed, remove, sync_folder, write_atomically
from dspref.run import checkpoint, manifest
from dspref.run.checkpoint import Part, Progress
from dspref.run.folder import RunFolder
from dspref.run.meeting import Channel, Meeting
from dspref.watch.request import Request
from dspref.watch.watch import Watch

GONE = "was deleted or moved while the run was in it"
# Bytes per second of a disk that is slow, not hung: for so long a rank that waits for it counts as moving.
SLOWEST = 20e6
# How long a run that ends by an error waits for the commit that is on its way.
LEAVING_SECONDS = 120.0
# A network file system may show another machine's files a little late.
SEEN_SECONDS = 60.0


class Saver:
    """Saves the checkpoints of a run. Made, and `save` and `wait` called, on all ranks at the same time."""

    def __init__(
        self, run: RunFolder, parts: Sequence[Part], rules: CheckpointSection, facts: Mapping[str, Any], watch: Watch
    ) -> None:
        """`parts`: what has a state to save; `facts`: what `settings.facts_of` says of the run."""
        self._run, self._parts, self._rules, self._watch = run, parts, rules, watch
        self._facts = facts
        self._channel = Channel("commit")
        self._commit: Commit | None = None
        self._news: SimpleQueue[str] = SimpleQueue()

    def save(self, progress: Progress, metrics: Mapping[str, float], at_once: bool) -> None:
        """Write a checkpoint of all ranks. It is committed when this returns (`at_once`), or soon.

        `metrics`: those of this step's evaluation, for `keep_best`. What goes wrong on any rank ends the attempt on all. A
        second one follows: at once, or where it was a commit that failed meanwhile, of the step that is reached when a rank
        hears of it (`wish`). Raises IOFault when that fails too; earlier checkpoints stay.
        """
        asked, failure = time.monotonic(), self.wait()
        at_once |= failure is not None
        for _ in range(2 if failure is None else 1):
            draft = Draft(self._run, progress.step, {**self._facts, "metrics": dict(metrics)}, asked, at_once)
            failure = self._write(draft, progress)
            if failure is None:
                self._commit = Commit(draft, self._channel.meeting(), self._on_commit, self._on_failure)
                self._commit.start()
                failure = self.wait() if at_once else None
            if failure is None:
                return
            if failure.endswith(GONE):
                raise IOFault(f"{failure}, at step {progress.step}; put it back, and the same command goes on")
        kept = checkpoint.committed_folders(self._run)
        last = f"{kept[-1].name} is kept" if kept else "there is no earlier one"
        raise IOFault(
            f"{self._run.checkpoints}: the checkpoint of step {progress.step} cannot be written ({failure}); {last}; "
            "free space or mend the disk, and the same command goes on"
        )

    @property
    def wish(self) -> Request:
        """What this rank asks of all: to save again where it has heard that a commit failed."""
        return Request.SAVE if self._commit and self._commit.has_failed else Request.NOTHING

    def wait(self) -> str | None:
        """Wait for the commit that is on its way; what went wrong with it, on whichever rank."""
        commit = self._commit
        if commit is None:
            return None
        patience = time.monotonic() + commit.draft.most_bytes / SLOWEST
        self._watch.beat("commit")
        while commit.is_alive():
            commit.join(1.0)
            if time.monotonic() < patience:
                self._watch.beat("commit")
        self._commit = None
        return commit.outcome()

    def leave(self) -> None:
        """The run ends by an error: a commit that is on its way is given some time, unless other ranks have left."""
        if commit := self._commit:
            deadline = time.monotonic() + LEAVING_SECONDS
            while commit.is_alive() and time.monotonic() < deadline and not self._watch.has_verdict:
                commit.join(0.25)
            commit.give_up()

    def news(self) -> list[str]:
        """What has been committed, or failed, since the last call, in words; on rank 0."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def _write(self, draft: Draft, progress: Progress) -> str | None:
        """Write all files of all ranks; what went wrong. Phases end together: no rank waits for one that gave up."""
        saving = [lambda part=part: draft.files.extend(part.save(draft.folder)) for part in self._parts]
        for phase in (draft.begin, *saving, lambda: draft.write_progress(progress)):
            self._watch.beat("checkpoint")
            if complaint := next((said for said in distributed.gather_objects(_complaint(phase)) if said), None):
                self._on_failure(draft, complaint)
                return complaint
        draft.are_written()
        return None

    def _on_commit(self, draft: Draft, size: int) -> None:
        """Of rank 0, in the thread: it is committed, whatever goes wrong here."""
        seconds, waited = draft.seconds()
        where = f"{size / 2**20:,.1f} MiB in {seconds:.1f} s, of which training waited {waited:.1f} s"
        self._news.put(f"step {draft.step}: checkpoint committed ({where})")
        about = {"step": draft.step, "bytes": size, "seconds": round(seconds, 2), "waited": round(waited, 2)}
        if complaint := _complaint(lambda: self._run.event("commit", **about)):
            self._news.put(f"warning: {complaint}")
        for warning in checkpoint.prune(self._run, self._rules):
            self._news.put(f"warning: {warning}")

    def _on_failure(self, draft: Draft, complaint: str) -> None:
        if distributed.world().rank == 0:
            draft.discard()
            self._news.put(f"warning: step {draft.step}: checkpoint not written ({complaint})")


@dataclass
class Draft:
    """A checkpoint that is not committed yet."""

    run: RunFolder
    step: int
    facts: Mapping[str, Any]
    """What the manifest says beside the files."""
    asked: float
    """When training began to wait for it."""
    at_once: bool
    files: list[Path] = field(default_factory=list)
    """Those that this rank wrote."""
    most_bytes: int = 0
    """Of all ranks."""
    written: float = 0.0

    @property
    def committed(self) -> Path:
        """The folder that it will be."""
        return manifest.folder_of(self.run.checkpoints, self.step)

    @property
    def folder(self) -> Path:
        return self.committed.with_name(f".saving-{self.committed.name}")

    def begin(self) -> None:
        if distributed.world().rank == 0:
            self.discard()
            if not self.run.is_there:
                raise FileNotFoundError(errno.ENOENT, GONE, str(self.run.path))
            self.folder.mkdir(parents=True)

    def discard(self) -> None:
        remove(self.folder)

    def write_progress(self, progress: Progress) -> None:
        """This rank's random generators, and once for all ranks, how far the run is."""
        generators, state = self.folder / f"rng-rank-{distributed.world().rank}.safetensors", self.folder / "state.json"
        checkpoint.save_rng(generators)
        self.files.append(generators)
        if distributed.world().rank == 0:
            write_atomically(state, json.dumps(asdict(progress), indent=2) + "\n")
            self.files.append(state)

    def are_written(self) -> None:
        """All ranks have written all files."""
        self.most_bytes = distributed.largest(sum(path.stat().st_size for path in self.files))
        self.written = time.monotonic()

    def seconds(self) -> tuple[float, float]:
        """(from the wish to now, of which training waited)."""
        whole = time.monotonic() - self.asked
        return whole, whole if self.at_once else self.written - self.asked

    def hashes(self) -> Hashes:
        """Of this rank's files, which are on disk by then. Who wrote a file flushes it: another machine could not."""
        found = {str(path.relative_to(self.folder)): flushed(path) for path in self.files}
        for folder in {path.parent for path in self.files}:
            sync_folder(folder)
        return found

    def publish(self, hashes: Hashes) -> None:
        """Write the manifest, and give the folder its name. Raises OSError where rank 0 sees other files than these."""
        self._compare(hashes)
        said = {**self.facts, "step": self.step, "world_size": distributed.world().size, "dspref": dspref.__version__}
        said["files"] = dict(sorted(hashes.items()))
        self.run.flush()
        write_atomically(self.folder / manifest.NAME, json.dumps(manifest.signed(said), indent=1) + "\n")
        if os.path.lexists(self.committed):  # left by a run that was resumed from an earlier step
            self.committed.rename(self.committed.with_name(f".trash-{self.committed.name}"))
        os.rename(self.folder, self.committed)
        sync_folder(self.run.checkpoints)

    def _compare(self, hashes: Hashes) -> None:
        deadline = time.monotonic() + SEEN_SECONDS
        while unseen := [name for name, (size, _) in hashes.items() if not _has_size(self.folder / name, size)]:
            if time.monotonic() > deadline:
                raise OSError(f"rank 0 does not see {self.folder / unseen[0]}: output_dir must be shared by all machines")
            time.sleep(distributed.POLL_SECONDS)
        there = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        if unknown := sorted(there - hashes.keys()):
            raise OSError(f"{self.folder / unknown[0]} was written by no rank of this run")


class Commit(Thread):
    """A draft on its way to disk: this rank's share, and on rank 0 what follows when all have done theirs."""

    def __init__(
        self,
        draft: Draft,
        meeting: Meeting,
        on_commit: Callable[[Draft, int], None],
        on_failure: Callable[[Draft, str], None],
    ) -> None:
        """On rank 0 one of the two is called at the end."""
        super().__init__(name="commit", daemon=True)
        self.draft = draft
        self._meeting, self._on_commit, self._on_failure = meeting, on_commit, on_failure
        self._failure: str | None = None
        self._bug: BaseException | None = None

    def run(self) -> None:
        try:
            self._failure = self._bring_to_disk()
        except BaseException as error:  # raised again where the main thread meets it
            self._bug = error

    @property
    def has_failed(self) -> bool:
        return not self.is_alive() and (self._bug or self._failure) is not None

    def outcome(self) -> str | None:
        """What went wrong, on whichever rank, once the thread has ended."""
        if self._bug:
            raise self._bug
        return self._failure

    def give_up(self) -> None:
        """Stop waiting for other ranks: a thread that is in the store when Python ends would abort the process."""
        self._meeting.over.set()
        self.join(1.0)

    def _bring_to_disk(self) -> str | None:
        hashes: Hashes = {}
        complaint = _complaint(lambda: hashes.update(self.draft.hashes()))
        reports = self._meeting.report((complaint, hashes))
        return self._meeting.answer(None if reports is None else self._publish(reports))

    def _publish(self, reports: Sequence[tuple[str | None, Hashes]]) -> str | None:
        """What rank 0 makes of the reports of all ranks; what went wrong."""
        hashes = {name: entry for _, of_rank in reports for name, entry in of_rank.items()}
        failure = next((complaint for complaint, _ in reports if complaint), None)
        failure = failure or _complaint(lambda: self.draft.publish(hashes))
        if failure:
            self._on_failure(self.draft, failure)
        else:
            self._on_commit(self.draft, sum(size for size, _ in hashes.values()))
        return failure


def _complaint(work: Callable[[], None]) -> str | None:
    """What went wrong with files; None where nothing did."""
    try:
        work()
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except SafetensorError as error:  # what safetensors makes of a full disk
        return str(error)
    return None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False

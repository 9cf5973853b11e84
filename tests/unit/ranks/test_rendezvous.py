"""Ranks of one machine meet where no other user can be, see each other die, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dspref.errors import EnvironmentFault
from dspref.processes import Process, place
from dspref.ranks import local_store, rendezvous
from dspref.ranks.rendezvous import Mark, World

ROOT = Path(__file__).resolve().parents[3]
# A rank without torch: it says that it is there, waits for a line, and meets the others; then it ends at the next line.
RANK = """
import os, sys
from dspref.ranks import rendezvous
from dspref.errors import UserError
try:
    rendezvous.announce()
    print("announced", flush=True)
    sys.stdin.readline()
    world = rendezvous.read_environment(os.environ)
    store, group = rendezvous.meet(world, lambda line: print(line, flush=True))
    store.set(f"said/{world.rank}", "x")
    print("met", group.parent.name, flush=True)
    sys.stdin.readline()
except UserError as error:
    print(int(error.exit_code), error, flush=True)
"""


class Rank:
    def __init__(self, rank: int, size: int, temporary: Path, **environment: str) -> None:
        numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        given = {key: str(value) for key, value in numbers.items()} | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK], env=os.environ | given | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr

    def said(self) -> str:
        return self.stdout.readline().strip()

    def go_on(self) -> Rank:
        self.stdin.write("\n")
        self.stdin.flush()
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    ranks = []

    def start(rank: int, size: int = 2, **environment: str) -> Rank:
        ranks.append(Rank(rank, size, tmp_path, **environment))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.kill()


def folder_in(temporary: Path) -> Path:
    (folder,) = temporary.glob(f"dspref-{os.geteuid()}-*")
    return folder


def until_empty(folder: Path) -> bool:
    deadline = time.monotonic() + 20
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(folder.iterdir())


def test_ranks_meet_and_leave_nothing_behind(start, tmp_path):
    ranks = [start(rank, 3) for rank in range(3)]
    assert [rank.said() for rank in ranks] == ["announced"] * 3
    for rank in reversed(ranks):
        rank.go_on()
    words = {rank.said() for rank in ranks}
    assert len(words) == 1 and words.pop().startswith("met job-")
    folder = folder_in(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700 and [path.name[:4] for path in folder.iterdir()] == ["job-"]
    for rank in ranks:
        rank.go_on().process.wait()
    assert until_empty(folder)


def test_nothing_is_left_behind_by_ranks_that_are_killed(start, tmp_path):
    ranks = [start(rank) for rank in range(2)]
    for rank in ranks:
        rank.said()
        rank.go_on()
    for rank in ranks:
        assert rank.said().startswith("met")
    for rank in ranks:
        rank.kill()
    assert until_empty(folder_in(tmp_path))


def test_several_jobs_of_one_shell_meet_apart(start):
    ranks = [start(rank, MASTER_PORT=port) for port in ("29501", "29502") for rank in range(2)]
    for rank in ranks:
        rank.said()
        rank.go_on()
    first, second, third, fourth = (rank.said() for rank in ranks)
    assert first == second and third == fourth and first != third


@pytest.mark.parametrize(("dead", "waiting"), [(1, 0), (0, 1)])
def test_a_rank_that_dies_before_the_meeting_ends_the_wait(dead, waiting, start):
    ranks = [start(rank) for rank in range(2)]
    for rank in ranks:
        assert rank.said() == "announced"
    ranks[waiting].go_on()
    time.sleep(0.3)  # it waits; where it does not yet, what it finds is the same
    ranks[dead].kill()
    whom = f"rank {dead} (process {ranks[dead].process.pid})"
    assert ranks[waiting].said() == f"4 {whom} ended before the ranks met; see what it said, and start all again"


def test_of_many_that_wait_one_speaks(start):
    ranks = [start(rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.said()
    for rank in ranks[:2]:
        rank.go_on()
    time.sleep(1.0)  # both have joined
    ranks[2].kill()
    said = sorted(rank.said() for rank in ranks[:2])
    assert said[0].startswith("4 rank 2 (process") and said[1] == "4 reported by another rank"


def test_a_rank_that_nobody_has_heard_of_is_named(start, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rendezvous, "WORD_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "UNHEARD_MINUTES", 0.005)
    monkeypatch.setattr(rendezvous, "_spot", None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    rendezvous.announce()
    lines: list[str] = []
    with pytest.raises(EnvironmentFault, match=r"^ranks 1, 2 of 3 did not come within 0\.005 minutes; start one process"):
        rendezvous.meet(World(0, 3, 0, 3), lines.append)
    assert lines == ["rank 0 waits for ranks 1, 2 of 3: nothing heard yet; at most 0.005 minutes"]


def test_what_a_dead_job_left_misleads_nobody(start, tmp_path):
    """Of the same shell and with the same settings: an announcement, a notice, a job whose server is gone."""
    first = [start(rank) for rank in range(2)]
    for rank in first:
        rank.said()
    first[0].go_on()
    notices = lambda: [path for path in tmp_path.glob("dspref-*/*.notice") if path.stat().st_size]  # noqa: E731
    while not notices():
        time.sleep(0.02)
    left = [(path, path.read_text()) for path in tmp_path.glob("dspref-*/*.*")]
    for rank in first:
        rank.kill()
    time.sleep(1.5)  # older than the next ranks by more than what counts as one start
    for path, text in left:
        path.write_text(text)
    second = [start(rank) for rank in range(2)]
    for rank in second:
        rank.said()
    second[1].go_on()
    time.sleep(0.3)
    second[0].go_on()
    assert second[0].said() == second[1].said() != ""
    assert all(rank.process.poll() is None for rank in second)


def test_a_number_that_now_is_another_process_is_not_the_old_one():
    own = Process.find(os.getpid())
    assert own and not Mark(own, place()).is_dead
    assert Mark(own._replace(started=str(int(own.started) - 1)), place()).is_dead
    assert not Mark(Process(own.pid, "1"), "another container").is_dead  # of which nothing is seen


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"dspref-{os.geteuid()}-{os.uname().nodename}"


def test_the_folder_is_this_users_alone(temporary, tmp_path):
    assert rendezvous.private_folder().resolve() == temporary and temporary.stat().st_mode & 0o777 == 0o700
    assert rendezvous.private_folder().resolve() == temporary  # and is found again
    temporary.chmod(0o755)
    with pytest.raises(EnvironmentFault, match=r"others could join them .*mode 755.*; remove it, or set TMPDIR"):
        rendezvous.private_folder()
    temporary.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault, match="a link, or no folder"):
        rendezvous.private_folder()
    temporary.unlink()
    temporary.write_text("")
    with pytest.raises(EnvironmentFault, match="a link, or no folder"):
        rendezvous.private_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_folder_of_another_user_is_refused(temporary):
    temporary.mkdir(mode=0o700)
    os.chown(temporary, 65534, 65534)
    with pytest.raises(EnvironmentFault, match="it belongs to user 65534"):
        rendezvous.private_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_cannot_join(tmp_path):
    """Not through the folder, and where that is open not through the socket either."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    store = local_store.serve(folder)
    store.set("key", "value")
    attempt = (
        "import os, socket; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        f"s.connect({str(folder)!r} + '/socket'); s.sendall(b'\\x0e\\0\\0\\0[\"get\", \"key\"]'); print(s.recv(100))"
    )
    command = [sys.executable, "-I", "-S", "-c", attempt]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "PermissionError" in refused.stderr
    folder.chmod(0o777)
    (folder / "socket").chmod(0o777)
    joined = subprocess.run(command, capture_output=True, text=True)
    assert joined.stdout == "b''\n" or "ConnectionResetError" in joined.stderr or "BrokenPipe" in joined.stderr
    assert store.get("key") == "value"
    store.close()


def test_the_store(tmp_path):
    store = local_store.serve(tmp_path)
    other = store.own("watch")
    assert not store.check(["a"]) and store.compare_set("a", "", "1") == "1" == store.get("a")
    assert store.compare_set("a", "", "2") == "1" and store.compare_set("a", "1", "3") == "3"
    assert store.compare_set("missing", "x", "y") == "x" and not store.check(["missing"])
    assert [store.add("n", number) for number in (0, 2, 3)] == [0, 2, 5]
    other.set("a", "ä" * 300_000)
    assert store.get("a") == "3" and store.get("watch/a") == other.get("a") == "ä" * 300_000
    assert other.delete_key("a") and not other.delete_key("a")
    with pytest.raises(KeyError):
        other.get("a")


def test_a_question_that_a_signal_ends_leaves_no_answer_behind(tmp_path):
    """The next one must not take it for its own."""

    class Asked(BaseException):
        pass

    def ask(number, frame):
        raise Asked

    store, before = local_store.serve(tmp_path), signal.signal(signal.SIGALRM, ask)
    store.set("long", "x" * 1_000_000)
    interrupted = 0
    try:
        for turn in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + turn % 20 * 0.0001)
                while True:
                    store.get("long")
            except Asked:
                interrupted += 1
            assert store.add("turns", 1) == turn + 1 and store.get("long") == "x" * 1_000_000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        store.close()
    assert interrupted == 300


def test_the_server_outlives_signals_and_whoever_started_it(tmp_path):
    store = local_store.serve(tmp_path)
    store.set("a", "1")
    (server,) = [p for p in Path("/proc").glob("[0-9]*") if _folder_of(p) == tmp_path and p.name != str(os.getpid())]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(int(server.name), number)
    assert store.get("a") == "1"
    os.kill(int(server.name), signal.SIGKILL)
    with pytest.raises(local_store.ContactLost):
        store.get("a")
        store.get("a")


def _folder_of(process: Path) -> Path | None:
    try:
        return Path(os.readlink(process / "cwd"))
    except OSError:
        return None


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, World(1, 2, 1, 2)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
         World(3, 4, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, World()),
    ],
)  # fmt: skip
def test_the_world_of_each_launcher(environment, world):
    assert rendezvous.read_environment(environment) == world


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "x"}, {"RANK": "1", "WORLD_SIZE": "\x1b[2J"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"RANK": "²"}],
)
def test_what_is_no_world(environment):
    with pytest.raises(EnvironmentFault) as caught:
        rendezvous.read_environment(environment)
    assert str(caught.value).isprintable() and json.dumps(str(caught.value))

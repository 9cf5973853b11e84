"""Digests of files, remembered: never one that the file no longer has."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from dspref.model import digests
from dspref.model.digests import sha256


def true(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where digests are remembered; a cache of this test's own."""
    monkeypatch.setenv("DSPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as settled as soon as it is written."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)


def make(path: Path, content: bytes = b"abc" * 1000) -> Path:
    path.write_bytes(content)
    return path


def lie(memory: Path, path: Path) -> None:
    """Make the memory say something else of a file."""
    known, name = json.loads(memory.read_text()), str(path.resolve())
    known[name] = digests.sealed(name, known[name]["state"], "remembered")
    memory.write_text(json.dumps(known))


@pytest.mark.usefixtures("settled")
def test_a_settled_file_is_not_read_again(memory: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    assert sha256(path) == true(path)
    lie(memory, path)
    assert sha256(path) == "remembered"
    (tmp_path / "link").symlink_to(path)
    assert sha256(tmp_path / "link") == "remembered", "one file, whatever it is called"


@pytest.mark.usefixtures("settled")
def test_each_file_has_its_own_entry(memory: Path, tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b", b"other")
    assert (sha256(first), sha256(second)) == (true(first), true(second))
    lie(memory, second)
    assert (sha256(first), sha256(second)) == (true(first), "remembered")
    first.unlink()
    third = make(tmp_path / "c")
    assert sha256(third) == true(third)
    assert set(json.loads(memory.read_text())) == {str(second), str(third)}, "files that are gone are forgotten"


def after(path: Path, old: os.stat_result) -> None:
    """Wait until the file system's clock has moved, so that a change is one that it can show."""
    deadline = time.monotonic() + 10
    while path.stat().st_ctime_ns == old.st_ctime_ns and time.monotonic() < deadline:
        path.touch()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("set_back", [False, True], ids=["written", "and set back"])
def test_a_change_of_the_same_size_is_seen(set_back: bool, memory: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "a", b"x" * 1000)
    old = path.stat()
    assert sha256(path) == true(path) and memory.exists()
    after(path, old)
    path.write_bytes(b"y" * 1000)
    if set_back:
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert path.stat().st_mtime_ns == old.st_mtime_ns
    assert (path.stat().st_size, path.stat().st_ino) == (old.st_size, old.st_ino)
    assert sha256(path) == true(path)


@pytest.mark.usefixtures("settled")
def test_another_file_of_the_same_size_and_time_in_its_place_is_seen(memory: Path, tmp_path: Path) -> None:
    path, other = make(tmp_path / "a", b"x" * 1000), make(tmp_path / "b", b"y" * 1000)
    assert sha256(path) == true(path) and memory.exists()
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert sha256(path) == true(path)


@pytest.mark.usefixtures("settled")
def test_a_file_that_grows_is_seen(memory: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    first, old = sha256(path), path.stat()
    assert memory.exists()
    with open(path, "ab") as file:
        file.write(b"more")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert sha256(path) == true(path) != first


def test_a_file_that_was_just_written_is_not_remembered(memory: Path, tmp_path: Path) -> None:
    """It could change once more within a tick of the clock."""
    path = make(tmp_path / "a")
    assert sha256(path) == true(path)
    assert not memory.exists()
    for content in (b"x" * 50, b"y" * 50, b"z" * 50):
        path.write_bytes(content)
        assert sha256(path) == true(path)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"PATH": null}', b'{"PATH": []}', b'{"PATH": 3}', b'{"PATH": "text"}'],
)
def test_a_broken_memory_does_no_harm(content: bytes, memory: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    memory.parent.mkdir()
    memory.write_bytes(content.replace(b"PATH", str(path).encode()))
    assert sha256(path) == true(path)
    lie(memory, path)  # which is only possible in a memory that is whole again
    assert sha256(path) == "remembered"


@pytest.mark.usefixtures("settled")
def test_no_changed_character_of_the_memory_is_believed(memory: Path, tmp_path: Path) -> None:
    """Whichever it is, of a digit of the digest too: the file is hashed again."""
    path = make(tmp_path / "a")
    sha256(path)
    content = memory.read_bytes()
    for place in range(len(content)):
        for change in (1, 2, 16):
            memory.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
            assert sha256(path) == true(path), (place, change)


@pytest.mark.usefixtures("settled")
def test_a_memory_with_names_of_no_files_does_no_harm(memory: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    memory.parent.mkdir()
    names = ["x" * 300, "a\0b", "", "\ud800"]
    memory.write_text(json.dumps({name: digests.sealed(name, [1, 2, 3, 4], "0" * 64) for name in names}))
    assert sha256(path) == true(path)
    assert list(json.loads(memory.read_text())) == [str(path)]
    memory.write_text("[" * 100_000)
    assert sha256(path) == true(path)


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a")
    make(tmp_path / "file")
    monkeypatch.setenv("DSPREF_CACHE", str(tmp_path / "file"))  # no folder can be made below a file
    for _ in range(2):
        assert sha256(path) == true(path)
    monkeypatch.setenv("DSPREF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "digests.json").mkdir(parents=True)  # nor a file in the place of a folder
    assert sha256(path) == true(path)


@pytest.mark.usefixtures("settled")
def test_the_memory_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a")
    for name in ("one", "two"):
        monkeypatch.setenv("DSPREF_CACHE", str(tmp_path / name))
        assert sha256(path) == true(path)
        assert [entry.name for entry in (tmp_path / name).iterdir()] == ["digests.json"]
    lie(tmp_path / "two" / "digests.json", path)
    assert sha256(path) == "remembered"
    monkeypatch.setenv("DSPREF_CACHE", str(tmp_path / "one"))
    assert sha256(path) == true(path)


def test_a_missing_file_is_an_error(memory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "absent")
    assert not memory.exists()

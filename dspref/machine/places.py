"""Files and folders of a machine: who holds one, who may write there, what kind of file system it is on."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# File systems whose locks may be held by other machines.
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.sshfs", "afs", "wekafs")


def others_may_write(folder: Path) -> str:
    """Why another user may put files there; empty where none may. A group is trusted: it may be the user's own."""
    about = folder.stat()
    if about.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {about.st_uid}"
    return "every user may write there" if about.st_mode & stat.S_IWOTH else ""


def holder_of(path: Path, proc: Path = Path("/proc")) -> int | None:
    """A process of this machine that has the file open."""
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path.resolve()):
                return int(link.parts[-3])
        except OSError:  # it ended, or is another user's
            continue
    return None


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def file_system(path: Path, proc: Path = Path("/proc")) -> str:
    """Type of the file system that holds a path, as the mount table has it."""
    table, inside = proc / "mounts", str(nearest(path).resolve())
    rows = [line.split()[1:3] for line in table.read_text().splitlines()] if table.exists() else []
    holding = [row for row in rows if inside == row[0] or inside.startswith(row[0].rstrip("/") + "/")]
    return max(holding, key=lambda row: len(row[0]), default=["", ""])[1]

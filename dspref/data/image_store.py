"""The images of a token store: where each is, and which pairs have which; no pixels.

An image of a file is read anew whenever its pair is in a pack, and must be the one that it was; of a row that has the bytes
itself these are in the store, as they were written, since rows cannot be read in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspref import reading
from dspref.data.cache import Column
from dspref.data.image_files import Picture, Shown, decode, stamp_of
from dspref.data.images import Pictures, RowImages
from dspref.data.rows import RowError
from dspref.data.sight import Sight
from dspref.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

TABLE, OF_PAIRS, BYTES = "images.json", "pictures.npy", "image_bytes.npy"
CHANGED = "start again with the images that the run began with"


class ImageWriter:
    """Collects the images of pairs as they are kept."""

    def __init__(self, folder: Path, sight: Sight) -> None:
        self.folder, self.sight = folder, sight
        self.of_pairs = Column(folder / OF_PAIRS, np.int64, 2)
        """(pair, image) of each image of each pair, in order."""
        self.bytes = Column(folder / BYTES, np.uint8)
        self.known: dict[tuple[str, int, str | None], int] = {}
        self.table: list[list[object]] = []
        self.pairs = 0
        self.content = hashlib.sha256()
        """Of the images of all pairs, in order."""

    def digests(self, pictures: Sequence[Sequence[Picture]]) -> list[bytes]:
        """Of each pair's images, empty where it has none."""
        found = [self.sight.digest_of(own) if own else b"" for own in pictures]
        self.content.update(b" ".join([*found, b""]))
        return found

    def add(self, pictures: Sequence[Sequence[Picture]], files: Sequence[int]) -> None:
        """The images of some more pairs, and the number of the file that each pair is from."""
        for own, file in zip(pictures, files, strict=True):
            for picture in own:
                self.of_pairs.append([(self.pairs, self._number(picture, file))])
            self.pairs += 1

    def _number(self, picture: Picture, file: int) -> int:
        key = (picture.digest, file, picture.path)
        if key not in self.known:
            begin = self.bytes.rows
            if picture.path is None:
                self.bytes.append(np.frombuffer(picture.data, dtype=np.uint8))
            self.known[key] = len(self.table)
            size = (picture.height, picture.width)
            self.table.append([file, picture.path, picture.digest, *size, *picture.stamp, begin, self.bytes.rows])
        return self.known[key]

    def close(self) -> None:
        for column in (self.of_pairs, self.bytes):
            column.close()
        (self.folder / TABLE).write_text(json.dumps(self.table), encoding="utf-8")


def address_of(folder: Path) -> str:
    """A short digest of the images of a store that was built."""
    table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    return hashlib.sha256("".join(sorted({row[2] for row in table})).encode()).hexdigest()[:16]


class StoredImages:
    """The images of a store's pairs. `folders`: of each file of its sources, where the paths of its images begin."""

    def __init__(self, folder: Path, folders: Sequence[Path], where: Callable[[int], str]) -> None:
        self.table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        self.folders, self.where = folders, where
        self.bytes = np.load(folder / BYTES, mmap_mode="r", allow_pickle=False)
        of_pairs = np.load(folder / OF_PAIRS, allow_pickle=False)
        self._pairs, self._images = of_pairs[:, 0], of_pairs[:, 1]

    def of(self, pair: int) -> Shown:
        """The images of a pair."""
        first, stop = np.searchsorted(self._pairs, [pair, pair + 1])
        found, folder = [], ""
        for image in self._images[first:stop].tolist():
            file, path, digest, height, width, size, time, begin, end = self.table[image]
            own = b"" if path is not None else self.bytes[begin:end].tobytes()
            found.append(Picture(path, digest, height, width, (size, time), own))
            folder = str(self.folders[file])
        return Shown(tuple(found), folder, self.where(pair))

    def changed(self, digest: Callable[[Path], str]) -> str | None:
        """The first image that is not what it was, or not there: those are read whose file looks otherwise."""
        for file, path, expected, _, _, size, time, _, _ in self.table:
            if path is None:
                continue
            at = self.folders[file] / Path(path).expanduser()
            try:
                if stamp_of(at) != (size, time) and digest(at) != expected:
                    return path
            except OSError:
                return path
        return None

    def digests(self, pair: int, sight: Sight) -> bytes:
        own = self.of(pair).pictures
        return sight.digest_of(own) if own else b""


def pictures_of(rows: Sequence[Shown], sight: Sight) -> Pictures:
    """The images of some prompts, decoded and ready for the tower. Raises DataError in one line."""
    read: dict[bytes, RowImages] = {}
    found: list[RowImages | None] = []
    for shown in rows:
        digest = sight.digest_of(shown.pictures) if shown.pictures else b""
        if shown.pictures and digest not in read:
            try:
                read[digest] = sight.read(decoded(shown), digest)
            except RowError as error:
                raise DataError(f"{shown.where}: {error.field}: {error.reason}; fix: {error.fix}") from None
        found.append(read.get(digest))
    return Pictures(found, sight.layout)


def decoded(shown: Shown) -> list[Image]:
    """The images of a prompt, which must be what they were. Raises RowError."""
    places = [f"images[{k}]" for k in range(len(shown.pictures))]
    return [decode(_data(picture, shown.folder, place), place) for picture, place in zip(shown.pictures, places)]


def _data(picture: Picture, folder: str, place: str) -> bytes:
    if picture.path is None:
        return picture.data
    path = Path(folder) / Path(picture.path).expanduser()
    try:
        with reading.open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise RowError(place, f"{path}: {error.strerror}", CHANGED) from None
    if hashlib.sha256(data).hexdigest() != picture.digest:
        raise RowError(place, f"{path}: has changed since it was looked at", CHANGED)
    return data

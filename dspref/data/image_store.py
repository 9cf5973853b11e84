"""The images of a token store: where each is, and which pairs have which; no pixels.

An image of a file is read anew whenever its pair is in a pack, and must be the one that it was; of a row that has the bytes
itself these are in the store, as they were written, since rows cannot be read in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dspref import reading
from dspref.data.cache import Column
from dspref.data.image_files import Picture, decode, stamp_of
from dspref.data.images import Pictures, RowImages
from dspref.data.rows import RowError
from dspref.data.sight import Sight
from dspref.errors import DataError

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
            self.table.append([file, picture.path, picture.digest, *picture.stamp, begin, self.bytes.rows])
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

    def of(self, pair: int) -> list[Picture]:
        """The images of a pair, in order, without their sizes."""
        first, stop = np.searchsorted(self._pairs, [pair, pair + 1])
        found = []
        for image in self._images[first:stop].tolist():
            file, path, digest, size, time, begin, end = self.table[image]
            if path is None:
                found.append(Picture(None, digest, 0, 0, data=self.bytes[begin:end].tobytes()))
            else:
                found.append(Picture(str(self.folders[file] / Path(path).expanduser()), digest, 0, 0, (size, time)))
        return found

    def changed(self, digest: Callable[[Path], str]) -> str | None:
        """The first image that is not what it was, or not there: those are read whose file looks otherwise."""
        for file, path, expected, size, time, _, _ in self.table:
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
        own = self.of(pair)
        return sight.digest_of(own) if own else b""

    def pictures(self, pairs: Sequence[int], sight: Sight) -> Pictures:
        """The images of some pairs, decoded and ready for the tower. Raises DataError in one line."""
        read: dict[bytes, RowImages] = {}
        rows: list[RowImages | None] = []
        for pair in pairs:
            own = self.of(pair)
            digest = sight.digest_of(own) if own else b""
            if own and digest not in read:
                try:
                    images = [decode(self._data(picture, k), f"images[{k}]") for k, picture in enumerate(own)]
                    read[digest] = sight.read(images, digest)
                except RowError as error:
                    raise DataError(f"{self.where(pair)}: {error.field}: {error.reason}; fix: {error.fix}") from None
            rows.append(read.get(digest))
        return Pictures(rows, sight.layout)

    def _data(self, picture: Picture, k: int) -> bytes:
        if picture.path is None:
            return picture.data
        try:
            with reading.open_regular(picture.path) as file:
                data = file.read()
        except OSError as error:
            raise RowError(f"images[{k}]", f"{picture.path}: {error.strerror}", CHANGED) from None
        if hashlib.sha256(data).hexdigest() != picture.digest:
            raise RowError(f"images[{k}]", f"{picture.path}: has changed since it was looked at", CHANGED)
        return data

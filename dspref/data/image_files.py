"""Images as rows name them: a file's path, bytes, or an image of PIL. They are looked at without decoding a pixel, and
decoded later."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dspref import reading
from dspref.data.rows import RowError, one_line, what_is

if TYPE_CHECKING:
    from PIL.Image import Image

# Of one image: bytes of its file, and pixels.
MAX_BYTES, MAX_PIXELS = 2**26, 2**26
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DATA = re.compile(r"data:[\w/+.-]*;base64,")
# A name of a file is not longer.
LONGEST, BASE64 = 255, re.compile(r"[A-Za-z0-9+/_=\s-]+")
# Orientations by which a camera says that height and width change places.
TURNED, ORIENTATION = (5, 6, 7, 8), 0x0112
FETCH = "fetch it, and write its path"
MEND = "mend the image, or set data.on_bad_row: drop"


class Picture(NamedTuple):
    """An image of a row, before it is decoded."""

    path: str | None
    """As the row has it, relative to the folder of its file; None: of bytes in the row itself."""
    digest: str
    """sha256 of its bytes."""
    height: int
    width: int
    stamp: tuple[int, int] = (0, 0)
    """(size, time of the last change) of its file."""
    data: bytes = b""
    """The bytes, where the row has them itself."""


class Shown(NamedTuple):
    """The images of a prompt, in order."""

    pictures: tuple[Picture, ...] = ()
    folder: str = ""
    """Where their paths begin."""
    where: str = ""
    """The file and line of their row, for messages."""

    @property
    def names(self) -> list[str]:
        """Paths as the row has them, and digests of what has none."""
        return [picture.path or f"sha256:{picture.digest}" for picture in self.pictures]

    @classmethod
    def received(cls, values: Sequence[Any]) -> Shown:
        """Of the bare values that another rank has sent."""
        pictures, folder, where = values
        return cls(tuple(map(Picture._make, pictures)), folder, where)


NOTHING = Shown()


def folder_of(file: str) -> Path:
    """Where the paths of images begin that stand in a file, or in a folder of several."""
    path = Path(file)
    return path if path.is_dir() else path.parent


def look(value: Any, folder: Path, place: str) -> Picture:
    """What a row names at `place`: its size and its digest. Raises RowError for what is no image that can be read."""
    path, data, stamp = None, _own_bytes(value, place), (0, 0)
    if data is None:
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str | Path) or not str(path):
            found = "an empty text" if path == "" else what_is(path)
            raise RowError(place, f"{found}, and no image", "write the path of a file")
        path = str(path)
        if path.startswith("data:") or (len(path) > LONGEST and BASE64.fullmatch(path)):
            raise RowError(place, "bytes as text, and no path", "begin it with data:image/png;base64, or write a path")
        if URL.match(path):
            raise RowError(place, f"{one_line(path, 80)!r} is a URL, and nothing is fetched from the network", FETCH)
        data, stamp = _read(placed_at(path, folder, place), place)
    if len(data) > MAX_BYTES:
        size = f"{one_line(str(path), 200)}: {stamp[0]:,}" if path else f"{len(data):,}"
        raise RowError(place, f"{size} bytes, more than the {MAX_BYTES:,} that are read", "make it smaller")
    height, width = _size(data, place)
    digest = hashlib.sha256(data).hexdigest()
    return Picture(path, digest, height, width, stamp, b"" if path else data)


def placed_at(path: str, folder: Path, place: str) -> Path:
    """Where a file is that a row names. Raises RowError."""
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:  # a ~name of nobody
        raise RowError(place, f"{one_line(path, 200)}: no such user", "write the whole path") from None


def look_at(images: Sequence[Any], folder: Path) -> tuple[Picture, ...]:
    """All images that a row names, in order, as `look` has them."""
    return tuple(look(image, folder, f"images[{k}]") for k, image in enumerate(images))


def _own_bytes(value: Any, place: str) -> bytes | None:
    """The bytes that a row has itself; None where it names a file."""
    if isinstance(value, dict):
        if not value.keys() & {"bytes", "path"}:
            raise RowError(place, f"an object with {sorted(map(str, value))[:4]}, and no image", "write the path of a file")
        value = value.get("bytes")
        if value is None:
            return None
        if isinstance(value, str):  # as JSON has bytes
            value = value if DATA.match(value) else f"data:;base64,{value}"
        elif not isinstance(value, bytes | bytearray):
            raise RowError(place, f"{what_is(value)} for bytes", "write base64, or the path of a file")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and (start := DATA.match(value)):
        try:
            return base64.b64decode("".join(value[start.end() :].split()), validate=True)
        except binascii.Error:
            raise RowError(place, "broken base64", "mend it, or write the path of a file") from None
    if callable(getattr(value, "save", None)) and hasattr(value, "mode"):  # an image of PIL's
        written = io.BytesIO()
        save: Any = value.save  # type: ignore[union-attr]
        save(written, "PNG")
        return written.getvalue()
    return None


def _read(path: Path, place: str) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a file, and its stamp."""
    name = one_line(str(path), 200)
    try:
        with reading.open_regular(path) as file:
            stamp = stamp_of(path)
            return file.read(MAX_BYTES + 1), stamp
    except FileNotFoundError:
        raise RowError(place, f"{name}: no such file", "check the path; it is relative to the data file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(place, f"{name}: {one_line(reason)}", "check the path and its permissions") from None


def stamp_of(path: Path) -> tuple[int, int]:
    """(size, time of the last change) of a file. Raises OSError."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _size(data: bytes, place: str) -> tuple[int, int]:
    """(height, width) as it will be decoded, by the header alone."""
    import PIL.Image

    def size() -> tuple[int, int]:
        with PIL.Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                reason = f"{width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are read"
                raise RowError(place, reason, "make it smaller")
            if image.format == "JPEG" and b"\xff\xd9" not in data[-4096:]:
                raise RowError(place, "broken image: the file ends too early", MEND)
            turned = _orientation(image) in TURNED
        with PIL.Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.verify()  # checksums, without a pixel
        return (width, height) if turned else (height, width)

    return _told(size, place)


def opened(path: Path, place: str) -> Image:
    """The image of a file, whatever it is now. Raises RowError."""
    data, _ = _read(path, place)
    _size(data, place)
    return decode(data, place)


def decode(data: bytes, place: str) -> Image:
    """An image in RGB, as its camera was held. Raises RowError."""
    import PIL.Image
    import PIL.ImageOps

    def image() -> Image:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            upright = opened if _orientation(opened) == 1 else PIL.ImageOps.exif_transpose(opened)
            return upright.convert("RGB")

    return _told(image, place)


def _orientation(image: Image) -> int:
    """How a camera was held, by the header; a PNG that says so behind its pixels would have to be decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _told(read: Callable[[], Any], place: str) -> Any:
    """What `read` makes of an image, or a RowError: a parser of so many formats raises anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here
            return read()
    except RowError:
        raise
    except Exception as error:
        kind = type(error).__name__
        if kind == "DecompressionBombError":  # of PIL's own limit, which is higher
            raise RowError(place, f"more than the {MAX_PIXELS:,} pixels that are read", "make it smaller") from None
        said = "no image of a known format" if kind == "UnidentifiedImageError" else f"broken image: {error}"
        raise RowError(place, said, MEND) from None

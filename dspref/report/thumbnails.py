"""Small pictures of the images that prompts have, to lie within a report."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from dspref.data.image_files import opened
from dspref.data.rows import RowError

# Pixels of the longer side, and bytes, at most; tried one after another where an image is full of noise.
SIDES, MOST_BYTES = (192, 128, 80), 20_000
# A small or plain image is as small without a loss.
LOSSLESS_BYTES = 4_000
QUALITY = 80
# So many of a report, however many samples it shows.
MOST = 200


def of(paths: Iterable[str]) -> dict[str, str]:
    """A data: URI for each file that is an image and can be read, of the first `MOST` different ones."""
    found = {path: thumbnail(Path(path)) for path in list(dict.fromkeys(paths))[:MOST]}
    return {path: uri for path, uri in found.items() if uri is not None}


def thumbnail(path: Path) -> str | None:
    """A data: URI of at most about `MOST_BYTES` x 4 / 3 characters; None where there is no image, or no Pillow."""
    try:
        image = opened(path, path.name)
    except (RowError, ImportError):
        return None
    for side in SIDES:
        image.thumbnail((side, side))
        for kind, most, how in (("png", LOSSLESS_BYTES, {}), ("jpeg", MOST_BYTES, {"quality": QUALITY})):
            written = io.BytesIO()
            image.save(written, kind, optimize=True, **how)
            if written.tell() <= most:
                return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
    return None

"""The log file of a rank."""

from __future__ import annotations

import io
from pathlib import Path

from dspref.secrets import redact
from dspref.terminal import shown


class LogFile(io.TextIOWrapper):
    """A text file, a line at a time, without the secrets and the control characters of what libraries print."""

    def __init__(self, path: Path) -> None:
        super().__init__(open(path, "ab"), encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def write(self, text: str, /) -> int:
        return super().write(shown(redact(text)).replace("\\r", "\n"))  # a progress bar is lines

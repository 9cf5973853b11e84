"""What the ranks of a run are asked to do at the next boundary between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from dspref.errors import ExitCode


class Request(IntEnum):
    """The largest of all ranks' counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclass
class Requests:
    """What this rank was asked for: the largest, and who was the first to ask for that."""

    largest: Request = Request.NOTHING
    cause: str = ""
    exit_code: ExitCode = ExitCode.INTERRUPTED

    def add(self, request: Request, cause: str, code: ExitCode = ExitCode.INTERRUPTED) -> bool:
        """False where as much was asked for before."""
        if request <= self.largest:
            return False
        self.largest, self.cause, self.exit_code = request, cause, code
        return True

    def granted(self, request: Request) -> None:
        """Nobody waits for it any more."""
        if self.largest is request:
            self.largest, self.cause = Request.NOTHING, ""

"""The numbers that rows give of their pairs, as a store keeps them: one file, where any row has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dspref.data.cache import Column
from dspref.data.given import NAMES, SCORES

# What stands for the number of a pair without one; scores are never read of such a pair.
ABSENT = {"weight": 1.0, "margin": 0.0}


class GivenColumn(Column):
    """`given.npy`, float32 [n, 4]: NaN where a row has no such number."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, np.float32, len(NAMES))
        self.is_empty = True

    def append(self, values: Sequence[Mapping[str, float]]) -> None:
        self.is_empty &= not any(values)
        super().append([[numbers.get(name, np.nan) for name in NAMES] for numbers in values])

    @property
    def content_columns(self) -> list[Column]:
        """Itself, where it is part of what a run trains on."""
        return [] if self.is_empty else [self]

    def close(self) -> None:
        """As of any column; a file without a number goes, so that stores of such rows are what they were."""
        super().close()
        if self.is_empty:
            self.path.unlink()


class Given:
    """What the rows of a store give: a number for every pair, by name, of those that some row has."""

    def __init__(self, path: Path | None, count: int) -> None:
        table = np.load(path, allow_pickle=False) if path else np.empty((count, 0), dtype=np.float32)
        if len(table) != count:
            raise ValueError("given.npy is of other pairs")
        there = {name: column for name, column in zip(NAMES, table.T) if not np.isnan(column).all()}
        self.columns: dict[str, np.ndarray] = {
            name: np.nan_to_num(column, nan=ABSENT.get(name, np.nan)) for name, column in there.items()
        }
        """float32 [n] each."""

    @property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n] of chosen and rejected answers, where rows are read for them."""
        chosen, rejected = (self.columns[name] for name in SCORES)
        return chosen, rejected

    def of(self, pairs: Sequence[int]) -> dict[str, np.ndarray]:
        """float32 [P] each, of some pairs."""
        return {name: column[list(pairs)] for name, column in self.columns.items()}

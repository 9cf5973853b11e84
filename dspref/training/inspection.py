"""Pairs as the model will see them, and the data in numbers, before a run: `dspref inspect`.

What is found is put together in plain values, which `report.closeup` draws, and programs get as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import isfinite
from typing import Any

import numpy as np

from dspref.config import DataSection, ModelSection, TrainSection
from dspref.data import choosing
from dspref.data.choosing import Chosen, SourcePairs
from dspref.data.figures import IDENTICAL, figures, overlap, savings, where_packed
from dspref.data.layout import layout
from dspref.data.loader import StepLoader, swept
from dspref.data.origin import Again, Origin, origin_of, rows_at, why_left_out
from dspref.data.rows import CONVERSATIONS, FIELDS, REJECTED, one_line, place_of
from dspref.data.spans import Section, sections
from dspref.data.store import PairStore, unknown_template
from dspref.data.truncate import Limits, gap
from dspref.errors import ConfigError, DataError
from dspref.objectives import Objective
from dspref.ranks import sharing
from dspref.report import census, closeup
from dspref.secrets import redact
from dspref.terminal import shown
from dspref.training import preparation, survey
from dspref.training.survey import Survey

# Pairs that are shown where none was asked for, and at most of one row.
FIRST, OF_ROW = 2, 8
# Tokens that are shown of a prompt and of an answer of a pair that nobody asked for.
LIMITS = (60, 120, 120)
# Of a row, columns beside its texts, and characters of each.
MOST_COLUMNS, MOST_CHARACTERS = 24, 160


@dataclass(frozen=True)
class Asked:
    """What to look at: at most one of `rows`, `worst` and `random`; none: the numbers, and the first pairs."""

    rows: Sequence[str] = ()
    worst: str | None = None
    random: int | None = None
    seed: int | None = None
    held_out: bool = False
    source: str | None = None
    ids: bool = False
    ranks: int = 1
    sequence: int = 1
    """So many of them hold a pack between them."""

    def check(self, data: DataSection) -> None:
        """Raise ConfigError for what does not go together, or has no effect."""
        asked = {"row": bool(self.rows), "worst": self.worst is not None, "random": self.random is not None}
        given = [name for name, is_given in asked.items() if is_given]
        if len(given) > 1:
            raise ConfigError(f"--{given[0]} and --{given[1]}: each names other pairs; give one of them")
        if self.seed is not None and self.random is None:
            raise ConfigError("--seed: has no effect without --random; leave it out")
        if self.held_out and data.eval is None:
            raise ConfigError("--eval: the run has no held-out pairs; name some in data.eval, or leave --eval out")

    @property
    def selects(self) -> bool:
        return bool(self.rows) or self.worst is not None or self.random is not None


def inspect(
    model: ModelSection, data: DataSection, train: TrainSection, objective: Objective, asked: Asked, as_json: bool
) -> None:
    """Say what was asked for. The `objective` says what can be trained on.

    Raises ConfigError for a selector that finds nothing, and what a run would raise of its data.
    """
    asked.check(data)
    sharing.refuse(asked.sequence, asked.ranks)
    found = survey.read(model, data, _progress, summarise=False)
    data = preparation.laid_out(model, data, say=False)
    _, loader = preparation.steps_of(data, train, found.train[0].store, objective, 0, asked.ranks, asked.sequence)
    look = Look(found, data, train, loader, asked, objective.family.takes)
    pairs = look.chosen()
    said = {} if asked.selects else look.numbers()
    said["pairs"] = look.pairs(pairs)
    if as_json:
        print(json.dumps(said))
    else:
        console = closeup.console()
        if not asked.selects:
            census.draw(said, console)
        closeup.draw(said["pairs"], console)
    found.check_sizes(data.max_length)


def _progress(message: str) -> None:
    print(shown(redact(message)), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Look:
    """The data of a run, and what somebody wants to see of them."""

    found: Survey
    data: DataSection
    train: TrainSection
    loader: StepLoader
    asked: Asked
    takes: str
    """What a row becomes for the objective, as in `Family`."""

    @property
    def sources(self) -> list[SourcePairs]:
        """The sources that are looked at."""
        of = self.found.held_out if self.asked.held_out else self.found.train
        return [choosing.named(of, self.asked.source)] if self.asked.source is not None else of

    # ------------------------------------------------------------------------------------------------------- pairs

    def chosen(self) -> list[Chosen]:
        if self.asked.rows:
            found = [chosen for row in self.asked.rows for chosen in self._of_row(row)]
            return list({(source.key, index): (source, index) for source, index in found}.values())
        sources = choosing.with_pairs(self.sources)
        if self.asked.worst is not None:
            return [choosing.worst(sources, self.asked.worst)]
        if self.asked.random is not None:
            return choosing.drawn(sources, self.asked.random, self.asked.seed or 0)
        return choosing.first_of(sources, FIRST)

    def _of_row(self, row: str) -> list[Chosen]:
        source, files, line = choosing.places_meant(self.sources, row)
        pairs = [index for k in files for index in source.store.at(source.first_file + k, line).tolist()]
        if not pairs:
            raise self._not_there(row, source, files[0], line)
        return [(source, index) for index in dict.fromkeys(pairs)]

    def _not_there(self, asked: str, source: SourcePairs, file: int, line: int) -> ConfigError | DataError:
        """Why a row has no pair."""
        name = source.listing.names[file]
        row = rows_at(source.listing, [(file, line)]).get((file, line))
        if row is None:
            return ConfigError(f"--row {asked}: {place_of(name, line)}: there is no such row in {source.key}")
        made = self._again(source)(row)
        if reasons := why_left_out(made, self.limits):
            return DataError(f"{row.where}: left out: {reasons[0].field}: {reasons[0].reason}; fix: {reasons[0].fix}")
        read = f"{source.key} does not read this row"
        return ConfigError(f"--row {asked}: {row.where}: {read} (split, max_samples); choose another")

    def pairs(self, chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
        """All that is shown of some pairs, of which the rows are read again."""
        of_row: dict[tuple[str, tuple[int, int]], list[Chosen]] = {}
        for source, index in chosen:
            of_row.setdefault((source.key, source.store.place(index)), []).append((source, index))
        origins, made = self._origins(chosen), []
        for pairs in of_row.values():
            made += [self._pair(source, index, origins.get((source.key, index))) for source, index in pairs[:OF_ROW]]
            made[-1]["more_of_row"] = max(len(pairs) - OF_ROW, 0)
        return made

    def _origins(self, chosen: Sequence[Chosen]) -> dict[tuple[str, int], Origin | None]:
        """Where pairs come from; each file of them is read once."""
        found: dict[tuple[str, int], Origin | None] = {}
        for source in {id(source): source for source, _ in chosen}.values():
            places = {}
            for index in (index for of, index in chosen if of is source):
                file, line = source.store.place(index)
                places[index] = (file - source.first_file, line)
            rows, again = rows_at(source.listing, places.values()), self._again(source)
            for index, place in places.items():
                made = again(rows[place]) if place in rows else []
                found[source.key, index] = origin_of(source.store[index], made, self.limits)
        return found

    def _again(self, source: SourcePairs) -> Again:
        decided = source.store.report["sources"][source.number]["decided"]
        return Again(source.listing, self.found.tokenizer, self.data.scored, decided)

    @property
    def limits(self) -> Limits:
        return preparation.limits_of(self.data)

    def _pair(self, source: SourcePairs, index: int, origin: Origin | None) -> dict[str, Any]:
        store, limits = source.store, self.limits
        pair = store[index]
        where = gap(len(pair.prompt), limits.truncation_mode, origin.whole.head, origin.whole.tail) if origin else None
        shortened = (None, None, None) if self.asked.selects else LIMITS
        parts = sections(pair, self.found.tokenizer, store.uncut[index].tolist(), where, shortened)
        there = [part.name for part in parts if part.tokens or part.name == "prompt"]  # of unpaired data, one answer
        return {
            "source": source.key,
            "where": store.where(index),
            "more_of_row": 0,
            "takes": self.takes,
            "label": None if all(part.tokens for part in parts[1:]) else bool(parts[1].tokens),
            "turns": _turns(origin, there) if origin else None,
            "tools": len(origin.preference.tools or ()) if origin else 0,
            "columns": _extra(origin.values, source) if origin else {},
            "given": {name: float(numbers[0]) for name, numbers in store.given.of([index]).items()},
            "sections": {part.name: _section(part, self.asked.ids) for part in parts if part.name in there},
            "limits": store.report["limits"],
            "pack": self._pack(source, index),
        }

    def _pack(self, source: SourcePairs, index: int) -> dict[str, Any] | None:
        """The pack in which a pair runs first: in the first epoch, or in an evaluation."""
        store, held_out = source.store, self.asked.held_out
        steps = swept(store) if held_out else self.steps
        packing = self.loader.packing
        if (place := where_packed(steps, store, packing, index)) is None:
            return None
        members = place.pop("pairs")
        digests = store.image_digests(members)
        pieces = layout([store[k] for k in members], packing.prefix_sharing, store.apart, digests)
        own = members.index(index)
        last = self.loader.total_steps(self.train.num_train_epochs, self.train.asked_steps)
        return place | {
            "evaluation": held_out,
            "last_step": None if held_out else last,
            "ranks": packing.world_size,
            "held_by": packing.parts,
            "tokens": sum(piece.tokens for piece in pieces),
            "room": packing.tokens_per_pack,
            "pairs": len(members),
            "pieces": [piece._asdict() | {"own": own in piece.pairs} for piece in pieces],
        }

    @cached_property
    def steps(self) -> list[np.ndarray]:
        """The pairs of every step of the first epoch."""
        return self.loader.epoch(0)

    # ----------------------------------------------------------------------------------------------------- numbers

    def numbers(self) -> dict[str, Any]:
        """The data in numbers: all sources in short, those that are looked at in full."""
        found = self.found
        reports = list({id(source.store): source.store.report for source in self.sources}.values())
        notes = sum((Counter(report["notes"]) for report in reports), Counter())
        return {
            "sources": [self._source(source) for source in (*found.train, *found.held_out)],
            "warnings": list(dict.fromkeys(said for report in reports if (said := unknown_template(report)))),
            "notes": dict(notes),
            "limits": reports[0]["limits"],
            "sets": self._sets(),
            "overlap": {source.key: overlap(source.store, found.train[0].store) for source in found.held_out},
        }

    def _source(self, source: SourcePairs) -> dict[str, Any]:
        counts = source.store.report["sources"][source.number]
        own = {name: counts[name] for name in ("rows", "pairs", "kept", "dropped")}
        named = source.listing.source
        about = {"key": source.key, "path": named.path, "files": len(source.listing.names), "weight": named.weight}
        return about | own | {"files_left_out": source.listing.left_out}

    def _sets(self) -> dict[str, Any]:
        """Figures of the sources that are looked at: of the whole training set, of one source, or of each held-out set."""
        sources, store = self.sources, self.sources[0].store
        if not self.asked.held_out and self.asked.source is None:
            every = np.arange(len(store))
            packed = savings(self.steps, store, self.loader.packing)
            return {"data.train": self._figures(store, every, sources) | {"packing": packed}}
        sets = {source.key: self._figures(source.store, source.ids, [source]) for source in sources}
        for source in sources if self.asked.held_out else ():
            sets[source.key]["packing"] = savings(swept(source.store), source.store, self.loader.packing)
        return sets

    def _figures(self, store: PairStore, ids: np.ndarray, sources: Sequence[SourcePairs]) -> dict[str, Any]:
        counts = [source.store.report["sources"][source.number]["dropped"] for source in sources]
        identical = sum(n for of in counts for reason, n in of.items() if reason.startswith(IDENTICAL))
        return {"takes": self.takes} | figures(store, ids) | {"identical_answers": identical}


def _turns(origin: Origin, there: Sequence[str]) -> dict[str, list[str]] | None:
    """The roles of the messages of what there is, or None where the pair is of plain texts."""
    parts = {name: getattr(origin.preference, name) for name in there}
    if isinstance(parts["prompt"], str):
        return None
    return {name: [message["role"] for message in part] for name, part in parts.items()}


def _extra(values: Mapping[str, Any], source: SourcePairs) -> dict[str, Any]:
    """The columns of a row beside those that the texts of its pair are in."""
    columns = source.listing.source.columns or {}
    fields = (*FIELDS, *CONVERSATIONS, *REJECTED, "completion", "completions", *["reference"] * ("reference" in columns))
    texts = {columns.get(name, name).partition(".")[0] for name in fields}
    beside = ((one_line(name, 60), value) for name, value in values.items() if name not in texts and value is not None)
    return {name: _short(value) for name, value in islice(beside, MOST_COLUMNS)}


def _short(value: Any) -> Any:
    """A number as it is; anything else as a line of text."""
    if isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    return one_line(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), MOST_CHARACTERS)


def _section(part: Section, with_ids: bool) -> dict[str, Any]:
    runs = []
    for run in part.runs:
        kind = {"scored": run.scored, "special": run.special}
        if run.left_out:
            runs.append({"left_out": run.left_out})
        elif with_ids:
            runs.append({"text": run.text, **kind, "ids": run.ids, "texts": run.texts})
        else:
            runs.append({"text": run.text, **kind, "tokens": len(run.ids)})
    return {"tokens": part.tokens, "scored": part.scored, "lost": part.lost, "gap": part.gap, "runs": runs}

"""Files and hub sets become raw rows, and each row knows where it came from.

A whole file that cannot be used is a `DataError`. A single broken row is a `BadRow` in the result, so that
the caller may count and drop it.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from dspref.data.formats import RowError, one_line
from dspref.errors import DataError

LINE_FORMATS = (".jsonl", ".json", ".ndjson", ".csv")
SUFFIXES = (*LINE_FORMATS, *(suffix + ".gz" for suffix in LINE_FORMATS), ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
CSV_FIELD_LIMIT = 2**30
RELATIVE = "check the path; it is relative to the working directory"
SUSPECT_ESCAPE = re.compile(r"\\u(0000|[dD][89a-fA-F])")


class Row(NamedTuple):
    """One raw row. `where` is path:line, path:element for a JSON array, path:row for parquet and hub sets."""

    values: dict[str, Any]
    where: str


class BadRow(NamedTuple):
    """A row that could not be read, with the reason."""

    where: str
    error: RowError


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval: what to read and how its columns are named."""

    path: str
    split: str = "train"
    max_samples: int | None = None
    weight: float = 1.0
    columns: Mapping[str, str] | None = None
    template: Mapping[str, str] | None = None
    pairs: str = "all"
    as_: str | None = None
    """What texts are: chat | text; None: what `to_preference` takes them for."""
    key: str = "data.train"
    """Where it stands in the YAML, for messages."""


def read(source: Source) -> list[Row | BadRow]:
    """Read the first `max_samples` rows of a file, glob, folder or hub set, in file order.

    Raises DataError when the source or one of its files cannot be used at all.
    """
    rows = list(islice(_source_rows(source), source.max_samples))
    if not rows:
        raise DataError(f"{source.path}: no rows; fix: check the file and data.max_samples")
    return rows


def _source_rows(source: Source) -> Iterator[Row | BadRow]:
    path = Path(source.path).expanduser()
    try:
        found = path.exists()
        if found and not path.is_dir():
            return _file_rows(path)
        if found:
            return _folder_rows(path, source.split)
        if matches := sorted(glob.glob(str(path), recursive=True)):
            return chain.from_iterable(_file_rows(Path(match)) for match in matches if Path(match).is_file())
    except (OSError, ValueError) as error:
        raise _unusable(source.path, _reason(error), "check the path and its permissions") from None
    local = "/" in source.path and path.parent.is_dir()
    if HUB_NAME.fullmatch(source.path) and not source.path.endswith(SUFFIXES) and not local:
        return _hub_rows(source)
    if glob.has_magic(source.path):
        raise _unusable(source.path, "the pattern matches no file", RELATIVE)
    raise _unusable(source.path, "no such file or folder", _spelling_fix(path))


def _spelling_fix(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else RELATIVE


def _unusable(where: object, reason: str, fix: str) -> DataError:
    return DataError(f"{where}: {one_line(reason)}; fix: {fix}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


# -------------------------------------------------------------------------------------------- where rows live


def _folder_rows(folder: Path, split: str) -> Iterator[Row | BadRow]:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return _saved_rows(folder, split)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name.endswith(SUFFIXES) and not _hidden(path.relative_to(folder))
    )
    if not files:
        raise _unusable(folder, "the folder holds no data file", "put a .jsonl, .csv or .parquet file there")
    of_split = [path for path in files if split in re.split(r"[^A-Za-z0-9]+", path.name)]
    return chain.from_iterable(map(_file_rows, of_split or files))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _saved_rows(folder: Path, split: str) -> Iterator[Row | BadRow]:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets has many types for one thing: a damaged folder
        raise _unusable(folder, f"a damaged saved data set: {error}", "save it again") from None
    if isinstance(loaded, Dataset):
        return _numbered(loaded, str(folder))
    if split not in loaded:
        raise _unusable(folder, f"no split {split!r}", f"set data.split to one of {sorted(map(str, loaded))}")
    return _numbered(loaded[split], str(folder))


def _hub_rows(source: Source) -> Iterator[Row | BadRow]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source.path, split=source.split)
    except Exception as error:  # network, permission, missing set: each has its own type
        reason = f"not on disk, and not loadable from the hub: {error}"
        raise _unusable(source.path, reason, f"{RELATIVE}; or check the hub name and data.split") from None
    return _numbered(loaded, source.path)


def _numbered(rows: Iterable[Any], path: str) -> Iterator[Row]:
    """Rows that come from Arrow, without what it adds."""
    return (
        Row({name: without_nulls(value) for name, value in row.items()}, f"{path}:{number}")
        for number, row in enumerate(rows, start=1)
    )


def without_nulls(value: Any) -> Any:
    """A value from Arrow without the keys that are null in it, at every depth: Arrow gives each object of a column the keys
    of all of them. A message keeps its `content: null`, items of lists stay as they are."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if item is not None or (key == "content" and "role" in value)}
    return {key: without_nulls(item) for key, item in kept.items()}


# ---------------------------------------------------------------------------------------------- kinds of file


def _file_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of one file. Raises DataError when the file has none or cannot be read."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise _unusable(path, "unknown kind of file", f"name it one of {', '.join(SUFFIXES)}")
    kind = name.removesuffix(".gz").rpartition(".")[2]
    rows = {"csv": _csv_rows, "parquet": _parquet_rows}.get(kind, _json_rows)(path)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise _unusable(path, "not a complete gzip file", "compress it again, or rename it") from None
    except OSError as error:
        raise _unusable(path, _reason(error), "check the file and its permissions") from None
    if empty:
        raise _unusable(path, "the file is empty (no rows)", "write at least one row, or remove it from data")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from _numbered(rows, str(path))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unusable(path, f"not a readable parquet file: {error}", "write the file again") from None


def _open(path: Path) -> IO[bytes]:
    """Open for reading bytes, decompressed if the name ends in .gz, past a UTF-8 BOM."""
    compressed = path.name.lower().endswith(".gz")
    file: Any = (gzip.open if compressed else open)(path, "rb")
    head = file.read(3)
    if not compressed and head.startswith(GZIP_MAGIC):
        raise _unusable(path, "the file is compressed with gzip", f"name it {path.name}.gz")
    if head.startswith(UTF16_BOMS):
        raise _unusable(f"{path}:1", "not UTF-8 but UTF-16 (byte 0)", "convert it: iconv -f UTF-16 -t UTF-8")
    if head != UTF8_BOM:
        file.seek(0)
    return file


def _decode(line: bytes) -> str:
    """Decode one line. Raises RowError for anything but UTF-8 without NUL."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        raise RowError("encoding", reason, "save the file as UTF-8") from None
    if "\0" in text:
        raise RowError("encoding", f"NUL byte at offset {text.index(chr(0))} of the line", "remove the byte")
    return text


def _csv_rows(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with _open(path) as file:
        reader = csv.reader(_text_lines(path, file), strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise _unusable(f"{path}:1", "two columns have the same name", "rename one of them")
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield _csv_row(header, fields, f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise _unusable(f"{path}:{reader.line_num}", f"broken CSV: {error}", "quote the field") from None


def _text_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    # A record may span lines, so one undecodable line makes the rest of the file unreliable.
    for number, line in enumerate(file, start=1):
        try:
            yield _decode(line)
        except RowError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def _csv_row(header: list[str], fields: list[str], where: str) -> Row | BadRow:
    if len(fields) != len(header):
        reason = f"{len(fields)} fields, the header has {len(header)}"
        return BadRow(where, RowError("row", reason, "quote fields that hold a comma or a newline"))
    return Row(dict(zip(header, fields, strict=True)), where)


# ------------------------------------------------------------------------------------------------------- JSON


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if first[1].lstrip().startswith(b"[") and (elements := _json_array(path, first[1])) is not None:
            yield from elements
            return
        if first[1].strip() == b"{":
            fix = "write one object per line, or an array of objects"
            raise _unusable(f"{path}:{first[0]}", "one JSON object spread over several lines", fix)
        for number, line in chain([first], lines):
            yield _json_row(line, f"{path}:{number}")


def _json_array(path: Path, first_line: bytes) -> Iterator[Row | BadRow] | None:
    """The elements of a file that is one JSON array; None when its lines are JSON values of their own."""
    with _open(path) as file:
        text = "".join(_text_lines(path, file))
    try:
        elements = _parse(text)
    except json.JSONDecodeError as error:
        if _is_json(first_line):
            return None
        reason = f"json: broken JSON array at column {error.colno}: {error.msg}"
        raise _unusable(f"{path}:{error.lineno}", reason, "write an array of objects") from None
    except RowError as error:
        raise DataError(f"{path}: {error}") from None
    suspect = bool(SUSPECT_ESCAPE.search(text))
    return (_checked_row(item, f"{path}:{number}", suspect) for number, item in enumerate(elements, start=1))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _json_row(line: bytes, where: str) -> Row | BadRow:
    try:
        text = _decode(line.rstrip(b"\r\n"))
        return _checked_row(_parse(text), where, suspect=bool(SUSPECT_ESCAPE.search(text)))
    except json.JSONDecodeError as error:
        reason = f"broken JSON at column {error.colno}: {error.msg}"
        return BadRow(where, RowError("json", reason, "write one JSON object per line"))
    except RowError as error:
        return BadRow(where, error)


def _refuse_constant(name: str) -> NoReturn:
    raise RowError("json", f"{name} is not JSON", "write null or a number")


def _parse(text: str) -> Any:
    """Parse one JSON text. Raises JSONDecodeError, or RowError for what only Python accepts or refuses."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, RowError):
        raise
    except (RecursionError, ValueError) as error:  # nesting too deep, an integer of thousands of digits
        raise RowError("json", f"unreadable JSON: {error}", "write one plain JSON object per line") from None


def _checked_row(value: Any, where: str, suspect: bool) -> Row | BadRow:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        return BadRow(where, RowError("row", f"{kind}, not an object", "write an object with the columns"))
    for field, content in value.items() if suspect else ():
        for text in chain([field], _strings(content)):
            if reason := _bad_text(text):
                return BadRow(where, RowError(field, reason, "remove the character"))
    return Row(value, where)


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from chain(content, chain.from_iterable(map(_strings, content.values())))
    elif isinstance(content, list):
        yield from chain.from_iterable(map(_strings, content))


def _bad_text(text: str) -> str | None:
    """Why a text cannot be used, or None. Escapes can smuggle in what the bytes of a file cannot hold."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate (\\u{ord(text[error.start]):04x})"
    return None

"""Kinds of file -> rows. Each row knows its file and line.

A whole file that cannot be used is a `DataError`. A single broken row is a `BadRow` in the result, so that the caller may
count and drop it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from dspref.data.rows import BadRow, Row, RowError, strings, unsound
from dspref.data.splits import SUFFIXES, refuse_irregular, unusable

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
CSV_FIELD_LIMIT = 2**30
SUSPECT_ESCAPE = re.compile(r"\\u(0000|[dD][89a-fA-F])")
JSON_SPACE = re.compile(r"[ \t\n\r]*")
# What no honest file has: a line of so many bytes, an array of so many, or so many bytes out of each that was compressed
# (deflate reaches 1,032; text in files of rows about 3 to 10).
MAX_LINE_BYTES = 2**28
MAX_ARRAY_BYTES = 2**31
MAX_INFLATION, INFLATION_FLOOR = 100, 2**26


def rows_of(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of one file. Raises DataError when the file has none or cannot be read."""
    name = path.name.lower()
    refuse_irregular(path)
    if not name.endswith(SUFFIXES):
        raise unusable(path, "unknown kind of file", f"name it one of {', '.join(SUFFIXES)}")
    rows = {"csv": _csv_rows, "parquet": _parquet_rows}.get(kind_of_file(path), _json_rows)(path)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise unusable(path, "not a complete gzip file", "compress it again, or rename it") from None
    except OSError as error:
        raise unusable(path, reason_of(error), "check the file and its permissions") from None
    if empty:
        raise unusable(path, "the file is empty (no rows)", "write at least one row, or remove it from data")


def kind_of_file(path: Path) -> str:
    """How a file is read, by its name: csv, parquet, json, jsonl or ndjson."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def reason_of(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def numbered(rows: Iterable[Any], file: str) -> Iterator[Row]:
    """Rows that come from Arrow, without what it adds."""
    for number, row in enumerate(rows, start=1):
        yield Row({name: without_nulls(value) for name, value in row.items()}, file, number)


def without_nulls(value: Any) -> Any:
    """A value from Arrow without the keys that are null in it, at every depth: Arrow gives each object of a column the keys
    of all of them. A message keeps its `content: null`, items of lists stay as they are."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if item is not None or (key == "content" and "role" in value)}
    return {key: without_nulls(item) for key, item in kept.items()}


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _refuse_odd_counts(path, file.metadata)
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from numbered(rows, str(path))
    except (pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise unusable(path, f"not a readable parquet file: {error}", "write the file again") from None


def _refuse_odd_counts(path: Path, metadata: Any) -> None:
    """Raise DataError for counts that the library takes on trust: it would end the process."""
    counts = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    if not metadata.num_columns or min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise unusable(path, "not a readable parquet file: its counts of rows or columns are wrong", "write the file again")


# ------------------------------------------------------------------------------------------------------- lines


def _open(path: Path) -> IO[bytes]:
    """Open for reading bytes, decompressed if the name ends in .gz, past a UTF-8 BOM."""
    compressed = path.name.lower().endswith(".gz")
    file: Any = (gzip.open if compressed else open)(path, "rb")
    head = file.read(3)
    if not compressed and head.startswith(GZIP_MAGIC):
        raise unusable(path, "the file is compressed with gzip", f"name it {path.name}.gz")
    if head.startswith(UTF16_BOMS):
        raise unusable(f"{path}:1", "not UTF-8 but UTF-16 (byte 0)", "convert it: iconv -f UTF-16 -t UTF-8")
    if head != UTF8_BOM:
        file.seek(0)
    return file


def _lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, each whole. Raises DataError where they do not end."""
    compressed, read = path.name.lower().endswith(".gz"), 0
    most = max(INFLATION_FLOOR, MAX_INFLATION * path.stat().st_size) if compressed else None
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
        read += len(line)
        if len(line) == MAX_LINE_BYTES:
            reason = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
            raise unusable(f"{path}:{number}", reason, "write one row per line")
        if most is not None and read > most:
            reason = f"grows to more than {MAX_INFLATION} times its size when it is decompressed"
            raise unusable(path, reason, "decompress it yourself, if these are rows")
        yield line


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


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    # A record may span lines, so one undecodable line makes the rest of the file unreliable.
    for number, line in enumerate(lines, start=1):
        try:
            yield _decode(line)
        except RowError as error:
            raise unusable(f"{path}:{number}", f"{error.field}: {error.reason}", error.fix) from None


# --------------------------------------------------------------------------------------------------------- CSV


def _csv_rows(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with _open(path) as file:
        reader = csv.reader(_text_lines(path, _lines(path, file)), strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            header = _without_spaces(header)
            if len(set(header)) != len(header):
                raise unusable(f"{path}:1", "two columns have the same name", "rename one of them")
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield _csv_row(header, fields, str(path), line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise unusable(f"{path}:{reader.line_num}", f"broken CSV: {error}", "quote the field") from None


def _without_spaces(header: list[str]) -> list[str]:
    """The names of columns without the space behind a comma, unless two would then be one."""
    bare = [name.strip() for name in header]
    return bare if len(set(bare)) == len(set(header)) else header


def _csv_row(header: list[str], fields: list[str], file: str, line: int) -> Row | BadRow:
    if len(fields) != len(header):
        reason = f"{len(fields)} fields, the header has {len(header)}"
        return BadRow(RowError("row", reason, "quote fields that hold a comma or a newline"), file, line)
    return Row(dict(zip(header, fields, strict=True)), file, line)


# -------------------------------------------------------------------------------------------------------- JSON


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(_lines(path, file), start=1) if line.strip())
        first, second = next(lines, None), next(lines, None)
        if first is None:
            return
        # Lines that are JSON values of their own are rows, also where the first is a list.
        if first[1].lstrip().startswith(b"[") and (second is None or not _is_json(first[1])):
            yield from _json_array(path)
            return
        if first[1].strip() == b"{":
            fix = "write one object per line, or an array of objects"
            raise unusable(f"{path}:{first[0]}", "one JSON object spread over several lines", fix)
        for number, line in chain([first], [second] if second else [], lines):
            yield _json_row(line, str(path), number)


def _json_array(path: Path) -> Iterator[Row | BadRow]:
    """The elements of a file that is one JSON array, parsed one by one."""
    with _open(path) as file:
        text = "".join(_text_lines(path, _within_memory(path, _lines(path, file))))
    suspect = bool(SUSPECT_ESCAPE.search(text))
    at, number = _after_space(text, _after_space(text, 0) + 1), 0
    while text[at : at + 1] != "]" or number:
        number += 1
        try:
            end = _PLAIN.raw_decode(text, at)[1] if at < len(text) else _unfinished(text)
        except json.JSONDecodeError as error:
            raise _broken_array(path, error) from None
        except (RecursionError, ValueError) as error:
            raise unusable(f"{path}:{number}", f"json: unreadable JSON: {error}", "write an array of objects") from None
        try:
            yield _checked_row(_parse(text[at:end]), str(path), number, suspect)
        except RowError as error:
            yield BadRow(error, str(path), number)
        at = _after_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise _broken_array(path, json.JSONDecodeError("Expecting ',' delimiter", text, at))
        at = _after_space(text, at + 1)
    if (rest := _after_space(text, at + 1)) < len(text):
        raise _broken_array(path, json.JSONDecodeError("Extra data", text, rest))


def _within_memory(path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    read = 0
    for line in lines:
        read += len(line)
        if read > MAX_ARRAY_BYTES:
            raise unusable(path, f"an array of more than {MAX_ARRAY_BYTES >> 30} GiB", "write one JSON object per line")
        yield line


def _after_space(text: str, at: int) -> int:
    match = JSON_SPACE.match(text, at)
    return match.end() if match else at


def _unfinished(text: str) -> NoReturn:
    raise json.JSONDecodeError("Expecting value", text, len(text))


def _broken_array(path: Path, error: json.JSONDecodeError) -> Exception:
    reason = f"json: broken JSON array at column {error.colno}: {error.msg}"
    return unusable(f"{path}:{error.lineno}", reason, "write an array of objects")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_row(line: bytes, file: str, number: int) -> Row | BadRow:
    try:
        text = _decode(line.rstrip(b"\r\n"))
        return _checked_row(_parse(text), file, number, suspect=bool(SUSPECT_ESCAPE.search(text)))
    except json.JSONDecodeError as error:
        reason = f"broken JSON at column {error.colno}: {error.msg}"
        return BadRow(RowError("json", reason, "write one JSON object per line"), file, number)
    except RowError as error:
        return BadRow(error, file, number)


def _refuse_constant(name: str) -> NoReturn:
    raise RowError("json", f"{name} is not JSON", "write null or a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(double, "this key is there twice in one object", "keep one of the two")
    return found


_PLAIN = json.JSONDecoder()
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def _parse(text: str) -> Any:
    """Parse one JSON text. Raises JSONDecodeError, or RowError for what only Python accepts or refuses."""
    try:
        return _STRICT.decode(text)
    except (json.JSONDecodeError, RowError):
        raise
    except (RecursionError, ValueError) as error:  # nesting too deep, an integer of thousands of digits
        raise RowError("json", f"unreadable JSON: {error}", "write one plain JSON object per line") from None


def _checked_row(value: Any, file: str, line: int, suspect: bool) -> Row | BadRow:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        return BadRow(RowError("row", f"{kind}, not an object", "write an object with the columns"), file, line)
    for field, content in value.items() if suspect else ():
        for text in chain([field], strings(content)):
            if reason := unsound(text):
                return BadRow(RowError(field, reason, "remove the character"), file, line)
    return Row(value, file, line)

"""Read text files and tables: JSON, JSON lines, CSV, TSV, Parquet; with or without byte order mark, any line ending."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

JSON = (".json", ".jsonl", ".ndjson")
TABLES = (*JSON, ".csv", ".tsv", ".parquet")
ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".7z", ".rar", ".xz", ".zst")
Row = tuple[str, object]  # where it is in its file ("line 3"), and its content
NOT_TEXT = {  # first characters of files that are not what their name says
    "<!doctype html": "a web page was saved under this name; download the file again",
    "<html": "a web page was saved under this name; download the file again",
    "<?xml": "XML, which is not read",
    "<svg": "a drawing, which is not read",
    "%pdf": "a PDF, which is not read",
    "version https://git-lfs": "a Git LFS pointer; fetch the file with git lfs pull",
}


def read_text(path: Path) -> str:
    r"""The content of a UTF-8 file, or of a UTF-16 file with a byte order mark, with \n as line ending.

    Raises ValueError if it is not text, or if it is a web page, a Git LFS pointer or the like.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    if "\0" in text:
        raise ValueError(f"{path}: not a UTF-8 text file; it contains zero bytes")
    for beginning, name in NOT_TEXT.items():
        if text.lstrip()[: len(beginning)].lower() == beginning:
            raise ValueError(f"{path}: {name}")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # not where Unicode has other line breaks


def check_unicode(texts: Iterable[str], where: str | Path) -> None:
    """Raises ValueError for text with unpaired surrogates, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: not valid Unicode: {ascii(text)[:60]}") from None


def json_values(text: str, path: Path) -> list[Row]:
    """The JSON values that follow each other in a text: one value, or JSON lines. Raises ValueError with the line."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    values, at, line, counted = [], 0, 1, 0
    while (at := space.match(text, at).end()) < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            problem = "not valid JSON" if path.suffix.lower() == ".json" else "not a JSON object"
            excerpt = text[at : at + 80].split("\n")[0]
            raise ValueError(f"{path}, line {line}: {problem}: {excerpt}") from None
        values.append((f"line {line}", value))
    return values


def csv_rows(text: str, path: Path, tabs: bool) -> list[Row]:
    """The rows of a table with a header, as dicts. Raises ValueError for a row with more or fewer cells than that."""
    header_line = text.lstrip("\n").split("\n", 1)[0]
    delimiter = "\t" if tabs else max(",;\t", key=header_line.count)  # a comma where there is none
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL  # in TSV a quote at the start need not have a second one
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    rows, header = [], None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if tabs:
                cells = [c[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', c) else c for c in cells]
                cells += [""] * (len(header or ()) - len(cells))  # editors cut blanks off the end of lines
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = {name for name in header if name and header.count(name) > 1}
                if twice:
                    raise ValueError(f"{path}: there are two columns named {min(twice)}")
            elif len(cells) != len(header):
                advice = "put text with separators or line breaks in quotes"
                message = f"line {reader.line_num}: {len(cells)} cells, and the header has {len(header)}; {advice}"
                raise ValueError(f"{path}, {message}")
            else:
                rows.append((f"line {reader.line_num}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV table ({error})") from None
    return rows


def parquet_rows(path: Path) -> list[Row]:
    """The rows of a Parquet table, without the columns that are not text."""
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow: pip install pyarrow, or save the table as CSV") from None
    try:
        schema = parquet.read_schema(path)
        texts = [f.name for f in schema if types.is_string(f.type) or types.is_large_string(f.type)]
        lists = [f.name for f in schema if types.is_list(f.type) and types.is_string(f.type.value_type)]
        table = parquet.read_table(path, columns=texts + lists).to_pylist()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet table ({error})") from None
    if any(types.is_struct(field.type) for field in schema) and not any("file" in name for name in texts):
        raise ValueError(f"{path}: its images are inside the table; docs/data.md shows how to export them")
    return [(f"row {number}", row) for number, row in enumerate(table, 1)]


def read_table(path: Path) -> list[Row]:
    """The rows of a table. Of JSON: the entries of a list, the lines of JSON lines, or the only value.

    Raises ValueError when it is not what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path)
    text = read_text(path)
    if suffix not in JSON:
        return csv_rows(text, path, suffix == ".tsv")
    values = json_values(text, path)
    if not values and suffix == ".json":
        raise ValueError(f"{path}: not valid JSON: the file is empty")
    return entries(values)


def entries(values: list[Row]) -> list[Row]:
    """The entries of the only value where that is a list; otherwise the values."""
    if len(values) != 1:
        return values
    if isinstance(values[0][1], list):
        return [(f"entry {number}", value) for number, value in enumerate(values[0][1], 1)]
    return [("line 1", values[0][1])]


def only_object(rows: list[Row]) -> dict | None:
    """The object that a JSON file is, if it is one. (The first row of a CSV file is in line 2.)"""
    only = rows[0][1] if len(rows) == 1 and rows[0][0] == "line 1" else None
    return only if isinstance(only, dict) else None


def column(row: dict, names: Iterable[str]) -> str | None:
    """The first of `names` that is a key of the row, upper and lower case alike, as it is written there."""
    keys = {str(key).strip().lower(): key for key in reversed(row)}
    return next((keys[name] for name in names if name in keys), None)

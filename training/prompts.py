"""Files of prompts: a text file with one per line, a table with a column of prompts, or the JSON of a benchmark."""

import csv
import re
import sys
from pathlib import Path

from training.captions import object_captions
from training.image_files import IMAGES, Options
from training.tables import (
    TABLES,
    Row,
    check_unicode,
    column,
    csv_rows,
    entries,
    json_values,
    only_object,
    read_table,
    read_text,
)
from utils import distributed

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "texts")
LINES = ("", ".txt", ".text", ".prompt", ".prompts", ".lst", ".list")  # suffixes of files with one prompt per line
WORDS = {  # syntax of other programs; here the text encoder reads it as words
    "weights of words": re.compile(r"\([^()]+:\s*[\d.]+\)|<(?:lora|lyco|hypernet):[^>]*>|\(\(.+?\)\)|\[\[.+?\]\]"),
    "settings of images": re.compile(r"(?:^|(?<=\s))--[a-z]+\b"),
    "choices at random": re.compile(r"\{[^{}]*\|[^{}]*\}|\b__\w+?__\b"),
}


def read_prompts(path: str | Path, caption_column: str | None = None) -> list[str]:
    """The prompts of a file, in its order and without blank ones; captions of COCO need no images.

    Reports on stderr what it does not take literally in a text file (comments, numbers, quotes), and the syntax of
    other programs, which has no effect here.
    Raises ValueError or OSError, with the file's name, for what does not look like prompts.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file of prompts")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        prompts = table_prompts(read_table(path), path, caption_column)
    elif suffix in LINES:
        prompts = text_prompts(read_text(path), path, caption_column)
    else:
        raise ValueError(
            f"{path}: {suffix} files are not read as prompts; .txt (one per line), .csv, .tsv and .json are"
        )
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    check_unicode(prompts, path)
    for kind, pattern in WORDS.items():
        found = [match[0] for prompt in prompts if (match := pattern.search(prompt))]
        if found:
            others = f" and the like in {len(found)} prompts" if len(found) > 1 else ""
            say(path, f"'{found[0]}'{others}: {kind} are not supported, the text is read as words")
    return prompts


def say(path: Path, message: str) -> None:
    """Print a line to stderr, on rank 0 only."""
    if distributed.rank == 0:
        print(f"{path}: {message}", file=sys.stderr)


def table_prompts(rows: list[Row], path: Path, caption_column: str | None) -> list[str]:
    """The prompts of a table's rows, which are strings or objects with a column of prompts."""
    content = only_object(rows)
    if content is not None:
        return object_prompts(content, path, caption_column)
    names, key, prompts = [caption_column.strip().lower()] if caption_column else PROMPT_COLUMNS, None, []
    for place, row in rows:
        if isinstance(row, dict):
            key = key or column(row, names)
            if key is None:
                wanted = "--caption-column" if caption_column else "no column prompt, caption or text"
                raise ValueError(f"{path}: {wanted} {caption_column or ''}: it has {', '.join(map(str, row))[:200]}")
            row = row.get(key)
        texts = row if isinstance(row, list) and row else [row]
        if not all(isinstance(text, str) for text in texts):
            wanted = "expected a list of strings, or of objects with a prompt"
            raise ValueError(f"{path}, {place}: {wanted}: {str(row)[:60]}")
        prompts += texts
    return prompts


def object_prompts(content: dict, path: Path, caption_column: str | None) -> list[str]:
    """The prompts of a JSON object: COCO captions, a list under the key `prompts`, or one entry per number or group."""
    values = list(content.values())
    key = column(content, [caption_column.strip().lower()] if caption_column else PROMPT_COLUMNS)
    captions = object_captions(content, path, Options(need_images=False, splits=("test",)))
    if captions:
        for note in captions.notes:
            say(path, note)
        return [text for _, text in captions.rows]
    if key:
        return table_prompts(entries([("line 1", content[key])]), path, None)
    if values and all(isinstance(value, dict) for value in values):
        return table_prompts([(f"key {key}", value) for key, value in content.items()], path, caption_column)
    if values and all(isinstance(value, list) for value in values):
        rows = [(f"key {key}", text) for key, texts in content.items() for text in texts]
        return table_prompts(rows, path, caption_column)
    if values and all(str(key).isdigit() or str(key).lower().endswith(IMAGES) for key in content):
        return table_prompts([(f"key {key}", value) for key, value in content.items()], path, None)
    layout = "not a COCO captions file (images, annotations with image_id and caption)"
    raise ValueError(f"{path}: {layout}, and not prompts; expected a list of strings, or of objects with a prompt")


def text_prompts(text: str, path: Path, caption_column: str | None) -> list[str]:
    """The prompts of a text file: the rows of a table, if it holds one, otherwise its lines."""
    rows = hidden_table(text, path)
    if rows is not None:
        return table_prompts(rows, path, caption_column)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        if line.startswith("Negative prompt:"):
            raise ValueError(
                f"{path}, line {number}: settings of a generated image, not a prompt; keep the lines with prompts only"
            )
    comments = [line for line in lines if line.startswith("# ")]
    if comments:
        lines = [line for line in lines if not line.startswith("# ")]
        say(path, f"{len(comments)} lines that begin with # are comments, the first: {comments[0][:60]}")
    if len(lines) > 1 and lines[0].lower() in PROMPT_COLUMNS[:4]:
        say(path, f"the first line, {lines[0]}, is a header")
        lines = lines[1:]
    if len(lines) > 1 and all(re.fullmatch(r'"[^"]+",?', line) for line in lines):
        lines = [line.rstrip(",")[1:-1] for line in lines]
        say(path, "each line stands in quotes, which are left out")
    numbers = [re.match(r"(\d+)[.):]\s+(?=\S)", line) for line in lines]
    bullets = [re.match(r"[-*\u2022]\s+(?=\S)", line) for line in lines]
    first = int(numbers[0][1]) if numbers and numbers[0] else 2
    numbered = all(numbers) and first < 2 and all(int(n[1]) == i for i, n in enumerate(numbers, first))
    if len(lines) > 1 and (numbered or all(bullets)):
        lines = [line[mark.end() :] for line, mark in zip(lines, numbers if numbered else bullets, strict=True)]
        say(path, f"the lines begin with {'numbers' if numbered else 'bullets'}, which are left out")
    return lines


def hidden_table(text: str, path: Path) -> list[Row] | None:
    """The rows of JSON, TSV or CSV under the name of a text file; None for lines of text."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            values = json_values(text, path)
        except ValueError:
            values = []
        if values and all(isinstance(value, (list, dict)) for _, value in values):
            return entries(values)
    header = text.lstrip("\n").split("\n", 1)[0]
    tabs = "\t" in header
    cells = [cell.strip().lower() for cell in header.split("\t" if tabs else ",")]
    if (
        len(cells) > 1
        and column(dict.fromkeys(cells), PROMPT_COLUMNS)
        and (tabs or re.fullmatch(r"\w+(,\w+)+", header))
    ):
        try:
            return csv_rows(text, path, tabs)
        except (ValueError, csv.Error):
            return None if not tabs else csv_rows(text, path, tabs)
    return None

"""Files of prompts: a text file with one per line, or a JSON list."""

from pathlib import Path

from training.tables import check_unicode, read_table, read_text


def read_prompts(path: str | Path, caption_column: str | None = None) -> list[str]:
    """Prompts of a text file, one per line; of a JSON list of strings; or of HPDv2's `test.json`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if path.suffix == ".json":
        prompts = [row.get("prompt") if isinstance(row, dict) else row for _, row in read_table(path)]
        if prompts == [None]:
            raise ValueError(f"{path}: not a COCO captions file, and not a list of prompts")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{path}: expected a list of strings, or of objects with a prompt")
    else:
        prompts = read_text(path).split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one per line")
    check_unicode(prompts, path)
    return prompts

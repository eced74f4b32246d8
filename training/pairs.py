"""Pairs of images for Diffusion-DPO, of which people (or anything else) prefer one.

A folder of pairs has a metadata.jsonl with a line per pair: {"better": "a.png", "worse": "b.png", "text": "a caption"}.
"""

from pathlib import Path

import torch
from torch import Tensor

from training.captions import table_captions
from training.data import ImageDataset
from training.image_files import Options
from training.tables import read_table

COLUMNS = ("better", "worse", "text")


class PairDataset:
    """Item i: the better and the worse image of a pair (2, 3, H, W), and their caption."""

    def __init__(self, better: ImageDataset, worse: ImageDataset, where: Path):
        self.better, self.worse, self.where = better, worse, where

    def __len__(self) -> int:
        return len(self.better)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        """Raises OSError, with its name and the reason, if a file cannot be read."""
        return torch.stack([self.better[i][0], self.worse[i][0]]), self.better[i][1]


def open_pairs(source: str | None, resolution: int) -> PairDataset | None:
    """The pairs of a folder; None where `source` is something else. Raises ValueError naming the row that is wrong."""
    file = Path(source or ".", "metadata.jsonl")
    table = read_table(file) if source and file.is_file() else []
    if not table or not isinstance(table[0][1], dict) or not {"better", "worse"} & table[0][1].keys():
        return None
    for place, row in table:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in COLUMNS):
            raise ValueError(f"{file}, {place}: not a JSON object with better, worse and text: {str(row)[:80]}")
    better, worse = (
        table_captions([(place, {"file_name": row[key], "text": row["text"]}) for place, row in table], file, Options())
        for key in COLUMNS[:2]
    )
    return PairDataset(*(ImageDataset(part.rows, resolution) for part in (better, worse)), file.parent)

"""Models from files, and files from models, in every published form of SD1.5 and SDXL.

    python weights.py inspect FILE
    python weights.py convert SRC FOLDER
    python weights.py convert SRC FILE.safetensors --layout single-file --dtype fp16
    python weights.py convert ADAPTER FILE.safetensors --layout kohya --base sd15

From Python: `weights.load_unet("sd15")`, `load_vae`, `load_text`, `load_tuned`, `save_unet`. Reading is strict: a
missing, unexpected or misshaped key is an error, and a pickle is never executed. The code is in `pretrained/`; which
formats are read and which are refused is listed in `docs/weights.md`.
"""

import argparse

from pretrained.options import parse_args

if __name__ == "__main__":
    ARGS = parse_args()

from pathlib import Path

from pretrained.loading import (
    check_resolution,
    load_clip,
    load_text,
    load_tuned,
    load_unet,
    load_vae,
    one_at_a_time,
    own_base,
    read_config,
    tuning_metadata,
)
from pretrained.saving import DTYPES, convert, inspect, save_unet
from pretrained.weight_files import find, read_file
from utils import cli

__all__ = [
    "DTYPES",
    "check_resolution",
    "convert",
    "find",
    "inspect",
    "load_clip",
    "load_text",
    "load_tuned",
    "load_unet",
    "load_vae",
    "one_at_a_time",
    "own_base",
    "read_config",
    "read_file",
    "save_unet",
    "tuning_metadata",
]


def main(args: argparse.Namespace) -> None:
    if args.command == "inspect":
        print(inspect(Path(args.source)))
    elif args.path is None:
        raise ValueError("convert SRC DST: DST is missing; name the folder or file to write")
    else:
        convert(args.source, args.path, args.layout, DTYPES[args.dtype], args.base, args.ema)
        print(f"written to {args.path}")


if __name__ == "__main__":
    cli.run(main, ARGS)

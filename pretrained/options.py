"""Flags of `weights.py`. Imports no torch, so that `--help` answers at once."""

import argparse

from utils import cli

DTYPES = ("fp32", "fp16", "bf16")
UNET_LAYOUTS = ("diffusers", "single-file")
ADAPTER_LAYOUTS = ("peft", "kohya")

DESCRIPTION = """Inspect weight files of SD1.5 and SDXL, and convert a UNet or an adapter for other programs.

    python weights.py inspect FILE
    python weights.py convert SRC FOLDER
    python weights.py convert SRC FILE.safetensors --layout single-file --dtype fp16
    python weights.py convert ADAPTER FILE.safetensors --layout kohya --base sd15
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `weights.py`."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_argument("command", choices=("inspect", "convert"), help="describe a file, or convert a UNet")
    parser.add_argument("source", metavar="SRC", help="a file; convert also takes a run, folder, hub id or adapter")
    parser.add_argument("path", metavar="DST", nargs="?", help="UNet folder or .safetensors file to write")
    parser.add_argument("--layout", choices=UNET_LAYOUTS + ADAPTER_LAYOUTS, default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--base", help="model that an adapter adapts, or that completes a single file (default: SRC's)")
    parser.add_argument(
        "--ema", action="store_true", help="convert the EMA copy of a file that has plain and EMA weights"
    )
    return parser.parse(argv)

"""The commands of `rewards.py`: score images, and convert MPS's pickled checkpoint. `--help` imports no torch."""

import argparse
import csv
import io
import re
import sys
from pathlib import Path
from statistics import fmean

import rewards
from utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("Score images with reward models.", prog="rewards.py")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("score", help="print a table of scores, or write it to a CSV file")
    command.set_defaults(run=score)
    names = ", ".join(rewards.NAMES)
    command.add_argument("--reward", required=True, metavar="SPEC", help=f"NAME[=WEIGHT],... of {names}")
    command.add_argument("--reward-weights", metavar="PATH[,PATH]", help="file or folder of each, in SPEC's order")
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="one for all images, or one per image")
    prompts.add_argument("--prompts", metavar="FILE", help="prompts of the images by name; sample.py's by their number")
    command.add_argument("--csv", metavar="FILE", help="write the table there, with the prompts")
    command.add_argument("--original", action="store_true", help="preprocess as the reward's own repository does")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("image", nargs="+", help="an image, or a folder of images")

    command = commands.add_parser("convert-mps", help="rewrite MPS's pickled checkpoint without executing it")
    command.set_defaults(run=convert_mps)
    command.add_argument("input", help="MPS_overall_checkpoint.pth")
    command.add_argument("output", help="the .safetensors file to write")
    return parser.parse(argv)


def images_of(paths: list[str]) -> list[str]:
    """The named images, and those of named folders in the order of their names. Raises ValueError for an empty one."""
    from training.image_files import IMAGES

    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
        if path.is_dir():  # sample.py puts a grid beside its images
            inside = [p for p in inside if p.name != "grid.png"]
        if not inside:
            raise ValueError(f"{path}: a folder without images")
        found += inside
    return list(map(str, found))


def prompts_of(args: argparse.Namespace, images: list[str]) -> list[str]:
    """One prompt per image: of sample.py's NUMBER-SEED.png the one with this number, otherwise in the images' order.

    Raises ValueError if their counts do not fit.
    """
    if args.prompt:
        if len(args.prompt) not in (1, len(images)):
            raise ValueError(f"--prompt was given {len(args.prompt)} times for {len(images)} images; give 1 or as many")
        return args.prompt * (len(images) if len(args.prompt) == 1 else 1)
    from training.prompts import read_prompts

    prompts, numbers = read_prompts(args.prompts), [re.fullmatch(r"(\d{5})-\d+\.png", Path(p).name) for p in images]
    if all(numbers):
        indices = [int(number[1]) for number in numbers]
        if max(indices) >= len(prompts):
            raise ValueError(f"--prompts {args.prompts}: {len(prompts)} prompts, but there is {max(indices):05d}-*.png")
        return [prompts[index] for index in indices]
    if len(prompts) != len(images):
        raise ValueError(
            f"--prompts {args.prompts}: {len(prompts)} prompts for {len(images)} images; give one per image"
        )
    return prompts


def score(args: argparse.Namespace) -> None:
    """Print one line per image, or write a CSV: each raw score, and the weighted sum of the rescaled ones."""
    paths = images_of(args.image)
    prompts = prompts_of(args, paths)
    if args.csv:
        cli.check_writable(Path(args.csv).parent)
    import torch
    from tqdm import tqdm

    from utils import disk, images

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: there is none here; leave it out to use the CPU") from None
    reward = rewards.build(args.reward, args.reward_weights, args.device, original=args.original)
    width, columns, rows = max(len(path) for path in (*paths, "image")), [*reward.names, "weighted"], []
    if not args.csv:
        print(f"{'image':<{width}}", *(f"{name:>11}" for name in columns))
    for path, prompt in zip(tqdm(paths, "scoring", disable=not args.csv), prompts, strict=True):
        image = images.to_tensor(images.read_image(path))[None].to(args.device)  # (1, 3, H, W)
        with torch.no_grad():
            scores = [each(image, [prompt]) for each in reward.rewards]
        values = [value.item() for value in (*scores, reward.total(scores))]
        rows.append([path, prompt, *values])
        if not args.csv:
            print(f"{path:<{width}}", *(f"{value:>11.4f}" for value in values))
    if args.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["image", "prompt", *columns], *rows])
        disk.write_text(args.csv, text.getvalue())
        means = ", ".join(f"{c} {fmean(row[i] for row in rows):.4f}" for i, c in enumerate(columns, start=2))
        print(f"{args.csv}: {len(rows)} images; mean {means}")


def convert_mps(args: argparse.Namespace) -> None:
    """Write the tensors of the pickled MPS module, unchanged, to a safetensors file."""
    from pretrained import mps, reward_files
    from utils import disk

    if Path(args.output).suffix != ".safetensors":
        raise ValueError(f"{args.output}: the output is a .safetensors file; name it so")
    if not Path(args.input).is_file():
        raise reward_files.missing_checkpoint("mps", args.input)
    tensors = mps.read_pickled(args.input)
    disk.write(args.output, tensors)
    vocabulary = f"vocab.json and merges.txt of huggingface.co/{reward_files.CLIP_B}"
    print(f"{args.output}: {len(tensors)} tensors; put {vocabulary} next to it")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for bad input."""
    args = parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"rewards.py: {error}", file=sys.stderr)
        return 2
    return 0

"""The commands of `rewards.py`: score images, and convert MPS's pickled checkpoint. `--help` imports no torch."""

import argparse
import sys
from pathlib import Path

import rewards
from utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("Score images with reward models.", prog="rewards.py")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("score", help="print a table of scores")
    command.set_defaults(run=score)
    names = ", ".join(rewards.NAMES)
    command.add_argument("--reward", required=True, metavar="SPEC", help=f"NAME[=WEIGHT],... of {names}")
    command.add_argument("--reward-weights", metavar="PATH[,PATH]", help="file or folder of each, in SPEC's order")
    command.add_argument("--prompt", required=True, action="append", help="one for all images, or one per image")
    command.add_argument("--original", action="store_true", help="preprocess as the reward's own repository does")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("image", nargs="+")

    command = commands.add_parser("convert-mps", help="rewrite MPS's pickled checkpoint without executing it")
    command.set_defaults(run=convert_mps)
    command.add_argument("input", help="MPS_overall_checkpoint.pth")
    command.add_argument("output", help="the .safetensors file to write")
    return parser.parse(argv)


def score(args: argparse.Namespace) -> None:
    """Print one line per image: each raw score, and the weighted sum of the rescaled ones."""
    if len(args.prompt) not in (1, len(args.image)):
        raise ValueError(f"--prompt was given {len(args.prompt)} times for {len(args.image)} images; give 1 or as many")
    import torch

    from utils import images

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: there is none here; leave it out to use the CPU") from None
    reward = rewards.build(args.reward, args.reward_weights, args.device, original=args.original)
    prompts = args.prompt * len(args.image) if len(args.prompt) == 1 else args.prompt
    width = max(len(path) for path in (*args.image, "image"))
    columns = [*reward.names, "weighted"]
    print(f"{'image':<{width}}", *(f"{name:>11}" for name in columns))
    for path, prompt in zip(args.image, prompts, strict=True):
        image = images.to_tensor(images.read_image(path))[None].to(args.device)  # (1, 3, H, W)
        with torch.no_grad():
            scores = [each(image, [prompt]) for each in reward.rewards]
        print(f"{path:<{width}}", *(f"{value.item():>11.4f}" for value in (*scores, reward.total(scores))))


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

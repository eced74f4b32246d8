"""Flags of evaluate.py, reproduce.py and study.py. Imports no torch, so that `--help` answers at once."""

import argparse

from utils.cli import Parser, number, positive


def sweep(text: str) -> tuple[str, list[float]]:
    """`switch=0,10,30` or `aig=1,2` -> its name and values."""
    name, _, values = text.partition("=")
    try:
        if name not in ("switch", "aig"):
            raise ValueError
        return name, [{"switch": int, "aig": float}[name](v) for v in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write switch=0,10,30 or aig=1,2") from None


def name_list(text: str) -> list[str]:
    """Names joined by commas, with or without blanks -> the names. An empty name stays, as ''."""
    return [name.strip() for name in text.split(",")]


def evaluate_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of evaluate.py. Exits with code 2 and one line for a flag that is unknown or has a bad value."""
    parser = Parser(description)
    group = parser.add_argument_group("what is evaluated")
    add = group.add_argument
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add("--checkpoint", action="append", default=[], metavar="[METHOD=]PATH",
        help="tuned model; repeat for more. METHOD: refl, imagerefl, draft, ... if its files are silent")  # fmt: skip
    add("--sweep", action="append", default=[], type=sweep, metavar="NAME=V,V",
        help="more points for the curves: switch=0,5,10,20,30 for all models, aig=1,2,4 for ReFL models")  # fmt: skip
    add("--prompts", help="text file, HPDv2 test.json or benchmark file, COCO captions (default: the base's own)")
    add("--limit", type=positive, help="use only the first N distinct prompts")
    add("--images-per-prompt", type=positive, default=5, help="default: 5")
    add(
        "--seed",
        type=number(int, 0, 2**62),
        default=1,
        help="seed of each prompt's first image, then +1 (default: 1)",
    )

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=positive, default=40, help="denoising steps (default: 40)")
    add("--guidance", type=number(float, 0), help="of the base model (default: 7.5, SDXL 5.0, tiny 2.0)")
    add("--aig-guidance", type=number(float, 0), default=1.0,
        help="of the base model in AIG (default: 1, no guidance, as in the official code)")  # fmt: skip
    add("--resolution", type=positive, help="pixels (default: 512, tiny 64)")
    add("--batch-size", type=positive, help="images per batch (default: 8, tiny 64)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where the processor supports it")
    add("--device", help="default: cuda if available, else cpu")

    add = parser.add_argument_group("metrics").add_argument
    add("--rewards", help="comma-separated names (default: rater,tiny,tiny2, or hpsv2.1)")
    add("--reward-weights", help="comma-separated files or folders of the rewards, in the same order")
    add(
        "--dino",
        help="folder or hub id of DINO (facebook/dino-vits16) or DINOv2, for DinoDiversity; the tiny base has its own",
    )
    add("--inception", help="pytorch-fid's weight file, or pytorch-fid to fetch it, for FID, CovDist and LogCovDist")
    add("--reference", help="real images for these three: a folder with metadata.jsonl, or COCO captions")
    add("--reading", default="ours", metavar="NAME",
        help="definition of CovDist and LogCovDist, see report/covariance_definitions.py (default: ours)")  # fmt: skip

    add("--more-metrics", action="store_true",
        help="also precision, recall, density, coverage, KID, MIND, Vendi; FD-DINOv2 if --dino is DINOv2")  # fmt: skip

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", default="evaluation", help="default: evaluation")
    add("--points", help="folder of sampled images and their scores, to share them (default: points/ in --output-dir)")
    return parser.parse(argv)


def reproduce_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of reproduce.py. Exits with code 2 and one line for a flag that is unknown or has a bad value."""
    parser = Parser(description)
    add = parser.add_argument_group("what is reproduced").add_argument
    add("--base", choices=("tiny", "sd15", "sdxl"), default="tiny", help="default: tiny")
    add("--reward", choices=("hpsv2.1", "pickscore"), help="Table 1: hpsv2.1 (default); Table 3: pickscore")
    add(
        "--data",
        metavar="COCO",
        help="folder of COCO: train2014/, val2014/, annotations/; other layouts are found, too",
    )
    add("--published", action="store_true", help="the authors' ImageReFL instead of a training of ours")
    add("--quick", action="store_true", help="a rehearsal: fewer updates, prompts and images; tiny: one seed")
    add("--resolution", type=positive, help="image side in pixels (default: 512)")
    add("--lora", type=positive, metavar="RANK", help="train adapters, for a GPU on which the whole UNet does not fit")
    add("--output-dir", help="default: runs/reproduction, or runs/table-BASE-REWARD")
    add = parser.add_argument_group("files and machine").add_argument
    add("--check", action="store_true", help="say what is there, what will be fetched and what is missing, then exit")
    add("--json", action="store_true", help="with --check: as JSON")
    add(
        "--gpu-memory",
        type=number(float, 1),
        metavar="GB",
        help="with --check: plan for such a GPU (default: this one)",
    )
    add("--offline", action="store_true", help="fetch nothing, as with HF_HUB_OFFLINE=1")
    args = parser.parse(argv)
    official = {name: getattr(args, name) for name in ("reward", "data", "published", "resolution", "lora")}
    if args.base == "tiny" and (given := [name for name, value in official.items() if value]):
        parser.error(f"--{given[0]} goes with --base sd15 or sdxl")
    if args.published and args.lora:
        parser.error("--lora is for training, and --published trains nothing")
    if (args.json or args.gpu_memory) and not args.check:
        parser.error(f"--{'json' if args.json else 'gpu-memory'} goes with --check")
    return args


def study_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The flags of study.py. Exits with code 2 and one line for a flag that is unknown or has a bad value."""
    parser = Parser(description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make, vote or count")
    make = commands.add_parser("make", help="write a page per person, from evaluations")
    vote = commands.add_parser("vote", help="let rewards answer the pages")
    count = commands.add_parser("count", help="print Table 2 from the answers")

    add = make.add_argument
    add("evaluations", nargs="+", help="output folders of evaluate.py, one per set-up")
    add("--pair", action="append", metavar="FIRST:SECOND",
        help="two rows of the evaluation's table to compare; repeat for more (default: ImageReFL:ReFL)")  # fmt: skip
    add("--limit", type=positive, help="use only N of the prompts, evenly spread (default: all)")
    add("--raters", type=positive, default=3, help="people who see each task (default: 3)")
    add("--people", type=positive, help="people in all, who share the tasks evenly (default: as --raters)")
    add("--seed", type=number(int, 0), default=1, help="of sides, order and names (default: 1)")
    add("--output-dir", default="study", help="default: study")

    vote.add_argument("study", help="folder written by make")
    vote.add_argument("evaluations", nargs="+", help="the same evaluations as for make")
    vote.add_argument("--voters", default="tiny,tiny2", metavar="NAME,NAME",
                      help="measured rewards; the first answers the first page (default: tiny,tiny2)")  # fmt: skip

    count.add_argument("study", help="folder written by make")
    count.add_argument("answers", nargs="*", help="files of answers (default: answers-*.json in the folder)")
    args = parser.parse(argv)
    if args.command == "make":
        args.pair = args.pair or ["ImageReFL:ReFL"]
    return args

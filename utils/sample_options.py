"""The flags of `sample.py`. Free of slow imports, so that `--help` answers at once."""

from argparse import Namespace

from utils.cli import Parser, number, positive

DESCRIPTION = """\
Sample with combined generation (Eq. 3): the base model takes the first `--switch` steps, the tuned one the rest.

    python sample.py --switch 30

Without `--checkpoint` it uses the newest run under `runs/`, else the tuned model that comes with the tiny base. Writes
one PNG per image, with its settings as metadata, and a labelled grid.
"""


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(DESCRIPTION)
    add = parser.add_argument_group("what to sample").add_argument
    add("--prompt", action="append", help="a prompt; may be given several times (default: prompts of the base)")
    add("--prompts", help="prompt file: one per line, or a JSON list")
    add(
        "--geneval",
        metavar="FILE",
        help="GenEval's evaluation_metadata.jsonl; writes the folders that its scorer reads",
    )
    add("--checkpoint", help="tuned model: a run's folder, a UNet's folder, an adapter's file, or a hub id")
    add("--base", help="tiny, sd15, sdxl, or a folder, file or hub id (default: the checkpoint's base, else tiny)")
    add(
        "--seed",
        type=number(int, 0, 2**62),
        default=1,
        help="seed of each prompt's first image; the next ones count up (default: 1)",
    )
    add("--images-per-prompt", type=positive, default=4, help="default: 4")
    add("--output-dir", help="default: samples, numbered if it exists")
    add = parser.add_argument_group("sampler").add_argument
    add(
        "--switch",
        type=int,
        help="first steps of the base model; 0: only the tuned one (default: ImageReFL 30, ReFL 10; SDXL 35, 20)",
    )
    add(
        "--aig", type=number(float, 0), metavar="LAMBDA",
        help="AIG instead of a switch: weight (i / T)^LAMBDA of the tuned model; guidance only with --guidance",
    )  # fmt: skip
    add("--steps", type=positive, default=40, help="sampling steps T (default: 40)")
    add(
        "--guidance", type=number(float, 0),
        help="classifier-free guidance of the base model (default: 7.5, SDXL 5.0, tiny 2.0); the tuned one has none",
    )  # fmt: skip
    add("--eta", type=float, default=1.0, help="0: DDIM, 1: DDPM (default: 1, as in the official code)")
    add("--resolution", type=positive, help="image side in pixels (default: 512, tiny 64)")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--batch-size", type=positive, help="default: 8, tiny 32")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--device", help="default: cuda if available, else cpu")
    return parser.parse(argv)

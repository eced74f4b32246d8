"""The flags of `bench.py` and `gpu.py`. Free of slow imports, so that `--help` answers at once."""

from argparse import Namespace
from pathlib import Path

from utils.cli import Parser, number, positive

RESULTS = Path(__file__).parent / "results"
WORK = ("unet-sd15", "unet-sd15-large", "unet-sdxl", "decode", "sample", "sample-guided", "refl", "imagerefl")
ENGINES = ("openvino", "onnxruntime", "inductor")
SIZES = ("tiny", "cpu", "gpu")
GROUPS = "abcdef"


def bench_args(description: str, argv: list[str] | None = None) -> Namespace:
    parser = Parser(description)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--sizes", choices=SIZES, help="default: cpu or gpu, by the device; tiny is a rehearsal")
    add("--work", nargs="+", choices=WORK, default=WORK, help="default: all")
    add("--compile", action="store_true", help="also compiled sides, which take minutes to tune")
    add("--channels-last", action="store_true", help="also our UNets in that memory format, in the JSON file only")
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=(),
        help="on a CPU also these (optional packages)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the rows without gradients (default: by --sizes)")
    add("--threads", type=positive, help="default: all cores")
    add("--repeats", type=positive, default=7, help="maximum number of turns (default: 7)")
    add("--seconds", type=float, default=25, help="a row ends after this time and three turns (default: 25)")
    add("--output", default=str(RESULTS / "latest"), help="path without suffix (default: benchmarks/results/latest)")
    return parser.parse(argv)


def gpu_args(description: str, argv: list[str] | None = None) -> Namespace:
    parser = Parser(description)
    add = parser.add_argument
    add("--time-left", type=number(float, 1), default=480, metavar="S", help="seconds until it must end (default: 480)")
    add("--dry-run", action="store_true", help="print the rows in their order with their predicted seconds, then exit")
    add("--groups", default=GROUPS, help=f"which groups of rows to run, of {GROUPS} (default: all)")
    add("--rows", nargs="+", help="run only these rows")
    add("--device", default="cuda", help="default: cuda; cpu with --sizes tiny is a rehearsal")
    add("--sizes", choices=("tiny", "gpu"), default="gpu", help="tiny is a rehearsal (default: gpu)")
    add("--output", default=str(RESULTS / "gpu"), help="path without suffix (default: benchmarks/results/gpu)")
    return parser.parse(argv)


def seeds(text: str) -> list[int]:
    """Whole numbers joined by commas."""
    return [int(part) for part in text.split(",")]


def ablation_args(description: str, argv: list[str] | None = None) -> Namespace:
    parser = Parser(description)
    add = parser.add_argument
    add("--groups", default="methods,k_D,mix,start,t_f,k_KL", help="default: all of them")
    add("--seeds", type=seeds, default=[1, 2, 3], metavar="N,N", help="training seeds (default: 1,2,3)")
    add("--updates", type=positive, default=75, help="ReFL updates whose arithmetic is the budget (default: 75)")
    add("--stages", type=positive, default=4, help="checkpoints that are evaluated, an even number (default: 4)")
    add(
        "--gain", type=float, default=0.15, help="rise of the trained reward at which runs are compared (default: 0.15)"
    )
    add("--limit", type=positive, metavar="N", help="evaluate the first N prompts (default: all 64)")
    add("--switches", default="0,5,10,20,30,35", help="base steps of the switch curves (default: 0,5,10,20,30,35)")
    add("--base", default="tiny", help="the tiny base, or a folder of its layout (default: tiny)")
    add("--device", help="default: cuda if available, else cpu")
    add("--jobs", type=positive, default=1, help="runs at the same time (default: 1)")
    add("--minutes", type=number(float, 0), default=1e6, help="stop after this time (default: none)")
    add("--rehearse", action="store_true", help="two updates per run, one seed, two prompts, three switches")
    add("--output-dir", default="runs/ablations", help="default: runs/ablations")
    args = parser.parse(argv)
    if args.rehearse:
        args.updates, args.stages, args.seeds, args.limit, args.switches = 1, 2, [1], 2, "0,10,30"
    return args

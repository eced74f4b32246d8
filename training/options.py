"""The flags of `train.py`, in groups, and their defaults. Free of slow imports, so that `--help` answers at once."""

from argparse import Namespace
from collections.abc import Callable

import rewards
from training import presets
from utils.cli import Parser, number, number_range, positive

STEPS = 40  # sampling steps T in training, with eta = 1
DESCRIPTION = """\
Train with ReFL (Eq. 2) or ImageReFL (Eqs. 4 and 5; every fourth update is a ReFL update).

    python train.py --method imagerefl --base tiny

fine-tunes the tiny Stable Diffusion that comes with the code, on two CPU cores in minutes; the paper's run is
`--base sd15 --data COCO_CAPTIONS.json`. `torchrun --nproc-per-node N train.py ...` spreads it over N GPUs. The run's
folder holds the tuned UNet, log.jsonl, grids of sample images, and the checkpoints that --resume needs.
"""


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The parsed flags; `args.given` holds those on the command line."""
    parser = Parser(DESCRIPTION)
    add_method(parser)
    add = parser.add_argument_group("memory and speed").add_argument
    add(
        "--checkpointing", nargs="?", metavar="PARTS", const="unet,decoder",
        choices=("unet", "decoder", "unet,decoder"),
        help="recompute activations in the backward pass to save memory: unet, decoder or unet,decoder (default: both)",
    )  # fmt: skip
    add("--text-on-cpu", action="store_true", help="keep the text encoders on the CPU, which frees GPU memory")
    add("--shard", action="store_true", help="under torchrun: shard weights, gradients and optimizer state (FSDP)")
    add("--compile", action="store_true", help="torch.compile the networks; refused where it changes gradients")
    add("--plan", action="store_true", help="print FLOPs, memory and settings that fit a GPU, then exit")
    add(
        "--gpu-memory",
        type=number(float, 1),
        metavar="GB",
        help="with --plan: memory of the GPU (default: 16, 24, 40 and 80)",
    )
    add_device(add)
    add = parser.add_argument_group("monitoring").add_argument
    add("--judge", help="held-out rewards, measured but not trained on (default for tiny: its other ones)")
    add("--judge-weights", help="files or folders of the held-out reward, as for --reward-weights")
    add(
        "--monitor", type=positive, metavar="N",
        help="check every N updates for overfitting: reward up, held-out reward and diversity down",
    )  # fmt: skip
    add("--stop-on-collapse", action="store_true", help="with --monitor: stop the run when it overfits")
    add("--dino", help="with --monitor: folder of DINO ViT-S/16 for the diversity (tiny has its own features)")
    add_saving(parser)
    add_baselines(parser)
    args = parser.parse(argv)
    args.given = parser.given(argv)
    return args


def add_data(add: Callable) -> None:
    """How to read --data."""
    add("--images", metavar="DIR", help="folder of the images that the table in --data names (default: beside it)")
    add("--caption-column", metavar="NAME", help="column of captions in --data (default: text, caption or prompt)")
    add(
        "--allow-missing",
        action="store_true",
        help="train although images of --data are missing (COCO: more than 1 in 100)",
    )


def add_method(parser: Parser) -> None:
    add = parser.add_argument_group("method").add_argument
    add(
        "--method", choices=presets.METHODS + presets.BASELINES, default="imagerefl",
        help="the paper's refl or imagerefl (default), or a baseline, see below",
    )  # fmt: skip
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add(
        "--reward",
        help='reward to maximise, e.g. hpsv2.1 or "hpsv2.1=1,pickscore=0.5" (default: hpsv2.1; rater for --base tiny)',
    )
    add("--reward-weights", help="files or folders of the rewards, in their order, separated by commas")
    add(
        "--data",
        help="folder or table of captioned images, or COCO captions_*.json; prompts for refl (default for tiny: emoji)",
    )
    add_data(add)
    add(
        "--reward-scale", type=number(float, 0), default=1e-3, metavar="K_R",
        help="k_R, weight of the reward loss (default: 1e-3)",
    )  # fmt: skip
    add(
        "--diffusion-scale", type=number(float, 0), default=1e-5, metavar="K_D",
        help="k_D, weight of ImageReFL's diffusion loss (default: 1e-5)",
    )  # fmt: skip
    add(
        "--kl-scale", type=number(float, 0), default=0.0, metavar="K_KL",
        help="k_KL, weight of the squared difference from the base model's predictions, against collapse (default: 0)",
    )  # fmt: skip
    add("--start", type=int, metavar="I", help="step index of t', of 40 (default: 30, SDXL 35)")
    add(
        "--shift", type=number(int, 0), metavar="PIXELS",
        help="shift images by up to this many pixels before the reward scores them (default: 0; tiny 8, its rater 0)",
    )  # fmt: skip
    add("--resolution", type=positive, help="image side in pixels (default: 512, tiny 64)")
    add("--lora", type=positive, metavar="RANK", help="train low-rank adapters instead of the whole UNet")
    add_optimizer(parser, "ImageReFL 4000, others 2000; tiny: 30")


def steps_range(text: str) -> str:
    """An argument type: a number of sampling steps, "3", or a range, "1-10"."""
    numbers = number_range(text)
    number(int, 1, STEPS)(numbers[0]), number(int, 1, STEPS)(numbers[-1])  # raise for values out of range
    return text


def add_baselines(parser: Parser) -> None:
    add = parser.add_argument_group(
        "baselines (--method draft, drtune, dpo)",
        "DRaFT, DRTune and Diffusion-DPO, on pairs that the reward ranks or on a folder of pairs as --data",
    ).add_argument
    add(
        "--from-image", action="store_true",
        help="start from a real image noised to t', as ImageReFL does, three updates of four",
    )  # fmt: skip
    add(
        "--gradient-steps", type=steps_range, metavar="K",
        help="steps with gradients, of draft (default: 3) and drtune (5); 1-10: drawn at random, as in AlignProp; "
        "of dpo: timesteps drawn per pair (1, tiny 4)",
    )  # fmt: skip
    add("--lv-samples", type=number(int, 0), metavar="N", help="n of DRaFT-LV, with --gradient-steps 1 (default: 0)")
    add("--beta", type=number(float, 0), help="of dpo: strength of the tie to the base model (default: 5000, tiny 300)")


def add_optimizer(parser: Parser, steps: str) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--steps", type=positive, help=f"number of updates (default: {steps})")
    add("--batch-size", type=positive, help="micro-batch size (default: 8 SD1.5, 4 SDXL, 16 tiny)")
    add("--accumulate", type=positive, help="micro-batches per update, over all processes (default: 4, tiny 1)")
    add(
        "--lr",
        type=number(float, 0),
        help="learning rate of AdamW (default: 3e-4, tiny 4.5e-5; dpo: 2e-5, tiny 1.5e-5)",
    )
    add(
        "--lr-schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="cosine decays to 0 (default: constant)",
    )
    add("--warmup", type=number(int, 0), default=0, help="updates of linear learning rate warm-up (default: 0)")
    add("--weight-decay", type=number(float, 0), default=0.01, help="weight decay of AdamW (default: 0.01)")
    add("--max-grad-norm", type=number(float, 0), help="clip the gradient norm (default: off, as in the official runs)")
    add("--seed", type=number(int, 0, 2**62), default=1, help="default: 1")


def add_device(add) -> None:
    add("--device", help="default: cuda if available, else cpu")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of autocast (default: bfloat16 where the hardware has it)",
    )


def add_saving(parser: Parser) -> None:
    add = parser.add_argument_group("sampling and saving").add_argument
    add("--prompts", help="prompt file for the sample grids and the final table (default: the base's own)")
    add(
        "--sample-every",
        type=number(int, 0),
        default=50,
        metavar="N",
        help="updates between sample grids; 0: none (default: 50)",
    )
    add("--save-every", type=positive, default=200, metavar="N", help="updates between checkpoints (default: 200)")
    add("--save-minutes", type=number(float, 1e-6), metavar="M", help="also save a checkpoint after M minutes")
    add("--keep", type=positive, default=2, metavar="N", help="checkpoints to keep (default: 2)")
    add("--output-dir", help="default: runs/METHOD-BASE, numbered if it exists")
    add("--resume", metavar="RUN", help="continue the run in this folder, with the flags it was started with")
    add("--override", action="store_true", help="with --resume: use this call's flags although they change the result")


def resolve_baseline(args: Namespace, preset: presets.Preset) -> None:
    """Fill in defaults of the baselines' flags, in place. Raises ValueError for those of another method."""
    flags = {"draft": ("from_image", "gradient_steps", "lv_samples"), "drtune": ("from_image", "gradient_steps")}
    flags |= {"dpo": ("from_image", "gradient_steps", "beta")}
    for flag in ("from_image", "gradient_steps", "lv_samples", "beta"):
        if getattr(args, flag) and flag not in flags.get(args.method, ()):
            takers = " or ".join(method for method, own in flags.items() if flag in own)
            advice = "; imagerefl is ReFL from images" * (flag == "from_image")
            raise ValueError(f"--{flag.replace('_', '-')} goes with --method {takers}{advice}")
    if args.method in presets.BASELINES:
        varying = ["--from-image"] * (args.method == "drtune" and args.from_image)
        varying += [f"--gradient-steps {args.gradient_steps}"] * ("-" in (args.gradient_steps or ""))
        if args.shard and varying and args.method != "dpo":
            raise ValueError(f"--shard needs as many gradient calls in each process; leave out {varying[0]}")
        defaults = {"draft": "3", "drtune": "5", "dpo": f"{preset.dpo_draws}"}
        args.gradient_steps = args.gradient_steps or defaults[args.method]
    if args.method == "dpo":
        if args.kl_scale:
            raise ValueError("--kl-scale: dpo is tied to the base model by --beta")
        args.lr = preset.dpo_lr if args.lr is None else args.lr
        args.beta = preset.dpo_beta if args.beta is None else args.beta


def resolve(args: Namespace, preset: presets.Preset) -> None:
    """Fill in defaults, in place. Raises ValueError for flags that contradict each other."""
    from utils import device, distributed

    own_captions = args.data is None and args.prompts is None
    known = presets.TINY_REWARDS if own_captions else presets.TINY_REWARDS[1:]  # the rater knows no other captions
    args.reward = args.reward or (known[0] if preset is presets.TINY else preset.reward)
    trained = dict(rewards.parse(args.reward))
    if args.method != "diffusion":  # tiny/pretrain.py
        resolve_baseline(args, preset)
    args.steps = args.steps or preset.updates[args.method]
    args.batch_size = args.batch_size or preset.batch_size
    args.accumulate = args.accumulate or preset.accumulate
    args.lr = preset.lr if args.lr is None else args.lr
    args.start = preset.start if args.start is None else args.start
    args.resolution = args.resolution or preset.resolution
    if args.shift is None:
        args.shift = 0 if "rater" in trained else preset.shift  # the rater sees no places outside its world
    args.device = device.choose_device(args.device)
    if args.judge is None and preset is presets.TINY:
        args.judge = ",".join(name for name in known if name not in trained)
    args.dtype = args.dtype or device.default_dtype(args.device)
    if not 0 <= args.start < STEPS:
        raise ValueError(f"--start {args.start}: must be in 0..{STEPS - 1}")
    if args.data is None and preset is not presets.TINY:
        raise ValueError(f"--base {args.base} needs --data: a folder with metadata.jsonl, or a COCO captions file")
    if args.monitor and not (args.judge or args.dino or preset is presets.TINY):
        raise ValueError("--monitor compares the reward with a measure that is not trained on: give --judge or --dino")
    if (args.stop_on_collapse or args.dino) and not args.monitor:
        raise ValueError(f"--{'dino' if args.dino else 'stop-on-collapse'} needs --monitor N")
    for flag in ("lora", "compile", "plan"):
        if args.shard and getattr(args, flag):
            raise ValueError(f"--{flag} cannot be combined with --shard; leave out one of them")
    if args.shard and distributed.world_size == 1:
        raise ValueError("--shard spreads the weights over processes: torchrun --nproc-per-node N train.py ... --shard")
    distributed.check_divisible(args.batch_size, args.accumulate)

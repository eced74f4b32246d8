"""Peak memory of combined generation with two SD1.5 UNets in bf16 that are loaded one after the other.

    python benchmarks/swap_memory.py            needs 3.5 GB of disk and 5 GB of memory

Each variant runs in its own process, on files of fp16 weights. They are converted to bf16 while they are read,
as on a GPU, and then packed, as on a CPU. Reported is Linux's peak of resident memory, minus what the libraries had
taken before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import weights
from combined import combined_weights, generate
from scheduler import Scheduler
from speed import prepacked
from unet import SD15, UNet

VARIANTS = ("one model", "swapped", "two models")


def write(folder: Path) -> None:
    """A UNet's folder with constant weights in the published sizes."""
    with torch.device("meta"):
        unet = UNet(SD15)
    unet.load_state_dict(
        {key: torch.full_like(t, 0.01, device="cpu") for key, t in unet.state_dict().items()}, assign=True
    )
    weights.save_unet(unet, folder, dtype=torch.float16)


def peak(variant: str, base: Path, tuned: Path) -> float:
    """Peak memory of this process in GB over two steps, one of the base and one of the tuned model."""
    status = Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    placement = ("cpu", torch.bfloat16)
    if variant == "swapped":
        models = weights.one_at_a_time(base, tuned, *placement, prepacked.prepack)
    else:
        models = [prepacked.prepack(weights.load_unet(base, *placement))]
        models += [prepacked.prepack(weights.load_unet(tuned, *placement))] if variant == "two models" else models
    vae = SimpleNamespace(factor=8, config=SimpleNamespace(latent_channels=4), decode=lambda x: x)
    settings = (Scheduler(2), combined_weights(2, 1), ["a"], [1], (64, 64), 1.0)
    generate(*models, vae, lambda prompts, size: {"context": torch.ones(len(prompts), 77, 768).bfloat16()}, *settings)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) * 1024 / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("base", "tuned")]
        for place in places:
            write(place)
        peaks = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--one", variant, *map(str, places)]
            peaks[variant] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{variant:12}{peaks[variant]:7.3f} GB, {peaks[variant] / peaks['one model']:.3f} of one model",
                flush=True,
            )
    path = Path(__file__).parent / "results" / "swap_memory.json"
    path.write_text(json.dumps({"unet": "SD1.5, bf16", "torch": torch.__version__, "peak_gb": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--one", nargs=3, metavar=("VARIANT", "BASE", "TUNED"), help="measure one variant in this process"
    )
    one = parser.parse_args().one
    if one:
        print(peak(one[0], Path(one[1]), Path(one[2])))
    else:
        main()

"""Peak memory of combined generation with two whole SD1.5 UNets in bf16, swapped in the memory of one.

    python benchmarks/swap_memory.py            needs 3.5 GB of disk and 5 GB of memory

Each way runs in a process of its own, on files of random fp16 weights, which become bf16 as they are read, as on a GPU,
and are then packed, as on a CPU.
Linux's peak of the resident memory is reported, without what the libraries took before.
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

WAYS = ("one model", "swapped", "two models")


def write(folder: Path) -> None:
    """A UNet's folder with random weights of the published sizes."""
    with torch.device("meta"):
        unet = UNet(SD15)
    unet.load_state_dict(
        {key: torch.full_like(t, 0.01, device="cpu") for key, t in unet.state_dict().items()}, assign=True
    )
    weights.save_unet(unet, folder, dtype=torch.float16)


def peak(way: str, base: Path, tuned: Path) -> float:
    """Gigabytes that this process needs at most for two steps, the base's and the tuned model's."""
    status = Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until here
    how = ("cpu", torch.bfloat16)
    if way == "swapped":
        models = weights.one_at_a_time(base, tuned, *how, prepacked.prepack)
    else:
        models = [prepacked.prepack(weights.load_unet(base, *how))]
        models += [prepacked.prepack(weights.load_unet(tuned, *how))] if way == "two models" else models
    vae = SimpleNamespace(factor=8, config=SimpleNamespace(latent_channels=4), decode=lambda x: x)
    asked = (Scheduler(2), combined_weights(2, 1), ["a"], [1], (64, 64), 1.0)
    generate(*models, vae, lambda prompts, size: {"context": torch.ones(len(prompts), 77, 768).bfloat16()}, *asked)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) * 1024 / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("base", "tuned")]
        for place in places:
            write(place)
        peaks = {}
        for way in WAYS:
            words = [sys.executable, __file__, "--one", way, *map(str, places)]
            peaks[way] = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            print(f"{way:12}{peaks[way]:7.3f} GB, {peaks[way] / peaks['one model']:.3f} of one model", flush=True)
    path = Path(__file__).parent / "results" / "swap_memory.json"
    path.write_text(json.dumps({"unet": "SD1.5, bf16", "torch": torch.__version__, "peak_gb": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "BASE", "TUNED"), help="measure one way in this process")
    one = parser.parse_args().one
    if one:
        print(peak(one[0], Path(one[1]), Path(one[2])))
    else:
        main()

"""The stages from nothing to a table of the paper, for SD1.5 and SDXL with official weights."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from reproduction import check, coco, paper
from reproduction.assets import REWARDS, assets_of, verify
from reproduction.plan import Settings
from reproduction.stages import Notes, Stage, call
from utils import disk


def default_folder(settings: Settings) -> Path:
    kind = "-published" * settings.published + "-quick" * settings.quick
    return Path(f"runs/table-{settings.base}-{settings.reward}{kind}")


class Reproduction:
    """A reproduction in its folder: run folders `refl/` and `imagerefl/`, `hpdv2/`, `coco/`, `points/`, `table.md`."""

    def __init__(self, settings: Settings, folder: Path, lock):
        self.settings, self.folder, self.lock, self.notes = settings, folder, lock, Notes(folder)
        self.notes.check_settings({key: str(value) for key, value in asdict(settings).items()})

    def stages(self) -> list[Stage]:
        found = [
            Stage("check", lambda: "petaflops" in self.notes.values, self.check),
            Stage("fetch", lambda: bool(self.notes.values.get("fetched")), self.fetch),
        ]
        for method in self.settings.methods:
            done, run = partial(self.is_trained, method), partial(self.train, method)
            updates = self.settings.sizes.updates[method]
            found.append(Stage(f"train {method}", done, run, updates, self.folder / method / "log.jsonl"))
        for kind, run in (("hpdv2", self.hpdv2), ("coco", self.coco)):
            found.append(Stage(f"evaluate {kind}", partial(self.is_evaluated, kind), run))
        return [*found, Stage("report", lambda: False, self.report)]

    def check(self) -> None:
        """Raises ValueError where something is missing."""
        report = check.examine(self.settings, self.folder, fetch=True)
        print(check.text(report), flush=True)
        if not report["ready"]:
            count = len(report["problems"])
            raise ValueError(f"not ready: {count} problem{'s' * (count > 1)}, see above")
        note = coco.write_tables(self.settings.data, self.settings.sizes.coco, self.folder)
        self.notes.write(petaflops=report["petaflops"], training_flags=report["training_flags"], coco=note)

    def fetch(self) -> None:
        """Fetch what is missing; then compare every file in the hub's cache with its checksum."""
        known = self.notes.values.get("verified", {})
        for asset in assets_of(self.settings.base, self.settings.reward, self.settings.published):
            asset.paths = asset.find()
            verify(asset, known)
            self.notes.write(verified=known)
            print(f"{asset.name:18} {asset.paths[0]}", flush=True)
        self.notes.write(fetched=True)

    def is_trained(self, method: str) -> bool:
        path = self.folder / method / "run.json"
        return path.is_file() and bool(json.loads(path.read_text()).get("finished"))

    def train(self, method: str) -> None:
        run, s = self.folder / method, self.settings
        if (run / "run.json").is_file():
            flags = ["--resume", str(run)]
        else:
            flags = ["--method", method, "--base", s.base, "--reward", s.reward, "--output-dir", str(run)]
            flags += ["--data", str(self.folder / "coco-train.jsonl"), "--steps", str(s.sizes.updates[method])]
            flags += ["--sample-every", str(s.sizes.sample_every), *self.notes.values["training_flags"]]
            flags += ["--monitor", str(s.sizes.sample_every), "--dino", "facebook/dino-vits16"] * (not s.quick)
            flags += ["--resolution", str(s.resolution)] if s.resolution else []
            flags += ["--lora", str(s.lora)] if s.lora else []
        call("train.py", flags, self.lock)
        if not self.is_trained(method):
            raise ValueError(f"train {method} has stopped and is saved; the same command continues")

    def is_evaluated(self, kind: str) -> bool:
        return all((output / "results.json").is_file() for output in self.outputs(kind))

    def outputs(self, kind: str) -> list[Path]:
        """Folders of evaluate.py. HPDv2 has one per reward, so that one reward at a time takes memory."""
        return [self.folder / kind / name for name in REWARDS] if kind == "hpdv2" else [self.folder / kind]

    def evaluate(self, output: Path, flags: list[str]) -> None:
        if (output / "results.json").is_file():
            return
        s = self.settings
        models = [s.model] if s.published else [str(self.folder / method) for method in s.methods]
        flags = ["--base", s.base, *(f"--checkpoint={model}" for model in models), f"--output-dir={output}", *flags]
        flags += ["--resolution", str(s.resolution)] if s.resolution else []
        call("evaluate.py", [*flags, f"--points={self.folder / 'points'}"], self.lock)

    def hpdv2(self) -> None:
        n = self.settings.sizes
        assets = {asset.name: asset for asset in assets_of(self.settings.base, self.settings.reward, False)}
        prompts, dino = assets["HPDv2 prompts"].find()[0], assets["DINO ViT-S/16"].find()[0]
        flags = ["--prompts", str(prompts), "--limit", str(n.prompts), "--images-per-prompt", str(n.images)]
        for output in self.outputs("hpdv2"):
            self.evaluate(output, [*flags, "--rewards", output.name, "--dino", str(dino)])

    def coco(self) -> None:
        table = str(self.folder / "coco-measure.jsonl")
        flags = ["--prompts", table, "--reference", table, "--images-per-prompt", "1", "--rewards", "clipscore"]
        self.evaluate(self.folder / "coco", [*flags, "--inception", "pytorch-fid"])

    def report(self) -> None:
        s = self.settings
        notes = ["A rehearsal (--quick): too few updates and images to be compared with the paper."] * s.quick
        notes += [f"{s.resolution} pixels instead of the default."] * bool(s.resolution)
        notes += [f"Adapters of rank {s.lora}; the paper trains all weights."] * bool(s.lora)
        notes += [f"The authors' weights, {s.model}."] * s.published + [f"{self.notes.values['coco']}."]
        kinds = ("hpdv2", "coco")
        results = {k: [json.loads((out / "results.json").read_text()) for out in self.outputs(k)] for k in kinds}
        table = paper.compare(s.base, s.reward, results, not s.published, notes)
        disk.write_text(self.folder / "table.md", table)
        print(f"\n{table}\nwritten to {self.folder / 'table.md'}")

"""The check before a reproduction: every needed file, device, memory, disk; what is missing, and how to get it."""

import shutil
from pathlib import Path

import torch

from pretrained import hub
from reproduction import coco, plan
from reproduction.assets import Asset, assets_of
from reproduction.plan import Settings
from training import cost

WIDTH = 90  # of the column where; a longer reason is repeated in full below the table
COCO_GB = {False: 20.4, True: 6.9}  # published: its validation images alone


def asset_row(asset: Asset, hub_error: str) -> dict:
    """Where an asset is, where it comes from, or why it is missing. hub_error: of an earlier asset's request."""
    reason = asset.locate()
    row = {"name": asset.name, "gb": asset.gb, "sha256": asset.sha256, "source": asset.source, "by_hand": ""}
    if not reason:
        return row | {"state": "here", "place": str(asset.paths[0])}
    if asset.repo and not hub_error:
        try:
            files = hub.listing(asset.repo, asset.repo_type).values()
            row["gb"] = min(asset.gb, sum(file.size or 0 for file in files) / 1e9)
            return row | {"state": "to fetch", "place": asset.source}
        except OSError as error:
            return row | {"state": "missing", "place": str(error)}
    if not asset.repo and not asset.by_hand and not offline():  # the release, which is asked when it is fetched
        return row | {"state": "to fetch", "place": asset.source}
    place = "get it by hand, as below" if asset.by_hand else hub_error or reason
    return row | {"state": "missing", "place": place, "by_hand": asset.by_hand}


def offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def asset_rows(settings: Settings) -> list[dict]:
    """All assets. A hub that cannot be reached is asked once."""
    rows, hub_error = [], "HF_HUB_OFFLINE is set, or --offline" if offline() else ""
    for asset in assets_of(settings.base, settings.reward, settings.published):
        rows.append(asset_row(asset, hub_error))
        if "no connection" in rows[-1]["place"]:
            hub_error = "no connection to the hub, as above"
    return [*rows, coco_row(settings)]


def coco_row(settings: Settings) -> dict:
    reason = coco.missing(settings.data, settings.sizes.coco, train=not settings.published)
    by_hand = coco.BY_HAND.format(settings.data or "coco")
    if settings.published:
        by_hand = by_hand.replace("curl -LO http://images.cocodataset.org/zips/train2014.zip\n", "")
    return {
        "name": "COCO",
        "gb": COCO_GB[settings.published],
        "sha256": "unknown",
        "source": "by hand: cocodataset.org",
        "state": "missing" if reason else "here",
        "place": reason or str(settings.data),
        "by_hand": by_hand if reason else "",
    }


def gpu_gigabytes() -> float | None:
    return torch.cuda.get_device_properties(0).total_memory / cost.GB if torch.cuda.is_available() else None


def examine(settings: Settings, folder: Path, gpu_memory: float | None = None, fetch: bool = False) -> dict:
    """Everything that is known before a start. gpu_memory: GB of a GPU to plan for (default: that of this machine).

    fetch: the configs of the base may be fetched, which are small, to plan with its own sizes.
    """
    rows = asset_rows(settings)
    missing = [row["name"] for row in rows if row["state"] == "missing"]
    problems = [f"{', '.join(missing)}: missing"] if missing else []
    sizes = plan.shapes(settings.base, fetch and not problems)
    gigabytes, flags, memory = gpu_memory or gpu_gigabytes(), [], ""
    if gigabytes and settings.methods:
        try:
            flags, memory = plan.training_flags(settings, sizes, gigabytes)
        except ValueError as error:
            problems.append(str(error))
    downloads = sum(row["gb"] for row in rows if row["state"] == "to fetch")
    needed, there = (
        plan.disk_gb(settings, sizes),
        next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()),
    )
    free = shutil.disk_usage(there).free / 1e9
    if needed + downloads > free:
        problems.append(f"disk: {needed + downloads:.0f} GB are needed, {there} has {free:.0f} GB free")
    petaflops = plan.petaflops(settings, sizes)
    return {
        "ready": not problems,
        "problems": problems,
        "assets": rows,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "cpu, on which --quick alone is practical",
        "memory": memory,
        "training_flags": flags,
        "disk": {"download_gb": downloads, "run_gb": needed, "free_gb": free},
        "petaflops": petaflops,
        "h100_hours": plan.hours_on_an_h100(petaflops),
    }


def text(report: dict) -> str:
    """The report for a person: one screen."""
    lines = [f"{'':18} {'':9} {'GB':>5}  {'sha256':14} where"]
    for row in report["assets"]:
        place = row["place"] if len(row["place"]) < WIDTH else row["place"][: WIDTH - 3] + "..."
        lines.append(f"{row['name']:18} {row['state']:9} {row['gb']:5.1f}  {row['sha256']:14} {place}")
    disk, memory = report["disk"], "; " + report["memory"] if report["memory"] else ""
    room = f"{disk['run_gb']:.1f} GB of the run, {disk['free_gb']:.0f} GB free"
    arithmetic = ", ".join(f"{name} {value:,.4g}" for name, value in report["petaflops"].items())
    lines += ["", f"device             {report['device']}{memory}"]
    lines += [f"disk               {disk['download_gb']:.1f} GB to fetch, {room}", f"PFLOP              {arithmetic}"]
    lines.append(
        f"time               about {report['h100_hours']:.1f} h on an H100, predicted; on others known after the start"
    )
    cut = [row["place"] for row in report["assets"] if row["state"] == "missing" and len(row["place"]) >= WIDTH]
    lines += ["", *cut] if cut else []
    by_hand = [row["by_hand"] for row in report["assets"] if row["by_hand"]]
    if by_hand:
        lines += ["", "to get by hand:", *by_hand]
    lines.append("")
    lines += [f"not ready: {problem}" for problem in report["problems"]] or ["ready"]
    return "\n".join(lines)

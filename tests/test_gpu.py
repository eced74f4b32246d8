"""The GPU code paths on an emulated GPU; pretended_gpu.py says what that covers and what it does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_rewards import NAMES, folders  # noqa: F401
from test_text import pipeline  # noqa: F401

ROOT = Path(__file__).parent.parent
PRETENDED = ROOT / "tests" / "pretended_gpu.py"
MAY_SYNC = {  # functions that may synchronise: loading, saving, sampling images, and the end of an update
    "pretrained/loading.py": {"convert_tensors"},
    "pretrained/weight_files.py": {"check_finite"},
    "pretrained/saving.py": {"save_unet"},
    "pretrained/features.py": {"clip_features"},
    "pretrained/text_encoder.py": {"on_cpu"},
    "pretrained/reward_networks.py": {"load", "on_cpu"},
    "train.py": {"main"},  # optimizer.step
    "tiny/pretrain.py": {"main", "load_models"},
    "training/models.py": {"load_models"},
    "training/run.py": {"gradients_are_finite", "updates", "predicted_minutes"},
    "speed/inference_copy.py": {"refresh"},
    "utils/distributed.py": {"all_reduce_sum", "gather_to_rank0"},
    "pretrained/lora.py": {"add", "save"},
    "training/monitor.py": {"save_grid", "evaluate", "samplers", "distances"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None or not shutil.which("g++"), reason="needs a CPU build and g++"),
]


def run(*command) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return ["--base", "tiny", "--batch-size", 2, "--sample-every", 0, "--prompts", tmp_path / "prompts.txt"]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_on_a_gpu_equals_one_on_the_cpu(tmp_path, flags):
    """Three ImageReFL updates and one ReFL update in float32, the final table, and samples of the result."""
    flags += ["--method", "imagerefl", "--steps", 4, "--dtype", "float32"]
    run("train.py", *flags, "--output-dir", tmp_path / "cpu")
    run(PRETENDED, "train.py", *flags, "--output-dir", tmp_path / "gpu")
    cpu, gpu = log_of(tmp_path / "cpu"), log_of(tmp_path / "gpu")
    assert [line["kind"] for line in gpu] == ["imagerefl"] * 3 + ["refl"]
    for ours, theirs in zip(gpu, cpu, strict=True):
        for key in {"reward", "diffusion", "grad_norm"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    cpu, gpu = (json.loads((tmp_path / side / "run.json").read_text())["table"] for side in ("cpu", "gpu"))
    assert cpu.keys() == gpu.keys() == {"base", "tuned", "--switch 30"}
    for name, row in gpu.items():
        for measure, values in row.items():
            assert values == pytest.approx(cpu[name][measure], abs=1e-4)

    sample = ["sample.py", "--checkpoint", tmp_path / "cpu", "--switch", 30, "--prompt", "a cat", "--dtype", "float32"]
    run(*sample, "--output-dir", tmp_path / "samples-cpu")
    run(PRETENDED, *sample, "--output-dir", tmp_path / "samples-gpu")
    grids = [np.asarray(Image.open(tmp_path / f"samples-{side}" / "grid.png")).astype(int) for side in ("cpu", "gpu")]
    assert abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.parametrize(
    "method, more",
    [
        ("imagerefl", ["--lora", 4, "--checkpointing", "--text-on-cpu"]),
        ("refl", ["--kl-scale", 1e-3, "--lora", 4]),
        ("diffusion", ["--ema", 0.9, "--snr-gamma", 5]),
    ],
)
def test_a_bf16_micro_batch_never_synchronises_with_the_gpu(tmp_path, flags, method, more):
    script = "tiny/pretrain.py"
    if method != "diffusion":
        script, more = "train.py", ["--method", method, *more]
    flags += [*more, "--steps", 4]
    run(PRETENDED, "--report", tmp_path / "report", script, *flags, "--output-dir", tmp_path / "run")
    report = json.loads((tmp_path / "report").read_text())
    where = {(file, function) for _, file, function, *_ in report["waits"]}
    assert ("utils/distributed.py", "all_reduce_sum") in where  # so synchronisations are detected
    assert not [wait for wait in report["waits"] if wait[2] not in MAY_SYNC.get(wait[1], ())]
    if method == "imagerefl":
        adapters = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
        assert {t.dtype for t in adapters.values()} == {torch.float32}  # the frozen weights are bf16
        assert any(t.any() for key, t in adapters.items() if "lora_B" in key)  # initialised to zero
    rows = log_of(tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in rows)
    if "--kl-scale" in more:
        assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0  # the base and the adapters are rounded alike
    calls = {(operation, dtype): count for operation, dtype, count in report["types"]}
    for operation in ("convolution", "addmm"):
        assert calls[operation, "bfloat16"] > 20 * calls.get((operation, "float32"), 0)


def test_sdxl_conditioning_equals_the_cpu_and_never_synchronises(pipeline, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import torch
import weights
prompts, size = ["a cat", "", "a dog"], (64, 96)
cpu, gpu = (weights.load_text({str(pipeline)!r}, device)(prompts, size) for device in ("cpu", "cuda"))
for key in ("context", "pooled", "time_ids"):
    assert gpu[key].is_cuda and len(gpu[key]) == 3 and (gpu[key].cpu() - cpu[key]).abs().max() <= 1e-5, key
"""
    )
    run(PRETENDED, "--report", tmp_path / "report", script)
    waits = json.loads((tmp_path / "report").read_text())["waits"]
    # only loading, and the script itself
    assert {file for _, file, *_ in waits} <= {"pretrained/loading.py", "pretrained/weight_files.py", "elsewhere"}


def test_rewards_equal_the_cpu_and_never_synchronise(folders, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import torch
import rewards
for folder in {[str(folders[name]) for name in NAMES]}:
    name, results = folder.rsplit("/", 1)[1], []
    for device in ("cpu", "cuda"):
        images = (torch.arange(2 * 3 * 40 * 40).reshape(2, 3, 40, 40) % 7 / 7 - 0.5).to(device).requires_grad_()
        scores = rewards.load(name, folder, device)(images, ["red fox", "a"])
        scores.sum().backward()
        assert scores.device.type == images.grad.device.type == device
        results.append((scores.detach().cpu(), images.grad.cpu()))
    for cpu, gpu in zip(*results):
        assert cpu.norm() > 0 and (gpu - cpu).norm() <= 1e-5 * cpu.norm(), name
"""
    )
    run(PRETENDED, "--report", tmp_path / "report", script)
    waits = json.loads((tmp_path / "report").read_text())["waits"]
    # only loading, and the script itself
    loads = {
        ("pretrained/reward_networks.py", "load"),
        ("pretrained/weight_files.py", "check_finite"),
        ("elsewhere", ""),
    }
    assert {(file, function) for _, file, function, *_ in waits} <= loads


def test_operations_that_fail_on_a_gpu_fail_on_the_emulated_one(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        """
import torch
gpu, cpu = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
assert gpu.device.type == "cuda" and (gpu + 1).cpu().tolist() == [[2, 2], [2, 2]] and gpu[torch.tensor([0])].is_cuda
weight = torch.nn.Linear(2, 2).to("cuda").weight
(gpu @ weight).sum().backward()
assert weight.grad.is_cuda and weight.grad.cpu().tolist() == [[2, 2], [2, 2]]
for wrong in (
    lambda: gpu + cpu,
    lambda: gpu @ cpu,
    lambda: cpu[gpu.long()],
    lambda: torch.cat([gpu, cpu]),
    lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
):
    try:
        wrong()
    except RuntimeError:
        continue
    raise SystemExit(3)
"""
    )
    run(PRETENDED, wrong)

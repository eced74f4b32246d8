"""The sampling command on the tiny base."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from PIL import Image
from recipe import mini_base

import sample
import weights
from combined import rescale_switch
from utils import device

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_base(tmp_path_factory.mktemp("mini base"))


@pytest.fixture(scope="module")
def base_unet(mini):
    """The base's own UNet as a "tuned" model."""
    return f"{mini}/unet"


@pytest.fixture(scope="module")
def run(mini):
    return lambda *flags: sample.main(sample.parse_args([*flags, "--base", mini, "--steps", "4"]))


def pixels(folder, name: str) -> bytes:
    return Image.open(folder / name).tobytes()


def test_writes_images_with_their_settings_and_a_grid(tmp_path, run, mini, base_unet):
    prompts = ["octopus", "ein grüner Frosch"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    run(*flags, "--checkpoint", base_unet, "--switch", "3", "--images-per-prompt", "2", "--output-dir", str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000-1.png", "00000-2.png", "00001-1.png", "00001-2.png", "grid.png"]
    text = Image.open(tmp_path / "00001-2.png").info["parameters"]
    first, settings = text.split("\n")
    assert first == "ein grüner Frosch"
    assert settings.startswith(f"Steps: 4, Sampler: DDPM, CFG scale: 2, Seed: 2, Size: 64x64, Model: {mini}, Switch: 3")
    assert Image.open(tmp_path / "00000-1.png").size == (64, 64)


@pytest.mark.parametrize("base_steps, steps, expected", [(30, 40, 30), (30, 10, 8), (30, 2, 1), (35, 4, 3), (10, 1, 0)])
def test_the_default_switch_leaves_a_step_to_the_tuned_model(base_steps, steps, expected):
    assert rescale_switch(base_steps, steps) == expected


def test_writes_the_folders_of_geneval(tmp_path, run, base_unet):
    """<folder>/00000/metadata.jsonl, a line of the prompts' file, and <folder>/00000/samples/0000.png, ..."""
    rows = [{"tag": "single_object", "include": [{"class": c, "count": 1}], "prompt": f"a photo of a {c}"}
            for c in ("bench", "cow")]  # fmt: skip
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--checkpoint", base_unet, "--switch", "4", "--images-per-prompt", "2"]
    run("--geneval", str(file), *flags, "--output-dir", str(tmp_path / "geneval"))
    for number, row in enumerate(rows):
        folder = tmp_path / "geneval" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["0000.png", "0001.png"]
    run("--prompt", rows[1]["prompt"], *flags, "--output-dir", str(tmp_path / "plain"))
    assert pixels(tmp_path / "geneval" / "00001" / "samples", "0001.png") == pixels(tmp_path / "plain", "00000-2.png")
    with pytest.raises(ValueError, match="holds images of an earlier call, as 0001.png"):
        run("--geneval", str(file), *flags[:-1], "1", "--output-dir", str(tmp_path / "geneval"))
    file.write_text(json.dumps(["a bench", "a cow", "a dog"]))
    with pytest.raises(ValueError, match="--geneval .*: give evaluation_metadata.jsonl"):
        run("--geneval", str(file), *flags, "--output-dir", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="give one of them"):
        run("--geneval", str(file), "--prompt", "a cow", *flags)


@pytest.mark.slow
def test_every_switch_gives_the_same_image_if_base_and_tuned_model_are_equal(tmp_path, run, base_unet):
    for switch in (0, 2, 4):
        flags = ["--checkpoint", base_unet, "--switch", str(switch), "--guidance", "1", "--images-per-prompt", "1"]
        run("--prompt", "octopus", *flags, "--output-dir", str(tmp_path / str(switch)))
    images = [pixels(tmp_path / str(switch), "00000-1.png") for switch in (0, 2, 4)]
    assert images[0] == images[1] == images[2]


def test_each_group_is_written_before_the_next_one_starts(tmp_path, run, base_unet, monkeypatch):
    monkeypatch.setattr(sample, "GROUP", 1)
    monkeypatch.setattr(sample, "GRID_PROMPTS", 1)
    written, initial_noise = [], sample.initial_noise

    def recorded(*arguments):
        written.append(len(list(tmp_path.glob("*.png"))))
        return initial_noise(*arguments)

    monkeypatch.setattr(sample, "initial_noise", recorded)
    prompts = ["--prompt", "octopus", "--prompt", "fox", "--prompt", "owl"]
    flags = ["--checkpoint", base_unet, "--images-per-prompt", "2", "--batch-size", "2", "--output-dir", str(tmp_path)]
    run(*prompts, *flags)
    assert written == [0, 2, 4]
    assert Image.open(tmp_path / "grid.png").height < 2 * 128  # only the first prompt


@pytest.mark.parametrize("flags", [["--switch", "2"], ["--aig", "1"]])
def test_progress_counts_every_step_of_every_batch(flags, tmp_path, run, base_unet, capsys, monkeypatch):
    """Two batches of four steps."""
    monkeypatch.setattr(sample, "tqdm", functools.partial(sample.tqdm, mininterval=0))
    images = ["--prompt", "octopus", "--images-per-prompt", "3", "--batch-size", "2"]
    run("--checkpoint", base_unet, *images, *flags, "--output-dir", str(tmp_path))
    progress = capsys.readouterr().err
    assert all(f"| {done}/8 [" in progress for done in range(9))


def test_bf16_networks_sample_without_autocast(tmp_path, run, base_unet, monkeypatch):
    """As on a GPU. The images differ from those in float32 only by rounding."""
    combine = sample.combine
    for name in ("float32", "bfloat16"):
        monkeypatch.setattr(sample, "frozen_dtype", lambda args, name=name: getattr(torch, name))
        monkeypatch.setattr(device, "frozen_dtype", lambda args, name=name: getattr(torch, name))

        def checked(*a):
            assert not torch.is_autocast_enabled("cpu")
            return combine(*a)

        monkeypatch.setattr(sample, "combine", checked)
        flags = ["--checkpoint", base_unet, "--switch", "2", "--images-per-prompt", "1", "--dtype", name]
        run("--prompt", "octopus", *flags, "--output-dir", str(tmp_path / name))
    float32, bf16 = (
        torch.frombuffer(bytearray(pixels(tmp_path / n, "00000-1.png")), dtype=torch.uint8).float()
        for n in ("float32", "bfloat16")
    )
    assert 0 < (float32 - bf16).abs().mean() < 4 and float32.std() > 20


@pytest.mark.parametrize(
    "method, switch",
    [
        ("refl", 10),
        pytest.param("imagerefl", 30, marks=pytest.mark.slow),
        ("diffusion", 0),
        pytest.param(None, 30, marks=pytest.mark.slow),
    ],
)
def test_the_default_switch_of_each_method_is_the_papers(method, switch, tmp_path, mini, monkeypatch):
    header = {"method": method, "base": mini} if method else {}
    unet, schedules = tmp_path / "unet", []
    weights.save_unet(weights.load_unet(mini), unet, metadata=header)
    monkeypatch.setattr(sample, "combine", lambda *a: schedules.append(a[3]) or a[4])
    for steps in (40, 20):
        flags = ["--checkpoint", str(unet), "--prompt", "fox", "--output-dir", str(tmp_path / "o")]
        flags += [] if method else ["--base", mini]
        sample.main(sample.parse_args([*flags, "--steps", str(steps)]))
    assert [schedule.index(1.0) for schedule in schedules[::2]] == [switch, switch // 2]  # two calls per run


def test_the_noise_of_an_image_depends_only_on_its_seed(tmp_path, run, base_unet):
    for name, batch, seed in (("one", "1", "1"), ("four", "4", "1"), ("later", "4", "3")):
        flags = ["--checkpoint", base_unet, "--batch-size", batch, "--seed", seed, "--output-dir", str(tmp_path / name)]
        run("--prompt", "octopus", *flags)
    assert pixels(tmp_path / "four", "00000-3.png") == pixels(tmp_path / "later", "00000-3.png")
    one, four = (
        torch.frombuffer(bytearray(pixels(tmp_path / n, "00000-4.png")), dtype=torch.uint8) for n in ("one", "four")
    )
    assert (one.int() - four.int()).abs().max() <= 1  # another batch size only rounds differently
    assert pixels(tmp_path / "four", "00000-1.png") != pixels(tmp_path / "four", "00000-2.png")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "reproduce.py", "study.py"])
def test_help_needs_no_torch(script):
    code = f"import sys; sys.argv = ['{script}', '--help']; import runpy\n"
    code += f"try: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["whole", "adapter"])
def test_compiling_changes_no_image(checkpoint, tmp_path):
    source = str(sample.presets.TUNED)
    if checkpoint == "whole":
        source = str(tmp_path / "unet")
        weights.save_unet(weights.load_unet("tiny"), Path(source), dtype=torch.float16)
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        flags += ["--checkpoint", source, "--switch", "2", "--dtype", "float32", "--output-dir", str(tmp_path / name)]
        flags += ["--prompt", "octopus", "--images-per-prompt", "1", "--steps", "4"]
        sample.main(sample.parse_args(flags))
    eager, compiled = (
        torch.frombuffer(bytearray(pixels(tmp_path / n, "00000-1.png")), dtype=torch.uint8)
        for n in ("eager", "compiled")
    )
    assert (eager.int() - compiled.int()).abs().max() <= 1


@pytest.mark.slow
def test_compiled_networks_have_one_graph_per_batch_size(base_unet, mini, tmp_path, monkeypatch):
    """Not one per timestep, nor one with dynamic shapes, which is slower on a GPU. Six images: batches of 4 and 2."""
    counter = torch._dynamo.testing.CompileCounter()
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **options: compiling(net, backend=counter, **options))
    torch.compiler.reset()
    flags = ["--base", str(mini), "--checkpoint", base_unet, "--switch", "3", "--steps", "6", "--guidance", "2"]
    flags += ["--prompt", "owl", "--images-per-prompt", "6", "--batch-size", "4", "--resolution", "32", "--compile"]
    sample.main(sample.parse_args([*flags, "--dtype", "float32", "--output-dir", str(tmp_path)]))
    graphs = counter.frame_count
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert graphs == 3 + 2  # UNet with batches of 8 (with guidance), 4 and 2; decoder with 4 and 2

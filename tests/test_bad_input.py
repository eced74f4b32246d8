"""Bad input to every command: one line that names the culprit, exit code 2, no traceback, nothing half-written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image
from recipe import GOLDEN, mini_base

import evaluate
import sample
import train
import weights
from pretrained import reward_commands
from tiny import pretrain
from training.presets import TUNED
from utils import cli

ROOT = Path(__file__).parent.parent
CALL: dict[str, Callable[[list[str]], None]] = {
    "train": lambda argv: cli.run(train.main, train.parse_args(argv)),
    "pretrain": lambda argv: cli.run(pretrain.main, pretrain.parse_args(argv)),
    "sample": lambda argv: cli.run(sample.main, sample.parse_args(argv)),
    "evaluate": lambda argv: cli.run(evaluate.main, evaluate.parse_args(argv)),
    "weights": lambda argv: cli.run(weights.main, weights.parse_args(argv)),
    "rewards": lambda argv: sys.exit(reward_commands.main(argv)),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LONE = "half a \ud83d smiley"  # a surrogate without its other half

# {bad}: the folder below; {mini}: a base that is good; {out}: a place that must stay as it was, here absent
CASES = [
    # flags of train.py
    ("train", "--method sft", "sft"),
    ("train", "--from-image", "--method draft or drtune or dpo; imagerefl is ReFL from images"),
    ("train", "--method refl --gradient-steps 2", "--gradient-steps goes with --method draft or drtune"),
    ("train", "--method draft --gradient-steps 41", "--gradient-steps: must be in 1..40, got 41"),
    ("train", "--method draft --gradient-steps 5-3", "5-3"),
    ("train", "--method drtune --lv-samples 1", "--lv-samples goes with --method draft"),
    ("train", "--method draft --beta 1", "--beta goes with --method dpo"),
    ("train", "--method dpo --kl-scale 1e-3", "--kl-scale: dpo is tied to the base model by --beta"),
    ("train", "--kl-scale -1", "--kl-scale"),
    ("train", "--method dpo --data {bad}/half_pair", "metadata.jsonl, line 2: not a JSON object with better, worse"),
    ("train", "--method dpo --data {bad}/no_pair", "absent.png"),
    ("train", "--method dpo --from-image --data {bad}/no_pair", "file_name and text"),
    ("train", "--colour red", "--colour"),
    ("train", "--batch-size 0", "at least 1"),
    ("train", "--steps many", "many"),
    ("train", "--lr -1", "--lr"),
    ("train", "--lr nan", "--lr"),
    ("train", "--lr inf", "--lr"),
    ("train", "--warmup -1", "--warmup"),
    ("train", "--weight-decay -0.1", "--weight-decay"),
    ("train", "--max-grad-norm nan", "--max-grad-norm"),
    ("pretrain", "--caption-dropout 2", "--caption-dropout"),
    ("pretrain", "--ema 1.5", "--ema"),
    ("pretrain", "--snr-gamma -5", "--snr-gamma"),
    ("train", "--shift -1", "--shift"),
    ("train", "--seed -1", "--seed"),
    ("train", "--keep 0", "--keep"),
    ("train", "--save-minutes -1", "--save-minutes"),
    ("train", "--save-minutes 0", "--save-minutes"),
    ("train", "--shard --method draft --gradient-steps 1-4", "leave out --gradient-steps 1-4"),
    ("train", "--shard --method drtune --from-image", "leave out --from-image"),
    ("train", "--sample-every -1", "--sample-every"),
    ("train", "--reward-scale nan", "--reward-scale"),
    ("train", "--start 40", "--start 40"),
    ("train", "--device nowhere", "--device nowhere"),
    ("pretrain", "--lora 2 --init random", "--lora"),
    ("pretrain", "--lora 2 --ema 0.9", "--ema"),
    ("pretrain", "--resume {bad}/reward_run", "python train.py --resume"),
    ("train", "--resume {bad}/diffusion_run", "python tiny/pretrain.py --resume"),
    ("train", "--resume {bad}/cached_run", "cached latents"),
    ("pretrain", "--resolution 60 --base {mini}", "--resolution 60"),
    ("train", "--resolution 128", "the embedded images have 64 pixels"),
    ("train", "--monitor 5 --prompts {bad}/one.txt", "two or more"),
    ("pretrain", "--monitor 5", "--monitor"),
    ("train", "--stop-on-collapse", "--stop-on-collapse"),
    ("train", "--dino nowhere", "--dino"),
    ("train", "--dino nowhere --monitor 5", "nowhere"),
    # weights and rewards of train.py
    ("train", "--base sd16", "sd16"),
    ("train", "--base sd15 --data tiny", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("train", "--base sdxl --data tiny", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("train", "--base {bad}/no_weights", "no_weights"),
    ("train", "--base {bad}/loop", "loop"),
    ("train", "--base {bad}/sd2", "an SD2 model"),
    ("train", "--base {bad}/v_prediction", "prediction_type v_prediction"),
    ("pretrain", "--base {bad}/cut", WEIGHTS),
    ("train", "--reward beauty", "beauty"),
    ("train", "--reward pickscore", "yuvalkirstain/PickScore_v1"),
    ("train", "--reward tiny=x", "not a number"),
    ("train", "--reward-weights a,b", "--reward-weights"),
    # data and prompts of train.py
    ("train", "--data nowhere", "nowhere"),
    ("train", "--data LICENSE", "prompts alone"),
    ("train", "--data {bad}/no_weights", "metadata.jsonl"),
    ("train", "--data {bad}/loop", "loop"),
    ("train", "--data {bad}/missing_image", "absent.png"),
    ("train", "--data {bad}/not_json", "metadata.jsonl, line 1"),
    ("train", "--data {bad}/not_strings", "must be strings"),
    ("train", "--data {bad}/no_row", "nothing to train on"),
    ("train", "--data {bad}/latin", "not a UTF-8 text file"),
    ("train", "--data {bad}/surrogate", "not valid Unicode"),
    ("train", "--data {bad}/empty.json", "not valid JSON"),
    ("train", "--data {bad}/object.json", "not a COCO captions file"),
    ("train", "--data {bad}/coco.json", "no such folder"),
    ("train", "--data {bad}/coco_empty.json", "no annotations"),
    ("train", "--data {bad}/coco_null.json", "a caption is not a string"),
    ("pretrain", "--sample-every 0 --base {mini} --data {bad}/undecodable", "none of the 1 images"),
    ("train", "--prompts nowhere.txt", "nowhere.txt"),
    ("train", "--reward rater --prompts {bad}/foreign.txt", "is none of the 64 concepts"),
    ("train", "--reward rater --method refl --data {bad}/foreign.txt", "is none of the 64 concepts"),
    ("evaluate", "--rewards rater --prompts {bad}/foreign.txt", "is none of the 64 concepts"),
    ("train", "--prompts {bad}", "bad input"),
    ("train", "--prompts {bad}/blank.txt", "holds no prompt"),
    ("train", "--prompts {bad}/latin.txt", "not a UTF-8 text file"),
    ("train", "--prompts {bad}/numbers.json", "expected a list of strings"),
    ("train", "--prompts {bad}/surrogate.json", "not valid Unicode"),
    # folders of train.py
    ("train", "--output-dir {bad}/blank.txt/run", "blank.txt: not a folder"),
    ("train", "--output-dir {bad}/broken_run", "already holds a run"),
    ("train", "--output-dir {bad}/loop/run", "loop"),
    ("train", "--resume nowhere", "nowhere"),
    ("train", "--resume {bad}/broken_run", "run.json is damaged"),
    ("train", "--resume {bad}/empty_run", "run.json is damaged"),
    ("train", "--resume {bad}/old_run --lr 1", "--lr 1.0 (was 0.1)"),
    ("train", "--resume {bad}/old_run --steps 9", "--steps 9 (was 3)"),  # the rate falls to 0 at the last one
    # sample.py
    ("sample", "--switch 41", "--switch 41"),
    ("sample", "--switch -1", "--switch -1"),
    ("sample", "--steps 1000", "steps"),
    ("sample", "--eta 2", "eta"),
    ("sample", "--eta nan", "eta"),
    ("sample", "--aig -1", "--aig"),
    ("sample", "--aig 1 --switch 3", "--aig and --switch"),
    ("sample", "--guidance nan", "--guidance"),
    ("sample", "--seed -1", "--seed"),
    ("sample", "--seed 99999999999999999999", "--seed"),
    ("sample", "--images-per-prompt 0", "at least 1"),
    ("sample", "--device nowhere", "--device nowhere"),
    ("sample", "--resolution 60", "60"),
    ("sample", "--base sd16", "sd16"),
    ("sample", "--prompts nowhere.txt", "nowhere.txt"),
    ("sample", "--prompts {bad}/blank.txt", "holds no prompt"),
    ("sample", "--prompt a --prompts b", "--prompts"),
    ("sample", "--prompt {lone}", "not valid Unicode"),
    ("sample", "--output-dir {bad}/blank.txt", "blank.txt: not a folder"),
    ("sample", "--checkpoint nowhere", "nowhere"),
    ("sample", "--checkpoint {bad}/loop", "loop"),
    ("sample", "--checkpoint {bad}/no_weights", "no_weights"),
    ("sample", "--checkpoint {bad}/cut/unet", WEIGHTS),
    ("sample", "--checkpoint {bad}/html", WEIGHTS),
    ("sample", "--checkpoint {bad}/other_shape", "shape"),
    ("sample", "--checkpoint {bad}/broken_run", "run.json"),
    ("sample", "--checkpoint {bad}/empty.safetensors", "empty.safetensors"),
    ("sample", "--checkpoint {bad}/pointer.safetensors", "Git LFS pointer"),
    ("sample", f"--checkpoint {GOLDEN}/evil_plain.ckpt", "evil_plain.ckpt: refused"),
    # evaluate.py
    ("evaluate", "--checkpoint {mini}", "say how it was tuned, refl="),
    ("evaluate", "--dino {bad}", "--dino: the tiny base is measured by its own features"),
    ("evaluate", "--checkpoint refl=nowhere/at/all", "nowhere/at/all"),
    ("evaluate", "--checkpoint {bad}/broken_run", "broken_run"),
    ("evaluate", f"--checkpoint refl={TUNED} --sweep switch=41", "0..40 (the number of steps), got 41"),
    ("evaluate", f"--checkpoint refl={TUNED} --sweep aig=-1", "AIG"),
    ("evaluate", "--sweep switch", "write switch=0,10,30 or aig=1,2"),
    ("evaluate", "--sweep size=3", "write switch=0,10,30 or aig=1,2"),
    ("evaluate", "--sweep switch=a", "write switch=0,10,30 or aig=1,2"),
    ("evaluate", "--rewards tiny,beauty", "beauty"),
    ("evaluate", "--rewards tiny,tiny2 --reward-weights one", "needs 2"),
    ("evaluate", "--rewards tiny,tiny2,tiny", "tiny is there twice"),
    ("evaluate", "--reading mine", "--reading mine"),
    ("evaluate", "--prompts nowhere.txt", "nowhere.txt"),
    ("evaluate", "--prompts {bad}/blank.txt", "holds no prompt"),
    ("evaluate", "--reference nowhere", "nowhere"),
    ("evaluate", "--reference LICENSE", "it takes images"),
    ("evaluate", "--resolution 60", "60"),
    ("evaluate", "--guidance nan", "--guidance"),
    ("evaluate", "--base sd16", "sd16"),
    ("evaluate", "--device nowhere", "--device nowhere"),
    ("evaluate", "--output-dir {bad}/blank.txt", "blank.txt: not a folder"),
    # weights.py
    ("weights", "inspect", "SRC"),
    ("weights", "inspect nowhere.safetensors", "nowhere.safetensors"),
    ("weights", "inspect {bad}", "bad input"),
    ("weights", "inspect {bad}/empty.safetensors", "empty.safetensors"),
    ("weights", "inspect {bad}/cut/unet/" + WEIGHTS, WEIGHTS),
    ("weights", f"inspect {GOLDEN}/evil_plain.ckpt", "evil_plain.ckpt: refused"),
    ("weights", "convert {mini}", "DST"),
    ("weights", "convert {mini} {out} --layout flat", "flat"),
    ("weights", "convert {mini} {bad}/blank.txt/unet", "blank.txt"),
    # rewards.py
    ("rewards", "paint", "paint"),
    ("rewards", "score --reward tiny image.png", "--prompt"),
    ("rewards", "score --reward nice --prompt a image.png", "nice"),
    ("rewards", "score --reward tiny --prompt a nowhere.png", "nowhere.png"),
    ("rewards", "score --reward tiny --prompt a {bad}/empty.png", "empty.png: not a readable image"),
    ("rewards", "score --reward tiny --prompt a {bad}/cut.png", "cut.png: not a readable image"),
    ("rewards", "score --reward tiny --prompt a --prompt b x y z", "2 times for 3 images"),
    ("rewards", "convert-mps nowhere.pth {out}/x.safetensors", "nowhere.pth"),
]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_base(tmp_path_factory.mktemp("mini base"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory, mini):
    """A folder of what one finds on disks; its name has a space in it."""
    folder = tmp_path_factory.mktemp("x") / "bad input"
    unet, config = (Path(mini) / "unet" / WEIGHTS).read_bytes(), (Path(mini) / "unet" / "config.json").read_text()
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    null = coco | {"annotations": [{"image_id": 1, "caption": None}]}
    row = '{"file_name": "a.png", "text": %s}'
    contents = {
        "blank.txt": "\n \n",
        "one.txt": "fox",
        "foreign.txt": "a red fox",
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "empty.json": "",
        "object.json": "{}",
        "coco.json": json.dumps(coco),
        "coco_empty.json": json.dumps(coco | {"annotations": []}),
        "coco_null.json": json.dumps(null),
        "numbers.json": "[1, 2]",
        "surrogate.json": json.dumps([LONE]),
        "empty.safetensors": "",
        "pointer.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "empty.png": "",
        "missing_image/metadata.jsonl": '{"file_name": "absent.png", "text": "a"}',
        "half_pair/metadata.jsonl": '{"better": "a", "worse": "b", "text": "c"}\n{"better": "a", "text": "c"}',
        "no_pair/metadata.jsonl": '{"better": "absent.png", "worse": "b.png", "text": "c"}',
        "not_json/metadata.jsonl": "a.png, a caption",
        "not_strings/metadata.jsonl": row % "1",
        "no_row/metadata.jsonl": "\n",
        "latin/metadata.jsonl": (row % '"caf\u00e9"').encode("latin-1"),
        "surrogate/metadata.jsonl": row % json.dumps(LONE),
        "surrogate/a.png": "",
        "undecodable/metadata.jsonl": row % '"a"',
        "undecodable/a.png": "GIF89a",
        "broken_run/run.json": '{"args": {"ba',
        "empty_run/run.json": "{}",
        "old_run/run.json": '{"args": {"lr": 0.1, "steps": 3, "lr_schedule": "cosine"}}',
        "reward_run/run.json": '{"args": {"lr": 0.1, "lr_schedule": "cosine", "method": "refl"}}',
        "diffusion_run/run.json": '{"args": {"lr": 0.1, "lr_schedule": "cosine", "method": "diffusion"}}',
        "cached_run/run.json": '{"args": {"lr_schedule": "cosine", "method": "imagerefl", "cache_latents": true}}',
        "cut/unet/config.json": config,
        f"cut/unet/{WEIGHTS}": unet[: len(unet) // 2],
        "html/config.json": config,
        f"html/{WEIGHTS}": "<html>not found</html>",
        "other_shape/config.json": config.replace("16,", "24,"),
        f"other_shape/{WEIGHTS}": unet,
        "sd2/unet/config.json": json.dumps(json.loads(config) | {"cross_attention_dim": 1024}),
        f"sd2/unet/{WEIGHTS}": unet,
        "v_prediction/scheduler/scheduler_config.json": '{"prediction_type": "v_prediction"}',
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "no_weights").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("vae", "text_encoder", "tokenizer"):
        (folder / "cut" / name).symlink_to(Path(mini) / name)
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / "v_prediction" / name).symlink_to(Path(mini) / name)
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:1500])
    return folder


def content_of(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize(("command", "flags", "named"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_exit_code_2(command, flags, named, tmp_path, capsys, monkeypatch, mini, bad):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", [f"{command}.py"])
    argv = [word.format(bad=bad, mini=mini, out=tmp_path / "out", lone=LONE) for word in flags.split()]
    if command in ("train", "pretrain", "sample", "evaluate") and "--output-dir" not in argv:
        argv += ["--output-dir", str(tmp_path / "out")] * ("--resume" not in argv)
    if command == "sample":
        argv += [] if "--checkpoint" in argv else ["--checkpoint", f"{mini}/unet"]
        argv += [] if "--base" in argv else ["--base", mini]
    before = content_of(bad)
    with pytest.raises(SystemExit) as exit:
        CALL[command](argv)
    error = capsys.readouterr().err.strip().splitlines()
    error = [line for line in error if line and not line.startswith(("left out", "diffusion:"))]  # said before
    assert exit.value.code == 2 and len(error) == 1 and named in error[0], error
    assert error[0].startswith(f"{command}.py"), error
    assert content_of(bad) == before and not list(tmp_path.rglob("*.tmp"))
    if "undecodable" not in flags:  # found out in the first update
        assert not (tmp_path / "out").exists()


def test_there_are_enough_cases():
    assert len(CASES) >= 60 and len(CASES) == len(set(CASES))


@pytest.mark.parametrize("prompt", ["x" * 100_000, "\u202e\u0000 \U0001f419\u200d\ufffd e\u0301", " "])
def test_odd_prompts_are_drawn(prompt, tmp_path, mini):
    flags = [
        "--checkpoint",
        f"{mini}/unet",
        "--base",
        mini,
        "--steps",
        "1",
        "--switch",
        "0",
        "--images-per-prompt",
        "1",
    ]
    sample.main(sample.parse_args([*flags, "--prompt", prompt, "--output-dir", str(tmp_path / "a b")]))
    assert Image.open(tmp_path / "a b" / "00000-1.png").info["parameters"].startswith(prompt)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", ["--steps", "0"]),
        ("sample.py", ["--colour", "red"]),
        pytest.param("train.py", ["--resume", "nowhere"], marks=pytest.mark.slow),  # these two load torch
        pytest.param("sample.py", ["--checkpoint", "nowhere"], marks=pytest.mark.slow),
    ],
)
def test_as_a_command(script, flags, tmp_path):
    words = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    error = done.stderr.splitlines()
    assert done.returncode == 2 and len(error) == 1 and (flags[0] in error[0] or flags[1] in error[0])
    assert list(tmp_path.iterdir()) == []

"""Find, read and check the files that hold a model, and write them.

Layouts: a diffusers pipeline folder (`unet/ vae/ text_encoder/ tokenizer/ scheduler/`) or one component's own folder.
Reading is strict: a missing, unexpected or misshaped key is an error; a pickle is never executed.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def read_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of one weight file, memory-mapped where the format allows.

    `.safetensors` is read as such; `.ckpt`, `.pt`, `.pth` and `.bin` by torch's restricted unpickler, which builds
    tensors and plain containers only; an outer `state_dict` is unwrapped. Raises FileNotFoundError, or ValueError
    when the file is damaged, is a Git LFS pointer, or would need code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
            )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - whatever the unpickler refuses, the file is not loaded
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: refused, holds more than plain tensors or is damaged ({reason})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}

"""What the commands share: flags with dashes or underscores, and bad input told in one line with exit code 2."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which reads `--batch_size` as `--batch-size`."""

    def __init__(self, description: str | None = None, **settings):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False, **settings)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        return self.parse_args(self.dashed(argv))

    def given(self, argv: list[str] | None = None) -> dict:
        """Of the flags, those that are written out, without the defaults."""
        unset = {action.dest: None for action in self._actions}
        return {
            k: v
            for k, v in vars(self.parse_args(self.dashed(argv), argparse.Namespace(**unset))).items()
            if v is not None
        }

    def dashed(self, argv: list[str] | None) -> list[str]:
        argv = sys.argv[1:] if argv is None else argv
        return [a.split("=")[0].replace("_", "-") + a[len(a.split("=")[0]) :] if a[:2] == "--" else a for a in argv]

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A kind of argument: an int or a float in low..high, and finite."""

    def read(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    read.__name__ = kind.__name__  # for argparse's own message
    return read


positive = number(int, 1)


def device(name: str | None) -> str:
    """The device of that name; without one the GPU, if there is one. Raises ValueError when it is not there."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is none here; leave it out to use what there is") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # whose memory is then measured
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions too
    return name


def dtype(device: str) -> str:
    """The default type of arithmetic: bfloat16 on a GPU, and on a processor that has it."""
    import torch

    return "bfloat16" if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def autocast(device: str, kind: str | None = None):
    """Within: matrix products in bf16, if `kind` says so or, left out, the default does. Weights stay what they are."""
    import torch

    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=(kind or dtype(device)) == "bfloat16")


def stored(args: argparse.Namespace):
    """The type in which frozen networks are held: `args.dtype` on a GPU; on a CPU float32, bf16 is autocast's there."""
    import torch

    return torch.bfloat16 if args.dtype == "bfloat16" and args.device != "cpu" else torch.float32


def sampling(args: argparse.Namespace):
    """Within: frozen networks, held as `stored` says, compute in `args.dtype`.

    Autocast would run the norms of what is held in bf16 in float32, so it is off for these.
    """
    import torch

    return autocast(args.device, args.dtype if stored(args) == torch.float32 else "float32")


def check_writable(folder: Path) -> None:
    """Raises OSError, before work begins, when `folder` can be neither made nor written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: not a folder, so {folder} cannot be written; name another one")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there}: may not be written to; name another folder than {folder}")


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Within: the first SIGINT or SIGTERM is put into the list that this gives; a second one ends the program."""
    signals = []

    def note(number: int, frame) -> None:
        if signals:
            sys.exit(128 + number)
        signals.append(number)
        os.write(2, b"\nfinishing this update, then saving; once more to stop at once\n")  # print may be busy

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a GPU's or the CPU's that has no more memory to give."""
    words = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in words)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; what the user can put right is told in one line, with exit code 2."""
    name = sys.argv[0].rsplit("/", 1)[-1]
    try:
        main(args)
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "of the CPU").splitlines()[0]
        print(f"{name}: out of memory ({reason}); try a smaller --batch-size or --resolution", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)

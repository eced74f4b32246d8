"""What the commands share: argument parsing, one-line errors with exit code 2, signals. Free of slow imports."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors that also accepts `--batch_size` for `--batch-size`."""

    def __init__(self, description: str | None = None, **settings):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False, **settings)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        args = self.parse_args(self.with_dashes(argv))
        if reason := broken_torchvision():
            self.exit(2, f"{self.prog}: {reason}\n")
        return args

    def given(self, argv: list[str] | None = None) -> dict:
        """The flags on the command line, without defaults."""
        unset = argparse.Namespace(**{action.dest: None for action in self._actions})
        parsed = vars(self.parse_args(self.with_dashes(argv), unset))
        return {key: value for key, value in parsed.items() if value is not None}

    def with_dashes(self, argv: list[str] | None) -> list[str]:
        argv = sys.argv[1:] if argv is None else argv
        return [self.with_dash(a) if a[:2] == "--" else a for a in argv]

    def with_dash(self, argument: str) -> str:
        """`--output_dir=~/a` -> `--output-dir=/users/me/a`: shells leave a `~` after `=` alone."""
        flag, equals, value = argument.partition("=")
        if value.startswith("~") and flag != "--prompt":
            value = ",".join(os.path.expanduser(path) for path in value.split(","))
        return flag.replace("_", "-") + equals + value

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def broken_torchvision() -> str | None:
    """What to do about a torchvision of another build than torch's: transformers would import it, and fail."""
    try:
        installed, needed = metadata.version("torch").split("+")[0], metadata.requires("torchvision") or []
        if any(re.fullmatch(rf"torch ?\(?=={re.escape(installed)}\)?", line.split(";")[0].strip()) for line in needed):
            return None
        import torchvision  # noqa: F401 - slow, and only where the versions differ
    except metadata.PackageNotFoundError:
        return None
    except Exception as error:
        versions = f"torchvision {metadata.version('torchvision')} does not fit torch {installed}"
        reason = " ".join(str(error).split())[:80]
        return f"{versions} ({reason}); nothing here needs it, so uninstall it: pip uninstall torchvision"
    return None


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argument type: a finite int or float in low..high."""

    def read(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    read.__name__ = kind.__name__  # for argparse's own message
    return read


positive = number(int, 1)


def number_range(text: str) -> range:
    """ "3" -> the range of 3 alone, "1-10" -> 1..10. Raises ValueError for other texts and for an empty range."""
    low, _, high = text.partition("-")
    numbers = range(int(low), int(high or low) + 1)
    if not numbers:
        raise ValueError(f"{text}: the first number is above the second one")
    return numbers


def check_writable(folder: Path) -> None:
    """Raises OSError, before any work is done, if `folder` can be neither created nor written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing}: not a folder, so {folder} cannot be written; name another one")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing}: no write permission; name another folder than {folder}")


class LossyStream:
    """A text stream that never raises: what cannot be written, as the reader or terminal is gone, is dropped."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for consoles in ASCII or cp1252

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # so that what is buffered goes away
            except (OSError, ValueError):
                pass  # not a file


def ignore_lost_output() -> None:
    """From now on a closed pipe or terminal does not end the program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yields a list to which the first SIGINT, SIGTERM or SIGHUP is appended; a second one ends the program."""
    received = []

    def handle(number: int, frame) -> None:
        if received:
            sys.exit(128 + number)
        received.append(number)
        try:  # print is not reentrant
            os.write(2, b"\nfinishing this update, then saving; press again to stop at once\n")
        except OSError:
            pass  # the terminal is gone

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; report errors that the user can fix in one line, with exit code 2."""
    ignore_lost_output()
    name = sys.argv[0].rsplit("/", 1)[-1]
    try:
        main(args)
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        from utils.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "of the CPU").splitlines()[0]
        print(f"{name}: out of memory ({reason}); try a smaller --batch-size or --resolution", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)

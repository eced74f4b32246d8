"""What the commands share: flags with dashes or underscores, and bad input told in one line with exit code 2."""

import argparse
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which reads `--batch_size` as `--batch-size`."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        dashed = [a.split("=")[0].replace("_", "-") + a[len(a.split("=")[0]) :] if a[:2] == "--" else a for a in argv]
        return self.parse_args(dashed)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; what the user can put right is told in one line, with exit code 2."""
    try:
        main(args)
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

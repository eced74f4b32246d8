"""Writing files safely: under a temporary name, flushed, then renamed, so that no file is ever half-written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: flushed and renamed to it in the end, removed when anything fails.

    An OSError within, such as that of a full disk, names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network and FUSE file systems refuse; the file itself is synced
    finally:
        os.close(descriptor)


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError with the file and the space that it needs where the disk is too full."""
    with replacing(Path(path)) as temporary:
        needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(temporary.parent).free
        room = f"{needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free; make room"
        if needed > free:
            raise OSError(errno.ENOSPC, f"the disk is full: {room}", str(path))
        try:
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"not written ({error}): {room}", str(path)) from None
        os.umask(mask := os.umask(0o022))
        os.chmod(temporary, 0o666 & ~mask)  # as any new file; the library makes it private


def write_text(path: str | Path, text: str) -> None:
    """Write a text file."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: Path, line: str) -> None:
    """Append a line to a file. Raises OSError that names the file, also where the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def lock(folder: Path) -> Iterator[IO]:
    """Hold a folder for this process; yields the lock's file. The lock vanishes with the process, however it ends.

    Raises ValueError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process trains there; wait for it, or name another folder") from None
        except (ImportError, OSError):
            pass  # Windows, and some network file systems, have no such locks
        yield file

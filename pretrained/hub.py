"""Fetch files of the hub and of a release, and check what has arrived. The transfer itself is huggingface_hub's.

`HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HOME` have their usual meaning. A broken connection is resumed in
the middle of a file; after a kill, the file that was being fetched starts again and those before it are kept.
"""

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAITS = (1, 4)  # seconds before the second and third attempt, where the hub does not ask for more
LONGEST_WAIT = 300.0  # the period over which the hub counts requests
REFUSALS = (400, 401, 403, 404)  # another attempt would give the same answer


@contextmanager
def offline(enabled: bool = True) -> Iterator[None]:
    """Within: nothing is fetched, as with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = enabled or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached(repo: str, *files: str, repo_type: str = "model", revision: str | None = None) -> Path | None:
    """The first of `files` that is in the hub's local cache; nothing is fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    place = {"cache_dir": constants.HF_HUB_CACHE, "repo_type": repo_type, "revision": revision}
    found = (try_to_load_from_cache(repo, file, **place) for file in files if repo)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def listing(repo: str, repo_type: str = "model", revision: str | None = None) -> dict[str, object]:
    """The files of a repository on the hub: name -> size and checksums. Raises OSError, in one line."""
    from huggingface_hub import HfApi, constants

    options = {"repo_type": repo_type, "revision": revision, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
    info = persist(lambda: HfApi().repo_info(repo, files_metadata=True, **options), label(repo, repo_type))
    return {file.rfilename: file for file in info.siblings}


def fetch(
    repo: str,
    choose: Callable[[list[str]], Iterable[str]],
    known: dict[str, str] | None = None,
    repo_type: str = "model",
    revision: str | None = None,
) -> Path:
    """Fetch those files of a repository that `choose` picks and that are not cached; returns their folder.

    known: SHA-256 by file name, where the authors' is known; other files are checked by the hub's own checksum.
    Raises OSError, in one line that names file, cause and remedy. A file that fails its check is removed.
    """
    files, place = listing(repo, repo_type, revision), {"repo_type": repo_type, "revision": revision}
    chosen = sorted(choose(sorted(files)))
    if not chosen or not set(chosen) <= set(files):
        wanted = next((name for name in chosen if name not in files), "such file")
        raise OSError(f"{repo}: the repository has no {wanted}; it has {', '.join(sorted(files)[:5]) or 'none'}")
    for name in chosen:
        if cached(repo, name, **place) is None:
            info = files[name]
            own = info.lfs.sha256 if info.lfs else info.blob_id
            fetch_file(repo, name, (known or {}).get(name) or own, place)
    return cached(repo, chosen[0], **place).parents[chosen[0].count("/")]


def fetch_file(repo: str, name: str, expected: str, place: dict) -> None:
    """Fetch one file and check it; a second time if the check fails."""
    from huggingface_hub import constants, hf_hub_download

    place = place | {"cache_dir": constants.HF_HUB_CACHE}
    for _ in range(2):
        path = Path(persist(lambda: hf_hub_download(repo, name, **place), label(repo, place["repo_type"]), name))
        found = checksum(path, expected)
        if found == expected:
            return
        remove(path)
    raise OSError(wrong_checksum(f"{repo}/{name}", found, expected))


def label(repo: str, repo_type: str) -> str:
    """A repository as its page is called."""
    return f"datasets/{repo}" if repo_type == "dataset" else repo


def fetch_release(url: str, place: Path, digest: str) -> Path:
    """Fetch a file from an address to `place`, unless it is there. digest: how its SHA-256 begins.

    Raises OSError, in one line that names file, cause and remedy.
    """
    from huggingface_hub.file_download import http_get

    partial = place.with_name(place.name + ".part")

    def get() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        done = partial.stat().st_size if partial.is_file() else 0
        if not done or not sha256(partial).startswith(digest):
            try:
                with open(partial, "ab") as file:
                    http_get(url, file, resume_size=done, displayed_filename=place.name)
            except Exception as error:
                if getattr(getattr(error, "response", None), "status_code", None) == 416:  # longer than the file
                    partial.unlink()
                raise
        found = sha256(partial)
        if not found.startswith(digest):
            partial.unlink()
            raise ChecksumError(wrong_checksum(url, found, f"{digest}..."))
        os.replace(partial, place)

    if not place.is_file():
        persist(get, url)
    return place


class ChecksumError(ValueError):
    """A file with another content than expected."""


def wrong_checksum(file: str, found: str, expected: str) -> str:
    remedy = "it was removed; repeat the command later, or get the file elsewhere"
    return f"{file}: arrived several times with checksum {found} instead of {expected}: damaged or replaced; {remedy}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path, like: str) -> str:
    """The SHA-256 of a file, or its git hash if `like` has the length of one."""
    if len(like) == 64:
        return sha256(path)
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def stored_checksum(path: Path) -> str | None:
    """The checksum of a file of the hub's cache, which is the name of the blob that it links to; None elsewhere."""
    blob = path.readlink() if path.is_symlink() else Path()
    name = blob.name if blob.parent.name == "blobs" else ""
    return name if len(name) in (40, 64) and set(name) <= set("0123456789abcdef") else None


def remove(path: Path) -> None:
    """Remove a file of the hub's cache, with what it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def persist(action: Callable, repo: str, name: str = ""):
    """The result of a request, repeated unless the answer is final. Raises OSError: file, cause and remedy."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError(explain(repo, name, OSError("offline")))
    for attempt in range(len(WAITS) + 1):
        try:
            return action()
        except Exception as raised:  # noqa: BLE001 - one of many errors of network, hub and disk
            error = root_cause(raised)
            response = getattr(error, "response", None)
            final = getattr(response, "status_code", None) in REFUSALS or getattr(error, "errno", None) is not None
            if final or attempt == len(WAITS):
                raise OSError(explain(repo, name, error)) from None
            asked = getattr(response, "headers", {}).get("Retry-After", "")
            seconds = min(LONGEST_WAIT, float(asked) if asked.isdigit() else WAITS[attempt])
            print(f"{name or repo}: {type(error).__name__}, next attempt in {seconds:g} s", file=sys.stderr, flush=True)
            time.sleep(seconds)


def root_cause(error: Exception) -> Exception:
    """The error behind huggingface_hub's "not in the cache, and no connection"."""
    while type(error).__name__ in ("LocalEntryNotFoundError", "IncompleteSnapshotError") and error.__cause__:
        error = error.__cause__
    return error


def explain(repo: str, name: str, error: Exception) -> str:
    """File, cause and remedy of a failed request, in one line."""
    from huggingface_hub import constants

    file = f"{repo}/{name}" if name else repo
    page = repo if "://" in repo else f"{constants.ENDPOINT}/{repo}"
    status, kind = getattr(getattr(error, "response", None), "status_code", None), type(error).__name__
    if isinstance(error, ChecksumError):
        return str(error)
    if constants.HF_HUB_OFFLINE:
        return f"{file}: HF_HUB_OFFLINE is set, or --offline; leave it out, or copy the file into the hub's cache"
    if kind == "GatedRepoError":
        return f"{file}: gated ({status}); accept its terms at {page}, then set HF_TOKEN or run `hf auth login`"
    if status in (401, 403):
        remedy = "or it is private, or is gone; set HF_TOKEN to a token that may read it, or run `hf auth login`"
        return f"{file}: refused ({status}): the token is missing or wrong, {remedy}"
    if status == 404:
        return f"{file}: not there (404); look at {page}, and if it has moved get it by hand"
    if status == 429:
        return f"{file}: too many requests (429); wait five minutes and repeat, a token (HF_TOKEN) has a higher limit"
    if status and status >= 500:
        return f"{file}: the server fails ({status}); repeat the command later, or set HF_ENDPOINT to a mirror"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{file}: the disk is full; make room, or set HF_HOME to a larger one"
    reason = " ".join(str(error).split())[:90]
    remedy = f"check the network and {constants.ENDPOINT} (HF_ENDPOINT), then repeat the command: what is whole is kept"
    return f"{file}: no connection, or it broke off ({kind}: {reason}); {remedy}"

"""A stand-in for the hub on 127.0.0.1, as huggingface_hub uses it, with faults; and mini models under official names.

Repositories are folders: ROOT/models/OWNER/NAME, ROOT/datasets/OWNER/NAME, and ROOT/releases for plain downloads.

    python tests/hub.py ROOT [PORT]      serve ROOT until interrupted
"""

import contextlib
import hashlib
import json
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pt", ".pth")  # files that the hub stores in LFS and sends from another address
TOKEN = "hf_good"  # accepted where the fault "gated" is set


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `file`, the first `times` of them.

    kind: an HTTP status; "gated" (403 without the right token); "slow"; "drop" (the connection closes in the middle);
    "short" (the file ends too early, without a sign of it); "wrong" (one byte differs); "hang" (no answer).
    """

    kind: int | str
    file: str = ""
    times: int = 10**9
    retry_after: int | None = None


class Hub(ThreadingHTTPServer):
    """The server; `url` is its HF_ENDPOINT. `requests`: (method, path, range) of all so far."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.faults, self.requests, self.lock = root, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fault_for(self, path: str, kinds: tuple) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.file in path and fault.times and (isinstance(fault.kind, int) or fault.kind in kinds):
                    fault.times -= 1
                    return fault
        return None

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were sent."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path]

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed


@contextlib.contextmanager
def serving(root: Path, port: int = 0):
    """A hub in a thread of its own."""
    hub = Hub(root, port)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def use(url: str, cache: Path, monkeypatch) -> None:
    """Point huggingface_hub, which reads its environment when it is imported, to a stand-in and a cache."""
    from huggingface_hub import constants

    from pretrained import hub

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # instead of 10 MB, the unit that is resumed
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    without_waits = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", without_waits)


def digests(path: Path) -> tuple[str, str]:
    """SHA-256, and git's hash."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, "/" + path, self.headers.get("Range")))
        fault = self.server.fault_for(path, ("gated", "hang"))
        if fault and fault.kind == "hang":
            return time.sleep(60)
        if fault and fault.kind == "gated":
            signed = path.startswith("cdn/")  # as the addresses of large files are
            if not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(403, {"X-Error-Code": "GatedRepo"})
        elif fault:
            return self.refuse(fault.kind, {"Retry-After": str(fault.retry_after)} if fault.retry_after else {})
        parts = path.split("/")
        if parts[0] == "api":
            return self.describe(parts[1], "/".join(parts[2:4]), parts[4:])
        if parts[0] == "cdn":
            return self.send_file(self.server.root / "/".join(parts[2:]))
        if parts[0] == "releases":
            return self.redirect(self.server.root / path, {})
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        return self.resolve(self.server.root / kind / parts[0] / parts[1], "/".join(parts[4:]))

    def describe(self, kind: str, repo: str, rest: list[str]) -> None:
        """/api/models/OWNER/NAME: commit and files; .../tree/REVISION: the files alone."""
        folder = self.server.root / kind / repo
        if not folder.is_dir():
            return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
        siblings, tree = [], []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, size, (sha256, git) = path.relative_to(folder).as_posix(), path.stat().st_size, digests(path)
            lfs = {"size": size, "pointerSize": 134} if path.suffix in LARGE else None
            siblings.append({"rfilename": name, "size": size, "blobId": git})
            tree.append({"type": "file", "path": name, "size": size, "oid": git})
            if lfs:
                siblings[-1]["lfs"], tree[-1]["lfs"] = lfs | {"sha256": sha256}, lfs | {"oid": sha256}
        self.send_json(tree if rest[:1] == ["tree"] else {"id": repo, "sha": COMMIT, "siblings": siblings})

    def resolve(self, folder: Path, name: str) -> None:
        """/OWNER/NAME/resolve/REVISION/FILE: etag and commit; large files come from another address."""
        path = folder / name
        if not path.is_file():
            code = "EntryNotFound" if folder.is_dir() else "RepoNotFound"
            return self.refuse(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        sha256, git = digests(path)
        if path.suffix in LARGE:
            size = str(path.stat().st_size)
            return self.redirect(path, {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size})
        self.send_file(path, {"ETag": f'"{git}"'})

    def redirect(self, path: Path, headers: dict) -> None:
        if not path.is_file():
            return self.refuse(404, {})
        place = f"/cdn/{digests(path)[0][:8]}/{path.relative_to(self.server.root).as_posix()}"
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # another host, as the hub has for large files
        self.begin(302, headers | {"Location": elsewhere + place, "X-Repo-Commit": COMMIT, "Content-Length": "0"})

    def send_json(self, content) -> None:
        body = json.dumps(content).encode()
        self.begin(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def refuse(self, status: int, headers: dict) -> None:
        self.begin(status, headers | {"Content-Length": "0"})

    def begin(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send_file(self, path: Path, headers: dict | None = None) -> None:
        """A file or the range that was asked for."""
        content = path.read_bytes()
        headers = (headers or {}) | {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked, status = self.headers.get("Range"), 200
        fault = None
        if self.command == "GET":
            fault = self.server.fault_for(path.as_posix(), ("slow", "drop", "short", "wrong"))
        if fault and fault.kind == "wrong":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self.refuse(416, {"Content-Range": f"bytes */{len(content)}"})
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        if fault and fault.kind == "short":  # no length: the end of the connection is the end of the file
            self.begin(status, headers | {"Connection": "close"})
            self.close_connection, content = True, content[: len(content) // 2]
        else:
            self.begin(status, headers | {"Content-Length": str(len(content))})
        if self.command == "GET":
            self.send_body(content, fault.kind if fault else None)

    def send_body(self, content: bytes, fault: str | None) -> None:
        if fault == "slow":
            for at in range(0, len(content), max(1, len(content) // 20)):
                self.wfile.write(content[at : at + max(1, len(content) // 20)])
                self.wfile.flush()
                time.sleep(0.05)
        elif fault == "drop":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(content)


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), *map(int, sys.argv[2:3])) as server:
        print(server.url, flush=True)
        threading.Event().wait()

"""A Hub on loopback: a folder tree served as the Hugging Face Hub serves repositories.

    root/models/ORG/NAME/FILE          revision `main` of a model
    root/models/ORG/NAME@v1/FILE       its revision `v1`; `%2F` stands for a slash in its name
    root/datasets/ORG/NAME/FILE        a data set
    root/files/FILE                    plain files at /files/FILE, as any web server has them

A commit's hash is that of its content, so it changes when the files do. Files of `LFS` kinds are
redirected to another host name (`/cdn/SHA256/NAME`) with `X-Linked-Etag`, as big files are there.
`faults` makes answers go wrong; `requests` is what was asked, in order.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".parquet", ".tar")
KINDS = {"models": "", "datasets": "datasets/"}


@dataclass
class Fault:
    """What one answer does instead of the right thing.

    Attributes:
        cut: bytes of the body after which the connection is closed.
        status, code: the answer's status and `X-Error-Code`.
        body: other content than the file's (its announced hash stays).
        hang: never answer.
        drip: send one byte every 50 ms of the `headers` or the `body`.
        headers: added, or removed where the value is None.
    """

    cut: int | None = None
    status: int | None = None
    code: str | None = None
    body: bytes | None = None
    hang: bool = False
    drip: str | None = None
    headers: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class HubServer:
    """`with HubServer(root) as hub:` serves at `hub.url` until the block ends.

    Attributes:
        requests: every request so far.
        faults: the end of a path -> what its next GETs do, one each (`"*"`: any path).
        gated, private: `ORG/NAME`s that need a token: `token`.
        headers: the end of a path -> headers of all its answers, those to HEAD requests included.
        ranges: whether byte ranges are understood.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[Request] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.headers: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_right"
        self.ranges = True
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # those that clients keep open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def env(self, home: Path) -> dict[str, str]:
        """Variables that make a program use this Hub, and `home` for its cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}

    def asked(self, method: str = "GET", ending: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and r.path.endswith(ending)]

    def fault(self, path: str) -> Fault | None:
        # What is wrong with the content of a big file is left to the address that sends it.
        sent_on = "/resolve/" in path and path.endswith(LFS)
        for ending, waiting in self.faults.items():
            if waiting and (ending == "*" or path.endswith(ending)):
                if sent_on and waiting[0].status is None:
                    return None
                return waiting.pop(0)
        return None

    def commit(self, name: str, revision: str = "main", kind: str = "models") -> str | None:
        """The commit of a revision: a name, a commit or the start of one; None: no such."""
        for folder in self._revisions(kind, name):
            sha = _commit(folder)
            branch = unquote(folder.name.partition("@")[2]) or "main"
            if revision == branch or (len(revision) >= 7 and sha.startswith(revision)):
                return sha
        return None

    def folder(self, kind: str, name: str, commit: str) -> Path:
        return next(f for f in self._revisions(kind, name) if _commit(f) == commit)

    def exists(self, kind: str, name: str) -> bool:
        return bool(self._revisions(kind, name))

    def _revisions(self, kind: str, name: str) -> list[Path]:
        place = self.root / kind / name
        if not place.parent.is_dir():
            return []
        return sorted(
            f
            for f in place.parent.iterdir()
            if f.is_dir() and f.name.partition("@")[0] == place.name
        )


def _tree(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _commit(folder: Path) -> str:
    seen = hashlib.sha1()
    for path in _tree(folder):
        seen.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return seen.hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.server_hub.connections.add(self.connection)

    def finish(self) -> None:
        self.server_hub.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has heard enough
            super().handle()

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        hub, parts = self.server_hub, urlsplit(self.path)
        path = unquote(parts.path)
        headers = {k.lower(): v for k, v in self.headers.items()}
        if not path.startswith("/api/agent"):  # what huggingface_hub asks for besides
            hub.requests.append(Request(self.command, path, headers))
        self.fault = hub.fault(path) if self.command != "HEAD" else None
        if self.fault is not None and self.fault.hang:
            hub.closing.wait()
            self.close_connection = True
        elif self.fault is not None and self.fault.status is not None:
            self._error(self.fault.status, self.fault.code, "as asked for")
        elif found := re.fullmatch(r"/api/(models|datasets)/(.+)", path):
            self._api(found[1], found[2])
        elif found := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            self._cdn(found[1])
        elif path.startswith("/files/"):
            self._plain(hub.root / path[1:])
        elif found := re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve("datasets" if found[1] else "models", found[2], found[3], found[4])
        else:
            self._error(404, None, "no such page")

    def _allowed(self, kind: str, name: str, *, content: bool) -> bool:
        """Whether the repository is there and may be read; else the answer is given."""
        hub = self.server_hub
        token = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if not hub.exists(kind, name) or (name in hub.private and not token):
            self._error(401, "RepoNotFound", "Repository not found")
            return False
        if content and name in hub.gated and not token:
            self._error(403, "GatedRepo", f"Access to model {name} is restricted")
            return False
        return True

    def _commit_of(self, kind: str, name: str, revision: str) -> str | None:
        commit = self.server_hub.commit(name, revision, kind)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api(self, kind: str, rest: str) -> None:
        found = re.fullmatch(r"(.+?)(?:/(revision|tree|paths-info)/(.+))?", rest)
        assert found is not None
        name, what, where = found[1], found[2] or "revision", found[3] or "main"
        if not self._allowed(kind, name, content=what != "revision"):
            return
        revision, _, inside = where.partition("/") if what != "revision" else (where, "", "")
        commit = self._commit_of(kind, name, revision)
        if commit is None:
            return
        folder = self.server_hub.folder(kind, name, commit)
        names = [p.relative_to(folder).as_posix() for p in _tree(folder)]
        if what == "revision":
            siblings = [{"rfilename": one} for one in names]
            facts = {"_id": "0", "id": name, "sha": commit, "private": False, "gated": False}
            if kind == "models":
                facts["modelId"] = name
            self._json({**facts, "tags": [], "downloads": 0, "siblings": siblings})
            return
        entries = [self._entry(folder, one) for one in names]
        folders = {d.as_posix() for one in names for d in Path(one).parents if d != Path()}
        entries += [{"type": "directory", "path": d, "oid": "0" * 40, "size": 0} for d in folders]
        if what == "paths-info":
            wanted = parse_qs(self.posted.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(self.posted)["paths"]
            self._json([e for e in entries if e["path"] in wanted])
            return
        if inside and inside not in folders:
            self._error(404, "EntryNotFound", f"{inside} does not exist")
            return
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{inside}/" if inside else ""
        below = [e for e in entries if e["path"].startswith(prefix)]
        self._json([e for e in below if deep or "/" not in e["path"].removeprefix(prefix)])

    def _entry(self, folder: Path, name: str) -> dict[str, object]:
        content = (folder / name).read_bytes()
        entry = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
        if name.endswith(LFS):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        if not self._allowed(kind, name, content=True):
            return
        commit = self._commit_of(kind, name, revision)
        if commit is None:
            return
        path = self.server_hub.folder(kind, name, commit) / file
        if not path.is_file():
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = path.read_bytes()
        known = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not file.endswith(LFS):
            self._content(content, {**known, "ETag": f'"{_git_hash(content)}"'})
            return
        sha = hashlib.sha256(content).hexdigest()
        known |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        place = f"http://localhost:{self.server_hub.port}/cdn/{sha}/{path.name}"
        self._send(302, {**known, "Location": place}, b"")

    def _cdn(self, sha: str) -> None:
        for path in _tree(self.server_hub.root):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha:
                self._content(content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
                return
        self._error(404, None, "no such content")

    def _plain(self, path: Path) -> None:
        if not path.is_file():
            self._error(404, None, "no such file")
            return
        content = path.read_bytes()
        md5 = hashlib.md5(content)
        html = {"Content-Type": "text/html; charset=utf-8"} if content[:1] == b"<" else {}
        coded = base64.b64encode(md5.digest()).decode()
        known = {"ETag": f'"{md5.hexdigest()}"', "x-goog-hash": f"crc32c=AAAAAA==, md5={coded}"}
        self._content(content, {**known, **html})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        etag = headers.get("ETag")
        headers = {"Content-Type": "application/octet-stream", **headers}
        if etag is not None and self.headers.get("If-None-Match") == etag:
            self._send(304, {"ETag": etag}, b"")
            return
        if self.fault is not None and self.fault.body is not None:
            content = self.fault.body
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, etag)
        if asked is None or not self.server_hub.ranges or not same:
            self._send(200, headers, content)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, headers, content[start : end + 1])

    def _drip(self, content: bytes) -> None:
        """Send some bytes very slowly, and then end the connection."""
        self.flush_headers()
        for byte in content:
            if self.server_hub.closing.wait(0.05):
                break
            self.wfile.write(bytes([byte]))
        self.close_connection = True

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        if self.fault is not None and self.fault.body is not None:
            content = self.fault.body
        self._send(200, {"Content-Type": "application/json"}, content)

    def _error(
        self, status: int, code: str | None, words: str, headers: dict[str, str] | None = None
    ) -> None:
        known = {"X-Error-Message": words, **(headers or {})}
        if code is not None:
            known["X-Error-Code"] = code
        self._send(status, known, json.dumps({"error": words}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        headers = {"Content-Length": str(len(body)), **headers}
        if self.fault is not None:
            headers |= self.fault.headers  # type: ignore[arg-type]
        for ending, more in self.server_hub.headers.items():
            if unquote(urlsplit(self.path).path).endswith(ending):
                headers |= more
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        drip = self.fault.drip if self.fault is not None else None
        if drip == "headers":
            self._drip(b"X: " + b"x" * 10_000)
        self.end_headers()
        if self.command == "HEAD":
            return
        if drip == "body":
            self._drip(body)
        if self.fault is not None and self.fault.cut is not None:
            body = body[: self.fault.cut]
            self.close_connection = True
        self.wfile.write(body)

"""Weights files at `https:` and `gs:` addresses: fetched once, kept in the user's cache.

A public Google Storage bucket needs no account: `gs://BUCKET/OBJECT` is read over HTTPS.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from vitcli.errors import VitcliError
from vitcli.files import write_text
from vitcli.hub.http import (
    AGAIN,
    BUSY,
    Part,
    Unreachable,
    cache_folder,
    cannot_write,
    locked,
    persist,
    size_text,
)
from vitcli.progress import Quiet, Watcher

SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 30.0  # without a byte, after which the connection counts as broken
STORAGE = "https://storage.googleapis.com"


def fetch_address(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """A weights file at an address -> (its copy in the cache, notes for the load report).

    A copy is asked for again with its ETag, so it is downloaded again only where it changed. The
    notes name the ETag, and say when the copy could not be compared.

    Raises:
        VitcliError: no such file, no network and no copy, a web page instead, a full disk.
    """
    url = web_address(source)
    name = _file_name(url, source)
    folder = cache_folder() / "files" / hashlib.sha256(url.encode()).hexdigest()[:20]
    transfer = Transfer(url, folder / name, watch or Quiet())
    try:
        with locked(folder / ".lock"):
            try:
                transfer.run()
            except Unreachable as error:
                if not transfer.target.is_file():
                    raise VitcliError(
                        f"cannot fetch `{transfer.shown}`: {error}",
                        hint=AGAIN
                        if transfer.part.size
                        else "look at the address and the network (HTTPS_PROXY is honoured), or "
                        "give a file that is here already",
                    ) from error
                reason = f"{error}; the cached copy is used"
                return transfer.target, [f"`{transfer.shown}`: {reason}", *transfer.version()]
    except OSError as error:
        raise cannot_write(name, folder, error) from error
    return transfer.target, transfer.version()


def web_address(source: str) -> str:
    """`gs://BUCKET/OBJECT` -> where it is found on the web; others stay.

    `STORAGE_EMULATOR_HOST` takes the storage's place, as in Google's own clients.

    Raises:
        VitcliError: no bucket, no object or no host in it.
    """
    parts = urlsplit(source)
    if parts.scheme != "gs":
        if not source.startswith(f"{parts.scheme}://") or not parts.hostname:
            raise VitcliError(f"`{source}` is no address", hint="`https://HOST/PATH/FILE.npz`")
        return source
    bucket, object_name = parts.netloc, source.partition("gs://")[2].partition("/")[2]
    if not bucket or not object_name or object_name.endswith("/"):
        raise VitcliError(
            f"`{source}` names no file in a bucket", hint="`gs://BUCKET/FOLDER/FILE.npz`"
        )
    storage = os.environ.get("STORAGE_EMULATOR_HOST") or STORAGE
    if "://" not in storage:
        storage = f"http://{storage}"
    return f"{storage.rstrip('/')}/{bucket}/{quote(object_name)}"


def _file_name(url: str, source: str) -> str:
    """The last part of the address; raises where it is not the name of a weights file."""
    parts = urlsplit(url)
    name = Path(unquote(parts.path)).name
    if not name.lower().endswith(SUFFIXES):
        hub = parts.hostname in ("huggingface.co", "hf.co")
        raise VitcliError(
            f"`{_shown(source)}` does not end like a weights file: {', '.join(SUFFIXES)}",
            hint="a repository on the Hub is written `hf:ORG/NAME`"
            if hub
            else "give the address of the file itself",
        )
    return re.sub(r"[^\w.+=,-]", "_", name)[-120:]


def _shown(address: str) -> str:
    """The address without what may be secret: a signature in the query, a password."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Transfer:
    """One address, its place in the cache, and what of it has arrived."""

    def __init__(self, url: str, target: Path, watch: Watcher) -> None:
        self.url, self.target = url, target
        self.shown = _shown(url)
        self.part = Part(target.with_name(target.name + ".part"), target.name, watch)
        self.facts = _read(self._beside(target)) if target.is_file() else {}
        self.head: dict[str, Any] = {}  # of the file that is arriving

    def version(self) -> list[str]:
        """A note that tells which state of the file this is, where the server tells it."""
        facts = self.head or self.facts
        told = facts.get("etag") or facts.get("modified")
        return [f"`{self.shown}`: version {told}"] if told else []

    def run(self) -> None:
        """Bring the copy up to date.

        Raises:
            Unreachable: no answer.
            VitcliError: an answer that is no weights file.
        """
        import aiohttp
        from fsspec.asyn import sync
        from fsspec.implementations.http import HTTPFileSystem

        seconds = {"sock_connect": CONNECT_SECONDS, "sock_read": SILENT_SECONDS}
        system = HTTPFileSystem(
            skip_instance_cache=True,
            client_kwargs={
                "trust_env": True,
                "timeout": aiohttp.ClientTimeout(total=None, **seconds),
            },
        )
        try:
            persist(self.part, lambda: sync(system.loop, self._attempt, system))
        finally:
            session = sync(system.loop, system.set_session)
            sync(system.loop, session.close)
        if self.head:
            self._finish()

    async def _attempt(self, system: Any) -> str | None:
        """One request; the reason why it has to be repeated, or None when all is here.

        Raises:
            Unreachable: nobody answers, so that there is no use in repeating it at once.
            VitcliError: what is there is not wanted.
        """
        import aiohttp

        session = await system.set_session()
        host = urlsplit(self.url).hostname
        try:
            async with session.get(system.encode_url(self.url), headers=self._asked()) as answer:
                if answer.status in BUSY:
                    return f"`{host}` answers {answer.status} {answer.reason}"
                if answer.status == 416:
                    return self._nothing_left(answer.headers)
                if (begun := self._begin(answer.status, answer.headers)) is None:
                    return None
                with self.part.writing(*begun) as write:
                    # In the event loop: aiohttp drops what it holds when the connection breaks.
                    while chunk := await answer.content.readany():
                        write(chunk)
        except aiohttp.ClientConnectorCertificateError as error:
            raise VitcliError(
                f"the certificate of `{host}` is not trusted: {error.certificate_error}",
                hint="SSL_CERT_FILE names the certificates of a company's proxy",
            ) from error
        except aiohttp.InvalidURL as error:
            raise VitcliError(
                f"`{self.shown}` is no address", hint="`https://HOST/FILE`"
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"`{host}` cannot be reached ({_words(error)})") from error
        except TimeoutError as error:
            if self.part.size == 0:
                raise Unreachable(f"`{host}` does not answer in time") from error
            return f"`{host}` went silent after {size_text(self.part.size)}"
        except aiohttp.ClientError as error:
            return f"the connection to `{host}` broke ({_words(error)})"
        return None

    def _nothing_left(self, headers: Mapping[str, str]) -> str | None:
        """For an answer that there is nothing behind our part: all of it is here, or too much."""
        begun = _read(self._beside(self.part.path))
        if headers.get("Content-Range") == f"bytes */{self.part.size}" and begun:
            self.head = begun
            return None
        self.part.drop()
        return "the file has changed"

    def _asked(self) -> dict[str, str]:
        """The request's headers: only what is not here yet, and only if it is not here."""
        asked = {"Accept-Encoding": "identity"}
        begun = _read(self._beside(self.part.path)) if self.part.size else {}
        validator = begun.get("etag") or begun.get("modified")
        if validator and not validator.startswith("W/"):
            # Without If-Range the rest of a changed file would be sewn to the start of the old.
            asked |= {"Range": f"bytes={self.part.size}-", "If-Range": validator}
        elif self.facts.get("etag"):
            asked["If-None-Match"] = self.facts["etag"]
        elif self.facts.get("modified"):
            asked["If-Modified-Since"] = self.facts["modified"]
        return asked

    def _begin(self, status: int, headers: Mapping[str, str]) -> tuple[int, int | None] | None:
        """(First byte that comes, size of the whole); None where the copy in the cache is good."""
        if status == 304:
            return None
        self._refuse(status, headers)
        head: dict[str, Any] = {
            "address": self.shown,
            "etag": headers.get("ETag"),
            "modified": headers.get("Last-Modified"),
            "size": _number(headers.get("Content-Length")),
            "md5": _md5(headers),
        }
        start = 0
        if status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            before = _read(self._beside(self.part.path)).get("etag")
            if found is None or int(found[1]) != self.part.size or head["etag"] != before:
                self.part.drop()
                raise VitcliError(
                    f"`{self.shown}`: the server sends another part than it was asked for",
                    hint="try again: the download starts anew",
                )
            start, head["size"] = int(found[1]), int(found[2])
        elif self.facts and all(self.facts.get(k) == head[k] for k in ("etag", "modified", "size")):
            return None  # a server that does not know conditions
        self.head = head
        write_text(self._beside(self.part.path), json.dumps(head))
        return start, head["size"]

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        if status in (404, 410):
            raise VitcliError(f"there is no file at `{self.shown}`", hint="look at the address")
        if status in (401, 403):
            raise VitcliError(
                f"`{self.shown}` may not be read without an account (status {status})",
                hint="download it with a program that is logged in, and give the file",
            )
        if status not in (200, 206):
            raise VitcliError(
                f"`{self.shown}`: the server answers with status {status}",
                hint="look at the address",
            )
        if headers.get("Content-Type", "").startswith("text/html"):
            raise VitcliError(
                f"`{self.shown}` is a web page, not a weights file",
                hint="give the address of the file itself (`raw` or `resolve`, not `blob`)",
            )

    def _finish(self) -> None:
        digest = ("md5", self.head["md5"]) if self.head["md5"] else None
        # Never facts beside bytes that are not theirs, wherever this is cut off.
        self._beside(self.target).unlink(missing_ok=True)
        self.part.finish(self.target, self.head["size"], digest)
        write_text(self._beside(self.target), json.dumps(self.head, indent=2) + "\n")
        self._beside(self.part.path).unlink(missing_ok=True)

    @staticmethod
    def _beside(path: Path) -> Path:
        return path.with_name(path.name + ".json")


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
    return {}


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _md5(headers: Mapping[str, str]) -> str | None:
    """The MD5 that Google Storage sends along, in hexadecimal."""
    values = headers.getall("x-goog-hash", []) if hasattr(headers, "getall") else []
    for value in ",".join(values).split(","):
        kind, _, coded = value.strip().partition("=")
        if kind == "md5":
            with suppress(ValueError):
                return base64.b64decode(coded, validate=True).hex()
    return None


def _words(error: Exception) -> str:
    """Why, on one line: `Connection refused`, `Name or service not known`."""
    cause: OSError | None = getattr(error, "os_error", None)
    if cause is not None and cause.errno:
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    return " ".join(str(error).split()) or type(error).__name__

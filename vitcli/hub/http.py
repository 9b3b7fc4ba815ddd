"""Weights files at `https://`, `http://` and `gs://` URLs, kept in the user's cache.

A public Google Cloud Storage bucket needs no account: `gs://BUCKET/OBJECT` is read over HTTPS.
"""

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from vitcli.errors import VitcliError
from vitcli.files import read_json, replacing, write_text
from vitcli.hub.client import DownloadBar, cannot_write, client, timeout_seconds
from vitcli.hub.failures import (
    BUSY,
    ConnectionFailed,
    connection_failure,
    fetch_elsewhere,
    retrying,
)
from vitcli.progress import Quiet, Watcher

SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
STORAGE = "https://storage.googleapis.com"
URL_HINT = "write `https://HOST/PATH/FILE.npz`"
READ_BYTES = 1 << 16


def cache_folder() -> Path:
    """The folder of vitcli's cache: `VITCLI_CACHE`, else the platform's folder for caches."""
    from platformdirs import user_cache_path

    if given := os.environ.get("VITCLI_CACHE"):
        return Path(given).expanduser()
    return user_cache_path("vitcli", appauthor=False)


def fetch_url(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """A weights file at a URL -> (its copy in the cache, notes for the load report).

    The server is asked whether the copy is up to date. The notes name the version (ETag), and say
    if the copy is used unchecked because the server cannot be reached.

    Raises:
        VitcliError: no such file, no connection and no copy, a web page instead of a file, a
            damaged file, or a full disk.
    """
    from filelock import FileLock

    url, notes, watch = web_address(source), [], watch or Quiet()
    folder = cache_folder() / "files" / hashlib.sha256(url.encode()).hexdigest()[:20]
    target = folder / _file_name(url, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", mode=0o664):
            cached = _cached_facts(target, watch)
            try:
                facts = retrying(lambda: _download(url, target, cached, watch))
            except ConnectionFailed as error:
                if not cached:
                    message = f"cannot download `{_shown(url)}`: {error.message}"
                    failure = ConnectionFailed(message, error.hint, temporary=error.temporary)
                    raise fetch_elsewhere(failure, source, folder) from error
                notes.append(f"`{_shown(url)}`: {error.message}; the cached copy is used")
                facts = cached
    except OSError as error:
        raise cannot_write(target.name, folder, error) from error
    if version := facts.get("etag") or facts.get("modified"):
        notes.append(f"`{_shown(url)}`: version {version}")
    return target, notes


class UrlReader:
    """The body of an answer as a file that is read from front to back."""

    def __init__(self, response: Any) -> None:
        self.chunks = response.iter_raw()
        self.ready = bytearray()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        while len(self.ready) < size and (chunk := next(self.chunks, None)) is not None:
            self.ready += chunk
        found = bytes(self.ready[:size])
        del self.ready[:size]
        return found


@contextmanager
def open_url(url: str) -> Iterator[UrlReader]:
    """A file at a URL, without a copy on the disk.

    Raises:
        VitcliError: no such file, or no connection.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    address = web_address(url)
    headers = {"Accept-Encoding": "identity"}
    try:
        stream = client().stream("GET", address, headers=headers, timeout=timeout_seconds())
        with stream as response:
            _refuse(response, address)
            yield UrlReader(response)
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise connection_failure(error, urlsplit(address).hostname or "") from error


def fetch_bytes(url: str, max_bytes: int, max_seconds: float) -> bytes:
    """A small file at a URL, without a copy on the disk.

    Raises:
        VitcliError: no such file, no connection, or more bytes or seconds than allowed.
    """
    end, content = time.monotonic() + max_seconds, bytearray()
    with open_url(url) as reader:
        while part := reader.read(READ_BYTES):
            content += part
            if len(content) > max_bytes:
                raise VitcliError(f"it has more than {max_bytes >> 20} MiB", URL_HINT)
            if time.monotonic() > end:
                raise VitcliError(f"it did not arrive within {max_seconds:.0f} s", "try again")
    return bytes(content)


def web_address(source: str) -> str:
    """A valid web URL; `gs://BUCKET/OBJECT` becomes the object's URL.

    `STORAGE_EMULATOR_HOST` replaces Google's server, as in Google's own clients.

    Raises:
        VitcliError: the URL is malformed, or it has no host, bucket or object.
    """
    url = source
    if source.startswith("gs:"):
        bucket, _, object_name = source.removeprefix("gs:").removeprefix("//").partition("/")
        if not source.startswith("gs://") or not object_name or object_name.endswith("/"):
            raise VitcliError(
                f"`{source}` names no file in a bucket", "write `gs://BUCKET/FOLDER/FILE.npz`"
            )
        storage = os.environ.get("STORAGE_EMULATOR_HOST") or STORAGE
        storage = storage if "://" in storage else f"http://{storage}"
        url = f"{storage.rstrip('/')}/{quote(bucket)}/{quote(object_name)}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise VitcliError(f"`{_shown(url)}` is not a valid URL: {error}", URL_HINT) from error
    if not valid:
        raise VitcliError(f"`{_shown(url)}` is not a valid URL", URL_HINT)
    return url


def _file_name(url: str, source: str) -> str:
    """The last part of the URL as a file name; raises if it is not a weights file's name."""
    parts = urlsplit(url)
    name = Path(unquote(parts.path)).name
    if not name.lower().endswith(SUFFIXES):
        raise VitcliError(
            f"`{_shown(source)}` does not end like a weights file: {', '.join(SUFFIXES)}",
            "write `hf:ORG/NAME` for a repository on the Hub"
            if parts.hostname in ("huggingface.co", "hf.co")
            else "give the URL of the file itself",
        )
    return re.sub(r"[^\w.+=,-]", "_", name)[-120:]


def _shown(url: str) -> str:
    """The URL without a signature in the query and without a password."""
    scheme, separator, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _record(target: Path) -> Path:
    """The file with the facts about a copy: the server's headers and the content's SHA-256."""
    return target.with_name(f"{target.name}.json")


def _cached_facts(target: Path, watch: Watcher) -> dict[str, Any]:
    """The facts about a copy; {} if there is none, or its content is not the recorded one."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        facts = dict(read_json(_record(target)))
        kind = "sha256" if "sha256" in facts else "md5"
        with target.open("rb") as file:
            if facts[kind] in (None, hashlib.file_digest(file, kind).hexdigest()):
                return facts
        watch.warn(f"`{target}` is damaged: downloading it again")
    return {}


def _download(url: str, target: Path, cached: dict[str, Any], watch: Watcher) -> dict[str, Any]:
    """Send one request, write the file, and return its facts; `cached` if it has not changed."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    headers = {"Accept-Encoding": "identity"}
    for name, key in (("If-None-Match", "etag"), ("If-Modified-Since", "modified")):
        if isinstance(cached.get(key), str):
            headers[name] = cached[key]
    try:
        stream = client().stream("GET", url, headers=headers, timeout=timeout_seconds())
        with stream as response:
            if response.status_code == 304 and cached:
                return cached
            _refuse(response, url)
            facts = _facts(response.headers, url)
            if cached and all(cached.get(key) == facts[key] for key in facts):
                return cached  # the server ignores conditions
            with replacing(target) as temporary:
                facts["sha256"] = _receive(response, temporary, target.name, facts, watch)
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise VitcliError(f"`{_shown(url)}` is not a valid URL: {error}", URL_HINT) from error
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise connection_failure(error, urlsplit(url).hostname or "") from error
    write_text(_record(target), json.dumps(facts, indent=2) + "\n")
    return facts


def _receive(response: Any, path: Path, name: str, facts: dict[str, Any], watch: Watcher) -> str:
    """Write the body to `path` and return its SHA-256; raises if its size or MD5 is wrong."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with DownloadBar(name, path.parent, watch, facts["size"]) as bar, path.open("wb") as file:
        for chunk in response.iter_raw():
            bar.update(len(chunk))
            file.write(chunk)
            sha256.update(chunk)
            md5.update(chunk)
    if facts["md5"] not in (None, md5.hexdigest()):
        raise VitcliError(
            f"`{name}` is damaged: its MD5 is {md5.hexdigest()}, not {facts['md5']}",
            "try again; if this repeats, the server or a proxy changes the file",
        )
    return sha256.hexdigest()


def _refuse(response: Any, url: str) -> None:
    """Raise a `VitcliError` unless the answer is a file."""
    status, shown = response.status_code, _shown(url)
    if status in BUSY:
        raise ConnectionFailed(
            f"`{response.request.url.host}` answers with status {status}",
            "try again later",
            temporary=True,
        )
    if status in (404, 410):
        raise VitcliError(f"there is no file at `{shown}`", "check the URL")
    if status in (401, 403):
        raise VitcliError(
            f"`{shown}` needs an account (status {status})",
            "download the file with another program, and give its path",
        )
    if status != 200:
        raise VitcliError(f"`{shown}`: the server answers with status {status}", "check the URL")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise VitcliError(
            f"`{shown}` is a web page, not a file",
            "give the URL of the file itself (`raw` or `resolve`, not `blob`)",
        )


def _facts(headers: Any, url: str) -> dict[str, Any]:
    """What the server says about a file."""
    length = headers.get("Content-Length", "")
    return {
        "address": _shown(url),
        "etag": headers.get("ETag"),
        "modified": headers.get("Last-Modified"),
        "size": int(length) if re.fullmatch(r"\d{1,18}", length) else None,
        "md5": _google_md5(headers.get("x-goog-hash", "")),
    }


def _google_md5(value: str) -> str | None:
    """The hexadecimal MD5 in Google's header `x-goog-hash: crc32c=…, md5=…`."""
    found = re.search(r"md5=([\w+/=]+)", value)
    with suppress(ValueError):
        return base64.b64decode(found[1], validate=True).hex() if found else None
    return None

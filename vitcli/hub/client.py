"""The HTTP client of all downloads, and the checks of what a server sends.

Every request goes through the client of `huggingface_hub`, which honours proxies, certificates,
`HF_TOKEN` and `HF_HUB_OFFLINE`. That client trusts its servers: an ETag becomes a file name in the
cache, and a server that sends one byte now and then keeps the program waiting. `install_checks`
adds the missing checks.
"""

import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from vitcli.errors import VitcliError, printable
from vitcli.progress import Bar, Watcher

T = TypeVar("T")

MEGA = 1_000_000
BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which another try makes sense
PAUSES = (0.0, 1.0, 3.0)  # seconds before the second, third and fourth try
MIN_BYTES_PER_SECOND = 1000  # a slower server counts as broken
MAX_ANSWER_BYTES = 100 * MEGA  # of an answer that is not a file, such as the list of a repository
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # SHA-1 or SHA-256
ETAG = re.compile(r"\w[\w.+=:-]{0,199}")
DISK_HINT = (
    "free some space, or move the cache: HF_HOME for the Hub, VITCLI_CACHE for other downloads"
)
TRUST_HINT = "check HF_ENDPOINT and the network: the server is broken, or it is not the Hub"
_INSTALLING = threading.Lock()


class ConnectionFailed(VitcliError):
    """A server cannot be reached or does not answer properly; a cached copy may replace it.

    Attributes:
        temporary: True if another try may succeed.
    """

    def __init__(self, message: str, hint: str | None = None, *, temporary: bool = False) -> None:
        super().__init__(message, hint)
        self.temporary = temporary


def client() -> Any:
    """The shared `httpx2.Client` of `huggingface_hub`, with the checks of this module."""
    from huggingface_hub import get_session

    install_checks()
    return get_session()


def install_checks() -> None:
    """Check all answers that `huggingface_hub` gets in this process from now on."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _INSTALLING:
        # The factory of a program that uses vitcli as a library is kept. `huggingface_hub` has no
        # public name for the current factory.
        factory = _http._GLOBAL_CLIENT_FACTORY
        if getattr(factory, "has_checks", False):
            return

        def checked_factory() -> Any:
            made = factory()
            hooks = made.event_hooks
            made.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _check_response]}
            send = made.send
            made.send = partial(_send, send)  # type: ignore[method-assign]
            return made

        checked_factory.has_checks = True  # type: ignore[attr-defined]
        set_client_factory(checked_factory)


def timeout_seconds() -> float:
    """Seconds without a byte after which a connection counts as broken."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def patience_seconds() -> float:
    """Seconds for the headers of an answer, and for the measurement of a download's speed."""
    return 6 * timeout_seconds()


def retrying(attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which is repeated after temporary failures of the connection."""
    for pause in PAUSES:
        try:
            return attempt()
        except ConnectionFailed as error:
            if not error.temporary:
                raise
        time.sleep(pause)
    return attempt()


def _send(send: Callable[..., Any], request: Any, *, stream: bool = False, **options: Any) -> Any:
    """`httpx2.Client.send` with limits: its own timeouts start anew with every byte."""
    limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout_seconds())
    given = request.extensions.get("timeout", {})
    limits |= {key: seconds for key, seconds in given.items() if seconds is not None}
    request.extensions = {**request.extensions, "timeout": limits, "is_download": stream}
    if not stream:
        request.headers["Accept-Encoding"] = "identity"
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(send(request, stream=True, **options))
        except BaseException as error:
            future.set_exception(error)

    # A thread, because nothing else ends a read of headers that come byte by byte. It is a daemon,
    # so that it does not keep the process alive.
    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    if not wait([future], patience_seconds()).done:
        raise ConnectionFailed(
            f"`{request.url.host}` does not send its answer within {patience_seconds():.0f} s",
            "try again later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
        )
    response = future.result()
    if not stream:
        with closing_on_error(response):
            response.read()
    return response


@contextmanager
def closing_on_error(response: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        response.close()
        raise


def _check_response(response: Any) -> None:
    """Refuse headers that would become paths, and limit the time and the size of the body.

    Raises:
        VitcliError: a header is not what a Hub sends.
    """
    request, headers = response.request, response.headers
    host = request.url.host
    # `huggingface_hub` names files in the cache after the ETag in the answer to a HEAD request.
    etags = ("X-Linked-Etag", "ETag") if request.method == "HEAD" else ()
    for name, pattern in (("X-Repo-Commit", COMMIT), *((name, ETAG) for name in etags)):
        value = headers.get(name)
        if value is not None and not pattern.fullmatch(value.removeprefix("W/").strip('"')):
            raise VitcliError(
                f"`{host}` sends an invalid {name}: `{printable(value[:100])}`", TRUST_HINT
            )
    if "Location" in headers and not _is_web_address(headers["Location"]):
        shown = printable(headers["Location"][:100])
        raise VitcliError(f"`{host}` redirects to `{shown}`, which is not HTTP", TRUST_HINT)
    # A server may ask for a pause, but not for a pause of days.
    seconds = re.findall(r"\d+", f"{headers.get('Retry-After')} {headers.get('ratelimit')}")
    if any(float(text) > patience_seconds() for text in seconds):
        for name in ("Retry-After", "ratelimit"):
            headers.pop(name, None)
    is_download = response.status_code == 200 and request.extensions.get("is_download")
    limit: float = MAX_ANSWER_BYTES
    if is_download or response.status_code == 206:
        limit = math.inf
    elif headers.get("Content-Encoding", "identity") != "identity":
        limit /= 100  # compressed, although the request does not allow it
    response.stream = _limited(response.stream, host, limit)


def _is_web_address(location: str) -> bool:
    try:
        parts = urlsplit(location)
        return parts.scheme in ("", "http", "https") and (parts.port or 1) > 0
    except ValueError:
        return False


def _limited(stream: Any, host: str, limit: float) -> Any:
    """The body of an answer; reading it fails if the server is too slow, or sends too much.

    Only the time of waiting for the server counts, not the time between two reads.

    Args:
        limit: the most bytes; infinity for a file, whose transfer may take any time.
    """
    import httpx2

    class LimitedStream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            chunks = iter(stream)
            waited = total = received = 0.0
            while True:
                began = time.monotonic()
                chunk = next(chunks, None)
                waited += time.monotonic() - began
                if chunk is None:
                    return
                total += len(chunk)
                received += len(chunk)
                if total > limit:
                    raise VitcliError(f"the answer of `{host}` is too long", TRUST_HINT)
                if waited > patience_seconds():
                    if limit < math.inf or received < MIN_BYTES_PER_SECOND * waited:
                        raise ConnectionFailed(
                            f"`{host}` is too slow: {received:.0f} bytes in {waited:.0f} s",
                            "try again later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
                        )
                    waited = received = 0.0
                yield chunk

        def close(self) -> None:
            stream.close()

    return LimitedStream()


class DownloadBar:
    """The progress of one download in megabytes; `huggingface_hub` uses it as a `tqdm`.

    Raises:
        VitcliError: the disk has no room for the file, or the server sends more than its size.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        watch: Watcher,
        *,
        total: int | None = None,
        initial: int = 0,
        **_: Any,
    ) -> None:
        if total is not None:
            check_space(name, folder, total - initial)
        size = f" ({size_text(total)})" if total is not None else ""
        watch.note(f"downloading {name}{size} …")
        self.name, self.total, self.n, self._shown = name, total, initial, initial // MEGA
        megabytes = -(-total // MEGA) if total is not None else None
        self._bar: Bar = watch.progress(f"{name}, MB", megabytes, self._shown)
        self._bar.__enter__()

    def update(self, n: float | None = 1) -> None:
        """Advance by `n` bytes; a download that starts again goes back."""
        self.n += int(n or 0)
        if self.total is not None and self.n > self.total:
            raise VitcliError(
                f"the server sends more than the {self.total:,} bytes of `{self.name}`", TRUST_HINT
            )
        now = -(-self.n // MEGA) if self.n == self.total else self.n // MEGA
        if now > self._shown:
            self._bar.advance(now - self._shown)
            self._shown = now

    def update_transfer(self, n: float | None = 1) -> None:
        """Ignore the bytes on the network, which Xet counts besides those on the disk."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Ignore the speed: the bar shows the remaining time."""

    set_transfer_postfix_str = set_postfix_str

    def close(self) -> None:
        self._bar.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connection_failure(error: Exception, host: str) -> ConnectionFailed:
    """The error for an exception of `httpx2`, or for an answer with a status in `BUSY`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    proxy = "check the network (HTTPS_PROXY is honoured), or give a file on this machine"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionFailed("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download")
    if isinstance(error, HfHubHTTPError):
        status = f"`{host}` answers with status {error.response.status_code}"
        return ConnectionFailed(status, "try again later", temporary=True)
    reason = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split())) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return ConnectionFailed(
            f"the certificate of `{host}` is not trusted ({reason})",
            "set SSL_CERT_FILE to the certificates of your company's proxy",
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return ConnectionFailed(f"`{host}` cannot be reached ({reason})", proxy)
    if isinstance(error, httpx2.TimeoutException):
        return ConnectionFailed(f"`{host}` does not answer in time", proxy)
    return ConnectionFailed(f"the connection to `{host}` broke ({reason})", proxy, temporary=True)


def check_space(name: str, folder: Path, needed: int) -> None:
    """Raise a `VitcliError` if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise VitcliError(
            f"`{name}` needs {size_text(needed)} in `{folder}`, where {size_text(free)} are free",
            DISK_HINT,
        )


def size_text(size: int) -> str:
    """346_293_852 -> 346 MB."""
    return f"{size / MEGA:.0f} MB" if size >= MEGA else f"{max(1, round(size / 1000))} kB"


def cannot_write(name: str, folder: Path, error: OSError) -> VitcliError:
    """The error for a disk that is full or read-only."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return VitcliError(f"cannot write `{name}` to `{folder}`: {reason}", DISK_HINT)

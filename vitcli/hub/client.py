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
from vitcli.hub.failures import ConnectionFailed
from vitcli.progress import Watcher

T = TypeVar("T")

MEGA = 1_000_000
MAX_PAUSE = 600.0  # seconds that a busy server may ask for
MIN_BYTES_PER_SECOND = 1000  # a slower server counts as broken
MAX_ANSWER_BYTES = 100 * MEGA  # of an answer that is not a file, such as the list of a repository
COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"\w[\w.+=:-]{0,199}")
DISK_HINT = (
    "free some space, or move the cache: HF_HOME for the Hub, VITCLI_CACHE for other downloads"
)
TRUST_HINT = "check HF_ENDPOINT and the network: the server is broken, or it is not the Hub"
_INSTALLING = threading.Lock()


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
        future.add_done_callback(lambda late: late.exception() or late.result().close())
        raise ConnectionFailed(
            f"`{request.url.host}` does not send its answer within {patience_seconds():.0f} s",
            "try again later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
        )
    response = future.result()
    if not stream:
        try:
            response.read()
        finally:
            response.close()
    return response


def _check_response(response: Any) -> None:
    """Refuse headers that would become paths, and limit the time and the size of the body.

    Raises:
        VitcliError: a header is not what a Hub sends.
    """
    request, headers = response.request, response.headers
    host, commit = request.url.host, headers.get("X-Repo-Commit")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise VitcliError(
            f"`{host}` sends an invalid X-Repo-Commit: `{printable(commit[:100])}`", TRUST_HINT
        )
    for name in ("X-Linked-Etag", "ETag") if request.method == "HEAD" else ():
        # `huggingface_hub` strips an ETag in this way, and names a file in the cache after it. It
        # refuses a file without an ETag.
        if not ETAG.fullmatch(headers.get(name, "").lstrip("W/").strip('"')):
            headers.pop(name, None)
    if "Location" in headers and not _is_web_address(headers["Location"]):
        shown = printable(headers["Location"][:100])
        raise VitcliError(f"`{host}` redirects to `{shown}`, which is not HTTP", TRUST_HINT)
    # The Hub counts requests in windows of five minutes. A pause of days makes no sense.
    seconds = re.findall(r"\d+", f"{headers.get('Retry-After')} {headers.get('ratelimit')}")
    if response.status_code >= 400 and any(float(text) > MAX_PAUSE for text in seconds):
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

    def __init__(self, name: str, folder: Path, watch: Watcher, total: int | None) -> None:
        self.name, self.total, self.received, self.shown = name, total, 0, 0
        size, megabytes = "", None
        if total is not None:
            size, megabytes = f" ({size_text(total)})", -(-total // MEGA)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise VitcliError(
                    f"`{name}` needs {size_text(total)} in `{folder}`, where {size_text(free)} "
                    "are free",
                    DISK_HINT,
                )
        watch.note(f"downloading {name}{size} …")
        self.bar = watch.progress(f"{name}, MB", megabytes)
        self.bar.__enter__()

    def update(self, n: float | None = 1) -> None:
        """Advance by `n` bytes; a negative number says that the download starts again."""
        self.received += int(n or 0)
        if self.total is not None and self.received > self.total:
            raise VitcliError(
                f"the server sends more than the {self.total:,} bytes of `{self.name}`", TRUST_HINT
            )
        whole = self.received == self.total
        megabytes = -(-self.received // MEGA) if whole else self.received // MEGA
        self.bar.advance(max(0, megabytes - self.shown))
        self.shown = max(self.shown, megabytes)

    def update_transfer(self, n: float | None = 1) -> None:
        """Ignore the bytes on the network, which Xet counts besides those on the disk."""

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        """Ignore the speed: the bar shows the remaining time."""

    set_transfer_postfix_str = set_postfix_str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.bar.__exit__(None, None, None)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hide the progress bars and log lines of `huggingface_hub`; vitcli shows its own."""
    import warnings

    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not enough free disk space")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


def size_text(size: int) -> str:
    """346_293_852 -> 346 MB."""
    return f"{size / MEGA:.0f} MB" if size >= MEGA else f"{max(1, round(size / 1000))} kB"


def cannot_write(name: str, folder: Path, error: OSError) -> VitcliError:
    """The error for a disk that is full or read-only."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return VitcliError(f"cannot write `{name}` to `{folder}`: {reason}", DISK_HINT)

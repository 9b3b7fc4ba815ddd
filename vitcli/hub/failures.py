"""Failures of a download: which of them are tried again, and how a user reads them."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vitcli.errors import VitcliError

if TYPE_CHECKING:
    from vitcli.hub.repository import Repository

T = TypeVar("T")

BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which another try makes sense
PAUSES = (0.0, 1.0, 3.0)  # seconds before the second, third and fourth try
LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


class ConnectionFailed(VitcliError):
    """A server cannot be reached or does not answer properly; a cached copy may replace it.

    Attributes:
        temporary: True if another try may succeed.
    """

    def __init__(self, message: str, hint: str | None = None, *, temporary: bool = False) -> None:
        super().__init__(message, hint)
        self.temporary = temporary


def fetch_elsewhere(error: ConnectionFailed, name: str, folder: Path) -> ConnectionFailed:
    """`error` with the command that downloads weights where there is a network.

    A temporary failure, such as a busy server, stays as it is.

    Args:
        name: the argument of `vitcli models fetch`.
        folder: the folder of the cache that the weights belong in.
    """
    if error.temporary:
        return error
    command = f"`vitcli models fetch {name}`"
    elsewhere = f"on a machine with a network run {command}, and copy its folder to `{folder}` here"
    return ConnectionFailed(error.message, f"{error.hint}; or {elsewhere}")


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


@contextmanager
def hub_errors(repository: "Repository", path: str | None = None) -> Iterator[None]:
    """Turn the exceptions of `huggingface_hub` into a `VitcliError`.

    Raises:
        ConnectionFailed: the Hub cannot be reached, or it is out of order.
        VitcliError: the Hub refuses, or its answer is invalid.
        OSError: the disk is full or read-only.
    """
    try:
        yield
    except VitcliError:
        raise
    except Exception as error:
        translated = _translated(error, repository, path)
        if translated is None:
            raise
        raise translated from error


def _translated(
    error: BaseException, repository: "Repository", path: str | None
) -> VitcliError | None:
    """The error for users; None for an error of the disk and for a bug."""
    from huggingface_hub import constants, errors

    what = f"`{path}` of `{repository}`" if path else f"`{repository}`"
    host = constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(error.__cause__, Exception):
            found = _translated(error.__cause__, repository, path)
            if isinstance(found, ConnectionFailed):  # `huggingface_hub` has tried several times
                found.temporary = False
            return found
        return ConnectionFailed(f"{what} is not in the cache", "download it with a connection")
    if isinstance(error, errors.GatedRepoError):
        return VitcliError(
            f"`{repository}` is gated: its owner has not given you access",
            f"accept its terms at {repository.url}, then {LOGIN_HINT}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(repository)
    if isinstance(error, errors.RevisionNotFoundError):
        return VitcliError(
            f"`hf:{repository.repo_id}` has no revision `{repository.revision}`",
            f"its branches, tags and commits are at {repository.url}/commits",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in BUSY:
            return connection_failure(error, host)
        if status in (401, 403):
            return VitcliError(f"you may not read {what} (status {status})", LOGIN_HINT)
        if status == 404 and path is None:  # a mirror that does not send the Hub's error codes
            return _not_found(repository)
        return VitcliError(f"{what}: the Hub answers with status {status}", f"see {repository.url}")
    if isinstance(error, errors.HTTPError | errors.OfflineModeIsEnabled):
        return connection_failure(error, host)
    if isinstance(error, errors.FileMetadataError):
        return _invalid_answer(repository, error)
    if isinstance(error, OSError):  # `huggingface_hub` raises one without a number for the size
        return None if error.errno else ConnectionFailed(f"{what} is incomplete", "try again")
    # Only `huggingface_hub` runs here, and these come from an answer of the wrong type.
    if isinstance(error, ValueError | TypeError | LookupError | AttributeError | RecursionError):
        return _invalid_answer(repository, error)
    return None


def _not_found(repository: "Repository") -> VitcliError:
    return VitcliError(
        f"the Hub has no {repository.repo_type} `{repository.repo_id}` that you may read",
        f"check the name; if the repository is private, {LOGIN_HINT}",
    )


def _invalid_answer(repository: "Repository", error: BaseException) -> VitcliError:
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return VitcliError(
        f"`{constants.ENDPOINT}` does not answer like the Hub for `{repository}`: {reason}",
        "check HF_ENDPOINT, and whether the network shows a login page",
    )

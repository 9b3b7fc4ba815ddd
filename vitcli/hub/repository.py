"""Repositories on the Hugging Face Hub: their files at a commit, downloaded to the Hub's cache."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitcli.errors import VitcliError, printable
from vitcli.files import write_text
from vitcli.hub.client import (
    BUSY,
    COMMIT,
    MEGA,
    TRUST_HINT,
    ConnectionFailed,
    DownloadBar,
    connection_failure,
    install_checks,
    retrying,
    size_text,
)
from vitcli.progress import Quiet, Watcher

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

SHA256 = re.compile(r"[0-9a-f]{64}")
SMALL_FILE = 16 * MEGA  # the largest size of a config file, a card or a list of names
RepoType = Literal["model", "dataset"]
LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


@dataclass(frozen=True)
class Repository:
    """A model or dataset repository at a revision: a branch, a tag or a commit."""

    repo_id: str
    revision: str
    repo_type: RepoType = "model"

    def __str__(self) -> str:
        return f"hf:{self.repo_id}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def folder(self) -> Path:
        """Its folder in the Hub's cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.repo_id, repo_type=self.repo_type)
        return Path(constants.HF_HUB_CACHE) / name

    @property
    def url(self) -> str:
        """Its web page."""
        from huggingface_hub import constants

        prefix = "datasets/" if self.repo_type == "dataset" else ""
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}"


def parse_repository(source: str, repo_type: RepoType = "model") -> Repository:
    """`hf:ORG/NAME[@REVISION]` -> the repository.

    Raises:
        VitcliError: the text is not of this form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = source.removeprefix("hf:").partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise VitcliError(
            f"`{source}` does not name a repository on the Hub",
            "write `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION` for a branch, tag or commit",
        ) from error
    # The revision becomes a path in the cache, so only a part of what git allows is accepted.
    if at and (not re.fullmatch(r"\w[\w.+/-]*", revision) or ".." in revision):
        raise VitcliError(
            f"`{source}`: `{revision}` is not a revision", "write a branch, a tag or a commit"
        )
    return Repository(repo_id, revision or "main", repo_type)


@dataclass(frozen=True)
class RepoFiles:
    """The files of a repository at one commit.

    Attributes:
        files: path in the repository -> size and checksum; None for a cached file without them.
        offline: why the cache was used instead of the Hub; None if the Hub has answered.
    """

    repository: Repository
    commit: str
    files: Mapping[str, "RepoFile | None"]
    offline: str | None = None

    @property
    def snapshot(self) -> Path:
        """The folder of this commit in the Hub's cache."""
        return self.repository.folder / "snapshots" / self.commit

    @property
    def note(self) -> str:
        """The commit, and why it comes from the cache."""
        cached = f", from the cache: {self.offline}" if self.offline else ""
        return f"commit {self.commit}{cached}"


def list_files(repository: Repository) -> RepoFiles:
    """The files of a repository at the commit that its revision is now.

    If the Hub cannot be reached, the commit is the one that the cache holds for this revision.

    Raises:
        ConnectionFailed: the Hub cannot be reached, and the cache does not hold the revision.
        VitcliError: no such repository or revision, no permission, or an invalid answer.
    """
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    install_checks()
    commit, offline = repository.revision, None
    try:
        if not COMMIT.fullmatch(commit):
            commit = retrying(lambda: _current_commit(repository))
        folder = retrying(lambda: _download_tree(repository, commit))
        with suppress(VitcliError, OSError):  # a read-only cache
            _write_ref(repository, commit)
    except ConnectionFailed as error:
        commit, offline = _cached_commit(repository, error), error.message
        try:
            folder = _download_tree(repository, commit, local=True)
        except ConnectionFailed:
            raise _not_cached(repository, error) from error
    try:
        return RepoFiles(repository, commit, _tree(repository, commit, offline), offline)
    except CachedRepoTreeNotFoundError:  # another program has put some files into the cache
        if repository.repo_type == "dataset":  # a part must not pass for the whole
            raise VitcliError(
                f"the cache holds only some files of `{repository}`, and {offline}",
                "run the command once with a connection to the Hub",
            ) from None
    cached = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = dict.fromkeys(path.as_posix() for path in cached)
    return RepoFiles(repository, commit, files, offline)


def _tree(repository: Repository, commit: str, offline: str | None) -> dict[str, "RepoFile"]:
    """The files of a commit from the list in the cache, or from the Hub if the cache is read-only.

    Raises:
        CachedRepoTreeNotFoundError: the cache holds no list, and the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, RepoFile, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    repo_id, repo_type = repository.repo_id, repository.repo_type
    try:
        entries: Iterable[Any] = get_cached_repo_tree(repo_id, repo_type=repo_type, revision=commit)
    except CachedRepoTreeNotFoundError:
        if offline:
            raise
        with hub_errors(repository):
            tree = HfApi().list_repo_tree(
                repo_id, repo_type=repo_type, revision=commit, recursive=True
            )
            entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    return {_checked_path(entry.path, repository): entry for entry in entries}


def _download_tree(repository: Repository, commit: str, *, local: bool = False) -> Path:
    """Put the list of a commit's files into the cache, but no file; returns its snapshot folder."""
    from huggingface_hub import snapshot_download

    with hub_errors(repository):
        return Path(
            snapshot_download(
                repository.repo_id,
                repo_type=repository.repo_type,
                revision=commit,
                allow_patterns=[],
                local_files_only=local,
            )
        )


def _current_commit(repository: Repository) -> str:
    """The commit that the Hub names for a branch or tag."""
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="vitcli")
    with hub_errors(repository):
        commit = api.repo_info(
            repository.repo_id,
            repo_type=repository.repo_type,
            revision=repository.revision,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ).sha
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise VitcliError(
            f"`{constants.ENDPOINT}` sends an invalid commit for `{repository}`: "
            f"`{printable(str(commit)[:100])}`",
            TRUST_HINT,
        )
    return commit


def _write_ref(repository: Repository, commit: str) -> None:
    """Record which commit a branch or tag is, for a time without the Hub."""
    ref = repository.folder / "refs" / repository.revision
    if commit == repository.revision:
        return
    if not ref.is_file() or ref.read_text(encoding="utf-8") != commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, commit)


def _cached_commit(repository: Repository, failure: ConnectionFailed) -> str:
    if COMMIT.fullmatch(repository.revision):
        return repository.revision
    with suppress(OSError, ValueError):
        commit = (repository.folder / "refs" / repository.revision).read_text("utf-8").strip()
        if COMMIT.fullmatch(commit):
            return commit
    raise _not_cached(repository, failure) from failure


def _not_cached(repository: Repository, failure: ConnectionFailed) -> ConnectionFailed:
    return ConnectionFailed(
        f"`{repository}` is not in the cache, and {failure.message}", failure.hint
    )


def _checked_path(path: object, repository: Repository) -> str:
    """A path in a repository as the Hub sends it; raises if it leaves the repository's folder."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..") or re.search(r"[\\\0]|^[A-Za-z]:", part) for part in parts):
        raise VitcliError(
            f"`{repository}` lists an invalid file name: `{printable(str(path)[:100])}`", TRUST_HINT
        )
    return str(path)


def fetch_file(
    files: RepoFiles,
    path: str,
    watch: Watcher | None = None,
    *,
    check_cached: bool = False,
    max_bytes: float = math.inf,
) -> Path:
    """One file of a repository, in the Hub's cache.

    Args:
        files: the repository.
        path: the file's path in it.
        watch: receives the progress.
        check_cached: verify the checksum of a file that is in the cache already.
        max_bytes: the largest size that makes sense for this file.

    Raises:
        VitcliError: the file cannot be downloaded or written, or its checksum is wrong.
    """
    repository, watch = files.repository, watch or Quiet()
    cached, entry = files.snapshot / path, files.files.get(path)
    if entry is not None and entry.size > max_bytes:
        raise VitcliError(
            f"`{path}` of `{repository}` is too large: {size_text(entry.size)}",
            f"see {repository.url}",
        )
    if cached.is_file():
        if not check_cached or _checksum_matches(files, path):
            return cached
        watch.warn(f"`{path}` of `{repository}` is damaged in the cache: downloading it again")
        _remove(cached)
    if files.offline:
        raise VitcliError(
            f"`{path}` of `{repository}` is not in the cache, and {files.offline}",
            "run the command once with a connection to the Hub",
        )
    try:
        retrying(lambda: _download(files, path, watch))
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"cannot download `{path}` of `{repository}`: {error.message}", error.hint
        ) from error
    if not _checksum_matches(files, path):
        _remove(cached)
        raise VitcliError(
            f"`{path}` of `{repository}` is damaged: its SHA-256 differs from the Hub's",
            "try again; if this repeats, the server or a proxy changes the file",
        )
    return cached


def _download(files: RepoFiles, path: str, watch: Watcher) -> None:
    from huggingface_hub import constants, hf_hub_download

    repository, entry = files.repository, files.files.get(path)

    class Bar(DownloadBar):
        def __init__(self, total: int | None = None, initial: int = 0, **_: object) -> None:
            size = total if entry is None else entry.size
            super().__init__(path, repository.folder, watch, total=size, initial=initial)

    with hub_errors(repository, path):
        found = hf_hub_download(
            repository.repo_id,
            path,
            repo_type=repository.repo_type,
            revision=files.commit,
            tqdm_class=Bar,
        )
    if Path(found) != files.snapshot / path:
        raise VitcliError(
            f"`{constants.ENDPOINT}` sends another commit of `{repository}` than {files.commit}",
            TRUST_HINT,
        )


def _checksum_matches(files: RepoFiles, path: str) -> bool:
    """Compare a cached file with its SHA-256 on the Hub; only large (LFS) files have one."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    cached, repository = files.snapshot / path, files.repository
    if cached.is_symlink():
        etag: str | None = cached.readlink().name  # to `blobs/ETAG`
    else:  # a file system without links
        url = hf_hub_url(
            repository.repo_id, path, repo_type=repository.repo_type, revision=files.commit
        )
        with hub_errors(repository, path):
            etag = get_hf_file_metadata(url).etag
    if not etag or not SHA256.fullmatch(etag):
        return True
    with cached.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == etag


def _remove(cached: Path) -> None:
    """Delete a file of a snapshot and its content."""
    for path in (cached.resolve(), cached.parent / cached.readlink(), cached):
        path.unlink(missing_ok=True)


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


@contextmanager
def hub_errors(repository: Repository, path: str | None = None) -> Iterator[None]:
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
    error: BaseException, repository: Repository, path: str | None
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


def _not_found(repository: Repository) -> VitcliError:
    return VitcliError(
        f"the Hub has no {repository.repo_type} `{repository.repo_id}` that you may read",
        f"check the name; if the repository is private, {LOGIN_HINT}",
    )


def _invalid_answer(repository: Repository, error: BaseException) -> VitcliError:
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return VitcliError(
        f"`{constants.ENDPOINT}` does not answer like the Hub for `{repository}`: {reason}",
        "check HF_ENDPOINT, and whether the network shows a login page",
    )

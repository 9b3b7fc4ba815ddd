"""Repositories on the Hugging Face Hub: their files at a commit, downloaded to the Hub's cache."""

import hashlib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitcli.errors import VitcliError, printable
from vitcli.files import write_text
from vitcli.hub.client import COMMIT, MEGA, TRUST_HINT, DownloadBar, install_checks, size_text
from vitcli.hub.failures import ConnectionFailed, hub_errors, retrying
from vitcli.hub.verified import VerifiedFiles
from vitcli.progress import Quiet, Watcher

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
SMALL_FILE = 16 * MEGA  # the largest size of a config file, a card or a list of names
RepoType = Literal["model", "dataset"]


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
        return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name

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
        sizes: path in the repository -> bytes; None if only the cache is known.
        hashes: path -> SHA-256 of a large (LFS) file, git's SHA-1 of any other, where known.
        offline: why the cache was used instead of the Hub; None if the Hub has answered.
    """

    repository: Repository
    commit: str
    sizes: Mapping[str, int | None]
    offline: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

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
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    install_checks()
    commit, offline, hashes = repository.revision, None, {}
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
        entries = get_cached_repo_tree(
            repository.repo_id, repo_type=repository.repo_type, revision=commit
        )
        sizes = dict(_checked_file(entry.path, entry.size, repository) for entry in entries)
        hashes = {e.path: str(e.lfs.sha256 if e.lfs else e.blob_id) for e in entries}
    except CachedRepoTreeNotFoundError:  # another program has put files into the cache
        cached = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        sizes = dict.fromkeys(path.as_posix() for path in cached)
        # A part of a dataset must not pass for the whole.
        if repository.repo_type == "dataset" or not sizes:
            raise VitcliError(
                f"the cache `{folder}` has no list of the files of `{repository}`"
                f"{f', and {offline}' if offline else ''}",
                "run the command once with a connection to the Hub and a writable HF_HOME",
            ) from None
    return RepoFiles(repository, commit, sizes, offline, hashes)


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
        f"`{repository}` is not in the cache, and {failure.message}",
        failure.hint,
        temporary=failure.temporary,
    )


def _checked_file(path: Any, size: Any, repository: Repository) -> tuple[str, int | None]:
    """A path and a size as the Hub sends them; raises if the path leaves the repository."""
    parts = path.split("/") if isinstance(path, str) and isinstance(size, int) else [""]
    if any(part in ("", ".", "..") or re.search(r"[\\\0]|^[A-Za-z]:", part) for part in parts):
        raise VitcliError(
            f"`{repository}` lists an invalid file: `{printable(str(path)[:100])}`", TRUST_HINT
        )
    return path, size


def fetch_file(
    files: RepoFiles,
    path: str,
    watch: Watcher | None = None,
    *,
    verified: VerifiedFiles | None = None,
    max_bytes: float = math.inf,
) -> Path:
    """One file of a repository, in the Hub's cache, with the checksum that the Hub has given.

    Args:
        files: the repository.
        path: the file's path in it.
        watch: receives the progress.
        verified: files in the cache whose checksum need not be computed again.
        max_bytes: the largest size that makes sense for this file.

    Raises:
        VitcliError: the file cannot be downloaded or written, or its checksum is wrong.
    """
    repository, watch = files.repository, watch or Quiet()
    cached, size = files.snapshot / path, files.sizes.get(path)
    if size is not None and size > max_bytes:
        raise VitcliError(
            f"`{path}` of `{repository}` is too large: {size_text(size)}", f"see {repository.url}"
        )
    if cached.is_file():
        if verified is not None and cached in verified:
            return cached
        if _checksum_matches(files, path):
            if verified is not None:
                verified.add(cached)
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
    if verified is not None:
        verified.add(cached)
    return cached


def _download(files: RepoFiles, path: str, watch: Watcher) -> None:
    from huggingface_hub import constants, hf_hub_download

    repository, size = files.repository, files.sizes.get(path)

    class FileBar(DownloadBar):
        def __init__(self, total: int | None = None, **_: object) -> None:
            super().__init__(path, repository.folder, watch, total if size is None else size)

    with hub_errors(repository, path):
        found = hf_hub_download(
            repository.repo_id,
            path,
            repo_type=repository.repo_type,
            revision=files.commit,
            tqdm_class=FileBar,
        )
    if Path(found) != files.snapshot / path:
        raise VitcliError(
            f"`{constants.ENDPOINT}` sends another commit of `{repository}` than {files.commit}",
            TRUST_HINT,
        )


def _checksum_matches(files: RepoFiles, path: str) -> bool:
    """Compare a cached file with its name in the cache, its ETag on the Hub.

    That is the SHA-256 of a large (LFS) file, and git's SHA-1 of any other. On a file system
    without links, the list of the repository's files tells the same.
    """
    cached = files.snapshot / path
    linked = cached.readlink().name if cached.is_symlink() else None  # to `blobs/ETAG`
    expected = linked or files.hashes.get(path, "")
    if GIT_SHA1.fullmatch(expected):
        content = cached.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == expected
    if not SHA256.fullmatch(expected):
        return True
    with cached.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected


def _remove(cached: Path) -> None:
    """Delete a file of a snapshot and its content."""
    for path in (cached.resolve(), cached):
        path.unlink(missing_ok=True)

"""A repository on the Hugging Face Hub, and what the answers of the Hub's client mean."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from vitcli.errors import VitcliError
from vitcli.files import write_text
from vitcli.hub.http import AGAIN, BUSY, Part, Unreachable, cache_folder, locked, persist
from vitcli.progress import Watcher

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
Kind = Literal["model", "dataset"]
WHAT = {"model": "model", "dataset": "data set"}
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"


@dataclass(frozen=True)
class Repository:
    """A model or data set on the Hub: `ORG/NAME` and a branch, tag or commit."""

    name: str
    revision: str
    kind: Kind = "model"

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def folder(self) -> Path:
        """Its place in the Hub's cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.name, repo_type=self.kind)
        return Path(constants.HF_HUB_CACHE) / name

    @property
    def page(self) -> str:
        """Where one looks at it."""
        from huggingface_hub import constants

        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{prefix}{self.name}"


def parse(source: str, kind: Kind = "model") -> Repository:
    """`hf:NAME[@REVISION]` -> the repository that is meant.

    Raises:
        VitcliError: the text names none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, at, revision = source.removeprefix("hf:").partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise VitcliError(
            f"`{source}` names no repository on the Hub",
            hint="`hf:ORG/NAME`, or `hf:ORG/NAME@REVISION` for a branch, tag or commit",
        ) from error
    # What git allows in a reference, and no way out of the cache's folder.
    if at and (not re.fullmatch(r"\w[\w.+/-]*", revision) or ".." in revision):
        raise VitcliError(
            f"`{source}`: `{revision}` is no revision", hint="a branch, a tag or a commit"
        )
    return Repository(name, revision or "main", kind)


@dataclass(frozen=True)
class Listing:
    """What a revision of a repository holds.

    Attributes:
        repository: under the name that it has now.
        commit: of its revision.
        files: the names of all its files.
        offline: why it comes from the cache, where it does.
    """

    repository: Repository
    commit: str
    files: tuple[str, ...]
    offline: str | None = None


def list_files(repository: Repository) -> Listing:
    """What the Hub says a revision holds; what it said last, where it cannot be asked.

    Raises:
        Unreachable: nobody answers, and it was never asked before.
        VitcliError: no such repository or revision, or no right to see it.
    """
    key = f"{repository.kind}s--{repository.name}--{repository.revision}"
    kept = cache_folder() / "listings" / f"{quote(key, safe='')}.json"
    try:
        name, commit, files = ask(repository)
    except Unreachable as error:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(kept.read_text(encoding="utf-8"))
            found = replace(repository, name=known["name"])
            return Listing(found, known["commit"], tuple(known["files"]), str(error))
        raise
    with suppress(OSError, VitcliError):  # a cache that may only be read
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({"name": name, "commit": commit, "files": files}))
    return Listing(replace(repository, name=name), commit, tuple(files))


def ask(repository: Repository) -> tuple[str, str, list[str]]:
    """(name, commit, names of all files), in one request, or in two where a mirror needs them.

    Raises:
        Unreachable: nobody answers.
        VitcliError: no such repository or revision, or no right to see it.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="vitcli")
    ask = api.dataset_info if repository.kind == "dataset" else api.model_info
    with told(repository):
        try:
            info = ask(
                repository.name,
                revision=repository.revision,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            files = [file.rfilename for file in info.siblings or []]
            if not files and info.sha:  # some mirrors list them at the tree only
                files = api.list_repo_files(
                    repository.name, repo_type=repository.kind, revision=info.sha
                )
        except (ValueError, TypeError, KeyError) as error:
            raise VitcliError(
                f"`{constants.ENDPOINT}` does not answer like the Hub: {error}",
                hint="a login page of the network may be in between; HF_ENDPOINT names the Hub",
            ) from error
    if info.sha is None or not re.fullmatch(r"\w[\w-]*", info.sha):  # it names a folder
        raise VitcliError(
            f"`{constants.ENDPOINT}` names no commit of `{repository}`",
            hint="HF_ENDPOINT names the Hub",
        )
    return info.id, info.sha, files


def fetch_small(repository: Repository, commit: str, name: str) -> Path:
    """One small file of a commit, from the cache or the Hub.

    Raises:
        VitcliError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    found = repository.folder / "snapshots" / commit / name
    if found.is_file():
        return found
    try:
        with told(repository, name):
            return Path(
                hf_hub_download(repository.name, name, repo_type=repository.kind, revision=commit)
            )
    except Unreachable as error:
        raise VitcliError(f"cannot fetch `{name}` of `{repository}`: {error}", AGAIN) from error


def fetch_big(repository: Repository, commit: str, name: str, watch: Watcher) -> Path:
    """One big file of a commit, going on with what an earlier try has left in the cache.

    Raises:
        VitcliError: it cannot be had, or came damaged.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if not (repository.folder / "snapshots" / commit / name).is_file():
        try:
            with told(repository, name):
                url = hf_hub_url(repository.name, name, repo_type=repository.kind, revision=commit)
                about = get_hf_file_metadata(url)
                if about.etag and re.fullmatch(r"[\w.-]+", about.etag):
                    _receive(repository, url, about.etag, about.size, name, watch)
        except Unreachable as error:
            raise VitcliError(f"cannot fetch `{name}` of `{repository}`: {error}", AGAIN) from error
    return fetch_small(repository, commit, name)  # sees the content, and gives it its name


def _receive(
    repository: Repository, url: str, etag: str, size: int | None, name: str, watch: Watcher
) -> None:
    """Put the content with this ETag among the cache's blobs."""
    blob = repository.folder / "blobs" / etag
    with locked(repository.folder.parent / ".locks" / repository.folder.name / f"{etag}.lock"):
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = Part(blob.with_name(f"{etag}.incomplete"), name, watch)
        if size is None or part.size != size:
            persist(part, lambda: _attempt(url, part, size))
        part.finish(blob, size, ("sha256", etag) if SHA256.fullmatch(etag) else None)


def _attempt(url: str, part: Part, size: int | None) -> str | None:
    """One request for what is missing; the reason why that was not enough, or None.

    Not the client's own `http_get`, which holds up to 10 MB that a break then costs.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
            hf_raise_for_status(response)
            start = part.size if response.status_code == 206 else 0
            with part.writing(start, size) as write:
                for chunk in response.iter_bytes():
                    write(chunk)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 416:
            part.drop()
        elif status not in BUSY:
            raise
        return f"`{error.response.url.host}` answers with status {status}"
    except errors.HTTPError as error:
        return f"the connection broke ({_words(error)})"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and log lines of `huggingface_hub`: ours are shown instead."""
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
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


@contextmanager
def told(repository: Repository, name: str | None = None) -> Iterator[None]:
    """What the Hub's client raises, in our words.

    Raises:
        Unreachable: nobody answers, or the Hub is out of order.
        VitcliError: it answers no.
    """
    from huggingface_hub import constants, errors

    what = f"`{name}` of `{repository}`" if name else f"`{repository}`"
    network: Any = (errors.HTTPError, errors.LocalEntryNotFoundError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise VitcliError(
            f"`{repository}` is gated: its owner has not given you access",
            hint=f"accept its terms at {repository.page}, then {LOGIN}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _no_such(repository) from error
    except errors.RevisionNotFoundError as error:
        raise VitcliError(
            f"`hf:{repository.name}` has no revision `{repository.revision}`",
            hint=f"branches, tags and commits are at {repository.page}/commits",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in BUSY:
            raise Unreachable(f"`{constants.ENDPOINT}` answers with status {status}") from error
        if status in (401, 403):
            raise VitcliError(f"{what} may not be read (status {status})", LOGIN) from error
        if status == 404 and name is None:  # a mirror without the Hub's own word for it
            raise _no_such(repository) from error
        raise VitcliError(
            f"{what}: the Hub answers with status {status}", hint=f"look at {repository.page}"
        ) from error
    except network as error:
        raise Unreachable(f"`{constants.ENDPOINT}` cannot be reached ({_words(error)})") from error
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's
        raise VitcliError(f"{what} did not arrive whole", AGAIN) from error


def _no_such(repository: Repository) -> VitcliError:
    return VitcliError(
        f"the Hub has no {WHAT[repository.kind]} `{repository.name}`, or only for those who may "
        "read it",
        hint=f"look at the name; if it is private, {LOGIN}",
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

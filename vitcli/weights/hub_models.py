"""`hf:NAME[@REVISION]`: weights from a repository on the Hugging Face Hub, kept in its own cache.

Only what is read is fetched: the configuration and one weights file (or the shards of one).
`huggingface_hub` 2 gives an unfinished download up when its process ends, so the weights are put
into its cache from here, in the layout that it documents: `blobs/ETAG` is a file's content,
`snapshots/COMMIT/NAME` points there, `refs/REVISION` holds a commit.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vitcli.errors import VitcliError
from vitcli.files import write_text
from vitcli.hub.http import Unreachable, cannot_write
from vitcli.hub.repository import COMMIT, Repository, ask, fetch_big, fetch_small, parse, quiet
from vitcli.progress import Quiet, Watcher
from vitcli.weights.store import INDEX, shard_names

WHOLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
SIDE = ("config.json", "preprocessor_config.json")


def fetch_repository(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """`hf:NAME[@REVISION]` -> (the weights file, its configuration beside it; notes).

    The weights file is a shard index where the weights are in several files. The notes name the
    commit, and say when it comes from the cache because the Hub cannot be asked.

    Raises:
        VitcliError: no such repository or revision, no right to read it, no weights in it, no
            network and nothing cached, a full disk, a file that came damaged.
    """
    repository = parse(source)
    try:
        with quiet():
            try:
                _, commit, files = ask(repository)
            except Unreachable as error:
                path = _cached(repository, str(error))
                commit = path.parent.name
                return path, [f"{repository}: commit {commit}, from the cache: {error}"]
            path = _download(repository, commit, files, watch or Quiet())
            if repository.revision != commit:
                with suppress(VitcliError, OSError):  # a cache that may only be read
                    _remember(repository, commit)
    except OSError as error:
        raise cannot_write(str(repository), repository.folder, error) from error
    return path, [f"{repository}: commit {commit}"]


def choose(files: Sequence[str], repository: Repository) -> str:
    """The weights file to take: safetensors before pickles before `.npz`, only if it is unique.

    Raises:
        VitcliError: there is none, or several among which nothing decides.
    """
    for known in (WHOLE, INDEX):
        if known in files:
            return known
    inside = [name for name in files if "/" not in name]
    # Their towers are named otherwise; where nothing else is there the reader says so.
    named = [name for name in inside if not name.startswith("open_clip_")] or inside
    for endings in (".safetensors",), (".bin", ".pth", ".pt"), (".npz",):
        found = [name for name in named if name.endswith(endings)]
        if PICKLE in found:
            return PICKLE
        if len(found) == 1:
            return found[0]
        if found:
            raise VitcliError(
                f"`{repository}` holds {len(found)} weights files: {', '.join(found[:4])}",
                hint=f"give one by its address: `{repository.page}/resolve/"
                f"{repository.revision}/{found[0]}`",
            )
    shown = ", ".join(f"`{name}`" for name in inside[:6]) or "nothing"
    raise VitcliError(
        f"`{repository}` holds no weights file that is understood; it holds {shown}",
        hint="model.safetensors, pytorch_model.bin or one .npz is looked for",
    )


def _download(repository: Repository, commit: str, files: Sequence[str], watch: Watcher) -> Path:
    """What is needed of a commit; the weights file, in the cache."""
    weights = choose(files, repository)
    for name in SIDE:
        if name in files:
            fetch_small(repository, commit, name)
    if weights != INDEX:
        return fetch_big(repository, commit, weights, watch)
    index = fetch_small(repository, commit, weights)
    for shard in shard_names(index):
        fetch_big(repository, commit, shard, watch)
    return index


def _cached(repository: Repository, reason: str) -> Path:
    """The weights file of a revision that was fetched before, whole.

    Raises:
        VitcliError: there is none.
    """
    commit = repository.revision
    if not COMMIT.fullmatch(commit):
        with suppress(OSError):
            commit = (repository.folder / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = repository.folder / "snapshots" / commit
    if snapshot.is_dir():
        with suppress(VitcliError):
            path = snapshot / choose([p.name for p in snapshot.iterdir()], repository)
            needed = (
                [snapshot / name for name in shard_names(path)] if path.name == INDEX else [path]
            )
            if all(file.is_file() for file in needed):
                return path
    raise VitcliError(
        f"`{repository}` is not in the cache, and {reason}",
        hint="unset HF_HUB_OFFLINE once to fetch it"
        if "OFFLINE" in reason
        else "see to the network (HTTPS_PROXY is honoured), or give a file that is here already",
    )


def _remember(repository: Repository, commit: str) -> None:
    """Which commit a branch or tag is, for a time without the Hub."""
    reference = repository.folder / "refs" / repository.revision
    if not reference.is_file() or reference.read_text(encoding="utf-8") != commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, commit)

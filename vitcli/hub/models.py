"""`hf:ORG/NAME[@REVISION]`: choose the weights file of a model repository and download it."""

from collections.abc import Collection
from pathlib import Path

from vitcli.errors import VitcliError, quoted
from vitcli.files import read_json
from vitcli.hub.client import cannot_write, quiet_hub
from vitcli.hub.failures import ConnectionFailed, fetch_elsewhere
from vitcli.hub.repository import (
    SMALL_FILE,
    Repository,
    fetch_file,
    list_files,
    parse_repository,
)
from vitcli.progress import Watcher

WHOLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
# `save_pretrained` writes several files above its `max_shard_size`, and this index of them.
INDEX = "model.safetensors.index.json"
CONFIG_FILES = (
    "config.json",
    "preprocessor_config.json",
    "adapter_config.json",
    "open_clip_config.json",
)


def fetch_model(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """`hf:ORG/NAME[@REVISION]` -> (the weights file, with its config files beside it; notes).

    The path is the index if the weights are in several files. The notes name the commit.

    Raises:
        VitcliError: no such repository or revision, no permission, no weights, no connection and
            nothing cached, a full disk, or a damaged file.
    """
    repository = parse_repository(source)
    try:
        with quiet_hub():
            files = list_files(repository)
            weights = choose_weights(files.sizes, repository)
            for name in CONFIG_FILES:
                if name in files.sizes:
                    fetch_file(files, name, watch, max_bytes=SMALL_FILE)
            if weights == INDEX:
                path = fetch_file(files, INDEX, watch, max_bytes=SMALL_FILE)
                for name in shard_names(path):
                    fetch_file(files, name, watch)
            else:
                path = fetch_file(files, weights, watch)
    except ConnectionFailed as error:
        raise fetch_elsewhere(error, str(repository), repository.folder) from error
    except OSError as error:
        raise cannot_write(str(repository), repository.folder, error) from error
    return path, [f"{repository}: {files.note}"]


def choose_weights(paths: Collection[str], repository: Repository) -> str:
    """The weights file to read: safetensors before pickles before `.npz`.

    Raises:
        VitcliError: there is none, or there are several of the same kind.
    """
    for known in (WHOLE, INDEX):
        if known in paths:
            return known
    top = [path for path in paths if "/" not in path]
    # OpenCLIP's own layout is read only if there is nothing else.
    named = [path for path in top if not path.startswith("open_clip_")] or top
    for suffixes in (".safetensors",), (".bin", ".pth", ".pt"), (".npz",):
        found = [path for path in named if path.endswith(suffixes)]
        if PICKLE in found:
            return PICKLE
        if len(found) == 1:
            return found[0]
        if found:
            raise VitcliError(
                f"`{repository}` holds {len(found)} weights files: {quoted(found, 4)}",
                f"give the URL of one: `{repository.url}/resolve/{repository.revision}/{found[0]}`",
            )
    shown = quoted(top, 6) or "no files"
    raise VitcliError(
        f"`{repository}` holds no weights in a supported format; it holds {shown}",
        "vitcli reads model.safetensors, pytorch_model.bin, or a single .npz",
    )


def shard_names(index: Path) -> list[str]:
    """Names of the files in the same folder that an index of sharded weights lists.

    Raises:
        VitcliError: the index is invalid.
    """
    try:
        names = set(read_json(index)["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it lists no files in its folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VitcliError(
            f"`{index}` is not a valid index of weights files: {error}",
            "copy or download the file again",
        ) from error
    return sorted(names)

"""`hf:NAME[:CONFIG][@REVISION]`: which files of a dataset repository hold which split.

The repository's card (README.md) decides; without it, the names of folders and files do. Code in a
repository is never executed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from vitcli.decode import IMAGE_SUFFIXES
from vitcli.errors import VitcliError, quoted
from vitcli.hub.repository import (
    SMALL_FILE,
    RepoFiles,
    Repository,
    fetch_file,
    list_files,
    parse_repository,
)
from vitcli.hub.split_names import SPLIT_ALIASES, SPLITS, folder_splits, split_of_paths

# Tables beside images that give their labels, in order of preference. `datasets` reads the first
# kind in an `imagefolder`.
LABEL_TABLES = (
    "metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet", "labels.csv",
    "labels.tsv", "labels.jsonl",
)  # fmt: skip
CARD = "README.md"
CONVERTED = "refs/convert/parquet"  # the branch with the parquet files that the Hub makes itself


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset that are read.

    Attributes:
        kind: `parquet`, `shards` or `folder`.
        splits: split -> paths in the repository; for a folder, all of them under `train`, with
            the tables that give labels.
        config: the name of the configuration, if there are several.
        ignored: splits that are not read.
    """

    kind: str
    splits: Mapping[str, Sequence[str]]
    config: str | None = None
    ignored: tuple[str, ...] = ()


def parse_dataset(notation: str) -> tuple[Repository, str | None]:
    """`hf:NAME[:CONFIG][@REVISION]` -> (the repository, the configuration).

    Raises:
        VitcliError: the text is not of this form.
    """
    named, at, revision = notation.removeprefix("hf:").partition("@")
    name, colon, config = named.partition(":")
    if colon and not config:
        raise VitcliError(
            f"`{notation}` names no configuration after `:`", "write `hf:ORG/NAME:CONFIG`"
        )
    return parse_repository(f"hf:{name}{at}{revision}", "dataset"), config or None


def find_dataset(notation: str, wanted: Sequence[str] = ()) -> tuple[RepoFiles, DatasetFiles]:
    """The commit of a dataset on the Hub and its files to read; downloads the card only.

    Args:
        notation: `hf:NAME[:CONFIG][@REVISION]`.
        wanted: splits to read besides train, validation and test.

    Raises:
        VitcliError: no such repository, revision or configuration, no images in a known format, or
            no connection and nothing cached.
    """
    repository, config = parse_dataset(notation)
    repo_files = list_files(repository)
    paths = list(repo_files.sizes)
    chosen = choose_files(paths, _card_configs(repo_files), config, wanted, str(repository))
    has_script = f"{repository.repo_id.rpartition('/')[2]}.py" in paths
    if chosen is None or chosen.kind == "folder" or has_script:
        converted = _find_converted(repository, config, wanted)
        if converted is not None:
            return converted
    if chosen is None:
        script = " and a script, which vitcli never executes" if has_script else ""
        shown = quoted(paths, 6) or "no files"
        raise VitcliError(
            f"`{repository}` holds no images in a supported format; it holds {shown}{script}",
            "vitcli reads parquet, WebDataset shards and class folders; download other formats "
            "yourself, and give a folder or a table",
        )
    return repo_files, chosen


def _find_converted(
    repository: Repository, config: str | None, wanted: Sequence[str]
) -> tuple[RepoFiles, DatasetFiles] | None:
    """The parquet files that the Hub has made of branch `main`, if they are complete."""
    if repository.revision != "main":
        return None
    try:
        repo_files = list_files(replace(repository, revision=CONVERTED))
    except VitcliError:
        return None
    if any("partial-" in path for path in repo_files.sizes):
        return None
    chosen = choose_files(list(repo_files.sizes), [], config, wanted, str(repository))
    return (repo_files, chosen) if chosen is not None and chosen.kind == "parquet" else None


def _card_configs(repo_files: RepoFiles) -> list[Mapping[str, Any]]:
    """The configurations in the card; [] if it has none or is not valid YAML."""
    from huggingface_hub.repocard import metadata_load

    if CARD not in repo_files.sizes:
        return []
    card = fetch_file(repo_files, CARD, max_bytes=SMALL_FILE)
    try:
        configs = (metadata_load(card) or {}).get("configs")
    except Exception:  # PyYAML and the loader raise many kinds
        return []
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def choose_files(
    paths: Sequence[str],
    card: Sequence[Mapping[str, Any]],
    config: str | None,
    wanted: Sequence[str],
    shown: str,
) -> DatasetFiles | None:
    """The files to read; None if no format is recognised.

    Args:
        paths: all files of the repository.
        card: the configurations in its card.
        config: the configuration that the user names.
        wanted: splits to read besides train, validation and test.
        shown: the repository, for errors.

    Raises:
        VitcliError: no such configuration, or several and the user names none.
    """
    visible = [path for path in paths if not path.startswith(".")]
    images = [path for path in visible if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in visible if _is_table(path)]
    for kind, suffix in (("parquet", ".parquet"), ("shards", ".tar")):
        found = [path for path in paths if path.lower().endswith(suffix)]
        if images:  # `metadata.parquet` holds labels, not images
            found = [path for path in found if path not in tables]
        if found:
            configs = _configs_of_card(card, found) or _configs_of_names(found)
            chosen = _choose_config(configs, card, config, shown)
            several = len(configs) > 1
            return _with_splits(kind, configs[chosen], chosen if several else None, wanted)
    # Without a table, an image outside of folders has no label: the logo of the card.
    used = [path for path in images if tables or "/" in path]
    if not used:
        return None
    if config is not None:
        raise VitcliError(f"`{shown}` has no configurations", f"remove `:{config}`")
    return DatasetFiles("folder", {"train": [*used, *tables]})


def _is_table(path: str) -> bool:
    """True for a file that can give the labels of images beside it."""
    name = PurePosixPath(path)
    return name.name.lower() in LABEL_TABLES or name.suffix.lower() in (".csv", ".tsv", ".jsonl")


def _configs_of_card(
    card: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> paths by the card; {} if it does not fit the files."""
    configs: dict[str, dict[str, list[str]]] = {}
    for entry in card:
        splits: dict[str, list[str]] = {}
        folder = entry.get("data_dir")
        prefix = f"{folder.strip('/')}/".lstrip("/") if isinstance(folder, str) else ""
        for split, patterns in _data_files(entry.get("data_files")):
            full = [prefix + pattern for pattern in patterns]
            found = [path for path in paths if any(_matches(path, one) for one in full)]
            if found:
                splits.setdefault(split, []).extend(found)
        name = entry.get("config_name", "default")
        if splits and isinstance(name, str):
            configs[name] = splits
    return configs


def _data_files(value: Any) -> list[tuple[str, list[str]]]:
    """The value of `data_files` in a card -> (split, patterns); wrong types are ignored."""
    if isinstance(value, Mapping):
        return [(split, _texts(path)) for split, path in value.items() if isinstance(split, str)]
    entries = value if isinstance(value, list) else [value]
    found = [("train", _texts(entries))]
    for one in entries:
        if isinstance(one, Mapping) and isinstance(split := one.get("split", "train"), str):
            found.append((split, _texts(one.get("path"))))
    return found


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _matches(name: str, pattern: str) -> bool:
    """True if a pattern of the card matches; `*` stays within a folder, `**` does not."""
    ours, theirs = name.split("/"), pattern.removeprefix("./").split("/")
    if "**" in theirs:
        return fnmatchcase(name, pattern.replace("**/", "*"))
    return len(ours) == len(theirs) and all(map(fnmatchcase, ours, theirs))


def _configs_of_names(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> paths by the names of folders and files."""
    folders = {folder for name in files for folder in name.split("/")[:-1]}
    splits = folder_splits(folders)
    by_config: dict[str, list[str]] = {}
    for name in files:
        other = [f for f in name.split("/")[:-1] if f.lower() != "data" and f not in splits]
        by_config.setdefault(other[0] if other else "default", []).append(name)
    found: dict[str, dict[str, list[str]]] = {}
    for config, names in by_config.items():
        found[config] = {}
        for name, split in zip(names, split_of_paths(names), strict=True):
            found[config].setdefault(split or "", []).append(name)
    return found


def _choose_config(
    configs: Mapping[str, Any],
    card: Sequence[Mapping[str, Any]],
    config: str | None,
    shown: str,
) -> str:
    names = quoted(configs, 10)
    if config is not None:
        if config in configs:
            return config
        raise VitcliError(
            f"`{shown}` has no configuration `{config}`",
            f"there {'is' if len(configs) == 1 else 'are'} {names}",
        )
    marked = [str(entry.get("config_name")) for entry in card if entry.get("default") is True]
    for name in (*marked, "default"):
        if name in configs:
            return name
    if len(configs) == 1:
        return next(iter(configs))
    first = next(iter(configs))
    raise VitcliError(
        f"`{shown}` has {len(configs)} configurations: {names}", f"name one: `hf:…:{first}`"
    )


def _with_splits(
    kind: str, splits: Mapping[str, list[str]], config: str | None, wanted: Sequence[str]
) -> DatasetFiles:
    """The splits to read, under vitcli's names; files without a split are for training."""
    found: dict[str, list[str]] = {}
    # A plain name goes before an alias: where there are `test` and `eval`, `eval` is another split.
    for name in sorted(splits, key=lambda name: name not in (*SPLITS, "")):
        known = SPLIT_ALIASES.get(name.lower(), name) or "train"
        found.setdefault(name if known in found and name else known, []).extend(splits[name])
    read = {name: sorted(found[name]) for name in (*SPLITS, *wanted) if name in found}
    if not read:  # the first split, whatever its name is
        read = {"train": sorted(found.pop(next(iter(found))))}
    ignored = tuple(name for name in found if name not in read)
    return DatasetFiles(kind, read, config, ignored)

"""What to read of a repository of the Hub: configurations and splits, by its card or by names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from vitcli.data.folders import IMAGE_SUFFIXES
from vitcli.data.split_names import SPLITS, WORD, WORDS
from vitcli.errors import VitcliError


@dataclass(frozen=True)
class Plan:
    """What is read of a repository.

    Attributes:
        kind: `parquet`, `shards` or `folder`.
        files: split -> names of its files; of a folder all under `train`.
        config: the name of the configuration, where there are some.
        left: splits that are not read.
    """

    kind: str
    files: Mapping[str, Sequence[str]]
    config: str | None = None
    left: tuple[str, ...] = ()


def choose(
    files: Sequence[str],
    card: Sequence[Mapping[str, Any]],
    config: str | None,
    wanted: Sequence[str],
    shown: str,
) -> Plan | None:
    """What to read of these files; None where nothing is understood.

    Args:
        files: names in the repository.
        card: the configurations that its card lists.
        config: the one that was asked for.
        wanted: splits to read besides train, validation and test.
        shown: the repository, for errors.

    Raises:
        VitcliError: there is no such configuration, or several and none was asked for.
    """
    for kind, ending in (("parquet", ".parquet"), ("shards", ".tar")):
        mine = [name for name in files if name.lower().endswith(ending)]
        if not mine:
            continue
        configs = _listed(card, mine) or _guessed(mine)
        chosen = _one_config(configs, card, config, shown)
        return _with_splits(kind, configs[chosen], chosen if len(configs) > 1 else None, wanted)
    images = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    inside = [name for name in images if "/" in name and not name.startswith(".")]
    if not inside:
        return None
    if config is not None:
        raise VitcliError(f"`{shown}` has no configurations", f"leave out `:{config}`")
    return Plan("folder", {"train": inside})


def _listed(
    card: Sequence[Mapping[str, Any]], files: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> files, as the card says; {} where it does not fit the files."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in card:
        splits: dict[str, list[str]] = {}
        for split, patterns in _data_files(entry.get("data_files")):
            folder = str(entry.get("data_dir") or "").strip("/")
            full = [f"{folder}/{pattern}".lstrip("/") for pattern in patterns]
            names = [name for name in files if any(_matches(name, one) for one in full)]
            if names:
                splits.setdefault(split or "train", []).extend(names)
        if splits:
            found[str(entry.get("config_name", "default"))] = splits
    return found


def _data_files(value: Any) -> list[tuple[str | None, list[str]]]:
    """The ways in which a card names files -> (split, patterns)."""
    if isinstance(value, str):
        return [(None, [value])]
    if isinstance(value, Mapping):
        return [(str(split), _texts(paths)) for split, paths in value.items()]
    if not isinstance(value, list):
        return []
    if all(isinstance(one, str) for one in value):
        return [(None, value)]
    return [
        (str(one.get("split", "train")), _texts(one.get("path")))
        for one in value
        if isinstance(one, Mapping)
    ]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value or []]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of the card means a file; `*` stays within a folder, `**` does not."""
    ours, theirs = name.split("/"), pattern.removeprefix("./").split("/")
    if "**" in theirs:
        return fnmatchcase(name, pattern.replace("**/", "*"))
    return len(ours) == len(theirs) and all(map(fnmatchcase, ours, theirs))


def _guessed(files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> files, by the names of folders and files."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in files:
        parts = name.lower().split("/")
        words = [WORD.search(part) for part in reversed(parts)]
        split = next((WORDS[word[1]] for word in words if word), "")
        folders = [
            folder
            for folder in name.split("/")[:-1]
            if folder.lower() != "data" and not WORD.fullmatch(folder.lower())
        ]
        config = folders[0] if folders else "default"
        found.setdefault(config, {}).setdefault(split, []).append(name)
    return found


def _one_config(
    configs: Mapping[str, Any],
    card: Sequence[Mapping[str, Any]],
    config: str | None,
    shown: str,
) -> str:
    names = ", ".join(f"`{name}`" for name in list(configs)[:10])
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
) -> Plan:
    """Only the splits that are read, under our names; what has no name is train."""
    found: dict[str, list[str]] = {}
    for name, files in splits.items():
        known = WORDS.get(name.lower(), name)
        found.setdefault(known or "train", []).extend(files)
    read = {name: sorted(found[name]) for name in (*SPLITS, *wanted) if name in found}
    if not read and len(found) == 1:
        read = {"train": sorted(next(iter(found.values())))}
    left = tuple(name for name in found if name not in read)
    return Plan(kind, read or {"train": sorted(found[left[0]])}, config, left)

"""What to read of a repository of the Hub: configurations and splits, by its card or by names.

`hf:NAME[:CONFIG][@REVISION]`: a data set on the Hugging Face Hub, fetched once.

Its files go into the Hub's own cache and are then read like any others: parquet (the repository's
own, or what the Hub has made of it), WebDataset shards, or a folder of class folders. Code that
lies in a repository is never run.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from vitcli.data.readers.folder import IMAGE_SUFFIXES, load_folder
from vitcli.data.readers.parquet import read_parquet
from vitcli.data.readers.tar import NAMES_FILES, read_names, read_shards
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.data.splits import SPLIT_ALIASES, SPLIT_WORD, SPLITS, parse_slice
from vitcli.errors import VitcliError
from vitcli.hub.http import Unreachable, cannot_write
from vitcli.hub.repository import (
    Listing,
    Repository,
    fetch_big,
    fetch_small,
    list_files,
    parse,
    quiet,
)


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
        words = [SPLIT_WORD.search(part) for part in reversed(parts)]
        split = next((SPLIT_ALIASES[word[1]] for word in words if word), "")
        folders = [
            folder
            for folder in name.split("/")[:-1]
            if folder.lower() != "data" and not SPLIT_WORD.fullmatch(folder.lower())
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
        known = SPLIT_ALIASES.get(name.lower(), name)
        found.setdefault(known or "train", []).extend(files)
    read = {name: sorted(found[name]) for name in (*SPLITS, *wanted) if name in found}
    if not read and len(found) == 1:
        read = {"train": sorted(next(iter(found.values())))}
    left = tuple(name for name in found if name not in read)
    return Plan(kind, read or {"train": sorted(found[left[0]])}, config, left)


CARD = "README.md"
CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own parquet of a data set
AT_ONCE = 8  # small files


def plan_hub(request: DataRequest) -> tuple[Listing, Plan]:
    """What is to be read of a data set on the Hub, and nothing of it yet.

    Raises:
        VitcliError: as `load_hub`.
    """
    repository, config = parse_notation(request.notation)
    try:
        with quiet():
            return _planned(repository, config, request)
    except Unreachable as error:
        raise VitcliError(
            f"`{repository}` is not in the cache, and {error}",
            hint="unset HF_HUB_OFFLINE once to fetch it"
            if "OFFLINE" in str(error)
            else "see to the network (HTTPS_PROXY is honoured), or give data that is here",
        ) from error
    except OSError as error:
        raise cannot_write(str(repository), repository.folder, error) from error


def load_hub(request: DataRequest, without: str | None = None) -> Source:
    """A data set on the Hub; the notes name its commit.

    Args:
        request: what the user asked for.
        without: a split that is not fetched.

    Raises:
        VitcliError: no such data set, configuration or revision, no right to read it, nothing in
            it that is understood, no network and not all of it cached, a full disk.
    """
    listing, plan = plan_hub(request)
    if without is not None:
        rest = {split: names for split, names in plan.files.items() if split != without}
        plan = replace(plan, files=rest)
    try:
        with quiet():
            paths = {
                split: _fetch(listing, plan, names, request) for split, names in plan.files.items()
            }
    except OSError as error:
        raise cannot_write(request.shown, listing.repository.folder, error) from error
    notes = _notes(request, listing, plan)
    if plan.kind == "folder":
        source = _read_folder(request, listing, plan)
        source = replace(source, notes=(*notes, *source.notes))
    elif plan.kind == "parquet":
        source = read_parquet(request, paths, notes)
    else:
        names = hub_names(listing)
        source = read_shards(request, paths, notes, read_names(names) if names else None)
    record = {**source.splitting, "repository": listing.repository.name, "commit": listing.commit}
    return replace(source, splitting={**record, "config": plan.config} if plan.config else record)


def hub_names(listing: Listing) -> Path | None:
    """The file that names numbered classes, fetched; None where the repository has none."""
    name = next((name for name in NAMES_FILES if name in listing.files), None)
    return None if name is None else fetch_small(listing.repository, listing.commit, name)


def parse_notation(notation: str) -> tuple[Repository, str | None]:
    """`hf:NAME[:CONFIG][@REVISION]` -> (the repository, the configuration).

    Raises:
        VitcliError: the text names none.
    """
    named, at, revision = notation.removeprefix("hf:").partition("@")
    name, colon, config = named.partition(":")
    if colon and not config:
        raise VitcliError(f"`{notation}` names no configuration after `:`", "`hf:ORG/NAME:CONFIG`")
    return parse(f"hf:{name}{at}{revision}", "dataset"), config or None


def _planned(
    repository: Repository, config: str | None, request: DataRequest
) -> tuple[Listing, Plan]:
    """The revision to read from, and what of it."""
    listing = list_files(repository)
    files = listing.files
    wanted = _wanted(request)
    card = _card(listing) if CARD in files else []
    plan = choose(files, card, config, wanted, str(repository))
    if plan is None or plan.kind == "folder" or _has_script(files, repository):
        converted = _converted(repository, config, wanted)
        if converted is not None:
            return converted
    if plan is None:
        script = " and a script, which is never run" if _has_script(files, repository) else ""
        shown = ", ".join(f"`{name}`" for name in files[:6]) or "nothing"
        raise VitcliError(
            f"`{repository}` holds no images that are understood; it holds {shown}{script}",
            "parquet, WebDataset shards or class folders are; fetch others by hand and give a "
            "folder or a table",
        )
    return listing, plan


def _converted(
    repository: Repository, config: str | None, wanted: Sequence[str]
) -> tuple[Listing, Plan] | None:
    """The Hub's own parquet of the data set, if there is all of it; it is made of `main` alone."""
    if repository.revision != "main":
        return None
    try:
        listing = list_files(replace(repository, revision=CONVERTED))
    except (VitcliError, Unreachable):
        return None
    if any("partial-" in name for name in listing.files):
        return None
    plan = choose(listing.files, [], config, wanted, str(repository))
    return (listing, plan) if plan is not None and plan.kind == "parquet" else None


def _has_script(files: Sequence[str], repository: Repository) -> bool:
    return f"{repository.name.rpartition('/')[2]}.py" in files


def _wanted(request: DataRequest) -> tuple[str, ...]:
    """Names of splits that are read besides train, validation and test."""
    given = (request.settings.train_split, request.settings.test_split)
    return tuple(parse_slice(text).name for text in given if text is not None)


def _card(listing: Listing) -> list[Mapping[str, Any]]:
    """The configurations that the repository's card lists."""
    from huggingface_hub.repocard import metadata_load

    path = fetch_small(listing.repository, listing.commit, CARD)
    try:
        said = metadata_load(path) or {}
    except Exception:  # a card that is no YAML is one that says nothing
        return []
    configs = said.get("configs")
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _fetch(listing: Listing, plan: Plan, names: Sequence[str], request: DataRequest) -> list[Path]:
    """These files, in the cache."""
    repository, commit = listing.repository, listing.commit
    if plan.kind != "folder":
        return [fetch_big(repository, commit, name, request.watch) for name in names]
    paths = []
    with (
        request.watch.progress(f"{repository}, files", len(names)) as bar,
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        for path in threads.map(lambda name: fetch_small(repository, commit, name), names):
            paths.append(path)
            bar.advance()
    return paths


def _read_folder(request: DataRequest, listing: Listing, plan: Plan) -> Source:
    """Class folders in the cache; the fingerprint is of what is in them, not of where they lie."""
    names = plan.files["train"]
    root = listing.repository.folder / "snapshots" / listing.commit
    if all(name.startswith("data/") for name in names):
        root = root / "data"
    source = load_folder(replace(request, notation=str(root)))
    mark = fingerprint([source.fingerprint.encode()])
    notes = tuple(note.replace(str(root), request.shown) for note in source.notes)
    return replace(source, notation=request.shown, fingerprint=mark, notes=notes)


def _notes(request: DataRequest, listing: Listing, plan: Plan) -> list[str]:
    count = sum(map(len, plan.files.values()))
    what = f"configuration `{plan.config}`, " if plan.config else ""
    origin = " of the Hub's own parquet" if listing.repository.revision == CONVERTED else ""
    where = f", from the cache: {listing.offline}" if listing.offline else ""
    kind = {"parquet": "parquet files", "shards": "shards", "folder": "images"}[plan.kind]
    notes = [f"{request.shown}: commit {listing.commit}{origin}, {what}{count:,} {kind}{where}"]
    if plan.left:
        left = ", ".join(f"`{name}`" for name in plan.left)
        notes.append(f"{request.shown}: {left} left out; `--set data.train_split=NAME` takes one")
    return notes

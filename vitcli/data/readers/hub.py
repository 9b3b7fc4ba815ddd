"""`hf:NAME[:CONFIG][@REVISION]`: a dataset on the Hugging Face Hub, downloaded once.

Its files go to the Hub's cache and are then read like local files: parquet (of the repository, or
made of it by the Hub), WebDataset shards, or a folder of images with class
folders or a table such as `metadata.csv`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from vitcli.data.readers import READERS, find_reader, import_function
from vitcli.data.readers.parquet import read_parquet
from vitcli.data.readers.tar import NAMES_FILES, read_names, read_shards
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.data.splits import parse_slice
from vitcli.hub.client import cannot_write, quiet_hub, size_text
from vitcli.hub.datasets import CONVERTED, DatasetFiles, find_dataset
from vitcli.hub.repository import RepoFiles, fetch_file
from vitcli.hub.verified import VerifiedFiles
from vitcli.progress import Warnings

DOWNLOAD_THREADS = 8  # for images in class folders
NOTED_BYTES = 10**9  # a second or two of SHA-256


def find_files(request: DataRequest) -> tuple[RepoFiles, DatasetFiles]:
    """The commit and the files to read; raises as `find_dataset`."""
    given = (request.settings.train_split, request.settings.test_split)
    wanted = [parse_slice(text).name for text in given if text is not None]
    with quiet_hub():
        return find_dataset(request.notation, wanted)


def load_hub(request: DataRequest, without: str | None = None) -> Source:
    """A dataset on the Hub; the notes and the record name its commit.

    Args:
        request: the DATA request.
        without: a split that is not downloaded.

    Raises:
        VitcliError: as `find_dataset`, or a file cannot be downloaded or written.
    """
    repo_files, dataset = find_files(request)
    if without is not None:
        splits = {split: paths for split, paths in dataset.splits.items() if split != without}
        dataset = replace(dataset, splits=splits)
    repository = repo_files.repository
    notes = _notes(request, repo_files, dataset)
    try:
        with quiet_hub():
            files = {
                split: _download(repo_files, dataset.kind, paths, request)
                for split, paths in dataset.splits.items()
            }
            names = class_names_file(repo_files) if dataset.kind == "shards" else None
    except OSError as error:
        raise cannot_write(request.shown, repository.folder, error) from error
    if dataset.kind == "folder":
        source = _read_folder(request, repo_files, dataset)
        source = source.adjusted(lambda found: replace(found, notes=(*notes, *found.notes)))
    elif dataset.kind == "parquet":
        source = read_parquet(request, files, notes)
    else:
        source = read_shards(request, files, notes, read_names(names) if names else None)
    record = {"repository": repository.repo_id, "commit": repo_files.commit}
    record |= {"config": dataset.config} if dataset.config else {}
    return source.adjusted(lambda found: replace(found, splitting={**found.splitting, **record}))


def class_names_file(repo_files: RepoFiles) -> Path | None:
    """The file with the names of numbered classes, downloaded; None if there is none."""
    name = next((name for name in NAMES_FILES if name in repo_files.sizes), None)
    return None if name is None else fetch_file(repo_files, name)


def _download(
    repo_files: RepoFiles, kind: str, paths: Sequence[str], request: DataRequest
) -> list[Path]:
    with VerifiedFiles(repo_files.repository.folder) as verified:
        cached = {path: repo_files.snapshot / path for path in paths}
        new = [path for path, file in cached.items() if file.is_file() and file not in verified]
        if (size := sum(repo_files.sizes[path] or 0 for path in new)) > NOTED_BYTES:
            request.watch.note(
                f"{request.shown}: verifying the checksums of {len(new):,} files in the cache "
                f"({size_text(size)}), once"
            )
        if kind != "folder":
            return [
                fetch_file(repo_files, path, request.watch, verified=verified) for path in paths
            ]
        files, watch = [], Warnings(request.watch)
        with (
            request.watch.progress(f"{repo_files.repository}, files", len(paths)) as bar,
            ThreadPoolExecutor(DOWNLOAD_THREADS) as threads,
        ):
            fetch = partial(fetch_file, repo_files, watch=watch, verified=verified)
            for file in threads.map(fetch, paths):
                files.append(file)
                bar.advance()
        return files


def _read_folder(request: DataRequest, repo_files: RepoFiles, dataset: DatasetFiles) -> Source:
    """A folder in the cache; the fingerprint does not depend on the place of the cache."""
    root = repo_files.snapshot
    if all(path.startswith("data/") for path in dataset.splits["train"]):
        root = root / "data"
    load = import_function(READERS[find_reader(str(root))].load)
    source: Source = load(replace(request, notation=str(root)))

    def placeless(found: Source) -> Source:
        mark = fingerprint([found.fingerprint.encode()])
        notes, warnings = (
            tuple(note.replace(str(root), request.shown) for note in told)
            for told in (found.notes, found.warnings)
        )
        return replace(
            found, notation=request.shown, fingerprint=mark, notes=notes, warnings=warnings
        )

    return source.adjusted(placeless)


def _notes(request: DataRequest, repo_files: RepoFiles, dataset: DatasetFiles) -> list[str]:
    count = sum(map(len, dataset.splits.values()))
    kind = {"parquet": "parquet files", "shards": "shards", "folder": "images"}[dataset.kind]
    config = f", configuration `{dataset.config}`" if dataset.config else ""
    origin = " made by the Hub" if repo_files.repository.revision == CONVERTED else ""
    notes = [f"{request.shown}: {repo_files.note}{config}, {count:,} {kind}{origin}"]
    if dataset.ignored:
        ignored = ", ".join(f"`{name}`" for name in dataset.ignored)
        notes.append(
            f"{request.shown}: {ignored} not read; `--set data.train_split=NAME` reads a split"
        )
    return notes

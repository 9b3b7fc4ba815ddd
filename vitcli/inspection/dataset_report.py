"""The report of `vitcli check`: the problems of a dataset, with the images that have them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.data.contact_sheet import SheetRow, draw_sheet
from vitcli.data.scan import DatasetScan
from vitcli.data.source import Source
from vitcli.decode import ImageError
from vitcli.errors import VitcliError, printable
from vitcli.files import check_folder
from vitcli.pixels import PixelFormat, Window
from vitcli.report.page import (
    REPORT_FILE,
    Block,
    Facts,
    Gallery,
    Listed,
    Page,
    PageSection,
    Paragraph,
    Table,
    Thumbnail,
    provenance_section,
    thumbnail,
)

MAX_LISTED = 200  # groups or images in one table; `--json` has all of them
MAX_PICTURED = 8  # groups of each kind with thumbnails
GROUP_IMAGES = 4  # thumbnails of one group
SHEET_FILE = "samples.png"
REPORT_CLASSES, REPORT_SAMPLES = 30, 6  # in the report: classes, and images of each
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 8, 40, 112  # of the contact sheet; px
KINDS = {
    "label_conflicts": "Images that look the same, with different labels",
    "exact_duplicates": "Exact copies",
    "near_duplicates": "Images that look the same",
}

Show = Callable[[int], Thumbnail | None]
Groups = Mapping[str, Sequence[Sequence[int]]]


def dataset_page(
    facts: Mapping[str, Any],
    groups: Groups,
    source: Source,
    scan: DatasetScan,
    window: Window | None,
) -> Page:
    """The page of a checked dataset.

    Args:
        facts: the object of `check --json`.
        groups: rows of images that show the same: keys of `KINDS`, and `train -> test`.
        window: see `Preprocess`.
    """

    def show(row: int) -> Thumbnail | None:
        images, index = source.splits[scan.splits[int(scan.split[row])]], int(scan.index[row])
        try:
            image = images.read(index, mode=PixelFormat("RGB", window))
        except ImageError:  # removed since the scan
            return None
        label = f"{images.name}: {images.label_name(index)}"
        return thumbnail(image, [label], images.describe(index))

    samples = sample_rows(source, scan, REPORT_CLASSES, REPORT_SAMPLES)
    problems = facts["problems"]
    page = Page(f"Check of {facts['data']}", summary=f"{facts['images']:,} images.")
    page.headline = [
        ("images", f"{facts['images']:,}", _counts(facts["splits"])),
        ("classes", f"{len(facts['classes']):,}", ""),
        ("problems", f"{len(problems)}", "" if problems else "no problems found"),
    ]
    lines = Listed(problems) if problems else Paragraph("No problems found.")
    page.sections = [PageSection("Problems", [lines]), _data_section(facts)]
    leaks = {key: found for key, found in groups.items() if key not in KINDS}
    page.sections.append(PageSection("Leaks between splits", _leak_blocks(leaks, show)))
    for key, title in KINDS.items():
        found = groups.get(key, ())
        blocks = _group_blocks(found, show)
        count = Paragraph(f"{len(found):,} group{'s' * (len(found) != 1)} of images.")
        page.sections.append(PageSection(title, [count, *blocks] if blocks else []))
    page.sections += [*_listed_sections(facts), _class_section(facts)]
    galleries = [Gallery(name, _thumbnails(rows, show)) for name, rows in samples.items()]
    page.sections += [PageSection("Samples of the classes", galleries), provenance_section()]
    return page


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in splits.items())


def _data_section(facts: Mapping[str, Any]) -> PageSection:
    rows: list[tuple[str, Any]] = [("splits", _counts(facts["splits"]))]
    rows += [("layout", facts["layout"])] if facts["layout"] else []
    training = facts["training"]
    if "splits" in training:
        rows.append(("training uses", _counts(training["splits"])))
    for name in ("height", "width"):
        if found := facts[name]:
            rows.append(
                (name, f"{found['min']:,} to {found['max']:,} px, median {found['median']:,} px")
            )
    if found := facts["numbers"]:
        rows += [(f"numbers: {name}", f"{value:.6g}") for name, value in found.items()]
    if found := facts["samples"]:
        low, high = found["window"]
        rows.append(("samples", f"{found['bits']} bits, window {low:g} to {high:g}"))
    if found := facts["suggested"]:
        size, patch = found["image_size"], found["patch_size"]
        rows.append(("pretrain uses", f"image size {size} px, patch size {patch} px"))
    blocks: list[Block] = [Facts(rows)]
    if notes := list(dict.fromkeys([*facts["notes"], *training.get("notes", ())])):
        blocks.append(Listed(notes))
    return PageSection("Data and splits", blocks)


def _leak_blocks(leaks: Groups, show: Show) -> list[Block]:
    if not leaks:
        return [Paragraph("No image is in two splits.")]
    blocks: list[Block] = []
    for key, pairs in leaks.items():
        first, _, later = key.partition(" -> ")
        are = "images look" if len(pairs) > 1 else "image looks"
        blocks.append(Paragraph(f"{len(pairs):,} {later} {are} the same as {first} images."))
        blocks += _group_blocks(pairs, show)
    return blocks


def _group_blocks(groups: Sequence[Sequence[int]], show: Show) -> list[Block]:
    """Thumbnails of the first groups."""
    blocks: list[Block] = []
    for rows in groups[:MAX_PICTURED]:
        images = _thumbnails(rows[:GROUP_IMAGES], show)
        more = f" ({len(rows):,} images)" if len(rows) > GROUP_IMAGES else ""
        if images:
            blocks.append(Gallery(f"{images[0].short_path}{more}", images))
    if len(groups) > MAX_PICTURED:
        text = f"The first {MAX_PICTURED} of {len(groups):,} are shown. `--json` lists all of them."
        blocks.append(Paragraph(text))
    return blocks


def _thumbnails(rows: Sequence[int], show: Show) -> list[Thumbnail]:
    return [found for row in rows if (found := show(int(row))) is not None]


def _listed_sections(facts: Mapping[str, Any]) -> list[PageSection]:
    """Images that cannot be read, and images of odd sizes."""
    broken = [[one["path"], one["reason"]] for one in facts["unreadable"]]
    odd = [[path, "a side is very short"] for path in facts["tiny"]]
    odd += [[path, "the aspect ratio is very high"] for path in facts["odd_aspect"]]
    sections = []
    for title, rows in (("Unreadable images", broken), ("Odd sizes", odd)):
        blocks: list[Block] = [Table(["image", "reason"], rows[:MAX_LISTED])] if rows else []
        if len(rows) > MAX_LISTED:
            blocks.append(Paragraph(f"The first {MAX_LISTED} of {len(rows):,} are listed."))
        sections.append(PageSection(title, blocks))
    return sections


def _class_section(facts: Mapping[str, Any]) -> PageSection:
    splits = list(facts["splits"])
    rows = [
        [name, *(counts.get(split, 0) for split in splits)]
        for name, counts in facts["classes"].items()
    ]
    return PageSection("Classes", [Table(["class", *splits], rows)] if rows else [])


def sample_rows(
    source: Source, scan: DatasetScan, most_classes: int, most: int
) -> dict[str, list[int]]:
    """Class -> rows of up to `most` of its images in the first split, evenly spread."""
    found = {}
    for label, name in enumerate(source.classes[:most_classes]):
        members = np.flatnonzero((scan.split == 0) & (scan.label == label))
        found[name] = members[:: max(1, len(members) // most)][:most].tolist()
    return found


def draw_samples(
    source: Source, scan: DatasetScan, window: Window | None, title: str
) -> Image.Image:
    """A contact sheet of the first split with one row per class."""
    images = next(iter(source.splits.values()))
    rows = [
        SheetRow(printable(name), scan.index[chosen].tolist())
        for name, chosen in sample_rows(source, scan, SHEET_ROWS, SHEET_COLUMNS).items()
    ]
    read = partial(images.read, mode=PixelFormat("RGB", window))
    return draw_sheet(rows, read, columns=SHEET_COLUMNS, side=SHEET_SIDE, title=printable(title))


def output_files(out: Path | None) -> tuple[Path | None, Path | None]:
    """The files of the samples and of the report; a folder has both, a PNG file is the samples.

    Raises:
        VitcliError: `out` has the suffix of another file.
    """
    if out is None or out.suffix.lower() == ".png":
        return out, None
    if out.suffix and not out.is_dir():
        raise VitcliError(
            f"`--out {out}` is not a .png file and not a folder",
            "write `--out check` for a folder with a report, or `--out samples.png`",
        )
    check_folder(out)
    return out / SHEET_FILE, out / REPORT_FILE

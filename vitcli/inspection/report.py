"""The report of `vitcli inspect`: numbers, pictures, and one HTML page that contains them all.

Each `add_…` function turns the numbers of one topic into a section of the page, pictures, arrays
for `figures.npz` and facts for JSON. Nothing is written before `Report.write`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.files import make_folder, writing
from vitcli.inspection import drawing
from vitcli.inspection.attention import AttentionStatistics
from vitcli.inspection.attention_distance import uniform_distance, uniform_local_share
from vitcli.inspection.embeddings import (
    NO_POSITION_TABLE,
    cosine_similarity,
    embedding_filters,
    position_table,
    principal_components,
    similarity_means,
)
from vitcli.inspection.inductive_bias import BiasRow
from vitcli.report.charts import save_figure, to_svg
from vitcli.report.page import (
    REPORT_FILE,
    Block,
    Page,
    PageSection,
    Paragraph,
    Picture,
    Table,
    end_of_path,
    provenance_section,
)
from vitcli.vit import Network, VisionTransformer

ARRAYS_FILE, FACTS_FILE = "figures.npz", "inspect.json"


@dataclass
class Report:
    """Everything that the folder of a report contains.

    Attributes:
        arrays: name -> array of `figures.npz`.
        pictures: file name -> PNG.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    sections: list[PageSection] = field(default_factory=list)

    def add(
        self,
        title: str,
        text: str,
        pictures: Sequence[tuple[str, str, Any]] = (),
        table: Sequence[Sequence[Any]] = (),
    ) -> None:
        """Add a section; `pictures` are file name, caption, and a Pillow or matplotlib picture."""
        blocks: list[Block] = [Paragraph(text)]
        for name, caption, picture in pictures:
            file, is_image = io.BytesIO(), isinstance(picture, Image.Image)
            if is_image:
                picture.save(file, format="PNG", optimize=True)
            else:
                save_figure(picture, file)
            self.pictures[name] = file.getvalue()
            blocks.append(Picture(file.getvalue() if is_image else to_svg(picture, name), caption))
        if table:
            blocks.append(Table(table[0], table[1:], sortable=False))
        self.sections.append(PageSection(title, blocks))

    def files(self) -> list[str]:
        """The names of all files, the page first."""
        return [REPORT_FILE, FACTS_FILE, ARRAYS_FILE, *self.pictures]

    def write(self, folder: Path, facts: Mapping[str, Any], title: str, summary: str) -> None:
        """Write all files into `folder`, each atomically, the page last.

        Raises:
            VitcliError: `folder` cannot be written.
        """
        make_folder(folder)
        for name, content in self.pictures.items():
            with writing(folder / name) as temporary:
                temporary.write_bytes(content)
        with writing(folder / ARRAYS_FILE) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.arrays)
        with writing(folder / FACTS_FILE) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        page = Page(title, summary, sections=[*self.sections, provenance_section()])
        page.write(folder / REPORT_FILE)


@dataclass(frozen=True)
class ReportImage:
    """One image with pictures of its own.

    Attributes:
        name: in tables.
        stem: of its file names.
        image: the model input before normalisation.
        classes: `label`, `probability`, `top` and `truth` as in `add_rollout`.
    """

    name: str
    stem: str
    image: Image.Image
    classes: dict[str, Any]


def add_filters(report: Report, model: Network) -> dict[str, Any]:
    """Principal components of the filters that read pixels."""
    name, weights = embedding_filters(model)
    components = principal_components(weights)
    report.arrays |= {
        "filters": components.filters.numpy(),
        "filters_explained": components.explained.numpy(),
    }
    number, share = len(components.explained), float(components.explained.sum())
    picture = drawing.draw_filters(components.filters.numpy())
    report.add(
        "Filters",
        f"The {number} strongest principal components of the {len(weights)} filters of the {name} "
        f"(figure 7 left of the paper). They explain {100 * share:.1f} % of the variance. Filters "
        "of a trained model show smooth patterns, edges and colours. Untrained filters show noise.",
        [("filters.png", "principal components, the strongest first", picture)],
    )
    return {"of": name, "explained": components.explained.tolist()}


def add_positions(report: Report, model: VisionTransformer) -> dict[str, Any]:
    """Cosine similarity of the position embeddings."""
    config = model.config
    facts: dict[str, Any] = {"position": config.position, "grid": list(config.grid)}
    table = position_table(model)
    if table is None:
        reason = NO_POSITION_TABLE[config.position]
        report.add("Positions", f"Not available: {reason}.")
        return {**facts, "reason": reason}
    similarity = cosine_similarity(table)
    report.arrays["position_similarity"] = similarity.numpy()
    means = similarity_means(similarity, config.grid)
    known = {name.replace("_", " "): v for name, v in means.items() if v is not None}
    listed = ", ".join(f"{name} {value:+.2f}" for name, value in known.items())
    first = " (the table of the first block)" if config.position_at == "every" else ""
    picture = drawing.draw_similarity(similarity.numpy(), config.grid)
    report.add(
        "Positions",
        f"Cosine similarity of position embeddings{first} (figures 7 centre and 10). Each tile "
        "compares one patch position with all others. Bright means similar. Mean similarity: "
        f"{listed}.",
        [("positions.png", f"{config.position} positions of {len(table)} patches", picture)],
    )
    return {**facts, **means, "reason": None}


def add_attention_distance(
    report: Report, model: VisionTransformer, statistics: AttentionStatistics, names: Sequence[str]
) -> dict[str, Any]:
    """Mean attention distance of every head, over all images."""
    grid, patch = model.config.grid, model.config.pixels_per_patch
    pixels = patch * statistics.distance
    means = {
        "distance_patches": statistics.distance.mean(axis=0),
        "distance_unscaled_patches": statistics.unscaled.mean(axis=0),
        "distance_pixels": pixels.mean(axis=0),
        "distance_pixels_std": pixels.std(axis=0),
        "local_share": statistics.local.mean(axis=0),
        "prefix_share": statistics.prefix.mean(axis=0),
    }
    report.arrays |= means
    uniform = patch * uniform_distance(grid)
    rows = [["layer", "mean px", "nearest head px", "farthest head px", "inside 3x3 patches"]]
    pairs = zip(names, means["distance_pixels"], means["local_share"], strict=True)
    for name, line, share in pairs:
        distances = [f"{value:.0f}" for value in (line.mean(), line.min(), line.max())]
        rows.append([name, *distances, f"{100 * share.mean():.0f} %"])
    report.add(
        "Attention distance",
        "Mean distance between query and key patches in pixels, weighted by the attention, over "
        f"{len(statistics)} images (figures 7 right and 11). Uniform attention has a distance of "
        f"{uniform:.0f} px, with {100 * uniform_local_share(grid):.1f} % inside 3x3 patches. "
        "Class token and registers are excluded; the other weights are rescaled to sum to 1.",
        [
            (
                "distance.png",
                "mean attention distance of every head",
                drawing.plot_distances(means["distance_pixels"], uniform, names),
            )
        ],
        rows,
    )
    return {
        "layers": list(names),
        "patches": means["distance_patches"].tolist(),
        "unscaled_patches": means["distance_unscaled_patches"].tolist(),
        "pixels": means["distance_pixels"].tolist(),
        "pixels_std": means["distance_pixels_std"].tolist(),
        "uniform_pixels": uniform,
        "local_share": means["local_share"].tolist(),
        "uniform_local_share": uniform_local_share(grid),
        "prefix_share": means["prefix_share"].tolist(),
    }


def add_rollout(
    report: Report,
    model: VisionTransformer,
    statistics: AttentionStatistics,
    images: Sequence[ReportImage],
    source: str,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Attention rollout over each of the first images, and the maps of its layers and heads."""
    report.arrays |= {"rollout": statistics.rollout, "layer_maps": statistics.maps}
    facts = []
    for number, one in enumerate(images):
        rollout = statistics.rollout[number]  # (rows, cols)
        maps = statistics.maps[number]  # (L, H, rows, cols)
        image = drawing.enlarge(one.image)
        overlay = drawing.overlay_rollout(image, rollout, model.config.pixels_per_patch)
        heads = [f"head {i + 1}" for i in range(maps.shape[1])]
        pictures = {
            "rollout": (
                f"the image, and attention rollout from the {source}",
                drawing.hstack_images([image, overlay]),
            ),
            "layers": (
                f"attention of the {source} in each layer, mean of the heads (each tile has its "
                "own scale)",
                drawing.draw_maps(maps.mean(axis=1), names),
            ),
            "heads": ("the heads of the last layer", drawing.draw_maps(maps[-1], heads)),
        }
        files = {kind: f"{one.stem}-{kind}.png" for kind in pictures}
        report.add(
            end_of_path(one.name),
            describe_classes(one.classes),
            [(files[kind], *captioned) for kind, captioned in pictures.items()],
        )
        row, column = np.unravel_index(int(rollout.argmax()), rollout.shape)
        peak = [int(row), int(column)]
        facts.append(
            {"path": one.name, "source": source, "peak": peak, **one.classes, "files": files}
        )
    return facts


def describe_classes(classes: dict[str, Any]) -> str:
    """The predicted class of an image, and the rank of its true class, as a sentence."""
    if not classes["top"]:
        return "The model has no trained head, so it predicts no class."
    best, truth = classes["top"][0], classes["truth"]
    text = f"Rank 1: {best['label']}, {100 * best['probability']:.1f} %."
    if truth is not None and truth["label"] != best["label"]:
        text += f" True class: {truth['label']}, rank {truth['rank']}"
        text += f", {100 * truth['probability']:.1f} %."
    return text


def add_inductive_bias(report: Report, rows: Sequence[BiasRow], source: str) -> dict[str, Any]:
    """The table of equivariance and locality; `source` names the images."""
    found = rows[0].equivariance
    report.add(
        "Inductive bias",
        "How exactly does the feature map follow a shift of the image, and how local is the "
        f"attention? Measured on {found.images} images ({source}). R2 is the share of the variance "
        "within images that the shifted features of the first window explain in those of a shifted "
        "window: 1 is exact equivariance, 0 is no relation. Two controls compare the "
        "same places without a shift, and with another image. The inner half excludes places near "
        "the border, where convolutions see zeros. A ResNet reads images resampled so that its "
        "feature map has the cells of the model. `Inside 3x3` is the share of the attention on "
        "neighbouring patches. `--resnet` takes a trained ResNet.",
        table=bias_table(rows),
    )
    return {
        "images": found.images,
        "pictures": source,
        "shifts_pixels": list(found.shifts),
        "rows": [row.to_json() for row in rows],
    }


def bias_table(rows: Sequence[BiasRow]) -> list[list[str]]:
    """The head and the lines of the table as text, with a column for each network."""

    def r2(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def percent(share: float | None, missing: str = "all") -> str:
        # The convolutions of a ResNet see 3x3 cells and nothing else: all is local.
        return missing if share is None else f"{100 * share:.0f} %"

    def pixels(distance: float | None) -> str:
        return "-" if distance is None else f"{distance:.0f} px"

    found = [row.equivariance for row in rows]
    lines = [
        ["", *(row.name for row in rows)],
        ["parameters", *(f"{row.parameters / 1e6:.2f} M" for row in rows)],
        ["image size", *(f"{row.image_size[0]}x{row.image_size[1]} px" for row in rows)],
        ["cell size", *(f"{e.cell} px" for e in found)],
    ]
    for i, shift in enumerate(found[0].shifts):
        values = (r2(e.r2[i]) for e in found)
        cells = shift / found[0].cell
        lines.append([f"R2 at a shift of {cells:g} cell{'s' * (cells != 1)}", *values])
        lines.append(["  inner half", *(r2(e.inner[i]) for e in found)])
        lines.append(["  control: not moved", *(r2(e.unmoved[i]) for e in found)])
        lines.append(["  control: other image", *(r2(e.unrelated[i]) for e in found)])
    if any(row.local is not None for row in rows):
        lines += [
            ["inside 3x3, layer 1", *(percent(row.local_first) for row in rows)],
            ["inside 3x3, all layers", *(percent(row.local) for row in rows)],
            ["  uniform attention", *(percent(row.local_uniform, "-") for row in rows)],
            ["attention distance", *(pixels(row.distance) for row in rows)],
            ["  uniform attention", *(pixels(row.distance_uniform) for row in rows)],
        ]
    return lines

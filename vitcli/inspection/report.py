"""One HTML page with everything inside: it can be mailed, and opens without a network.

Everything that `vitcli inspect` found, as files of one folder.

From numbers to the chapters of `vitcli inspect`: arrays, pictures, text, and facts for JSON.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.errors import VitcliError, printable
from vitcli.files import replacing, write_text
from vitcli.inspection import drawing as draw
from vitcli.inspection.attention import Looked
from vitcli.inspection.attention_distance import uniform_distance, uniform_local
from vitcli.inspection.filters import embedding_filters, principal_components
from vitcli.inspection.inductive_bias import BiasRow
from vitcli.inspection.position_similarity import (
    NO_TABLE,
    cosine_similarity,
    position_table,
    similarity_facts,
)
from vitcli.vit import Network, VisionTransformer

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; background: #fff; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, pictures with captions, and a table whose first row is its head."""

    title: str
    text: str = ""
    pictures: Sequence[tuple[str, bytes]] = ()
    table: Sequence[Sequence[Any]] = field(default=())


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def figure_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1><p>{escaped(lead)}</p>",
        *(line for section in sections for line in _section(section)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    lines = [f"<section><h2>{escaped(section.title)}</h2>"]
    if section.text:
        lines.append(f"<p>{escaped(section.text)}</p>")
    for caption, content in section.pictures:
        data = base64.b64encode(content).decode("ascii")
        shown = escaped(caption)
        lines.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{shown}">'
            f"<figcaption>{shown}</figcaption></figure>"
        )
    if section.table:
        head, *rows = section.table
        lines.append("<table><thead>" + _row("th", head) + "</thead><tbody>")
        lines += [_row("td", row) for row in rows]
        lines.append("</tbody></table>")
    return [*lines, "</section>"]


def _row(tag: str, cells: Sequence[Any]) -> str:
    inside = "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"


def escaped(value: Any) -> str:
    """Text that stands for itself in HTML, on one line."""
    return html.escape(printable(str(value)))


NUMBERS, FACTS, PAGE = "figures.npz", "inspect.json", "index.html"


@dataclass
class Album:
    """Pictures, numbers and the sections of the page, put together before anything is written.

    Attributes:
        arrays: name -> array of `figures.npz`.
        pictures: file name -> PNG.
        sections: of the page.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def add(
        self,
        title: str,
        text: str,
        pictures: Sequence[tuple[str, str, Any]] = (),
        table: Sequence[Sequence[Any]] = (),
    ) -> None:
        """A section; `pictures` are file name, caption, and a Pillow picture or a figure."""
        shown = []
        for name, caption, picture in pictures:
            is_image = isinstance(picture, Image.Image)
            content = png(picture) if is_image else figure_png(picture)
            self.pictures[name] = content
            shown.append((caption, content))
        self.sections.append(Section(title, text, shown, table))

    def files(self) -> list[str]:
        """The names of all files, the page first."""
        return [PAGE, FACTS, NUMBERS, *self.pictures]

    def write(self, folder: Path, facts: Mapping[str, Any], title: str, lead: str) -> None:
        """All files into `folder`, each whole or not at all, the page last.

        Raises:
            VitcliError: they cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VitcliError(
                f"cannot make `{folder}`: {error.strerror}",
                hint="choose another place with `--out`",
            ) from error
        for name, content in self.pictures.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        with replacing(folder / NUMBERS) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.arrays)
        write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")
        write_text(folder / PAGE, page(title, lead, self.sections))


@dataclass(frozen=True)
class Shown:
    """One image that has pictures of its own.

    Attributes:
        name: what tables call it.
        stem: of its files.
        image: as the model reads it, before normalisation.
        answers: `top` and `truth` of `rollout_facts`.
    """

    name: str
    stem: str
    image: Image.Image
    answers: dict[str, Any]


def filters(album: Album, model: Network) -> dict[str, Any]:
    """Principal components of the filters that read pixels."""
    name, weights = embedding_filters(model)
    found = principal_components(weights)
    album.arrays |= {
        "filters": found.filters.numpy(),
        "filters_explained": found.explained.numpy(),
    }
    number, share = len(found.explained), float(found.explained.sum())
    album.add(
        "Filters",
        f"The {number} strongest principal components of the {len(weights)} filters of the {name} "
        f"(figure 7 left of the paper); they hold {100 * share:.1f} % of the variance. Trained "
        "filters are smooth, edges and colours; untrained ones are noise.",
        [("filters.png", "principal components, the strongest first", filter_picture(album))],
    )
    return {"of": name, "explained": found.explained.tolist()}


def filter_picture(album: Album, wanted: int = 64) -> Image.Image:
    """The components as tiles."""
    return draw.filter_tiles(album.arrays["filters"], wanted)


def positions(album: Album, model: VisionTransformer) -> dict[str, Any]:
    """Cosine similarity of the position embeddings."""
    config = model.config
    facts: dict[str, Any] = {"position": config.position, "grid": list(config.grid)}
    table = position_table(model)
    if table is None:
        reason = NO_TABLE[config.position]
        album.add("Positions", f"Nothing to show: {reason}.")
        return {**facts, "reason": reason}
    similarity = cosine_similarity(table)
    album.arrays["position_similarity"] = similarity.numpy()
    means = similarity_facts(similarity, config.grid)
    known = {name.replace("_", " "): v for name, v in means.items() if v is not None}
    said = ", ".join(f"{value:+.2f} {name}" for name, value in known.items())
    first = " (the table of the first block)" if config.position_at == "every" else ""
    picture = draw.similarity_tiles(similarity.numpy(), config.grid)
    album.add(
        "Positions",
        f"Cosine similarity of each position embedding with all others{first} (figures 7 centre "
        f"and 10): a tile is a place, its points are the other places, bright is alike. Means: "
        f"{said}.",
        [("positions.png", f"`{config.position}` positions of {len(table)} patches", picture)],
    )
    return {**facts, **means, "reason": None}


def distance(
    album: Album, model: VisionTransformer, looked: Looked, names: Sequence[str]
) -> dict[str, Any]:
    """Mean attention distance of every head, over all images."""
    grid, patch = model.config.grid, model.config.pixels_per_patch
    pixels = patch * looked.distance
    means = {
        "distance_patches": looked.distance.mean(axis=0),
        "distance_unscaled_patches": looked.unscaled.mean(axis=0),
        "distance_pixels": pixels.mean(axis=0),
        "distance_pixels_std": pixels.std(axis=0),
        "local_share": looked.local.mean(axis=0),
        "prefix_share": looked.prefix.mean(axis=0),
    }
    album.arrays |= means
    uniform = uniform_distance(grid)
    rows = [["layer", "mean", "nearest head", "farthest head", "inside 3x3 patches"]]
    pairs = zip(names, means["distance_pixels"], means["local_share"], strict=True)
    for name, line, share in pairs:
        pixels_of = [f"{value:.0f}" for value in (line.mean(), line.min(), line.max())]
        rows.append([name, *pixels_of, f"{100 * share.mean():.0f} %"])
    text = (
        "How far the heads look, in pixels: the distance between patches weighted by the "
        f"attention, over {len(looked)} images (figures 7 right and 11). Attention that is the "
        f"same everywhere comes to {patch * uniform:.0f}, with {100 * uniform_local(grid):.1f} % "
        "inside 3x3 patches. Class token and registers are left out, and the rest scaled to sum "
        "to 1."
    )
    figure = draw.distance_plot(means["distance_pixels"], patch * uniform, names)
    shown = [("distance.png", "mean attention distance of every head", figure)]
    album.add("Attention distance", text, shown, rows)
    return {
        "layers": list(names),
        "patches": means["distance_patches"].tolist(),
        "unscaled_patches": means["distance_unscaled_patches"].tolist(),
        "pixels": means["distance_pixels"].tolist(),
        "pixels_std": means["distance_pixels_std"].tolist(),
        "uniform_pixels": patch * uniform,
        "local_share": means["local_share"].tolist(),
        "uniform_local_share": uniform_local(grid),
        "prefix_share": means["prefix_share"].tolist(),
    }


def rollout(
    album: Album,
    model: VisionTransformer,
    looked: Looked,
    shown: Sequence[Shown],
    source: str,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Attention rollout over each shown image, and the maps of its layers."""
    album.arrays |= {"rollout": looked.rollout, "layer_maps": looked.maps}
    facts = []
    for number, one in enumerate(shown):
        rolled, maps = looked.rollout[number], looked.maps[number]  # (rows, cols), (L, H, …)
        image = draw.enlarged(one.image)
        over = draw.overlay(image, rolled, model.config.pixels_per_patch)
        heads = [f"head {i + 1}" for i in range(maps.shape[1])]
        files = {
            "rollout": f"{one.stem}-rollout.png",
            "layers": f"{one.stem}-layers.png",
            "heads": f"{one.stem}-heads.png",
        }
        album.add(
            one.name,
            caption(one.answers),
            [
                (files["rollout"], f"the image, and attention rollout from the {source}",
                 draw.beside([image, over])),
                (files["layers"], f"attention of the {source}, layer by layer, mean of the heads",
                 draw.map_tiles(maps.mean(axis=1), names)),
                (files["heads"], "the heads of the last layer", draw.map_tiles(maps[-1], heads)),
            ],
        )  # fmt: skip
        row, column = np.unravel_index(int(rolled.argmax()), rolled.shape)
        facts.append(
            {
                "path": one.name,
                "source": source,
                "peak": [int(row), int(column)],
                **one.answers,
                "files": files,
            }
        )
    return facts


def caption(answers: dict[str, Any]) -> str:
    """The classes of an image in words."""
    if not answers["top"]:
        return "The model has no trained head: no class."
    best, truth = answers["top"][0], answers["truth"]
    said = f"Rank 1: {best['label']}, {100 * best['probability']:.1f} %."
    if truth is not None and truth["label"] != best["label"]:
        said += f" Its class, {truth['label']}, has rank {truth['rank']}"
        said += f", {100 * truth['probability']:.1f} %."
    return said


def inductive_bias(album: Album, rows: Sequence[BiasRow], pictures: str) -> dict[str, Any]:
    """The table of equivariance and locality."""
    shifts = rows[0].moves.shifts
    text = (
        "Does the feature map move when the picture does, and how local is the attention? "
        f"Measured on {rows[0].moves.images} pictures ({pictures}). R2 compares the features of a "
        "window shifted by some pixels down and right with the shifted features of the first "
        "window: 1 is exact, 0 no better than the mean feature; in brackets against those of "
        "another picture. The inner half leaves out the places near the border, where convolutions "
        "see zeros. Inside 3x3 is the share of the attention that falls on neighbouring patches. "
        "In a ResNet with random weights border and depth decide; `--resnet` takes a trained one."
    )
    album.add("Inductive bias", text, (), bias_table(rows))
    return {
        "images": rows[0].moves.images,
        "pictures": pictures,
        "shifts_pixels": list(shifts),
        "rows": [row.to_json() for row in rows],
    }


def bias_table(rows: Sequence[BiasRow]) -> list[list[str]]:
    """Its head and lines as text: a column for each network."""
    lines = [
        ["", *(row.name for row in rows)],
        ["parameters", *(f"{row.parameters / 1e6:.2f} M" for row in rows)],
        ["cell of the map", *(f"{row.moves.cell} px" for row in rows)],
    ]
    moves = [row.moves for row in rows]
    for number, shift in enumerate(rows[0].moves.shifts):
        pairs = [(as_text(m.r2[number]), as_text(m.unrelated[number])) for m in moves]
        lines.append([f"R2, shifted {shift} px", *(f"{a} ({b})" for a, b in pairs)])
        lines.append(["  inner half", *(as_text(m.inner[number]) for m in moves)])
    if any(row.local is not None for row in rows):
        lines += [
            ["inside 3x3, layer 1", *(local(row.local_first) for row in rows)],
            ["inside 3x3, all layers", *(local(row.local) for row in rows)],
            ["  uniform attention", *(local(row.local_uniform, "-") for row in rows)],
            ["distance", *(far(row.distance) for row in rows)],
            ["  uniform attention", *(far(row.distance_uniform) for row in rows)],
        ]
    return lines


def as_text(value: float | None) -> str:
    """R2 with two decimals, a dash for none."""
    return "-" if value is None else f"{value:.2f}"


def local(share: float | None, without: str = "all") -> str:
    """A share of the attention; a ResNet's convolutions see 3x3 cells and nothing else."""
    return without if share is None else f"{100 * share:.0f} %"


def far(pixels: float | None) -> str:
    """A distance, a dash for none."""
    return "-" if pixels is None else f"{pixels:.0f} px"

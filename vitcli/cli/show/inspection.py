"""The results of `inspect` and `patchify` as tables and small pictures."""

import io
from typing import Any

from PIL import Image

from vitcli.cli import console as report
from vitcli.cli.console import print_facts, print_picture, print_table, show_path

MAX_PICTURES = 3  # images drawn on the terminal


def show_inspection(result: Any) -> None:
    """All results, in the order of the paper's figures."""
    facts = result.facts
    _show_weights(result)
    if facts["attention_distance"]:
        _show_distance(result)
        for one in facts["rollout"][:MAX_PICTURES]:
            _show_rollout(result, one)
    if result.bias_rows:
        from vitcli.inspection.report import bias_table

        head, *rows = bias_table(result.bias_rows)
        found = facts["inductive_bias"]
        print_table(f"inductive bias, {found['images']} images: {found['pictures']}", head, rows)
    show_path("page", result.out / "index.html")


def _show_weights(result: Any) -> None:
    """Filters and positions."""
    from vitcli.inspection.drawing import draw_filters

    facts, explained = result.facts, result.facts["filters"]["explained"]
    rows: list[tuple[str, Any]] = [
        ("image size", "x".join(map(str, facts["image_size"])) + " px"),
        ("images", f"{facts['images']}: {facts['data']}"),
        (
            "filters",
            f"{len(explained)} components of the {facts['filters']['of']} explain "
            f"{100 * sum(explained):.1f} % of the variance, the first {100 * explained[0]:.1f} %",
        ),
    ]
    if positions := facts["positions"]:
        names = {
            "neighbours": "neighbours",
            "same_row": "same row",
            "same_column": "same column",
            "far": "far",
        }
        values = [(name, positions.get(key)) for key, name in names.items()]
        listed = ", ".join(f"{name} {value:+.2f}" for name, value in values if value is not None)
        rows.append(("position similarity", positions["reason"] or listed))
    print_facts(result.model, rows)
    print_picture(draw_filters(result.report.arrays["filters"], 8))


def _show_distance(result: Any) -> None:
    """One line per layer, then the distances of all heads as a picture."""
    from vitcli.inspection.drawing import draw_distances

    found = result.facts["attention_distance"]
    rows = []
    columns = (found["pixels"], found["local_share"], found["prefix_share"])
    for name, distances, local, prefix in zip(found["layers"], *columns, strict=True):
        mean = sum(distances) / len(distances)
        shares = (f"{100 * sum(values) / len(values):.0f} %" for values in (local, prefix))
        rows.append(
            [name, f"{mean:.0f}", f"{min(distances):.0f}", f"{max(distances):.0f}", *shares]
        )
    uniform = [f"{found['uniform_pixels']:.0f}"] * 3
    rows.append(["uniform", *uniform, f"{100 * found['uniform_local_share']:.0f} %", ""])
    print_table(
        f"mean attention distance in px, {result.facts['images']} images",
        ["layer", "mean", "nearest head", "farthest", "in 3x3", "to class token"],
        rows,
    )
    distances = result.report.arrays["distance_pixels"]
    picture = draw_distances(distances, float(distances.max()))
    print_picture(picture.resize((2 * picture.width, 2 * picture.height), 0), 2 * picture.width)


def _show_rollout(result: Any, one: Any) -> None:
    """The classes of an image, and its attention rollout."""
    from vitcli.inspection.report import describe_classes

    row, column = one["peak"]
    rows: list[tuple[str, Any]] = [
        ("attention rollout", f"from the {one['source']}; maximum at row {row}, column {column}"),
        ("class", describe_classes(one)),
    ]
    print_facts(one["path"], rows)
    with Image.open(io.BytesIO(result.report.pictures[one["files"]["rollout"]])) as picture:
        print_picture(picture)


def show_patches(result: Any) -> None:
    """The image with its grid, and the facts about its patches."""
    if result.picture is not None:
        print_picture(result.picture)
    rows, cols = result.grid
    side = f"{result.patch_size}x{result.patch_size}"
    facts: list[tuple[str, Any]] = [
        ("image size", f"{result.image_size[0]}x{result.image_size[1]} px"),
        ("patches", f"{rows} x {cols} = {result.num_patches} tokens"),
        ("values per token", f"{side}x{result.num_channels} = {result.patch_dim}"),
    ]
    if result.splits:
        facts.append(("images", ", ".join(f"{n:,} {name}" for name, n in result.splits.items())))
        facts.append(("classes", len(result.classes)))
        total = sum(result.splits.values()) * result.num_patches
        facts.append(("total tokens", f"{total:,}"))
    if result.statistics:
        for name, values in result.statistics.to_json().items():
            unit = " bits" if name == "entropy" else ""
            spread = f"{values['min']:.1f} to {values['max']:.1f}{unit}"
            facts.append((f"patch {name}", f"{spread}, median {values['median']:.1f}"))
    size = f" ({result.stored_bytes / 2**20:,.0f} MiB)" if result.stored_bytes else ""
    for name, path, note in (
        ("comparison", result.comparison, ""),
        ("reconstruction", result.reconstruction, ""),
        ("picture", result.picture_path, ""),
        ("written to", result.out, size),
    ):
        if path is not None:
            facts.append((name, f"{path}{note}"))
    print_facts(result.source, facts)
    if result.kind == "image":
        _show_costs(result.costs)
    for note in result.notes:
        report.Terminal().note(note)


def _show_costs(costs: Any) -> None:
    """The cost of each patch size."""
    rows = [
        [
            f"{row['patch_size']}x{row['patch_size']}",
            f"{row['tokens']:,}",
            f"{row['token_values']:,}",
            f"{row['token_pairs']:,}",
            f"{row['attention_macs'] / 1e9:.2f}",
            f"{row['forward_macs'] / 1e9:.1f}",
        ]
        for row in costs
    ]
    columns = ["patch", "tokens", "values/token", "token pairs", "attention", "total"]
    title = "cost of each patch size in ViT-B, attention and total in 10^9 multiply-adds per image"
    print_table(title, columns, rows)

"""The results of `inspect` and `patchify` as tables and small pictures."""

import io
from typing import Any

from PIL import Image

from vitcli.cli import console as report
from vitcli.cli.console import print_facts, print_picture, print_table, show_next
from vitcli.errors import printable

MOST_IMAGES = 3  # drawn on the terminal


def show_inspection(result: Any) -> None:
    """What was found, in the order of the paper's figures."""
    facts = result.facts
    _show_weights(result)
    if facts["attention_distance"]:
        _show_distance(result)
        for one in facts["rollout"][:MOST_IMAGES]:
            _show_rollout(result, one)
    if result.bias_rows:
        from vitcli.inspection.report import bias_table

        head, *rows = bias_table(result.bias_rows)
        found = facts["inductive_bias"]
        title = f"inductive bias, {found['images']} pictures: {found['pictures']}"
        print_table(title, head, rows)
    show_next(f"open {printable(result.out / 'index.html')}")


def _show_weights(result: Any) -> None:
    """Filters and positions."""
    from vitcli.inspection.report import filter_picture

    facts, explained = result.facts, result.facts["filters"]["explained"]
    rows: list[tuple[str, Any]] = [
        ("image", "x".join(map(str, facts["image_size"]))),
        ("images looked at", f"{facts['images']}: {facts['data']}"),
        (
            "filters",
            f"{len(explained)} components of the {facts['filters']['of']} hold "
            f"{100 * sum(explained):.1f} % of the variance, the first {100 * explained[0]:.1f} %",
        ),
    ]
    if positions := facts["positions"]:
        said = positions["reason"] or ", ".join(
            f"{positions[key]:+.2f} {name}"
            for key, name in (
                ("neighbours", "to neighbours"),
                ("same_row", "in a row"),
                ("same_column", "in a column"),
                ("far", "far off"),
            )
            if positions[key] is not None
        )
        rows.append(("position similarity", said))
    print_facts(result.model, rows)
    print_picture(filter_picture(result.album, 8))


def _show_distance(result: Any) -> None:
    """Layers in lines: how far their heads look; and the same as blocks of colour."""
    from vitcli.inspection.drawing import distance_blocks

    found = result.facts["attention_distance"]
    rows = []
    columns = (found["pixels"], found["local_share"], found["prefix_share"])
    for name, far, local, prefix in zip(found["layers"], *columns, strict=True):
        mean = sum(far) / len(far)
        shares = (f"{100 * sum(values) / len(values):.0f} %" for values in (local, prefix))
        rows.append([name, f"{mean:.0f}", f"{min(far):.0f}", f"{max(far):.0f}", *shares])
    uniform = [f"{found['uniform_pixels']:.0f}"] * 3
    rows.append(["uniform", *uniform, f"{100 * found['uniform_local_share']:.0f} %", ""])
    title = f"mean attention distance in pixels, {result.facts['images']} images"
    columns_shown = ["layer", "mean", "nearest head", "farthest", "in 3x3", "to class token"]
    print_table(title, columns_shown, rows)
    distances = result.album.arrays["distance_pixels"]
    blocks = distance_blocks(distances, float(distances.max()))
    print_picture(blocks.resize((2 * blocks.width, 2 * blocks.height), 0), 2 * blocks.width)


def _show_rollout(result: Any, one: Any) -> None:
    """The classes of an image, and where the model looks."""
    from vitcli.inspection.report import caption

    row, column = one["peak"]
    rows: list[tuple[str, Any]] = [
        ("attention rollout", f"from the {one['source']}, most at row {row}, column {column}"),
        ("class", caption(one)),
    ]
    print_facts(one["path"], rows)
    with Image.open(io.BytesIO(result.album.pictures[one["files"]["rollout"]])) as picture:
        print_picture(picture)


def show_patches(result: Any) -> None:
    """The picture with its grid, and what the patches are."""
    if result.picture is not None:
        print_picture(result.picture)
    rows, cols = result.grid
    facts: list[tuple[str, Any]] = [
        ("image", f"{result.image_size[0]}x{result.image_size[1]} pixels"),
        ("patches", f"{rows} x {cols} = {result.num_patches} tokens"),
        (
            "a token",
            f"{result.patch_size}x{result.patch_size}x{result.num_channels}"
            f" = {result.patch_dim} values",
        ),
    ]
    if result.splits:
        facts.append(("images", ", ".join(f"{n:,} {name}" for name, n in result.splits.items())))
        facts.append(("classes", len(result.classes)))
        total = sum(result.splits.values()) * result.num_patches
        facts.append(("tokens in all", f"{total:,}"))
    if found := result.statistics:
        for name, unit in (("mean", ""), ("std", ""), ("entropy", " bits")):
            values = found.to_json()[name]
            said = " to ".join(f"{values[key]:.1f}" for key in ("min", "max"))
            facts.append((f"{name} of a patch", f"{said}{unit}, median {values['median']:.1f}"))
    if result.comparison is not None:
        facts.append(("side by side", result.comparison))
    if result.reconstruction is not None:
        facts.append(("put together", result.reconstruction))
    if result.picture_path is not None:
        facts.append(("picture", result.picture_path))
    if result.out is not None:
        size = f" ({result.stored_bytes / 2**20:,.0f} MiB)" if result.stored_bytes else ""
        facts.append(("written", f"{result.out}{size}"))
    print_facts(result.source, facts)
    if result.kind == "image":
        _show_costs(result.costs)
    for note in result.notes:
        report.Terminal().note(note)


def _show_costs(costs: Any) -> None:
    """What each patch size costs."""
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
    columns = ["patch", "tokens", "values each", "pairs", "for pairs", "in all"]
    print_table("cost by patch size; billions of multiply-adds of a ViT-B", columns, rows)

"""Pictures with any class names: the text is literal, and nothing is warned of."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vitcli.data.contact_sheet import SheetRow, draw_sheet
from vitcli.errors import printable
from vitcli.evals.plots import write_confusion
from vitcli.report.charts import save_figure

NAMES = [
    "$x_{$",
    "$5-$9",
    r"\frac{1}",
    "a_b^c",
    "犬😀",
    "كلب",
    "a\nb",
    "a\0b",
    "\ud800",
    "\udcff",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_any_name_is_drawn_as_it_is_written(name, tmp_path, monkeypatch):
    drawn = []
    draw = Text.draw
    monkeypatch.setattr(
        Text, "draw", lambda self, renderer: drawn.append(self) or draw(self, renderer)
    )
    with warnings.catch_warnings(action="error"):
        write_confusion(
            tmp_path / "c.csv", tmp_path / "c.png", [name, "b"], [name, "b"], np.eye(2, dtype=int)
        )
        draw_sheet(
            [SheetRow(printable(name), [0], [printable(name)])],
            lambda _: Image.new("RGB", (9, 9)),
            columns=1,
            side=40,
        )
    Image.open(tmp_path / "c.png").verify()
    mine = [text for text in drawn if text.get_text() == printable(name)]
    assert name == "" or len(mine) >= 2
    assert not any(text.get_parse_math() for text in mine)


def test_the_powers_of_a_logarithmic_axis_stay_formulas(tmp_path):
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(1, 1000)
    axes.set_yticks([0, 1], ["$x$", "$y$"])
    save_figure(figure, tmp_path / "f.png")
    assert all(label.get_parse_math() for label in axes.get_xticklabels())
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())

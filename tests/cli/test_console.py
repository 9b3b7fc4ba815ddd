"""What the user sees."""

import io
import json

import pytest
import typer
from PIL import Image
from rich.console import Console

from vitcli.cli import console as report
from vitcli.errors import VitcliError


@pytest.fixture
def screen(monkeypatch):
    """Both streams of a colour terminal, as one text."""
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, color_system="truecolor", width=80, highlight=False
    )
    monkeypatch.setattr(report, "out", console)
    monkeypatch.setattr(report, "err", console)
    return stream


def test_an_error_is_one_line_and_a_hint_another(capfd, monkeypatch):
    monkeypatch.setattr(report, "err", Console(stderr=True, highlight=False, width=40))
    report.print_error(VitcliError("a " * 60 + "\nb [red]x[/red]", "do this"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: a a") and lines[0].endswith("b [red]x[/red]")
    assert lines[1] == "hint: do this"


def test_lines_are_not_folded(capfd, monkeypatch):
    """Paths would be cut where they cannot be copied, and logs have lines of any length."""
    name = "a folder/" * 20
    for stream in ("out", "err"):
        monkeypatch.setattr(report, stream, Console(stderr=stream == "err", width=40))
    report.Terminal().note(name)
    report.Terminal().warn(name)
    report.show_next(f"vitcli predict image.jpg --model {name}")
    streams = capfd.readouterr()
    assert streams.err.splitlines() == [name, f"warning: {name}"]
    assert streams.out.splitlines() == [f"next: vitcli predict image.jpg --model {name}"]


def test_json_keeps_what_utf8_cannot_hold(capfd):
    report.print_json({"path": "a\udce9", "x": float("1e-7")})
    out = capfd.readouterr().out
    assert json.loads(out) == {"path": "a\udce9", "x": 1e-7}


def test_a_picture_has_two_pixel_rows_a_line(screen):
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 8, 4))
    report.print_picture(image, width=8)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.count("▀") == 8 for line in lines)
    assert "38;2;255;0;0" in lines[0] and "48;2;0;0;255" in lines[1]


def test_no_picture_without_colour(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(report, "out", Console(file=stream, force_terminal=True, no_color=True))
    report.print_picture(Image.new("RGB", (8, 4)))
    assert stream.getvalue() == ""


def test_no_live_bar_without_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr(report, "err", Console(stderr=True, highlight=False))
    monkeypatch.setattr(report, "PLAIN_SECONDS", 0.0)
    with report.Terminal().progress("train", 10, done=4) as bar:
        assert isinstance(bar, report.PlainBar)
        bar.advance(3, loss=1.25, accuracy=0.5, images_per_second=99.6)
    err = capfd.readouterr().err
    assert err == "train 7/10  70%  0:00 (0:00 left)  loss 1.250  train acc 50.0%  100 img/s\n"


def test_the_last_line_of_a_plain_bar_says_that_all_is_done(capfd, monkeypatch):
    monkeypatch.setattr(report, "err", Console(stderr=True, highlight=False))
    with report.PlainBar("train", 247, 0) as bar:
        monkeypatch.setattr(report, "PLAIN_SECONDS", 0.0)
        bar.advance(240)
        monkeypatch.setattr(report, "PLAIN_SECONDS", 20.0)
        bar.advance(8)
        bar.extend(248)
    with report.PlainBar("short", 2, 0) as bar:  # a short bar prints nothing
        bar.advance(2)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["train 240/247", "train 248/248"]


def test_unreadable_inputs_come_before_the_result(capfd):
    drawn = []
    with pytest.raises(typer.Exit) as left:
        report.show(3, False, drawn.append, "vitcli check x", (f"{name} is cut" for name in "ab"))
    shown = capfd.readouterr()
    assert left.value.exit_code == 3 and drawn == [3]
    assert shown.err.splitlines() == ["error: a is cut", "error: b is cut"]
    assert shown.out == "next: vitcli check x\n"


FIGURES = {"loss": 0.5123, "accuracy": 0.811, "images_per_second": 1124.4, "mfu": 0.37}
FIGURES |= {"validation_accuracy": 0.675, "validation_step": 11_000, "memory_mb": 1640.0}


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (
            200,
            "  loss 0.512  train acc 81.1%  validation 67.5% at step 11,000  1124 img/s  MFU 37%"
            "  1,640 MB",
        ),
        (80, "  loss 0.512  train acc 81.1%"),
        (50, ""),
    ],
)
def test_a_progress_line_begins_with_what_matters(width, figures):
    """100 of 400,000 steps were done before; 12,000 in the hour since."""
    line = report.progress_text("train", 12_100, 400_000, 100, 3600, FIGURES, width)
    assert line == "train 12100/400000  3%  1:00:00 (32:19:30 left)" + figures
    assert len(line) <= width


def test_a_progress_line_without_a_known_length():
    assert report.progress_text("read", 7, None, 0, 61.2, {}, 80) == "read 7  1:01"
    assert report.progress_text("read", 10, 10, 0, 5, {}, 80) == "read 10/10  100%  0:05"
    assert report.progress_text("train", 4, 10, 4, 5, {}, 80) == "train 4/10  40%  0:05"


def test_a_live_bar_on_a_terminal(screen):
    with report.Terminal().progress("train", 10) as bar:
        assert isinstance(bar, report.LiveBar)
        bar.advance(5, loss=0.5)
    assert "train" in screen.getvalue() and "loss 0.500" in screen.getvalue()


def test_markup_in_names_is_text(screen):
    report.print_table("t", ["a", "b"], [["[bold]x[/bold]", 3]])
    assert "[bold]x[/bold]" in screen.getvalue()

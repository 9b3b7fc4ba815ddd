"""The HTML report: well-formed, self-contained, its text escaped, and legible in a browser."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.pages import check_page
from support.watching import Told

from vitcli.evals.mistakes import Mistakes
from vitcli.evals.report import confusion_section, mistakes_section
from vitcli.report.charts import new_figure, to_svg
from vitcli.report.page import (
    Cell,
    Charts,
    Code,
    Facts,
    Gallery,
    Listed,
    Matrix,
    Page,
    PageSection,
    Paragraph,
    Picture,
    Table,
    command_line,
    provenance_section,
    thumbnail,
    write_report,
)

HOSTILE = "</style></script><script>document.title='hacked'</script><img src=http://x.y/z>`\x1b\""
NAMES = [HOSTILE, "$x_{$", "犬😀", "كلب", "a\0b\n", "' onclick='x", "a--b<!--", "\udcff"]


def chart(name):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], label=name)
    axes.set_title(name)
    axes.legend()
    return to_svg(figure, name)


def everything(name):
    """A page with every kind of block, all with this text in every place."""
    small = Image.new("RGB", (8, 8), "red")
    blocks = [
        Paragraph(name),
        Listed([name]),
        Facts([(name, name)]),
        Table([name, "n"], [[name, 2], [name, Cell(name, 1.5)], [name, None]]),
        Matrix([name, "b"], [name, "b"], [[1, 2], [0, 4]], [[0.3, 0.7], [0, 1]]),
        Charts([Picture(chart(name), name), Picture(chart("b"), name)]),
        Picture(b"\x89PNG", name),
        Gallery(
            name, [thumbnail(small, [name], name), thumbnail(small.resize((99, 80)), [], name)]
        ),
        Code(name),
    ]
    folded = PageSection(name, blocks, folded=True)
    facts = {"argv": ["vitcli", name], "vitcli": name, "libraries": {name: name}}
    sections = [PageSection(name, blocks[:5]), folded, provenance_section(facts)]
    return Page(name, name, [(name, name, name)], sections)


@pytest.mark.parametrize("name", NAMES)
def test_any_text_stays_text(name):
    text = everything(name).render()
    text.encode()
    shown = name.replace("`", "")
    page = check_page(text.replace("&#96;", "").replace("`", ""))
    assert text.count("<script") == 1 and "<img src=http" not in text and "\x1b" not in text
    assert "\0" not in text and len(page.headings) == 3
    if shown.isprintable():
        assert page.text.count(shown) >= 15


def test_words_in_backticks_are_code():
    text = Page("t", "write `vitcli <x>` now, and a single ` stays").render()
    assert "`" in text and "<code>" not in text  # without a partner
    assert "write <code>vitcli &lt;x&gt;</code> now" in Page("t", "write `vitcli <x>` now").render()


def test_charts_follow_the_colours_of_the_page():
    svg = chart("a #ffffff")
    assert "currentColor" in svg and "var(--" in svg and ">a #ffffff</text>" in svg
    assert "<?xml" not in svg and "<style" not in svg and "id=" in svg


def test_a_table_has_numbers_to_sort_by():
    table = Table(["class", "accuracy", "images"], [["b", Cell("50 %", 0.5), 1200], ["a", None, 3]])
    text = Page("t", sections=[PageSection("s", [table])]).render()
    assert '<td class="number" data-value="0.5">50 %</td>' in text
    assert '<td class="number" data-value="1200">1,200</td>' in text and "<td>-</td>" in text


def test_of_many_classes_the_most_confused_are_shown():
    confusion = np.diag(np.full(50, 10))
    confusion[7, 31] = 5
    confusion[40, 2] = 4
    names = [f"class {k}" for k in range(50)]
    text, matrix = confusion_section(confusion, names, names).blocks
    assert len(matrix.rows) == 20 and {"class 7", "class 31", "class 40", "class 2"} < {
        *matrix.rows
    }
    row, column = matrix.rows.index("class 7"), matrix.columns.index("class 31")
    assert matrix.counts[row][column] == 5 and matrix.shares[row][column] == pytest.approx(1 / 3)
    assert "20 of 50 classes that are confused most, with 9 of all 9 mistakes" in text.text


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("a.png", "a.png"),
        ("photos/test/cat/1.png", "cat/1.png"),
        ("row 17 of /data/sets/test.parquet", "row 17 of sets/test.parquet"),
        ("image 3 of x.npz", "image 3 of x.npz"),
    ],
)
def test_the_path_under_a_thumbnail(path, short):
    assert thumbnail(Image.new("L", (4, 4)), [], path).short_path == short


def test_without_mistakes_there_are_no_pictures():
    (block,) = mistakes_section(Mistakes((), (), 0), None, {}).blocks
    assert block.text == "There is no mistake."


def test_a_report_that_fails_leaves_the_old_one_and_a_warning(tmp_path):
    path, watch = tmp_path / "report.html", Told()
    write_report(path, lambda: Page("old"), watch)
    old = path.read_bytes()
    write_report(path, lambda: 1 / 0, watch)
    assert path.read_bytes() == old and len(watch.warnings) == 1
    write_report(tmp_path / "none/report.html", lambda: Page("t"), watch)
    assert "is not written" in watch.warnings[1] and sorted(tmp_path.iterdir()) == [path]


def test_the_command_is_one_that_can_be_typed():
    assert command_line(["/usr/bin/vitcli", "check", "my photos"]) == "vitcli check 'my photos'"
    assert command_line(["/x/vitcli/__main__.py", "plan"]) == "vitcli plan"
    assert command_line(None) == "vitcli"


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PROBE = """<!doctype html><title>{scheme}</title>
<iframe src="{url}" style="border:0;width:{width}px;height:900px"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
  const button = page.querySelectorAll(".sortable th button")[1];
  button.click();
  const rows = [...page.querySelector(".sortable").tBodies[0].rows];
  document.body.textContent = JSON.stringify({{
    title: page.title, width: page.documentElement.scrollWidth,
    order: rows.map(row => row.cells[1].textContent),
    paper: view.getComputedStyle(page.body).backgroundColor,
    ink: view.getComputedStyle(page.querySelector("svg text")).fill,
    text: view.getComputedStyle(page.body).color,
  }});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_a_browser_shows_the_page(width, scheme, tmp_path):
    """No script of the user runs, the table sorts, nothing is wider than the screen."""
    page = everything(HOSTILE)
    page.title = "report"
    page.sections[1] = PageSection("charts", page.sections[1].blocks)
    page.write(tmp_path / "report.html")
    url = (tmp_path / "report.html").as_uri()
    (tmp_path / "probe.html").write_text(PROBE.format(scheme=scheme, url=url, width=width))
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--virtual-time-budget=5000", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert found["title"] == "report" and found["width"] <= width
    assert found["order"][1] == "2" and found["order"][2] == "-"  # 1.5, 2, and no number last
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    assert found["paper"] == (dark if scheme == "dark" else light)
    assert found["ink"] == found["text"] != found["paper"]

"""The files that GitHub, Docker and people who cite the project read."""

import fnmatch
import re
import runpy
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from vitcli import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == __version__ == read("CITATION.cff")["version"]
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert not released or released[0] == __version__


def test_the_citation_has_what_its_format_requires():
    """CITATION.cff 1.2.0 requires these keys, and a title and authors for each reference."""
    found = read("CITATION.cff")
    assert found["cff-version"] == "1.2.0" and found["license"] == PROJECT["license"]
    assert found["message"] and found["title"] and found["authors"]
    assert all(one["title"] and one["authors"] and one["type"] for one in found["references"])


def test_the_tests_run_on_every_version_of_python_that_the_package_takes():
    job = read(".github/workflows/tests.yml")["jobs"]["tests"]
    versions = job["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == PROJECT["requires-python"] and len(versions) == 3
    assert job["steps"][-1]["run"] == ".ci/run"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_the_least_rights_and_a_limit(path):
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["permissions"] == {"contents": "read"}
    for job in found["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
        else:
            assert job["timeout-minutes"] <= 90


def test_only_a_tag_publishes_and_without_a_password():
    text = (ROOT / ".github/workflows/publish.yml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    assert found[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    assert found["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets" not in text


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_asks_for_the_machine(name):
    found = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert found["name"] and found["description"]
    asked = [field["attributes"] for field in found["body"]]
    assert all(one["label"] for one in asked) and len(asked) <= 3
    assert any("vitcli doctor --json" in one.get("description", "") for one in asked)


def test_docker_gets_each_file_that_it_copies():
    """`.dockerignore` leaves everything out except for the lines with `!`."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    names = [name for line in copied for name in line if not name.startswith("--")]
    names = [name for name in names if not name.startswith("/")]
    assert ignored[0] == "*" and sorted(names) == sorted(kept)
    assert all((ROOT / name).exists() for name in names)
    users = re.findall(r"^USER (\S+)", text, flags=re.M)
    assert users and users[-1] != "root" and 'ENTRYPOINT ["vitcli"]' in text


def test_a_wheel_without_a_recipe_is_refused(tmp_path):
    script = runpy.run_path(str(ROOT / ".ci/check_wheel.py"))
    names = script["expected"]()
    assert fnmatch.filter(names, "vitcli/_recipes/paper/*.toml") and "vitcli/py.typed" in names
    for missing in (None, "vitcli/_recipes/finetune.toml"):
        with ZipFile(tmp_path / "a.whl", "w") as archive:
            for name in names - {missing}:
                archive.writestr(name, "")
        if missing is None:
            script["main"](str(tmp_path / "a.whl"))
        else:
            with pytest.raises(SystemExit, match=r"lacks vitcli/_recipes/finetune\.toml"):
                script["main"](str(tmp_path / "a.whl"))

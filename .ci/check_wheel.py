"""Check that a wheel holds every data file of the package and every recipe."""

import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
SKIPPED = ("__pycache__", ".pyc")


def expected() -> set[str]:
    """The names that the wheel must hold."""
    names = set()
    for folder, inside in (("vitcli", "vitcli"), ("recipes", "vitcli/_recipes")):
        for path in (ROOT / folder).rglob("*"):
            name = f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
            if path.is_file() and not any(part in name for part in SKIPPED):
                names.add(name)
    return names


def main(wheel: str) -> None:
    """Exit with the names that are missing, if there are any."""
    with ZipFile(wheel) as archive:
        missing = sorted(expected() - set(archive.namelist()))
    if missing:
        sys.exit(f"{wheel} lacks {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1])

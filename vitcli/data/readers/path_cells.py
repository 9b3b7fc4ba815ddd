"""The path column of a table: paths of this or another machine, URLs and bare identifiers."""

import re
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from vitcli.config.schema import DataSection
from vitcli.data.readers.folder import is_image_name
from vitcli.data.readers.table_text import is_image_text
from vitcli.decode import IMAGE_SUFFIXES
from vitcli.errors import VitcliError, printable

MAX_FOLDERS = 200  # that are searched for the images, for a hint
WINDOWS_PATH = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)


class PathCells:
    """Cells of a path column -> paths relative to the root, or absolute.

    Args:
        table: the table; its folder is the root unless `data.image_root` is set.
        settings: `image_root` and `image_suffix`.
    """

    def __init__(self, table: Path, settings: DataSection) -> None:
        self.table, self.given = table, settings.image_root
        self.root = table.parent if self.given is None else Path(self.given).expanduser()
        if self.given is not None and not self.root.is_dir():
            beside = table.parent / self.root
            if not beside.is_dir():
                raise VitcliError(
                    f"`data.image_root` = `{printable(self.given)}` is not a folder",
                    "give the folder that the paths of the table start from",
                )
            self.root = beside
        suffix = settings.image_suffix or ""
        self.suffix = suffix if suffix.startswith(".") or not suffix else f".{suffix}"

    def __call__(self, cell: Any) -> str:
        """The path.

        Raises:
            VitcliError: the cell is a URL, and no root is given in which the file can be.
        """
        text = path_text(cell)
        if text.startswith("file:"):
            text = url2pathname(urlsplit(text).path)
        elif "://" in text:
            if self.given is None:
                raise VitcliError(
                    f"`{printable(self.table)}` lists URLs such as `{printable(text)}`, which are "
                    "not downloaded",
                    "download the images into one folder, for example with `wget -i URLS.txt -P "
                    "FOLDER`, and add `--set data.image_root=FOLDER`",
                )
            text = unquote(urlsplit(text).path).rpartition("/")[2]
        elif text.startswith("~/"):
            text = str(Path(text).expanduser())
        if self.suffix and not is_image_name(text.rpartition("/")[2]):
            text += self.suffix
        if "\\" in text and not (self.root / text).exists():  # a table from Windows
            text = text.replace("\\", "/")
        moved = self.given is not None and (text.startswith("/") or WINDOWS_PATH.match(text))
        return self._below_root(text) if moved and not Path(text).exists() else text

    def exists(self, cell: Any) -> bool:
        text = path_text(cell)
        if not text or ("://" in text and not text.startswith("file:") and self.given is None):
            return is_image_text(text)
        try:
            return (self.root / self(cell)).is_file()
        except (OSError, ValueError):
            return False

    def _below_root(self, text: str) -> str:
        """An absolute path of another machine: its longest end that exists below the root."""
        parts = PureWindowsPath(text).parts[1:]
        ends = ("/".join(parts[first:]) for first in range(len(parts)))
        return next((end for end in ends if (self.root / end).is_file()), text)

    def where(self, cell: Any) -> str | None:
        """The settings with which the image of a cell is found near the table, or None."""
        text = path_text(cell).replace("\\", "/")
        folders = [self.root]
        for folder in folders:
            if len(folders) > MAX_FOLDERS:
                break
            folders += sorted(sub for sub in folder.iterdir() if sub.is_dir())[:MAX_FOLDERS]
        names = dict.fromkeys((text.lstrip("/"), text.rpartition("/")[2]))
        for folder in folders:
            for name in names:
                for suffix in ("", *sorted(IMAGE_SUFFIXES), ".JPG", ".JPEG", ".PNG"):
                    if name and (folder / f"{name}{suffix}").is_file():
                        found = [] if folder == self.root else [f"image_root={printable(folder)}"]
                        found += [f"image_suffix={suffix}"] if suffix else []
                        return " ".join(f"--set data.{one}" for one in found) or None
        return None


def path_text(cell: Any) -> str:
    """A path cell as text without blanks around it; its bytes stay as they are."""
    return "" if cell is None else str(cell).strip()

"""Everything that `vitcli inspect` found, as files of one folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.errors import VitcliError
from vitcli.files import replacing, write_text
from vitcli.look.page import Section, figure_png, page, png

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

"""The load report, which says how each tensor of a weights file was loaded."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vitcli.progress import Watcher

if TYPE_CHECKING:
    from vitcli.weights.loaded import LoadedModel

TensorStatus = Literal["loaded", "resampled", "new", "dropped"]

UNNAMED = "outputs have no names"  # a note of `read`, which a new head makes pointless


@dataclass
class LoadReport:
    """The report on the loading of a model.

    Attributes:
        source: the MODEL that the user named.
        layout: `vitcli`, `timm`, `huggingface`, `google`, or `variant` for random weights.
        status: tensor name -> (`loaded`, `resampled`, `new` or `dropped`; the reason or the sizes).
        notes: assumptions about facts that the file does not state, one line each.
        shapes: tensor name -> shape in the file, if the reader knows it.
    """

    source: str
    layout: str
    status: dict[str, tuple[TensorStatus, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def names(self, status: TensorStatus) -> list[str]:
        """Return the names of the tensors with this status."""
        return [name for name, (found, _) in self.status.items() if found == status]

    def line(self) -> str:
        """Return one line: the number of tensors loaded, and the names of all other tensors."""
        if not self.names("loaded"):
            return f"{len(self.names('new'))} tensors new ({self.layout})"
        parts = [f"{len(self.names('loaded'))} tensors loaded ({self.layout})"]
        for status in ("resampled", "new", "dropped"):
            if names := self.names(status):
                shown = ", ".join(f"{n} ({self.status[n][1]})" for n in names[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{status}: {shown}{more}")
        return "; ".join(parts)

    def provenance(self) -> dict[str, Any]:
        """Return facts for provenance.json; the notes include the commit of a Hub repository."""
        return {"name": self.source, "layout": self.layout, "notes": self.notes}

    def table(self, model: "LoadedModel") -> list[str]:
        """Return a line for each tensor of the file and the model: status, name, shape, reason."""
        now = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        rows = []
        for name, (status, reason) in self.status.items():
            before, after = self.shapes.get(name), now.get(name)
            shape = before if status == "dropped" else after
            if status == "new" and before is not None:
                reason = f"{reason}, replaces {_sides(before)}"
            if status == "resampled" and before is not None:
                reason = f"{reason}; {_sides(before)} in the file"
            rows.append((status, name, _sides(shape) if shape is not None else "", reason))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        return [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]


def note_load_report(
    model: "LoadedModel", watch: Watcher, *, verbose: bool = False, new_head: bool = False
) -> None:
    """Write notes and a summary of the load report.

    Args:
        verbose: add a line for each tensor.
        new_head: the head of the file was replaced, so its class names do not matter.
    """
    report = model.load_report
    if report is None:
        return
    notes = [line for line in report.notes if not (new_head and UNNAMED in line)]
    for line in [*notes, report.line(), *(report.table(model) if verbose else ())]:
        watch.note(line)


def _sides(shape: tuple[int, ...]) -> str:
    """(192, 3, 16, 16) -> `192x3x16x16`."""
    return "x".join(map(str, shape)) or "scalar"

"""The report of a load: what became of every tensor of a weights file."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vitcli.progress import Watcher

if TYPE_CHECKING:
    from vitcli.weights.loaded import LoadedModel

Fate = Literal["loaded", "resampled", "new", "dropped"]


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        source: the MODEL that was asked for.
        layout: `vitcli`, `timm`, `huggingface`, `google`, or `variant` for random weights.
        fates: tensor name -> (`loaded`, `resampled`, `new` or `dropped`; the reason or sizes).
        notes: what was assumed, one line each.
        shapes: tensor name -> its shape in the file, as far as the reader names it.
    """

    source: str
    layout: str
    fates: dict[str, tuple[Fate, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def names(self, fate: Fate) -> list[str]:
        """The tensors that met with `fate`."""
        return [name for name, (met, _) in self.fates.items() if met == fate]

    def line(self) -> str:
        """One line: how many tensors of each kind, those not loaded as they were by name."""
        if not self.names("loaded"):
            return f"{len(self.names('new'))} tensors new ({self.layout})"
        parts = [f"{len(self.names('loaded'))} tensors loaded ({self.layout})"]
        for fate in ("resampled", "new", "dropped"):
            if names := self.names(fate):
                shown = ", ".join(f"{n} ({self.fates[n][1]})" for n in names[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{fate}: {shown}{more}")
        return "; ".join(parts)

    def provenance(self) -> dict[str, Any]:
        """What a run writes down about its weights: with a Hub's commit among the notes."""
        return {"name": self.source, "layout": self.layout, "notes": self.notes}

    def table(self, model: "LoadedModel") -> list[str]:
        """A line for every tensor of file and model: fate, name, shape, and what is to be said."""
        now = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        rows = []
        for name, (fate, reason) in self.fates.items():
            before, after = self.shapes.get(name), now.get(name)
            shape = before if fate == "dropped" else after
            if fate == "new" and before is not None:
                reason = f"{reason}, in place of {_sides(before)}"
            if fate == "resampled" and before is not None:
                reason = f"{reason}; {_sides(before)} in the file"
            rows.append((fate, name, _sides(shape) if shape is not None else "", reason))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        return [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]


def tell_load(model: "LoadedModel", watch: Watcher, *, verbose: bool = False) -> None:
    """How `model` was loaded: what was assumed, and one line in all, or one for every tensor."""
    report = model.load_report
    if report is None:
        return
    for line in [*report.notes, report.line(), *(report.table(model) if verbose else ())]:
        watch.note(line)


def _sides(shape: tuple[int, ...]) -> str:
    """(192, 3, 16, 16) -> `192x3x16x16`."""
    return "x".join(map(str, shape)) or "scalar"

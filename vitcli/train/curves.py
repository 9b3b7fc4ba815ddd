"""`curves.png`: loss, accuracy and learning rate of a run."""

from vitcli.files import replacing
from vitcli.run import Run

PANELS = {
    "loss": ("train/loss", "test/loss"),
    "accuracy": ("train/accuracy", "test/accuracy"),
    "mean average precision": ("test/map",),
    "learning rate": ("lr",),
}


def draw_curves(run: Run) -> None:
    """Draw the run's records into curves.png; a panel whose figures do not exist is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = run.records()
    panels = {
        title: names
        for title, names in PANELS.items()
        if any(name in record for record in records for name in names)
    }
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                marker = "o" if name.startswith("test/") else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker, linewidth=1.5)
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with replacing(run.path / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)

"""The files of an evaluation: the confusion matrix, the reliability diagram, the mistakes."""

from pathlib import Path

from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError
from vitcli.evals.evaluation import Evaluation
from vitcli.evals.mistakes import mistakes_sheet
from vitcli.evals.pictures import MOST_DRAWN, write_confusion, write_reliability
from vitcli.files import replacing

CONFUSION = "confusion.csv"


def files_of(result: Evaluation, folder: Path) -> dict[str, str]:
    """What there will be in `folder`: `confusion` …, as `Evaluation.files` has it."""
    names = {"confusion": CONFUSION, "reliability": "reliability.png"}
    if len(result.classes) <= MOST_DRAWN:
        names["confusion_picture"] = "confusion.png"
    if result.mistakes.worst:
        names["mistakes"] = "mistakes.png"
    return {key: str(folder / name) for key, name in names.items()}


def make_folder(folder: Path) -> None:
    """Raises a VitcliError where `folder` cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{folder}`: {error.strerror}", hint="choose another place with `--out`"
        ) from error


def write_files(result: Evaluation, images: ImageSet) -> None:
    """Write `result.files`, whose folder is there.

    Raises:
        VitcliError: they cannot be written.
    """
    files = {key: Path(name) for key, name in (result.files or {}).items()}
    write_confusion(
        files["confusion"],
        files.get("confusion_picture"),
        result.classes,
        result.columns,
        result.confusion,
        result.words,
    )
    diagrams = [("calibrated", result.reliability, result.metrics.ece)]
    calibration = result.calibration
    if calibration is None:
        diagrams = [(result.split, result.reliability, result.metrics.ece)]
    elif result.uncalibrated is not None and calibration.ece_before is not None:
        diagrams.insert(0, ("before", result.uncalibrated, calibration.ece_before))
    write_reliability(files["reliability"], diagrams)
    if "mistakes" in files:
        sheet = mistakes_sheet(result.mistakes, images, result.words)
        with replacing(files["mistakes"]) as temporary:
            sheet.save(temporary, format="PNG")

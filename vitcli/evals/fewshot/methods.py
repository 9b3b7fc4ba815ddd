"""The few-shot methods by name; this module is light, so that the help can list them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitcli.errors import VitcliError, unknown

if TYPE_CHECKING:
    from vitcli.config.schema import FewshotSection


@dataclass(frozen=True)
class Method:
    """A few-shot method.

    Attributes:
        fit: `module:function` that fits it: (x, y, num_classes, section, seed) -> FittedClassifier.
        title: its name in a sentence.
        help: what it is.
        settings: settings of `FewshotSection` that only some methods have, and this one.
        has_head: whether the classifier can be stored as the head of a model.
        pixel_baseline: whether the method is fast enough for thousands of raw pixels.
    """

    fit: str
    title: str
    help: str
    settings: tuple[str, ...] = ()
    has_head: bool = True
    pixel_baseline: bool = True


_FITS = "vitcli.evals.fewshot.classifiers"
METHODS: dict[str, Method] = {
    "ridge": Method(f"{_FITS}:fit_ridge", "few-shot", "regularised least squares", ("l2",)),
    "knn": Method(
        f"{_FITS}:fit_knn",
        "nearest neighbours",
        "weighted nearest neighbours",
        ("neighbors", "temperature"),
        has_head=False,
    ),
    "logistic": Method(
        f"{_FITS}:fit_logistic",
        "linear probe",
        "logistic regression",
        ("l2",),
        pixel_baseline=False,
    ),
    "mean": Method(f"{_FITS}:fit_nearest_mean", "nearest class mean", "nearest class mean"),
}


def check_method(section: "FewshotSection") -> Method:
    """The method of `section`.

    Raises:
        VitcliError: there is no such method, or `l2` is set and the method has none.
    """
    if section.method not in METHODS:
        raise unknown("few-shot method", section.method, METHODS)
    method = METHODS[section.method]
    if section.l2 is not None and "l2" not in method.settings:
        names = " and ".join(f"`{name}`" for name, m in METHODS.items() if "l2" in m.settings)
        raise VitcliError(
            f"`l2` belongs to the methods {names}, not to `{section.method}`", "remove `--l2`"
        )
    return method

"""Match the classes of a dataset to the outputs of a model."""

import csv
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError, counted, nearest, quoted
from vitcli.files import parse_json
from vitcli.progress import Watcher
from vitcli.weights.edit import match_classes
from vitcli.weights.imagenet import SETS, SYNSET, imagenet_synsets, synset_outputs
from vitcli.weights.loaded import LoadedModel

MAP_HINT = (
    'write a JSON object `{"data class": "model class"}`, or a CSV file of two columns; a model '
    "class is a name, an output number or a synset; separate several with `; ` or use a list"
)

ClassMap = Mapping[str, tuple[str | int, ...]]


@dataclass(frozen=True)
class ClassMatching:
    """Classes of the data and the model outputs that stand for them.

    Attributes:
        classes: the evaluated classes.
        outputs: one or more outputs of each class.
        data_indices: index of each class among all classes of the data.
        display_names: the model's name of each class, if the data have only synsets or numbers.
    """

    classes: tuple[str, ...]
    outputs: tuple[tuple[int, ...], ...]
    data_indices: NDArray[np.int64]
    display_names: tuple[str, ...] | None = None

    @property
    def all_outputs(self) -> NDArray[np.int64]:
        """Every output that stands for a class, sorted, without repeats."""
        return np.unique([output for one in self.outputs for output in one])

    @property
    def first_outputs(self) -> NDArray[np.int64]:
        """(K,) the first output of each class."""
        return np.array([one[0] for one in self.outputs], dtype=np.int64)

    def check_one_to_one(self, classes: Sequence[str], data: str) -> None:
        """Check that each class of multi-label data has exactly one output, which they need.

        Raises:
            VitcliError: it has not.
        """
        complete = len(self.classes) == len(classes)
        if not complete or any(len(outputs) > 1 for outputs in self.outputs):
            raise VitcliError(
                f"the images of `{data}` are multi-label, so each class needs exactly one class "
                "of the model",
                "name every class in `--class-map` once",
            )

    def select(self, images: ImageSet) -> ImageSet:
        """The images of the evaluated classes, labelled with these classes."""
        if len(self.data_indices) == len(images.classes):
            return images
        rows = np.flatnonzero(np.isin(images.labels, self.data_indices))
        return images.subset(rows).relabelled(self.classes)

    def to_data_classes(self, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) outputs -> (n,) evaluated classes; K for an output that stands for none of them."""
        size = int(max(predicted.max(), self.all_outputs.max())) + 1
        table = np.full(size, len(self.classes))
        # Reversed: if two classes share an output, the first class wins.
        for label in reversed(range(len(self.classes))):
            table[list(self.outputs[label])] = label
        return np.asarray(table[predicted], dtype=np.int64)


def match_outputs(
    net: LoadedModel,
    classes: Sequence[str],
    data: str,
    watch: Watcher,
    class_map: ClassMap | None = None,
) -> ClassMatching:
    """Match classes of the data to outputs of the model.

    With `class_map` only the classes that it names are matched. Otherwise all classes are matched
    by name, by ImageNet synset or by output number.
    """
    if class_map is not None:
        return _match_by_map(net, classes, data, watch, class_map)
    num_outputs = net.config.num_classes
    # From the surest sign to the weakest: names, then synsets, then numbers.
    indices: Sequence[int] | None = None
    if net.labels is not None:
        indices = match_classes(classes, net.labels)
    elif num_outputs == len(classes):
        # Numbers go first: text order has `10` before `2`.
        indices = _match_numbers(net, classes, data, watch)
        if indices is None:
            first = ", ".join(f"{i} is `{name}`" for i, name in enumerate(classes[:3]))
            more = f" and {num_outputs - 3:,} more" if num_outputs > 3 else ""
            watch.note(
                f"the model has no class names; its {num_outputs} outputs are taken in the data's "
                f"order: {first}{more}; another order: `--labels FILE`"
            )
            indices = range(num_outputs)
    display_names = None
    if indices is None:
        indices = _match_synsets(net, classes, watch) or _match_numbers(net, classes, data, watch)
        if indices is not None and net.labels is not None:
            # ImageNet names list synonyms: "tench, Tinca tinca".
            display_names = tuple(net.labels[i].split(",")[0] for i in indices)
    if indices is not None:
        outputs = tuple((int(i),) for i in indices)
        return ClassMatching(tuple(classes), outputs, np.arange(len(classes)), display_names)
    if net.labels is None:
        raise VitcliError(
            f"the model has {num_outputs} outputs without names, `{data}` has {len(classes)} "
            "classes",
            hint="name the outputs with `--labels FILE`, one class per line",
        )
    # All or nothing: a partial match would silently drop images of the other classes.
    missing = [name for name in classes if match_classes([name], net.labels) is None]
    remedy = "rename its outputs with `--labels FILE` (one class per line)"
    if len(missing) == len(classes):  # it was trained on other data
        remedy = (
            "name another with `--model`, or train it on these: "
            f"`vitcli finetune {shlex.quote(data)} --model MODEL`"
        )
    raise VitcliError(
        f"the model lacks {len(missing)} of the {len(classes)} classes of `{data}`: "
        f"{quoted(missing, 3)}",
        hint=f"the model has {quoted(net.labels, 3)}; {remedy}; or assign classes with "
        "`--class-map FILE`",
    )


def _match_synsets(net: LoadedModel, classes: Sequence[str], watch: Watcher) -> list[int] | None:
    """Match classes that have the names of ImageNet's folders, such as `n01440764`."""
    if not all(SYNSET.fullmatch(name) for name in classes):
        return None
    known = synset_outputs(net.config.num_classes, net.labels)
    if not all(name in known for name in classes):
        return None
    watch.note(f"matched {len(classes)} classes by their ImageNet synsets")
    return [known[name] for name in classes]


def _match_numbers(
    net: LoadedModel, classes: Sequence[str], data: str, watch: Watcher
) -> list[int] | None:
    """Match classes that are numbers, as the folders of ImageNet-V2 are."""
    num_outputs = net.config.num_classes
    if data.startswith("builtin:") or not all(n.isascii() and n.isdecimal() for n in classes):
        return None
    numbers = [int(name) for name in classes]
    # A number may also be a name (a digit, a year). It is an output number only if the numbers
    # cover all outputs, or if the model has one of ImageNet's sets of classes.
    whole = sorted(numbers) == list(range(num_outputs))
    part = num_outputs in SETS and max(numbers) < num_outputs and len(set(numbers)) == len(numbers)
    if not whole and not part:
        return None
    watch.note(f"the class names are numbers; they are taken as output numbers 0–{num_outputs - 1}")
    return numbers


def _match_by_map(
    net: LoadedModel, classes: Sequence[str], data: str, watch: Watcher, class_map: ClassMap
) -> ClassMatching:
    normalised = {_normalised(name): name for name in class_map}
    # ObjectNet's folders and its published map differ in case and signs, so compare both forms.
    found: dict[int, tuple[int, ...]] = {}
    unknown: list[str] = []
    find = _OutputFinder(net)
    for number, name in enumerate(classes):
        key = name if name in class_map else normalised.get(_normalised(name))
        if key is not None:
            outputs = [find(wanted, unknown) for wanted in class_map[key]]
            found[number] = tuple(dict.fromkeys(i for i in outputs if i is not None))
    if unknown:
        near = nearest(unknown[0], list(net.labels or ()))
        raise VitcliError(
            f"`--class-map` names {len(unknown)} classes that the model does not have: "
            f"{quoted(unknown, 3)}",
            f"did you mean `{near}`?" if near else MAP_HINT,
        )
    if not found:
        raise VitcliError(
            f"`--class-map` names none of the classes of `{data}`, such as `{classes[0]}`", MAP_HINT
        )
    if left := len(classes) - len(found):
        absent = counted(left, "classes is", "classes are", len(classes))
        watch.note(f"{absent} not in the class map and left out")
    indices = np.array(list(found), dtype=np.int64)
    return ClassMatching(tuple(classes[i] for i in found), tuple(found.values()), indices)


class _OutputFinder:
    """Finds the output that an entry of a class map names."""

    def __init__(self, net: LoadedModel) -> None:
        self.num_outputs, self.labels = net.config.num_classes, net.labels
        self.by_name = {name: i for i, name in enumerate(net.labels or ())}
        self.by_synset: dict[str, int] | None = None

    def __call__(self, wanted: str | int, unknown: list[str]) -> int | None:
        found = self._find(wanted)
        if found is None or not 0 <= found < self.num_outputs:
            unknown.append(str(wanted))
            return None
        return found

    def _find(self, wanted: str | int) -> int | None:
        if isinstance(wanted, int):
            return wanted
        # A name goes first: a class may be called `7` or look like a synset.
        if wanted in self.by_name:
            return self.by_name[wanted]
        if SYNSET.fullmatch(wanted):
            if self.by_synset is None:  # made once: it matches 1,000 names
                self.by_synset = synset_outputs(self.num_outputs, self.labels)
            return self.by_synset.get(wanted)
        if self.labels is not None and (found := match_classes([wanted], self.labels)):
            return found[0]
        return int(wanted) if wanted.isascii() and wanted.isdecimal() else None


def _normalised(name: str) -> str:
    """The same text for `Bills (money)` and `bills_money`."""
    return "".join(c for c in name.casefold() if c.isalnum()) or name


def read_class_map(path: str | os.PathLike[str]) -> ClassMap:
    """Read data class -> model classes from JSON or from a CSV file of two columns.

    A JSON value is a name, a synset or a number, or a list of these. ObjectNet's
    `objectnet_to_imagenet_1k.json` writes several in one text, separated by `; `.
    """
    suffix = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            return _map_from_rows(csv.reader(text.splitlines(), delimiter=delimiter), path)
        values = parse_json(text)
    except (OSError, ValueError, csv.Error) as error:
        raise VitcliError(f"cannot read the class map `{path}`: {error}", MAP_HINT) from error
    if not isinstance(values, dict) or not values:
        raise VitcliError(f"`{path}` does not hold a JSON object", MAP_HINT)
    return {name: _map_entries(value, name, path) for name, value in values.items()}


def _map_from_rows(rows: Iterable[list[str]], path: str | os.PathLike[str]) -> ClassMap:
    found: dict[str, tuple[str | int, ...]] = {}
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) != 2:
            raise VitcliError(f"line {number} of `{path}` has {len(row)} columns, not 2", MAP_HINT)
        name = row[0].strip()
        # A class on several lines collects all of them: lines of a CSV have no lists.
        found[name] = (*found.get(name, ()), *_map_entries(row[1], row[0], path))
    if not found:
        raise VitcliError(f"the class map `{path}` is empty", MAP_HINT)
    return found


def _map_entries(value: Any, name: str, path: str | os.PathLike[str]) -> tuple[str | int, ...]:
    entries: list[str | int] = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            entries += [entry.strip() for entry in one.split(";") if entry.strip()]
        elif isinstance(one, int) and not isinstance(one, bool):  # JSON true is an int in Python
            entries.append(one)
        else:
            raise VitcliError(f"`{path}`: `{name}` has the invalid value {one!r}", MAP_HINT)
    if not entries:
        raise VitcliError(f"`{path}`: `{name}` has no model class", MAP_HINT)
    return tuple(entries)


def imagenet_outputs(net: LoadedModel) -> NDArray[np.int64]:
    """(1000,) the output of each class of ImageNet-1k."""
    known = synset_outputs(net.config.num_classes, net.labels)
    synsets = imagenet_synsets(1000) or ()
    missing = [synset for synset in synsets if synset not in known]
    if missing:
        raise VitcliError(
            f"the model lacks {len(missing)} of the 1000 classes of {SETS[1000][0]}, such as "
            f"`{missing[0]}`",
            "use `--real` with a model that has the classes of ImageNet-1k",
        )
    return np.array([known[synset] for synset in synsets], dtype=np.int64)

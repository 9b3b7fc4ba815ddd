"""Which outputs of a model stand for which class of the data."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError, nearest
from vitcli.progress import Watcher
from vitcli.weights.edit import match_classes
from vitcli.weights.imagenet import SETS, SYNSET, imagenet_synsets, synset_outputs
from vitcli.weights.loaded import LoadedModel

MAP_HINT = (
    'a JSON object `{"class of the data": "class of the model"}` (or a number, a synset, several '
    "with `; ` between them or in a list), or a CSV of two columns"
)

ClassMap = Mapping[str, tuple[str | int, ...]]


@dataclass(frozen=True)
class Matching:
    """Classes of the data and the outputs that stand for them.

    Attributes:
        classes: those that are evaluated.
        outputs: of each, one or more.
        taken: the number of each among the data's own classes.
        words: of each what the model calls it, where the data has only synsets or numbers.
    """

    classes: tuple[str, ...]
    outputs: tuple[tuple[int, ...], ...]
    taken: NDArray[np.int64]
    words: tuple[str, ...] | None = None

    @property
    def known(self) -> NDArray[np.int64]:
        """Every output that stands for a class, once, in order."""
        return np.unique([output for one in self.outputs for output in one])

    @property
    def firsts(self) -> NDArray[np.int64]:
        """(K,) one output for each class: the first of those that stand for it."""
        return np.array([one[0] for one in self.outputs], dtype=np.int64)

    def select(self, images: ImageSet) -> ImageSet:
        """The images of the evaluated classes, labelled with them."""
        if len(self.taken) == len(images.classes):
            return images
        rows = np.flatnonzero(np.isin(images.labels, self.taken))
        return images.subset(rows).relabelled(self.classes)

    def class_of(self, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) outputs -> (n,) classes of the data; their number for an output of another class."""
        place = np.full(int(max(predicted.max(), self.known.max())) + 1, len(self.classes))
        for label in reversed(range(len(self.classes))):
            place[list(self.outputs[label])] = label
        return np.asarray(place[predicted], dtype=np.int64)


def match(
    net: LoadedModel,
    classes: Sequence[str],
    data: str,
    watch: Watcher,
    class_map: ClassMap | None = None,
) -> Matching:
    """Classes of the data -> outputs of the model.

    By `class_map` if there is one, which leaves out the classes that it does not name; else by
    name, by ImageNet's synsets, or by number, where all the data's classes are such.

    Raises:
        VitcliError: they cannot be matched.
    """
    if class_map is not None:
        return _mapped(net, classes, data, watch, class_map)
    outputs = net.config.num_classes
    indices: Sequence[int] | None = None
    if net.labels is not None:
        indices = match_classes(classes, net.labels)
    elif outputs == len(classes):
        watch.note(f"the model has no class names: its {outputs} outputs in the data's order")
        indices = range(outputs)
    words = None
    if indices is None:
        indices = _by_synset(net, classes, watch) or _by_number(net, classes, data, watch)
        if indices is not None and net.labels is not None:
            words = tuple(net.labels[i].split(",")[0] for i in indices)
    if indices is not None:
        every = np.arange(len(classes))
        return Matching(tuple(classes), tuple((int(i),) for i in indices), every, words)
    if net.labels is None:
        raise VitcliError(
            f"the model has {outputs} outputs without names, `{data}` has {len(classes)} classes",
            hint="name the outputs with `--labels FILE`, one class a line",
        )
    missing = [name for name in classes if match_classes([name], net.labels) is None]
    shown = ", ".join(f"`{name}`" for name in missing[:3])
    raise VitcliError(
        f"the model lacks {len(missing)} of the {len(classes)} classes of `{data}`: {shown}",
        hint=f"it knows {', '.join(f'`{n}`' for n in net.labels[:3])} …; other names for its "
        "outputs: `--labels FILE`, one class a line; which class is which: `--class-map FILE`",
    )


def _by_synset(net: LoadedModel, classes: Sequence[str], watch: Watcher) -> list[int] | None:
    """Where every class is named as ImageNet's folders are: `n01440764`."""
    if not all(SYNSET.fullmatch(name) for name in classes):
        return None
    known = synset_outputs(net.config.num_classes, net.labels)
    if not all(name in known for name in classes):
        return None
    watch.note(f"{len(classes)} classes are named by ImageNet's synsets")
    return [known[name] for name in classes]


def _by_number(
    net: LoadedModel, classes: Sequence[str], data: str, watch: Watcher
) -> list[int] | None:
    """Where the classes are numbers, as ImageNet-V2's folders are, and a model's all are there."""
    outputs = net.config.num_classes
    if data.startswith("builtin:") or not all(n.isascii() and n.isdecimal() for n in classes):
        return None
    numbers = [int(name) for name in classes]
    whole = sorted(numbers) == list(range(outputs))  # else they may be names of other things
    part = outputs in SETS and max(numbers) < outputs and len(set(numbers)) == len(numbers)
    if not whole and not part:
        return None
    watch.note(f"classes are numbers: taken for those of the model's {outputs} outputs, from 0 on")
    return numbers


def _mapped(
    net: LoadedModel, classes: Sequence[str], data: str, watch: Watcher, class_map: ClassMap
) -> Matching:
    loose = {_key(name): name for name in class_map}
    found: dict[int, tuple[int, ...]] = {}
    faults: list[str] = []
    find = _Finder(net)
    for number, name in enumerate(classes):
        key = name if name in class_map else loose.get(_key(name))
        if key is not None:
            outputs = [find(wanted, faults) for wanted in class_map[key]]
            found[number] = tuple(dict.fromkeys(i for i in outputs if i is not None))
    if faults:
        shown = ", ".join(f"`{name}`" for name in faults[:3])
        near = nearest(faults[0], list(net.labels or ()))
        raise VitcliError(
            f"`--class-map` names {len(faults)} classes that the model does not know: {shown}",
            f"`{near}` may be meant" if near else MAP_HINT,
        )
    if not found:
        raise VitcliError(
            f"`--class-map` names none of the classes of `{data}`, such as `{classes[0]}`", MAP_HINT
        )
    if left := len(classes) - len(found):
        watch.note(f"{left} of {len(classes)} classes are not in the class map: left out")
    taken = np.array(list(found), dtype=np.int64)
    return Matching(tuple(classes[i] for i in found), tuple(found.values()), taken)


class _Finder:
    """What a class map calls a class -> the model's output."""

    def __init__(self, net: LoadedModel) -> None:
        self.outputs, self.labels = net.config.num_classes, net.labels
        self.exact = {name: i for i, name in enumerate(net.labels or ())}
        self.synsets: dict[str, int] | None = None

    def __call__(self, wanted: str | int, faults: list[str]) -> int | None:
        found = self._find(wanted)
        if found is None or not 0 <= found < self.outputs:
            faults.append(str(wanted))
            return None
        return found

    def _find(self, wanted: str | int) -> int | None:
        if isinstance(wanted, int):
            return wanted
        if wanted in self.exact:
            return self.exact[wanted]
        if SYNSET.fullmatch(wanted):
            if self.synsets is None:
                self.synsets = synset_outputs(self.outputs, self.labels)
            return self.synsets.get(wanted)
        if self.labels is not None and (found := match_classes([wanted], self.labels)):
            return found[0]
        return int(wanted) if wanted.isascii() and wanted.isdecimal() else None


def _key(name: str) -> str:
    """One spelling for `Bills (money)` and `bills_money`."""
    return "".join(c for c in name.casefold() if c.isalnum()) or name


def read_class_map(path: str | os.PathLike[str]) -> ClassMap:
    """Class of the data -> classes of the model, from JSON or a CSV of two columns.

    In JSON a value is a name, a synset or a number, or a list of such; ObjectNet's own
    `objectnet_to_imagenet_1k.json` writes several in one text, with `; ` between them.

    Raises:
        VitcliError: it cannot be read, or says something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() in (".csv", ".tsv"):
            return _from_rows(csv.reader(text.splitlines(), delimiter=_delimiter(path)), path)
        values = json.loads(text)
    except (OSError, ValueError, csv.Error) as error:
        raise VitcliError(f"cannot read the class map `{path}`: {error}", MAP_HINT) from error
    if not isinstance(values, dict) or not values:
        raise VitcliError(f"`{path}` holds no JSON object", MAP_HINT)
    return {name: _several(value, name, path) for name, value in values.items()}


def _delimiter(path: str | os.PathLike[str]) -> str:
    return "\t" if Path(path).suffix.lower() == ".tsv" else ","


def _from_rows(rows: Iterable[list[str]], path: str | os.PathLike[str]) -> ClassMap:
    found: dict[str, tuple[str | int, ...]] = {}
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) != 2:
            raise VitcliError(f"line {number} of `{path}` has {len(row)} columns, not 2", MAP_HINT)
        found[row[0].strip()] = (*found.get(row[0].strip(), ()), *_several(row[1], row[0], path))
    if not found:
        raise VitcliError(f"`{path}` is empty", MAP_HINT)
    return found


def _several(value: Any, name: str, path: str | os.PathLike[str]) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            parts += [part.strip() for part in one.split(";") if part.strip()]
        elif isinstance(one, int) and not isinstance(one, bool):
            parts.append(one)
        else:
            raise VitcliError(f"`{path}`: `{name}` is {one!r}, which is no class", MAP_HINT)
    if not parts:
        raise VitcliError(f"`{path}`: `{name}` has no class", MAP_HINT)
    return tuple(parts)


def imagenet_outputs(net: LoadedModel) -> NDArray[np.int64]:
    """(1000,) the output that stands for each class of ImageNet-1k.

    Raises:
        VitcliError: the model lacks one.
    """
    known = synset_outputs(net.config.num_classes, net.labels)
    synsets = imagenet_synsets(1000) or ()
    missing = [synset for synset in synsets if synset not in known]
    if missing:
        raise VitcliError(
            f"the model lacks {len(missing)} of the 1000 classes of {SETS[1000][0]}, such as "
            f"`{missing[0]}`",
            "`--real` is for models of ImageNet-1k",
        )
    return np.array([known[synset] for synset in synsets], dtype=np.int64)

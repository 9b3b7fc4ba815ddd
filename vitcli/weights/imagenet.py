"""Class names of ImageNet, for checkpoints that have its number of outputs and no names.

The table `imagenet.txt.xz` holds the synsets and their words, from timm 1.0.31 (Apache-2.0). The
words are WordNet 3.0's (Princeton University; the table starts with its licence). A name is all
words of a synset, as in Hugging Face's ImageNet models: `tench, Tinca tinca`. If two classes have
the same words, as the two cranes have, the synset follows: `crane, n02012849`.
"""

import lzma
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

# Number of outputs -> name of the set, and the marks of its lines in the table.
SETS = {
    1000: ("ImageNet-1k", "*+"),
    21841: ("ImageNet-21k", "* "),
    21843: ("ImageNet-21k", "* -"),
}
SYNSET = re.compile(r"n\d{8}")
MIN_MATCH = 0.9  # fraction of names that must agree before ImageNet's order is assumed


@cache
def imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    """Return the distinct class names of the ImageNet set with this many classes, sorted by synset.

    1000 is ImageNet-1k, 21843 the set of Google's pre-trained models, and 21841 the release of
    autumn 2011 (timm). Any other number gives None.
    """
    if num_classes not in SETS:
        return None
    rows = _rows(SETS[num_classes][1])
    times = Counter(words for _, words in rows)
    return tuple(words if times[words] == 1 else f"{words}, {synset}" for synset, words in rows)


@cache
def imagenet_synsets(num_classes: int) -> tuple[str, ...] | None:
    """Return the synsets (`n01440764`) of the classes of `imagenet_names`, in the same order."""
    if num_classes not in SETS:
        return None
    return tuple(synset for synset, _ in _rows(SETS[num_classes][1]))


def synset_outputs(num_classes: int, labels: Sequence[str] | None) -> dict[str, int]:
    """Map synsets to outputs of a model, for ImageNet-1k's synsets and the model's own.

    A model with ImageNet's number of outputs and 90 % of its names in place has ImageNet's order,
    because publishers differ in a few words. In other models the outputs are found by name.
    """
    own = imagenet_synsets(num_classes)
    if labels is None:
        return {} if own is None else {synset: i for i, synset in enumerate(own)}
    if any(SYNSET.fullmatch(name) for name in labels):
        return {name: i for i, name in enumerate(labels) if SYNSET.fullmatch(name)}
    names = imagenet_names(num_classes)
    if own is not None and names is not None:
        pairs = zip(names, labels, strict=True)
        if sum(bool(_words(a) & _words(b)) for a, b in pairs) >= MIN_MATCH * num_classes:
            return {synset: i for i, synset in enumerate(own)}
    known: dict[str, int | None] = {}
    for i, name in enumerate(labels):
        for word in _words(name):
            known[word] = None if word in known else i
    found = {}
    for synset, words in _rows(SETS[1000][1]):
        outputs = {known.get(word) for word in _words(words)} - {None}
        if len(outputs) == 1 and (output := outputs.pop()) is not None:
            found[synset] = output
    return found


def _words(name: str) -> set[str]:
    """Return the synonyms in a name, in lower case."""
    parts = (" ".join(part.casefold().replace("_", " ").split()) for part in name.split(","))
    return {part for part in parts if part}


def _rows(marks: str) -> list[tuple[str, str]]:
    """Return (synset, words) of the lines that have one of `marks`."""
    packed = files("vitcli.weights").joinpath("imagenet.txt.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    cut = (line[1:].split(" ", 1) for line in lines if line[0] in marks)
    return [(synset, words) for synset, words in cut]

"""Class names of ImageNet, for checkpoints that have its number of outputs and no names.

The table beside this file holds the synsets and their words, taken from timm 1.0.31 (Apache-2.0),
whose words are WordNet 3.0's (Princeton University; its licence stands at the head of the table).
A name is all words of a synset, most usual first, as Hugging Face's ImageNet models have it:
`tench, Tinca tinca`. Labels must differ, so where two classes of a set have the same words, as
the two cranes have, each has its synset's number after them: `crane, n02012849`.
"""

import lzma
from collections import Counter
from functools import cache
from importlib.resources import files

# Number of outputs -> what has so many, and the marks of its lines in the table.
SETS = {
    1000: ("ImageNet-1k", "*+"),
    21841: ("ImageNet-21k", "* "),
    21843: ("ImageNet-21k", "* -"),
}


@cache
def imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    """The names of ImageNet's classes by their number, in the order of the outputs, all different.

    1000 is ImageNet-1k, 21843 what Google's models were pre-trained on, 21841 the release of
    autumn 2011 (timm); all three are sorted by synset. Another number: None.
    """
    if num_classes not in SETS:
        return None
    rows = _rows(SETS[num_classes][1])
    times = Counter(words for _, words in rows)
    return tuple(words if times[words] == 1 else f"{words}, {synset}" for synset, words in rows)


def _rows(marks: str) -> list[tuple[str, str]]:
    """Synset and words of the lines that have one of `marks`."""
    packed = files("vitcli.weights").joinpath("imagenet.txt.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    cut = (line[1:].split(" ", 1) for line in lines if line[0] in marks)
    return [(synset, words) for synset, words in cut]

"""Images and labels of one file that is read from its front to its back."""

from collections.abc import Iterator
from typing import Any

from vitcli.data.shards import LABEL_ENDINGS, Sample, is_image, key_of, label_of

ROWS = 64  # of a parquet file at a time


def read_parquet_rows(
    file: Any, columns: tuple[str | None, str | None]
) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, place) of each row; a row group at a time is in memory."""
    import pyarrow.parquet as pq

    image, label = columns
    row = 0
    for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=[image, label], use_threads=False):
        cells, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
        for cell, value in zip(cells, labels, strict=True):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            yield content or b"", value, f"row {row}"
            row += 1


class Held(Sample):
    """A sample whose small members are in memory, because a stream has no way back."""

    def text(self, ending: str) -> str:
        """A small text member."""
        content: bytes = self.file[ending]
        return content.decode("utf-8", "backslashreplace").strip()


def read_tar(file: Any, columns: tuple[str | None, str | None]) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, key) of each sample of a tar file that is read from front to back."""
    import tarfile

    endings = {*LABEL_ENDINGS, *([columns[1]] if columns[1] else [])}
    sample = Held("", {}, {})
    with tarfile.open(fileobj=file, mode="r|") as shard:
        for member in shard:
            key, ending = key_of(member.name)
            if not member.isfile() or not key:
                continue
            if key != sample.key:
                yield from _finished(sample, columns[1])
                sample = Held(key, {}, {})
            if is_image(member) or ending in endings:
                opened = shard.extractfile(member)
                sample.members[ending] = member
                sample.file[ending] = opened.read() if opened is not None else b""
        yield from _finished(sample, columns[1])


def _finished(sample: Held, column: str | None) -> Iterator[tuple[bytes, Any, str]]:
    image = next((e for e, member in sample.members.items() if is_image(member)), None)
    if image is not None:
        yield sample.file[image], label_of(sample, column), sample.key

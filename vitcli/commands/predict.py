"""`vitcli predict`: images, folders, globs -> class names and probabilities."""

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.config import Settings, load_inference
from vitcli.data.decode import ImageError
from vitcli.data.paths import find_images
from vitcli.data.transforms import Preprocess
from vitcli.devices import pick_device
from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.vit import Model
from vitcli.watch import Quiet, Watcher
from vitcli.weights.fates import tell_load
from vitcli.weights.load import load_model, load_settings, newest_run, require_preprocess

# One object of `predict --json`: path, label, probability, top, error.
Row = dict[str, Any]
Sink = Callable[[Row], None]


class Predictions:
    """The rows, computed while one iterates over them, in the order of the images.

    Attributes:
        failed: how many images could not be read, so far.
    """

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self.failed = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.failed += row["error"] is not None
            yield row

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.failed else 0


def predict(
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: str | os.PathLike[str] | Model | None = None,
    *,
    top: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
) -> list[Row]:
    """Class names and probabilities of images: the rows of `vitcli predict --json`.

    Args:
        images: paths of images, folders or globs.
        model: MODEL, or one that is loaded; None takes the newest run with a trained head.
        top: how many classes in `top`.

    Returns:
        A dict for each image: `path`, `label`, `probability`, `top`, `error`.

    Raises:
        VitcliError: no such model, no trained head, or none of the images exists.
    """
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    return list(run(paths, model=model, top=top, batch_size=batch_size, precision=precision))


def run(
    paths: Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str] | Model | None = None,
    settings: Settings | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    top: int = 5,
    batch_size: int = 32,
    precision: str = "auto",
    csv_file: Path | None = None,
    parquet_file: Path | None = None,
    verbose: bool = False,
    watch: Watcher | None = None,
) -> Predictions:
    """Predict the classes of images.

    Args:
        paths: images, folders (with what lies in them), globs.
        model: MODEL, or one that is loaded; None takes the newest run with a trained head.
        settings: nested settings: `model.num_heads`, `preprocess.mean` …
        labels: class names of the model, or a file with one a line.
        top: how many classes in `top`; more than there are gives all.
        batch_size: images of one forward pass; as many more are decoded meanwhile.
        precision: `auto` is fp32.
        csv_file, parquet_file: where the same table is written to, when the last row is taken.
        verbose: tell what became of every tensor of the weights.

    Raises:
        VitcliError: no such model, no trained head, or none of `paths` exists.
    """
    watch = watch or Quiet()
    if top < 1 or batch_size < 1:
        raise VitcliError(
            f"`--top` is {top}, `--batch-size` {batch_size}", "both are 1 or more, usually 5 and 32"
        )
    for table in (csv_file, parquet_file):
        if table is not None and table.is_dir():
            raise VitcliError(f"`{table}` is a folder", "the table is a file: give its name too")
    files = find_images(paths)
    net = _classifier(model, settings, labels, watch, verbose)
    rows = _rows(net, files, min(top, net.config.num_classes), batch_size, precision, watch)
    sinks = [(_csv_sink, csv_file), (_parquet_sink, parquet_file)]
    return Predictions(_recorded(rows, [(make, path) for make, path in sinks if path]))


def _classifier(
    model: str | os.PathLike[str] | Model | None,
    settings: Settings | None,
    labels: str | os.PathLike[str] | Sequence[str] | None,
    watch: Watcher,
    verbose: bool,
) -> Model:
    if isinstance(model, Model):
        net, name = model.eval(), "the model"
    else:
        inference = load_inference(settings)
        if model is None and inference.model.name is None:
            model = newest_run(classifier=True)
            watch.note(f"no `--model` given: {model}")
        name = os.fspath(model if model is not None else inference.model.name or "")
        arguments = load_settings(inference.model, inference.preprocess)
        net = load_model(name, labels=labels, watch=watch, **arguments)
        tell_load(net, watch, verbose=verbose)
    if not net.head_trained:
        raise VitcliError(
            f"`{name}` has no trained head, so there is nothing to predict",
            hint="give it one: `vitcli fewshot DATA` in seconds, `vitcli finetune DATA` in minutes",
        )
    require_preprocess(net)
    if net.labels is None:
        watch.warn(f"`{name}` has no class names, so numbers stand for them; see `--labels FILE`")
    return net


def _rows(
    net: Model,
    files: list[str],
    top: int,
    batch_size: int,
    precision: str,
    watch: Watcher,
) -> Iterator[Row]:
    """One row a file: decoding in threads, the model in batches."""
    from vitcli.evals.features import autocast

    device = pick_device()
    net = net.to(device)
    preprocess = require_preprocess(net)
    names = net.labels or tuple(str(i) for i in range(net.config.num_classes))
    with watch.progress("images", len(files)) as bar:
        for batch in _decoded(preprocess, files, batch_size):
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            answers: Iterator[list[dict[str, Any]]] = iter(())
            if pixels:
                with torch.inference_mode(), autocast(precision, device):
                    logits = net(preprocess.normalize(torch.stack(pixels).to(device)))
                shares, order = net.probabilities(logits).cpu().topk(top, dim=1)
                answers = iter(
                    [{"label": names[i], "probability": p} for i, p in zip(*pair, strict=True)]
                    for pair in zip(order.tolist(), shares.tolist(), strict=True)
                )
            for file, image in batch:
                yield (
                    _row(file, next(answers), None)
                    if isinstance(image, Tensor)
                    else _row(file, [], image)
                )
            bar.advance(len(batch))


def _row(path: str, top: list[dict[str, Any]], error: str | None) -> Row:
    best = top[0] if top else {"label": None, "probability": None}
    return {"path": path, **best, "top": top, "error": error}


def _decoded(
    preprocess: Preprocess, files: list[str], batch_size: int
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Batches of (path, (C, Y, X) uint8 pixels or the reason why not), decoded ahead."""

    def read(file: str) -> Tensor | str:
        try:
            return preprocess.pixels(file)
        except ImageError as error:
            return error.reason

    threads = min(len(files), os.cpu_count() or 1, 16)
    waiting: deque[tuple[str, Future[Tensor | str]]] = deque()
    rest = iter(files)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(waiting) < 2 * batch_size and (file := next(rest, None)) is not None:
                    waiting.append((file, pool.submit(read, file)))
                if not waiting:
                    return
                count = min(batch_size, len(waiting))
                yield [
                    (f, future.result()) for f, future in (waiting.popleft() for _ in range(count))
                ]
        finally:
            pool.shutdown(cancel_futures=True)


def _recorded(
    rows: Iterator[Row],
    sinks: Sequence[tuple[Callable[[Path], AbstractContextManager[Sink]], Path]],
) -> Iterator[Row]:
    """The rows, each also given to every sink; the files appear when the last one was taken."""
    with ExitStack() as stack:
        writers = [stack.enter_context(make(path)) for make, path in sinks]
        for row in rows:
            for write in writers:
                write(row)
            yield row


def _table_row(row: Row) -> dict[str, Any]:
    """A row of the table: `top` as JSON, names that are no UTF-8 escaped."""
    path = row["path"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return {**row, "path": path, "top": json.dumps(row["top"], ensure_ascii=False)}


@contextmanager
def _csv_sink(path: Path) -> Iterator[Sink]:
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, ["path", "label", "probability", "top", "error"])
        writer.writeheader()
        yield lambda row: writer.writerow(_table_row(row))


@contextmanager
def _parquet_sink(path: Path) -> Iterator[Sink]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entry = pa.struct([("label", pa.string()), ("probability", pa.float64())])
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("label", pa.string()),
            ("probability", pa.float64()),
            ("top", pa.list_(entry)),
            ("error", pa.string()),
        ]
    )
    held: list[Row] = []
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema) as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(held, schema=schema))
            held.clear()

        def write(row: Row) -> None:
            held.append({**row, "path": _table_row(row)["path"]})
            if len(held) >= 4096:
                flush()

        yield write
        flush()

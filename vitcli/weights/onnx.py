"""Export to ONNX: graph and weights in one file, for onnxruntime and other runtimes.

The graph takes normalised images and returns logits, without a softmax. The metadata entry `vitcli`
holds the rest as JSON: class names, resize, crop, mean and std.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.weights.loaded import LoadedModel

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

FORMAT = 1
OPSET = 18  # torch's exporter writes it without a conversion; onnxruntime >= 1.14 reads it
INPUT, BATCH = "images", "batch"
# An ONNX file is one protobuf message of at most 2 GiB; the graph itself is small.
LARGEST_BYTES = 2**31 - 2**24
INSTALL_HINT = "`pip install 'vitcli[onnx]'`"


def write_onnx(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` to the file `out` atomically; returns notes for the user.

    The input is `images` (batch, C, Y, X), float32 and normalised. The output is `logits`
    (batch, K), `values` (batch, 1) of a regression, or `features` (batch, F) without a head. The
    batch size is free. Weights above 2 GiB go to a second file, `out` with `.data` appended.

    Raises:
        VitcliError: onnx or onnxscript is not installed, `out` exists or it cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise VitcliError(f"`{package}` is not installed", hint=INSTALL_HINT)
    data = data_file(out)
    for path in (out, data):
        # An empty file is a name that the caller took.
        if os.path.lexists(path) and not (path.is_file() and path.stat().st_size == 0):
            raise VitcliError(f"`{path}` exists already", hint="choose another `--out`")
    program = _program(model)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size <= LARGEST_BYTES:
        with replacing(out) as temporary:
            _save(program, temporary)
    else:
        # The graph stores the name of the weights file, so both get their final names at once.
        with replacing(out) as graph, replacing(data) as weights:
            folder = out.with_name(f".{out.name[:80]}.{os.getpid()}.parts")
            try:
                folder.mkdir()
                _save(program, folder / out.name, data)
                (folder / data.name).replace(weights)
                (folder / out.name).replace(graph)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    notes = ["the graph takes normalised images; its metadata has resize, crop, mean and std"]
    if model.preprocess is None:
        notes[0] = "the graph takes normalised images; mean and std of these weights are unknown"
    if size > LARGEST_BYTES:
        notes.append(f"the weights are above 2 GiB and stored in `{data.name}` next to the graph")
    return notes


def data_file(out: Path) -> Path:
    """Return the path of the weights of the ONNX file `out` if they are too large for it."""
    return out.with_name(out.name + ".data")


def run_onnx(path: Path, images: Tensor) -> Tensor | None:
    """(B, C, Y, X) -> (B, K): outputs of onnxruntime on the CPU; None if it is not installed."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {INPUT: images.numpy()})
    return torch.from_numpy(found)


def _program(model: LoadedModel) -> "ONNXProgram":
    from vitcli import __version__

    config = model.config
    # Batch size 2: torch's exporter treats size 1 as constant.
    images = torch.zeros(2, config.num_channels, *config.image_size)
    named = "values" if model.is_regression else "logits"
    output = named if config.num_classes else "features"
    # The exporter decomposes attention in the memory layout of this kernel. With a mask (relative
    # positions) the other kernels use another layout, and the export fails.
    with _silence(), sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            model.network.eval(),
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            input_names=[INPUT],
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    about = program.model
    # The exporter adds source lines with local paths to every node; remove them.
    for node in about.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*about.graph.inputs, *about.graph.initializers.values()):
        value.metadata_props.clear()
    about.graph.metadata_props.clear()
    about.producer_name, about.producer_version = "vitcli", __version__
    about.graph.name = "vision_transformer"
    about.doc_string = (
        f"`{INPUT}`: ({BATCH}, {config.num_channels}, {config.image_size[0]}, "
        f"{config.image_size[1]}), (x / 255 - mean) / std; the metadata entry `vitcli` has the rest"
    )
    about.metadata_props["vitcli"] = json.dumps(_described(model, output), sort_keys=True)
    return program


def _described(model: LoadedModel, output: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "input": INPUT,
        "output": output,
        "labels": list(model.labels) if model.labels is not None else None,
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
        "head_trained": bool(model.head_trained and model.config.num_classes),
        "activation": model.head_activation,
        "config": model.config.to_dict(),
    }


def _save(program: "ONNXProgram", path: Path, external: Path | None = None) -> None:
    """Save without `ONNXProgram.save`, which writes a second file from 1.5 GiB on."""
    import onnx_ir

    with _silence():
        onnx_ir.save(program.model, path, external_data=external.name if external else None)


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the warnings and log messages of torch and onnx during the export."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)

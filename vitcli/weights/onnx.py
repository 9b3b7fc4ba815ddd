"""ONNX: graph and weights in one file, for onnxruntime and whatever else reads it.

The graph is the model and nothing else: it takes images that are normalised already and gives
logits, without a softmax. What a caller has to know beside it (class names, resize, crop, mean and
std) stands in the file's metadata, as JSON under the one key `vitcli`.
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
OPSET = 18  # what torch's exporter writes without a conversion; onnxruntime reads it since 1.14
INPUT, BATCH = "images", "batch"
# An ONNX file is one protobuf message, which holds 2 GiB at most; the graph itself is small.
LARGEST_BYTES = 2**31 - 2**24
INSTALL_HINT = "`pip install 'vitcli[onnx]'`"


def write_onnx(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` to the file `out`: the whole is there at the end, or nothing.

    Input `images` (batch, C, Y, X), float32, normalised; output `logits` (batch, K), or `features`
    (batch, F) of a model without a head; the batch axis is free. Weights lie inside the file;
    those of more than 2 GiB in `out` with `.data` appended, beside it.

    Returns:
        What the file does not carry, one line each.

    Raises:
        VitcliError: onnx or onnxscript is not installed, something is at `out` already, or it
            cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise VitcliError(f"`{package}` is not installed", hint=INSTALL_HINT)
    data = data_file(out)
    for path in (out, data):
        if os.path.lexists(path):
            raise VitcliError(f"`{path}` exists already", hint="choose another place")
    program = _program(model)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size <= LARGEST_BYTES:
        with replacing(out) as temporary:
            _save(program, temporary)
    else:
        # The graph names the weights' file, so both are written under their own names elsewhere.
        with replacing(out) as graph, replacing(data) as weights:
            folder = out.with_name(f".{out.name[:80]}.{os.getpid()}.parts")
            try:
                folder.mkdir()
                _save(program, folder / out.name, data)
                (folder / data.name).replace(weights)
                (folder / out.name).replace(graph)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    notes = ["the graph takes normalised images; resize, crop, mean and std stand in its metadata"]
    if model.preprocess is None:
        notes[0] = "the graph takes normalised images; mean and std of these weights are not known"
    if size > LARGEST_BYTES:
        notes.append(f"the weights are larger than 2 GiB and lie in `{data.name}` beside the graph")
    return notes


def data_file(out: Path) -> Path:
    """Where the weights of the ONNX file `out` lie when they are too large for it."""
    return out.with_name(out.name + ".data")


def run_onnx(path: Path, images: Tensor) -> Tensor | None:
    """(B, C, Y, X) -> (B, K): what onnxruntime computes, on the CPU; None where it is missing."""
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


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_onnx` noted in the file beside the graph; empty for anybody else's file."""
    import onnx

    found = onnx.load(os.fspath(path), load_external_data=False)
    texts = {entry.key: entry.value for entry in found.metadata_props}
    return dict(json.loads(texts.get("vitcli", "{}")))


def _program(model: LoadedModel) -> "ONNXProgram":
    from vitcli import __version__

    config = model.config
    # A batch of 2: torch takes a 1 for a size that never changes.
    images = torch.zeros(2, config.num_channels, *config.image_size)
    output = "logits" if config.num_classes else "features"
    # Of torch's attention kernels this one leaves its result in the order in which the exporter
    # decomposes it; with a mask (relative positions) the others do not, and the export fails.
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
    # The exporter notes with every node the line of code it came from, with this machine's paths.
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
    """Not by the program's own `save`, which takes a second file from 1.5 GiB on."""
    import onnx_ir

    with _silence():
        onnx_ir.save(program.model, path, external_data=external.name if external else None)


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch and onnx tell of themselves while they export."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)

"""The export formats by name; this module is light, so that the help can list them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: `module:function` in `vitcli.weights` that writes it: (model, path) -> notes about
            what the format cannot store.
        suffix: the suffix of its file; None if the format is a folder.
    """

    write: str
    suffix: str | None = None


FORMATS = {
    "timm": Format("timm.write_timm:write_timm"),
    "huggingface": Format("huggingface.write_huggingface:write_huggingface"),
    "google": Format("google.write_google:write_google", ".npz"),
    "onnx": Format("onnx:write_onnx", ".onnx"),
}

"""Official files that cannot be read: one error with a hint, no memory for what is only claimed."""

import io
import zipfile

import numpy as np
import pytest

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model


def refused(path, words, **settings):
    with pytest.raises(VitcliError, match=words) as caught:
        load_model(path, **settings)
    assert caught.value.hint
    return str(caught.value)


def test_another_architecture(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    text = refused(tmp_path / "w.npz", "is not an official ViT, hybrid or BiT checkpoint")
    assert "missing: `embedding/kernel`" in text and "not part of one: `x`" in text
    mixer = {"stem/kernel": np.zeros((4, 4, 3, 8)), "MixerBlock_0/LayerNorm_0/scale": np.zeros(8)}
    np.savez(tmp_path / "mixer.npz", **mixer)
    assert "`MixerBlock_0/LayerNorm_0/scale`" in refused(tmp_path / "mixer.npz", "not part of one")


def test_a_part_that_is_missing_or_too_many_is_named(shared, tmp_path):
    arrays = dict(np.load(shared / "reference/google_vit/hybrid_2stage/params.npz"))
    for gone in ("block1/unit2/conv2/kernel", "Transformer/encoder_norm/bias", "gn_root/scale"):
        np.savez(tmp_path / "w.npz", **{n: a for n, a in arrays.items() if n != gone})
        refused(tmp_path / "w.npz", f"missing: `{gone}`")
    whole = [n for n in arrays if n.startswith("Transformer/encoderblock_0/")]
    np.savez(tmp_path / "w.npz", **{n: a for n, a in arrays.items() if n not in whole})
    refused(tmp_path / "w.npz", "missing: `Transformer/encoderblock_0/")
    np.savez(tmp_path / "w.npz", **arrays, **{"Transformer/extra": np.zeros(2)})
    refused(tmp_path / "w.npz", "not part of one: `Transformer/extra`")
    shape = {**arrays, "Transformer/encoder_norm/scale": np.zeros(7, np.float32)}
    np.savez(tmp_path / "w.npz", **shape)
    refused(tmp_path / "w.npz", r"norm.weight is \(7,\), not \(48,\)")
    np.savez(tmp_path / "w.npz", **{**arrays, "conv_root/kernel": np.zeros((7, 7, 3, 33))})
    refused(tmp_path / "w.npz", "33 channels")
    np.savez(tmp_path / "w.npz", **{**arrays, "head/kernel": np.zeros(7, np.float32)})
    refused(tmp_path / "w.npz", "`head/kernel`")
    np.savez(tmp_path / "w.npz", **{**arrays, "head/kernel": np.zeros((48, 7), np.int8)})
    refused(tmp_path / "w.npz", "`head/kernel` has the type int8")
    positions = "Transformer/posembed_input/pos_embedding"
    np.savez(tmp_path / "w.npz", **{**arrays, positions: arrays[positions].astype(np.int32)})
    refused(tmp_path / "w.npz", f"`{positions}` has the type int32")
    np.savez(tmp_path / "w.npz", **arrays, pos_embedding=arrays[positions])
    refused(tmp_path / "w.npz", "not part of one: `pos_embedding`")
    twice = {"pos_embedding": arrays[positions], "Transformer/pos_embedding": arrays[positions]}
    np.savez(tmp_path / "w.npz", **arrays, **twice)
    refused(tmp_path / "w.npz", "`pos_embedding`, `Transformer/pos_embedding`")


def member(shape, data, dtype="<f4"):
    """Bytes of an `.npy` whose header says `shape`, whatever its data are."""
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, data in members.items():
            packed.writestr(f"{name}.npy", data)


def test_sizes_that_lie(tmp_path):
    archive(tmp_path / "w.npz", cls=member((1, 1, 10**12), b"1234"))
    refused(tmp_path / "w.npz", "its header says 4000000000")
    archive(tmp_path / "w.npz", cls=member((2**40, 2**40), b""))
    refused(tmp_path / "w.npz", "its header says")
    archive(tmp_path / "w.npz", cls=member((-1, -1), b"1234"))
    refused(tmp_path / "w.npz", "cannot be read as numpy arrays")
    zeros = member((2**25,), bytes(2**27))
    archive(tmp_path / "w.npz", zipfile.ZIP_DEFLATED, cls=zeros)
    assert (tmp_path / "w.npz").stat().st_size < 2**20
    refused(tmp_path / "w.npz", "claim to hold 134217")


def test_what_is_no_archive_of_arrays(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes(b"PK\x03\x04 cut")
    refused(path, "cannot be read as numpy arrays")
    archive(path, readme=b"text")
    refused(path, "`readme.npy` is not an array")
    archive(path, cls=member((1,), b"abcd", dtype="|O"))
    refused(path, "Python objects")
    whole = io.BytesIO()
    np.savez(whole, cls=np.zeros((1, 1, 48), np.float32))
    for keep in (0, 1, 3, 10, 50, 200, len(whole.getvalue()) - 1):
        path.write_bytes(whole.getvalue()[:keep])
        refused(path, "cannot be read as numpy arrays")


def test_a_pickle_in_an_archive_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "w.npz", cls=np.array([Trap()], dtype=object))
    refused(tmp_path / "w.npz", "Python objects")
    assert not (tmp_path / "ran").exists()


def test_flipped_bytes_are_an_error_or_harmless(shared, tmp_path):
    """Whatever a damaged file brings up is said as one error, never as a traceback."""
    data = (shared / "reference/google_vit/token_norep/params.npz").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "w.npz"
    for _ in range(60):
        broken = bytearray(data)
        # The first headers and the directory at the end, where a byte means most.
        span = (0, 400) if rng.random() < 0.5 else (len(data) - 5000, len(data))
        for place in rng.integers(*span, 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            load_model(path)
        except VitcliError as error:
            assert error.hint

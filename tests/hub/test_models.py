"""`hf:` models from a Hub on loopback: what is asked for, kept, resumed and told."""

import json
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.hub_server import Fault
from support.loopback import NAMES, files_in, write_model
from support.tiny import vitcli
from support.watching import Told

from vitcli.cli.main import run
from vitcli.commands import models
from vitcli.errors import VitcliError
from vitcli.hub.models import fetch_model
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model


@pytest.fixture
def hub(loopback):
    """A Hub with the model `org/ours`, which this process and those it starts use."""
    write_model(loopback.root / "models/org/ours/model.safetensors")
    (loopback.root / "models/org/ours/README.md").write_text("ours")
    return loopback


def contents(hub):
    """The requests for the content of files, small and large ones."""
    return [r for r in hub.asked("GET") if "/resolve/" in r.path or "/cdn/" in r.path]


def test_a_transformers_repository(hub, shared):
    source = shared / "reference/hf_vit/vit_cls"
    there = hub.root / "models/org/vit"
    there.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(source / name, there / name)
    for name in ("pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (there / name).write_bytes(b"not wanted")
    model = load_model("hf:org/vit")
    io = np.load(source / "io.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(io["pixel_values"])).numpy()
    assert np.abs(logits - io["logits"]).max() < 5e-5
    assert model.preprocess is not None
    report = model.load_report
    assert (report.source, report.layout) == ("hf:org/vit", "huggingface")
    assert f"hf:org/vit: commit {hub.commit('org/vit')}" in report.notes
    fetched = {Path(r.path).name for r in contents(hub)}
    assert fetched == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_a_timm_repository(hub):
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=1)
    torch.nn.init.normal_(net.network.head.weight)
    there = hub.root / "models/timm/tiny.in1k"
    there.mkdir(parents=True)
    save_file(net.state_dict(), there / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 128, "depth": 1}
        | {"num_heads": net.config.num_heads},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
        | {"input_size": [3, 16, 16], "label_names": list(NAMES)},
    }
    (there / "config.json").write_text(json.dumps(config))
    model = load_model("hf:timm/tiny.in1k")
    assert (model.load_report.layout, model.preprocess.mean) == ("timm", (0.1, 0.2, 0.3))
    assert model.config.num_heads == net.config.num_heads
    assert torch.equal(model.network.head.weight, net.network.head.weight)


def test_the_second_load_asks_one_question(hub):
    told = Told()
    first, _ = fetch_model("hf:org/ours", told)
    assert [note.partition(" (")[0] for note in told.notes] == ["downloading model.safetensors"]
    hub.requests.clear()
    told.notes.clear()
    assert fetch_model("hf:org/ours", told)[0] == first
    assert [(r.method, r.path) for r in hub.requests] == [
        ("GET", "/api/models/org/ours/revision/main")
    ]
    assert told.notes == []


def test_the_cache_is_the_hubs_own(hub):
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    path, _ = fetch_model("hf:org/ours")
    assert try_to_load_from_cache("org/ours", "model.safetensors") == str(path)
    found = scan_cache_dir(hub.home / "hub")
    assert not found.warnings
    (repository,) = found.repos
    (revision,) = repository.revisions
    assert (revision.commit_hash, revision.refs) == (hub.commit("org/ours"), {"main"})


def test_a_file_that_others_fetched_is_not_fetched_again(hub):
    from huggingface_hub import hf_hub_download

    theirs = hf_hub_download("org/ours", "model.safetensors")
    hub.requests.clear()
    assert str(fetch_model("hf:org/ours")[0]) == theirs
    assert contents(hub) == []


def test_revisions(hub):
    write_model(hub.root / "models/org/ours@v2/model.safetensors", depth=2)
    main, v2 = hub.commit("org/ours"), hub.commit("org/ours", "v2")
    for notation, commit, depth in (
        ("hf:org/ours", main, 1),
        ("hf:org/ours@v2", v2, 2),
        (f"hf:org/ours@{v2}", v2, 2),
        (f"hf:org/ours@{main[:8]}", main, 1),
    ):
        model = load_model(notation)
        assert model.config.depth == depth
        assert any(note.endswith(f"commit {commit}") for note in model.load_report.notes)
        assert model.load_report.provenance()["name"] == notation


def test_a_fetched_commit_stays_when_main_moves(hub):
    """`vitcli models` lists the branch `main`; what `fetch` prints pins it."""
    fetched = models.fetch("org/ours", Told())
    commit = hub.commit("org/ours")
    assert any(commit in note for note in fetched.notes)
    write_model(hub.root / "models/org/ours/model.safetensors", depth=2)
    assert models.fetch(f"hf:org/ours@{commit}", Told()).path == fetched.path
    assert load_model(f"hf:org/ours@{commit}").config.depth == 1
    assert load_model("hf:org/ours").config.depth == 2


def test_a_new_commit_is_seen(hub):
    load_model("hf:org/ours")
    write_model(hub.root / "models/org/ours/model.safetensors", depth=2)
    assert load_model("hf:org/ours").config.depth == 2


def test_without_the_network_the_cache_serves(hub, monkeypatch):
    from huggingface_hub import close_session, constants

    commit = hub.commit("org/ours")
    path, _ = fetch_model("hf:org/ours")
    hub.__exit__()
    close_session()
    again, notes = fetch_model("hf:org/ours")
    assert again == path
    assert f"commit {commit}, from the cache:" in notes[0]
    assert "cannot be reached" in notes[0]
    # A commit never changes, so the Hub is not asked.
    assert fetch_model(f"hf:org/ours@{commit}") == (
        path,
        [f"hf:org/ours@{commit}: commit {commit}"],
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert fetch_model("hf:org/ours")[1] == [
        f"hf:org/ours: commit {commit}, from the cache: HF_HUB_OFFLINE is set"
    ]
    with pytest.raises(VitcliError, match=r"not in the cache, and HF_HUB_OFFLINE is set") as error:
        fetch_model("hf:org/other")
    assert "unset HF_HUB_OFFLINE" in error.value.hint


def test_the_hub_out_of_order(hub):
    hub.faults["/api/models/org/ours/revision/main"] += [Fault(status=503)] * 4
    with pytest.raises(VitcliError, match=r"not in the cache, and `.*` answers with status 503"):
        fetch_model("hf:org/ours")
    hub.faults["/api/models/org/ours/revision/main"] += [Fault(status=503)] * 3
    path, _ = fetch_model("hf:org/ours")  # the fourth try succeeds
    hub.faults["/api/models/org/ours/revision/main"] += [Fault(status=500)] * 4
    again, notes = fetch_model("hf:org/ours")
    assert again == path
    assert "from the cache" in notes[0] and "answers with status 500" in notes[0]


@pytest.mark.parametrize("fault", [{"cut": 50_000}, {"status": 503}, {"status": 429}])
def test_a_broken_download_is_repeated(hub, fault):
    content = (hub.root / "models/org/ours/model.safetensors").read_bytes()
    hub.faults["/model.safetensors"] += [Fault(**fault)] * 2
    path, _ = fetch_model("hf:org/ours")
    assert path.read_bytes() == content
    assert len([r for r in hub.asked("GET") if r.path.startswith("/cdn/")]) >= 2


def test_a_failed_download_leaves_no_file(hub):
    hub.faults["/model.safetensors"] += [Fault(cut=50_000)] * 30
    with pytest.raises(VitcliError, match=r"cannot download `model.safetensors` .* broke") as error:
        fetch_model("hf:org/ours")
    assert "HTTPS_PROXY" in error.value.hint
    assert [name for name in files_in(hub.home) if not name.endswith(".json")] == ["main"]
    hub.faults.clear()
    fetch_model("hf:org/ours")


def test_a_server_without_ranges(hub):
    hub.ranges = False
    hub.faults["/model.safetensors"] += [Fault(cut=50_000)]
    path, _ = fetch_model("hf:org/ours")
    assert path.read_bytes() == (hub.root / "models/org/ours/model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["altered", "short", "long"])
def test_a_file_that_came_damaged_gets_no_name(hub, change):
    content = (hub.root / "models/org/ours/model.safetensors").read_bytes()
    body = {
        "altered": content[:-1] + bytes([content[-1] ^ 1]),
        "short": content[:-5],
        "long": content + b"x",
    }[change]
    hub.faults["/model.safetensors"] += [Fault(body=body)]
    with pytest.raises(VitcliError, match=r"is damaged: its SHA|is incomplete|sends more than"):
        fetch_model("hf:org/ours")
    assert [name for name in files_in(hub.home) if not name.endswith(".json")] == ["main"]
    path, _ = fetch_model("hf:org/ours")
    assert path.read_bytes() == content


def test_a_damaged_file_in_the_cache_is_downloaded_again(hub, monkeypatch):
    path, _ = fetch_model("hf:org/ours")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = Told()
    assert fetch_model("hf:org/ours", told)[0].read_bytes() == content
    assert "damaged in the cache: downloading it again" in told.warnings[0]
    path.write_bytes(content[:-1])
    hub.__exit__()
    with pytest.raises(VitcliError, match=r"not in the cache, and `.*` cannot be reached"):
        fetch_model("hf:org/ours")


def test_several_at_once_download_once(hub):
    found, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: found.append(fetch_model("hf:org/ours")[0])))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1


def test_shards(hub, shared):
    source = shared / "reference/hf_vit/vit_cls"
    tensors = load_file(source / "model.safetensors")
    there = hub.root / "models/org/big"
    there.mkdir()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, there / file)
    (there / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source / name, there / name)
    io = np.load(source / "io.npz")
    for model in (load_model("hf:org/big"), load_model(there)):
        with torch.no_grad():
            logits = model(torch.from_numpy(io["pixel_values"])).numpy()
        assert np.abs(logits - io["logits"]).max() < 5e-5
    index = there / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../../secret"}}))
    with pytest.raises(VitcliError, match=r"is not a valid index of weights files"):
        load_model("hf:org/big")


def test_a_pickle(hub, shared, tmp_path):
    source = shared / "reference/hf_vit/vit_cls"
    there = hub.root / "models/org/old"
    there.mkdir()
    shutil.copy(source / "config.json", there / "config.json")
    torch.save(load_file(source / "model.safetensors"), there / "pytorch_model.bin")
    io = np.load(source / "io.npz")
    with torch.no_grad():
        logits = load_model("hf:org/old")(torch.from_numpy(io["pixel_values"])).numpy()
    assert np.abs(logits - io["logits"]).max() < 5e-5
    (there / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(VitcliError):
        load_model("hf:org/old")
    assert not (tmp_path / "ran").exists()


class Trap:
    """A pickle of it makes a folder when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_chosen(hub):
    from vitcli.hub.models import choose_weights
    from vitcli.hub.repository import Repository

    repository = Repository("org/x", "main")
    for files, chosen in (
        (["model.safetensors", "pytorch_model.bin", "a.npz"], "model.safetensors"),
        (["open_clip_model.safetensors", "timm.safetensors"], "timm.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "x.pth"], "pytorch_model.bin"),
        (["B_16.npz", "README.md"], "B_16.npz"),
        (["dino.pth", "sub/model.npz"], "dino.pth"),
    ):
        assert choose_weights(files, repository) == chosen
    with pytest.raises(VitcliError, match=r"holds 2 weights files: `a.npz`, `b.npz`") as error:
        choose_weights(["a.npz", "b.npz"], repository)
    assert error.value.hint.endswith("/org/x/resolve/main/a.npz`")
    with pytest.raises(
        VitcliError, match=r"no weights in a supported format; it holds `tf_model.h5`"
    ):
        choose_weights(["tf_model.h5", "onnx/model.onnx"], repository)


def test_a_run_writes_the_commit_down(hub, here):
    command = ["fewshot", "builtin:digits", "--model", "hf:org/ours", "--shots", "1", "--out", "r"]
    assert run(command) == 0
    written = json.loads((here / "r/provenance.json").read_text())["model"]
    commit = hub.commit("org/ours")
    assert written["name"] == "hf:org/ours"
    assert f"hf:org/ours: commit {commit}" in written["notes"]


def test_the_client_is_left_as_it_was(hub):
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import logging as theirs

    theirs.set_verbosity(logging.INFO)
    fetch_model("hf:org/ours")
    assert (theirs.get_verbosity(), are_progress_bars_disabled()) == (logging.INFO, False)
    theirs.set_verbosity(logging.WARNING)


def test_the_command_line_in_a_process_of_its_own(hub, here):
    Image.new("RGB", (16, 16)).save("x.png")
    fetch_model("hf:org/ours@main")  # into the cache that HF_HOME names, in this process
    (hub.home / "hub").rename(hub.home / "other")
    done = vitcli("predict", "x.png", "--json", "--model", "hf:org/ours")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] in NAMES
    assert "downloading model.safetensors (" in done.stderr
    assert f"hf:org/ours: commit {hub.commit('org/ours')}" in done.stderr
    assert "\r" not in done.stderr and "%|" not in done.stderr  # no bars of the Hub's client
    assert files_in(hub.home / "hub") == files_in(hub.home / "other")


def test_a_damaged_small_file_in_the_cache_is_downloaded_again(hub):
    (hub.root / "models/org/ours/config.json").write_text('{"a": 1}')
    path, _ = fetch_model("hf:org/ours")
    config = path.parent / "config.json"
    config.write_text('{"a": 3}')  # one bit
    told = Told()
    fetch_model("hf:org/ours", told)
    assert config.read_text() == '{"a": 1}'
    assert "`config.json` of `hf:org/ours` is damaged in the cache" in told.warnings[0]

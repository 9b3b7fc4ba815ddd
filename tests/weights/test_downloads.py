"""Weights at `https:` and `gs:` addresses, from a web server on loopback."""

import hashlib
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.hub_server import Fault, HubServer
from support.loopback import NAMES, Told, write_model

from vitcli.cli.main import run
from vitcli.errors import VitcliError
from vitcli.hub import http as download
from vitcli.hub.http import cache_folder
from vitcli.run import run_stem
from vitcli.weights import downloads as remote
from vitcli.weights.downloads import fetch_address, web_address
from vitcli.weights.load import load_model


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server with some bytes and a model of ours."""
    monkeypatch.setenv("VITCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
    folder = tmp_path / "web/files"
    write_model(folder / "ours.safetensors")
    (folder / "w.npz").write_bytes(np.random.default_rng(0).bytes(600_000))
    with HubServer(tmp_path / "web") as server:
        server.files = f"{server.url}/files"
        server.cache = tmp_path / "cache"
        yield server


def kept(web):
    """Names in the cache, without the locks."""
    return sorted(p.name for p in web.cache.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_model_at_an_address(web):
    address = f"{web.files}/ours.safetensors"
    model = load_model(address)
    assert (model.labels, model.load_report.source) == (NAMES, address)
    here = load_model(web.root / "files/ours.safetensors")
    assert torch.equal(model.network.head.weight, here.network.head.weight)


def test_progress_in_megabytes(web):
    (web.root / "files/big.npz").write_bytes(bytes(2_500_000))
    web.faults["/big.npz"] += [Fault(cut=1_200_000)]
    told = Told()
    fetch_address(f"{web.files}/big.npz", told)
    assert told.bars == [["big.npz, MB", 3, 0, 1], ["big.npz, MB", 3, 1, 3]]
    assert told.notes == ["downloading big.npz (2 MB) …"]


def test_a_google_file_at_both_addresses(web, shared, monkeypatch):
    source = shared / "reference/google_vit/token_norep/params.npz"
    bucket = web.root / "files/vit_models/augreg"
    bucket.mkdir(parents=True)
    shutil.copy(source, bucket / "B 16.npz")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", web.files)
    one = load_model("gs://vit_models/augreg/B 16.npz", num_heads=3, image_size=32)
    assert one.load_report.layout == "google"
    other = load_model(f"{web.files}/vit_models/augreg/B%2016.npz", num_heads=3, image_size=32)
    local = load_model(source, num_heads=3, image_size=32)
    for name, tensor in local.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor)
        assert torch.equal(other.state_dict()[name], tensor)
    assert len(web.asked("GET", "/B 16.npz")) == 2  # the same place: the second was a question
    assert web.requests[-1].headers["if-none-match"]


def test_where_a_bucket_is_found(monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    found = web_address("gs://vit_models/augreg/Ti_16-i21k#1.npz")
    assert found == "https://storage.googleapis.com/vit_models/augreg/Ti_16-i21k%231.npz"
    assert web_address("https://host/x.npz") == "https://host/x.npz"


def test_the_second_load_downloads_nothing(web):
    told = Told()
    path, notes = fetch_address(f"{web.files}/w.npz", told)
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()
    assert told.notes == ["downloading w.npz (600 kB) …"]
    assert kept(web) == ["w.npz", "w.npz.json"]
    etag = json.loads(path.with_name("w.npz.json").read_text())["etag"]
    assert notes == [f"`{web.files}/w.npz`: version {etag}"]
    assert fetch_address(f"{web.files}/w.npz", told) == (path, notes)
    assert len(told.notes) == 1
    assert [r.headers.get("if-none-match") for r in web.requests] == [None, etag]


def test_a_server_that_knows_no_conditions(web):
    web.faults["/w.npz"] += [Fault(headers={"ETag": None})] * 2
    path, _ = fetch_address(f"{web.files}/w.npz")
    told = Told()
    assert fetch_address(f"{web.files}/w.npz", told)[0] == path
    assert told.notes == []  # the same size and hash


def test_a_file_that_changed_is_fetched_again(web):
    path, _ = fetch_address(f"{web.files}/w.npz")
    (web.root / "files/w.npz").write_bytes(b"new")
    assert fetch_address(f"{web.files}/w.npz")[0] == path
    assert path.read_bytes() == b"new"


def test_a_break_is_mended_in_the_same_run(web):
    web.faults["/w.npz"] += [Fault(cut=400_000), Fault(cut=1)]
    path, _ = fetch_address(f"{web.files}/w.npz")
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()
    starts = [int(r.range[6:-1]) if r.range else 0 for r in web.requests]
    assert starts == [0, 400_000, 400_001]
    assert len({r.headers["if-range"] for r in web.requests[1:]}) == 1


def test_a_download_goes_on_where_the_last_run_stopped(web):
    web.faults["/w.npz"] += [Fault(cut=400_000), *[Fault(status=503)] * 3]
    with pytest.raises(VitcliError, match=r"cannot fetch `http://.*/w.npz`: .* 503") as error:
        fetch_address(f"{web.files}/w.npz")
    assert "goes on where this one stopped" in error.value.hint
    assert kept(web) == ["w.npz.part", "w.npz.part.json"]
    told = Told()
    web.requests.clear()
    path, _ = fetch_address(f"{web.files}/w.npz", told)
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()
    assert [r.range for r in web.requests] == ["bytes=400000-"]
    assert told.notes == ["downloading w.npz (600 kB), 400 kB of it here already …"]
    assert kept(web) == ["w.npz", "w.npz.json"]


def test_parts_of_two_files_are_not_sewn_together(web):
    web.faults["/w.npz"] += [Fault(cut=400_000), *[Fault(status=503)] * 3]
    with pytest.raises(VitcliError):
        fetch_address(f"{web.files}/w.npz")
    new = np.random.default_rng(1).bytes(600_000)
    (web.root / "files/w.npz").write_bytes(new)
    assert fetch_address(f"{web.files}/w.npz")[0].read_bytes() == new


def test_a_part_that_is_the_whole(web):
    path, _ = fetch_address(f"{web.files}/w.npz")
    content, facts = path.read_bytes(), path.with_name("w.npz.json").read_text()
    shutil.rmtree(web.cache)
    path.parent.mkdir(parents=True)
    path.with_name("w.npz.part").write_bytes(content)  # killed before it got its name
    path.with_name("w.npz.part.json").write_text(facts)
    assert fetch_address(f"{web.files}/w.npz")[0].read_bytes() == content
    assert kept(web) == ["w.npz", "w.npz.json"]
    path.unlink()
    path.with_name("w.npz.part").write_bytes(content + b"more")
    path.with_name("w.npz.part.json").write_text(facts)
    assert fetch_address(f"{web.files}/w.npz")[0].read_bytes() == content


def test_a_file_that_came_damaged_gets_no_name(web):
    web.faults["/w.npz"] += [Fault(body=bytes(600_000))]
    web.faults["/w.npz"][0].headers = {"x-goog-hash": "md5=" + "A" * 22 + "=="}
    with pytest.raises(VitcliError, match=r"came damaged: its md5 is"):
        fetch_address(f"{web.files}/w.npz")
    assert [name for name in kept(web) if not name.endswith(".json")] == []
    fetch_address(f"{web.files}/w.npz")


def test_without_the_network_the_copy_serves(web):
    path, _ = fetch_address(f"{web.files}/w.npz")
    web.faults["/w.npz"] += [Fault(status=500)] * 3
    again, notes = fetch_address(f"{web.files}/w.npz")
    assert again == path and "answers 500" in notes[0] and "cached copy is used" in notes[0]
    web.__exit__()
    again, notes = fetch_address(f"{web.files}/w.npz")
    assert again == path
    assert "`127.0.0.1` cannot be reached (Connection refused); the cached copy" in notes[0]
    with pytest.raises(VitcliError, match=r"cannot be reached \(Connection refused\)") as error:
        fetch_address(f"{web.files}/ours.safetensors")
    assert "HTTPS_PROXY" in error.value.hint


def test_silence(web, monkeypatch):
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.1)
    web.faults["/w.npz"] += [Fault(hang=True)]
    with pytest.raises(VitcliError, match=r"`127.0.0.1` does not answer in time"):
        fetch_address(f"{web.files}/w.npz")


@pytest.mark.parametrize(
    ("address", "words", "hint"),
    [
        ("{}/nothing.npz", "there is no file at `http://", "look at the address"),
        ("{}/page.npz", "is a web page, not a weights file", "`raw` or `resolve`"),
        ("{}/closed.npz", "may not be read without an account (status 403)", "download it"),
        ("{}/teapot.npz", "the server answers with status 418", "look at"),
        ("{}/folder", "does not end like a weights file", "the file itself"),
        ("https://huggingface.co/google/vit", "does not end like a weights", "`hf:ORG/NAME`"),
        ("https:", "`https:` is no address", "https://HOST/PATH/FILE.npz"),
        ("https://", "`https://` is no address", "https://HOST/PATH/FILE.npz"),
        ("gs://bucket", "names no file in a bucket", "gs://BUCKET/FOLDER/FILE.npz"),
        ("gs:/bucket/x.npz", "names no file in a bucket", "gs://BUCKET/FOLDER/FILE.npz"),
    ],
)
def test_errors_by_their_words(web, here, capfd, address, words, hint):
    (web.root / "files/page.npz").write_text("<html>")
    web.faults["/closed.npz"] += [Fault(status=403)]
    web.faults["/teapot.npz"] += [Fault(status=418)]
    Image.new("RGB", (16, 16)).save("x.png")
    assert run(["predict", "x.png", "--model", address.format(web.files)]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert out == "" and len(lines) == 2 and "Traceback" not in err
    assert words in lines[0] and hint in lines[1]
    assert kept(web) == []


def test_secrets_stay_out_of_messages(web):
    address = f"{web.files}/nothing.npz?X-Signature=secret".replace("http://", "http://me:secret@")
    with pytest.raises(VitcliError) as error:
        fetch_address(address)
    assert "secret" not in error.value.message + (error.value.hint or "")
    path, _ = fetch_address(f"{web.files}/w.npz?X-Signature=secret")
    assert "secret" not in "".join(p.read_text() for p in path.parent.glob("*.json"))


def test_a_full_disk(web, monkeypatch):
    usage = shutil.disk_usage(web.root)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(VitcliError, match=r"needs 600 kB in `.*`, where 1 kB are free"):
        fetch_address(f"{web.files}/w.npz")
    assert kept(web) == ["w.npz.part.json"]


def test_a_disk_that_is_full_in_the_middle(web):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(VitcliError, match=r"cannot keep `w.npz` in .*: File too") as error:
            fetch_address(f"{web.files}/w.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "VITCLI_CACHE" in error.value.hint
    assert "w.npz" not in kept(web)
    path, _ = fetch_address(f"{web.files}/w.npz")  # what fitted is used
    assert web.requests[-1].range == "bytes=300000-"
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("hf:google/vit-base-patch16-224", "vit-base-patch16-224"),
        ("hf:org/name@refs/pr/1", "name"),
        ("https://host/a/B_16.npz?X-Signature=" + "secret" * 99, "B_16"),
        ("gs://vit_models/augreg/Ti_16.npz", "Ti_16"),
    ],
)
def test_what_a_run_of_it_is_called(model, stem):
    assert run_stem(model) == stem


def test_names_and_places(web, monkeypatch, tmp_path):
    (web.root / "files/a:b*c.npz").write_bytes(b"x")
    path, _ = fetch_address(f"{web.files}/a%3Ab%2Ac.npz?version=2")
    assert path.name == "a_b_c.npz"
    whole = f"{web.files}/a%3Ab%2Ac.npz?version=2"
    assert path.parent.name == hashlib.sha256(whole.encode()).hexdigest()[:20]
    assert path.parent.parent == web.cache / "files"
    monkeypatch.delenv("VITCLI_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/vitcli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/vitcli"

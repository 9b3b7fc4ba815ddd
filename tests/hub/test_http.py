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
from support.loopback import NAMES, write_model
from support.watching import Told

from vitcli.cli.main import run
from vitcli.errors import VitcliError
from vitcli.hub import client, failures
from vitcli.hub.http import cache_folder, fetch_url, web_address
from vitcli.run import run_stem
from vitcli.weights.load import load_model


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server with some bytes and a model of ours."""
    monkeypatch.setenv("VITCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(failures, "PAUSES", (0.0, 0.0, 0.0))
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
    fetch_url(f"{web.files}/big.npz", told)
    assert told.bars == [["big.npz, MB", 3, 0, 1], ["big.npz, MB", 3, 0, 3]]
    assert told.notes == ["downloading big.npz (2 MB) …"] * 2


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
    path, notes = fetch_url(f"{web.files}/w.npz", told)
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()
    assert told.notes == ["downloading w.npz (600 kB) …"]
    assert kept(web) == ["w.npz", "w.npz.json"]
    etag = json.loads(path.with_name("w.npz.json").read_text())["etag"]
    assert notes == [f"`{web.files}/w.npz`: version {etag}"]
    assert fetch_url(f"{web.files}/w.npz", told) == (path, notes)
    assert len(told.notes) == 1
    assert [r.headers.get("if-none-match") for r in web.requests] == [None, etag]


def test_a_server_that_knows_no_conditions(web):
    web.faults["/w.npz"] += [Fault(headers={"ETag": None})] * 2
    path, _ = fetch_url(f"{web.files}/w.npz")
    told = Told()
    assert fetch_url(f"{web.files}/w.npz", told)[0] == path
    assert told.notes == []  # the same size and hash


def test_a_file_that_changed_is_fetched_again(web):
    path, _ = fetch_url(f"{web.files}/w.npz")
    (web.root / "files/w.npz").write_bytes(b"new")
    assert fetch_url(f"{web.files}/w.npz")[0] == path
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("fault", [{"cut": 400_000}, {"status": 503}, {"status": 429}])
def test_a_broken_download_is_repeated(web, fault):
    web.faults["/w.npz"] += [Fault(**fault)] * 3
    path, _ = fetch_url(f"{web.files}/w.npz")
    assert path.read_bytes() == (web.root / "files/w.npz").read_bytes()
    assert len(web.requests) == 4


def test_a_failed_download_leaves_no_file(web):
    web.faults["/w.npz"] += [Fault(cut=400_000), *[Fault(status=503)] * 3]
    with pytest.raises(VitcliError, match=r"cannot download `http://.*/w.npz`: .* 503") as error:
        fetch_url(f"{web.files}/w.npz")
    assert error.value.hint == "try again later"
    assert kept(web) == []


def test_a_damaged_copy_is_downloaded_again(web):
    path, _ = fetch_url(f"{web.files}/w.npz")
    content = path.read_bytes()
    for damaged in (content[:-1], content[:300] + b"?" + content[301:], b""):
        path.write_bytes(damaged)
        told = Told()
        assert fetch_url(f"{web.files}/w.npz", told)[0].read_bytes() == content
        assert "is damaged: downloading it again" in told.warnings[0]
    for record in ("[]", "null", "{}", "[" * 100_000, '{"sha256": 5}', "\0"):
        path.with_name("w.npz.json").write_text(record)
        assert fetch_url(f"{web.files}/w.npz")[0].read_bytes() == content


def test_a_file_that_came_damaged_gets_no_name(web):
    web.faults["/w.npz"] += [Fault(body=bytes(600_000))]
    web.faults["/w.npz"][0].headers = {"x-goog-hash": "md5=" + "A" * 22 + "=="}
    with pytest.raises(VitcliError, match=r"is damaged: its MD5 is"):
        fetch_url(f"{web.files}/w.npz")
    assert [name for name in kept(web) if not name.endswith(".json")] == []
    fetch_url(f"{web.files}/w.npz")


def test_without_the_network_the_copy_serves(web):
    path, _ = fetch_url(f"{web.files}/w.npz")
    web.faults["/w.npz"] += [Fault(status=500)] * 4
    again, notes = fetch_url(f"{web.files}/w.npz")
    assert (
        again == path
        and "answers with status 500" in notes[0]
        and "cached copy is used" in notes[0]
    )
    web.__exit__()
    again, notes = fetch_url(f"{web.files}/w.npz")
    assert again == path
    assert "`127.0.0.1` cannot be reached (Connection refused); the cached copy" in notes[0]
    with pytest.raises(VitcliError, match=r"cannot be reached \(Connection refused\)") as error:
        fetch_url(f"{web.files}/ours.safetensors")
    assert "HTTPS_PROXY" in error.value.hint


def test_silence(web, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    web.faults["/w.npz"] += [Fault(hang=True)]
    with pytest.raises(VitcliError, match=r"`127.0.0.1` does not answer in time"):
        fetch_url(f"{web.files}/w.npz")


@pytest.mark.parametrize(
    ("address", "words", "hint"),
    [
        ("{}/nothing.npz", "there is no file at `http://", "check the URL"),
        ("{}/page.npz", "is a web page, not a file", "`raw` or `resolve`"),
        ("{}/closed.npz", "needs an account (status 403)", "download the file"),
        ("{}/teapot.npz", "the server answers with status 418", "check the URL"),
        ("{}/folder", "does not end like a weights file", "the file itself"),
        ("https://huggingface.co/google/vit", "does not end like a weights", "`hf:ORG/NAME`"),
        ("https:", "`https:` is not a valid URL", "https://HOST/PATH/FILE.npz"),
        ("https://", "`https://` is not a valid URL", "https://HOST/PATH/FILE.npz"),
        ("http://[::1/x.npz", "is not a valid URL: Invalid IPv6 URL", "https://HOST"),
        ("http://127.0.0.1:99999/x.npz", "is not a valid URL: Port out of range", "https://HOST"),
        ("http://127.0.0.1:x/x.npz", "is not a valid URL: Port could not be cast", "https://HOST"),
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
        fetch_url(address)
    assert "secret" not in error.value.message + (error.value.hint or "")
    path, _ = fetch_url(f"{web.files}/w.npz?X-Signature=secret")
    assert "secret" not in "".join(p.read_text() for p in path.parent.glob("*.json"))


def test_a_full_disk(web, monkeypatch):
    usage = shutil.disk_usage(web.root)._replace(free=1000)
    monkeypatch.setattr(client.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(VitcliError, match=r"needs 600 kB in `.*`, where 1 kB are free"):
        fetch_url(f"{web.files}/w.npz")
    assert kept(web) == []


def test_a_disk_that_is_full_in_the_middle(web):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(VitcliError, match=r"cannot write `.*w.npz`: File too large"):
            fetch_url(f"{web.files}/w.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(web) == []
    path, _ = fetch_url(f"{web.files}/w.npz")
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
    path, _ = fetch_url(f"{web.files}/a%3Ab%2Ac.npz?version=2")
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

"""Hostile, broken and slow servers: no file outside of the cache, and no endless wait."""

import json
import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from PIL import Image
from support.hub_server import Fault
from support.loopback import write_model

from vitcli.cli.main import run
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.hub import client
from vitcli.hub.http import fetch_url
from vitcli.hub.models import fetch_model
from vitcli.hub.repository import list_files, parse_repository

EVIL = ("../../../../evil", "{}/evil", "..", "a/b", "..\\\\evil", "", "x" * 300, 'a"b')


@pytest.fixture
def hub(loopback):
    """A Hub with the model `org/ours` and a dataset of class folders, `org/pets`."""
    write_model(loopback.root / "models/org/ours/model.safetensors")
    (loopback.root / "models/org/ours/config.json").write_text("{}")
    for name in ("cat", "dog"):
        folder = loopback.root / "datasets/org/pets" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    (loopback.root / "datasets/org/pets/README.md").write_text("# Pets")
    return loopback


def others(hub):
    """All files around the cache and the server, with their times."""
    top = hub.home.parent
    found = [p for p in top.rglob("*") if hub.home not in p.parents and hub.root not in p.parents]
    return {p: p.stat().st_mtime_ns for p in found if p not in (hub.home, hub.root)}


def fetch(what):
    return load_data("hf:org/pets") if what == "dataset" else fetch_model("hf:org/ours")


@pytest.mark.parametrize("value", EVIL)
@pytest.mark.parametrize(
    ("what", "ending", "header"),
    [
        ("model", "/config.json", "ETag"),
        ("model", "/model.safetensors", "X-Linked-Etag"),
        ("model", "/config.json", "X-Repo-Commit"),
        ("model", "/model.safetensors", "X-Repo-Commit"),
        ("dataset", "/0.png", "ETag"),
        ("dataset", "/README.md", "ETag"),
    ],
)
def test_headers_never_become_paths(hub, what, ending, header, value):
    value = value.format(hub.home.parent)
    for text in (value, f'"{value}"', f'W/"{value}"'):
        hub.headers[ending] = {header: text}
        before = others(hub)
        with pytest.raises(
            VitcliError, match=r"an invalid X-Repo-Commit|does not answer like the Hub|is damaged"
        ):
            fetch(what)
        assert others(hub) == before
        blobs = [p.name for p in hub.home.rglob("blobs/*") if "evil" in p.name or len(p.name) > 64]
        assert blobs == []


def test_the_etag_of_a_redirect_may_be_anything(hub):
    """Only the ETag that names a file in the cache matters: `X-Linked-Etag`, if there is one."""
    hub.headers["/model.safetensors"] = {"ETag": 'W/"5d-a/b+c="'}
    before = others(hub)
    fetch_model("hf:org/ours")
    assert others(hub) == before


@pytest.mark.parametrize("value", [*EVIL, 5, None, [], "main"])
def test_a_commit_is_checked(hub, value):
    text = value.format(hub.home.parent) if isinstance(value, str) else value
    answer = json.dumps({"id": "org/ours", "sha": text}).encode()
    hub.faults["/revision/main"] += [Fault(body=answer)]
    before = others(hub)
    with pytest.raises(VitcliError, match=r"sends an invalid commit|does not answer like the Hub"):
        fetch_model("hf:org/ours")
    assert others(hub) == before


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/x",
        "a/../../x",
        "a\\\\..\\\\x",
        "C:/x",
        "C:x",
        "./x",
        "a//b",
        "",
        "\\0",
        5,
        None,
        ["x"],
    ],
)
def test_file_names_are_checked(hub, path):
    commit = hub.commit("org/ours")
    entry = {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
    hub.faults[f"/tree/{commit}"] += [Fault(body=json.dumps([entry]).encode())]
    before = others(hub)
    with pytest.raises(VitcliError, match=r"an invalid file|does not answer like the Hub"):
        fetch_model("hf:org/ours")
    assert others(hub) == before


def test_a_reference_in_the_cache_is_checked(hub, monkeypatch):
    ref = hub.home / "hub/models--org--ours/refs/main"
    ref.parent.mkdir(parents=True)
    (hub.home / "hub/models--org--ours/snapshots").mkdir()
    (hub.home.parent / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for text in ("../../../..", str(hub.home.parent), "", "\\xff"):
        ref.write_text(text)
        with pytest.raises(VitcliError, match=r"is not in the cache, and HF_HUB_OFFLINE is set"):
            fetch_model("hf:org/ours")


@pytest.mark.parametrize(
    "place", ["file:///etc/hostname", "ftp://x/y", "http://[::1", "//x:99999/"]
)
def test_redirects_stay_on_the_web(hub, place):
    (hub.root / "files").mkdir()
    (hub.root / "files/x.npz").write_bytes(b"x")
    for ending in ("/config.json", "/x.npz", "/revision/main"):
        hub.headers = {ending: {"Location": place}}
        with pytest.raises(VitcliError, match=r"redirects to .* which is not HTTP"):
            fetch_model("hf:org/ours")
            fetch_url(f"{hub.url}/files/x.npz")


DEEP = b"[" * 100_000 + b"]" * 100_000
WRONG = [b"[]", b"null", b"5", b'"x"', b"{}", b"[5]", b"[[]]", b"\xff", b"", DEEP, b"9" * 5000]
WRONG += [b'[{"type": "file", "path": "x"}]', b'{"siblings": 5, "lastModified": 5}']
WRONG += [b'{"id": 5, "sha": {}}']


@pytest.mark.parametrize("request_path", ["/revision/main", "/tree/{}"])
@pytest.mark.parametrize("body", WRONG)
def test_answers_of_the_wrong_type(hub, request_path, body):
    ending = request_path.format(hub.commit("org/ours"))
    hub.faults[ending] += [Fault(body=body)]
    try:
        fetch_model("hf:org/ours")
    except VitcliError as error:
        assert "\n" not in error.message and len(error.message) < 400


def test_a_wrong_answer_is_a_user_error(hub, here, capfd):
    Image.new("RGB", (8, 8)).save("x.png")
    hub.faults["/revision/main"] += [Fault(body=b"[]")]
    assert run(["predict", "x.png", "--model", "hf:org/ours"]) == 2
    assert "does not answer like the Hub" in capfd.readouterr().err


@pytest.mark.parametrize("drip", ["headers", "body"])
@pytest.mark.parametrize("ending", ["/revision/main", "/tree/", "/model.safetensors", "/x.npz"])
def test_a_slow_server_is_given_up(hub, monkeypatch, ending, drip):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    (hub.root / "files").mkdir()
    (hub.root / "files/x.npz").write_bytes(bytes(100_000))
    if ending == "/tree/":
        ending += hub.commit("org/ours")
    hub.faults[ending] += [Fault(drip=drip)] * 9
    began = time.monotonic()
    with pytest.raises(VitcliError, match=r"does not send its answer within|is too slow"):
        fetch_url(f"{hub.url}/files/x.npz") if ending == "/x.npz" else fetch_model("hf:org/ours")
    assert time.monotonic() - began < 5
    assert list(hub.home.rglob("*.incomplete")) == []


def test_a_pause_has_a_limit(hub, monkeypatch):
    pauses = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", pauses.append)
    headers = {"Retry-After": "86400", "ratelimit": '"api";r=0;t=86400'}
    hub.faults["/model.safetensors"] += [Fault(status=429, headers=headers)]
    fetch_model("hf:org/ours")
    assert sum(pauses) < 60


def test_an_answer_has_a_limit(hub, monkeypatch):
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1000)
    hub.faults["/revision/main"] += [Fault(body=b" " * 2000)]
    with pytest.raises(VitcliError, match=r"the answer of `127.0.0.1` is too long"):
        fetch_model("hf:org/ours")


def test_a_file_has_the_size_that_was_announced(hub):
    (hub.root / "models/org/ours/config.json").write_bytes(b" " * 20_000_000)
    with pytest.raises(VitcliError, match=r"`config.json` of `hf:org/ours` is too large: 20 MB"):
        fetch_model("hf:org/ours")
    commit = hub.commit("org/ours")
    entry = {"type": "file", "path": "model.safetensors", "size": 9, "oid": "0" * 40}
    hub.faults[f"/tree/{commit}"] += [Fault(body=json.dumps([entry]).encode())]
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    for path in hub.home.rglob("trees/*"):
        path.unlink()
    with pytest.raises(VitcliError, match=r"sends more than the 9 bytes"):
        fetch_model("hf:org/ours")


def test_the_client_of_the_program_around_is_kept(hub):
    from huggingface_hub.utils import _http

    made = []

    def factory():
        made.append(_http.default_client_factory())
        return made[-1]

    before = _http._GLOBAL_CLIENT_FACTORY
    try:
        huggingface_hub.set_client_factory(factory)
        for _ in range(2):
            list_files(parse_repository("hf:org/ours"))
        assert len(made) == 1
        hub.headers["/config.json"] = {"ETag": "../x"}
        with pytest.raises(VitcliError, match=r"does not have an ETag"):
            fetch_model("hf:org/ours")
    finally:
        huggingface_hub.set_client_factory(before)

"""What is said when a Hub on loopback refuses, is silent, or has not what is asked for."""

import shutil

import pytest
from PIL import Image
from support.hub_server import Fault
from support.loopback import files_in, write_model

from vitcli.cli.main import run
from vitcli.errors import VitcliError
from vitcli.hub import client
from vitcli.hub.models import fetch_model


@pytest.fixture
def hub(loopback):
    """A Hub with the model `org/ours`, which this process and those it starts use."""
    write_model(loopback.root / "models/org/ours/model.safetensors")
    (loopback.root / "models/org/ours/README.md").write_text("ours")
    return loopback


def refused(hub, case):
    """Bring about an error; the MODEL that meets with it, and words of error and hint."""
    private = "`hf auth login`"
    if case == "missing":
        return "hf:org/nothing", "the Hub has no model `org/nothing`", private
    if case == "missing, said by a mirror":  # a bare 404, without the Hub's own code
        hub.faults["/revision/main"] += [Fault(status=404)]
        return "hf:org/ours", "the Hub has no model `org/ours`", private
    if case == "private":
        hub.private.add("org/ours")
        return "hf:org/ours", "the Hub has no model `org/ours` that you may read", private
    if case == "gated":
        hub.gated.add("org/ours")
        return "hf:org/ours", "`hf:org/ours` is gated", "accept its terms"
    if case == "revision":
        return "hf:org/ours@v9", "`hf:org/ours` has no revision `v9`", "/commits"
    if case == "no weights":
        (hub.root / "models/org/ours/model.safetensors").unlink()
        return "hf:org/ours", "holds no weights in a supported format", "model.safetensors"
    if case == "no repository":
        return "hf:", "`hf:` does not name a repository", "hf:ORG/NAME"
    if case == "a path":
        return "hf:a/b/c", "`hf:a/b/c` does not name a repository", "hf:ORG/NAME"
    if case == "a way out":
        return "hf:org/ours@../../x", "`../../x` is not a revision", "a branch"
    if case == "a login page":
        fault = Fault(body=b"<html>", headers={"Content-Type": "text/html"})
        hub.faults["/revision/main"] += [fault]
        return "hf:org/ours", "does not answer like the Hub", "HF_ENDPOINT"
    assert case == "forbidden"
    hub.faults["/revision/main"] += [Fault(status=403)]
    return "hf:org/ours", "you may not read `hf:org/ours` (status 403)", private


CASES = ("missing", "missing, said by a mirror", "private", "gated", "revision", "no weights")
CASES += ("no repository", "a path")
CASES += ("a way out", "a login page", "forbidden")


@pytest.mark.parametrize("case", CASES)
def test_errors_by_their_words(hub, here, capfd, case):
    model, words, hint = refused(hub, case)
    Image.new("RGB", (16, 16)).save("x.png")
    assert run(["predict", "x.png", "--model", model]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert out == "" and len(lines) == 2
    assert lines[0].startswith("error: ") and words in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]
    assert "Traceback" not in err
    assert not [name for name in files_in(hub.home) if name.endswith(".safetensors")]


def test_a_token_opens_what_is_gated(hub, monkeypatch):
    hub.gated.add("org/ours")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    fetch_model("hf:org/ours")
    sent = {"authorization" in r.headers for r in hub.requests if r.path.startswith("/cdn/")}
    assert sent == {False}  # another host must not see it


def test_silence(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults["/revision/main"] += [Fault(hang=True)]
    with pytest.raises(VitcliError, match=r"`http.*` does not answer in time"):
        fetch_model("hf:org/ours")
    hub.faults["/model.safetensors"] += [Fault(hang=True)] * 30
    with pytest.raises(VitcliError, match=r"cannot download `model.safetensors` .* in time"):
        fetch_model("hf:org/ours")


def test_a_full_disk(hub, monkeypatch):
    usage = shutil.disk_usage(hub.root)._replace(free=1000)
    monkeypatch.setattr(client.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(VitcliError, match=r"needs .* kB in `.*`, where 1 kB are free") as error:
        fetch_model("hf:org/ours")
    assert "HF_HOME" in error.value.hint


def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    with pytest.raises(
        VitcliError, match=r"the cache `.*` has no list of the files of `hf:org/ours`"
    ):
        fetch_model("hf:org/ours")

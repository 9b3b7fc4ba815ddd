"""What several test files need."""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch is imported: two threads that spin beside other processes crawl (recipes/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Bytecode is kept even where PYTHONDONTWRITEBYTECODE is set. Without it each process that a test
# starts compiles the package, and pytest rewrites all test files once more.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))


def pytest_addoption(parser):
    parser.addoption(
        "--write-families",
        action="store_true",
        help="write the differences that test_families.py measures into docs/how-to/families.md",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in as many processes as there are cores, four at most.

    Only where nothing else was asked for: no `-n`, no file, no debugger. Each process computes with
    its share of the cores, because threads that wait for each other are slower than one.
    """
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    inside = "PYTEST_XDIST_WORKER" in os.environ  # one of the processes already
    free = whole and not (inside or config.option.usepdb or config.option.collectonly)
    if free and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        cores = os.cpu_count() or 1
        config.option.numprocesses = min(4, cores)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // min(4, cores))))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Spare the garbage collector what is imported here: it took half a second to go through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        if "PYTEST_XDIST_WORKER" in os.environ:
            import torch._dynamo  # noqa: F401 - the first optimizer of a process loads it
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference numbers and real data, beside the checkout."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder with reference numbers beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory) -> None:
    """What `datasets` and we cache goes away with the other temporary files."""
    os.environ["VITCLI_CACHE"] = str(tmp_path_factory.mktemp("vitcli"))
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(folder)  # for programs that tests start
    if loaded := sys.modules.get("datasets.config"):
        loaded.HF_DATASETS_CACHE = folder


def draw_nothing(*_) -> None:
    """In the place of functions that take longer than a tiny run."""


@pytest.fixture(scope="session", autouse=True)
def drawing():
    """The patches that keep runs from drawing, those of fixtures that tests share too."""
    with pytest.MonkeyPatch.context() as patches:
        leave_out(patches)
        yield patches


def leave_out(patches) -> None:
    """Patch what has been imported until now."""
    for name in ("vitcli.train.session", "vitcli.commands.evaluate"):
        for function in ("write_report", "draw_curves"):
            if getattr(sys.modules.get(name), function, draw_nothing) is not draw_nothing:
                patches.setattr(sys.modules[name], function, draw_nothing)


@pytest.fixture(autouse=True)
def fast_runs(request, drawing) -> None:
    """A run draws no pictures, except under `draws_curves`."""
    if request.node.get_closest_marker("draws_curves"):
        drawing.undo()
    else:
        leave_out(drawing)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loopback(tmp_path, monkeypatch):
    """An empty Hub that this process and those it starts use, with its cache in `loopback.home`."""
    from huggingface_hub import close_session, constants, file_download
    from huggingface_hub.utils import _http
    from support.hub_server import HubServer

    from vitcli.hub import failures

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(failures, "PAUSES", (0.0, 0.0, 0.0))
    for module in (_http, file_download):  # which wait up to 8 s before they try again
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    with HubServer(tmp_path / "hub") as server:
        server.home = tmp_path / "home"
        for name, value in server.env(server.home).items():
            monkeypatch.setenv(name, value)
        # What huggingface_hub has taken from the variables when it was imported.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("VITCLI_CACHE", str(server.home / "vitcli"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(server.home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield server
    close_session()

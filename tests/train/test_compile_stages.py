"""`train.compile`: each stage of a run is compiled once, before its first step."""

import sys
import sysconfig

import pytest
import torch
from support.tiny import records, tiny_recipe, train_tiny
from support.watching import Told
from torch import nn

from vitcli.devices import check_compiler
from vitcli.errors import VitcliError
from vitcli.train import build
from vitcli.train.loop import Loop
from vitcli.train.objectives import Softmax

TRAIN = {
    "steps": 6,
    "smaller_sizes": [[4, 0.5]],
    "patch_drop_rate": 0.5,
    "patch_drop_until": 0.25,
    "ema_decay": None,
}


@pytest.fixture
def compiled(monkeypatch):
    """The modes in which modules are compiled; without code generation, which takes a minute."""
    modes, real = [], nn.Module.compile

    def compile(module, *, dynamic, mode):
        modes.append(mode)
        assert dynamic is False
        real(module, dynamic=dynamic, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(build, "check_compiler", lambda device: None)  # no code is generated
    torch.compiler.reset()
    yield modes
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_no_step_of_a_run_compiles(compiled, tmp_path, monkeypatch):
    """Three stages: 4 px with half of the patches, 4 px, 8 px. `step` forbids another graph."""
    real, passes = Loop.step, []

    def step(self, batch):
        passes.append(self.stage())
        torch.compiler.set_stance("fail_on_recompile")
        return real(self, batch)

    monkeypatch.setattr(Loop, "step", step)
    heard = Told()
    train_tiny(tmp_path / "run", watch=heard, train={**TRAIN, "compile": True})
    assert "compiling the training step for 3 stages" in heard.notes
    assert compiled == [None]
    assert passes == [(4, 0.5)] * 2 + [(4, 0.0)] + [(None, 0.0)] * 3
    torch.compiler.set_stance("default")
    monkeypatch.undo()
    train_tiny(tmp_path / "plain", train=TRAIN)
    found, wanted = (
        [r["train/loss"] for r in records(tmp_path / name) if "train/loss" in r]
        for name in ("run", "plain")
    )
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_step_that_records_graphs_begins_with_a_mark(compiled, tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, *, dynamic, mode: compiled.append(mode)
    )
    train_tiny(tmp_path / "run", train={"steps": 3, "compile": "reduce-overhead"})
    assert compiled == ["reduce-overhead"]
    assert len(marks) == 1 + 3  # a stage and the steps


def test_graphs_hold_one_pass_per_step(compiled, tmp_path, monkeypatch):
    """torch fails where the gradients of a step are the sum of several recorded passes."""
    graphs = {"steps": 3, "compile": "reduce-overhead"}
    with pytest.raises(VitcliError, match="cannot have a `micro_batch_size`"):
        tiny_recipe(train={**graphs, "micro_batch_size": 8})

    def forward(self, images, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(nn.Module, "compile", lambda module, *, dynamic, mode: None)
    monkeypatch.setattr(Softmax, "forward", forward)
    with pytest.raises(VitcliError, match="out of memory with a micro-batch of 32") as error:
        train_tiny(tmp_path / "run", train=graphs)
    assert error.value.hint.endswith("or `--set train.compile=true`")


def test_a_plain_run_does_not_mention_the_compiler(tmp_path):
    assert tiny_recipe().train.compile is False
    assert tiny_recipe(train={"compile": "reduce-overhead"}).train.compile == "reduce-overhead"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_missing_compiler_is_an_error_in_words(device, tmp_path, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(VitcliError, match=r"needs the compiler .* not installed") as error:
        check_compiler(torch.device(device))
    assert "build-essential" in error.value.hint and "train.compile" in error.value.hint
    for name in ("g++", "gcc", "clang++"):
        (tools / name).touch(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(VitcliError, match=r"needs the header .*Python\.h, which"):
        check_compiler(torch.device(device))
    (tmp_path / "Python.h").touch()
    check_compiler(torch.device(device))


def test_a_run_asks_for_the_compiler_before_it_reads_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(VitcliError, match="needs the compiler no-such-compiler"):
        train_tiny(tmp_path / "run", train={"steps": 1, "compile": True})
    assert not (tmp_path / "run").exists()

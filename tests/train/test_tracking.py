"""`--track`: the records of a run, told to a tracker."""

import sys
import types

import pytest
from support.tiny import records, tiny_recipe, train_tiny

from vitcli.errors import VitcliError
from vitcli.train import trackers


def test_a_tracker_must_exist_and_be_installed(tmp_path, monkeypatch):
    with pytest.raises(VitcliError, match="unknown tracker `pencil`"):
        train_tiny(tmp_path / "run", track="pencil")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(VitcliError, match="needs a package that is not installed") as caught:
        train_tiny(tmp_path / "run", track="wandb")
    assert caught.value.hint == "`pip install wandb`"
    assert not (tmp_path / "run").exists()


def test_settings_are_flat():
    found = trackers.tracker_config(tiny_recipe(model={"patch_size": 2}))
    assert found["optim.name"] == "muon" and found["optim.betas"] == "[0.9, 0.999]"
    assert None not in found.values() and "description" not in found


def test_it_is_given_every_record(tmp_path, monkeypatch):
    """Accelerate's own tracker of TensorBoard, writing into a stand-in of its package."""
    scalars, settings, closed = [], [], []

    class SummaryWriter:
        def __init__(self, folder, **more):
            self.folder = folder

        def add_hparams(self, values, metric_dict):
            settings.append(values)

        def add_scalar(self, name, value, global_step=None, **more):
            scalars.append((global_step, name, value))

        def flush(self):
            pass

        def close(self):
            closed.append(self.folder)

    import accelerate.tracking  # noqa: F401  # before the stand-in, which it would not accept

    package = types.ModuleType("tensorboardX")
    package.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr(trackers, "find_spec", lambda name: package)
    monkeypatch.setattr("accelerate.tracking.is_tensorboard_available", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"], raising=False)
    from accelerate.utils import LoggerType

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    train_tiny(tmp_path / "run", track="tensorboard")
    wanted = {
        (r["step"], name, value)
        for r in records(tmp_path / "run")
        for name, value in r.items()
        if name != "step"
    }
    assert set(scalars) == wanted and len(wanted) > 30
    assert settings[0]["optim.name"] == "muon" and closed
    assert str(tmp_path / "run/tracking") in str(closed[0])

import pytest
import torch
from safetensors.torch import save_file

from vitcli.errors import VitcliError
from vitcli.run import create_run
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.overrides import Overrides
from vitcli.weights.read import read_checkpoint
from vitcli.weights.store import save_model


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "no such model: `nothing`"),
        ("", "the MODEL is empty"),
        ("Q/16", "no model variant `Q/16`"),
        ("empty", "holds no weights"),
        ("x.onnx", "`x.onnx` has an unsupported weights format"),
    ],
)
def test_what_is_not_understood(here, given, words):
    (here / "empty").mkdir()
    (here / "x.onnx").write_text("x")
    with pytest.raises(VitcliError, match=words) as error:
        load_model(given)
    assert error.value.hint


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("google/vit-base-patch16-999", "`hf:google/vit-base-patch16-999`"),
        (
            "vit-s16-augrag",
            "`vit-s16-augreg` (`hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k`)",
        ),
    ],
)
def test_hints_name_what_was_probably_meant(here, given, hint):
    (here / "google").mkdir()  # so that `google/…` means a path
    with pytest.raises(VitcliError, match=r"no such model|holds no weights") as error:
        load_model(given)
    assert hint in error.value.hint


def test_a_folder_of_checkpoints_loads_the_newest_one(here):
    for step in (5, 10, 9):
        (here / f"trained/checkpoint-{step}").mkdir(parents=True)
        model = create_model("Pico/8", seed=step)
        save_model(here / f"trained/checkpoint-{step}/model.safetensors", model)
    (here / "trained/checkpoint-11").mkdir()  # saving it was interrupted
    back = load_model("trained")
    kernel = create_model("Pico/8", seed=10).network.patch_embed.proj.weight
    assert torch.equal(back.network.patch_embed.proj.weight, kernel)
    assert "loaded its newest checkpoint, `trained/checkpoint-10`" in back.load_report.notes[0]


def test_a_run_that_did_not_finish(here):
    create_run(here / "r", 'command = "finetune"\n')
    with pytest.raises(VitcliError, match="did not finish") as error:
        load_model("r")
    assert "--resume" in error.value.hint


def test_several_weights_files(here):
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, f"{name}.safetensors")
    with pytest.raises(VitcliError, match="holds 2 weights files: `one"):
        load_model(".")


def test_one_weights_file_of_any_name(here):
    net = create_model("Pico/8", image_size=16, depth=1)
    save_model("best.safetensors", net)
    assert load_model(".").config == net.config


def test_layouts_by_their_names(shared):
    found = {
        read_checkpoint(str(shared / path), Overrides(num_heads=3, image_size=(32, 32))).layout
        for path in (
            "reference/timm_vit/token",
            "reference/hf_vit/vit_cls",
            "reference/google_vit/token_norep/params.npz",
        )
    }
    assert found == {"timm", "huggingface", "google"}

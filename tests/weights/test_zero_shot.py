"""Zero-shot heads from text embeddings, against the logits of transformers' two-tower models."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.families import VIT, both, random_model
from typer.testing import CliRunner

from vitcli.cli.app import app
from vitcli.errors import VitcliError
from vitcli.weights.edit import prepare_finetune
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model

pytest.importorskip("transformers")
LABELS = ["cat", "dog", "owl"]
TEXTS = torch.tensor([[3, 4, 29, 1, 1, 1], [5, 29, 1, 1, 1, 1], [7, 8, 9, 29, 1, 1]])


def write_text(path, theirs, labels=LABELS, **changed):
    """The embeddings of `TEXTS`, as the documentation makes the file."""
    with torch.no_grad():
        rows = theirs.get_text_features(input_ids=TEXTS).pooler_output
        tensors = {"text_embeddings": rows, "logit_scale": theirs.logit_scale.exp().reshape(1)}
        if hasattr(theirs, "logit_bias"):
            tensors["logit_bias"] = theirs.logit_bias.detach()
    tensors = {name: t.clone() for name, t in {**tensors, **changed}.items() if t is not None}
    save_file(tensors, path, {"labels": json.dumps(labels)} if labels else None)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A model with two towers, its folder, and the file of its text embeddings."""
    folder = tmp_path_factory.mktemp("clip")
    theirs = random_model("CLIPModel", "CLIPConfig", both(VIT, 20))
    theirs.save_pretrained(folder / "model")
    return theirs, folder / "model", write_text(folder / "text.safetensors", theirs)


@pytest.mark.parametrize(("kind", "projection"), [("CLIP", 20), ("Siglip", None), ("Aimv2", 20)])
def test_logits_are_those_of_two_towers(tmp_path, kind, projection):
    theirs = random_model(f"{kind}Model", f"{kind}Config", both(VIT, projection))
    theirs.save_pretrained(tmp_path / "model")
    text = write_text(tmp_path / "text.safetensors", theirs)
    model = load_model(tmp_path / "model", text_embeddings=text)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=TEXTS, pixel_values=images).logits_per_image
        torch.testing.assert_close(model(images), expected, atol=5e-5, rtol=0)
    assert model.labels == tuple(LABELS) and model.head_trained
    assert model.head_activation == ("sigmoid" if kind == "Siglip" else "softmax")
    assert f"zero-shot head for 3 classes from `{text}`" in model.load_report.notes


def test_predict_and_export_use_it_like_any_head(clip, tmp_path):
    theirs, folder, text = clip
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "a.png")
    chosen = ["--model", str(folder), "--set", f"model.text_embeddings={text}"]
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "a.png"), *chosen, "--json"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout.splitlines()[0])
    model = load_model(folder)
    with torch.no_grad():
        pixels = model.preprocess(tmp_path / "a.png")[None]
        expected = theirs(input_ids=TEXTS, pixel_values=pixels).logits_per_image.softmax(dim=1)[0]
    found = {entry["label"]: entry["probability"] for entry in row["top"]}
    for label, probability in zip(LABELS, expected.tolist(), strict=True):
        assert found[label] == pytest.approx(probability, abs=1e-5)
    with pytest.raises(VitcliError, match=r"cannot express.*head_norm"):
        from vitcli.commands.export import run

        run(
            "huggingface",
            model=str(folder),
            settings={"model": {"text_embeddings": str(text)}},
            out=tmp_path / "out",
        )


def test_names_from_a_file_or_from_the_metadata(clip, tmp_path):
    theirs, folder, _ = clip
    bare = write_text(tmp_path / "bare.safetensors", theirs, labels=None)
    assert load_model(folder, text_embeddings=bare, labels=["a", "b", "c"]).labels == tuple("abc")
    with pytest.raises(VitcliError, match="has no class names") as error:
        load_model(folder, text_embeddings=bare)
    assert "--labels FILE" in error.value.hint


def test_assumptions_are_noted(clip, tmp_path):
    theirs, folder, _ = clip
    text = write_text(tmp_path / "a.safetensors", theirs, logit_scale=None)
    notes = load_model(folder, text_embeddings=text).load_report.notes
    assert any("no `logit_scale`" in note and "100" in note for note in notes)
    text = write_text(tmp_path / "b.safetensors", theirs, logit_scale=torch.tensor(4.6))
    notes = load_model(folder, text_embeddings=text).load_report.notes
    assert any("`model.logit_scale.exp()`" in note for note in notes)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"text_embeddings": torch.ones(3, 7)}, "have the width 7, and the image embeddings"),
        ({"text_embeddings": torch.ones(20)}, "holds no text embeddings"),
        ({"text_embeddings": torch.zeros(3, 20)}, "zero or not finite"),
        ({"text_embeddings": torch.full((3, 20), torch.nan)}, "zero or not finite"),
        ({"text_embeddings": torch.ones(2, 20)}, "2 text embeddings, and there are 3 class names"),
        ({"logit_scale": torch.ones(2)}, "not one finite number"),
        ({"labels": "cat"}, "no JSON list"),
    ],
)
def test_files_that_do_not_fit_are_refused(clip, tmp_path, changed, words):
    theirs, folder, _ = clip
    text = write_text(tmp_path / "text.safetensors", theirs, **changed)
    with pytest.raises(VitcliError, match=words) as error:
        load_model(folder, text_embeddings=text)
    assert error.value.hint


def test_fine_tuning_keeps_a_zero_shot_head_or_drops_it_whole(clip):
    _, folder, text = clip
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = load_model(folder, text_embeddings=text)
    with torch.no_grad():
        expected = model(images)[:, [2, 0]]
        kept = prepare_finetune(model, ["owl", "cat"], keep_head=True)
        torch.testing.assert_close(kept(images), expected)
    fresh = prepare_finetune(load_model(folder, text_embeddings=text), ["owl", "cat"])
    assert fresh.config.projection_size is None and not fresh.config.head_norm
    assert fresh.network.head.weight.shape == (2, 48) and not fresh(images).any()


def test_a_resnet_has_no_zero_shot_head(clip, tmp_path):
    from vitcli.weights.zero_shot import set_zero_shot_head

    with pytest.raises(VitcliError, match="have the width 20"):
        set_zero_shot_head(create_model("R26x1", image_size=32), clip[2])

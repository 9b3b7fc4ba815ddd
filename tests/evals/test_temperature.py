"""`--calibrate`: which images it takes, where it is stored, and that it is applied."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.colours import COLOURS, colour_model, noisy_colours

from vitcli.commands import evaluate, export, predict
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals.calibration import fit_temperature, split_for_calibration
from vitcli.evals.class_matching import match_outputs
from vitcli.evals.features import extract
from vitcli.preprocess import Preprocess
from vitcli.weights.edit import fold_temperature, replace_head
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import read_header, save_model, update_header


@pytest.fixture
def noisy(here):
    return noisy_colours()


def test_calibration_is_stored_and_applied(noisy, here):
    plain = evaluate.run(noisy, model="m.safetensors")
    assert plain.temperature == 1.0 and plain.metrics.images == 120
    before = Path("m.safetensors").read_bytes()
    result = evaluate.run(noisy, model="m.safetensors", calibrate=True, out=Path("report"))
    done = result.calibration
    assert done.split == "half of the test images, drawn with seed 0"
    assert (done.images, result.metrics.images) == (60, 60)
    assert done.temperature == result.temperature > 1.5
    assert result.metrics.loss < done.loss_before and result.metrics.ece < done.ece_before
    assert done.stored == "m.safetensors" and Path("m.safetensors").read_bytes() != before
    header = read_header("m.safetensors")
    assert header["temperature"] == done.temperature and header["extra"] == {"note": "kept"}
    again = evaluate.run(noisy, model="m.safetensors")
    assert again.metrics.top1 == plain.metrics.top1 and again.metrics.loss < plain.metrics.loss
    assert again.temperature == done.temperature
    twice = evaluate.run(noisy, model="m.safetensors", calibrate=True)
    assert twice.temperature == done.temperature  # of the logits, not of what was made of them
    assert twice.calibration.loss_before == pytest.approx(twice.metrics.loss)
    facts = result.to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["reliability_picture"] == "report/reliability.png"


def test_what_is_fitted_is_not_reported(noisy, here):
    """No image is in both, and the temperature is that of the ones held out."""
    net, source = load_model("m.safetensors"), load_data(noisy)
    images = source.splits["test"]
    matching = match_outputs(net, source.classes, noisy, evaluate.Quiet())
    parts = split_for_calibration(source, images, matching, seed=5)
    names = [{p.describe(i) for i in range(len(p))} for p in (parts.held_out, parts.reported)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(images)
    assert parts.held_out.class_counts().tolist() == [20, 20, 20]
    seen = extract(net, parts.held_out, output="logits")
    wanted = fit_temperature(seen.outputs, matching.first_outputs[seen.labels])
    result = evaluate.run(noisy, model="m.safetensors", calibrate=True, seed=5)
    assert result.temperature == pytest.approx(wanted, rel=1e-9)


class Warnings(evaluate.Quiet):
    def __init__(self):
        self.lines = []

    def warn(self, message):
        self.lines.append(message)


def test_reporting_what_was_fitted_on_is_told(noisy, here):
    watch = Warnings()
    evaluate.run(noisy, model="m.safetensors", watch=watch)
    evaluate.run(noisy, model="m.safetensors", calibrate=True, watch=watch)
    assert watch.lines == []
    evaluate.run(noisy, model="m.safetensors", watch=watch)
    assert len(watch.lines) == 1 and "was fitted on 60 of these images" in watch.lines[0]
    shutil.copytree("noisy/test", "noisy/validation")
    evaluate.run(noisy, model="m.safetensors", calibrate=True, watch=watch)
    evaluate.run(noisy, model="m.safetensors", watch=watch)  # the validation images are no others
    fitted = [line for line in watch.lines if "was fitted" in line]
    assert len(fitted) == 1
    assert all("exact copies of validation" in line for line in watch.lines if line not in fitted)


def test_validation_images_come_first(noisy, here):
    shutil.copytree("noisy/test", "noisy/validation")
    result = evaluate.run(noisy, model="m.safetensors", calibrate=True)
    assert (result.split, result.metrics.images) == ("test", 120)
    assert result.calibration.split == "the validation images"
    assert result.calibration.images == 120


def test_a_copy_where_the_file_is_not_ours_or_is_loaded_otherwise(noisy, here):
    before = Path("m.safetensors").read_bytes()
    said = {"preprocess": {"mean": [0.4, 0.5, 0.5]}}
    result = evaluate.run(noisy, model="m.safetensors", settings=said, calibrate=True)
    assert Path("m.safetensors").read_bytes() == before
    assert result.calibration.stored == "runs/m-evaluate/model.safetensors"
    net = load_model("runs/m-evaluate")
    assert net.temperature == result.temperature and net.preprocess.mean[0] == 0.4
    # The same once more is as good; other weights are not written over.
    place = Path("runs/m-evaluate")
    words = {"model": "m.safetensors", "settings": said, "calibrate": True, "out": place}
    assert evaluate.run(noisy, **words).temperature == result.temperature
    save_model(place / "model.safetensors", net)
    with pytest.raises(VitcliError, match=r"m-evaluate/model\.safetensors` exists already"):
        evaluate.run(noisy, **words)


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_exports_are_calibrated(here, to):
    """Layouts without a word for it carry it in the head."""
    net = create_model("Pico/8", image_size=8, num_classes=3, depth=1)
    net.network.head.weight.data.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    net.labels, net.head_trained, net.temperature = ("a", "b", "c"), True, 2.5
    net.preprocess = Preprocess(image_size=(8, 8))
    save_model("m.safetensors", net)
    done = export.run(to, model="m.safetensors", out=Path("out"))
    assert "the temperature 2.5 is folded into the head" in done.notes
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    again = load_model("out")
    with torch.no_grad():
        shares = (net(x).double() / 2.5).softmax(1)
        assert again.temperature == 1.0
        assert torch.allclose(again.probabilities(again(x)), shares, rtol=0, atol=1e-6)


def test_two_heads_are_divided_alike():
    two = {"pool": "distilled", "distillation_token": True, "distillation_head": True}
    net = create_model("Pico/8", image_size=8, num_classes=3, depth=1, **two)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for head in (net.network.head, net.network.head_dist):
        head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    net.temperature = 0.5
    with torch.no_grad():
        wanted = net.probabilities(net(x))
        fold_temperature(net)
        assert net.temperature == 1.0
        assert torch.allclose(net.probabilities(net(x)), wanted, rtol=0, atol=1e-6)


def test_a_head_of_the_other_kind(noisy, here):
    net = load_model("m.safetensors")
    net.head_activation = "sigmoid"
    save_model("s.safetensors", net)
    with pytest.raises(
        VitcliError, match="trained on multi-label images, and these images are single-label"
    ):
        evaluate.run(noisy, model="s.safetensors", calibrate=True)
    assert evaluate.run(noisy, model="s.safetensors").metrics.images == 120


def test_too_few_images(here):
    for name, colour in COLOURS.items():
        (here / "few/test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(here / "few/test" / name / "0.png")
    colour_model("m.safetensors", ("red", "green", "blue"))
    with pytest.raises(VitcliError, match="3 images are too few"):
        evaluate.run("few", model="m.safetensors", calibrate=True)
    assert not (here / "runs").exists()


def test_a_damaged_temperature(noisy, here):
    for value in (0.0, -1.0, "hot"):
        update_header("m.safetensors", {"temperature": value})
        with pytest.raises(VitcliError, match=r"header of `m\.safetensors` is invalid"):
            load_model("m.safetensors")


def test_a_new_head_is_not_calibrated():
    net = create_model("Pico/8", image_size=8, num_classes=3, depth=1)
    net.temperature = 3.0
    replace_head(net, ["a", "b"])
    assert net.temperature == 1.0


def test_predict_is_calibrated(noisy, here):
    path = "noisy/test/red/0.png"
    before = predict.predict([path], model="m.safetensors")[0]
    result = evaluate.run(noisy, model="m.safetensors", calibrate=True)
    after = predict.predict([path], model="m.safetensors")[0]
    assert after["label"] == before["label"] and after["probability"] < before["probability"]
    net = load_model("m.safetensors")
    with torch.no_grad():
        shares = (net(net.preprocess(path)[None])[0].double() / result.temperature).softmax(0)
    assert after["probability"] == pytest.approx(float(shares.max()), abs=1e-6)

import csv
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.colours import COLOURS, colour_model
from support.pages import check_page
from support.watching import Told

from vitcli.commands import evaluate
from vitcli.errors import VitcliError
from vitcli.evals.plots import write_confusion
from vitcli.preprocess import Preprocess
from vitcli.run import create_run
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model


@pytest.fixture
def photos(here):
    """Test images: 3 red, 2 green, 1 blue; a green one lies among the red ones."""
    for split in ("train", "test"):
        for name, count in (("red", 3), ("green", 2), ("blue", 1)):
            folder = here / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), COLOURS[name]).save(folder / f"{i}.png")
    Image.new("RGB", (8, 8), COLOURS["green"]).save(here / "photos/test/red/0.png")
    return "photos"


def test_classes_are_matched_by_name(photos, here):
    model = colour_model("m.safetensors", ("green", "white", "blue", "red"))
    result = evaluate.run(photos, model=model, out=Path("report"))
    assert result.split == "test" and result.metrics.images == 6
    assert result.metrics.top1 == result.metrics.top1_restricted == pytest.approx(5 / 6)
    assert result.per_class["red"]["recall"] == pytest.approx(2 / 3)
    assert result.per_class["green"]["precision"] == pytest.approx(2 / 3)
    facts = result.to_json()
    assert json.loads(json.dumps(facts)) == facts and facts["confusion"] == "report/confusion.csv"
    with Path(facts["confusion"]).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["blue", "green", "red", "(another class)"]
    assert rows[3] == ["red", "0", "1", "2", "0"]
    with Image.open("report/confusion.png") as picture:
        assert picture.size[0] > 100


@pytest.mark.parametrize("folder", ["photos/test/red", "photos/red"])
def test_one_class_of_the_model(folder, photos, here):
    images = here / "one" / folder
    images.parent.mkdir(parents=True)
    (here / "photos/test/red").rename(images)
    model = colour_model("m.safetensors", ("green", "white", "blue", "red"))
    result = evaluate.run("one/photos", model=model)
    assert result.metrics.images == 3 and result.metrics.top1 == pytest.approx(2 / 3)
    assert result.per_class["red"]["recall"] == pytest.approx(2 / 3)


def test_more_classes_than_the_data_has(photos, here):
    """An answer outside of the data's classes is wrong in full, and not given in the restricted."""
    path = colour_model("m.safetensors", ("white", "green", "blue", "red"))
    from vitcli.weights.load import load_model

    net = load_model(path)
    with torch.no_grad():
        net.network.head.weight[0], net.network.head.bias[0] = (
            net.network.head.weight[3],
            net.network.head.bias[3] + 0.1,
        )
    save_model(path, net)
    result = evaluate.run(photos, model=path)
    assert result.metrics.top1 == pytest.approx(3 / 6)
    assert result.metrics.top1_restricted == pytest.approx(5 / 6)
    assert result.details.confusion.tolist() == [[1, 0, 0, 0], [0, 2, 0, 0], [0, 1, 0, 2]]
    assert result.files["confusion"] == "runs/m-evaluate/confusion.csv"


def test_without_names(photos, here):
    notes = []
    watch = type("W", (evaluate.Quiet,), {"note": lambda self, line: notes.append(line)})()
    model = colour_model("m.safetensors", ("blue", "green", "red"))
    from vitcli.weights.load import load_model

    net = load_model(model)
    net.labels = None
    save_model(model, net)
    assert evaluate.run(photos, model=model, watch=watch).metrics.top1 == pytest.approx(5 / 6)
    assert any("in the data's order" in line for line in notes)
    Path("names.txt").write_text("red\ngreen\nblue\n")
    swapped = evaluate.run(photos, model=model, labels="names.txt")
    assert swapped.metrics.top1 == pytest.approx(2 / 6)
    four = create_model("Pico/8", image_size=8, num_classes=4, depth=1)
    four.preprocess, four.head_trained = Preprocess(image_size=(8, 8)), True
    save_model(model, four)
    with pytest.raises(VitcliError, match="4 outputs without names") as error:
        evaluate.run(photos, model=model)
    assert "--labels FILE" in error.value.hint


def test_names_that_do_not_match(photos, here):
    model = colour_model("m.safetensors", ("red", "green", "cyan"))
    with pytest.raises(VitcliError, match="lacks 1 of the 3 classes of `photos`: `blue`"):
        evaluate.run(photos, model=model)


def test_the_run_that_knows_the_classes_is_chosen(photos, here):
    """A run without the classes is newer than the one that has them."""
    for name, labels in (("fits", ("red", "green", "blue")), ("letters", ("a", "b", "c"))):
        run = create_run(Path("runs") / name, 'command = "fewshot"\n')
        shutil.copy(colour_model("m.safetensors", labels), run.weights_file)
        run.finish({"command": "fewshot"})
    os.utime("runs/fits/result.json", (1, 1))
    assert evaluate.run("photos").model == "runs/fits"
    with pytest.raises(VitcliError, match="lacks 3 of the 3 classes of `photos`") as error:
        evaluate.run("photos", model="runs/letters")
    assert "`vitcli finetune photos --model MODEL`" in error.value.hint
    assert "`a`" in error.value.hint


def test_broken_images(photos, here):
    model = colour_model("m.safetensors", ("red", "green", "blue"))
    (here / "photos/test/red/1.png").write_bytes(b"")
    result = evaluate.run(photos, model=model)
    assert result.metrics.images == 5 and len(result.broken) == 1
    assert "1.png" in result.to_json()["unreadable"][0]


def test_all_images_of_data_without_a_split(photos, here):
    model = colour_model("m.safetensors", ("red", "green", "blue"))
    result = evaluate.run("photos/train", model=model)
    assert (result.metrics.images, result.metrics.top1) == (6, 1.0)


def test_the_part_that_the_run_had_set_aside(photos, here):
    """Data without a split: not the images that the run was trained on."""
    from vitcli.data.source import load_data
    from vitcli.run import create_run

    for path in Path("photos/train").glob("*/*.png"):  # copies would stay in one split
        shade = 255 - int(path.stem)
        colour = tuple(min(c, shade) for c in COLOURS[path.parent.name])
        Image.new("RGB", (8, 8), colour).save(path)
    run = create_run(Path("runs/mine"), 'command = "finetune"\n')
    colour_model(run.weights_file, ("red", "green", "blue"))
    source = load_data("photos/train")
    run.write_provenance({"data": {"fingerprint": source.fingerprint}})
    result = evaluate.run("photos/train", model="runs/mine")
    assert result.split == "test" and result.metrics.images == len(source.splits["test"])


def test_an_untrained_head(photos, here):
    net = create_model("Pico/8", image_size=8, num_classes=3, depth=1)
    save_model("m.safetensors", net)
    with pytest.raises(VitcliError, match="no trained head"):
        evaluate.run(photos, model="m.safetensors")
    with pytest.raises(VitcliError, match="no run with a trained head"):
        evaluate.run(photos)


def test_a_class_map_with_several_outputs(photos, here):
    """`warm` is red; `cold` is either of two; images of classes that are not named are left out."""
    model = colour_model("m.safetensors", ("red", "green", "blue"))
    Path("photos/test/blue").rename("photos/test/other")
    Path("photos/train/blue").rename("photos/train/other")
    Path("map.json").write_text(json.dumps({"red": "red", "green": ["blue", "green"]}))
    result = evaluate.run(photos, model=model, class_map=Path("map.json"))
    assert result.classes == ("green", "red") and result.metrics.images == 5
    assert result.metrics.top1 == pytest.approx(4 / 5)
    assert result.details.confusion.tolist() == [[2, 0], [1, 2]]
    assert result.metrics.top5 == 1.0


def test_the_mistakes(photos, here):
    model = colour_model("m.safetensors", ("red", "green", "blue"))
    result = evaluate.run(photos, model=model, out=Path("report"))
    (worst,) = result.details.mistakes.worst
    assert (worst.true, worst.predicted) == ("red", "green")
    assert worst.path == "photos/test/red/0.png" and worst.true_probability < 0.2
    (pair,) = result.details.mistakes.confused
    assert (pair.true, pair.predicted, pair.images, pair.of) == ("red", "green", 1, 3)
    with Image.open("report/mistakes.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert COLOURS["green"] in colours and min(colours) < (64, 64, 64)  # picture and caption
    right = evaluate.run("photos/train", model=model, out=Path("right"))
    assert right.details.mistakes.worst == () and right.to_json()["mistakes_picture"] is None
    assert not Path("right/mistakes.png").exists()


def test_real_classes_are_found_among_imagenets(shared, here):
    """Imagenette's ten, whose numbers in ImageNet-1k its author gives."""
    from vitcli.data.source import load_data
    from vitcli.evals.class_matching import match_outputs

    source = load_data(str(shared / "data/imagenette_val500"))
    images = source.splits["test"]
    assert images.file_name(0).startswith("ILSVRC2012_val_")
    from vitcli.weights.imagenet import imagenet_names

    net = create_model("Pico/8", image_size=8, num_classes=1000, depth=1)
    net.labels = imagenet_names(1000)
    known = match_outputs(net, source.classes, "x", evaluate.Quiet()).first_outputs.tolist()
    assert known == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.mark.slow
def test_imagenette_to_the_image(shared, here):
    settings = {"model": {"num_heads": 3}, "preprocess": {"mean": 0.5, "std": 0.5}}
    result = evaluate.run(
        str(shared / "data/imagenette_val500"),
        model=str(shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"),
        settings=settings,
    )
    m = result.metrics
    assert [round(share * 500) for share in (m.top1, m.top5, result.metrics.top1_restricted)] == [
        362,
        455,
        489,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timm.safetensors", "hf"])
def test_fashion_mnist_to_the_image(shared, here, layout):
    """90.77 % of 10,000, as the author of the weights says."""
    settings = {
        "model": {"num_heads": 4, "norm_eps": 1e-5},
        "preprocess": {"mean": 0.5, "std": 0.5},
    }
    result = evaluate.run(
        str(shared / "data/fashion_mnist"),
        model=str(shared / "data/weights/vit_fashionmnist" / layout),
        settings=settings if layout.startswith("timm") else None,
        batch_size=500,
    )
    assert (result.metrics.images, round(result.metrics.top1 * 10_000)) == (10_000, 9077)


def test_a_real_model_and_real_images(shared, here):
    """The same weights in both layouts on the first images of the test set."""
    from vitcli.data.source import load_data
    from vitcli.evals.features import extract
    from vitcli.weights.load import load_model

    folder = shared / "data/weights/vit_fashionmnist"
    images = load_data(str(shared / "data/fashion_mnist")).splits["test"].subset(np.arange(300))
    said = {"num_heads": 4, "norm_eps": 1e-5, "preprocess": {"mean": 0.5, "std": 0.5}}
    one = extract(load_model(folder / "timm.safetensors", **said), images, output="logits")
    two = extract(load_model(folder / "hf"), images, output="logits")
    assert np.array_equal(one.outputs, two.outputs)
    assert np.mean(one.outputs.argmax(1) == one.labels) > 0.88


@pytest.mark.draws_curves
def test_the_report_shows_everything_and_the_table_lists_all_mistakes(photos, here):
    hostile = "<script>alert(1)</script>"
    for split in ("train", "test"):
        (here / "photos" / split / "red").rename(here / "photos" / split / hostile.replace("/", ""))
    name = hostile.replace("/", "")
    model = colour_model("m.safetensors", ("green", "white", "blue", "red"))
    watch = Told()
    labels = ["green", "white", "blue", name]
    result = evaluate.run(photos, model=model, labels=labels, out=Path("report"), watch=watch)
    facts = result.to_json()
    assert facts["report"] == "report/report.html" and facts["mistakes"] == "report/mistakes.csv"
    with Path("report/mistakes.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert Path(row["path"]).is_file() and row["path"] == result.details.mistakes.worst[0].path
    assert (row["label"], row["predicted"]) == (name, "green")
    assert float(row["label_probability"]) < 0.5 < float(row["probability"])
    text = Path("report/report.html").read_text()
    page = check_page(text)
    assert page.headings == [
        "Figures", "Data and splits", "Confusion matrix", "Calibration", "Mistakes", "Classes",
        "Provenance",
    ]  # fmt: skip
    assert "top-5" not in page.text and "among the data's classes" not in page.text  # 4 classes
    assert page.text.count("temperature") == 1
    assert text.count("<script>") == 1 and page.text.count(name) >= 4
    assert "83.33 %" in page.text and all(
        line.replace("`", "") in page.text for line in watch.notes
    )
    assert page.tags["svg"] == 1 and page.tags["img"] == 2  # the mistake, and its pair
    assert set(result.files.values()) == {str(path) for path in Path("report").iterdir()}


@pytest.mark.draws_curves
def test_a_report_that_cannot_be_written_is_a_warning(photos, here, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluation_page", lambda *_: 1 / 0)
    watch = Told()
    model = colour_model("m.safetensors", ("green", "white", "blue", "red"))
    result = evaluate.run(photos, model=model, out=Path("report"), watch=watch)
    assert result.metrics.top1 == pytest.approx(5 / 6) and Path("report/confusion.csv").is_file()
    assert "report.html` is not written" in watch.warnings[-1]


def test_a_class_name_that_the_font_cannot_draw(tmp_path):
    counts, names = np.eye(2, dtype=np.int64), ("cat", "猫")
    with warnings.catch_warnings(action="error"):
        write_confusion(tmp_path / "x.csv", tmp_path / "x.png", names, names, counts)
    assert (tmp_path / "x.png").stat().st_size


def test_a_place_that_is_a_file_is_refused_before_the_work(photos, here):
    (here / "report.txt").write_text("mine")
    for out in (Path("report.txt"), Path("report.txt/deep/er")):
        with pytest.raises(VitcliError, match=r"`report\.txt` is not a folder"):
            evaluate.run("no such data", model="no such model", out=out)
    assert (here / "report.txt").read_text() == "mine"


def test_the_data_are_opened_once(photos, monkeypatch):
    """For several models, and to find the newest run that knows the classes."""
    labels, opened = ("red", "green", "blue"), []
    for name in ("one", "two"):
        run = create_run(Path("runs", name), 'command = "finetune"\n')
        save_model(run.weights_file, load_model(colour_model("m.safetensors", labels)))
        run.finish({"command": "finetune"})
    own = evaluate.open_whole
    monkeypatch.setattr(evaluate, "open_whole", lambda *given: opened.append(1) or own(*given))
    for models in (None, ["runs/one", "runs/two"]):
        opened.clear()
        evaluate.run(photos, model=models)
        assert opened == [1], models


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_mean_of_views_is_that_of_their_probabilities(activation):
    model = create_model("mu/4", num_classes=3, image_size=8)
    model.head_activation, model.temperature = activation, 1.7
    views = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).mul(4).unbind()
    mean = sum(map(model.probabilities, views)) / 2
    found = model.probabilities(model.mean_logits(views))
    torch.testing.assert_close(found, mean)
    certain = [torch.tensor([[1e3, -1e3, 0.0]]), torch.tensor([[1e3, -1e3, 0.0]])]
    assert model.mean_logits(certain).isfinite().all()


def test_several_views_count_as_in_predict(here):
    """The predictions of `predict --tta` on noise, which the plain view sees otherwise."""
    from vitcli.commands import predict

    rng, files = np.random.default_rng(0), []
    for number in range(60):
        folder = here / "noise/test" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(files[-1])
    model = create_model("mu/4", num_classes=3, image_size=8)
    torch.nn.init.normal_(
        model.network.head.weight, std=0.5, generator=torch.Generator().manual_seed(0)
    )
    model.preprocess, model.labels, model.head_trained = Preprocess((8, 8)), tuple("abc"), True
    save_model("m.safetensors", model)
    losses = {}
    for tta in (None, "flip", "shifts"):
        rows = list(predict.run(files, model="m.safetensors", tta=tta, top=3))
        metrics = evaluate.run("noise", model="m.safetensors", tta=tta, out=Path(f"{tta}")).metrics
        truth = [Path(row["path"]).parent.name for row in rows]
        right = [row["label"] == name for row, name in zip(rows, truth, strict=True)]
        assert metrics.top1 == pytest.approx(np.mean(right))
        shares = [
            {one["label"]: one["probability"] for one in row["top"]}[name]
            for row, name in zip(rows, truth, strict=True)
        ]
        losses[tta] = metrics.loss
        assert metrics.loss == pytest.approx(-np.mean(np.log(shares)), rel=1e-5)
    assert len({round(loss, 6) for loss in losses.values()}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tta": "crops:5"}, "shows one crop of each image"),
        ({"tta": "rotate"}, "`rotate`"),
        ({"tta": "flip", "calibrate": True}, "cannot be combined with `--calibrate`"),
        ({"tta": "flip", "thresholds": "f1"}, "cannot be combined with `--calibrate`"),
    ],
)
def test_views_that_an_evaluation_does_not_have(options, words):
    with pytest.raises(VitcliError, match=words):
        evaluate.run("nothing", model="m.safetensors", **options)

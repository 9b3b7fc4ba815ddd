"""Images with any number of labels: how data says so, what is trained, what is measured."""

import json
import math
import shutil
import tarfile
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from support.tiny import tiny_recipe
from support.watching import Told

from vitcli.cli.main import run as run_command
from vitcli.commands import check, evaluate, finetune, predict
from vitcli.config.schema import AugmentSection, ObjectiveSection
from vitcli.data.augment.transform import TrainTransform
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.loader import TrainLoader
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals.scoring import multi_label_metrics, multi_label_per_class
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.train.build import unused_settings
from vitcli.train.objectives import build_objective, resolve_objective
from vitcli.train.resolve import random_model
from vitcli.train.session import train
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import read_header, save_model

CELLS = ["red", "green", "red;green", "", "green ; red", "blue", "red;blue;", "blue;red;green"]
WANTED = [{"red"}, {"green"}, {"red", "green"}, set(), {"red", "green"}, {"blue"}]
WANTED += [{"red", "blue"}, {"red", "green", "blue"}]
COLOURS = {"red": 0, "green": 1, "blue": 2}


def paint(names):
    """Bright in the channel of each colour that the image has."""
    colour = tuple(230 if name in names else 25 for name in COLOURS)
    return Image.new("RGB", (8, 8), colour)


def png(names):
    buffer = BytesIO()
    paint(names).save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(folder, cells, column="labels", repeat=1):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"path,{column}"]
    for i, cell in enumerate(cells * repeat):
        image = paint([part.strip() for part in cell.split(";")])
        if repeat > 1:  # copies would stay in one split
            image.putpixel((7, 7), (i, 0, 0))
        image.save(folder / f"{i}.png")
        rows.append(f"{i}.png,{cell}")
    (folder / "x.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "x.csv")


def named(images):
    return [{images.classes[k] for k in np.flatnonzero(row)} for row in images.targets]


def test_a_column_of_labels_with_semicolons(tmp_path):
    data = load_data(write_csv(tmp_path, CELLS), whole=True)
    images = data.splits["train"]
    assert data.multi_label and data.classes == ("blue", "green", "red")
    assert named(images) == WANTED
    assert images.targets.dtype == np.uint8
    assert images.labels.tolist() == [2, 1, 2, -1, 1, 0, 2, 0]  # the first that is written
    assert [images.label_name(i) for i in (3, 4)] == ["(none)", "green; red"]
    assert images.class_counts().tolist() == [3, 4, 5]
    assert "4 cells of `labels` contain `;`" in data.notes[0]
    single = load_data(write_csv(tmp_path, CELLS), whole=True, multi_label=False)
    assert not single.multi_label and "red;green" in single.classes
    assert "1 row without path or label" in single.notes[0]


def test_other_columns_are_taken_apart_only_when_asked(tmp_path):
    path = write_csv(tmp_path, ["a;b", "c", "a;b", "c"], "label")
    data = load_data(path, whole=True)
    assert data.classes == ("a;b", "c") and not data.multi_label
    assert "2 cells of `label` contain `;`: each cell is one class name" in data.notes[0]
    assert named(load_data(path, whole=True, multi_label=True).splits["train"]) == [
        {"a", "b"},
        {"c"},
        {"a", "b"},
        {"c"},
    ]


def test_labels_without_semicolons_are_single(tmp_path):
    data = load_data(write_csv(tmp_path, ["a", "b", "a", "b"]), whole=True)
    assert not data.multi_label and not data.notes


def test_json_lines_with_lists(tmp_path):
    rows = [{"path": f"{i}.png", "label": sorted(names)} for i, names in enumerate(WANTED)]
    for row, names in zip(rows, WANTED, strict=True):
        paint(names).save(tmp_path / row["path"])
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(str(tmp_path / "x.jsonl"), whole=True)
    assert named(data.splits["train"]) == WANTED and "`label` holds lists" in data.notes[0]
    with pytest.raises(VitcliError, match="are lists, but `data"):
        load_data(str(tmp_path / "x.jsonl"), multi_label=False)


@pytest.mark.parametrize("kind", ["classlabel", "names", "text", "fixed"])
def test_parquet(tmp_path, kind):
    names = sorted(COLOURS)
    cells = {
        "classlabel": [[names.index(n) for n in sorted(w)] for w in WANTED],
        "names": [sorted(w) for w in WANTED],
        "text": CELLS,
        "fixed": [[1, 2]] * len(WANTED),
    }[kind]
    features = {
        "classlabel": datasets.Sequence(datasets.ClassLabel(names=names)),
        "names": datasets.Sequence(datasets.Value("string")),
        "text": datasets.Value("string"),
        "fixed": datasets.Sequence(datasets.Value("int64"), length=2),
    }[kind]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(w), "path": None} for w in WANTED], "labels": cells},
        features=datasets.Features({"image": datasets.Image(), "labels": features}),
    )
    table.to_parquet(tmp_path / "train.parquet")
    data = load_data(str(tmp_path / "train.parquet"), whole=True)
    expected = WANTED if kind != "fixed" else [{"1", "2"}] * len(WANTED)
    assert named(data.splits["train"]) == expected
    assert data.splits["train"].read(0).getpixel((0, 0)) == (230, 25, 25)


def test_shards(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as shard:
        for i, names in enumerate(WANTED):
            text = json.dumps({"label": sorted(names)} if i % 2 else sorted(names)).encode()
            for ending, content in (("png", png(names)), ("json", text)):
                member = tarfile.TarInfo(f"{i:04}.{ending}")
                member.size = len(content)
                shard.addfile(member, BytesIO(content))
    images = load_data(str(tmp_path / "train-0.tar"), whole=True).splits["train"]
    assert named(images) == WANTED


def test_splits_are_aligned_by_name(tmp_path):
    for split, cells in (("train", ["a;c", "b", "c"]), ("test", ["c", "a"])):
        rows = [{"image": {"bytes": png([]), "path": None}, "labels": c.split(";")} for c in cells]
        features = datasets.Features(
            {"image": datasets.Image(), "labels": datasets.Sequence(datasets.Value("string"))}
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    data = load_data(str(tmp_path))
    assert data.classes == ("a", "b", "c")
    assert data.splits["test"].targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert data.splits["test"].labels.tolist() == [2, 0]
    (tmp_path / "train.parquet").replace(tmp_path / "validation.parquet")
    (tmp_path / "test.parquet").replace(tmp_path / "train.parquet")
    with pytest.raises(VitcliError, match="class `b` is in `validation` but not in `train`"):
        load_data(str(tmp_path))


def test_what_cannot_have_several(tmp_path):
    with pytest.raises(VitcliError, match="each image of `builtin:digits` has exactly one class"):
        load_data("builtin:digits", multi_label=True)
    with pytest.raises(VitcliError, match=r"no image of .* has a label"):
        load_data(write_csv(tmp_path, ["", ";"]), whole=True)


def test_a_stored_set_keeps_them(tmp_path):
    source = load_data(write_csv(tmp_path / "x", CELLS, repeat=3))
    (tmp_path / "x/4.png").write_bytes(b"broken")
    write_decoded(source, tmp_path / "stored", side=8)
    stored = load_data(str(tmp_path / "stored"))
    for split, images in source.splits.items():
        good = [i for i in range(len(images)) if not images.describe(i).endswith("/4.png")]
        assert np.array_equal(stored.splits[split].targets, images.targets[good])
        assert np.array_equal(stored.splits[split].labels, images.labels[good])
    (tmp_path / "stored/train.targets").write_bytes(b"1")
    with pytest.raises(VitcliError, match=r"train\.targets` is missing or damaged"):
        load_data(str(tmp_path / "stored"))


def test_check_counts_each_label(tmp_path):
    found = check.run(write_csv(tmp_path, [*CELLS, "red"]), settings={}).to_json()
    assert found["classes"] == {"blue": {"train": 3}, "green": {"train": 4}, "red": {"train": 6}}
    # "red;green" and "green ; red" are the same picture and the same labels; so are both "red".
    assert found["label_conflicts"] == []
    assert len(found["exact_duplicates"]) == 2


def test_the_objective_is_chosen_by_the_data():
    assert resolve_objective(ObjectiveSection(), False)[0].name == "softmax"
    section, notes = resolve_objective(ObjectiveSection(), True)
    assert section.name == "sigmoid" and "objective `sigmoid`" in notes[0]
    assert resolve_objective(ObjectiveSection(name="descriptors"), True)[0].name == "descriptors"
    for name in ("softmax", "guided"):
        with pytest.raises(VitcliError, match=f"`{name}` takes one class per image"):
            resolve_objective(ObjectiveSection(name=name), True)
    with pytest.raises(VitcliError, match="head_bias` is for `sigmoid`"):
        resolve_objective(ObjectiveSection(head_bias=-10.0), False)
    recipe = tiny_recipe(objective={"name": "sigmoid", "label_smoothing": 0.1})
    assert "`objective.label_smoothing`" in unused_settings(recipe, False)[0]


def test_settings_of_another_objective_are_told_of_and_do_nothing():
    given = {"name": "softmax", "descriptor_weight": 0.0, "mask_rate": 0.3}
    assert resolve_objective(ObjectiveSection(**given), False) == (ObjectiveSection(**given), [])
    assert unused_settings(tiny_recipe(objective=given), False)[:1] == [
        "objective `softmax` does not use `objective.descriptor_weight`, `objective.mask_rate`"
    ]
    hard = ObjectiveSection(
        name="distill", teacher="teacher.safetensors", distillation="hard", temperature=3.0
    )
    assert "`objective.temperature`" in resolve_objective(hard, False)[1][0]
    assert resolve_objective(hard.model_copy(update={"distillation": "soft"}), False)[1] == []


def test_the_loss_is_the_sum_over_classes():
    """Against the definition, -sum(t log p + (1 - t) log(1 - p)), with several and one label."""
    net = create_model("Pico/8", image_size=8, num_classes=3, depth=1)
    torch.manual_seed(0)
    torch.nn.init.normal_(net.network.head.weight)
    objective = build_objective(net, ObjectiveSection(name="sigmoid"), 0, True)
    images = torch.randn(4, 3, 8, 8)
    p = net(images).detach().double().sigmoid()
    several = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    for labels in (several, torch.tensor([0, 2, 1, 1])):
        t = several if labels.ndim == 2 else torch.nn.functional.one_hot(labels, 3)
        expected = -(t * p.log() + (1 - t) * (1 - p).log()).sum(dim=1).mean()
        loss, figures = objective(images, labels)
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
        best = p.argmax(dim=1)
        right = [bool(t[i, best[i]]) for i in range(4)]
        assert float(figures["accuracy"]) == pytest.approx(np.mean(right))


def test_the_bias_of_a_new_head():
    """The first loss with bias b and one positive of K: (K - 1) log(1 + e^b) + log(1 + e^-b)."""
    net = create_model("Pico/8", image_size=8, num_classes=1000, depth=1)
    section = ObjectiveSection(name="sigmoid", head_bias=-6.9)
    objective = build_objective(net, section, 0)
    loss, _ = objective(torch.randn(2, 3, 8, 8), torch.tensor([3, 4]))
    expected = 999 * math.log1p(math.exp(-6.9)) + math.log1p(math.exp(6.9))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    torch.nn.init.ones_(net.network.head.weight)
    torch.nn.init.zeros_(net.network.head.bias)
    build_objective(net, section, 0)
    assert not net.network.head.bias.any()  # a head that has learned stays


def test_figures_against_scikit_learn():
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 5)) < 0.3).astype(np.uint8)
    targets[:, 4] = 0
    scores = np.clip(targets * 0.3 + rng.random((60, 5)) * 0.7, 0, 1)
    found = multi_label_metrics(scores, targets)
    each = [average_precision_score(targets[:, k], scores[:, k]) for k in range(4)]
    assert found.map == pytest.approx(np.mean(each))
    assert found.micro_f1 == pytest.approx(f1_score(targets, scores >= 0.5, average="micro"))
    classes = multi_label_per_class(scores, targets, found, list("abcde"))
    assert np.isnan(found.average_precision[4])
    assert classes["e"]["average_precision"] is None and classes["e"]["images"] == 0


def test_weights_say_how_the_head_is_read(tmp_path):
    net = create_model("Pico/8", image_size=8, num_classes=2, depth=1)
    net.head_trained = True
    logits = torch.tensor([[1.0, -2.0]])
    assert torch.allclose(net.probabilities(logits), logits.double().softmax(dim=1))
    net.head_activation = "sigmoid"
    save_model(tmp_path / "m.safetensors", net)
    again = load_model(tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors")["activation"] == "sigmoid"
    assert torch.allclose(again.probabilities(logits), logits.double().sigmoid())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images whose labels are the bright channels."""
    folder = tmp_path_factory.mktemp("several")
    path = write_csv(folder / "data", CELLS, repeat=10)
    recipe = tiny_recipe(
        data={"name": path},
        objective={"head_bias": -1.0},
        optim={"lr": 1e-2},
        model={"dropout_rate": 0.0, "drop_path_rate": 0.0},
        augment={"crop": "none"},
        train={"steps": 60, "batch_size": 32, "ema_decay": None},
    )
    notes = Told()
    result = train(
        recipe,
        lambda source: random_model(recipe, source),
        out=folder / "run",
        resume=False,
        watch=notes,
    )
    return path, folder / "run", result, notes.lines


def test_a_run_learns_several_labels(trained):
    path, run, result, notes = trained
    assert any("objective `sigmoid`" in line for line in notes)
    assert result.figures["map"] > 0.99 and result.figures["micro_f1"] > 0.9
    assert result.figures["images"] == 16
    record = json.loads((run / "provenance.json").read_text())["data"]
    assert record["test_fraction"] == 0.2 and record["images"] == {"train": 64, "test": 16}
    found = evaluate.run(path, model=str(run))
    assert found.split == "test" and found.metrics.images == 16
    assert found.metrics.map == pytest.approx(result.figures["map"], abs=1e-6)
    assert found.to_json()["macro_f1"] == pytest.approx(result.figures["macro_f1"])
    assert found.metrics.loss == pytest.approx(result.figures["loss"], rel=1e-4)
    facts = found.to_json()
    assert json.loads(json.dumps(facts)) == facts
    targets = load_data(path).splits["test"].targets
    assert facts["per_class"]["red"]["images"] == int(targets[:, 2].sum()) > 0


def test_several_labels_are_calibrated(trained, tmp_path):
    path, run, _, _ = trained
    copy = str(shutil.copy(run / "model.safetensors", tmp_path / "copy.safetensors"))
    result = evaluate.run(path, model=copy, calibrate=True)
    # The weights know the 16 images that were held out; calibration takes half of them.
    assert result.calibration.images + result.metrics.images == 16
    assert read_header(copy)["temperature"] == result.temperature != 1.0
    assert result.calibration.ece_before is None
    facts = result.to_json()
    assert facts["intervals"]["map"] is None  # of 8 images
    assert "an interval needs 10 of each class" in facts["intervals"]["reasons"]["map"]
    row = facts["per_class"]["red"]
    figures = {"precision", "recall", "f1"}
    intervals = {f"{name}_interval" for name in figures}
    assert figures | intervals | {"average_precision", "roc_auc", "images"} == set(row)


def test_two_models_of_several_labels(trained, tmp_path):
    path, run, _, _ = trained
    net = load_model(run)
    net.network.head.weight.data = net.network.head.weight.data.roll(
        1, dims=0
    )  # every class says another's
    save_model(tmp_path / "other.safetensors", net)
    other = str(tmp_path / "other.safetensors")
    found = evaluate.run(path, model=[other, other, str(run)], out=tmp_path / "out")
    same, better = found.paired[0], found.paired[1]
    # The weights carry the record of held-out images, so all models meet the same 16.
    assert [one.metrics.images for one in found.models] == [16, 16, 16]
    assert found.models[2].metrics.map > found.models[0].metrics.map
    assert same == better and "an interval needs 10 of each class" in same
    assert found.to_json()["paired"][1]["reason"] == better


def test_predict_shows_each_probability_by_itself(trained, tmp_path):
    _, run, _, _ = trained
    paint(["red", "blue"]).save(tmp_path / "x.png")
    row = predict.predict(tmp_path / "x.png", model=run, top=3)[0]
    shares = {one["label"]: one["probability"] for one in row["top"]}
    assert shares["red"] > 0.5 and shares["blue"] > 0.5 and shares["green"] < 0.5


def test_the_default_recipe_goes_by_the_data(tmp_path, trained):
    path, run, _, _ = trained
    again = finetune.run(
        path,
        model=str(run),
        settings={
            "train": {"steps": 3, "epochs": None, "batch_size": 8, "precision": "fp32"},
            "schedule": {"warmup_steps": 0, "warmup_fraction": None},
        },
        out=tmp_path / "fine",
    )
    assert "map" in again.figures
    assert read_header(tmp_path / "fine/model.safetensors")["activation"] == "sigmoid"


def test_fewshot_wants_one_class_an_image(trained, capfd):
    path, run, _, _ = trained
    assert run_command(["fewshot", path, "--model", str(run)]) == 2
    assert "error: `fewshot` needs one label per image" in capfd.readouterr().err


def test_the_command_shows_the_figures(trained, capfd):
    path, run, _, _ = trained
    status, (out, err) = run_command(["evaluate", path, "--model", str(run)]), capfd.readouterr()
    assert status == 0, err
    assert "mean average precision" in out and "micro F1 at 0.5" in out


@pytest.mark.parametrize("mix", [{"mixup_alpha": 0.4, "mix_rate": 1.0}])
def test_mixing_works_with_several_labels(tmp_path, mix):
    path = write_csv(tmp_path / "data", CELLS, repeat=4)
    recipe = tiny_recipe(
        data={"name": path}, augment={"crop": "none", **mix}, train={"steps": 2, "batch_size": 8}
    )
    result = train(
        recipe,
        lambda source: random_model(recipe, source),
        out=tmp_path / "run",
        resume=False,
        watch=Quiet(),
    )
    assert math.isfinite(result.figures["loss"])


def test_what_stands_in_for_a_broken_image_brings_its_own_labels(tmp_path):
    path = write_csv(tmp_path, ["red", "red;blue", "", "", "green"])
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "2.png").write_bytes(b"broken")
    images = load_data(path, whole=True).splits["train"]
    transform = TrainTransform(Preprocess((8, 8)), AugmentSection(crop="none", flip_rate=0.0))
    loader = TrainLoader(images, transform, batch_size=5, seed=0, workers=0)
    batch = next(iter(loader.batches(0, 1)))
    assert sorted(batch.indices.tolist()) == [1, 1, 3, 3, 4]
    assert len(loader.broken) == 2
    for picture, row in zip(batch.images, batch.labels, strict=True):
        bright = {name for name, c in COLOURS.items() if picture[c].float().mean() > 128}
        assert bright == {images.classes[k] for k in row.nonzero().flatten().tolist()}

"""Data that change after a run has started: what is held out stays held out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.tiny import tiny_recipe
from support.watching import Told

from vitcli.commands import evaluate, export, fewshot
from vitcli.config.recipe import nest
from vitcli.config.schema import DataSection, Inference
from vitcli.data.source import load_data, open_data
from vitcli.data.split_record import NEW, SplitRecord, image_keys
from vitcli.errors import VitcliError
from vitcli.evals import held_out as held_out_images
from vitcli.evals.held_out import choose_images
from vitcli.evals.ood import ReferenceStore
from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train.recorded_images import describe_changes, read_rows
from vitcli.train.resolve import random_model
from vitcli.train.session import train
from vitcli.weights.load import load_model
from vitcli.weights.store import load_weights

CLASSES = ("ant", "bee", "cat")
# A random head and no step: what is measured on which images is the question here.
SETTINGS = {
    "data": {"name": "photos"},
    "model": {"num_channels": 3, "depth": 1, "pool": "token"},
    "augment": {"crop": "none"},
    "optim": {"name": "adamw"},
    "train": {"steps": 2, "batch_size": 8, "checkpoint_steps": 1},
}


def noise(path, seed):
    """An uncompressed picture: all have the same size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(here):
    for number, name in enumerate(CLASSES):
        for i in range(10):
            noise(here / "photos" / name / f"{i}.bmp", 100 * number + i)
    return here / "photos"


def go(out="run", resume=False, watch=None, **sections):
    sections = {k: {**SETTINGS.get(k, {}), **sections.get(k, {})} for k in {*SETTINGS, *sections}}
    recipe = tiny_recipe(**sections)
    make = lambda source: random_model(recipe, source)  # noqa: E731
    return train(recipe, make, out=Path(out), resume=resume, watch=watch or Quiet())


def held_out(data="photos", model="run", watch=None):
    """The names of the images that `evaluate` counts."""
    net = load_model(model)
    images = choose_images(data, model, net, Inference(), watch or Quiet())[1]
    return {Path(images.describe(i)).relative_to(data).as_posix() for i in range(len(images))}


@pytest.fixture
def trained(photos):
    """A finished run, and the images that it held out."""
    go()
    source = load_data("photos")
    test = source.splits["test"]
    names = {Path(test.describe(i)).relative_to("photos").as_posix() for i in range(len(test))}
    assert len(names) == 6
    return names


def change(photos):
    """Another seeded split would be drawn after this."""
    noise(photos / "ant/00.bmp", 1000)
    noise(photos / "bee/zz.bmp", 1001)
    (photos / "cat/2.bmp").unlink()


def test_added_and_removed_images_do_not_change_what_is_held_out(trained, photos):
    assert held_out() == trained
    change(photos)
    told = Told()
    assert held_out(watch=told) == trained - {"cat/2.bmp"}
    assert (
        "2 new images" in told.notes[-1]
        and "1 held-out image of the run is missing" in told.notes[-1]
    )
    assert not told.warnings
    test = load_data("photos").splits["test"]  # without the record, training images would count
    drawn = {Path(test.describe(i)).relative_to("photos").as_posix() for i in range(len(test))}
    assert drawn - trained - {"ant/00.bmp", "bee/zz.bmp"}
    result = evaluate.run("photos", model="run", out=Path("report"))
    assert (result.split, result.metrics.images) == ("test", len(trained - {"cat/2.bmp"}))


@pytest.mark.parametrize("edited", [False, True])
def test_data_are_opened_once(edited, trained, photos, monkeypatch):
    """Before, a record of the splits made `evaluate` and `fewshot` list and read the data twice."""
    opened = []
    monkeypatch.setattr(
        held_out_images,
        "open_data",
        lambda *given, **options: opened.append(given) or open_data(*given, **options),
    )
    if edited:
        change(photos)
    held_out()
    assert len(opened) == 1
    source = held_out_images.open_known(DataSection(), "photos", load_model("run"), Quiet())
    assert len(opened) == 2
    if not edited:
        usual = load_data("photos")
        assert (source.fingerprint, source.layout) == (usual.fingerprint, usual.layout)
        assert source.notes == usual.notes


def test_the_weights_alone_and_exports_know_it_too(trained, photos):
    shutil.copy("run/model.safetensors", "alone.safetensors")
    models = ["alone.safetensors"]
    for to, out in (("timm", "t"), ("huggingface", "h")):
        export.run(to, model="run", out=Path(out), settings=None)
        models.append(out)
    change(photos)
    for model in models:
        assert held_out(model=model) == trained - {"cat/2.bmp"}, model
    # The record belongs to these weights, not to others of the same name.
    other = Path("t/model.safetensors")
    save_file({n: t + 1 for n, t in load_weights(other).items()}, other, {"format": "pt"})
    assert load_model("t").split_record is None


def test_renamed_moved_and_edited_images_keep_their_split(trained, photos):
    one, *_ = sorted(trained)
    learned = sorted(
        p.relative_to(photos).as_posix()
        for p in photos.glob("*/*")
        if p.relative_to(photos).as_posix() not in trained
    )
    (photos / one).rename((photos / one).with_name("renamed.bmp"))
    noise(photos / learned[0], 5000)  # an edited training image is not a new image
    photos.rename(photos.with_name("moved"))
    expected = trained - {one} | {f"{one.split('/')[0]}/renamed.bmp"}
    assert held_out("moved") == expected


def test_other_data_are_evaluated_whole(trained, here):
    for name in CLASSES[:2]:
        for i in range(4):  # the same names, but other content
            noise(here / "other" / name / f"{i}.bmp", 9000 + 10 * i + len(name))
    told = Told()
    assert len(held_out("other", watch=told)) == 8 and not told.warnings


def test_training_images_are_not_counted_or_announced(trained, photos, here):
    for name in CLASSES:
        for path in (photos / name).iterdir():
            if f"{name}/{path.name}" not in trained:
                (here / "learned" / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, here / "learned" / name / path.name)
    told = Told()
    assert len(held_out("learned", watch=told)) == 24
    assert "was trained on all 24 images" in told.warnings[0]
    noise(here / "learned/ant/new.bmp", 77)
    told = Told()
    assert held_out("learned", watch=told) == {"ant/new.bmp"}
    assert "was trained on 24 of the 25 images" in told.warnings[0]


def test_weights_without_a_record_say_what_is_done(trained, photos):
    net = load_model("run")
    net.split_record = None
    told = Told()
    images = choose_images("photos", "other.safetensors", net, Inference(), told)[1]
    assert len(images) == 30 and "does not record which images" in told.warnings[0]


def test_few_shot_and_ood_use_the_images_that_were_held_out(trained, photos):
    change(photos)
    told = Told()
    settings = nest("fewshot.shots", [1])
    result = fewshot.run("photos", model="run", settings=settings, out=Path("f"), watch=told)
    kept = trained - {"cat/2.bmp"}
    assert result.test_images == len(kept) and any("2 new images" in n for n in told.notes)
    section = Inference().data
    store = ReferenceStore(load_model("run"), "run", section, 8, "fp32", Quiet())
    made = store.get(None)
    assert (made.facts["held_out"], made.facts["images"]) == (len(kept), 24)


def test_a_copy_in_both_splits_is_told_by_its_path():
    keys = np.zeros(4, dtype=[("content", "<u8"), ("path", "<u4")])
    keys["content"], keys["path"] = [7, 7, 8, 9], [1, 2, 3, 4]
    record = SplitRecord({"train": keys[[0, 2]], "test": keys[[1]]})
    assert record.roles(keys).tolist() == [0, 2, 0, NEW]
    moved = keys[[1]].copy()
    moved["path"] = 99
    assert record.roles(moved).tolist() == [0]  # a copy of it was trained on
    again = SplitRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again.roles(keys).tolist() == [0, 2, 0, NEW]


def test_a_record_of_100_000_images_is_small():
    keys = np.zeros(100_000, dtype=[("content", "<u8"), ("path", "<u4")])
    assert len(json.dumps(SplitRecord({"train": keys}).to_json())) < 2 * 10**6


def test_the_key_of_a_large_file_depends_on_its_blocks(here):
    content = bytearray(np.random.default_rng(0).bytes(400_000))
    keys = []
    for number, place in enumerate((None, 0, 399_999, 200_000)):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path = here / "p" / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(changed)
    images = load_data("p", whole=True).splits["train"]
    keys = image_keys(images)["content"]
    names = [Path(images.describe(i)).name for i in range(4)]
    by_name = dict(zip(names, keys.tolist(), strict=True))
    assert len({by_name["0.png"], by_name["1.png"], by_name["2.png"]}) == 3


# ---- resume ----


def stop_after_one_step(photos):
    """A run with the checkpoint of its first step."""
    go()
    shutil.copytree("run", "whole")
    Path("run/result.json").unlink()
    Path("run/model.safetensors").unlink()
    shutil.rmtree("run/checkpoints/step_000002")


CHANGES = {
    "1 image added (`ant/new.bmp`)": lambda p: noise(p / "ant/new.bmp", 1),
    "1 image removed (`cat/4.bmp`)": lambda p: (p / "cat/4.bmp").unlink(),
    "1 image edited or exchanged (`bee/2.bmp`)": lambda p: noise(p / "bee/2.bmp", 1),
    "2 images edited or exchanged (`ant/1.bmp`, `ant/2.bmp`)": lambda p: exchange(p / "ant"),
    "1 image renamed or moved to another class (`bee/x.bmp`)": lambda p: (p / "ant/0.bmp").rename(
        p / "bee/x.bmp"
    ),
}


def exchange(folder):
    (folder / "1.bmp").rename(folder / "t")
    (folder / "2.bmp").rename(folder / "1.bmp")
    (folder / "t").rename(folder / "2.bmp")


@pytest.mark.parametrize("words", CHANGES)
def test_a_resume_on_changed_data_names_what_changed(words, photos):
    stop_after_one_step(photos)
    CHANGES[words](photos)
    with pytest.raises(VitcliError, match="have changed since `run` started") as caught:
        go(resume=True)
    assert words in caught.value.message and "--out" in caught.value.hint
    assert not Path("run/result.json").exists()


def test_a_resume_on_relabelled_rows(photos, here):
    rows = [f"photos/{n}/{i}.bmp,{n}" for n in CLASSES for i in range(10)]
    Path("t.csv").write_text("\n".join(["path,label", *rows]))
    go(data={"name": "t.csv"})
    before = read_rows(Path("run/images.tsv"))
    assert len(before) == 30 and {row.label for row in before} == set(CLASSES)
    Path("run/result.json").unlink()
    rows[0] = rows[0].replace(",ant", ",bee")
    Path("t.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(VitcliError, match=r"1 image relabelled \(`photos/ant/0.bmp`\)"):
        go(resume=True, data={"name": "t.csv"})


def test_moved_data_with_equal_content_resume_to_the_same_bits(photos):
    stop_after_one_step(photos)
    photos.rename("elsewhere")
    go(resume=True, data={"name": "elsewhere"})
    one, two = load_weights("whole/model.safetensors"), load_weights("run/model.safetensors")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert Run(Path("run")).recipe().data.name == "elsewhere"
    assert held_out("elsewhere") == held_out("elsewhere", "whole")


def test_an_old_run_is_compared_by_its_fingerprint(photos):
    """Earlier versions recorded names and sizes only."""
    stop_after_one_step(photos)
    run = Run(Path("run"))
    facts = run.provenance()
    del facts["data"]["content"]
    run.update_provenance(facts)
    (run.path / "images.tsv").unlink()
    shutil.copytree("run", "again")
    go(resume=True)
    noise(photos / "ant/new.bmp", 1)
    with pytest.raises(VitcliError, match="have changed since `again` started"):
        go("again", resume=True)


def test_nothing_is_named_where_only_the_order_differs():
    rows = read_rows(Path("missing"))
    assert rows == () and describe_changes(rows, rows) == []

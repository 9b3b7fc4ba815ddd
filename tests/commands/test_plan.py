"""`vitcli plan` and `--dry-run`: the numbers, and that nothing is written."""

import json

import pytest
from support.tiny import write_tiny

from vitcli.cli import main as cli
from vitcli.commands import plan
from vitcli.cost.alternatives import SECONDS_PER_DAY
from vitcli.cost.hardware import HARDWARE, find_hardware
from vitcli.errors import VitcliError
from vitcli.vit import parse_variant
from vitcli.vit.macs import training_flops

KEYS = {"parameters", "flops_per_image", "training_flops", "memory_bytes", "images_per_second"}
KEYS |= {"seconds", "device"}


def planned(capsys, *arguments):
    assert cli.run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def tiny(folder, **sections):
    """A recipe with an optimizer that is traced faster than Muon."""
    return write_tiny(folder / "tiny.toml", optim={"name": "adamw"}, **sections)


def small(target, **options):
    """Without steps on this machine and without changes, which take time."""
    return plan.run(target, probing=False, compare=False, **options).to_json()


@pytest.mark.slow
def test_a_paper_recipe_to_the_exaflop():
    facts = small("paper_vit_b16_jft", settings={"train": {"micro_batch_size": 8}})
    assert facts["training_flops"] == pytest.approx(224e18, rel=0.005)  # table 6


def test_a_paper_recipe_is_planned_without_its_data():
    changes = {"train": {"micro_batch_size": 8}, "model": {"depth": 1}}
    facts = small("paper_vit_b16_jft", settings=changes)
    assert set(facts) >= KEYS
    assert facts["images"] == pytest.approx(7 * 303e6, rel=1e-4)
    assert facts["training_flops"] == 3 * facts["flops_per_image"] * facts["images"]
    assert (
        facts["flops_per_image"] == 2 * facts["macs_per_image"] == 2 * sum(facts["parts"].values())
    )
    assert facts["tokens_per_image"] == 197 and facts["tokens"] == 197 * facts["images"]
    assert facts["seconds"] is None and not facts["measured"]


def test_attention_pooling_is_planned(here):
    recipe = tiny(here, model={"pool": "map"})
    facts = small(str(recipe))
    assert facts["parts"]["pooling"] > 0 and facts["memory_bytes"] > 0


def test_sizes_that_the_model_does_not_take_are_an_error_and_no_proposal(capsys):
    """Training refuses them; `plan` did not check them, nor did its larger patch: a traceback."""
    words = ["plan", "speedrun_plain", "--no-probe", "--images", "9", "--steps", "2"]
    words += ["--set", "model.image_size=32", "--set"]
    facts = planned(capsys, *words, "model.name=mu/8")
    assert "larger patch" not in {row["change"] for row in facts["changes"]}  # 16 px: 1x1 patch
    assert cli.run([*words, "model.name=mu/16"]) == 2
    assert "`train.smaller_sizes` has 16 px" in capsys.readouterr().err


# The paper's table 2 and section 4.2: TPUv3-core-days, cores times days.
JFT, I21K = 303e6, 14.2e6  # images
CORE_DAYS = [("L/16", 14 * JFT, 680), ("H/14", 14 * JFT, 2500), ("L/16", 90 * I21K, 230)]


@pytest.mark.parametrize(("name", "images", "days"), CORE_DAYS)
def test_core_days(name, images, days):
    config = parse_variant(name, image_size=(224, 224), num_classes=18_291)
    core = HARDWARE["tpuv3"]
    flops = training_flops(config, images)
    least, most = (core.seconds(flops, mfu) / SECONDS_PER_DAY for mfu in reversed(core.mfu))
    assert least < days < most


def test_a_dry_run_trains_and_writes_nothing(here, capsys):
    recipe = tiny(here)
    command = ("pretrain", "--recipe", recipe, "--steps", 4, "--out", "run")
    facts = planned(capsys, *command, "--dry-run")
    assert [p.name for p in here.iterdir()] == ["tiny.toml"]
    assert facts["measured"] and facts["steps"] == 4 and facts["images"] == 4 * 32
    assert facts["seconds"] > facts["time"]["train"] > 0 and facts["images_per_second"] > 0
    assert facts["train_images"] == 1438 and 0 < facts["mfu"] < 1
    assert cli.run(list(map(str, command))) == 0
    result = json.loads((here / "run/result.json").read_text())
    assert result["parameters"] == facts["parameters"]
    capsys.readouterr()
    assert cli.run([*map(str, command), "--dry-run"]) == 2  # as the command itself would say
    assert "exists already" in capsys.readouterr().err
    assert planned(capsys, "plan", "run", "--no-probe")["steps"] == 4


def test_a_budget_is_turned_into_steps(here, capsys):
    recipe = tiny(here, train={"eval_steps": None})
    arguments = ("plan", recipe, "--budget", "20s", "--watts", 100, "--kwh-price", 0.3)
    facts = planned(capsys, *arguments, "--hour-price", 2)
    assert facts["steps"] > 8 and facts["seconds"] <= 20
    budget = facts["budget"]
    assert budget["steps"] == facts["steps"] and budget["whole_steps"] == 8
    assert facts["electricity"] == pytest.approx(100 * facts["seconds"] / 3.6e6 * 0.3)
    assert facts["rent"] == pytest.approx(2 * facts["seconds"] / 3600)
    half = facts["changes"][1]
    assert half["change"] == "half the steps" and half["time_ratio"] == pytest.approx(0.5)
    assert list(here.iterdir()) == [recipe]


def test_stages_cost_what_their_tokens_do(here):
    recipe = tiny(
        here,
        model={"image_size": 32, "position": "sincos2d"},
        train={"smaller_sizes": [[16, 0.5]], "patch_drop_rate": 0.5, "patch_drop_until": 0.5},
    )
    facts = small(str(recipe), device="a100")
    first, second = facts["stages"]
    assert (first["tokens_per_image"], second["tokens_per_image"]) == (9, 65)
    assert first["macs_per_image"] < second["macs_per_image"] / 5
    mean = (first["macs_per_image"] + second["macs_per_image"]) / 2
    assert facts["training_flops_per_image"] == pytest.approx(6 * mean)
    assert facts["device"] == "A100 80GB SXM" and facts["seconds"] > 0


@pytest.mark.parametrize("objective", ["mae", "masked_patch"])
def test_objectives_that_mask(here, objective):
    recipe = tiny(here, objective={"name": objective})
    facts = small(str(recipe))
    n, d, extra = 4, 32, 0
    if objective == "mae":  # 1 of 4 patches is seen, beside the class token; 2 blocks of 128
        t, w = n + 1, 128
        extra = 2 * d * w + n * w * 48 + 2 * (12 * t * w * w + 2 * t * t * w)
        t = 2
        blocks = 2 * (4 * t * d * d + 2 * t * t * d + 2 * t * d * 64)
        assert facts["stages"][0]["macs_per_image"] == 4 * 48 * d + blocks + extra
    else:  # 2 of 4 patches tell their colour of 512
        assert facts["stages"][0]["macs_per_image"] == facts["macs_per_image"] + 2 * d * 512
    assert facts["memory"]["activations"] > 0


def test_a_recipe_of_finetune_without_a_run_takes_the_model_of_its_header(here):
    said = "# Data: CIFAR-10, 50,000 training images\n# Cost: 1 petaFLOPs for Pico/8\n"
    body = "[train]\nsteps = 10\nbatch_size = 4\n"
    (here / "mine.toml").write_text(f'{said}command = "finetune"\n{body}')
    facts, lora = (small("mine.toml", settings=s) for s in ({}, {"lora": {"rank": 2}}))
    assert facts["model"] == "Pico/8" and facts["train_images"] == 50_000
    assert facts["epochs"] == pytest.approx(40 / 50_000)
    assert facts["trained_parameters"] == facts["parameters"] == lora["parameters"]
    assert lora["trained_parameters"] < 0.05 * lora["parameters"]
    assert lora["memory"]["optimizer"] < 0.05 * facts["memory"]["optimizer"]
    assert lora["training_flops"] < facts["training_flops"]


def test_a_recipe_with_augmentation_is_planned_without_its_data(here, monkeypatch):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.2)
    text = tiny(here, augment={"preset": "medium1", "repeats": 2}).read_text()
    (here / "tiny.toml").write_text(text.replace('name = "builtin:digits"\n', ""))
    facts = plan.run(str(here / "tiny.toml"), images=64, classes=3, compare=False).to_json()
    assert facts["measured"]


def test_mistakes(here, capsys):
    recipe = tiny(here)
    (here / "photos").mkdir()
    for arguments, words in [
        (["nonsense"], "unknown recipe `nonsense`"),
        (["photos"], "is not a run"),
        (["pretrain", "--no-probe"], "--images N"),
        ([recipe, "--device", "h10"], "did you mean `h100`?"),
        ([recipe, "--kwh-price", "0.3"], "needs the power of the machine"),
        ([recipe, "--budget", "soon"], "is not a duration"),
    ]:
        assert cli.run(["plan", *map(str, arguments)]) == 2, arguments
        assert words in capsys.readouterr().err


def test_the_table_of_devices():
    assert len(find_hardware("all")) == len(HARDWARE) >= 7
    assert [d.name for d in find_hardware("4090,h100")] == ["RTX 4090", "H100 SXM"]
    for device in HARDWARE.values():
        assert device.source and 0 < device.mfu[0] < device.mfu[1] < 1
    with pytest.raises(VitcliError):
        find_hardware("abacus")


def test_a_person_reads_it(here, capsys):
    recipe = tiny(here)
    assert cli.run(["plan", str(recipe), "--no-probe", "--device", "all"]) == 0
    out = capsys.readouterr().out
    assert "multiply-adds" in out and "estimates, not measurements" in out and "T4" in out

"""`vitcli bench`: rows, ratios, a picture, and the libraries that may be absent."""

import importlib.util
import json

import pytest
import torch

from vitcli.cli import main as cli
from vitcli.commands import bench
from vitcli.cost import bench as cost
from vitcli.cost.bench import BenchCase, build_baseline
from vitcli.errors import VitcliError
from vitcli.vit import from_config, parse_variant

TINY = ("bench", "mu/8", "--image-size", "16", "--batch-size", "2", "--seconds", "0.01")


def test_beside_transformers_in_one_run(here, capsys):
    flags = ("--precision", "fp32", "--attention", "explicit", "--against", "transformers")
    assert cli.run([*TINY, *flags, "--memory", "1G", "--out", "bench.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    ours, theirs = facts["rows"]
    assert (ours["library"], theirs["library"]) == ("vitcli", "transformers")
    assert ours["parameters"] == theirs["parameters"]
    for row in facts["rows"]:
        assert row["forward_images_per_second"] > 0 and row["training_images_per_second"] > 0
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["forward_memory_bytes"] < row["training_memory_bytes"] < 2**30
        assert row["largest_forward_batch"] > row["largest_training_batch"] > 2
        work = 2 * row["macs_per_image"] * row["forward_images_per_second"]
        assert row["forward_mfu"] == pytest.approx(work / row["peak_flops"]) and work > 0
    (ratio,) = facts["ratios"]
    assert ratio["forward"]["least"] <= ratio["forward"]["median"] <= ratio["forward"]["largest"]
    assert (here / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_several_sizes(here, capsys, monkeypatch):
    sizes = ("forward_bytes", "training_bytes", "largest_forward", "largest_training")
    monkeypatch.setattr(cost, "_memory", lambda *_: dict.fromkeys(sizes, 9))
    assert cli.run([*TINY[:3], "16,32", *TINY[4:], "--precision", "fp32,bf16", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.count("mu/8 16") == 4 and "p50 / p90 / p99" in out


@pytest.mark.slow
def test_the_largest_batch_grows_with_the_memory(here, capsys):
    found = []
    for memory in ("200M", "400M"):
        assert cli.run([*TINY, "--precision", "fp32", "--memory", memory, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0])
    small, large = (row["largest_forward_batch"] for row in found)
    assert 1.9 * small < large < 2.6 * small  # the weights are there only once


@pytest.mark.parametrize("training", [False, True])
def test_the_largest_batch_is_tried_without_a_crash(training, monkeypatch):
    """On a GPU the estimate may be too high; a try that runs out of memory is followed by less."""
    tried, limit = [], 57

    def work(model, images, case):
        def call():
            tried.append(len(images))
            if len(images) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(cost, "_training" if training else "_forward", work)
    case = BenchCase((3, 8, 8), 4, "fp32", "auto", torch.device("cpu"), 0.1)
    config = parse_variant("Pico/4", image_size=(8, 8), depth=1)
    assert cost._largest_tried(lambda: from_config(config), case, 100, training) == tried[-1]
    assert 0.9 * limit <= tried[-1] <= limit and tried[0] == 100
    limit = 0
    assert cost._largest_tried(lambda: from_config(config), case, 100, training) == 0


def test_mistakes(here, capsys):
    for flags, words in [
        (["bench", "X/16"], "X/16"),
        ([*TINY, "--against", "tim"], "did you mean `timm`?"),
        ([*TINY, "--memory", "much"], "is not a size"),
        ([*TINY, "--attention", "flash"], "unknown attention `flash`"),
        ([*TINY, "--out", "bench.txt"], "does not end in .png"),
        (["bench", "Pico/8", "--image-size", "20"], "20"),
        (["bench", "R50x1", "--image-size", "32", "--against", "timm"], "plain Vision"),
    ]:
        assert cli.run(flags) == 2, flags
        assert words in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_library_that_is_absent():
    with pytest.raises(VitcliError, match="needs timm") as error:
        build_baseline("timm", parse_variant("Pico/8", num_classes=10), "auto")
    assert "pip install timm" in error.value.hint


def test_the_contender_has_our_shape():
    config = parse_variant("Pico/8", image_size=(16, 16), num_classes=10)
    theirs = build_baseline("transformers", config, "fused")
    assert theirs(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_sizes_of_memory():
    device = torch.device("cpu")
    assert bench.parse_memory("4G", device) == bench.parse_memory("4GiB", device) == 4 * 2**30
    assert bench.parse_memory("800m", device) == 800 * 2**20
    assert bench.parse_memory(None, device) > 2**28

import numpy as np
import pytest
import torch
from support import kinds
from support.kinds import KINDS, pictures

from vitcli.errors import VitcliError
from vitcli.vit import VisionTransformer
from vitcli.weights.edit import change_pool, match_classes, prepare_finetune, resize
from vitcli.weights.load import load_model
from vitcli.weights.load_report import LoadReport
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.store import save_model


def small(*args, **settings):
    return LoadedModel(kinds.small(*args, **settings))


@pytest.fixture
def model():
    net = create_model(
        "Pico/8", num_classes=3, image_size=16, representation_size=20, depth=2, seed=1
    )
    torch.nn.init.normal_(net.network.head.weight)
    torch.nn.init.normal_(net.network.head.bias)
    net.labels, net.head_trained = ("cat", "dog", "eel"), True
    return net


def test_a_new_head_is_zero_and_both_old_layers_go(model):
    prepare_finetune(model, ["x", "y"], image_size=(32, 16))
    assert model.config.num_classes == 2 and model.config.representation_size is None
    assert model.labels == ("x", "y") and not model.head_trained
    out = model(torch.randn(2, 3, 32, 16))
    assert out.shape == (2, 2) and not out.any()
    assert not any(name.startswith("pre_logits") for name in model.state_dict())


def test_the_backbone_stays(model):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.network.tokens(images)
        prepare_finetune(model, ["x", "y"])
        assert torch.equal(model.network.tokens(images), before)


def test_rows_of_known_classes_are_kept_by_name(model):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        prepare_finetune(model, ["eel", "cat"], keep_head=True)
        torch.testing.assert_close(model(images), before[:, [2, 0]])
    assert model.head_trained and model.config.representation_size == 20


def test_a_head_that_cannot_be_kept_is_an_error_and_changes_nothing(model):
    """Before, a new head of zeros was made without a word."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(VitcliError, match="does not know `fox`"):
        prepare_finetune(model, ["eel", "fox"], pool="mean", keep_head=True)
    model.head_trained = False
    with pytest.raises(VitcliError, match="is not trained"):
        prepare_finetune(model, ["eel", "cat"], keep_head=True)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_there_and_back_keeps_the_prefix(model):
    before = model.network.pos_embed.detach().clone()
    resize(model, (32, 48))
    assert model.config.grid == (4, 6)
    assert torch.equal(model.network.pos_embed[:, :1], before[:, :1])
    assert isinstance(model.network.pos_embed, torch.nn.Parameter)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 3)


def test_timm_resampling(shared):
    """Square and not: the numbers of timm's `resample_abs_pos_embed`."""
    from vitcli.vit.position import resample

    found = np.load(shared / "reference/timm_vit/resample_abs_pos_embed/posembed.npz")
    cases = {name.split("/")[0] for name in found.files if name.startswith("case")}
    assert len(cases) >= 4
    for case in cases:
        if "bilinear" in case:
            continue
        old, new = case.split("_")[1].split("to")
        rows, cols = map(int, new.split("x"))
        prefix = int(case.split("prefix")[1][0])
        table = torch.from_numpy(found[f"{case}/in"])
        grid = resample(table[:, prefix:], (int(old), int(old)), (rows, cols))
        out = torch.cat([table[:, :prefix], grid], dim=1).numpy()
        assert np.abs(out - found[f"{case}/out"]).max() < 1e-5, case


def test_a_size_that_the_patch_does_not_divide(model):
    with pytest.raises(VitcliError, match="30x16 is not a multiple of patch size 8") as error:
        resize(model, (30, 16))
    assert "32x16" in error.value.hint


def test_pooling_changes_drop_what_was_trained_on_another(model):
    change_pool(model, "cls")
    assert model.head_trained  # the same pooling by another name
    change_pool(model, "gap")
    assert not model.head_trained and model.labels is None
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 128)
    with pytest.raises(VitcliError, match="no attention pool"):
        change_pool(model, "map")
    with pytest.raises(VitcliError, match="unknown pooling `median`"):
        change_pool(model, "median")


def test_names_match():
    assert match_classes(["b", "a"], ["a", "b", "c"]) == [1, 0]
    assert match_classes(["b", "d"], ["a", "b"]) is None
    imagenet = ["tench, Tinca tinca", "goldfish, Carassius auratus", "English springer"]
    assert match_classes(["english_springer", "Tench"], imagenet) == [2, 0]
    assert match_classes(["crane"], ["crane, bird", "crane, machine"]) is None
    assert match_classes(["A", "a"], ["a", "b"]) is None  # never two onto one
    assert match_classes(["cafe\u0301"], ["bar", "caf\u00e9"]) == [1]  # NFD and NFC


def test_the_report_names_every_tensor(model, tmp_path):
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors", image_size=32)
    prepare_finetune(loaded, ["x"])
    report = loaded.load_report
    assert set(report.status) == set(model.state_dict())
    assert report.status["pos_embed"] == ("resampled", "2x2 -> 4x4, bicubic")
    line = report.line()
    assert "resampled: pos_embed (2x2 -> 4x4, bicubic)" in line
    assert "new: head.weight (zero, 1 classes)" in line
    assert "dropped: pre_logits.fc.weight (pre-training head)" in line


def strides(model):
    """(Y, X) pixels of a patch."""
    return [side // n for side, n in zip(model.config.image_size, model.config.grid, strict=True)]


@pytest.mark.parametrize("grid", [(4, 9), (7, 6), (8, 12), (2, 3), (6, 4)])
@pytest.mark.parametrize("name", KINDS)
def test_a_resized_model_computes_what_it_would_at_that_size(name, grid):
    """Tables of every kind: carried for good, or at each forward pass; and the report says so."""
    model = small(name)
    model.load_report = LoadReport("x", "vitcli")
    size = tuple(n * stride for n, stride in zip(grid, strides(model), strict=True))
    images = pictures(model, size=size)
    kinds = {key: type(t) for key, t in model.network.state_dict(keep_vars=True).items()}
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
        resize(model, size)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)
    assert model.config.grid == grid and model.config.image_size == size
    now = model.network.state_dict(keep_vars=True)
    assert {key: type(t) for key, t in now.items()} == kinds
    changed = {key for key, t in now.items() if t.shape != shapes[key]}
    told = set(model.load_report.names("resampled"))
    # As many patches in another shape have a table of the same shape, and other numbers in it.
    assert changed == told if grid != (6, 4) else changed <= told
    assert VisionTransformer(model.config).load_state_dict(now)


@pytest.mark.parametrize(
    ("name", "reports"),
    [
        ("plain", {"pos_embed": "4x6 -> 4x9, bicubic"}),
        ("learned, every", dict.fromkeys(["pos_embed", "block_pos_embed"], "4x6 -> 4x9, bicubic")),
        ("learned2d", {"pos_embed_x": "6 -> 9, linear"}),
        ("relative", {"blocks.2.attn.rel_pos": "offsets of 24 -> 36 patches, linear"}),
        (
            "bias, every",
            {
                "blocks.2.attn.rel_pos_bias.relative_position_bias_table": "offsets of 4x6 -> 4x9 "
                "patches, bilinear"
            },
        ),
        ("axial, relative", {"blocks.2.row.attn.rel_pos": "offsets of 6 -> 9 patches, linear"}),
    ],
)
def test_the_report_says_how_positions_were_carried(name, reports):
    model = small(name)
    model.load_report = LoadReport("x", "vitcli")
    resize(model, (16, 36))
    status = model.load_report.status
    for tensor, told in reports.items():
        assert status[tensor] == ("resampled", told)
    assert not any("_y" in tensor or "column" in tensor for tensor in status)


@pytest.mark.parametrize("kind", ["learned", "learned2d"])
def test_bilinear_aligns_the_corners_of_every_block(kind):
    model = small(position=kind, position_at="every")
    model.load_report, model.network.position_resize = LoadReport("x", "google"), "bilinear"
    before = [
        model.network.positions((4, 6), block)[:, -24:].reshape(4, 6, 16) for block in range(3)
    ]
    resize(model, (28, 44))
    for block in range(3):
        after = model.network.positions((7, 11), block)[:, -77:].reshape(7, 11, 16)
        torch.testing.assert_close(after[::2, ::2], before[block], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (224, 160), (384, 512)])
def test_usual_sizes(size):
    for name in ("plain", "learned2d, every", "relative", "axial"):
        model = small(name, patch_size=32, image_size=(64, 96))
        resize(model, size)
        assert model(pictures(model, number=1)).shape == (1, 5)


def test_a_hybrid_counts_the_pixels_of_its_feature_map():
    model = small("hybrid")  # patches of two cells of four pixels
    with pytest.raises(
        VitcliError,
        match="feature map of 9x12 cells, which is not a multiple",
    ) as error:
        resize(model, (36, 48))
    assert "32x48" in error.value.hint
    resize(model, (40, 40))
    assert model.config.grid == (5, 5)


def test_a_new_head_reads_both_tokens_of_a_distilled_model():
    model = small("distilled")
    model.labels, model.head_trained = tuple("abcde"), True
    model.load_report = LoadReport("x", "timm")
    images = pictures(model)
    with torch.no_grad():
        before = model(images)
        prepare_finetune(model, ["d", "a"], keep_head=True)
        torch.testing.assert_close(model(images), before[:, [3, 0]], rtol=0, atol=1e-5)
    assert model.network.head.weight.shape == (2, 32) and not model.config.distillation_head
    assert set(model.load_report.names("dropped")) == {"head_dist.weight", "head_dist.bias"}
    assert VisionTransformer(model.config).load_state_dict(model.state_dict())
    prepare_finetune(model, ["x", "y", "z"])
    assert not model(images).any()


def test_another_pooling_than_the_distilled_one():
    model = small("distilled")
    change_pool(model, "token_mean")
    assert model.network.head_dist is None and model.config.num_classes == 0
    assert model(pictures(model)).shape == (2, 32)
    change_pool(model, "distilled")
    assert model.features(pictures(model)).shape == (2, 32)
    with pytest.raises(VitcliError, match="needs `distillation_token = true`"):
        change_pool(small(), "distilled")
    with pytest.raises(VitcliError, match="needs the class token"):
        change_pool(small("axial"), "token_mean")

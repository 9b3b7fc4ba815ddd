"""The figures of `vitcli inspect` against plain numpy, on transformers' attentions and our own."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import cosine_similarity as sklearn_cosine
from support.kinds import KINDS, pictures, small

from vitcli.inspection import inductive_bias as equivariance
from vitcli.inspection.attention import (
    attention_layers,
    attention_weights,
    layer_names,
    max_batch_size,
    measure_attention,
    pooling_attention,
)
from vitcli.inspection.attention_distance import (
    head_statistics,
    neighbour_mask,
    uniform_distance,
    uniform_local_share,
)
from vitcli.inspection.embeddings import (
    cosine_similarity,
    embedding_filters,
    position_table,
    principal_components,
    similarity_means,
)
from vitcli.inspection.inductive_bias import backbone_parameters, random_network
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.vit import ResNet, ResNetConfig, create_network
from vitcli.vit.blocks import AxialBlock, join_lines, split_lines
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model

# Plain numpy, written from the paper and the authors' words, not from our code.


def numpy_rollout(attentions):
    """L times (H, T, T) -> (T, T)."""
    joint = np.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = attention.mean(0) + np.eye(attention.shape[-1])
        joint = (mixed / mixed.sum(1, keepdims=True)) @ joint
    return joint


def numpy_distance(attention, rows, cols, prefix, scaled=True):
    """(H, T, T) -> (H,): query by query."""
    found = np.zeros(attention.shape[0])
    for h, head in enumerate(attention):
        for q in range(rows * cols):
            weights = head[prefix + q, prefix:]
            far = [np.hypot(q // cols - k // cols, q % cols - k % cols) for k in range(rows * cols)]
            found[h] += (weights @ far) / (weights.sum() if scaled else 1.0)
    return found / (rows * cols)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small ViT of transformers with weights that matter, as a folder that is a MODEL."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=20,
        patch_size=4,
        num_labels=7,
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "layernorm" in name and "weight" in name else 0.0, std=0.4)
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(path)
    images = torch.randn(3, 3, 20, 20)
    with torch.no_grad():
        out = model(images, output_attentions=True)
    attentions = [a.double().numpy() for a in out.attentions]
    return path, images, attentions, out.logits.numpy(), model.state_dict()


def test_rollout_and_distance_are_those_of_transformers_attentions(folder):
    path, images, theirs, logits, _ = folder
    model = load_model(path).network
    found = measure_attention(model, images, num_maps=2)
    assert len(theirs) == len(layer_names(model)) == 4
    for i in range(3):
        attentions = [layer[i] for layer in theirs]
        expected = numpy_rollout(attentions)[0, 1:].reshape(5, 5)
        assert np.abs(found.rollout[i] - expected).max() < 1e-5
        for number, attention in enumerate(attentions):
            for scaled, ours in ((True, found.distance), (False, found.unscaled)):
                expected = numpy_distance(attention, 5, 5, 1, scaled)
                assert np.abs(ours[i, number] - expected).max() < 1e-5
            assert np.abs(found.prefix[i, number] - attention[:, 1:, 0].mean(1)).max() < 1e-5
            if i < 2:
                expected = attention[:, 0, 1:].reshape(3, 5, 5)
                assert np.abs(found.maps[i, number] - expected).max() < 1e-5
    assert found.maps.shape == (2, 4, 3, 5, 5)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)


def test_filters_and_positions_are_those_of_sklearn(folder):
    path, _, _, _, state = folder
    model = load_model(path).network
    name, filters = embedding_filters(model)
    found = principal_components(filters, number=10)
    weights = state["vit.embeddings.patch_embeddings.projection.weight"].double().numpy()
    pca = PCA(10, svd_solver="full").fit(weights.reshape(24, -1))
    assert name == "patch embedding" and found.filters.shape == (10, 3, 4, 4)
    assert np.abs(found.explained.numpy() - pca.explained_variance_ratio_).max() < 1e-5
    ours = found.filters.numpy().reshape(10, -1)
    signs = np.sign((ours * pca.components_).sum(1, keepdims=True))
    assert np.abs(ours - signs * pca.components_).max() < 1e-5
    assert (np.take_along_axis(ours, np.abs(ours).argmax(1)[:, None], 1) > 0).all()

    positions = state["vit.embeddings.position_embeddings"][0, 1:].double().numpy()
    similarity = cosine_similarity(position_table(model)).numpy()
    assert np.abs(similarity - sklearn_cosine(positions)).max() < 1e-5
    means = similarity_means(torch.from_numpy(similarity), (5, 5))
    near = [similarity[5 * r + c, 5 * r + c + 1] for r in range(5) for c in range(4)]
    near += [similarity[5 * r + c, 5 * r + 5 + c] for r in range(4) for c in range(5)]
    assert means["neighbours"] == pytest.approx(np.mean(near), abs=1e-9)


def test_a_trained_vit_tiny_in_transformers(shared, tmp_path):
    """The same on the weights of a real ViT-Ti/16, which transformers reads from our export."""
    from transformers import ViTForImageClassification

    file = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    model = load_model(file, preprocess={"mean": [0.5] * 3, "std": [0.5] * 3})
    write_huggingface(model, tmp_path)
    theirs = ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = theirs(images, output_attentions=True).attentions
    attentions = [a[0].double().numpy() for a in attentions]
    found = measure_attention(model.network, images)
    expected = numpy_rollout(attentions)[0, 1:].reshape(14, 14)
    assert np.abs(found.rollout[0] - expected).max() < 1e-5
    for number in (0, 5, 11):
        expected = numpy_distance(attentions[number], 14, 14, 1)
        assert np.abs(found.distance[0, number] - expected).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_is_that_of_the_forward_pass(kind):
    """Recomputed attention times values, projected, is what the model's attention gives."""
    model = small(kind)
    images = pictures(model)
    grid = model.grid_of(images)
    inputs, outputs = [], []
    blocks = [
        part
        for block in model.blocks
        for part in ((block.row, block.column) if isinstance(block, AxialBlock) else (block,))
    ]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, parts: inputs.append(parts[0]))
        block.attn.register_forward_hook(lambda *parts: outputs.append(parts[-1]))
    with torch.no_grad():
        expected_logits = model(images)
        whole = list(attention_layers(model, images))
        assert [layer.name for layer in whole] == layer_names(model) and len(whole) == len(blocks)
        inputs, outputs = inputs[: len(blocks)], outputs[: len(blocks)]
        for block, x, expected, layer in zip(blocks, inputs, outputs, whole, strict=True):
            attention, attn = layer.attention, block.attn
            b, h, t, _ = attention.shape
            assert torch.allclose(attention.sum(-1), torch.ones(b, h, t), atol=1e-5)
            branch = block.norm1(x)
            lines = branch if block.along is None else split_lines(branch, grid, block.along)
            turn = model.rotation(grid)
            inside = attention_weights(attn, lines, grid, model.shared_bias(grid), turn)
            if block.along is not None:  # values of all patches, in the order of the picture
                expected = join_lines(expected, grid, block.along)
                own = inside.sum()
                assert torch.allclose(attention.sum(), own, rtol=1e-5)
            d = branch.shape[-1]
            v = attn.qkv(branch).reshape(b, t, 3, d)[:, :, 2]
            if attn.v_bias is not None:  # queries and values have a bias, keys have none
                v = v + attn.v_bias
            v = v.reshape(b, t, h, d // h).transpose(1, 2)
            ours = attn.proj(attn.norm((attention @ v).transpose(1, 2).reshape(b, t, d)))
            assert torch.allclose(ours, expected, atol=1e-4), (kind, layer.name)
        tokens = model.norm(whole[-1].output)
        assert torch.allclose(model.classify(model.pool(tokens, grid)), expected_logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rollout_of_every_kind_is_a_share(kind):
    """What the source takes from the patches and from the other tokens sums to 1."""
    model = small(kind)
    found = measure_attention(model, pictures(model), num_maps=1)
    prefix = model.config.num_prefix_tokens
    total = found.rollout.sum(axis=(1, 2))
    assert (found.rollout >= 0).all()
    assert (total > 0).all() and (total < 1 + 1e-5).all()
    if not prefix:
        assert np.abs(total - 1).max() < 1e-5
    with torch.no_grad():
        attentions = [
            layer.attention.double() for layer in attention_layers(model, pictures(model))
        ]
    joint = numpy_rollout([a[0].numpy() for a in attentions])
    if model.config.pool in ("token", "token_mean", "distilled"):
        expected = joint[0, prefix:]
    elif model.config.pool == "map":
        with torch.no_grad():
            weights = pooling_attention(model, model.tokens(pictures(model)))[0].mean(0).numpy()
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        expected = weights @ joint[prefix:, prefix:]
    else:
        expected = joint[prefix:, prefix:].mean(0)
    assert np.abs(found.rollout[0].ravel() - expected).max() < 1e-5


def test_attention_that_looks_nowhere_else_and_everywhere():
    grid = (3, 4)
    alone = torch.eye(13).expand(1, 2, -1, -1)
    found = head_statistics(alone, grid)
    assert torch.equal(found.distance, torch.zeros(1, 2).double())
    assert torch.equal(found.local, torch.ones(1, 2).double())
    even = torch.full((1, 2, 13, 13), 1 / 13)
    found = head_statistics(even, grid)
    assert found.distance[0, 0].item() == pytest.approx(uniform_distance(grid))
    assert found.local[0, 0].item() == pytest.approx(uniform_local_share(grid))
    assert found.prefix[0, 0].item() == pytest.approx(1 / 13)
    corner = neighbour_mask(grid)[0].reshape(grid)  # itself, right, below, and both
    assert corner.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    nothing = torch.zeros(1, 1, 13, 13)
    nothing[..., 0] = 1
    assert (
        head_statistics(nothing, grid).distance.item() == 0
        and head_statistics(nothing, grid).prefix.item() == 1
    )


def test_memory_decides_how_many_images_go_at_once():
    with torch.device("meta"):
        assert max_batch_size(create_network("Ti/16")) == 32
        assert max_batch_size(create_network("L/16", image_size=384)) == 3


def test_a_shift_by_whole_cells_and_between_them():
    features = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert torch.equal(equivariance.shift_features(features, 1), features[:, :, 1:, 1:])
    between = equivariance.shift_features(features, 0.5)
    expected = (features[..., :2, :3] + features[..., 1:, 1:]) / 2  # of a plane
    assert torch.allclose(between, expected)
    assert equivariance.shift_features(features, 3).numel() == 0
    assert equivariance.variance_explained(features, features) == 1
    assert (
        equivariance.variance_explained(
            equivariance.shift_features(features, 5), features[:, :, :0, :0]
        )
        is None
    )


def test_r2_is_sklearns():
    """A regression with one slope on the maps, each centred within its image and channel."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 3, 4, generator=generator).double() for _ in range(2))
    x, y = ((v - v.mean(dim=(2, 3), keepdim=True)).reshape(-1, 1).numpy() for v in (a, a + b))
    expected = LinearRegression(fit_intercept=False).fit(x, y).score(x, y)
    # The score centres y once more; within images y is centred already.
    assert equivariance.variance_explained(a + b, a) == pytest.approx(expected, abs=1e-12)
    shifted = a + torch.randn(2, 5, 1, 1, generator=generator)
    assert equivariance.variance_explained(shifted, 3 * a) == pytest.approx(1)


class Constructed(torch.nn.Module):
    """A network with patches of 4 px whose feature map is a given function of the images."""

    def __init__(self, function):
        super().__init__()
        self.config, self.function = create_network("mu/4", image_size=64).config, function

    def tokens(self, images):
        patches = self.function(images).flatten(2).transpose(1, 2)
        return torch.cat([patches[:, : self.config.num_prefix_tokens], patches], dim=1)

    def grid_of(self, images):
        return images.shape[2] // 4, images.shape[3] // 4


def constructed_r2(function):
    pictures = shifted_pictures(8)
    return equivariance.measure_equivariance(Constructed(function), pictures, (4, 8), (64, 64))


def convolution(images):
    weights = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.conv2d(images, weights, stride=4)


def spread_mean(images):
    means = convolution(images).mean(dim=(2, 3), keepdim=True)
    noise = 1e-4 * torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(2))
    return means + noise * torch.randn(())


def test_a_convolution_is_equivariant_and_a_spread_mean_is_not():
    """The mean of an image hardly changes with a shift: invariance must not count."""
    found = constructed_r2(convolution)
    assert found.r2 == pytest.approx((1, 1), abs=1e-5)
    assert max(*found.unmoved, *found.unrelated) < 0.05
    exact = constructed_r2(
        lambda x: convolution(x).mean((2, 3), keepdim=True).expand(-1, 6, 16, 16)
    )
    assert max(exact.r2) < 0.05
    assert max(constructed_r2(spread_mean).r2) < 0.05
    mixed = constructed_r2(lambda x: convolution(x) + 50 * spread_mean(x))
    assert mixed.r2 == pytest.approx((1, 1), abs=0.01)


def test_random_features_are_not_equivariant():
    found = constructed_r2(lambda x: torch.randn(len(x), 6, 16, 16))
    assert max(*found.r2, *found.inner, *found.unmoved) < 0.05


def test_a_map_of_places_shows_in_the_control():
    places = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(3))
    found = constructed_r2(lambda x: places.expand(len(x), -1, -1, -1) + 0.01 * convolution(x))
    assert min(found.unmoved) > 0.95 and max(found.r2) < 0.05


def test_networks_are_compared_at_equal_stride():
    """Patches of 16 px beside a ResNet of stride 32: it reads images of twice the size."""
    preprocess = Preprocess(image_size=(64, 64), mean=(0.5,), std=(0.5,))
    images = [torch.randint(0, 255, (1, 3, 96, 96), dtype=torch.uint8) for _ in range(2)]
    model = random_network(ResNetConfig((64, 64), 3, (1, 1, 1, 1), 0.5))
    row = equivariance.measure_network("r", model, images, preprocess, 16, Quiet().progress("", 1))
    assert row.image_size == (128, 128) and row.equivariance.shifts == (16, 32, 64)
    assert all(value is not None for value in row.equivariance.r2)


def shifted_pictures(margin, number=3, side=64):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, side + margin, side + margin)
    return [torch.randn(shape, generator=generator) for _ in range(number)]


def test_patches_without_positions_and_attention_move_exactly():
    """No positions, attention that is switched off: shifting by a patch moves the features."""
    model = create_network("mu/16", image_size=64, position="none")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    found = equivariance.measure_equivariance(model, shifted_pictures(32), (8, 16, 32), (64, 64))
    assert found.r2[1] == pytest.approx(1, abs=1e-6) and found.r2[2] == pytest.approx(1, abs=1e-6)
    assert found.inner[1] == pytest.approx(1, abs=1e-6)
    assert found.r2[0] < 0.6  # half a patch: other patches
    assert all(value < 0.3 for value in (*found.unrelated, *found.unmoved))


def test_positions_alone_do_not_move():
    """Features that are nothing but their place are the same without a shift."""
    model = create_network("mu/16", image_size=64)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
    found = equivariance.measure_equivariance(model, shifted_pictures(16), (16,), (64, 64))
    assert found.r2[0] == pytest.approx(found.unrelated[0], abs=1e-6) and found.r2[0] < 0.5
    assert found.unmoved[0] == pytest.approx(1)


def test_a_convolution_moves_with_the_picture():
    """Of one convolution the map moves exactly, but for the border and the norm over the image."""
    model = random_network(ResNetConfig((64, 64), 3, (1,), 0.5))
    pictures = shifted_pictures(16)
    assert equivariance.cell_size(model.config) == 4
    found = equivariance.measure_equivariance(model, pictures, (4, 8, 16), (64, 64))
    assert min(found.inner) > 0.9 and max(found.unrelated) < 0.1
    assert all(0.5 < whole < inner for whole, inner in zip(found.r2, found.inner, strict=True))


@pytest.mark.parametrize("name", ["R26x1", "R50x1", "R101x1", "R50x2"])
def test_parameters_of_a_resnet_in_closed_form(name):
    with torch.device("meta"):
        model = create_network(name, num_classes=10)
    assert equivariance.resnet_parameters(model.config) == backbone_parameters(model)
    found = equivariance.resnet_of_size(backbone_parameters(model), 32, (224, 224))
    assert found.layers == model.config.layers and found.width == model.config.width
    assert equivariance.resnet_name(found) == name


@pytest.mark.parametrize(("cell", "stride"), [(2, 4), (4, 4), (8, 8), (14, 16), (16, 16), (32, 32)])
def test_the_resnet_has_the_stride_of_the_model(cell, stride):
    config = equivariance.resnet_of_size(10**7, cell, (224, 224))
    assert equivariance.resnet_stride(config.layers) == stride


def test_a_small_patch_gets_a_resnet_with_fewer_stages():
    config = equivariance.resnet_of_size(10**6, 8, (32, 32), 1)
    assert len(config.layers) == 2 and config.num_channels == 1
    with torch.device("meta"):
        model = ResNet(config)
    assert sum(p.numel() for p in model.parameters()) == equivariance.resnet_parameters(config)
    assert equivariance.resnet_name(config).endswith("/2")
    assert equivariance.resnet_stride(config.layers) == 8


def test_a_hybrid_shows_the_filters_that_read_pixels():
    name, filters = embedding_filters(small("root"))
    assert name == "root convolution of the ResNet" and filters.shape[1:] == (3, 7, 7)
    assert torch.allclose(filters.mean(dim=(1, 2, 3)), torch.zeros(len(filters)).double())


def test_models_without_a_table_of_places():
    assert position_table(small("none")) is None
    assert position_table(small("relative")) is None
    for kind in ("plain", "sincos2d", "learned2d", "all of today", "learned, every"):
        assert position_table(small(kind)).shape == (24, 16)


def test_a_head_that_reads_several_blocks():
    from vitcli.weights.edit import replace_head
    from vitcli.weights.feature_layers import set_representation
    from vitcli.weights.loaded import LoadedModel

    model = LoadedModel(create_network("Pico/4", image_size=16, depth=3))
    set_representation(model, "concat:2")
    replace_head(model, ["x", "y", "z"])
    torch.nn.init.normal_(model.network.head.weight)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(measure_attention(model.network, images).logits, expected, atol=1e-5)

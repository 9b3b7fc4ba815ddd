import pytest

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.overrides import Overrides, as_size, override_preprocess, per_channel


def test_sizes():
    assert as_size(None) is None
    assert as_size(32) == as_size([32, 32]) == (32, 32)
    assert as_size((16, 24)) == (16, 24)
    for wrong in (0, -1, "big", [1], [1.5, 2]):
        with pytest.raises(VitcliError, match=r"model\.image_size"):
            as_size(wrong)


def test_a_value_per_channel():
    assert per_channel(0.5, 3, "mean") == (0.5, 0.5, 0.5)
    assert per_channel([0.5], 1, "mean") == (0.5,)
    assert per_channel((1, 2, 3), 3, "mean") == (1.0, 2.0, 3.0)
    with pytest.raises(VitcliError, match="`mean` has 2 values, the model 3 channels"):
        per_channel([1, 2], 3, "mean")
    with pytest.raises(VitcliError, match="`mean` is `x`"):
        per_channel("x", 3, "mean")


def test_what_is_stated_lies_over_the_base():
    base = Preprocess(image_size=(8, 8), mean=(0.1,), std=(0.2,), interpolation="bilinear")
    found = override_preprocess(base, {"std": 0.3, "crop_fraction": 0.5}, (8, 8), 3)
    assert (found.mean, found.std) == ((0.1,) * 3, (0.3,) * 3)
    assert (found.interpolation, found.crop_fraction) == ("bilinear", 0.5)
    assert override_preprocess(base, {}, (8, 8), 3) == base


def test_mean_and_std_are_needed():
    assert override_preprocess(None, {"mean": 0.5}, (8, 8), 1) is None
    found = override_preprocess(None, {"mean": 0.5, "std": 0.5}, (8, 8), 1)
    assert (found.image_size, found.num_channels) == ((8, 8), 1)
    with pytest.raises(VitcliError, match="interpolation"):
        override_preprocess(found, {"interpolation": "cubic"}, (8, 8), 1)


def test_wrong_words():
    with pytest.raises(VitcliError, match=r"`model\.gelu` is `fast`"):
        Overrides(gelu="fast")
    with pytest.raises(VitcliError, match=r"`model\.num_heads` is 0"):
        Overrides(num_heads=0)
    for eps in (0.0, -1.0, 1.0, float("nan")):
        with pytest.raises(VitcliError, match=r"`model\.norm_eps` is "):
            Overrides(norm_eps=eps)
    with pytest.raises(VitcliError, match=r"unknown setting `preprocess\.meen`") as error:
        Overrides(preprocess={"meen": 0.5})
    assert error.value.hint.startswith("did you mean `preprocess.mean`? Available: `preprocess.")

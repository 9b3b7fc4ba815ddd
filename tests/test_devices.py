"""Device and precision."""

import pytest
import torch

from vitcli.devices import has_fast_bf16, resolve_precision
from vitcli.errors import VitcliError

CPU = torch.device("cpu")


def test_auto_follows_the_measurement():
    assert resolve_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "fp32")


def test_the_measurement_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    has_fast_bf16.cache_clear()
    has_fast_bf16(CPU)
    assert torch.get_num_threads() == threads


def test_what_a_device_cannot_do():
    with pytest.raises(VitcliError, match="needs a GPU"):
        resolve_precision("fp16", CPU)
    with pytest.raises(VitcliError, match="unknown precision `int8`"):
        resolve_precision("int8", CPU)

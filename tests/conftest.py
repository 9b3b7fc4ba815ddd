"""What several test files need."""

import os
import sys
from pathlib import Path

# Before torch is imported: two threads that spin beside other processes crawl (recipes/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference numbers and real data, beside the checkout."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder with reference numbers beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> None:
    """What `datasets` caches goes away with the other temporary files."""
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(folder)  # for programs that tests start
    if loaded := sys.modules.get("datasets.config"):
        loaded.HF_DATASETS_CACHE = folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

"""Settings of the whole suite: one thread per process, because tests run in parallel."""

import sys
from pathlib import Path

import pytest
import torch

import dckd_sr  # noqa: F401  (makes basicsr importable for the tests that import it first)

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    """Every test starts from the same generator state and stands in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)

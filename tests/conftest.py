"""Settings of the whole suite: one thread per process, because tests run in parallel."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import dckd_sr  # noqa: F401  (makes basicsr importable for the tests that import it first)
from dckd_sr import fake_gpu
from dckd_sr.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(1)
with contextlib.suppress(UserError):  # no compiler: the tests that need one say so
    fake_gpu.load()  # before the first backward pass


def pytest_configure(config):
    config.addinivalue_line('markers', 'cuda: needs a GPU of CUDA or ROCm; skipped where torch finds none')


def pytest_collection_modifyitems(items):
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='no GPU here'))


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    """Every test starts from the same generator state and stands in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpu():
    """A CUDA device without values or kernels, and the places where the host would wait for it."""
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    try:
        fake_gpu.load()
    except UserError as error:
        pytest.skip(str(error))
    with fake_gpu.fake_gpu(), fake_gpu.Waits() as waits:
        yield waits

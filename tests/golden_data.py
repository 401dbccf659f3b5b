"""Where the golden numbers lie: `../shared/golden` beside the repository, or the folder that DCKD_SR_GOLDEN names.

They were computed from the authors' released code; tests that need them skip, and say so, where the folder is absent.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

_SHARED = Path(__file__).resolve().parents[2] / 'shared'


def path():
    """The folder with the golden numbers, or None."""
    folder = Path(os.environ.get('DCKD_SR_GOLDEN', _SHARED / 'golden'))
    return folder if (folder / 'fill.py').is_file() else None


def images():
    """The folder with Set5 and the other real images, or None."""
    folder = Path(os.environ.get('DCKD_SR_DATA', _SHARED / 'data'))
    return folder if (folder / 'Set5').is_dir() else None


def require(folder=None):
    """Skip the calling test where the folder (the golden one unless told) is absent; return it otherwise."""
    folder = path() if folder is None else folder
    if folder is None:
        pytest.skip('the golden numbers (../shared/golden) are not here')
    return folder


def require_images():
    """Skip the calling test where the real images are absent; return their folder otherwise."""
    folder = images()
    if folder is None:
        pytest.skip('the real images (../shared/data) are not here')
    return folder


def arrays(name):
    """The arrays of NAME.npz as a dict, and its config (parsed JSON; {} if it has none)."""
    with np.load(require() / f'{name}.npz', allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    config = {key: json.loads(str(data.pop(key))) for key in list(data) if key.startswith('config')}
    return data, config.get('config', config)


def manifest(name):
    """The parsed JSON of manifest_NAME.json."""
    return json.loads((require() / f'manifest_{name}.json').read_text())


if path() is not None:
    _spec = importlib.util.spec_from_file_location('golden_fill', path() / 'fill.py')
    fill = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(fill)
else:
    fill = None

"""Before step 1 student and teacher run once on a training sample: what does not fit is told in one line, early."""

from pathlib import Path

import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from small_run import SWINIR, dckd_run

from dckd_sr import imports, train

NETS = """
import torch
import torch.nn.functional as F
from torch import nn

class Plain(nn.Module):
    def __init__(self, channels=3, gives=3, factor=2):
        super().__init__()
        self.factor, self.conv = factor, nn.Conv2d(channels * 4, gives * factor**2, 3, 1, 1)
    def forward(self, x):
        return F.pixel_shuffle(self.conv(torch.cat([x] * 4, 1)), self.factor)

class Pooled(Plain):
    def forward(self, x):
        small = F.max_pool2d(x[..., ::2, ::2], 9, 3)
        return super().forward(x * F.interpolate(small, x.shape[2:]))

class Broken(Plain):
    def forward(self, x):
        raise ValueError('not today\\nsecond line')
"""


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Train on the small run's images, with options changed; returns exit code and what is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', dict(ARCH_REGISTRY._obj_map))
    monkeypatch.setattr(imports, '_loaded', {})
    base = dckd_run(tmp_path)
    Path('nets.py').write_text(NETS)

    def run(*overrides, plain=True, **changes):
        opt = {**base, 'imports': ['nets.py'], **changes}
        if plain:
            opt['model_type'] = 'SRModel'
            for key in ('network_t', 'network_his', 'network_vqgan'):
                opt.pop(key)
            keep = ('ema_decay', 'optim_g', 'scheduler', 'total_iter', 'pixel_opt')
            opt['train'] = {key: base['train'][key] for key in keep}
            opt['path'] = {}
        Path('opt.yml').write_text(yaml.safe_dump(opt))
        code = train.main(['-opt', 'opt.yml', *(['--force_yml', *overrides] if overrides else [])])
        return code, ([''] + capsys.readouterr().err.strip().splitlines())[-1]

    return run


GRAY = {**SWINIR, 'in_chans': 1}


@pytest.mark.parametrize(
    'changes, said',
    [
        (
            {'network_g': GRAY},
            'network_g (SwinIR) takes images of 1 channel, datasets.train gives 3: set color: y in datasets.train',
        ),
        ({'network_g': {'type': 'Plain', 'channels': 1, 'gives': 1}}, 'network_g (Plain) takes images of 1 channel, d'),
        ({'network_g': {'type': 'Plain', 'gives': 1}}, 'network_g (Plain) gives 1 channel, the ground truth of'),
        ({'network_g': {'type': 'Plain', 'factor': 4}}, 'network_g (Plain) enlarges 4 times, but scale = 2'),
        (
            {'network_g': {'type': 'Pooled'}},
            'network_g (Pooled) takes images of at least 17x17, datasets.train gives 16x16 (gt_size 32 / scale 2)',
        ),
        (
            {'network_g': {'type': 'Broken'}},
            'network_g (Broken) fails on an image of datasets.train, 3 channels of 16x16 (gt_size 32 / scale 2): not',
        ),
    ],
)
def test_what_does_not_fit(start, changes, said):
    code, line = start(**changes)
    assert code == 2 and line.startswith(f'error: {said}') and 'second line' not in line
    assert not Path('experiments').exists()


def test_a_teacher_that_does_not_fit(start):
    code, line = start(plain=False, network_t={'type': 'Plain', 'factor': 4, 'allow_random': True}, path={})
    assert code == 2 and line == 'error: network_t (Plain) enlarges 4 times, but scale = 2'


def test_sets_of_one_and_of_three_channels(start):
    gray = 'datasets:train:color=y'
    code, line = start(gray, network_g=GRAY)
    assert code == 2
    assert line.startswith('error: datasets.val_1 gives images of 3 channels, datasets.train of 1: write color: y in')
    assert start(gray, 'datasets:val_1:color=y', network_g=GRAY)[0] == 0
    code, line = start(gray, 'datasets:val_1:color=y', network_g={'type': 'Plain'})
    assert code == 2 and 'takes images of 3 channels, datasets.train gives 1: drop color: y there' in line
    code, line = start(gray, 'datasets:val_1:color=y')  # EDSR's mean makes three channels of one
    assert code == 2 and 'gives 3 channels, the ground truth of datasets.train has 1: drop color: y there' in line


def test_what_fits_trains_the_same(start):
    """Networks in training mode, with the same draws: the look leaves nothing behind."""
    weights = []
    for tried in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not tried:
                patch.setattr(train, 'try_networks', lambda *args: None)
            assert start(f'name=run{tried}', plain=False) == (0, '')
        weights.append(torch.load(f'experiments/run{tried}/models/net_g_latest.pth', weights_only=True)['params'])
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())

"""On a GPU: the parts of `doctor --gpu`, at reduced size, but for those that measure. Skipped where there is none."""

import pytest
import torch

from dckd_sr import doctor, gpu_proof
from dckd_sr.gpu_parts import PARTS, Place

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize('name', [name for name in PARTS if not name.startswith(('speed', 'infer', 'compile-graphs'))])
def test_a_part_holds(name, tmp_path):
    row = gpu_proof.run_part(name, Place(torch.device('cuda'), True, tmp_path))
    assert row['ok'], row['traceback']


def test_a_gpu_that_is_there(capsys):
    assert doctor.main(['--gpu', '--small', '--only', 'method-1']) == 0
    assert '1 of 1 parts hold on cuda, at reduced size' in capsys.readouterr().out


def test_a_wait_is_an_error():
    from dckd_sr import gpu_parts

    x = torch.ones(3, device='cuda')
    with pytest.raises(RuntimeError, match='synchroniz'), gpu_parts.no_waits(x.device):
        x.sum().item()
    assert x.sum().item() == 3

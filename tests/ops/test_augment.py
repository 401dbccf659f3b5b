import itertools

import golden_data
import numpy as np
import pytest
import torch
from basicsr.archs import build_network

from dckd_sr.errors import UserError
from dckd_sr.ops.augment import OPERATIONS, augment, draw_flags, invert


def on_grid(*shape):
    """float32 values on a grid of 2^-24, for which 1 - (1 - x) is exact."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def flags_of(sets, batch):
    return {op: torch.tensor([b in sets.get(op, []) for b in range(batch)]) for op in OPERATIONS}


def test_all_sixteen_sets_are_undone_exactly():
    combinations = list(itertools.product([False, True], repeat=4))
    flags = {op: torch.tensor([c[k] for c in combinations]) for k, op in enumerate(OPERATIONS)}
    x = on_grid(16, 3, 12, 12)
    changed = augment(x, flags)
    assert torch.equal(invert(changed, flags), x)
    assert all(not torch.equal(changed[b], x[b]) for b in range(1, 16)) and torch.equal(changed[0], x[0])
    larger = on_grid(16, 3, 24, 24)  # the teacher's output is larger than what was changed
    assert torch.equal(invert(augment(larger, flags), flags), larger)


def test_each_operation_and_their_order():
    x = on_grid(1, 1, 2, 2)
    (a, b), (c, d) = x[0, 0]
    expected = {
        'i': [[1 - a, 1 - b], [1 - c, 1 - d]],
        'h': [[c, d], [a, b]],
        'v': [[b, a], [d, c]],
        't': [[a, c], [b, d]],
    }
    for op, rows in expected.items():
        assert torch.equal(augment(x, flags_of({op: [0]}, 1))[0, 0], torch.tensor(rows))
    # h before t: rows are swapped, then transposed.
    assert torch.equal(augment(x, flags_of({'h': [0], 't': [0]}, 1))[0, 0], torch.tensor([[c, a], [d, b]]))


def test_input_is_kept_and_non_square_patches_need_no_transposition():
    x = on_grid(2, 3, 6, 8)
    kept = x.clone()
    flags = flags_of({'i': [0], 'h': [0, 1], 'v': [1]}, 2)
    assert torch.equal(invert(augment(x, flags), flags), x) and torch.equal(x, kept)
    with pytest.raises(UserError, match='6x8'):
        augment(x, flags_of({'t': [1]}, 2))


def test_flags_belong_to_the_sample_and_have_the_probability():
    whole = draw_flags(0.5, 8, 3, 11)
    parts = [draw_flags(0.5, 4, 3, 11, first) for first in (0, 4)]
    for op in OPERATIONS:
        assert whole[op].dtype == torch.bool and torch.equal(whole[op], torch.cat([part[op] for part in parts]))
    many = draw_flags(0.3, 4000, 0, 1)
    assert all(abs(many[op].float().mean() - 0.3) < 0.03 for op in OPERATIONS)
    assert not torch.equal(many['i'], many['h'])
    assert not torch.equal(draw_flags(0.5, 64, 3, 12)['i'], draw_flags(0.5, 64, 3, 11)['i'])
    assert all(flag.all() for flag in draw_flags(1.0, 5, 0, 0).values())
    assert not any(flag.any() for flag in draw_flags(0.0, 5, 0, 0).values())


def test_golden_label_consistency():
    data, config = golden_data.arrays('lcr_rcan_x2')
    teacher = build_network(dict(config['network_t'])).eval()
    golden_data.fill.fill_(teacher)
    lq, flags = golden_data.fill.image((4, 3, 32, 32), 20), flags_of(config['indices'], 4)
    t_lq = augment(lq, flags)
    np.testing.assert_array_equal(t_lq, data['t_lq'])
    with torch.no_grad():
        out = invert(teacher(t_lq), flags)
    np.testing.assert_allclose(out, data['t_out_lcr'], rtol=1e-4, atol=5e-5)

"""The contrastive loss against the authors' numbers, a plain reference, and two processes against one."""

import copy
import itertools
import json

import dckd_sr  # noqa: F401  (first, for the spawned processes: it makes basicsr importable)

# isort: split
import golden_data
import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from small_run import TINY_VQGAN
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from dckd_sr.archs.vqgan_arch import VQGAN
from dckd_sr.errors import UserError
from dckd_sr.losses.contrastive_loss import ContrasLoss, DynamicContrastiveLoss
from dckd_sr.ops import winograd

SHAPES = [(4, 6, 5), (3, 3, 2)]  # C, h, w of two levels
ENCODER = {'type': 'VQGAN', **TINY_VQGAN, 'allow_random': True}


def features(batch, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in SHAPES]


def reference(anchor, positive, negatives, weights):
    """Eq. 5 as the authors' code computes it, in numpy."""
    total = 0
    for weight, a, p, n in zip(weights, anchor, positive, negatives):
        a, p, n = (x.detach().double().numpy() for x in (a, p, n))
        each = [n[k : k + len(a)] for k in range(0, len(n), len(a))]
        total += weight * np.abs(a - p).mean() / (np.abs(a - np.stack(each)).sum(0).mean() + 1e-7)
    return total


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_released_value_and_gradient(dtype):
    data, config = golden_data.arrays('losses')
    net = golden_data.fill.fill_(VQGAN(**config['arch'])).to(dtype).eval().requires_grad_(False)

    def image(seed):
        return golden_data.fill.image(config['shape'], seed).to(dtype)

    anchor = image(config['anchor_seed']).requires_grad_()
    others = torch.cat([image(seed) for seed in (config['positive_seed'], *config['negative_seeds'])])
    levels = net(others, codes=False).levels
    batch = len(anchor)
    loss = build_loss({'type': 'ContrasLoss', 'd_func': 'L1', 'loss_weight': 0.1, 'weights': config['weights']})
    value = loss.from_levels(
        net(anchor, codes=False).levels, [level[:batch] for level in levels], [level[batch:] for level in levels]
    )
    value.backward()
    expected = data['contras' if dtype == torch.float32 else 'contras_f64']
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)
    difference = anchor.grad - torch.from_numpy(data['contras_grad'])
    if dtype == torch.float64:
        assert difference.abs().max() <= 2e-5 * np.abs(data['contras_grad']).max()
    assert difference.norm() <= 1e-2 * np.linalg.norm(data['contras_grad'])


@pytest.mark.parametrize('batch, num_neg', [(1, 1), (1, 5), (3, 1), (4, 6)])
def test_any_batch_and_number_of_negatives(batch, num_neg):
    anchor, positive = features(batch), features(batch, seed=1)
    negatives = features(num_neg * batch, seed=2)
    for level in anchor:
        level.requires_grad_()
    loss = DynamicContrastiveLoss(weights=[0.3, 2], loss_weight=0.5, margin=None)
    value = loss.from_levels(anchor, positive, negatives)
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), 0.5 * reference(anchor, positive, negatives, [0.3, 2]), rtol=1e-12)
    value.backward()
    step = 1e-6  # finite differences along one direction: the denominator's part is in the gradient
    for i, level in enumerate(anchor):
        direction = torch.randn_like(level)
        moved = [
            [a.detach() + sign * step * direction if j == i else a for j, a in enumerate(anchor)] for sign in (1, -1)
        ]
        up, down = (0.5 * reference(a, positive, negatives, [0.3, 2]) for a in moved)
        np.testing.assert_allclose((level.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-5)
    assert set(loss.stats) == {'numerator', 'denominator', 'left_out'}
    np.testing.assert_allclose(loss.stats['numerator'][1], (anchor[1] - positive[1]).detach().abs().mean())
    distances = (anchor[1].repeat(num_neg, 1, 1, 1) - negatives[1]).detach().abs().mean() * num_neg
    np.testing.assert_allclose(loss.stats['denominator'][1], distances)
    assert not any(value.requires_grad for value in loss.stats.values())


def test_denominator_is_offset_as_released():
    anchor = [torch.zeros(1, 1, 1, 1, dtype=torch.float64)]
    loss = ContrasLoss(weights=[1])
    assert loss.from_levels(anchor, [anchor[0] + 1], [anchor[0] + 1e-7]).item() == pytest.approx(5e6)


def collapsed(distance, factor=1.0):
    """Two levels, the second's negatives at this distance of an anchor of mean magnitude `factor`."""
    anchor = [level.sign() * factor for level in features(2)]
    negatives = [torch.cat([level, level]) for level in (anchor[0] + 1, anchor[1] + distance / 2)]
    return [level.requires_grad_() for level in anchor], features(2, seed=1), negatives


def test_guard_leaves_out_collapsed_levels_only():
    anchor, positive, negatives = collapsed(0)
    loss = ContrasLoss(weights=[1, 1])
    value = loss.from_levels(anchor, positive, negatives)
    value.backward()
    alone = ContrasLoss(weights=[1], guard=False).from_levels(anchor[:1], positive[:1], negatives[:1])
    assert torch.equal(value, alone) and loss.stats['left_out'].tolist() == [False, True]
    assert torch.equal(anchor[0].grad, torch.autograd.grad(alone, anchor[0])[0])
    assert torch.equal(anchor[1].grad, torch.zeros_like(anchor[1]))
    free = ContrasLoss(weights=[1, 1], guard=False)
    assert free.from_levels(anchor, positive, negatives) > 1e6 and not free.stats['left_out'].any()


@pytest.mark.parametrize('factor', [1e-3, 1.0, 1e3])
def test_guard_is_relative_to_the_features_and_the_number_of_negatives(factor):
    for distance, guarded in ((0.9 * 3e-5 * 2, True), (1.1 * 3e-5 * 2, False)):  # two negatives
        levels = collapsed(distance * factor, factor)
        loss = ContrasLoss(weights=[1, 1])
        value = loss.from_levels(*levels)
        assert loss.stats['left_out'].tolist() == [False, guarded]
        if not guarded:
            assert torch.equal(value, ContrasLoss(weights=[1, 1], guard=False).from_levels(*levels))


@pytest.mark.parametrize('channels', [96, 128])
def test_guard_knows_the_rounding_of_other_kernels(channels):
    """A history that equals the student runs through Winograd's convolutions, the student through torch's."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Conv2d(channels, 96, 3, padding=1)
    )
    history = winograd.speed_up(copy.deepcopy(student).requires_grad_(False))
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        anchor, negative = student(images), history(images)
    assert not torch.equal(anchor, negative), 'this processor has no other kernels to compare'
    loss = ContrasLoss(weights=[1.0])
    value = loss.from_levels([anchor], [anchor + 1], [negative.repeat(6, 1, 1, 1)])
    assert value == 0 and loss.stats['left_out'].all()


def test_margin_weighs_levels_by_how_far_the_negatives_are_beyond_the_teacher():
    """Against the loss written out, in value and gradient; a level of hard negatives is left out."""
    anchor, positive, negatives = ([level.requires_grad_(i == 0) for level in features(2, seed=i)] for i in range(3))
    far = [torch.cat([2 * level, 3 * level, -2 * level]) for level in negatives]
    near = torch.cat([anchor[1].detach() + 0.1] * 3)
    loss = DynamicContrastiveLoss(weights=[0.5, 1])
    value = loss.from_levels(anchor, positive, [far[0], near])
    value.backward()
    numerator = (anchor[0] - positive[0]).detach().abs().mean()
    distance = (anchor[0].repeat(3, 1, 1, 1) - far[0]).detach().abs().mean()
    counting = 1 - numerator / distance
    assert 0.2 < counting < 0.8
    np.testing.assert_allclose(loss.stats['left_out'], [1 - counting, 1], rtol=1e-6)
    plain = ContrasLoss(weights=[0.5]).from_levels(anchor[:1], positive[:1], far[:1])
    np.testing.assert_allclose(value.item(), counting * reference(anchor[:1], positive, far, [0.5]), rtol=1e-6)
    torch.testing.assert_close(anchor[0].grad, counting * torch.autograd.grad(plain, anchor[0])[0], rtol=1e-6, atol=0)
    assert torch.equal(anchor[1].grad, torch.zeros_like(anchor[1]))
    for released in (DynamicContrastiveLoss([0.5, 1], margin=None), ContrasLoss([0.5, 1])):
        both = released.from_levels(anchor, positive, [far[0], near])
        np.testing.assert_allclose(both.item(), reference(anchor, positive, [far[0], near], [0.5, 1]), rtol=1e-12)


@pytest.mark.parametrize('margin', [0.25, 1.0])
@pytest.mark.parametrize('num_neg', [1, 5])
def test_margin_is_a_multiple_of_the_mean_distance_to_the_negatives(num_neg, margin):
    anchor, positive = [torch.zeros(2, 1, 2, 2)], [torch.ones(2, 1, 2, 2)]
    for distance, counting in ((0.5 / margin, 0), (1 / margin, 0), (2 / margin, 0.5), (10 / margin, 0.9)):
        negatives = [torch.full((2 * num_neg, 1, 2, 2), distance)]
        for parts in ([negatives], ([negatives[0][2 * j : 2 * j + 2]] for j in range(num_neg))):
            loss = DynamicContrastiveLoss(weights=[1], margin=margin)
            value = loss.from_parts(anchor, positive, parts)
            assert loss.stats['left_out'].item() == pytest.approx(1 - counting, abs=1e-6)
            assert value.item() == pytest.approx(counting / (num_neg * distance), abs=1e-6)


def test_guard_hides_no_nan():
    for margin in (None, 1.0):
        anchor, positive, negatives = collapsed(1)
        negatives[1][0, 0, 0, 0] = torch.nan
        assert DynamicContrastiveLoss([1, 1], margin=margin).from_levels(anchor, positive, negatives).isnan()
        positive[0][0, 0, 0, 0] = torch.nan
        assert (
            DynamicContrastiveLoss([1, 1], margin=margin).from_levels(*collapsed(1)[:1], positive, features(4)).isnan()
        )


def test_report_counts_and_warns_once(monkeypatch):
    warnings = []
    monkeypatch.setattr('dckd_sr.losses.contrastive_loss.get_root_logger', lambda: Logger(warnings))
    loss = ContrasLoss(weights=[1, 1])
    assert loss.report() == {}
    loss.from_levels(*collapsed(1))
    assert loss.report()['left_out'] == [0, 0] and not warnings
    for _ in range(3):  # an earlier iteration than the last one is reported, too
        loss.from_levels(*collapsed(0))
    loss.from_levels(*collapsed(1))
    assert not warnings
    report = loss.report()
    assert report['left_out'] == [0, 0.75] and [len(values) for values in report.values()] == [2, 2, 2]
    assert all(isinstance(value, float) for values in report.values() for value in values)
    assert len(warnings) == 1 and '3 time(s)' in warnings[0]
    loss.from_levels(*collapsed(0))
    assert loss.report()['left_out'] == [0, 1] and len(warnings) == 1
    hard = DynamicContrastiveLoss(weights=[1, 1])
    hard.from_levels(*collapsed(0.1))
    assert hard.report()['left_out'][1] == 1 and len(warnings) == 1  # what is usual at a start is no warning


class Logger:
    def __init__(self, warnings):
        self.warning = warnings.append


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_features(dtype):
    """The ratio is formed in float32: half precision could not tell it from its neighbours."""
    anchor, positive, negatives = features(2, dtype), features(2, dtype, 1), features(4, dtype, 2)
    value = ContrasLoss(weights=[1, 1]).from_levels(anchor, positive, negatives)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.item(), reference(anchor, positive, negatives, [1, 1]), rtol=1e-6)


def test_waits_for_no_device():
    """Fake tensors have no values: reading one on the host would fail."""
    with FakeTensorMode():
        loss = build_loss({'type': 'DynamicContrastiveLoss', 'weights': [1, 1], 'encoder': ENCODER})
        assert loss.from_levels(features(2), features(2), features(6)).shape == ()
        assert loss.from_levels(features(2), features(2), features(6)).shape == ()
        assert loss(torch.empty(2, 3, 8, 8), torch.empty(2, 3, 8, 8)).shape == ()


def test_on_images_the_other_targets_are_the_negatives():
    loss = build_loss({'type': 'DynamicContrastiveLoss', 'weights': [0.5, 1], 'loss_weight': 2, 'encoder': ENCODER})
    pred, target = torch.rand(3, 3, 9, 8, requires_grad=True), torch.rand(3, 3, 9, 8)
    value = loss(pred, target)
    s, t = (loss.encoder(images, codes=False).levels for images in (pred, target))
    rolled = [torch.cat([level.roll(1, 0), level.roll(2, 0)]) for level in t]
    np.testing.assert_allclose(value.item(), 2 * reference(s, t, rolled, [0.5, 1]), rtol=1e-5)
    expected = ContrasLoss([0.5, 1], 2).from_levels(s, t, rolled)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pred, retain_graph=True)[0] for loss in (value, expected)))


def test_on_one_image_the_shifted_target_is_the_negative():
    loss = build_loss({'type': 'ContrasLoss', 'weights': [0.5, 1], 'reduction': 'mean', 'encoder': ENCODER})
    pred, target = torch.rand(1, 3, 9, 8), torch.rand(1, 3, 9, 8)
    shifted = torch.cat(
        [torch.cat([half[..., 4:], half[..., :4]], 3) for half in (target[:, :, 5:], target[:, :, :5])], 2
    )
    s, t, n = (loss.encoder(images, codes=False).levels for images in (pred, target, shifted))
    np.testing.assert_allclose(loss(pred, target).item(), reference(s, t, n, [0.5, 1]), rtol=1e-5)


def test_identical_images_cost_nothing():
    loss = build_loss({'type': 'ContrasLoss', 'weights': [0.5, 1], 'encoder': ENCODER})
    images = torch.rand(2, 3, 8, 8)
    assert loss(images, images).item() == 0


@pytest.mark.parametrize(
    'options, message',
    [
        ({'d_func': 'L3'}, "d_func .* must be L1, not 'L3'"),
        ({'reduce': 'all'}, "reduce .* global or rank, not 'all'"),
        ({'margin': 0}, 'margin .* above 0, or null to keep all levels, not 0'),
        ({'reduction': 'sum'}, "reduction .* must be mean, not 'sum'"),
        ({'encoder': ENCODER}, '5 entries, but the encoder has 2 levels'),
        ({'encoder': {**ENCODER, 'allow_random': False}}, 'pretrain'),
    ],
)
def test_mistakes_in_options(options, message):
    with pytest.raises(UserError, match=message):
        DynamicContrastiveLoss(**options)


def test_mistakes_in_use():
    loss = DynamicContrastiveLoss()
    assert loss.weights == (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
    with pytest.raises(UserError, match='5 entries, but the encoder has 2 levels'):
        loss.from_levels(features(2), features(2), features(2))
    with pytest.raises(UserError, match='num_neg'):
        DynamicContrastiveLoss([1, 1]).from_levels(features(2), features(2), [level[:0] for level in features(2)])
    with pytest.raises(UserError, match='encoder block'):
        loss(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))


class Scale(torch.nn.Module):
    """A one-parameter student: its features are the input times a factor."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, levels):
        return [level * self.factor for level in levels]


def rows(levels, num_neg, first, last):
    """Images first to last of a batch of 4, with all their negatives."""
    return [torch.cat([level[j * 4 + first : j * 4 + last] for j in range(num_neg)]) for level in levels]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    net = DistributedDataParallel(Scale())
    found = {}
    for collapse in (False, True):
        x, positive, negatives = batch_of_four(collapse)
        own = [rows(levels, n, 2 * rank, 2 * rank + 2) for levels, n in ((x, 1), (positive, 1), (negatives, 3))]
        for reduce, margin in itertools.product(('global', 'rank'), (None, 1.0)):
            net.zero_grad()
            loss = DynamicContrastiveLoss([0.5, 1], reduce=reduce, margin=margin)
            value = loss.from_levels(net(own[0]), *own[1:])
            value.backward()
            left_out = loss.stats['left_out'].tolist()
            found[f'{reduce} {margin} {collapse}'] = [value.item(), net.module.factor.grad.item(), left_out]
    with open(f'{folder}/{rank}.json', 'w') as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


def batch_of_four(collapse_on_first_rank):
    x, positive, negatives = features(4), features(4, seed=1), [2 * level for level in features(12, seed=2)]
    if collapse_on_first_rank:
        for j in range(3):
            negatives[1][4 * j : 4 * j + 2] = x[1][:2] * 1.5
    return x, positive, negatives


def test_two_processes_equal_one(tmp_path):
    """2 x B equals 1 x 2B with reduce: global, also where one process alone would leave a level out; rank does not."""
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1))
    for collapse, margin in itertools.product((False, True), (None, 1.0)):
        net, loss = Scale(), DynamicContrastiveLoss([0.5, 1], margin=margin)
        x, positive, negatives = batch_of_four(collapse)
        value = loss.from_levels(net(x), positive, negatives)
        value.backward()
        case = f'{margin} {collapse}'
        for found in (first, second):
            np.testing.assert_allclose(
                found[f'global {case}'][:2], [value.item(), net.factor.grad.item()], rtol=1e-12, err_msg=case
            )
            np.testing.assert_allclose(found[f'global {case}'][2], loss.stats['left_out'].tolist(), atol=1e-12)
        own = [rows(levels, n, 0, 2) for levels, n in ((net(x), 1), (positive, 1), (negatives, 3))]
        alone = DynamicContrastiveLoss([0.5, 1], margin=margin).from_levels(*own).item()
        np.testing.assert_allclose(first[f'rank {case}'][0], alone, rtol=1e-12)
        assert first[f'rank {case}'][0] != second[f'rank {case}'][0]
        assert (first[f'rank {case}'][2][1] == 1) is collapse
    # The two ways to decide differ here: the second process alone would have kept the level.
    assert first['global 1.0 True'][2][1] == 1 > second['rank 1.0 True'][2][1]

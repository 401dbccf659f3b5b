"""What a tap reads, against the same modules called by hand."""

import pytest
import torch
from basicsr.archs import build_network
from small_run import SWINIR, edsr
from torch import nn

from dckd_sr.errors import UserError
from dckd_sr.ops.taps import Taps


def net(blocks=3):
    return build_network({**edsr(), 'num_block': blocks})


def test_outputs_and_inputs_of_modules():
    model, x = net(), torch.rand(2, 3, 6, 5)
    h = model.conv_first((x - model.mean) * model.img_range)
    b0 = model.body[0](h)
    conv = model.body[0].conv1(h)
    after = model.conv_after_body(model.body(h))
    with Taps(model, ['body.0', 'body.0.conv1', 'conv_after_body', 'upsample:input', 'body.1:input']) as maps:
        output = model(x)
    for found, wanted in zip(maps, [b0, conv, after, after + h, b0]):  # the long skip is added in place, later
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(output, model(x))


def test_gradients_flow_through_a_tap():
    model = net()
    with Taps(model, ['body.1']) as maps:
        model(torch.rand(1, 3, 4, 4))
    maps[0].sum().backward()
    assert model.body[1].conv1.weight.grad is not None and model.body[2].conv1.weight.grad is None


def test_nothing_stays_after_the_with():
    model = net()
    taps = Taps(model, ['body.0'])
    with taps as first:
        model(torch.rand(1, 3, 4, 4))
    kept = first[0].clone()
    model(torch.rand(1, 3, 4, 4))
    assert torch.equal(first[0], kept) and not model.body[0]._forward_hooks and taps._maps is None
    with pytest.raises(ZeroDivisionError), taps:
        raise ZeroDivisionError  # what happened inside is what is told
    assert not model.body[0]._forward_hooks
    with taps as second:
        model(torch.rand(1, 3, 4, 4))
    assert not torch.equal(second[0], kept)
    with Taps(None, []) as none:
        pass
    assert none == []


def test_tokens_of_window_attention():
    model = build_network(SWINIR).eval()
    with torch.no_grad(), Taps(model, ['layers.0', 'conv_after_body']) as maps:
        model(torch.rand(2, 3, 8, 8))
    assert [tuple(value.shape) for value in maps] == [(2, 64, 12), (2, 12, 8, 8)]


def test_a_module_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(
        UserError, match=r'^train.x: EDSR has no module body.7; nearest: body\.\d.*, and \d+ more$'
    ) as told:
        Taps(net(), ['body.0', 'body.7'], 'train.x: ')
    near = str(told.value).partition('nearest: ')[2].split(', ')[:-1]
    assert {'body.0', 'body.1', 'body.2'} <= set(near) and len(near) == 8
    for path in ('', ':input', 'body.7:input', 'Body'):
        with pytest.raises(UserError, match='has no module'):
            Taps(net(), [path])
    with pytest.raises(UserError, match=r'has no module layers; nearest: layers\.'):  # a list, which is never called
        Taps(build_network(SWINIR), ['layers'])


def test_a_module_that_does_not_run_is_told():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.used(x)

    model = Spare()
    with (
        pytest.raises(UserError, match='here: the module spare does not run'),
        Taps(model, ['used', 'spare'], 'here: '),
    ):
        model(torch.rand(1))

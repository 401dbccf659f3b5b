"""The frozen encoder: every weight it uses must be in the file, and nothing may change it or be changed by it."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from small_run import TINY_VQGAN

from dckd_sr.archs.vqgan_arch import VQGAN
from dckd_sr.encoder import build_encoder, build_loss_encoder
from dckd_sr.errors import UserError

OPTIONS = {'type': 'VQGAN', **TINY_VQGAN}


def whole():
    """Weights of a trained VQGAN as public files have them: with decoder and the loss of its training."""
    weights = VQGAN(**TINY_VQGAN, decoder=True).state_dict()
    return {**weights, 'loss.discriminator.main.0.weight': torch.zeros(2)}


@pytest.mark.parametrize('kind', ['bare', 'state_dict', 'params', 'safetensors', 'half'])
def test_loads_and_freezes(tmp_path, kind):
    weights = whole()
    if kind == 'safetensors':
        path, param_key = tmp_path / 'vqgan.safetensors', None
        save_file(weights, path)
    else:
        path, param_key = tmp_path / 'vqgan.ckpt', None if kind in ('bare', 'half') else kind
        content = {key: value.half() for key, value in weights.items()} if kind == 'half' else weights
        torch.save({kind: content} if param_key else content, path)
    net = build_encoder(OPTIONS, path, param_key)
    assert isinstance(net, VQGAN) and not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    own = net.state_dict()
    assert own and not any(key.startswith(('decoder', 'post_quant_conv')) for key in own)
    for key, value in own.items():
        expected = weights[key].half().float() if kind == 'half' else weights[key]
        assert torch.equal(value, expected)
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    sum(level.sum() for level in net(x).levels).backward()
    assert x.grad.abs().sum() > 0


def test_a_loss_builds_it_from_its_block(tmp_path):
    weights = whole()
    torch.save(
        {'params': weights, 'params_ema': {key: value + 1 for key, value in weights.items()}}, tmp_path / 'a.pth'
    )
    block = {**OPTIONS, 'pretrain': str(tmp_path / 'a.pth'), 'param_key': 'params'}
    before = copy.deepcopy(block)
    assert torch.equal(build_loss_encoder(block).quant_conv.weight, weights['quant_conv.weight'])
    assert block == before
    del block['param_key']  # the averaged weights, where nothing is said
    assert torch.equal(build_loss_encoder(block).quant_conv.weight, weights['quant_conv.weight'] + 1)


def test_every_weight_must_be_there(tmp_path):
    weights = whole()
    for key in ('quantize.embedding.weight', 'encoder.conv_in.bias'):
        del weights[key]
    weights['quant_conv.weight'] = torch.zeros(4, 4, 3, 3)
    torch.save(weights, tmp_path / 'vqgan.pth')
    with pytest.raises(UserError) as error:
        build_encoder(OPTIONS, tmp_path / 'vqgan.pth')
    message = str(error.value)
    assert 'encoder.conv_in.bias is missing' in message and 'quantize.embedding.weight is missing' in message
    assert 'quant_conv.weight is (4, 4, 3, 3) instead of (4, 4, 1, 1)' in message and 'vqgan.pth' in message


def test_a_foreign_file_is_refused_briefly(tmp_path):
    torch.save({'params': {'conv_first.weight': torch.zeros(3)}}, tmp_path / 'edsr.pth')
    with pytest.raises(UserError, match=r'encoder.conv_in.weight is missing.*; and \d+ more$') as error:
        build_encoder(OPTIONS, tmp_path / 'edsr.pth')
    assert str(error.value).count('is missing') == 5


def test_no_weights_no_encoder(tmp_path):
    for build in (lambda: build_encoder(OPTIONS, None), lambda: build_encoder(OPTIONS, tmp_path / 'none.ckpt')):
        with pytest.raises(UserError, match='python -m dckd_sr.train -opt options/train_vqgan.yml'):
            build()
    with pytest.raises(UserError, match='pretrain in its encoder block'):
        build_loss_encoder(OPTIONS)


def test_mistakes_in_its_arguments():
    with pytest.raises(UserError, match='n_embd'):
        build_encoder({'n_embd': 8, **OPTIONS, 'allow_random': True}, None)
    with pytest.raises(UserError, match='ddconfig lacks in_channels'):
        build_encoder({**OPTIONS, 'ddconfig': {}, 'allow_random': True}, None)


def test_random_weights_on_request_leave_generator_and_options_alone():
    options = {**OPTIONS, 'decoder': True, 'allow_random': True}
    before, state = copy.deepcopy(options), torch.get_rng_state()
    net = build_encoder(options, None)
    assert options == before and torch.equal(torch.get_rng_state(), state)
    assert not hasattr(net, 'decoder')

"""zoo convert: what is kept, what is dropped, and that the clean file needs no trust."""

import argparse
import hashlib

import golden_data
import pytest
import torch
from safetensors.torch import load_file

from dckd_sr import checkpoint, zoo


def vqgan_weights():
    keys = ('encoder.conv_in.weight', 'quant_conv.bias', 'quantize.embedding.weight', 'decoder.conv_out.bias')
    keys += ('post_quant_conv.bias', 'loss.discriminator.main.0.weight', 'loss.perceptual_loss.lin0.weight')
    return {key: torch.full((2, 3), float(i)) for i, key in enumerate(keys)}


@pytest.fixture
def lightning(tmp_path):
    """A Lightning checkpoint: the weights among other things, one of them code."""
    path = tmp_path / 'last.ckpt'
    torch.save({'epoch': 1, 'hparams': argparse.Namespace(lr=1), 'state_dict': vqgan_weights()}, path)
    return path


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_vqgan_of_lightning(tmp_path, lightning, capsys, ending):
    out = tmp_path / 'new folder' / f'clean{ending}'
    assert zoo.main(['convert', str(lightning), '-o', str(out)]) == 0
    read = load_file(out) if ending == '.safetensors' else torch.load(out, weights_only=True)['params']
    weights = vqgan_weights()
    assert sorted(read) == sorted(key for key in weights if not key.startswith('loss.'))
    assert all(torch.equal(read[key], weights[key]) for key in read)
    printed = capsys.readouterr().out
    assert hashlib.sha256(lightning.read_bytes()).hexdigest() in printed
    assert 'state_dict' in printed and 'dropped   2 tensors: loss (2)' in printed
    assert 'kept      5 tensors: encoder (1), quant_conv (1), quantize (1), decoder (1), post_quant_conv (1)' in printed
    assert 'not run: argparse.Namespace' in printed and str(out) in printed


def test_without_decoder(tmp_path, lightning):
    out = tmp_path / 'clean.pth'
    assert zoo.main(['convert', str(lightning), '-o', str(out), '--no-decoder']) == 0
    kept = torch.load(out, weights_only=True)['params']
    assert sorted(kept) == ['encoder.conv_in.weight', 'quant_conv.bias', 'quantize.embedding.weight']


def test_other_networks_keep_everything(tmp_path):
    weights = {'net.conv.weight': torch.arange(4.0), 'net.loss.weight': torch.ones(1), 'other.bias': torch.zeros(2)}
    torch.save({'params_ema': weights, 'params': {'x': torch.zeros(1)}, 'iter': 3}, tmp_path / 'net.pth')
    assert zoo.main(['convert', str(tmp_path / 'net.pth')]) == 0
    kept, used = checkpoint.read_weights(tmp_path / 'net_clean.pth')
    assert used == 'params' and list(kept) == list(weights)
    assert zoo.main(['convert', 'net.pth', '--prefix', 'net.', '-o', 'part.pth', '--key', 'params_ema']) == 0
    assert list(torch.load('part.pth', weights_only=True)['params']) == ['conv.weight', 'loss.weight']


def test_views_are_written_alone(tmp_path):
    torch.save({'params': {'row': torch.zeros(1000, 1000)[3]}}, 'view.pth')
    assert zoo.main(['convert', 'view.pth', '-o', 'row.pth']) == 0
    assert (tmp_path / 'row.pth').stat().st_size < 10000


def test_existing_files_stay(tmp_path, lightning, capsys):
    out = tmp_path / 'clean.pth'
    out.write_text('precious')
    assert zoo.main(['convert', str(lightning), '-o', str(out)]) == 2
    assert out.read_text() == 'precious' and '--force' in capsys.readouterr().err
    assert zoo.main(['convert', str(lightning), '-o', str(out), '--force']) == 0
    assert 'params' in torch.load(out, weights_only=True)
    before = out.read_bytes()
    assert zoo.main(['convert', str(out), '-o', str(out), '--force']) == 2  # the source itself
    assert out.read_bytes() == before
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['absent.ckpt'], 'absent.ckpt is not there'),
        (['last.ckpt', '-o', 'out.bin'], 'should end in .pth or .safetensors'),
        (['last.ckpt', '--key', 'model'], "no entry 'model'"),
        (['last.ckpt', '--prefix', 'model.'], "no key that starts with 'model.'"),
        (['text.pth'], 'text.pth'),
        (['mixed.pth'], 'not tensors: b'),
        (['plain.pth', '--no-decoder'], 'is no VQGAN'),
        (['plain.pth', '--key', 'params'], "no entry 'params'"),
        (['last.ckpt', '-o', 'text.pth/out.safetensors'], 'cannot save'),
    ],
)
def test_mistakes(tmp_path, lightning, capsys, arguments, message):
    (tmp_path / 'text.pth').write_text('hello')
    torch.save({'a': torch.ones(1), 'b': argparse.Namespace()}, 'mixed.pth')
    torch.save({'a': torch.ones(1)}, 'plain.pth')
    before = sorted(tmp_path.iterdir())
    assert zoo.main(['convert', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1
    assert sorted(tmp_path.iterdir()) == before


def test_usage(capsys):
    assert zoo.main([]) == 2 and 'COMMAND' in capsys.readouterr().err
    assert zoo.main(['convert', '--help']) == 0 and '--no-decoder' in capsys.readouterr().out


def test_the_public_vqgan_becomes_an_encoder():
    """A file with every key and shape of taming's VQGAN f16 1024: all that DCKD's encoder needs is kept, and loads."""
    shapes = golden_data.manifest('taming_vqgan_f16_1024')['keys']
    weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save({'state_dict': weights, 'hparams': argparse.Namespace()}, 'last.ckpt')
    used, kept, dropped = zoo.convert('last.ckpt', 'clean.safetensors', no_decoder=True)
    assert (used, len(kept), len(dropped)) == ('state_dict', 147, 251)
    released = golden_data.manifest('dckd_vqgan')['variants']['released_yml']
    assert {key: list(value.shape) for key, value in load_file('clean.safetensors').items()} == released['keys']

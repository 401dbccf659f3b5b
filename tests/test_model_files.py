"""Networks from files: whose word on the architecture counts, and what is no network from images to images."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from safetensors.torch import save_file
from small_run import edsr, write

from dckd_sr import model_files
from dckd_sr.archs import spandrel_arch
from dckd_sr.errors import UserError


def save(block, path='net.pth', **options):
    """A checkpoint of a network; returns the network."""
    torch.manual_seed(3)
    net = build_network({**block, **options}).eval()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({'params': net.state_dict()}, path)
    return net


def run(path='net.pth', **options):
    with torch.no_grad():
        return model_files.load(path, **options).run(LQ)


LQ = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(0))
NETWORK = edsr()  # res_scale 1, which is what tensors are taken for
SCALED = {**NETWORK, 'res_scale': 0.1}


def test_tensors():
    net = save(NETWORK)
    model = model_files.load('net.pth')
    assert (model.scale, model.channels, model.grid) == (2, 3, 1)
    assert torch.equal(run(), net(LQ)) and model.about == 'EDSR, weights: params, architecture from its tensors, x2'


def test_option_file_is_believed_first():
    net = save(SCALED, 'experiments/run/models/net_g_8.pth')
    write({'network_g': NETWORK, 'network_t': edsr(16)}, 'experiments/run/resolved.yml')
    path = 'experiments/run/models/net_g_8.pth'
    assert not torch.equal(run(path), net(LQ))
    write({'network_g': edsr(16), 'network_t': SCALED})
    assert torch.equal(run(path, opt_file='opt.yml', letter='t'), net(LQ))
    with pytest.raises(UserError, match='does not fit this EDSR'):
        run(path, opt_file='opt.yml')


def test_resolved_options_of_the_run():
    net = save(SCALED, 'experiments/run/models/net_g_8.pth')
    write({'network_g': SCALED, 'network_t': edsr(16)}, 'experiments/run/resolved.yml')
    model = model_files.load('experiments/run/models/net_g_8.pth')
    assert torch.equal(model.run(LQ), net(LQ)) and 'resolved.yml' in model.about
    Path('elsewhere').mkdir()
    moved = Path('experiments/run/models/net_g_8.pth').rename('elsewhere/net_g_8.pth')
    assert 'its tensors' in model_files.load(str(moved)).about


def test_metadata_of_safetensors():
    net = save(SCALED)
    save_file(dict(net.state_dict()), 'net.safetensors', {'dckd_sr': json.dumps({'arch': SCALED})})
    assert torch.equal(run('net.safetensors'), net(LQ))
    # Option files that name the file alone, too.
    assert torch.equal(spandrel_arch.spandrel('net.safetensors')(LQ), net(LQ))
    assert spandrel_arch.describe('net.safetensors').options['res_scale'] == 0.1


@pytest.mark.parametrize(
    'told, message',
    [
        ({'type': 'spandrel', 'path': '/etc/passwd'}, 'expected the type and the arguments of an arch'),
        ({'type': 'EDSRR'}, "no such arch; .* imports: .*did you mean 'EDSR'.*-opt FILE, with imports and network_g"),
        ({**NETWORK, 'num_block': 'many'}, r'arch\.num_block = many: expected a whole number'),
        ({'type': 'VGGFeatureExtractor', 'layer_name_list': ['conv1_1']}, 'reads other files'),
        ({'type': 'SpyNet', 'load_path': 'any.pth'}, 'reads other files'),
        ([1], 'expected the type and the arguments'),
    ],
)
def test_metadata_that_is_wrong(told, message):
    """A file from elsewhere names archs alone, and no file to read or fetch."""
    save_file(dict(save(NETWORK).state_dict()), 'net.safetensors', {'dckd_sr': json.dumps({'arch': told})})
    with pytest.raises(UserError, match=message):
        model_files.load('net.safetensors')


@pytest.mark.parametrize('text', ['', '{', '[1]', 'null', '{"arch": null}'])
def test_metadata_of_others(text):
    save_file(dict(save(NETWORK).state_dict()), 'net.safetensors', {'dckd_sr': text})
    assert 'its tensors' in model_files.load('net.safetensors').about


def test_zoo_and_spandrel_blocks():
    net = save(NETWORK)
    write({'network_g': {'type': 'spandrel', 'path': 'absent.pth', 'res_scale': 1}, 'network_t': {'type': 'zoo'}})
    assert torch.equal(run(opt_file='opt.yml'), net(LQ))
    with pytest.raises(UserError, match='expected a name'):
        run(opt_file='opt.yml', letter='t')


def test_what_it_is_for_export():
    save(NETWORK)
    told = model_files.describe_arch('net.pth', None)
    assert told == {**NETWORK, 'res_scale': 1}
    assert model_files.describe_arch('net.pth', SCALED) == SCALED
    write({'network_g': {'type': 'spandrel', 'path': 'x', 'res_scale': 0.5}})
    assert model_files.describe_arch('net.pth', {'type': 'spandrel', 'res_scale': 0.5})['res_scale'] == 0.5


def test_refused():
    save(NETWORK)
    Path('text.pth').write_text('words')
    Path('text.onnx').write_text('words')
    torch.save({'a': torch.zeros(3)}, 'other.pth')
    write({'network_t': NETWORK})
    save({'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 4}, 'judge.pth')
    write({'network_g': {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 4}}, 'judge.yml')
    for arguments, message in (
        (('absent.pth',), 'absent.pth is not there .looked in .*; expected the file of a network'),
        (('.',), 'is a folder'),
        (('text.pth',), 'text.pth is no PyTorch checkpoint'),
        (('other.pth',), 'other.pth is of no arch that its tensors tell: -opt FILE, with its network'),
        (('net.pth', 'opt.yml'), 'opt.yml has no network_g; it has network_t'),
        (('net.pth', 'absent.yml'), 'absent.yml: no such file'),
        (('judge.pth', 'judge.yml'), 'this network cannot restore an image'),
    ):
        with pytest.raises(UserError, match=message) as error:
            model_files.load(*arguments)
        assert '\n' not in str(error.value)


@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
def test_torchscript_with_compressed_weights_is_refused():
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), LQ), 'net.pt')
    with zipfile.ZipFile('net.pt') as old, zipfile.ZipFile('bomb.pt', 'w') as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    assert model_files.load('net.pt').scale == 1
    with pytest.raises(UserError, match=r'bomb.pt cannot be read: .* is compressed'):
        model_files.load('bomb.pt')
    with zipfile.ZipFile('net.pt', 'a') as archive:
        archive.writestr('net/code/more.py', b' ' * (2**26 + 1), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match='net.pt cannot be read: its code unpacks to 671'):
        model_files.load('net.pt')


@pytest.mark.parametrize('prefix', ['net_g.', 'module.', 'model.'])
def test_names_with_a_prefix(prefix):
    weights = {f'{prefix}{key}': value for key, value in save(NETWORK).state_dict().items()}
    torch.save({'state_dict': weights, 'epoch': 3}, 'light.ckpt')
    assert torch.equal(run('light.ckpt'), run('net.pth'))
    write({'network_g': NETWORK}, 'opt.yml')
    assert torch.equal(run('light.ckpt', opt_file='opt.yml'), run('net.pth'))
    with pytest.raises(UserError, match="no entry 'params'; available: state_dict; set --param_key to one of them"):
        run('light.ckpt', param_key='params')


@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
def test_torchscript():
    net = save(NETWORK)
    torch.jit.save(torch.jit.trace(net, LQ), 'net.pt')
    model = model_files.load('net.pt')
    assert torch.equal(model.run(LQ), net(LQ)) and (model.scale, model.channels) == (2, 3)
    with pytest.raises(UserError, match='carries its network'):
        model_files.load('net.pt', 'opt.yml')
    metadata = {model_files.SCRIPT_METADATA: json.dumps({'padder_size': 4, 'precision': 'float32'})}
    torch.jit.save(torch.jit.trace(net, LQ), 'ours.pt', _extra_files=metadata)
    model = model_files.load('ours.pt')
    assert model.grid == 4 and model.about == 'TorchScript, float32, x2'


def test_one_channel():
    block = {'type': 'MSRResNet', 'num_in_ch': 1, 'num_out_ch': 1, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    net = save(block)
    write({'network_g': block})
    model = model_files.load('net.pth', 'opt.yml')
    assert model.channels == 1 and torch.equal(model.run(LQ[:, :1]), net(LQ[:, :1]))

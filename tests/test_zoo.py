"""The zoo: its table, downloads from a server of our own, names in option files; what convert keeps and drops."""

import argparse
import hashlib
import http.server
import io
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import golden_data
import option_files
import pytest
import torch
from basicsr.archs import build_network
from safetensors.torch import load_file, save_file

from dckd_sr import checkpoint, option_keys, options, safe_yaml, zoo
from dckd_sr import option_checks as checks


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


def edsr():
    torch.manual_seed(0)
    return build_network({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2})


@pytest.mark.parametrize(
    'prefix, kept_prefix', [('net_g.', ''), ('module.', ''), ('_orig_mod.net_g.', ''), ('model.', ''), ('', '')]
)
def test_a_prefix_of_a_program_that_trains_is_left_out(capsys, prefix, kept_prefix):
    weights = edsr().state_dict()
    torch.save({'state_dict': {prefix + key: value for key, value in weights.items()}, 'epoch': 3}, 'light.ckpt')
    assert zoo.main(['convert', 'light.ckpt']) == 0
    assert list(torch.load('light_clean.pth', weights_only=True)['params']) == list(weights)
    assert (f'without {prefix} before its names' in capsys.readouterr().out) is bool(prefix)


@pytest.mark.parametrize('prefix, stays', [('model.', True), ('net_g.', False), ('body.', True), ('model.net.', False)])
def test_a_prefix_that_is_a_name_of_the_network_stays(prefix, stays):
    """Nobody knows this network: what only programs that train put there is left out, and no Sequential of the name."""
    number = '0.' if stays else 'first.'
    torch.save({f'{prefix}{number}{key}': torch.ones(1) for key in ('weight', 'bias')}, 'own.pth')
    assert zoo.main(['convert', 'own.pth']) == 0
    kept = list(torch.load('own_clean.pth', weights_only=True)['params'])
    left = {'net_g.': '', 'model.net.': 'net.'}.get(prefix, prefix)
    assert kept == [f'{left}{number}weight', f'{left}{number}bias']


def shown(file, capsys):
    assert zoo.main(['show', file]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if ' INFO: ' not in line]  # where a training in this process has started the log
    return [(line[:9].strip(), line[10:]) for line in lines]


def test_show_says_what_a_file_is(capsys):
    weights = edsr().state_dict()
    named = {f'net_g.{key}': value for key, value in weights.items()}
    half = {key: value.half() for key, value in named.items()}
    content = {'params': named, 'params_ema': half, 'epoch': 3, 'args': argparse.Namespace(lr=1)}
    torch.save(content, 'both.ckpt')
    rest = 'num_feat: 8, num_block: 1, res_scale: 1, upscale: 2'
    data, numbers = Path('both.ckpt').read_bytes(), sum(value.numel() for value in weights.values())
    assert shown('both.ckpt', capsys) == [
        ('file', 'both.ckpt'),
        ('size', f'{len(data):,} bytes'),
        ('sha256', hashlib.sha256(data).hexdigest()),
        ('format', 'PyTorch, a zip file'),
        ('entry', f'params: 12 tensors, {numbers:,} parameters and buffers, float32'),
        ('entry', f'params_ema: 12 tensors, {numbers:,} parameters and buffers, float16'),
        ('beside', 'epoch, args'),
        ('code', 'named, and not run: argparse.Namespace'),
        ('prefix', 'net_g. before all names of params_ema; left out where they are loaded'),
        ('taken', 'params_ema, where no key is set'),
        ('network', f'EDSR, x2, 3 to 3 channels; num_in_ch: 3, num_out_ch: 3, {rest}'),
    ]


@pytest.mark.filterwarnings('ignore')
def test_show_of_files_of_every_kind(capsys):
    net = torch.nn.Conv2d(1, 1, 1)
    torch.save(net.state_dict(), 'bare.pth', _use_new_zipfile_serialization=False)
    lines = shown('bare.pth', capsys)
    assert ('format', 'PyTorch, a stream as before 1.6') in lines and (
        'taken',
        'bare weights, where no key is set',
    ) in lines
    assert lines[-1] == ('network', 'not told by its tensors; an option file says what it is')
    save_file(net.state_dict(), 'net.safetensors', {'dckd_sr': '{"scale": 2}'})
    lines = shown('net.safetensors', capsys)
    assert ('format', 'safetensors') in lines and ('metadata', 'scale: 2') in lines
    torch.jit.save(torch.jit.trace(net, torch.ones(1, 1, 4, 4)), 'net.pt')
    assert ('format', 'TorchScript, a program') in shown('net.pt', capsys)
    torch.save({'epoch': 0, 'iter': 8, 'optimizers': [], 'schedulers': []}, '8.state')
    assert shown('8.state', capsys)[-1] == ('holds', 'the training state of iteration 8; no weights of networks')
    torch.save({'params': {'w': torch.eye(2).to_sparse(), 'v': torch.ones(2)}}, 'sparse.pth')
    assert any('no tensors: w (a sparse tensor)' in text for _, text in shown('sparse.pth', capsys))
    torch.save({'state_dict': vqgan_weights()}, 'vqgan.ckpt')
    assert shown('vqgan.ckpt', capsys)[-1] == ('network', 'VQGAN, which network_vqgan describes')


@pytest.mark.parametrize(
    'name, message',
    [
        ('absent.pth', 'absent.pth is not there; expected a file with weights'),
        ('folder', 'folder is a folder; expected a file with weights'),
        ('page.pth', 'page.pth is a web page, not a checkpoint: the download failed'),
        ('EDSR_x9', 'the zoo has no EDSR_x9'),
    ],
)
def test_show_of_no_weights(tmp_path, capsys, name, message):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'page.pth').write_text('<html>')
    assert zoo.main(['show', name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}') and error.count('\n') == 1


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


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_every_entry_says_where_it_is_from():
    assert len(zoo.ENTRIES) == 25
    files = [(entry.family, entry.file) for entry in zoo.ENTRIES.values()]
    assert len(set(files)) == len(files)
    for name, entry in zoo.ENTRIES.items():
        assert entry.name == name and entry.url.startswith('https://') and entry.page.startswith('https://')
        assert entry.license
        assert (entry.sha256 is None) == (entry.hash_page is None)
        if entry.sha256:
            assert re.fullmatch('[0-9a-f]{8}|[0-9a-f]{64}', entry.sha256) and entry.hash_page.startswith('https://')
        if 'drive' not in entry.url and 'heibox' not in entry.url and entry.member is None:
            assert entry.url.endswith('/' + entry.file)


# Parameters by the papers (EDSR: Table 1 of DCKD's), in thousands; SwinIR is built for real, which takes a while.
PARAMETERS = {
    'EDSR-M_DIV2K_s48_x2': 1370,
    'EDSR-M_DIV2K_s48_x3': 1555,
    'EDSR-M_DIV2K_s48_x4': 1518,
    'EDSR-L_DIV2K_s48_x2': 40730,
    'EDSR-L_DIV2K_s48_x3': 43680,
    'EDSR-L_DIV2K_s48_x4': 43090,
    'SwinIR-M_DF2K_s64w8_x4': 11900,
    'SwinIR-S_DIV2K_s64w8_x4': 930,  # 897 in SwinIR's paper; 930 is what its code has and later papers state
    'NAFNet_GoPro_s256_width32': 17112,
    'NAFNet_GoPro_s256_width64': 67890,
    'Restormer_Rain13K_s128-384_deraining': 26127,
    'Restormer_GoPro_s128-384_deblurring': 26127,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_the_networks_are_those_of_the_papers(name):
    entry = zoo.ENTRIES[name]
    with torch.device('cpu' if entry.family == 'SwinIR' else 'meta'):
        net = build_network(dict(entry.network))
    assert sum(parameter.numel() for parameter in net.parameters()) / 1000 == pytest.approx(PARAMETERS[name], rel=1e-3)
    _, scale = checks.argument(type(net), entry.network, option_keys.SCALE_KEYS)
    assert (scale or 1) == entry.scale and name.endswith((f'x{entry.scale}', 'width32', 'width64', 'ing'))


def test_list(capsys):
    path = zoo.path_of(zoo.ENTRIES['SwinIR-S_DIV2K_s64w8_x2'])
    path.parent.mkdir(parents=True)
    path.touch()
    assert zoo.main(['list']) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert set(zoo.ENTRIES) < set(lines)
    assert lines['SwinIR-S_DIV2K_s64w8_x2'] == ['x2', 'sha256', path.as_posix()]
    assert lines['EDSR-L_DIV2K_s48_x4'] == ['x4', 'sha256[:8]', '-']
    assert lines['VQGAN_ImageNet_s256_f16_1024'] == ['x1', 'unverified', '-']


@pytest.mark.parametrize('name', zoo.ENTRIES)
def test_show_prints_what_an_option_file_needs(capsys, name):
    entry = zoo.ENTRIES[name]
    assert zoo.main(['show', name]) == 0
    out = capsys.readouterr().out
    assert entry.page in out and entry.url in out and f'zoo get {name}' in out
    assert (entry.sha256 or 'unverified') in out and (entry.hash_page or '') in out
    long, short = out[out.index('network_') :].split('or, shorter:')
    report = checks.Report()
    raw = {**safe_yaml.parse(short), 'scale': entry.scale}
    checks.resolve_zoo(report, raw)
    assert not report.problems
    assert {'path': {}, **safe_yaml.parse(long)} == {key: value for key, value in raw.items() if key != 'scale'}


def test_names_that_are_nearly_right(capsys):
    for command in ('get', 'show'):
        assert zoo.main([command, 'SwinIR-M_DF2K_s64w8x4']) == 2
        error = capsys.readouterr().err
        assert "did you mean 'SwinIR-M_DF2K_s64w8_x4'" in error and error.count('\n') == 1


# ---------------------------------------------------------------------------------------------------------------------
# Getting


@pytest.fixture
def served(monkeypatch):
    """Entries whose file lies on a server of our own."""
    content = {'/a.pth': b'weights' * 100}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        file.writestr('folder/a2.pt', b'two')
        file.writestr('folder/a3.pt', b'three')
    content['/all.zip'] = buffer.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = content.get(self.path.partition('?')[0])
            self.send_response(200 if body else 404)
            self.send_header('Content-Length', str(len(body or b'')))
            self.end_headers()
            self.wfile.write(body or b'')
            paths.append(self.path)

        def log_message(self, *_):
            pass

    paths = []
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    sha256 = hashlib.sha256(content['/a.pth']).hexdigest()
    entry = zoo.ENTRIES['SwinIR-S_DIV2K_s64w8_x2']
    new = {
        'good': replace(entry, name='good', file='a.pth', url=f'{url}/a.pth', sha256=sha256, hash_page='https://hash'),
        'short': replace(entry, name='short', file='a.pth', url=f'{url}/a.pth', sha256=sha256[:8]),
        'bad': replace(entry, name='bad', file='b.pth', url=f'{url}/a.pth', sha256='0' * 64),
        'unknown': replace(entry, name='unknown', file='c.pth', url=f'{url}/a.pth', sha256=None, hash_page=None),
        'gone': replace(entry, name='gone', file='d.pth', url=f'{url}/d.pth'),
        'two': replace(entry, name='two', file='a2.pt', url=f'{url}/all.zip?dl=1', member='folder/a2.pt', sha256=None),
        'three': replace(
            entry, name='three', file='a3.pt', url=f'{url}/all.zip?dl=1', member='folder/a3.pt', sha256=None
        ),
    }
    for name, value in new.items():
        monkeypatch.setitem(zoo.ENTRIES, name, value)
    yield paths
    server.shutdown()
    server.server_close()


def test_get(served, capsys):
    assert zoo.main(['get', 'good']) == 0
    out, err = capsys.readouterr()
    target = Path('experiments/pretrained_models/SwinIR/a.pth')
    assert target.read_bytes() == b'weights' * 100
    assert str(target) in out and 'verified against https://hash' in out and 'a.pth: 100%' in err
    assert zoo.main(['get', 'good']) == 0 and zoo.main(['get', 'short']) == 0 and len(served) == 1
    assert zoo.main(['get', 'good', '-o', 'elsewhere']) == 0 and Path('elsewhere/a.pth').is_file()


def test_get_without_a_hash_tells_the_one_it_got(served, capsys):
    assert zoo.main(['get', 'unknown']) == 0
    sha256 = hashlib.sha256(b'weights' * 100).hexdigest()
    assert f'unverified, no public page states it; this file has {sha256}' in capsys.readouterr().out


@pytest.mark.parametrize('name, message', [('bad', 'it was removed'), ('gone', 'not found (HTTP 404)')])
def test_get_fails_in_one_line(served, capsys, name, message):
    assert zoo.main(['get', name]) == 2
    error = capsys.readouterr().err
    [line] = [line for line in error.splitlines() if line.startswith('error: ')]
    assert message in line and line.endswith(f'by hand: {zoo.ENTRIES[name].page}')
    assert not [path for path in Path().rglob('*') if path.is_file()]


def test_get_of_an_archive(served):
    assert zoo.main(['get', 'two']) == 0 and zoo.main(['get', 'three']) == 0
    folder = Path('experiments/pretrained_models/SwinIR')
    assert {path.name for path in folder.iterdir()} == {'a2.pt', 'a3.pt', 'all.zip'}
    assert (folder / 'a3.pt').read_bytes() == b'three' and len(served) == 1
    assert zoo.main(['get', 'two']) == 0 and len(served) == 1


# ---------------------------------------------------------------------------------------------------------------------
# In option files


def zoo_options(tmp_path, **networks):
    option_files.make_files(tmp_path)
    opt = option_files.dckd()
    opt['path'] = {'pretrain_network_vqgan': 'vqgan.ckpt'}
    opt.update(networks)
    return opt


def place(name):
    """An empty file where the zoo would put an entry's."""
    path = zoo.path_of(zoo.ENTRIES[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.as_posix()


def test_a_name_is_enough(tmp_path):
    teacher, encoder = 'SwinIR-M_DF2K_s64w8_x4', 'VQGAN_ImageNet_s256_f16_1024'
    opt = zoo_options(
        tmp_path, network_t={'type': 'zoo', 'name': teacher}, network_vqgan={'type': 'zoo', 'name': encoder}
    )
    del opt['path']
    paths = place(teacher), place(encoder)
    found, warnings = option_files.load(opt)
    assert found['network_t'] == zoo.ENTRIES[teacher].network
    assert found['network_vqgan'] == zoo.ENTRIES[encoder].network
    assert (found['path']['pretrain_network_t'], found['path']['param_key_t']) == (paths[0], 'params')
    assert (found['path']['pretrain_network_vqgan'], found['path']['param_key_vqgan']) == (paths[1], 'state_dict')
    assert found['val']['window_size'] == 8
    assert option_files.load(options.read_file('opt.yml'))[0]['network_t']['type'] == 'SwinIR'
    again, _ = option_files.load(safe_yaml.parse(options.to_yaml(found)))
    assert again['network_t'] == found['network_t'] and again['path'] == found['path']


def test_a_student_of_the_zoo(tmp_path):
    name = 'EDSR-M_DIV2K_s48_x4'
    opt = zoo_options(tmp_path, network_g={'type': 'zoo', 'name': name})
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    path = place(name)
    found, _ = option_files.load(opt)
    assert found['path']['pretrain_network_g'] == path and found['network_g']['num_feat'] == 64


def test_a_path_of_ones_own_is_kept(tmp_path):
    opt = zoo_options(tmp_path, network_t={'type': 'zoo', 'name': 'SwinIR-M_DF2K_s64w8_x4'})
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    found, _ = option_files.load(opt)
    assert found['path']['pretrain_network_t'] == 'teacher.pth' and 'param_key_t' not in found['path']


def test_missing_files_are_said_with_the_command_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, 'fetch', lambda *_, **__: pytest.fail('a download'))
    name = 'SwinIR-M_DF2K_s64w8_x4'
    opt = zoo_options(tmp_path, network_t={'type': 'zoo', 'name': name})
    path = zoo.path_of(zoo.ENTRIES[name]).as_posix()
    command = f'python -m dckd_sr.zoo get {name}'
    assert option_files.problems_of(opt) == [
        f'path.pretrain_network_t = {path}: no such file in {Path.cwd()}; get it: {command}'
    ]
    opt = zoo_options(tmp_path / 'x', network_t={'type': 'zoo', 'name': 'RCAN_DIV2K_s48_x4'})
    [problem] = option_files.problems_of(opt)
    assert problem.startswith('network_t.path = experiments/') and problem.endswith('zoo get RCAN_DIV2K_s48_x4')
    Path('opt.yml').write_text(safe_yaml.dump({**opt, 'path': {'pretrain_network_g': 'teacher.pth'}}))
    options.load('opt.yml', is_train=False)  # a test uses the teacher only with --with_teacher


@pytest.mark.parametrize(
    'letter, name, message',
    [
        ('t', 'SwinIR-M_DF2K_s64w8_x2', 'a network of scale 2, but scale = 4'),
        ('t', 'NAFNet_GoPro_s256_width32', 'a network of scale 1, but scale = 4'),
        (
            't',
            'SwinIR-M_DF2K_x4',
            "the zoo has no SwinIR-M_DF2K_x4 (did you mean 'SwinIR-M_DF2K_s64w8_x4'?); all names: "
            'python -m dckd_sr.zoo list',
        ),
        ('t', None, 'expected a name; all names: python -m dckd_sr.zoo list'),
        (
            't',
            'VQGAN_ImageNet_s256_f16_1024',
            'VQGAN_ImageNet_s256_f16_1024 is a VQGAN; it cannot be network_t',
        ),
        ('vqgan', 'EDSR-L_DIV2K_s48_x4', 'EDSR-L_DIV2K_s48_x4 is no VQGAN; it cannot be network_vqgan'),
    ],
)
def test_wrong_entries(tmp_path, letter, name, message):
    """One line each, before anything is trained."""
    opt = zoo_options(tmp_path, **{f'network_{letter}': {'type': 'zoo', 'name': name}})
    if letter != 't':
        opt['path']['pretrain_network_t'] = 'teacher.pth'
    if name in zoo.ENTRIES:
        place(name)
    assert option_files.problems_of(opt) == [f'network_{letter}.name = {name or "~"}: {message}']


def test_options_beside_a_name(tmp_path):
    opt = zoo_options(tmp_path, network_t={'type': 'zoo', 'name': 'EDSR-L_DIV2K_s48_x4', 'num_feat': 64})
    [problem] = option_files.problems_of(opt)
    assert problem.endswith('the zoo states all options; drop num_feat, or write what `zoo show` prints')

"""docs/methods.md: its files are whole and train, its module paths exist, its ablations are what they say."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from small_run import dckd_run, edsr, write

from dckd_sr import option_files, options, safe_yaml, train
from dckd_sr.ops.taps import Taps
from dckd_sr.option_keys import DROP_IN_LOSSES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8')
FILES = {safe_yaml.parse(text)['name']: text for text in re.findall(r'```yaml\n(.*?)```', TEXT, flags=re.S)}
ROWS = [row.strip('| ').split(' | ') for row in TEXT.splitlines() if row.startswith('| ') and '`train:' in row]
NOT_HERE = r': no such (file|folder)|: no weights of vgg19 at'
# What the small run has not: trained features, a batch of ten, maps of a network this large.
SMALL = {'csd_opt': {'num_neg': 2, 'allow_random': True}, 'mclir_opt': {'allow_random': True}}


def loaded(*arguments):
    """What is wrong with a file, but for data and weights that are not here; the file merged with its bases."""
    try:
        options.load(*arguments)
        return []
    except options.OptionError as error:
        return [problem for problem in error.problems if not re.search(NOT_HERE, problem)]


@pytest.mark.parametrize('name', FILES)
def test_a_file_is_whole(name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    Path('method.yml').write_text(FILES[name], encoding='utf-8')
    assert loaded('method.yml', ['num_gpu=0']) == []
    # The page says which blocks a method has; all others are off.
    blocks = {key for key in DROP_IN_LOSSES if option_files.read('method.yml').options['train'].get(key)}
    assert (
        blocks
        == {
            'EDSR_Mx4_scratch': set(),
            'EDSR_Mx4_logits': {'logits_opt'},
            'EDSR_Mx4_lcr': {'logits_opt', 'lcr_opt'},
            'EDSR_Mx4_FAKD': {'logits_opt', 'fakd_opt'},
            'EDSR_Mx4_CSD': {'csd_opt'},
            'EDSR_Mx4_MCLIR': {'mclir_opt'},
            'EDSR_Mx4_DUKD': {'logits_opt', 'dukd_opt'},
            'EDSR_Mx4_DCKD_DUKD': {'logits_opt', 'cl_opt', 'ce_opt', 'dukd_opt'},
            'EDSR_Mx4_DCKD_two_teachers': {'logits_opt', 'cl_opt', 'ce_opt'},
            'EDSR_Mx4_DCKD_shares': {'logits_opt', 'cl_opt', 'ce_opt'},
        }[name]
    )


@pytest.mark.parametrize('name', [name for name in FILES if 'teachers' not in name])
def test_a_file_trains(name, tmp_path, capfd):
    """On the small run in place of the shipped file, with networks of as many blocks."""
    opt = dckd_run(tmp_path)
    opt['train']['total_iter'] = 1
    opt['network_g'], opt['network_t'] = {**edsr(4), 'num_block': 16}, {**edsr(4), 'num_block': 32, 'res_scale': 0.1}
    torch.save({'params': build_network(dict(opt['network_t'])).state_dict()}, 'teacher.pth')
    write(opt, 'base.yml')
    Path('method.yml').write_text(FILES[name].replace('train_edsr_x4', 'base.yml'), encoding='utf-8')
    more = [f'train:{key}:{k}={v}' for key in SMALL if f'{key}:' in FILES[name] for k, v in SMALL[key].items()]
    code = train.main(['-opt', 'method.yml', *(['--force_yml', *more] if more else [])])
    assert code == 0, capfd.readouterr().err
    assert Path(f'experiments/{name}/models/net_g_latest.pth').is_file()


@pytest.mark.parametrize('recipe, student, teacher', [('train_edsr_x4', None, None), ('train_rcan_x4', 'RCAN', 'RCAN')])
def test_the_modules_are_there(recipe, student, teacher):
    block = safe_yaml.parse(FILES['EDSR_Mx4_FAKD'])['train']['fakd_opt']
    opt = option_files.read(recipe).options
    rcan = ['body.2', 'body.6', 'upsample:input']
    assert ', '.join(f'`{path}`' for path in rcan) in re.sub(r'\s+', ' ', TEXT)
    for key, paths in (('network_g', block['student']), ('network_t', block['teacher'])):
        if opt[key]['type'] == 'spandrel':
            continue
        with torch.device('meta'):
            net = build_network(dict(opt[key]))
        Taps(net, rcan if student else paths)
        blocks = len(net.body)
        if not student:
            assert paths == [f'body.{blocks // 3 - 1}', f'body.{2 * blocks // 3 - 1}', 'upsample:input']


@pytest.mark.parametrize('row', ROWS, ids=[row[0] for row in ROWS])
def test_an_ablation_is_an_override(row):
    what, cell, score = row
    overrides = re.findall(r'`([^`]+)`', cell)
    assert loaded('train_rcan_x2', ['num_gpu=0', 'name=ablation', *overrides]) == []
    before, after = (option_files.read('train_rcan_x2').options for _ in range(2))
    option_files.apply_overrides(after, overrides)
    default = {'first step 1000', 'noise', 'w_dcl 0.1', 'w_ce 0.001'}
    assert (before == after) == (what in default)
    assert 32.6 < float(score) < 33
    number = re.search(r'[\d.]+$|^\d+', what)
    if number:
        assert any(re.search(rf'[=\[]{re.escape(number.group())}\b', text) for text in overrides)


def test_the_page():
    assert len(FILES) == 10 and len(ROWS) == 23
    (line,) = re.findall(r'^ {4}(dckd-train .*)$', TEXT, flags=re.M)
    words = shlex.split(line)
    assert options.parser().parse_args(words[1:]).opt == 'train_rcan_x2' and words[-1] == 'OVERRIDES'
    for link in re.findall(r'\]\(([^)]+)\)', TEXT):
        assert (ROOT / 'docs' / link).is_file()
    assert 'docs/methods.md' in (ROOT / 'README.md').read_text(encoding='utf-8')

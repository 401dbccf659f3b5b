"""Comparisons of methods: what each run is, what the tables say of given scores, and one small comparison whole."""

import csv
import json
import os
import shutil
import statistics
import subprocess
import types

import cv2
import pytest
import torch
from basicsr.archs import build_network
from option_files import dckd
from small_run import dckd_run, edsr, write

from dckd_sr import compare, option_keys, options, train
from dckd_sr.errors import UserError


def blocks(opt):
    return {key for key in opt['train'] if key in option_keys.DROP_IN_LOSSES}


@pytest.mark.parametrize(
    'method, losses, networks',
    [
        ('scratch', set(), set()),
        ('logits', {'logits_opt'}, {'network_t'}),
        ('dcr', {'logits_opt', 'cl_opt'}, {'network_t', 'network_his', 'network_vqgan'}),
        ('dmm', {'logits_opt', 'ce_opt'}, {'network_t', 'network_vqgan'}),
        ('dckd', {'logits_opt', 'cl_opt', 'ce_opt'}, {'network_t', 'network_his', 'network_vqgan'}),
        ('dckd+lcr', {'logits_opt', 'cl_opt', 'ce_opt', 'lcr_opt'}, {'network_t', 'network_his', 'network_vqgan'}),
    ],
)
def test_a_method_is_the_recipe_without_the_others_blocks(method, losses, networks):
    recipe = dckd()
    opt = compare.method_options(recipe, method)
    assert blocks(opt) == losses
    assert {key for key in recipe if key.startswith('network_')} - {'network_g'} >= networks
    assert {key for key in opt if key.startswith('network_')} == {'network_g', *networks}
    for letter in ('t', 'vqgan'):
        assert (f'pretrain_network_{letter}' in opt['path']) == (f'network_{letter}' in networks)
    same = ('datasets', 'network_g', 'val', 'scale')
    assert all(opt[key] == recipe[key] for key in same)
    others = {key: value for key, value in recipe['train'].items() if key not in option_keys.DROP_IN_LOSSES}
    assert {key: opt['train'][key] for key in others} == others
    assert blocks(recipe) == {'logits_opt', 'lcr_opt', 'cl_opt', 'ce_opt'}  # the recipe is not changed
    recipe['train']['gradient_shares'] = {'cl_opt': 0.3, 'ce_opt': 0.1}
    shares = {name: compare.method_options(recipe, name)['train'].get('gradient_shares') for name in ('lcr', 'dcr')}
    assert shares == {'lcr': None, 'dcr': {'cl_opt': 0.3}}
    recipe['datasets']['train']['teacher_cache'] = 'teacher.lmdb'
    caches = [
        compare.method_options(recipe, name)['datasets']['train'].get('teacher_cache') for name in ('scratch', 'logits')
    ]
    assert caches == [None, 'teacher.lmdb']


def test_runs_share_seeds_and_come_seed_by_seed():
    runs = compare.plan(dckd(), ['scratch', 'dckd', 'scratch'], seeds=2, steps=None)
    assert [(run.method, run.seed) for run in runs] == [('scratch', 10), ('dckd', 10), ('scratch', 11), ('dckd', 11)]
    assert [run.options['manual_seed'] for run in runs] == [10, 10, 11, 11]
    assert [run.name for run in runs] == ['run_scratch_s10', 'run_dckd_s10', 'run_scratch_s11', 'run_dckd_s11']


def test_each_seed_has_weights_of_its_own():
    recipe = dckd()
    recipe['path'].update(pretrain_network_g='first_s{seed}.pth', pretrain_network_t='{other}.pth', strict_load_g=True)
    runs = compare.plan(recipe, ['dckd'], seeds=2, steps=None)
    assert [run.options['path']['pretrain_network_g'] for run in runs] == ['first_s10.pth', 'first_s11.pth']
    assert all(run.options['path']['pretrain_network_t'] == '{other}.pth' for run in runs)
    assert all(run.options['path']['strict_load_g'] is True for run in runs)
    assert recipe['path']['pretrain_network_g'] == 'first_s{seed}.pth'  # the recipe is not changed


def test_steps_shrink_what_is_counted_in_iterations():
    recipe = dckd()
    recipe['train'].update(total_iter=1000, step=[100, 200], step_period=500, warmup_iter=10)
    recipe['train']['scheduler'] = {
        'type': 'CosineAnnealingRestartLR',
        'periods': [333, 667],
        'restart_weights': [1, 1],
    }
    recipe['val']['val_freq'] = 100
    opt = compare.plan(recipe, ['dckd'], 1, 100)[0].options
    train = opt['train']
    assert (train['total_iter'], train['step'], train['step_period'], train['warmup_iter']) == (100, [10, 20], 50, 1)
    assert sum(train['scheduler']['periods']) == 100 and opt['val']['val_freq'] == 10
    assert train['scheduler']['restart_weights'] == [1, 1] and train['optim_g'] == recipe['train']['optim_g']


def test_methods_of_the_recipes_own():
    recipe = dckd()
    recipe['compare'] = {'methods': {'paper form': {'uses': ['dckd'], 'force_yml': ['train:ce_opt:form=paper']}}}
    assert not [problem for problem in options.check(recipe)[0] if 'compare' in problem]  # is a training, too
    plain, own = compare.plan(recipe, ['dckd', 'paper form'], 1, None)
    assert own.options['train'].pop('ce_opt') == {**plain.options['train'].pop('ce_opt'), 'form': 'paper'}
    assert own.options['train'] == plain.options['train'] and 'compare' not in own.options
    assert own.name == 'run_paper_form_s10'
    assert compare.label('paper form') == 'paper form' and compare.label('dckd+logits') == 'DCKD+Logits'


@pytest.mark.parametrize(
    'methods, change, message',
    [
        (['dckdd'], {}, "no method named 'dckdd' (did you mean 'dckd'?)"),
        (['dckd+'], {}, "no method named ''"),
        ([' '], {}, 'no name given'),
        (['dckd'], {'ce_opt': None}, 'the recipe has no train.ce_opt, which the method dckd needs'),
    ],
)
def test_mistakes(methods, change, message):
    recipe = dckd()
    recipe['train'].update(change)
    with pytest.raises(UserError) as error:
        compare.plan(recipe, methods, 1, None)
    assert message in str(error.value)


@pytest.mark.parametrize(
    'own, methods, message',
    [
        ({'a b': {'uses': ['scratch']}, 'a_b': {'uses': ['dckd']}}, ['a b', 'a_b'], "'a b' and 'a_b' would both be"),
        ({'DCKD': {'uses': ['scratch']}}, ['dckd', 'DCKD'], "'dckd' and 'DCKD' would both be trained as run_DCKD_s10"),
        ({'own': {'uses': 'scratch'}}, ['own'], 'compare.methods.own.uses = scratch: expected names, each with uses'),
        ({'own': {'uses': None}}, ['own'], 'compare.methods.own.uses = null: expected'),
        ({'own': {'usess': ['dckd']}}, ['own'], "compare.methods.own.usess: unknown (did you mean 'uses'?)"),
        ({'own': {'uses': [], 'force_yml': 'scale=2'}}, ['own'], 'compare.methods.own.force_yml = scale=2: expected'),
        (
            {'own': {'uses': ['dckd'], 'force_yml': ['val:metrics:psnr:test_y_channel=false']}},
            ['dckd', 'own'],
            "'own' and 'dckd' would not be scored alike: set scale, the sets and val.metrics in the recipe",
        ),
    ],
)
def test_mistakes_in_methods_of_the_recipes_own(own, methods, message):
    with pytest.raises(UserError) as error:
        compare.plan({**dckd(), 'compare': {'methods': own}}, methods, 1, None)
    assert message in str(error.value)


def test_mistakes_of_the_command_line(capsys):
    write(dckd_run(compare.Path('.')))
    for arguments, message in (
        (['--seeds', '0'], '--seeds, --steps and --jobs are at least 1'),
        (['--force_yml', 'train:optim_g:lr=x'], 'train.optim_g.lr = x'),
        (['-opt', 'no.yml'], 'no.yml'),
    ):
        assert compare.main(['-opt', 'opt.yml', *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not compare.Path('experiments').exists()


SCORES = {  # two seeds
    'scratch': {('Set5', 'psnr'): {1: 30.0, 2: 30.2}, ('Set5', 'ssim'): {1: 0.85, 2: 0.85}},
    'logits': {('Set5', 'psnr'): {1: 30.1, 2: 30.4}, ('Set5', 'ssim'): {1: 0.86, 2: 0.87}},
    'dckd': {('Set5', 'psnr'): {1: 30.3, 2: 30.2}, ('Set5', 'ssim'): {1: 0.84, 2: 0.85}},
}


def tables(tmp_path):
    runs = [
        compare.Run(m, s, {'name': f'{m}{s}', 'train': {'total_iter': 7}}, tmp_path) for m in SCORES for s in (1, 2)
    ]
    fixed = {'bicubic': {('Set5', 'psnr'): [28.42], ('Set5', 'ssim'): [0.81]}, 'Teacher': {('Set5', 'psnr'): [31.0]}}
    return {
        path.suffix[1:]: path.read_text(encoding='utf-8')
        for path in compare.write_tables(tmp_path, SCORES, fixed, runs)
    }


def test_tables_mark_best_and_second_and_show_the_spread(tmp_path):
    written = tables(tmp_path)
    lines = written['md'].splitlines()
    spread = f'{statistics.stdev([30.1, 30.4]):.2f}'
    assert lines[2:7] == [
        '| Teacher | 31.00 | - |',
        '| bicubic | 28.42 | 0.8100 |',
        '| Scratch | <u>30.10 ± 0.14</u> | <u>0.8500 ± 0.0000</u> |',
        f'| Logits | **30.25 ± {spread}** | **0.8650 ± 0.0071** |',
        '| DCKD | **30.25 ± 0.07** | 0.8450 ± 0.0071 |',
    ]
    assert '- 7 iterations, seeds 1, 2' in lines
    # differences of equal seeds: 0.1 and 0.2; 0.3 and 0
    assert '- Logits against Scratch, Set5: +0.150 ± 0.071 dB, paired by seed' in lines
    assert '- DCKD against Scratch, Set5: +0.150 ± 0.212 dB, paired by seed' in lines
    assert r'\textbf{30.25 $\pm$ 0.07}' in written['tex'] and r'\underline{0.8500 $\pm$ 0.0000}' in written['tex']
    assert written['tex'].count('&') == 2 * 7 - 1
    rows = list(csv.DictReader(written['csv'].splitlines()))
    logits = next(row for row in rows if row['method'] == 'Logits' and row['metric'] == 'psnr')
    assert (float(logits['mean']), int(logits['seeds'])) == (30.25, 2)
    assert json.loads(written['json'])['methods']['dckd']['Set5 psnr'] == [30.3, 30.2]


def plain_runs(tmp_path, methods, seeds, **options):
    more = {'train': {'total_iter': 7}, **options}
    return [compare.Run(m, s, {'name': f'{m}{s}', **more}, tmp_path) for m in methods for s in seeds]


def test_the_table_says_which_method_has_another_number_of_iterations(tmp_path):
    recipe = dckd()
    recipe['compare'] = {'methods': {'short': {'uses': ['dckd'], 'force_yml': ['train:total_iter=7']}}}
    runs = compare.plan(recipe, ['dckd', 'short'], 1, None)
    scores = {run.method: {('Set5', 'psnr'): {run.seed: 30.0}} for run in runs}
    table = compare.write_tables(tmp_path, scores, {}, runs)[0].read_text(encoding='utf-8')
    assert f'- {runs[0].options["train"]["total_iter"]} iterations (short 7), seed 10' in table


def test_one_seed_has_no_spread_and_one_method_no_best(tmp_path):
    runs = plain_runs(tmp_path, ['scratch', 'dckd'], [1])
    path = compare.write_tables(tmp_path, {'dckd': {('Set5', 'psnr'): {1: 30.0}}}, {}, runs)[0]
    assert '| DCKD | 30.00 |' in path.read_text(encoding='utf-8')
    scores = {'scratch': {('Set5', 'psnr'): {1: 30.0}}, 'dckd': {('Set5', 'psnr'): {1: 30.5}}}
    text = compare.write_tables(tmp_path, scores, {}, runs)[0].read_text(encoding='utf-8')
    assert '- 7 iterations, seed 1 alone: how far seeds differ is not known' in text
    assert '- DCKD against Scratch, Set5: +0.500 dB, one seed' in text
    assert 'standard deviation' not in text and 'paired' not in text and '±' not in text


def test_pairs_are_of_equal_seeds_where_one_is_missing(tmp_path):
    """A set that could not be measured with one seed moves nothing to the place of another."""
    scores = {
        'scratch': {('Set5', 'psnr'): {1: 30.0, 2: 40.0, 3: 50.0}},
        'dckd': {('Set5', 'psnr'): {3: 50.5, 1: 30.1}},
    }
    runs = plain_runs(tmp_path, scores, (1, 2, 3))
    paths = compare.write_tables(tmp_path, scores, {}, runs)
    text = paths[0].read_text(encoding='utf-8')
    assert '- DCKD against Scratch, Set5: +0.300 ± 0.283 dB, paired by seed' in text
    assert '- DCKD, Set5 psnr: seeds 1, 3 only' in text
    content = json.loads(paths[3].read_text(encoding='utf-8'))
    assert content['seeds'] == [1, 2, 3] and content['methods']['dckd']['Set5 psnr'] == [30.1, None, 50.5]


@pytest.mark.parametrize(
    'metric, best',
    [
        ({'type': 'calculate_psnr', 'better': 'lower'}, 'scratch'),
        ({'type': 'calculate_psnr'}, 'dckd'),
        ({'type': 'calculate_niqe'}, 'scratch'),
        ({'type': 'calculate_niqe', 'better': 'higher'}, 'dckd'),
    ],
)
def test_better_decides_the_ranks(tmp_path, metric, best):
    scores = {'scratch': {('Set5', 'error'): {1: 0.1}}, 'dckd': {('Set5', 'error'): {1: 0.2}}}
    runs = plain_runs(tmp_path, scores, [1], val={'metrics': {'error': metric}})
    text = compare.write_tables(tmp_path, scores, {}, runs)[0].read_text(encoding='utf-8')
    assert f'| {compare.label(best)} | **' in text and text.count('**') == 2


def test_a_small_comparison(capsys, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    opt = dckd_run(compare.Path('.'))
    opt['train']['total_iter'] = 2
    opt['val'] = {'val_freq': 2, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}}
    write(opt)
    command = ['-opt', 'opt.yml', '--methods', 'scratch,dckd', '--seeds', '1', '--jobs', '2']
    assert compare.main(command) == 0
    printed = capsys.readouterr().out
    assert '2 trainings, 0 of them finished' in printed and '| DCKD | ' in printed and '| Teacher | ' in printed
    weights = [compare.Path(f'experiments/run_{method}_s1/models/net_g_latest.pth') for method in ('scratch', 'dckd')]
    first, second = (torch.load(path, weights_only=True)['params'] for path in weights)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    kept = [path.stat().st_mtime_ns for path in weights]
    assert compare.main(command) == 0
    assert '2 trainings, 2 of them finished' in capsys.readouterr().out
    assert kept == [path.stat().st_mtime_ns for path in weights]
    # Another test set is tested, and nothing is trained for it.
    opt['datasets']['test'] = {**opt['datasets']['val_1'], 'name': 'Other'}
    write(opt)
    assert compare.main(command) == 0
    printed = capsys.readouterr().out
    assert '2 trainings, 2 of them finished' in printed and 'Other PSNR' in printed
    assert kept == [path.stat().st_mtime_ns for path in weights]
    # One that is not there is told first; the others are tested.
    absent = ['--force_yml', 'datasets:test_2={name: B100, type: SRImageDataset, dataroot_gt: nowhere}']
    assert compare.main([*command, *absent]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('B100 is skipped: datasets.test_2.dataroot_gt = nowhere') and '2 of them fin' in printed
    # What would stop the test, stops it before the training.
    alone = ['--force_yml', 'datasets:test:dataroot_gt=nowhere', '--methods', 'logits']
    assert compare.main([*command, *alone]) == 2
    assert 'there is no set to test on' in capsys.readouterr().err
    opt['datasets']['test_2'] = dict(opt['datasets']['test'])
    write(opt, 'wrong.yml')
    assert compare.main(['-opt', 'wrong.yml', '--methods', 'logits', '--seeds', '1']) == 2
    assert 'has the same name' in capsys.readouterr().err and not compare.Path('experiments/run_logits_s1').exists()
    # A changed recipe is another run: the old one is not taken for it.
    assert compare.main([*command, '--force_yml', 'train:optim_g:lr=0.01', '--methods', 'scratch']) == 0
    assert '1 trainings, 0 of them finished' in capsys.readouterr().out
    assert kept[0] != weights[0].stat().st_mtime_ns and kept[1] == weights[1].stat().st_mtime_ns


@pytest.fixture
def comparison(monkeypatch):
    """A small comparison whose trainings run in this process: (options, call of the command, names of what trained)."""
    opt, trained = dckd_run(compare.Path('.')), []
    opt['train']['total_iter'] = 2
    opt['logger']['save_checkpoint_freq'] = 1
    opt['val'] = {'val_freq': 2, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}}

    def run(command, **_):
        trained.append((compare.Path(command[4]).stem, '--auto_resume' in command))
        return types.SimpleNamespace(returncode=train.main(command[3:]))

    def call(*arguments):
        trained.clear()
        code = compare.main(['-opt', write(opt), '--methods', 'scratch,logits', '--seeds', '1', *arguments])
        return code, list(trained)

    monkeypatch.setattr(compare.subprocess, 'run', run)
    return opt, call, trained


BOTH = [('run_scratch_s1', False), ('run_logits_s1', False)]


def table():
    return json.loads(compare.Path('results/compare_run/compare.json').read_text())['methods']


def teacher_of(seed):
    torch.manual_seed(seed)
    torch.save({'params': build_network(edsr(16)).state_dict()}, 'teacher.pth')


def another_image(path, size=None):
    image = cv2.imread(path)
    image[4:8, 4:8] = 255 - image[4:8, 4:8]
    cv2.imwrite(path, image)


def test_what_is_made_from_something_else_is_trained_again(comparison, capsys):
    """By content: the options, the weights that are read, the images that are trained on."""
    opt, call, _ = comparison
    assert call() == (0, BOTH) and call() == (0, [])
    before = table()
    compare.Path('teacher.pth').rename('moved.pth')  # the same teacher in another place
    opt['path']['pretrain_network_t'] = 'moved.pth'
    opt['logger']['print_freq'] = 2  # nothing that is trained depends on it
    assert call() == (0, []) and table() == before
    opt['path']['pretrain_network_t'] = 'teacher.pth'
    teacher_of(7)
    capsys.readouterr()
    assert call() == (0, BOTH[1:])
    printed = capsys.readouterr().out
    why = 'path.pretrain_network_t = teacher.pth has another content now'
    assert f'run_logits_s1: training anew, the run that is there is moved aside ({why}); log: ' in printed
    assert len(list(compare.Path('experiments').glob('run_logits_s1_archived_*'))) == 1
    assert len(list(compare.Path('results/compare_run').glob('compare_archived_*.md'))) == 1
    assert table()['scratch'] == before['scratch'] and table()['logits'] != before['logits']
    another_image('LR/1.png')
    assert call() == (0, BOTH)
    opt['train']['optim_g']['lr'] = 1e-2
    assert call() == (0, BOTH) and call() == (0, [])


@pytest.mark.parametrize('form', ['pth', 'safetensors'])
@pytest.mark.parametrize('place', ['moved', 'recorded', 'began'])
def test_an_old_recipes_weights_are_never_the_new_ones(comparison, monkeypatch, form, place):
    """The recipe changes, and the training is killed at its start: what is there is not taken for the new recipe's."""
    opt, call, _ = comparison
    opt['logger']['save_checkpoint_format'] = form
    assert call('--methods', 'scratch') == (0, BOTH[:1])
    old = sorted(path.read_bytes() for path in compare.Path('experiments/run_scratch_s1/models').iterdir())
    opt['train']['optim_g']['lr'] = 1e-2

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if place == 'moved':
            patch.setattr(train, 'make_folders', kill)
        elif place == 'recorded':
            patch.setattr(train.sources, 'begin', kill)
        else:
            patch.setattr(train, 'run', kill)
        run = compare.subprocess.run

        def killed(command, **more):
            try:
                return run(command, **more)
            except Killed:
                return types.SimpleNamespace(returncode=-9)

        patch.setattr(compare.subprocess, 'run', killed)
        assert call('--methods', 'scratch')[0] == 2
    # In the middle of it, the run resumes; before, it begins, and the old one is moved aside.
    assert call('--methods', 'scratch') == (0, [('run_scratch_s1', place == 'began')])
    new = sorted(path.read_bytes() for path in compare.Path('experiments/run_scratch_s1/models').iterdir())
    assert len(new) == len(old) and not set(new) & set(old)
    kept = compare.Path('experiments').glob('run_scratch_s1_archived_*/models')
    assert old in [sorted(path.read_bytes() for path in folder.iterdir()) for folder in kept]
    assert call('--methods', 'scratch') == (0, [])


def test_what_was_continued_otherwise_or_changed_at_its_end_is_not_used(comparison, capsys):
    opt, call, _ = comparison
    assert call('--methods', 'scratch') == (0, BOTH[:1])
    folder = compare.Path('experiments/run_scratch_s1')
    argv = ['-opt', 'results/compare_run/options/run_scratch_s1.yml', '--auto_resume', '--force_yml']
    assert train.main([*argv, 'train:total_iter=3', 'train:optim_g:lr=0.1']) == 0  # by hand
    capsys.readouterr()
    assert call('--methods', 'scratch') == (0, BOTH[:1])
    assert 'continued with other options: train.optim_g.lr: 0.001 -> 0.1' in capsys.readouterr().out
    weights = folder / 'models/net_g_latest.pth'
    torch.save({'params': torch.load(weights)['params']}, weights)
    code, trained = call('--methods', 'scratch')
    assert code == 0 and trained == [('run_scratch_s1', True)]  # its last checkpoint is there
    assert call('--methods', 'scratch') == (0, [])


def test_scores_are_of_these_weights_images_and_metrics(comparison, monkeypatch):
    opt, call, _ = comparison
    for name in ('HR', 'LR'):
        shutil.copytree(name, f'test_{name}')
    opt['datasets']['test'] = {**opt['datasets']['val_1'], 'name': 'T'}
    opt['datasets']['test'].update(dataroot_gt='test_HR', dataroot_lq='test_LR')
    assert call() == (0, BOTH)
    before, tests = table(), []
    real = compare.test.test
    monkeypatch.setattr(compare.test, 'test', lambda opt, *rest: tests.append(opt['name']) or real(opt, *rest))
    assert call() == (0, []) and tests == []
    # A test by hand has results of its own, and takes nothing from the comparison.
    command = ['-opt', 'results/compare_run/options/run_scratch_s1.yml', '--self_ensemble', '--force_yml']
    weights = 'path:pretrain_network_g=experiments/run_scratch_s1/models/net_g_latest.pth'
    assert compare.test.main([*command, weights]) == 0
    tests.clear()
    assert call() == (0, []) and tests == [] and table() == before
    # One image, in its place, of the same size and date.
    path = 'test_HR/2.png'
    status = compare.os.stat(path)
    another_image(path)
    content = compare.Path(path).read_bytes()
    compare.os.truncate(path, max(status.st_size, len(content)))
    compare.os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    compare.sources._of_file.cache_clear()  # as in a process of its own
    assert call() == (0, []) and len(tests) == 2 and table() != before
    tests.clear()
    opt['val']['metrics']['ssim'] = {'type': 'calculate_ssim', 'crop_border': 2}
    assert call() == (0, []) and len(tests) == 2 and 'T ssim' in table()['scratch']
    kept = compare.Path('results/compare_run/tests/run_logits_s1/results.json')
    kept.write_text(kept.read_text()[:100])  # half a file
    tests.clear()
    assert call() == (0, []) and tests == ['run_logits_s1']


def test_another_number_of_steps_is_refused_where_a_run_is_finished(comparison, capsys):
    opt, call, _ = comparison
    assert call('--steps', '1') == (0, BOTH)
    before, files = table(), sorted(compare.Path('.').rglob('*'))
    capsys.readouterr()
    for arguments, said in ((['--steps', '3'], '--steps 3'), ([], '2 iterations')):
        assert call(*arguments) == (2, [])
        wanted = arguments[-1] if arguments else '2'
        assert capsys.readouterr().err == (
            f'error: {said}: run_scratch_s1 is finished with 1 iterations, and would be moved aside with its table; '
            f'give this comparison a name of its own: --force_yml name=run_{wanted}\n'
        )
    assert table() == before and sorted(compare.Path('.').rglob('*')) == files
    assert call('--force_yml', 'name=run_2')[0] == 0 and compare.Path('results/compare_run_2/compare.md').is_file()
    assert call('--steps', '1') == (0, []) and table() == before


def test_a_finished_run_without_a_record_is_neither_used_nor_moved(comparison, capsys):
    opt, call, _ = comparison
    assert call() == (0, BOTH)
    record = compare.Path('experiments/run_logits_s1/made_from.json')
    for damage in (record.unlink, lambda: record.write_text('{"made_from": 3, "changed": []}')):
        damage()
        files = sorted(compare.Path('.').rglob('*'))
        assert call() == (2, []) and sorted(compare.Path('.').rglob('*')) == files
        assert 'experiments/run_logits_s1 has no made_from.json' in capsys.readouterr().err


def test_a_run_that_another_one_reads_is_not_moved_aside(comparison, capsys):
    opt, call, _ = comparison
    methods = {'second': {'uses': ['logits'], 'force_yml': []}}
    first = 'path:pretrain_network_g=experiments/run_scratch_s{seed}/models/net_g_latest.pth'
    opt['compare'] = {'methods': methods}
    assert call('--methods', 'scratch') == (0, BOTH[:1])
    methods['second']['force_yml'] = [first]
    assert call('--methods', 'scratch,second') == (0, [('run_second_s1', False)])
    opt['train']['optim_g']['lr'] = 1e-2
    files = sorted(compare.Path('.').rglob('*'))
    capsys.readouterr()
    assert call('--methods', 'scratch,second') == (2, [])
    assert 'run_second_s1: path.pretrain_network_g = experiments/run_scratch_s1/' in (said := capsys.readouterr().err)
    assert 'is of run_scratch_s1, which this comparison trains, too' in said
    assert sorted(compare.Path('.').rglob('*')) == files
    # The first stage by itself, then the second, which is another one now.
    assert call('--methods', 'scratch') == (0, BOTH[:1])
    assert call('--methods', 'second') == (0, [('run_second_s1', False)])


@pytest.mark.parametrize(
    'named, count, expected',
    [
        (None, 2, ['0', '1']),
        ('3,5', 2, ['3', '5']),
        ('GPU-aa, GPU-bb', 2, ['GPU-aa', 'GPU-bb']),
        ('MIG-aa,MIG-bb', 1, ['MIG-aa', 'MIG-bb']),
        ('2,-1,3', 1, ['2']),
        ('', 0, []),
        (None, 0, []),
    ],
)
def test_trainings_get_the_gpus_that_the_user_chose(monkeypatch, tmp_path, named, count, expected):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if named is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    assert compare.visible_gpus() == expected
    given = []
    monkeypatch.setattr(compare, 'train', lambda run, env: given.append(env.get('CUDA_VISIBLE_DEVICES')) or (0, ''))
    compare.train_all(plain_runs(tmp_path, ['scratch'], range(4)), jobs=1)
    assert given == [expected[0] if expected else named] * 4


def test_a_crash_is_told_from_its_own_log(monkeypatch, tmp_path):
    (run,) = plain_runs(tmp_path / 'run.yml', ['scratch'], [1])
    run.log.write_text('error: the disk was full, last week\n')
    real = subprocess.run
    for program, code, message in (
        ('raise ValueError("of today")', 1, 'ValueError: of today'),
        ('print("error: a mistake"); print("more"); raise SystemExit(2)', 2, 'a mistake'),
        ('import os; print("iter 3", flush=True); os.kill(os.getpid(), 9)', -9, 'ended by SIGKILL'),
        ('', 130, 'no message'),  # it has stopped before its end, and saved
    ):
        start = [compare.sys.executable, '-c', program]
        with monkeypatch.context() as patch:
            patch.setattr(compare.subprocess, 'run', lambda _, start=start, **more: real(start, **more))
            assert compare.train(run, dict(compare.os.environ)) == (code, f'{message} (all of it: {run.log})')
    assert run.log.read_text().startswith('error: the disk was full')


def test_what_trains_is_shown(monkeypatch, tmp_path, capsys):
    (run,) = plain_runs(tmp_path / 'run.yml', ['scratch'], [1])
    metrics = run.folder / 'metrics.jsonl'
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"iter": 5, "time": 1.0}\n')  # of a process before this one
    os.utime(metrics, (1, 1))
    monkeypatch.setattr(compare, '_LINE', -1)
    live = compare.Live()
    live.begin(run, 'training')
    live.show()
    run.options['train']['total_iter'] = 4000
    with open(metrics, 'a') as file:
        file.write('{"iter": 1200, "time": 2.0}\n{"iter": 1200, "validation": {"Set": {"psnr": 30.0}}}\n{"ite')
    os.utime(metrics)
    live.show()
    live.end(run, 'scratch1: done')
    live.show()
    assert capsys.readouterr().out.splitlines() == [
        f'scratch1: training; log: {run.log}',
        'scratch1 starts',
        'scratch1 1,200 of 4,000, 1 h 33 min left',
        'scratch1: done',
    ]


def test_a_training_that_fails_ends_the_comparison(capsys, monkeypatch):
    opt = dckd_run(compare.Path('.'))
    write(opt)
    monkeypatch.setattr(compare, 'train', lambda run, environment: (2, 'the disk is full'))
    assert compare.main(['-opt', 'opt.yml', '--methods', 'scratch,dckd', '--seeds', '1']) == 2
    assert 'error: run_scratch_s1: the disk is full' in capsys.readouterr().err


def test_every_method_names_blocks_that_exist():
    known = option_keys.DCKDTrain.model_fields
    assert all(
        block in known and block in option_keys.DROP_IN_LOSSES for used in compare.METHODS.values() for block in used
    )

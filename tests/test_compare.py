"""Comparisons of methods: what each run is, what the tables say of given scores, and one small comparison whole."""

import csv
import json
import statistics

import pytest
import torch
from option_files import dckd
from small_run import dckd_run, write

from dckd_sr import compare, option_keys, options
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
    'scratch': {('Set5', 'psnr'): [30.0, 30.2], ('Set5', 'ssim'): [0.85, 0.85]},
    'logits': {('Set5', 'psnr'): [30.1, 30.4], ('Set5', 'ssim'): [0.86, 0.87]},
    'dckd': {('Set5', 'psnr'): [30.3, 30.2], ('Set5', 'ssim'): [0.84, 0.85]},
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


def test_one_seed_has_no_spread_and_one_method_no_best(tmp_path):
    runs = [compare.Run('dckd', 1, {'name': 'd', 'train': {'total_iter': 7}}, tmp_path)]
    path = compare.write_tables(tmp_path, {'dckd': {('Set5', 'psnr'): [30.0]}}, {}, runs)[0]
    assert '| DCKD | 30.00 |' in path.read_text(encoding='utf-8')


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

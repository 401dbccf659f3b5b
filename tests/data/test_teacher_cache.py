import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from small_run import dckd_run, edsr, write

from dckd_sr import options, prepare, train
from dckd_sr.data import build_train_loader, lmdb_maker, teacher_cache
from dckd_sr.errors import UserError
from dckd_sr.models.kd_model import KDModel

ROOT = Path(__file__).resolve().parents[2]
CACHE = 'datasets:train:teacher_cache=cache.lmdb'


def nearest(lq, scale=2):
    """A teacher whose output is known wherever a patch was cut out and however it was turned."""
    return lq.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def image_options(**changed):
    data = {'name': 'four', 'type': 'SRImageDataset', 'phase': 'train', 'scale': 2, 'gt_size': 32}
    data.update({'dataroot_gt': 'HR', 'dataroot_lq': 'LR', **changed})
    return {key: value for key, value in data.items() if value is not None}


def make(kind='uint8', run=nearest, record=None, folder='cache.lmdb', **changed):
    """A cache of the run's images."""
    dataset = build_dataset({**image_options(**changed), 'phase': 'val'})
    teacher_cache.write(folder, {'format': kind, **(record or {})}, dataset, run)
    return dataset


def lmdbs():
    for name in ('HR', 'LR'):
        assert prepare.main(['lmdb', name, f'{name}.lmdb', '--workers', '1']) == 0
    return {'dataroot_gt': 'HR.lmdb', 'dataroot_lq': 'LR.lmdb', 'io_backend': {'type': 'lmdb'}}


def paired(folder):
    """GT as small as LQ, as in deblurring."""
    dckd_run(folder)
    return {'type': 'Dataset_PairedImage', 'scale': 1, 'dataroot_gt': 'LR', 'gt_size': 16}


def test_a_cache_is_not_begun_on_pairs_of_another_scale(run_options, capsys):
    run_options['datasets']['train'].update(dataroot_lq='HR', dataroot_gt='HR')
    assert prepare.main(['teacher_cache', '-opt', write(run_options)]) == 2
    said = capsys.readouterr().err
    assert 'error: dataset train: 4 of 4 pairs: sizes do not match at scale 2: HR/0.png is 48x48' in said
    assert not list(Path('.').glob('*.lmdb')) and not list(Path('.').glob('.cache*'))


@pytest.fixture
def run_options(tmp_path):
    """Options of a run that reads the four images by SRImageDataset."""
    opt = dckd_run(tmp_path)
    opt['datasets']['train'].update(type='SRImageDataset', teacher_cache='cache.lmdb')
    return opt


@pytest.mark.parametrize('kind', teacher_cache.FORMATS)
@pytest.mark.parametrize(
    'changed',
    [
        lambda folder: {},
        lambda folder: {'cache': 'ram'},
        lambda folder: {'dataroot_lq': None},
        lambda folder: lmdbs(),
        paired,
        lambda folder: {**paired(folder), 'gt_size': 40},
    ],
    ids=['disk', 'ram', 'made LQ', 'lmdb', 'paired', 'paired, mirrored'],
)
def test_patches_of_the_teacher_belong_to_those_of_lq_and_gt(tmp_path, kind, changed):
    """The same random state gives the same LQ and GT with the cache and without it."""
    dckd_run(tmp_path)
    changed = changed(tmp_path)
    scale = changed.get('scale', 2)
    make(kind, lambda lq: nearest(lq, scale), **changed)
    plain = build_dataset(image_options(**changed))
    cached = build_dataset(image_options(**changed, teacher_cache='cache.lmdb'))
    seen = set()
    for seed, index in itertools.product(range(12), range(4)):
        random.seed(seed)
        without = plain[index]
        random.seed(seed)
        sample = cached[index]
        assert sample.keys() == {*without, 'teacher'} and 'teacher' not in without
        assert torch.equal(sample['lq'], without['lq']) and torch.equal(sample['gt'], without['gt'])
        assert sample['teacher'].shape == sample['gt'].shape and sample['teacher'].dtype == torch.float32
        expected = nearest(sample['lq'], scale)
        torch.testing.assert_close(sample['teacher'], expected, rtol=0, atol=0 if kind == 'uint8' else 2**-12)
        seen.add(sample['lq'].numpy().tobytes())
    assert len(seen) >= 20  # crops and turns differ


def test_values_beyond_black_and_white(tmp_path):
    dckd_run(tmp_path)
    for kind, expected in (('uint8', [0, 128 / 255, 1]), ('float16', [-0.25, 0.5, 1.5])):
        values = torch.tensor([-0.25, 0.5, 1.5])[:, None, None]  # R, G, B
        make(kind, lambda lq, values=values: values.expand(3, 48, 48), folder=f'{kind}.lmdb')
        teacher = build_dataset(image_options(teacher_cache=f'{kind}.lmdb'))[0]['teacher']
        assert teacher[:, 3, 5].tolist() == torch.tensor(expected).tolist() and teacher.std((1, 2)).max() == 0


def test_validation_has_no_teacher(tmp_path):
    dckd_run(tmp_path)
    assert 'teacher' not in build_dataset(image_options(teacher_cache='none', phase='val'))[0]


def test_the_command(run_options, capsys):
    """The cache holds what network_t makes of whole images, and the training takes it from there."""
    write(run_options)
    assert train.main(['-opt', 'opt.yml']) == 2
    error = 'error: datasets.train: cache.lmdb is not there; make it: python -m dckd_sr.prepare teacher_cache -opt FILE'
    assert capsys.readouterr().err.splitlines()[-1] == error

    command = ['teacher_cache', '-opt', 'opt.yml', '--format', 'float16']
    assert prepare.main(command) == 0
    assert 'cache.lmdb: 4 images as float16, ' in capsys.readouterr().out
    assert prepare.main(command) == 0
    assert capsys.readouterr().out.endswith('cache.lmdb: 4 images, was ready\n')
    assert prepare.main(command[:-2]) == 2
    assert 'made with format float16, not uint8: remove it, or name another' in capsys.readouterr().err

    teacher = build_network(edsr(16))
    teacher.load_state_dict(torch.load('teacher.pth')['params'])
    block = {**run_options['datasets']['train'], 'phase': 'train', 'scale': 2, 'gt_size': 48}
    dataset = build_dataset({**block, 'use_hflip': False, 'use_rot': False})
    for index in range(4):
        with torch.no_grad():
            expected = teacher(dataset[index]['lq'][None])[0]
        torch.testing.assert_close(dataset[index]['teacher'], expected, rtol=2**-11, atol=1e-6)
    assert train.main(['-opt', 'opt.yml']) == 0
    assert Path('experiments/run/models/net_g_latest.pth').is_file()


def test_self_ensemble_and_tiles(run_options):
    """Both are options of the command's inference; the mean over 8 turns does not depend on a turn of the image."""
    write(run_options)
    tiles = ['val:tile_size=16', 'val:tile_overlap=8']
    kinds = {'plain': [], 'tiles': tiles, 'mean': []}
    outputs = {}
    for name, force in kinds.items():
        command = ['teacher_cache', '-opt', 'opt.yml', '--format', 'float16', '--force_yml']
        command += [*force, f'datasets:train:teacher_cache={name}.lmdb']
        assert prepare.main(command + ['--self_ensemble'] * (name == 'mean')) == 0
        outputs[name] = teacher_cache.TeacherCache(f'{name}.lmdb').read(1, (48, 48, 3)).astype(np.float32)
    assert 0 < np.abs(outputs['plain'] - outputs['tiles']).max() < 0.01
    opt, _ = options.load('opt.yml')
    plain, mean = (teacher_cache._runner(opt, ensemble) for ensemble in (False, True))
    lq = build_dataset(image_options(phase='val'))[1]['lq']
    np.testing.assert_allclose(outputs['mean'], mean(lq).flip(0).permute(1, 2, 0), rtol=2**-11, atol=1e-6)
    torch.testing.assert_close(mean(lq.flip(-1)).flip(-1), mean(lq))
    assert (plain(lq.flip(-1)).flip(-1) - plain(lq)).abs().max() > 1e-3


def change_weights(opt):
    torch.manual_seed(2)
    torch.save({'params': build_network(edsr(16)).state_dict()}, 'teacher.pth')


def change_image(opt):
    Path('LR/2.png').write_bytes(Path('LR/1.png').read_bytes())


def change_names(opt):
    for folder in ('HR', 'LR'):
        Path(folder, '1.png').rename(f'{folder}/1b.png')


def remove_image(opt):
    for folder in ('HR', 'LR'):
        Path(folder, '3.png').unlink()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (change_weights, 'made with other weights of the teacher (sha256 '),
        (lambda opt: opt['network_t'].update(res_scale=0.5), 'made with network_t.res_scale None, not 0.5'),
        (lambda opt: opt['path'].update(param_key_t='params'), 'made with param_key_t None, not params'),
        (change_image, 'made of another 2.png ('),
        (change_names, 'made of other images (1.png, not 1b.png)'),
        (remove_image, 'made of 4 images, not 3'),
        (lambda opt: opt['datasets']['train'].pop('dataroot_lq'), 'made with lq_convention None, not uint8'),
    ],
)
def test_another_teacher_or_other_images_are_refused(run_options, capsys, change, message):
    write(run_options)
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 0
    change(run_options)
    write(run_options)
    start = f'error: datasets.train.teacher_cache = cache.lmdb: {message}'
    capsys.readouterr()
    assert train.main(['-opt', 'opt.yml']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(start) and error.endswith('; name another and make it'), error
    assert not Path('experiments').exists()
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 2
    assert f'error: cache.lmdb exists, {message}' in capsys.readouterr().err


def test_a_dataset_that_does_not_read_it(run_options):
    run_options['datasets']['train']['type'] = 'PairedImageDataset'
    with pytest.raises(UserError, match='PairedImageDataset does not read it; SRImageDataset does'):
        build_train_loader(run_options, 1)


def test_an_interrupted_command_continues(tmp_path, monkeypatch):
    dckd_run(tmp_path)
    monkeypatch.setattr(teacher_cache, '_SECONDS', -1)
    calls = []

    def interrupted(lq):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return nearest(lq)

    def rest(lq):
        calls.append(2)
        return nearest(lq)

    record = {'scale': 2}
    with pytest.raises(KeyboardInterrupt):
        make(run=interrupted, record=record)
    assert not Path('cache.lmdb').exists() and os.listdir('.cache.lmdb.tmp')
    make(run=rest, record=record)
    assert calls == [1, 1, 2, 2] and not Path('.cache.lmdb.tmp').exists()
    sample = build_dataset(image_options(teacher_cache='cache.lmdb'))[0]
    assert torch.equal(sample['teacher'], nearest(sample['lq']))

    calls.clear()  # a half of another cache is of no use
    with pytest.raises(KeyboardInterrupt):
        make(run=interrupted, record=record, folder='other.lmdb')
    make(run=rest, record={'scale': 3}, folder='other.lmdb')
    assert calls == [1, 1, 2, 2, 2, 2]


def test_a_killed_command_continues(run_options):
    """The process dies in the middle of the third image; what it had written is complete, and its name is not there."""
    write(run_options)
    code = """if True:
        import os, signal, sys
        from dckd_sr import prepare
        from dckd_sr.data import teacher_cache
        runner, teacher_cache._SECONDS, left = teacher_cache._runner, -1, iter(range(2))

        def mortal(*arguments):
            run = runner(*arguments)
            return lambda lq: run(lq) if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL)

        teacher_cache._runner = mortal
        prepare.main(['teacher_cache', '-opt', 'opt.yml'])
    """
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path('cache.lmdb').exists()
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 0
    # The same as one that was never killed.
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml', '--force_yml', CACHE.replace('cache.lmdb', 'b.lmdb')]) == 0
    first, second = (teacher_cache.TeacherCache(folder) for folder in ('cache.lmdb', 'b.lmdb'))
    for index in range(4):
        assert np.array_equal(first.read(index, (48, 48, 3)), second.read(index, (48, 48, 3)))


def test_more_than_the_first_map_holds(tmp_path, monkeypatch):
    dckd_run(tmp_path)
    monkeypatch.setattr(lmdb_maker, 'MAP_SIZE', 2**15)  # one image has 6912 bytes
    make()
    sample = build_dataset(image_options(teacher_cache='cache.lmdb'))[3]
    assert torch.equal(sample['teacher'], nearest(sample['lq']))


def test_damage_is_named(tmp_path):
    dckd_run(tmp_path)
    make()
    with pytest.raises(UserError, match='not finite: LR/0.png'):
        make(run=lambda lq: nearest(lq) / 0, folder='nan.lmdb')
    with pytest.raises(UserError, match='cache.lmdb: image 1 has another size than its GT'):
        teacher_cache.TeacherCache('cache.lmdb').read(1, (48, 44, 3))
    with pytest.raises(UserError, match="cache.lmdb has no key '00000004'"):
        teacher_cache.TeacherCache('cache.lmdb').read(4, (48, 48, 3))
    for content in (b'{', b'[]', b'{"format": "int4"}', b'\xff'):
        Path('cache.lmdb/teacher_cache.json').write_bytes(content)
        with pytest.raises(UserError, match='teacher_cache.json is damaged'):
            build_dataset(image_options(teacher_cache='cache.lmdb'))
    with pytest.raises(UserError, match='HR is no teacher cache; make it: python -m dckd_sr.prepare teacher_cache'):
        build_dataset(image_options(teacher_cache='HR'))
    Path('file').write_text('')
    with pytest.raises(UserError, match='cannot write file/cache.lmdb'):
        make(folder='file/cache.lmdb')


def test_workers_read_what_the_main_process_opened(run_options):
    write(run_options)
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 0
    opt, _ = options.load('opt.yml')
    reference = list(itertools.islice(build_train_loader(opt, 1)[0], 6))
    opt['datasets']['train']['num_worker_per_gpu'] = 2
    for batch, expected in zip(build_train_loader(opt, 1)[0], reference):
        assert torch.equal(batch['teacher'], expected['teacher']) and batch['gt_path'] == expected['gt_path']


def test_models_take_it_in_the_teachers_place(run_options):
    """l_ts is the distance to the cached output, and the teacher itself does not run."""
    write(run_options)
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 0
    opt, _ = options.load('opt.yml')
    batch = next(iter(build_train_loader(opt, 1)[0]))
    for kind in ('KDModel', 'DCKDModel'):
        opt, _ = options.load('opt.yml')
        model = train.build({**opt, 'model_type': kind})
        assert isinstance(model, KDModel)
        layers = dict(model.net_t._modules)
        model.net_t._modules.clear()  # it cannot run
        model.feed_data(batch)
        terms = model.terms(1)
        expected = (model.net_g(batch['lq']) - batch['teacher']).abs().mean()
        torch.testing.assert_close(terms['l_ts'], expected)
        assert ('l_cl' in terms) == (kind == 'DCKDModel')
        model.net_t._modules.update(layers)
        model.feed_data({'lq': batch['lq'], 'gt': batch['gt']})
        assert not torch.equal(model.terms(1)['l_ts'], expected)


def test_the_record_says_what_it_was_made_of(run_options):
    write(run_options)
    assert prepare.main(['teacher_cache', '-opt', 'opt.yml']) == 0
    record = json.loads(Path('cache.lmdb/teacher_cache.json').read_text())
    sizes = [[f'{index}.png', os.path.getsize(f'LR/{index}.png')] for index in range(4)]
    assert record['images'] == sizes and record['scale'] == 2 and record['network_t'] == run_options['network_t']
    assert record['format'] == 'uint8' and record['self_ensemble'] is False and len(record['weights']) == 64


def test_an_image_of_the_same_size_in_its_place_is_another_one(run_options, capsys):
    """As uncompressed files are, whatever they show."""
    for path in sorted(Path('LR').iterdir()):
        cv2.imwrite(str(path.with_suffix('.bmp')), cv2.imread(str(path)))
        path.unlink()
    write(run_options)
    command = ['teacher_cache', '-opt', 'opt.yml']
    assert prepare.main(command) == 0 and prepare.main(command) == 0
    image = cv2.imread('LR/1.bmp')
    cv2.imwrite('LR/1.bmp', 255 - image)
    capsys.readouterr()
    assert prepare.main(command) == 2
    assert 'cache.lmdb exists, made of images with another content' in capsys.readouterr().err
    assert train.main(['-opt', 'opt.yml']) == 2
    assert 'made of images with another content' in capsys.readouterr().err
    cv2.imwrite('LR/1.bmp', image)
    record = Path('cache.lmdb/teacher_cache.json')
    content = json.loads(record.read_text())
    del content['content']  # of an earlier version
    record.write_text(json.dumps(content))
    assert prepare.main(command) == 0

"""The demo from end to end in few steps, with the weights that the repository ships, and what its pictures rest on."""

import hashlib
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage

from dckd_sr import demo, options, train
from dckd_sr.data.sr_image_dataset import SRImageDataset
from dckd_sr.evaluation import score
from dckd_sr.ops.history import update_interval

STEPS = 8


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One short demo: folder, what it printed, and per run the weights it started from and the batches it saw."""
    folder, seen, printed = tmp_path_factory.mktemp('demo'), {}, []
    build = train.build_model

    def build_and_watch(opt):
        model = build(opt)
        start = digest(model.net_g.state_dict().values())
        record = seen.setdefault(opt['name'], {'start': start, 'batches': []})
        if opt['is_train']:
            feed = model.feed_data

            def feed_and_watch(data):
                if model.net_g.training and len(data['lq']) > 1:
                    record['batches'].append(digest([data['lq'], data['gt']]))
                feed(data)

            model.feed_data = feed_and_watch
            record['model'] = model
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, 'build_model', build_and_watch)
        patch.setattr(demo, 'modcrop', lambda image, _: image[80:240, 120:320])  # a part is enough here
        patch.setattr('builtins.print', lambda *parts, **_: printed.append(' '.join(map(str, parts))))
        code = demo.main(['--steps', str(STEPS)])
    return code, folder, '\n'.join(printed), seen


def digest(tensors):
    return hashlib.sha256(b''.join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def test_ends_well_and_prints_files_that_exist(finished):
    code, folder, printed, _ = finished
    assert code == 0, printed
    written = [line.strip() for line in printed.split('Written:')[1].splitlines() if line.strip()]
    assert [Path(line).name for line in written] == [
        'results.md',
        'results.csv',
        'results.json',
        'curve.png',
        'crops.png',
    ]
    for line in written:
        assert (folder / line).stat().st_size > 100


def test_table_compares_the_four_on_the_held_out_photographs(finished):
    _, folder, printed, _ = finished
    results = json.loads((folder / 'results/demo/results.json').read_text(encoding='utf-8'))['results']
    assert list(results) == ['bicubic', 'scratch', 'DCKD', 'teacher']
    for name, sets in results.items():
        ((_, entry),) = sets.items()
        assert sorted(row['image'] for row in entry['images']) == ['chelseax4', 'coffeex4', 'rocketx4'], name
        assert re.search(rf'{name} .*{entry["means"]["psnr"]:.2f}', printed)
    means = {name: next(iter(sets.values()))['means']['psnr'] for name, sets in results.items()}
    assert means['teacher'] > means['bicubic'] > 25
    for name, run in (('scratch', 'demo_scratch'), ('DCKD', 'demo_distill')):
        tested = json.loads((folder / 'results' / run / 'results.json').read_text(encoding='utf-8'))['results']
        assert means[name] == next(iter(tested['student'].values()))['means']['psnr']
    assert means['DCKD'] != means['scratch']


def test_bicubic_row_is_matlabs_bicubic_of_the_files(finished):
    _, folder, _, _ = finished
    results = json.loads((folder / 'results/demo/results.json').read_text(encoding='utf-8'))['results']
    rows = {row['image']: row['psnr'] for row in next(iter(results['bicubic'].values()))['images']}
    hr = cv2.imread(str(folder / 'datasets/demo/test/HR/coffee.png'))
    lr = cv2.imread(str(folder / 'datasets/demo/test/LR_bicubic/X4/coffeex4.png'))
    # OpenCV's kernel has a = -0.75 and MATLAB's -0.5: a few tenths apart, where nearest or no enlargement is decibels.
    near = cv2.resize(lr, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': 4, 'test_y_channel': True}}
    assert rows['coffeex4'] == pytest.approx(score(near, hr, metric)['psnr'], abs=0.4)


def test_both_students_start_alike_and_see_the_same_batches(finished):
    *_, seen = finished
    scratch, distill = seen['demo_scratch'], seen['demo_dckd']
    assert scratch['start'] == distill['start']
    assert len(scratch['batches']) == STEPS and len(set(scratch['batches'])) == STEPS
    assert scratch['batches'] == distill['batches']
    assert getattr(scratch['model'], 'net_t', None) is None and distill['model'].net_t is not None


def test_distils_with_every_term(finished):
    *_, seen = finished
    assert set(seen['demo_dckd']['model'].log_dict) >= {'l_pix', 'l_ts', 'l_cl', 'l_ce'}
    assert set(seen['demo_scratch']['model'].log_dict) == {'l_pix'}


def test_history_follows_at_least_twenty_times_in_the_default_run(monkeypatch, tmp_path):
    runs = {}

    def record(argv):
        runs[Path(argv[1]).stem] = dict(entry.split('=') for entry in argv[3:])
        return 0 if len(runs) == 1 else 2

    monkeypatch.setattr(train, 'main', record)
    monkeypatch.setattr(options, 'load', lambda *_: ({}, []))
    assert demo.main([]) == 2
    steps, step = int(runs['distill']['train:total_iter']), json.loads(runs['distill']['train:step'])
    assert sum(t % update_interval(step, t) == 0 for t in range(1, steps + 1)) >= 20
    assert runs['scratch']['train:total_iter'] == str(steps)


def test_history_of_the_run_moved(finished):
    model = finished[3]['demo_dckd']['model']
    assert digest(model.net_his.state_dict().values()) != finished[3]['demo_dckd']['start']


def test_curve_has_every_validation(finished):
    _, folder, _, _ = finished
    logs = {name: next((folder / 'experiments').glob(f'{name}/train_*.log')) for name in ('demo_scratch', 'demo_dckd')}
    for path in logs.values():
        assert len(re.findall(r'# psnr: ([\d.]+)', path.read_text(encoding='utf-8'))) == STEPS
    picture = cv2.imread(str(folder / 'results/demo/curve.png'))
    assert picture.std() > 5  # not a blank page


def test_crops_show_all_columns(finished):
    _, folder, _, _ = finished
    picture = cv2.imread(str(folder / 'results/demo/crops.png'))
    height, width = picture.shape[:2]
    # Five columns and three rows, each with a photograph in it.
    for row in np.array_split(picture, 3):
        for cell in np.array_split(row, 5, axis=1):
            assert cell.std() > 10
    assert height > 400 and width > 800


def test_photographs(tmp_path):
    demo.make_photographs(tmp_path / 'demo')
    parts = {part: {p.name for p in (tmp_path / 'demo' / part / 'HR').iterdir()} for part in ('train', 'test')}
    assert len(parts['train']) >= 4 and len(parts['test']) >= 3 and not parts['train'] & parts['test']
    for part, names in parts.items():
        for name in names:
            hr = cv2.imread(str(tmp_path / 'demo' / part / 'HR' / name))
            lr = cv2.imread(str(tmp_path / 'demo' / part / 'LR_bicubic' / 'X4' / name.replace('.png', 'x4.png')))
            assert hr.shape[0] == 4 * lr.shape[0] and hr.shape[1] == 4 * lr.shape[1]
            source = next((Path(skimage.__file__).parent / 'data').glob(f'{Path(name).stem}.*'))
            photograph = cv2.imread(str(source))[: hr.shape[0], : hr.shape[1]]
            assert np.array_equal(photograph, hr), name
    # The LR files are what the dataset makes when there are none.
    opt = {'phase': 'val', 'scale': 4, 'dataroot_gt': str(tmp_path / 'demo/test/HR')}
    given = SRImageDataset({**opt, 'dataroot_lq': str(tmp_path / 'demo/test/LR_bicubic/X4'), 'filename_tmpl': '{}x4'})
    for one, other in zip(given, SRImageDataset(opt)):
        assert np.array_equal(one['lq'], other['lq'])


def test_the_crop_is_where_most_was_gained():
    hr = np.zeros((60, 80, 3), np.uint8)
    before, after = hr.copy(), hr.copy()
    before[30:40, 50:60] = 90  # repaired
    before[5:15, 5:15] = after[5:15, 5:15] = 200  # stays wrong
    rows, columns = demo.most_gained(hr, before, after, 10)
    assert (rows.start, columns.start) == (30, 50) and (rows.stop, columns.stop) == (40, 60)


def test_mistakes_are_told_in_a_line(capsys, monkeypatch):
    assert demo.main(['--steps', '1']) == 2
    assert capsys.readouterr().err.startswith('error: --steps 1')
    monkeypatch.setitem(demo.PHOTOGRAPHS, 'test', ('no-such.png',))
    assert demo.main(['--steps', '8']) == 2
    assert 'no-such.png is not in this scikit-image' in capsys.readouterr().err

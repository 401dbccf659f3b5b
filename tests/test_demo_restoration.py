"""The demonstrations of deblurring and deraining from end to end, in few steps on parts of few photographs."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from dckd_sr import demo, train
from dckd_sr.evaluation import score


@pytest.fixture(scope='module', params=['deblur', 'derain'])
def finished(request, tmp_path_factory):
    """One short demo: task, folder, what it printed, and per run its model and the weights that it started from."""
    folder, printed, seen = tmp_path_factory.mktemp('demo'), [], {}
    build, train_network = train.build_model, demo.train_network
    quick = ['datasets:train:batch_size_per_gpu=1', 'datasets:train:gt_size=32']

    def build_and_watch(opt):
        model = build(opt)
        seen[opt['name']] = model, [parameter.detach().clone() for parameter in model.net_g.parameters()]
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, 'build_model', build_and_watch)
        patch.setattr(demo, 'modcrop', lambda image, _: image[80:180, 120:220])
        patch.setattr(demo, 'train_network', lambda name, steps, more=(): train_network(name, 8, [*quick, *more]))
        patch.setattr(demo, 'VARIANTS', 2)
        photographs = {'train': demo.PHOTOGRAPHS['train'][:2], 'test': demo.PHOTOGRAPHS['test'][:2]}
        patch.setattr(demo, 'PHOTOGRAPHS', photographs)
        patch.setattr('builtins.print', lambda *parts, **_: printed.append(' '.join(map(str, parts))))
        code = demo.main([request.param, '--steps', '8'])
    assert code == 0, printed
    return request.param, folder, '\n'.join(printed), seen


def test_files_that_it_names_exist(finished):
    task, folder, printed, _ = finished
    written = [line.strip() for line in printed.split('Written:')[1].splitlines() if line.strip()]
    assert [Path(line).name for line in written] == [f'results.{e}' for e in ('md', 'csv', 'json')] + [
        'curve.png',
        'crops.png',
    ]
    for line in written:
        assert Path(line).parent == Path(f'results/demo_{task}') and (folder / line).stat().st_size > 100
    picture = cv2.imread(str(folder / written[-1]))
    for row in np.array_split(picture, 2):
        assert all(cell.std() > 10 for cell in np.array_split(row, 5, axis=1))


def test_table_compares_the_four_and_the_input_is_the_files(finished):
    task, folder, printed, _ = finished
    results = json.loads((folder / f'results/demo_{task}/results.json').read_text(encoding='utf-8'))['results']
    assert list(results) == ['input', 'scratch', 'DCKD', 'teacher']
    metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'test_y_channel': task == 'derain'}}
    images = results['input']['held-out']['images']
    assert [row['image'] for row in images] == ['chelsea_0', 'coffee_0']
    for row in images:
        gt, lq = (
            cv2.imread(str(folder / f'datasets/demo_{task}/test/{kind}/{row["image"]}.png')) for kind in ('gt', 'lq')
        )
        assert row['psnr'] == pytest.approx(score(lq, gt, metric)['psnr'], abs=1e-3)
    for name in results:
        assert re.search(rf'{name} .*{results[name]["held-out"]["means"]["psnr"]:.2f}', printed)


def test_students_start_alike_and_dckd_has_every_term_and_the_trained_teacher(finished):
    task, folder, _, seen = finished
    (scratch, first), (distilled, second) = (seen[f'demo_{task}_{name}'] for name in ('scratch', 'dckd'))
    assert all((one == other).all() for one, other in zip(first, second))
    assert set(scratch.log_dict) == {'l_pix'} and set(distilled.log_dict) >= {'l_pix', 'l_ts', 'l_cl', 'l_ce'}
    teacher = seen[f'demo_{task}_teacher'][0].net_g_ema
    for one, other in zip(teacher.parameters(), distilled.net_t.parameters()):
        assert (one == other).all()


def test_each_photograph_is_damaged_differently(finished):
    task, folder, _, _ = finished
    lq = sorted((folder / f'datasets/demo_{task}/train/lq').iterdir())
    assert len(lq) == 4 and len({path.read_bytes() for path in lq}) == 4
    gt = {path.name: path.read_bytes() for path in (folder / f'datasets/demo_{task}/train/gt').iterdir()}
    assert sorted(gt) == [path.name for path in lq] and len(set(gt.values())) == 2


def test_unknown_task(capsys):
    assert demo.main(['denoise']) == 2
    assert 'deblur' in capsys.readouterr().err

"""The sizes of pairs: one rule for every reader and checker."""

import os

import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset
from PIL import Image

from dckd_sr import prepare
from dckd_sr.data import build_train_loader, build_val_loader, pair_sizes
from dckd_sr.errors import UserError

KINDS = ('SRImageDataset', 'PairedImageDataset', 'RealESRGANPairedDataset')
# scale, GT, LQ (width, height), whether they are a pair
CASES = [
    (2, (48, 48), (24, 24), True),
    (2, (49, 49), (24, 24), True),
    (2, (49, 48), (25, 24), False),  # LQ was rounded up
    (2, (50, 48), (24, 24), False),
    (2, (96, 96), (24, 24), False),  # scale 4
    (2, (48, 48), (48, 48), False),  # scale 1
    (2, (48, 40), (20, 24), False),  # lying on its side
    (3, (50, 50), (16, 16), True),
    (3, (51, 50), (16, 16), False),
    (1, (24, 24), (24, 24), True),
    (1, (24, 24), (24, 23), False),
]


def picture(size, seed=0):
    width, height = size
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(gt, lq, name='a.png', **folders):
    for folder, image in (('gt', picture(gt)), ('lq', picture(lq, 1))):
        os.makedirs(folder, exist_ok=True)
        cv2.imwrite(f'{folder}/{name}', image)


def block(kind='PairedImageDataset', scale=2, **more):
    folders = {'dataroot_gt': 'gt', 'dataroot_lq': 'lq'}
    crop = {'gt_size': 12, 'use_hflip': False, 'use_rot': False, 'io_backend': {'type': 'disk'}}
    return {'name': 'Set', 'type': kind, 'scale': scale, 'phase': 'val', **folders, **crop, **more}


def in_lmdb(kind='PairedImageDataset', **more):
    folders = {'dataroot_gt': 'gt.lmdb', 'dataroot_lq': 'lq.lmdb'}
    return block(kind, io_backend={'type': 'lmdb'}, **folders, **more)


@pytest.mark.parametrize('scale, gt, lq, fits', CASES)
def test_every_reader_and_checker_has_the_same_rule(scale, gt, lq, fits, capsys):
    write(gt, lq)
    for folder in ('gt', 'lq'):
        assert prepare.main(['lmdb', folder, f'{folder}.lmdb', '--workers', '1']) == 0
    answers, sizes = {}, []
    kinds = (*KINDS, 'Dataset_PairedImage') if scale == 1 else KINDS
    blocks = {**{kind: block(kind, scale) for kind in kinds}, 'lmdb': in_lmdb(scale=scale)}
    for name, options in blocks.items():
        for phase in ('train', 'val'):
            try:
                sample = build_dataset({**options, 'phase': phase})[0]
                answers[name, phase] = True
                sizes.append([length / other for length, other in zip(sample['gt'].shape[1:], sample['lq'].shape[1:])])
            except UserError as error:
                answers[name, phase] = False
                files = ('gt.lmdb/a', 'lq.lmdb/a') if name == 'lmdb' else ('gt/a.png', 'lq/a.png')
                assert all(part in str(error) for part in ('dataset Set: ', *files, f'scale {scale}'))
        try:
            build_val_loader({'scale': scale, 'datasets': {'val': options}}, 'val')
            answers[name, 'before'] = True
        except UserError as error:
            answers[name, 'before'] = False
            assert 'dataset Set: ' in str(error)
    capsys.readouterr()
    answers['check'] = prepare.main(['check', 'gt', 'lq', '--scale', str(scale), '--workers', '1']) == 0
    assert set(answers.values()) == {fits}, answers
    assert np.all(np.array(sizes) == scale)


def test_what_a_loader_gives_is_what_basicsr_gives():
    """Its own function, which ours replaces: the same patch and the same image."""
    write((48, 40), (24, 20))
    np.random.seed(0)
    ours, own = build_dataset(block(color='y', mean=[0.5], std=[0.5])), {}
    from basicsr.data import paired_image_dataset

    source = open(paired_image_dataset.__file__).read()
    exec(compile(source[: source.index('@DATASET')] + source[source.index('class ') :], 'own', 'exec'), own)
    theirs = own['PairedImageDataset'](block(color='y', mean=[0.5], std=[0.5]))
    for key in ('lq', 'gt'):
        np.testing.assert_array_equal(ours[0][key], theirs[0][key])


def test_headers_are_looked_at_before_anything_runs_and_all_pairs_are_counted(monkeypatch):
    for number in range(6):
        write((48, 48), (24, 24) if number == 2 else (12, 12), f'{number}.png')
    opt = {'scale': 2, 'datasets': {'val': block()}}
    with pytest.raises(UserError) as caught:
        build_val_loader(opt, 'val')
    pairs = [
        f'sizes do not match at scale 2: gt/{number}.png is 48x48, lq/{number}.png is 12x12 (expected 24x24); '
        'they match at scale 4; '
        for number in (0, 1, 3)
    ]
    assert str(caught.value) == f'dataset Set: 5 of 6 pairs: {"".join(pairs)}and 2 more'
    for number in range(6):
        write((48, 48), (24, 24), f'{number}.png')
    monkeypatch.setattr(pair_sizes, 'decode', lambda *args: pytest.fail('pixels were read'))
    build_val_loader(opt, 'val')


def test_pairs_of_a_file_without_scale_say_so():
    write((48, 48), (24, 24))
    with pytest.raises(UserError, match='they match at scale 2, and scale is 1 where nothing sets it'):
        build_val_loader({'scale': 1, 'datasets': {'val': block(scale=1)}}, 'val')


def test_a_damaged_validation_image_is_named_before_anything_runs():
    write((48, 48), (24, 24))
    with open('lq/a.png', 'wb') as file:
        file.write(b'text')
    with pytest.raises(UserError, match='dataset Set: not an image, or damaged: lq/a.png'):
        build_val_loader({'scale': 2, 'datasets': {'val': block()}}, 'val')


@pytest.mark.parametrize('turned, fits', [('lq', True), ('gt', False)])
def test_a_picture_that_is_stored_on_its_side_counts_as_it_is_seen(turned, fits):
    """LQ fits once it is upright; GT fits in the file and not once it is upright."""
    write((48, 32), (16, 24) if turned == 'lq' else (24, 16), 'a.jpg')
    with Image.open(f'{turned}/a.jpg') as image:
        exif = image.getexif()
        exif[274] = 6
        image.save(f'{turned}/a.jpg', exif=exif)
    opt = {'scale': 2, 'datasets': {'val': block()}}
    if fits:
        assert next(iter(build_val_loader(opt, 'val')))['gt'].shape == (1, 3, 32, 48)
    else:
        with pytest.raises(UserError, match='gt/a.jpg is 32x48, lq/a.jpg is 24x16'):
            build_val_loader(opt, 'val')


def test_a_right_view_of_another_size_is_found_before_anything_runs():
    write((24, 24), (24, 24))
    os.makedirs('right')
    cv2.imwrite('right/a.png', picture((24, 20)))
    options = {**block('Dataset_DefocusDeblur_DualPixel_16bit', 1), 'dataroot_lqL': 'lq', 'dataroot_lqR': 'right'}
    del options['dataroot_lq']
    with pytest.raises(UserError, match=r'dataset Set: sizes .* gt/a\.png is 24x24, right/a\.png is 24x20'):
        build_val_loader({'scale': 1, 'datasets': {'val': options}}, 'val')


def test_datasets_that_read_pairs_in_their_own_way_are_left_alone():
    from basicsr.data.paired_image_dataset import PairedImageDataset

    class Own(PairedImageDataset):
        def __getitem__(self, index):
            return {}

    write((48, 48), (48, 48))
    pair_sizes.check_headers(Own(block()))
    with pytest.raises(UserError):
        pair_sizes.check_headers(PairedImageDataset(block()))


def test_training_cuts_what_the_checker_admits():
    write((49, 49), (24, 24))
    opt = {'scale': 2, 'datasets': {'train': block(phase='train', batch_size_per_gpu=1, num_worker_per_gpu=0)}}
    loader, _ = build_train_loader(opt, 0)
    assert next(iter(loader))['gt'].shape == (1, 3, 12, 12)

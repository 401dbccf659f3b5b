import pickle
import random
import warnings

import cv2
import golden_data
import numpy as np
import pytest
from basicsr.data import build_dataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

import dckd_sr  # noqa: F401
from dckd_sr.errors import UserError
from dckd_sr.ops.resize import imresize

NAMES = ['a', 'b.v2', 'c d']


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def folders(tmp_path):
    """Three GT images, sizes multiples of 4, with their LQ at x4 under other names."""
    (tmp_path / 'gt').mkdir(), (tmp_path / 'lq').mkdir()
    for seed, name in enumerate(NAMES):
        gt = photo(48 + 8 * seed, 64 - 4 * seed, seed)
        cv2.imwrite(str(tmp_path / 'gt' / f'{name}.png'), gt)
        cv2.imwrite(str(tmp_path / 'lq' / f'{name}x4.png'), imresize(gt, 1 / 4))
    return tmp_path


def options(folders, **changed):
    opt = {
        'name': 'photos',
        'type': 'SRImageDataset',
        'phase': 'train',
        'scale': 4,
        'dataroot_gt': str(folders / 'gt'),
        'dataroot_lq': str(folders / 'lq'),
        'filename_tmpl': '{}x4',
        'io_backend': {'type': 'disk'},
        'gt_size': 32,
        'use_hflip': True,
        'use_rot': True,
    }
    opt.update(changed)
    return {key: value for key, value in opt.items() if value is not None}


def build(folders, **changed):
    return build_dataset(options(folders, **changed))


def sample(dataset, index, seed=0):
    random.seed(seed)
    return dataset[index]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_equals_basicsrs_paired_image_dataset(folders, phase):
    """Same random state, same files: the same values and the same paths."""
    ours, theirs = build(folders, phase=phase), build(folders, phase=phase, type='PairedImageDataset')
    assert len(ours) == len(theirs) == 3
    for index in range(3):
        for seed in range(8):
            assert_same(sample(ours, index, seed), sample(theirs, index, seed))
    assert sample(ours, 0)['gt'].shape == ((3, 32, 32) if phase == 'train' else (3, 48, 64))


@pytest.mark.parametrize('convention', ['uint8', 'double'])
@pytest.mark.parametrize('cache', [None, 'ram'])
def test_lq_made_from_gt(folders, convention, cache):
    """The patch of an LQ made on the fly is the patch of MATLAB's whole LQ; lq_path is then the GT's."""
    for name in NAMES:
        gt = cv2.imread(str(folders / 'gt' / f'{name}.png'))
        cv2.imwrite(str(folders / 'lq' / f'{name}x4.png'), imresize(gt, 1 / 4, convention))
    for phase in ('train', 'val'):
        files = build(folders, phase=phase)
        made = build(folders, phase=phase, dataroot_lq=None, lq_convention=convention, cache=cache)
        for index, seed in [(0, 0), (1, 1), (2, 2), (2, 3)]:
            from_files = sample(files, index, seed)
            from_gt = sample(made, index, seed)
            assert from_gt['lq_path'] == from_gt['gt_path'] == from_files['gt_path']
            np.testing.assert_array_equal(from_gt['lq'], from_files['lq'])
            np.testing.assert_array_equal(from_gt['gt'], from_files['gt'])


def test_set5_lq_made_from_gt_equals_matlabs(tmp_path):
    data = golden_data.require_images() / 'Set5'
    opt = {'name': 'Set5', 'type': 'SRImageDataset', 'phase': 'val', 'scale': 3, 'dataroot_gt': str(data / 'HR')}
    lq = {'dataroot_lq': str(data / 'LR_bicubic' / 'X3'), 'filename_tmpl': '{}x3'}
    for ours, theirs in zip(build_dataset(opt), build_dataset({**opt, **lq})):
        np.testing.assert_array_equal(ours['lq'], theirs['lq'])
        np.testing.assert_array_equal(ours['gt'], theirs['gt'])
        assert ours['gt'].shape[1] == 3 * ours['lq'].shape[1] and ours['gt'].shape[2] == 3 * ours['lq'].shape[2]


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_the_cache_holds_what_the_files_hold(folders, dtype):
    """A quarter of the memory that samples would take; what workers share is not written to."""
    for path in folders.glob('*/*.png'):
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(dtype))
    cached = build(folders, cache='ram')
    images = [image for pair in cached._images for image in pair]
    assert {image.dtype for image in images} == {np.dtype(dtype)}
    before = [image.copy() for image in images]
    for seed in range(6):
        sample(cached, seed % 3, seed)
    assert all(np.array_equal(image, old) for image, old in zip(images, before))


def test_augmentation_never_touches_the_cache(folders):
    for lq in (str(folders / 'lq'), None):
        cached, fresh = build(folders, cache='ram', dataroot_lq=lq), build(folders, dataroot_lq=lq)
        for seed in range(12):
            assert_same(sample(cached, 1, seed), sample(fresh, 1, seed))
    flips = build(folders, gt_size=48, use_rot=False), build(folders, gt_size=48, use_hflip=False, use_rot=False)
    results = {(sample(flips[0], 0, s)['gt'] == sample(flips[1], 0, s)['gt']).all().item() for s in range(12)}
    assert results == {True, False}


def write_lmdbs(folders):
    """gt.lmdb and lq.lmdb by BasicSR's own tool."""
    for kind, template in (('gt', '{}'), ('lq', '{}x4')):
        files = [f'{template.format(name)}.png' for name in NAMES]
        make_lmdb_from_imgs(str(folders / kind), str(folders / f'{kind}.lmdb'), files, NAMES, map_size=2**20)


@pytest.mark.parametrize('cache', [None, 'ram'])
def test_lmdb_gives_what_the_folders_give(folders, cache):
    write_lmdbs(folders)
    lmdb = {'dataroot_gt': str(folders / 'gt.lmdb'), 'io_backend': {'type': 'lmdb'}, 'filename_tmpl': None}
    ours = build(folders, **lmdb, dataroot_lq=str(folders / 'lq.lmdb'), cache=cache)
    disk = build(folders)
    assert [p['gt_path'] for p in ours.paths] == NAMES
    for index in range(3):
        a, b = sample(ours, index), sample(disk, index)
        np.testing.assert_array_equal(a['lq'], b['lq'])
        np.testing.assert_array_equal(a['gt'], b['gt'])
    again = pickle.loads(pickle.dumps(ours))  # as it goes to a worker
    np.testing.assert_array_equal(sample(again, 1)['gt'], sample(disk, 1)['gt'])


def test_lq_made_from_an_lmdb_and_basicsrs_keys_with_dots(folders):
    write_lmdbs(folders)
    lmdb = {'dataroot_gt': str(folders / 'gt.lmdb'), 'io_backend': {'type': 'lmdb'}}
    made, disk = build(folders, **lmdb, dataroot_lq=None), build(folders)
    np.testing.assert_array_equal(sample(made, 2)['lq'], sample(disk, 2)['lq'])
    # BasicSR's own dataset cuts such keys at the first dot, unless repaired.
    theirs = build(folders, **lmdb, dataroot_lq=str(folders / 'lq.lmdb'), type='PairedImageDataset')
    np.testing.assert_array_equal(sample(theirs, 1)['gt'], sample(disk, 1)['gt'])


def test_gray_alpha_and_sixteen_bits_become_rgb_in_0_1(folders):
    for path in (folders / 'gt').iterdir():
        path.unlink()
    colour = photo(32, 32)
    deep = colour.astype(np.uint16) * 257
    for name, image in [('1', colour[..., 0]), ('2', np.dstack([colour, colour[..., 0]])), ('3', deep)]:
        cv2.imwrite(str(folders / 'gt' / f'{name}.png'), image)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        gray, alpha, sixteen = build(folders, phase='val', dataroot_lq=None)
    rgb = colour[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_array_equal(gray['gt'], rgb[[2, 2, 2]])
    np.testing.assert_array_equal(alpha['gt'], rgb)
    np.testing.assert_allclose(sixteen['gt'], rgb, atol=1e-7)
    np.testing.assert_allclose(sixteen['lq'], alpha['lq'], atol=1.5 / 255)  # not rounded to 8 bits in between
    assert sixteen['lq'].dtype == alpha['gt'].dtype and sixteen['lq'].shape == (3, 8, 8)


def test_gt_that_is_no_multiple_of_scale(folders):
    """Its rest is cut; an LQ that was rounded up may lie anywhere and is refused."""
    gt = photo(50, 63)
    for path in [*(folders / 'gt').iterdir(), *(folders / 'lq').iterdir()]:
        path.unlink()
    cv2.imwrite(str(folders / 'gt' / 'a.png'), gt)
    cv2.imwrite(str(folders / 'lq' / 'ax4.png'), imresize(gt[:48, :60], 1 / 4))
    out = build(folders, phase='val')[0]
    assert out['gt'].shape == (3, 48, 60) and out['lq'].shape == (3, 12, 15)
    assert sample(build(folders), 0)['lq'].shape == (3, 8, 8)
    cv2.imwrite(str(folders / 'lq' / 'ax4.png'), imresize(gt, 1 / 4))
    with pytest.raises(UserError, match=r'a\.png is 63x50, .*ax4\.png is 16x13 .expected 15x12.; LQ was rounded up'):
        build(folders, phase='val')[0]
    assert build(folders, phase='val', dataroot_lq=None)[0]['gt'].shape == (3, 48, 60)


def test_scale_one_is_for_pairs(folders):
    pairs = {'scale': 1, 'dataroot_lq': str(folders / 'gt'), 'filename_tmpl': None}
    out = sample(build(folders, **pairs), 0)
    np.testing.assert_array_equal(out['lq'], out['gt'])
    cv2.imwrite(str(folders / 'gt' / 'a.png'), photo(48, 63))
    (folders / 'other').mkdir()
    for name in NAMES:
        cv2.imwrite(str(folders / 'other' / f'{name}.png'), photo(48, 64))
    with pytest.raises(UserError, match=r'a\.png is 63x48, .*a\.png is 64x48'):
        build(folders, **{**pairs, 'dataroot_lq': str(folders / 'other')})[0]
    with pytest.raises(UserError, match='scale 1 needs dataroot_lq'):
        build(folders, scale=1, dataroot_lq=None)


def test_meta_info_file_selects_and_orders(folders):
    meta = folders / 'list.txt'
    meta.write_text('c d.png (64,56,3)\na.png (48,64,3)\n')
    dataset = build(folders, meta_info_file=str(meta))
    assert [p['gt_path'] for p in dataset.paths] == [str(folders / 'gt' / f'{name}.png') for name in ('c d', 'a')]
    meta.write_text('a.png (48,64,3)\nmissing.png (48,64,3)\n')
    with pytest.raises(UserError, match='1 images listed in .*missing.png'):
        build(folders, meta_info_file=str(meta))


@pytest.mark.parametrize(
    'changed, message',
    [
        ({'dataroot_gt': None}, 'photos: dataroot_gt is missing'),
        ({'dataroot_gt': 'nowhere'}, 'folder not found: nowhere'),
        ({'filename_tmpl': None}, r"a.png.*filename_tmpl: '\{\}x4'"),
        ({'gt_size': 30}, 'gt_size is a multiple of scale 4, got 30'),
        ({'gt_size': None}, 'gt_size'),
        ({'scale': 2.5}, 'scale is a positive integer'),
        ({'lq_convention': 'matlab'}, 'lq_convention is uint8 or double'),
        ({'cache': 'disk'}, 'cache is ram'),
        ({'io_backend': {'type': 'memcached'}}, 'disk or lmdb'),
        ({'io_backend': {'type': 'lmdb'}}, 'not an LMDB folder'),
    ],
)
def test_wrong_options_are_said_when_built(folders, changed, message):
    with pytest.raises(UserError, match=message):
        build(folders, **changed)


def test_bad_images_are_named(folders):
    with pytest.raises(UserError, match=r'a\.png is 64x48, smaller than gt_size 56'):
        build(folders, gt_size=56)[0]
    with pytest.raises(UserError, match=r'sizes do not match at scale 2: .*a\.png is 64x48, .*ax4\.png is 16x12'):
        build(folders, scale=2)[0]
    with pytest.raises(UserError, match=r'a\.png is 64x48, too small for scale 50'):
        build(folders, phase='val', scale=50, dataroot_lq=None)[0]
    (folders / 'lq' / 'ax4.png').write_bytes(b'broken')
    with pytest.raises(UserError, match=r'damaged: .*ax4\.png'):
        build(folders)[0]
    with pytest.raises(UserError, match=r'damaged: .*ax4\.png'):
        build(folders, cache='ram')

"""Data preparation: what is written equals MATLAB's LR and BasicSR's names, sources stay, a second run continues."""

import copy
import http.server
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset
from PIL import Image

from dckd_sr import prepare
from dckd_sr.data import downloads, jobs
from dckd_sr.data.files import read_lmdb
from dckd_sr.data.sr_image_dataset import SRImageDataset
from dckd_sr.errors import UserError
from dckd_sr.ops.resize import imresize

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'Set5'


def photo(height, width, seed=0, dtype=np.uint8, channels=3):
    """Smooth, so that PNG files are small, and different at every place."""
    rng = np.random.default_rng(seed)
    small = rng.random((height // 8 + 2, width // 8 + 2, channels), np.float32)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return (np.clip(image, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def save(path, image):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def load(path):
    return cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith('.'))


def state(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob('*') if p.is_file()}


def run(*args, code=0, workers=1):
    if args[0] != 'download':
        args = (*args, '--workers', workers)
    assert prepare.main([str(arg) for arg in args]) == code


@pytest.fixture
def hr(tmp_path):
    for seed, (name, size) in enumerate([('a', (50, 61)), ('b.v2', (48, 72)), ('ünï 画', (53, 49))]):
        save(tmp_path / 'in' / f'{name}.png', photo(*size, seed))
    return tmp_path / 'in'


# --------------------------------------------------------------------------------------------------------------- sr


@pytest.mark.skipif(not REAL.is_dir(), reason='no shared/data/Set5')
def test_lr_equals_matlabs(tmp_path):
    run('sr', REAL / 'HR', tmp_path / 'out', '--copy')
    for scale in (2, 3, 4):
        folder = REAL / 'LR_bicubic' / f'X{scale}'
        assert names(tmp_path / 'out' / 'LR_bicubic' / f'X{scale}') == names(folder)
        for path in folder.iterdir():
            assert np.array_equal(load(tmp_path / 'out' / 'LR_bicubic' / f'X{scale}' / path.name), load(path)), path


def test_sr_standard_layout(hr, tmp_path, capsys):
    before = state(hr)
    run('sr', hr, 'out', '--scales', 3, 2)
    assert 'LR at x2, x3 of 3 images\n' in capsys.readouterr().out
    assert names('out/HR') == names(hr) and names('out/LR_bicubic') == ['X2', 'X3']
    for name, (height, width) in [('a', (50, 61)), ('b.v2', (48, 72)), ('ünï 画', (53, 49))]:
        assert Path(f'out/HR/{name}.png').read_bytes() == (hr / f'{name}.png').read_bytes()
        expected = imresize(load(hr / f'{name}.png')[: height // 3 * 3, : width // 3 * 3], 1 / 3)
        assert np.array_equal(load(f'out/LR_bicubic/X3/{name}x3.png'), expected)
    assert state(hr) == before
    opt = {'scale': 3, 'dataroot_gt': 'out/HR', 'dataroot_lq': 'out/LR_bicubic/X3', 'filename_tmpl': '{}x3'}
    assert [tuple(s['lq'].shape[1:]) for s in SRImageDataset({**opt, 'phase': 'val'})] == [(16, 20), (16, 24), (17, 16)]


def test_sr_basicsr_layout_is_what_basicsr_reads(hr):
    run('sr', hr, 'out', '--scales', 2, 4, '--layout', 'basicsr')
    assert names('out') == ['GTmod12', 'LRbicx2', 'LRbicx4'] and names('out/LRbicx4') == names(hr)
    assert load('out/GTmod12/a.png').shape == (48, 60, 3)
    opt = {'phase': 'train', 'scale': 4, 'dataroot_gt': 'out/GTmod12', 'dataroot_lq': 'out/LRbicx4', 'gt_size': 48}
    dataset = PairedImageDataset({**opt, 'io_backend': {'type': 'disk'}, 'use_hflip': False, 'use_rot': False})
    assert len(dataset) == 3 and dataset[0]['lq'].shape == (3, 12, 12)


def test_sr_in_place_writes_no_hr(hr):
    hr.rename(hr.parent / 'HR')
    before = state('HR')
    run('sr', 'HR', '.', '--scales', 2)
    assert state('HR') == before and names('LR_bicubic/X2') == ['ax2.png', 'b.v2x2.png', 'ünï 画x2.png']


def test_sr_of_every_kind_of_image(tmp_path, capsys):
    colour, deep = photo(24, 24), photo(24, 24, dtype=np.uint16)
    save('in/gray.png', colour[..., 0])
    save('in/deep.png', deep)
    save('in/rgba.png', np.dstack([colour, colour[..., 0]]))
    save('in/photo.jpg', colour)
    Image.fromarray(colour).convert('P').save('in/palette.png')
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(colour[:20, :, ::-1]).save('in/turned.png', exif=exif)
    Image.fromarray(colour[..., ::-1]).save(
        'in/moving.png', save_all=True, append_images=[Image.fromarray(255 - colour)]
    )
    Image.new('CMYK', (24, 24), (9, 50, 90, 3)).save('in/print.jpg')
    run('sr', 'in', 'out', '--scales', 2)
    assert np.array_equal(load('out/LR_bicubic/X2/grayx2.png'), imresize(colour[..., 0], 0.5))
    assert np.array_equal(load('out/LR_bicubic/X2/deepx2.png'), imresize(deep, 0.5))
    assert np.array_equal(load('out/LR_bicubic/X2/rgbax2.png'), imresize(colour, 0.5))
    assert np.array_equal(load('out/HR/rgba.png'), colour), 'alpha dropped, as in the LR'
    assert np.array_equal(load('out/HR/photo.png'), load('in/photo.jpg'))
    assert np.array_equal(load('out/LR_bicubic/X2/palettex2.png'), imresize(load('in/palette.png'), 0.5))
    # What other programs would read otherwise is written anew.
    assert np.array_equal(load('out/HR/turned.png'), np.rot90(colour[:20], -1))
    assert np.array_equal(load('out/HR/moving.png'), colour) and b'acTL' not in Path('out/HR/moving.png').read_bytes()
    out = capsys.readouterr().out
    assert 'alpha channel dropped, colours as stored: rgba.png\n' in out
    assert 'the first of 2 frames: moving.png\n' in out
    assert 'CMYK became sRGB without a profile, so its colours are approximate: print.jpg\n' in out


def test_unfit_images_are_named_and_the_others_made(capfd, tmp_path):
    save('in/good.png', photo(24, 24))
    save('in/tiny.png', photo(24, 24)[:3])
    save('in/floats.tiff', np.ones((24, 24, 3), np.float32))
    content = cv2.imencode('.jpg', photo(24, 24))[1].tobytes()
    # A header that holds a thumbnail, with an end of its own.
    thumbnail = b'\xff\xe1' + (len(content) + 2).to_bytes(2, 'big') + content
    Path('in/whole.jpg').write_bytes(content[:2] + thumbnail + content[2:])
    Path('in/cut.jpg').write_bytes(content[:2] + thumbnail + content[2:-200])
    broken = bytearray(cv2.imencode('.png', photo(24, 24))[1].tobytes())
    broken[len(broken) // 2] ^= 255  # libpng has its own words for it
    Path('in/broken.png').write_bytes(broken)
    Path('in/text.png').write_text('hello')
    Path('in/empty.png').write_bytes(b'')
    run('sr', 'in', 'out', '--scales', 4, code=1, workers=2)
    out, problems = capfd.readouterr()
    damage = next(line for line in problems.splitlines() if 'broken.png' in line)
    assert damage.startswith('not an image, or damaged: in/broken.png: libpng error: ')
    assert problems.splitlines() == [
        'empty file: in/empty.png',
        'in/floats.tiff has float32 values; 8 or 16 bit images are needed',
        damage,
        'not an image, or damaged: in/text.png',
        'too small: in/tiny.png is 24x3, at least 4 pixels are needed',
        'truncated file: in/cut.jpg',
    ]
    assert 'of 2 images; 6 problems' in out
    assert names('out/LR_bicubic/X4') == ['goodx4.png', 'wholex4.png'] and names('out/HR') == ['good.png', 'whole.png']


# ------------------------------------------------------------------------------------------------- runs that go on


def test_second_run_does_nothing_and_a_changed_source_is_done_again(hr, capsys):
    run('sr', hr, 'out', '--scales', 2)
    before = state('out')
    run('sr', hr, 'out', '--scales', 2)
    assert state('out') == before and '3 were ready' in capsys.readouterr().out
    save('new.png', photo(50, 61, seed=9))
    os.replace('new.png', hr / 'a.png')
    Path('out/LR_bicubic/X2/b.v2x2.png').unlink()
    run('sr', hr, 'out', '--scales', 2)
    assert '1 were ready' in capsys.readouterr().out
    assert np.array_equal(load('out/HR/a.png'), photo(50, 61, seed=9))
    assert np.array_equal(load('out/LR_bicubic/X2/ax2.png'), imresize(load(hr / 'a.png')[:, :60], 0.5))
    assert Path('out/LR_bicubic/X2/b.v2x2.png').exists()


def test_other_files_are_never_overwritten(hr, capsys):
    save('out/LR_bicubic/X2/ax2.png', photo(5, 5))
    save('out/HR/b.v2.png', photo(48, 72, seed=7))
    save('out/LR_bicubic/X2/ünï 画x2.png', imresize(load(hr / 'ünï 画.png')[:52, :48], 0.5))
    before = state('out')
    run('sr', hr, 'out', '--scales', 2, code=1)
    problems = capsys.readouterr().err.splitlines()
    assert len(problems) == 2 and all('exists and differs' in problem for problem in problems)
    after = state('out')
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.parametrize(
    ('args', 'said'),
    [
        (('sr', 'in', 'in'), 'inside the source'),
        (('sr', 'in', 'in/out'), 'inside the source'),
        (('subimages', 'in', 'in'), 'inside the source'),
        (('lmdb', 'in', 'in/x.lmdb'), 'inside the source'),
        (('lmdb', 'in', 'x'), 'should end in .lmdb'),
        (('lmdb', 'in', 'x.lmdb', '--filename_tmpl', '{}x4'), 'is not named as'),
        (('sr', 'nowhere', 'out'), 'folder not found: nowhere'),
        (('subimages', 'in', 'out', '--scales', '2'), '--scales needs --lr'),
        (('subimages', 'in', 'out', '--lr', 'lr'), 'no folder X2'),
        (('pairs', 'gopro', 'in', 'out'), 'no train/SEQUENCE'),
        (('pairs', 'rain13k', 'in', 'out'), 'no train/Rain13K'),
        (('check', 'in', '--filename_tmpl', '{}x4'), 'needs LQ'),
        (('check', 'in', 'in', '--filename_tmpl', 'x4'), 'needs {} once'),
        (('sr', 'in', 'out', '--scales', 'two'), "'two' is no integer from 2 on"),
        (('download', 'ste5'), "did you mean 'set5'?"),
    ],
)
def test_mistakes(hr, capsys, args, said):
    before = state('.')
    run(*args, code=2)
    message = capsys.readouterr().err
    assert said in message and message.splitlines()[-1].count('error: ') == 1
    assert state('.') == before


def test_two_images_of_one_name_are_left_out_and_the_others_go_on(hr, capsys):
    save(hr / 'a.jpg', photo(48, 48))
    said = f'{hr} has two images of one name: a.jpg and a.png; they are left out'
    run('sr', hr, 'out', '--scales', 2, code=1)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [said] and printed.out == 'out: LR at x2 of 2 images; 1 problem\n'
    assert sorted(path.name for path in Path('out/HR').iterdir()) == ['b.v2.png', 'ünï 画.png']
    run('check', hr, code=1)
    assert capsys.readouterr().out.splitlines() == [said, '2 images checked: 1 problems']
    run('check', 'out/HR', hr, code=1)
    assert said in capsys.readouterr().out
    run('subimages', hr, 'sub', '--size', 24, '--step', 24, code=1)
    assert said in capsys.readouterr().err and len(list(Path('sub').glob('*.png'))) > 2
    run('lmdb', hr, 'a.lmdb', code=1)
    assert said in capsys.readouterr().err and not Path('a.lmdb').exists()
    for name in ('b.v2.png', 'ünï 画.png'):
        (hr / name).unlink()
    run('sr', hr, 'other', code=2)
    assert 'two images of one name: a.jpg and a.png, and none that has' in capsys.readouterr().err


def test_subfolders_that_are_not_searched_are_told(hr, capsys):
    save(hr / 'more' / 'c.png', photo(48, 48))
    (hr / 'empty').mkdir()
    save(hr / '.hidden' / 'c.png', photo(48, 48))
    run('check', hr)
    assert capsys.readouterr().out.splitlines()[0] == f'{hr}: sub-folders are not searched: more'
    run('sr', hr.parent, 'out', code=2)
    assert capsys.readouterr().err.endswith('; sub-folders are not searched: in)\n')


def test_out_is_a_file(hr, capsys):
    Path('out').write_text('mine')
    run('sr', hr, 'out', code=2)
    assert 'cannot write' in capsys.readouterr().err and Path('out').read_text() == 'mine'


def _in_a_session_of_its_own(*args):
    os.setsid()  # Ctrl-C reaches the whole process group, workers included
    sys.stderr = open('stderr', 'w')
    code = prepare.main(list(args))
    sys.stderr.close()
    os._exit(code)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='signals')
def test_ctrl_c_leaves_whole_files_and_the_next_run_continues(tmp_path):
    count = 48  # more than is done before the signal comes, on fast machines, too
    for seed in range(count):
        save(tmp_path / 'in' / f'{seed:02}.png', photo(240, 240, seed))
    process = multiprocessing.get_context('fork').Process(
        target=_in_a_session_of_its_own, args=('sr', 'in', 'out', '--workers', '2')
    )
    process.start()
    while len(list(Path('out').glob('HR/*.png'))) < 2:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and Path('stderr').read_text() == 'interrupted: the same command continues\n'
    made = sorted(Path('out').rglob('*x2.png'))
    assert 0 < len(made) < count and not list(Path('out').rglob('*.tmp'))
    assert all(load(path).shape == (120, 120, 3) for path in made)
    run('sr', 'in', 'out')
    assert len(names('out/LR_bicubic/X4')) == count and not list(Path('out').rglob('*.tmp'))


def test_a_failed_write_leaves_nothing_and_ends_the_run(hr, capsys, monkeypatch):
    def full(path, content):
        Path(path).write_bytes(content[:10])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(jobs, '_write', full)
    run('sr', hr, 'out', '--scales', 2, code=2)
    assert capsys.readouterr().err == 'error: cannot write out/LR_bicubic/X2/ax2.png: No space left on device\n'
    assert names('out/LR_bicubic/X2') == [] and not list(Path('out').rglob('*.tmp'))


# --------------------------------------------------------------------------------------------------------- subimages


def basicsr_crops(image, size, step, thresh):
    """BasicSR's scripts/extract_subimages.py, as its documentation states it, pixel by pixel of the first axis."""
    starts = []
    for length in image.shape[:2]:
        axis = np.arange(0, length - size + 1, step)
        if length - (axis[-1] + size) > thresh:
            axis = np.append(axis, length - size)
        starts.append(axis)
    return [image[y : y + size, x : x + size] for y in starts[0] for x in starts[1]]


@pytest.mark.parametrize('thresh', [0, 23, 24])
def test_subimages_are_basicsrs(tmp_path, thresh):
    image = photo(132, 168)
    save('in/0001.png', image)
    run('subimages', 'in', 'out', '--size', 72, '--step', 36, '--thresh', thresh)
    expected = basicsr_crops(image, 72, 36, thresh)
    assert names('out') == [f'0001_s{i:03d}.png' for i in range(1, len(expected) + 1)]
    assert all(np.array_equal(load(f'out/0001_s{i:03d}.png'), crop) for i, crop in enumerate(expected, 1))


def test_subimages_of_hr_and_lr_belong_together(tmp_path, capsys):
    for seed, size in enumerate([(131, 100), (97, 170)]):
        save(f'set/HR/{seed}.png', photo(*size, seed))
    run('sr', 'set/HR', 'set')
    args = ('subimages', 'set/HR', 'set/HR_sub', '--lr', 'set/LR_bicubic', '--size', 72, '--step', 24)
    run(*args)
    for scale in (2, 3, 4):
        assert names(f'set/LR_bicubic/X{scale}_sub') == names('set/HR_sub')
        for name in names('set/HR_sub'):
            high, low = load(f'set/HR_sub/{name}'), load(f'set/LR_bicubic/X{scale}_sub/{name}')
            # Away from the crop's borders the LR crop is the HR crop's LR.
            inner = slice(4, -4)
            assert np.array_equal(low[inner, inner], imresize(high, 1 / scale)[inner, inner]), (scale, name)
    assert f'{len(names("set/HR_sub"))} crops each of 2 images' in capsys.readouterr().out
    run('check', 'set/HR_sub', 'set/LR_bicubic/X4_sub', '--scale', 4, '--gt_size', 72)

    before = state('set')
    run(*args)
    assert state('set') == before
    run(*args[:-3], 70, *args[-2:], code=2)
    assert '--size 70 is no multiple of 12 (scales [2, 3, 4]): 72 is' in capsys.readouterr().err
    # A source that has become smaller leaves no crop of its former self.
    save('set/HR/0.png', photo(96, 96, 5))
    run('sr', 'set/HR', 'set')
    run(*args)
    assert [n for n in names('set/HR_sub') if n[0] == '0'] == names('set/HR_sub')[:4]
    assert names('set/HR_sub') == names('set/LR_bicubic/X3_sub')


def test_subimages_name_what_does_not_fit(tmp_path, capsys):
    save('HR/big.png', photo(80, 80))
    save('HR/small.png', photo(40, 80))
    save('LR/X2/bigx2.png', photo(40, 39))
    save('LR/X2/smallx2.png', photo(20, 40))
    run('subimages', 'HR', 'sub', '--lr', 'LR', '--size', 60, '--step', 20, code=1)
    assert capsys.readouterr().err.splitlines() == [
        'sizes do not match at scale 2: HR/big.png is 80x80, LR/X2/bigx2.png is 39x40 (expected 40x40)',
        'too small, left out: 1 of 2 images are smaller than a crop, 60x60, such as HR/small.png (80x40): '
        '--size 40 takes all',
    ]
    Path('LR/X2/bigx2.png').unlink()
    run('subimages', 'HR', 'sub', '--lr', 'LR', '--size', 60, '--step', 20, code=2)
    assert 'LR/X2 lacks 1 images of HR: bigx2' in capsys.readouterr().err


def test_subimages_of_images_below_the_crop_are_one_line(tmp_path, capsys):
    for seed in range(5):
        save(f'HR/{seed}.png', photo(46 + seed, 60, seed))
        save(f'LR/X4/{seed}x4.png', photo((46 + seed) // 4, 15, seed))
    run('subimages', 'HR', 'sub', '--lr', 'LR', code=2)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        'error: 5 of 5 images are smaller than a crop, 480x480, such as HR/0.png (60x46): --size 44 --step 20 takes all'
    ]
    assert not Path('sub').exists() and not Path('LR/X4_sub').exists()
    run('subimages', 'HR', 'sub', '--lr', 'LR', '--size', 44, '--step', 20)  # as it says
    assert len({path.name.split('_')[0] for path in Path('sub').glob('*.png')}) == 5


# -------------------------------------------------------------------------------------------------------------- lmdb


def test_lmdb_is_read_by_basicsr_and_by_us(hr, capsys):
    run('sr', hr, 'set', '--scales', 2, '--layout', 'basicsr')
    run('lmdb', 'set/GTmod12', 'GT.lmdb', workers=2)
    run('lmdb', 'set/LRbicx2', 'LR.lmdb')
    lines = Path('GT.lmdb/meta_info.txt').read_text(encoding='utf-8').splitlines()
    assert lines == ['a.png (48,60,3) 1', 'b.v2.png (48,72,3) 1', 'ünï 画.png (48,48,3) 1']
    opt = {'phase': 'val', 'scale': 2, 'dataroot_gt': 'GT.lmdb', 'dataroot_lq': 'LR.lmdb', 'name': 'x'}
    folders = {**opt, 'dataroot_gt': 'set/GTmod12', 'dataroot_lq': 'set/LRbicx2'}
    for dataset in (SRImageDataset, PairedImageDataset):
        packed = dataset({**opt, 'io_backend': {'type': 'lmdb'}})
        plain = dataset({**folders, 'io_backend': {'type': 'disk'}})
        assert len(packed) == 3
        for i in range(3):
            assert packed[i]['gt'].equal(plain[i]['gt']) and packed[i]['lq'].equal(plain[i]['lq'])
    run('check', 'GT.lmdb', 'LR.lmdb', '--scale', 2)

    before = state('GT.lmdb')
    run('lmdb', 'set/GTmod12', 'GT.lmdb')
    assert state('GT.lmdb') == before and 'was ready' in capsys.readouterr().out
    run('lmdb', 'set/LRbicx2', 'GT.lmdb', code=2)
    assert 'exists and was made of other images' in capsys.readouterr().err and state('GT.lmdb') == before


def test_lmdbs_of_other_keys_name_the_command_that_makes_them_equal(hr, capsys):
    run('sr', hr, 'set', '--scales', 2)
    run('lmdb', 'set/HR', 'GT.lmdb')
    run('lmdb', 'set/LR_bicubic/X2', 'LR.lmdb')
    cure = "python -m dckd_sr.prepare lmdb FOLDER LR.lmdb --filename_tmpl '{}x2'"
    folders = {'dataroot_gt': 'GT.lmdb', 'dataroot_lq': 'LR.lmdb', 'io_backend': {'type': 'lmdb'}}
    options = {'phase': 'val', 'scale': 2, **folders}
    for kind in (PairedImageDataset, SRImageDataset):
        with pytest.raises(UserError) as caught:
            kind(copy.deepcopy(options))
        assert cure in str(caught.value)
    capsys.readouterr()
    run('check', 'GT.lmdb', 'LR.lmdb', '--scale', 2, code=2)
    assert cure in capsys.readouterr().err
    run('check', 'set/HR', 'set/LR_bicubic/X2', '--scale', 2, code=2)
    assert capsys.readouterr().err.endswith("such as a; --filename_tmpl '{}x2'?\n")
    run('lmdb', 'set/LR_bicubic/X2', 'LR2.lmdb', '--filename_tmpl', '{}x2')  # as it says
    run('check', 'GT.lmdb', 'LR2.lmdb', '--scale', 2)
    (Path('set') / 'LR_bicubic' / 'X2' / 'ax2.png').rename('elsewhere.png')
    run('lmdb', 'set/LR_bicubic/X2', 'LR3.lmdb', '--filename_tmpl', '{}x2')
    with pytest.raises(UserError, match='LR3.lmdb and GT.lmdb have different keys: a$'):
        SRImageDataset({**options, 'dataroot_lq': 'LR3.lmdb'})


def test_lmdb_keys_of_lr_names(tmp_path):
    save('in/babyx4.png', photo(8, 8)[..., 0])
    run('lmdb', 'in', 'LR.lmdb', '--filename_tmpl', '{}x4')
    assert Path('LR.lmdb/meta_info.txt').read_text() == 'baby.png (8,8,1) 1\n'


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_lmdb_without_compression(tmp_path, capsys, dtype):
    """The same images, each as large as its pixels."""
    image = photo(64, 64, dtype=dtype)
    save('in/a.png', image)
    run('lmdb', 'in', 'plain.lmdb', '--level', 0)
    run('lmdb', 'in', 'packed.lmdb')
    plain, packed = read_lmdb('plain.lmdb', 'a'), read_lmdb('packed.lmdb', 'a')
    assert len(packed) < len(plain) and image.nbytes < len(plain) < image.nbytes + 1000
    for content in (plain, packed):
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        assert decoded.dtype == dtype and np.array_equal(decoded, image)
    assert Path('plain.lmdb/meta_info.txt').read_text() == 'a.png (64,64,3) 0\n'
    run('lmdb', 'in', 'plain.lmdb', '--level', 0)
    assert 'was ready' in capsys.readouterr().out
    run('lmdb', 'in', 'plain.lmdb', code=2)
    assert 'made of other images, or at another level' in capsys.readouterr().err


def test_lmdb_grows(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(3):
        save(f'in/{i}.png', rng.integers(0, 256, (60, 60, 3), np.uint8))
    from dckd_sr.data import lmdb_maker

    monkeypatch.setattr(lmdb_maker, 'MAP_SIZE', 2**14)
    run('lmdb', 'in', 'x.lmdb')
    run('check', 'x.lmdb', 'in')


def test_lmdb_of_a_folder_with_a_damaged_image_is_not_made(hr, capfd):
    (hr / 'text.png').write_text('hello')
    run('lmdb', hr, 'x.lmdb', code=1)
    out, err = capfd.readouterr()
    assert err == f'not an image, or damaged: {hr}/text.png\n' and 'x.lmdb not made; 1 problem\n' in out
    assert names('.') == ['in'] and len(os.listdir('.')) == 1


# ------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_of_gopro(tmp_path, capsys):
    for split, sequence in [('train', 'GOPR0001'), ('train', 'GOPR0002'), ('test', 'GOPR0003')]:
        for kind in ('blur', 'blur_gamma', 'sharp'):
            for frame in ('000001', '000002'):
                seed = hash((split, sequence, kind, frame)) % 1000
                save(f'src/{split}/{sequence}/{kind}/{frame}.png', photo(8, 8, seed))
    before = state('src')
    run('pairs', 'gopro', 'src', 'out')
    assert names('out/train/lq') == [f'GOPR000{i}_00000{k}.png' for i in (1, 2) for k in (1, 2)]
    assert names('out/train/gt') == names('out/train/lq') and len(names('out/test/gt')) == 2
    lq = Path('out/train/lq/GOPR0002_000001.png')
    assert lq.read_bytes() == Path('src/train/GOPR0002/blur/000001.png').read_bytes()
    assert Path('out/test/gt/GOPR0003_000002.png').samefile('src/test/GOPR0003/sharp/000002.png')
    assert state('src') == before and 'train 4 pairs, test 2 pairs' in capsys.readouterr().out
    run('pairs', 'gopro', 'src', 'out')
    run('pairs', 'gopro', 'src', 'copies', '--copy')
    assert not Path('copies/test/gt/GOPR0003_000002.png').samefile('src/test/GOPR0003/sharp/000002.png')
    run('pairs', 'gopro', 'src', 'copies')


def test_pairs_of_rain13k(tmp_path, capsys):
    for place in ('train/Rain13K', 'test/Test100', 'test/Rain100L'):
        for kind in ('input', 'target'):
            save(f'src/{place}/{kind}/1.png', photo(8, 8))
    save('src/train/Rain13K/input/2.png', photo(8, 8))
    Path('src/train/Rain13K/input/3.png').write_bytes(b'')
    save('src/train/Rain13K/target/3.png', photo(8, 8))
    save('out/test/Test100/gt/1.png', photo(9, 9))
    run('pairs', 'rain13k', 'src', 'out', code=1)
    assert capsys.readouterr().err.splitlines() == [
        'empty file: src/train/Rain13K/input/3.png',
        'out/test/Test100/gt/1.png exists and differs from src/test/Test100/target/1.png: move it or name another '
        'folder',
        'unpaired: src/train/Rain13K/input/2.png is not in src/train/Rain13K/target',
    ]
    assert names('out/train/lq') == ['1.png'] and names('out/test/Rain100L/gt') == ['1.png']
    assert load('out/test/Test100/gt/1.png').shape == (9, 9, 3)


# ------------------------------------------------------------------------------------------------------------- check


def test_check_lists_everything(tmp_path, capfd):
    save('gt/fine.png', photo(49, 50))
    save('lq/finex2.png', photo(24, 25))
    save('gt/small.png', photo(30, 50))
    save('lq/smallx2.png', photo(15, 25))
    save('gt/other.png', photo(48, 48))
    save('lq/otherx2.png', photo(24, 23))
    save('gt/alone.png', photo(48, 48))
    save('lq/lonelyx2.png', photo(48, 48))
    save('gt/bad.png', photo(48, 48))
    Path('lq/badx2.png').write_bytes(Path('gt/fine.png').read_bytes()[:-30])
    run('check', 'gt', 'lq', '--scale', 2, '--filename_tmpl', '{}x2', '--gt_size', 32, code=1, workers=2)
    assert capfd.readouterr().out.splitlines() == [
        'mismatched: sizes do not match at scale 2: gt/other.png is 48x48, lq/otherx2.png is 23x24 (expected 24x24)',
        'too small: gt/small.png is 50x30, at least 32 are needed',
        'unpaired: gt/alone.png has no alonex2 in lq',
        'unpaired: lq/lonelyx2.png has no partner in gt',
        'unreadable: truncated file: lq/badx2.png',
        '5 pairs checked: 5 problems; 1 GT images are no multiples of 2, their borders are cut while loading',
    ]


def test_check_of_good_data_says_so(hr, capsys):
    run('check', hr)
    assert capsys.readouterr().out == '3 images checked: all fit\n'


# ---------------------------------------------------------------------------------------------------------- download


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A loopback server with an archive like EDSR's benchmark.tar; yields the list of requested paths."""
    save('benchmark/Set5/HR/baby.png', photo(8, 8))
    save('benchmark/Set5/LR_bicubic/X2/babyx2.png', photo(4, 4))
    save('benchmark/Set14/HR/lenna.png', photo(8, 8))
    (tmp_path / 'www').mkdir()
    with tarfile.open('www/benchmark.tar', 'w') as tar:
        tar.add('benchmark')
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / 'www'))

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/benchmark.tar'

    def archive(name, sha256=None, inside=None):
        return (downloads.Archive(url, 'PAGE', ((inside or f'benchmark/{name}', name),), sha256),)

    table = {'set5': archive('Set5'), 'set14': archive('Set14', inside='Set14'), 'wrong': archive('Set5', '0' * 64)}
    monkeypatch.setattr(downloads, 'DATASETS', {**table, 'empty': archive('Set15')})
    yield asked
    server.shutdown()
    server.server_close()


def test_download(served, capsys):
    run('download', 'Set5', '-o', 'data')
    said = capsys.readouterr().out
    assert 'set5: Set5 in data, unverified: PAGE has no hash; sha256 ' in said
    assert len(said.split('sha256 ')[1].strip()) == 64
    assert names('data/Set5') == ['HR', 'LR_bicubic'] and load('data/Set5/LR_bicubic/X2/babyx2.png').shape == (4, 4, 3)
    assert names('data/downloads') == []
    run('download', 'set5', 'set14', '-o', 'data')
    assert 'set5: Set5 in data, were there' in capsys.readouterr().out
    assert names('data') == ['Set14', 'Set5', 'downloads'] and served == ['/benchmark.tar'] * 2


@pytest.mark.parametrize(('name', 'said'), [('wrong', 'expected 0000'), ('empty', 'has no folder benchmark/Set15')])
def test_download_that_fails(served, capsys, name, said):
    run('download', name, '-o', 'data', code=2)
    assert said in capsys.readouterr().err and names('data') == ['downloads']


def test_every_source_is_stated_with_its_page():
    for archives in downloads.DATASETS.values():
        for archive in archives:
            assert archive.url.startswith('https://') and archive.page.startswith('https://') and archive.folders
            assert archive.sha256 is None or len(archive.sha256) == 64
            assert '/' not in archive.file_name and archive.file_name.endswith(('.zip', '.tar'))


def test_merged_folders(tmp_path, monkeypatch):
    for part, name in [('train', '1'), ('test', '2')]:
        save(f'B-master/images/{part}/{name}.png', photo(8, 8))
    Path('data/downloads').mkdir(parents=True)
    with tarfile.open('data/downloads/B.tar', 'w') as tar:  # put there by hand
        tar.add('B-master')
    folders = (('images/train', 'B'), ('images/test', 'B'))
    table = {'b': (downloads.Archive('https://nowhere.invalid/B.tar', 'PAGE', folders),)}
    monkeypatch.setattr(downloads, 'DATASETS', table)
    run('download', 'b', '-o', 'data')
    assert names('data/B') == ['1.png', '2.png']


# ------------------------------------------------------------------------------------------------ datasets/README.md


def test_every_command_of_the_readme_runs(tmp_path, capsys):
    readme = Path(prepare.__file__).resolve().parents[1] / 'datasets' / 'README.md'
    if not readme.is_file():
        pytest.skip('installed without the repository')
    commands = [line.split()[3:] for line in readme.read_text().splitlines() if line.startswith('    python -m')]
    asked = {name for command in commands if command[0] == 'download' for name in command[1:]}
    assert len(commands) > 15 and asked | {'div2k_x2', 'div2k_x3'} == set(downloads.DATASETS)

    # What the downloads leave, in small.
    for base, name in [('DIV2K/DIV2K_train', '0001'), ('Flickr2K/Flickr2K', '000001')]:
        save(f'datasets/{base}_HR/{name}.png', photo(480, 492))
        save(f'datasets/{base}_LR_bicubic/X4/{name}x4.png', photo(120, 123))
    save('datasets/Manga109/HR/a.png', photo(40, 40))
    save('datasets/mine/original/a.jpg', photo(490, 500))
    for split in ('train', 'test'):
        for kind in ('blur', 'sharp'):
            save(f'datasets/GOPRO_Large/{split}/GOPR1/{kind}/1.png', photo(512, 520))
    for kind in ('input', 'target'):
        save(f'datasets/Rain13K_original/train/Rain13K/{kind}/1.jpg', photo(40, 40))
        save(f'datasets/Rain13K_original/test/Test100/{kind}/1.png', photo(40, 40))
    for kind in ('gt', 'lq'):
        save(f'datasets/mine/{kind}/1.png', photo(256, 256))
    for command in commands:
        if command[0] not in ('download', 'teacher_cache'):  # tests/data/test_teacher_cache.py runs the latter
            run(*command)
    assert len(names('datasets/DF2K/HR_sub')) == 4 and names('datasets/DF2K/LR_bicubic') == ['X4_sub']
    assert names('datasets/GoPro/train/gt_sub') == names('datasets/GoPro/train/lq_sub')

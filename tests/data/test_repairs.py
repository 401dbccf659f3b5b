import os

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data import build_dataset

import dckd_sr  # noqa: F401
from dckd_sr.data import build_val_loaders
from dckd_sr.errors import UserError


@pytest.fixture
def opt(tmp_path):
    for folder in ('gt', 'lq'):
        (tmp_path / folder).mkdir()
        for name in ('b.png', 'a.png', 'c.png'):
            cv2.imwrite(str(tmp_path / folder / name), np.zeros((4, 4, 3), np.uint8))
    return {
        'name': 'x',
        'type': 'PairedImageDataset',
        'phase': 'val',
        'scale': 1,
        'dataroot_gt': str(tmp_path / 'gt'),
        'dataroot_lq': str(tmp_path / 'lq'),
        'io_backend': {'type': 'disk'},
    }


def names(dataset):
    return [os.path.basename(path['gt_path'] if isinstance(path, dict) else path) for path in dataset.paths]


def test_files_are_sorted_and_only_images_count(opt, tmp_path, monkeypatch):
    (tmp_path / 'gt' / 'Thumbs.db').write_bytes(b'x')
    scandir = os.scandir

    def unsorted(folder):  # as some file systems answer
        with scandir(folder) as entries:
            return _Entries(sorted(entries, key=lambda entry: entry.name, reverse=True))

    class _Entries(list):
        __enter__, __exit__ = (lambda self: self), (lambda self, *args: None)

    monkeypatch.setattr(os, 'scandir', unsorted)
    assert names(build_dataset(opt)) == ['a.png', 'b.png', 'c.png']
    single = {**opt, 'type': 'SingleImageDataset', 'dataroot_lq': opt['dataroot_gt']}
    assert names(build_dataset(single)) == ['a.png', 'b.png', 'c.png']


def test_partners_are_complete_on_both_sides(opt, tmp_path):
    (tmp_path / 'lq' / 'c.png').rename(tmp_path / 'lq' / 'd.png')
    with pytest.raises(UserError, match='no LQ image for 1 of 3 .*c.png'):
        build_dataset(opt)
    (tmp_path / 'gt' / 'c.png').unlink()
    with pytest.raises(UserError, match='1 images in .* have no partner in .*d.png'):
        build_dataset(opt)


@pytest.mark.parametrize('there', ['c.jpg', 'c.PNG'])
def test_a_partner_of_another_suffix_is_named(opt, tmp_path, there):
    (tmp_path / 'lq' / 'c.png').rename(tmp_path / 'lq' / there)
    cure = f'{there} is there; type: SRImageDataset'
    with pytest.raises(UserError, match='no LQ image for 1 of 3 .*c.png .' + cure):
        build_dataset(opt)
    meta = tmp_path / 'list.txt'
    meta.write_text('a.png (4,4,3)\nc.png (4,4,3)\n')
    with pytest.raises(UserError, match='1 images listed in .* are missing: .*lq.c.png .' + cure):
        build_dataset({**opt, 'meta_info_file': str(meta)})
    other = {**opt, 'type': 'SRImageDataset'}  # as it says
    assert names(build_dataset(other)) == ['a.png', 'b.png', 'c.png']


def test_meta_info_file(opt, tmp_path):
    meta = tmp_path / 'list.txt'
    meta.write_text('c.png (4,4,3)\na.png (4,4,3)\n')
    assert names(build_dataset({**opt, 'meta_info_file': str(meta)})) == ['c.png', 'a.png']
    meta.write_text('c.png (4,4,3)\nnone.png (4,4,3)\n')
    with pytest.raises(UserError, match='2 images listed in .* are missing: .*none.png'):
        build_dataset({**opt, 'meta_info_file': str(meta)})


def test_basicsrs_missing_list_means_the_folder(opt):
    opt['meta_info_file'] = 'basicsr/data/meta_info/meta_info_DIV2K800sub_GT.txt'
    with pytest.warns(UserWarning, match='every image in'):
        assert names(build_dataset(opt)) == ['a.png', 'b.png', 'c.png']


@pytest.mark.parametrize('kind', ['PairedImageDataset', 'SingleImageDataset', 'RealESRGANPairedDataset'])
def test_lmdb_keys_keep_their_dots(opt, tmp_path, kind):
    for folder in ('gt', 'lq'):
        (tmp_path / f'{folder}.lmdb').mkdir()
        (tmp_path / f'{folder}.lmdb' / 'meta_info.txt').write_text('a.v2.png (4,4,3) 1\na.v1.png (4,4,3) 1\n')
        opt[f'dataroot_{folder}'] = str(tmp_path / f'{folder}.lmdb')
    dataset = build_dataset({**opt, 'type': kind, 'io_backend': {'type': 'lmdb'}})
    assert names(dataset) == ['a.v1', 'a.v2']
    (tmp_path / 'lq.lmdb' / 'meta_info.txt').write_text('a.v1.png (4,4,3) 1\n')
    if kind != 'SingleImageDataset':
        with pytest.raises(UserError, match='different keys: a.v2'):
            build_dataset({**opt, 'type': kind, 'io_backend': {'type': 'lmdb'}})


def write_lmdb(folder, names):
    """An LMDB as BasicSR writes it: PNG bytes under the name without suffix."""
    environment = lmdb.open(str(folder), map_size=2**20)
    lines = []
    with environment.begin(write=True) as transaction:
        for value, name in enumerate(names):
            content = cv2.imencode('.png', np.full((4, 4, 3), value, np.uint8))[1].tobytes()
            transaction.put(name.encode(), content)
            lines.append(f'{name}.png (4,4,3) 1\n')
    environment.close()
    (folder / 'meta_info.txt').write_text(''.join(lines))


@pytest.mark.parametrize('workers', [0, 2])
def test_one_lmdb_serves_two_datasets_and_their_workers(opt, tmp_path, workers):
    """LMDB refuses to open a folder twice, also in a worker whose parent has it open."""
    write_lmdb(tmp_path / 'gt.lmdb', ['a', 'b', 'c'])
    folder = str(tmp_path / 'gt.lmdb')
    opt.update(dataroot_gt=folder, dataroot_lq=folder, io_backend={'type': 'lmdb'}, num_worker_per_gpu=workers)
    ours = {**opt, 'type': 'SRImageDataset'}
    for loader in build_val_loaders(
        {'datasets': {'val': {**opt, 'num_worker_per_gpu': 0}, 'val_2': opt, 'val_3': ours}}
    ):
        assert [round(float(batch['gt'].mean() * 255)) for batch in loader] == [0, 1, 2]


def test_an_lmdb_is_opened_once(opt, tmp_path, monkeypatch):
    write_lmdb(tmp_path / 'gt.lmdb', ['a', 'b'])
    opened, lmdb_open = [], lmdb.open
    monkeypatch.setattr(lmdb, 'open', lambda *args, **options: opened.append(args) or lmdb_open(*args, **options))
    folder = str(tmp_path / 'gt.lmdb')
    dataset = build_dataset({**opt, 'dataroot_gt': folder, 'dataroot_lq': folder, 'io_backend': {'type': 'lmdb'}})
    assert [dataset[index]['gt'].shape for index in (0, 1, 0)] == [(3, 4, 4)] * 3 and len(opened) == 1


def test_a_key_that_is_not_in_the_lmdb(opt, tmp_path):
    write_lmdb(tmp_path / 'gt.lmdb', ['a'])
    (tmp_path / 'gt.lmdb' / 'meta_info.txt').write_text('z.png (4,4,3) 1\n')
    folder = str(tmp_path / 'gt.lmdb')
    dataset = build_dataset({**opt, 'dataroot_gt': folder, 'dataroot_lq': folder, 'io_backend': {'type': 'lmdb'}})
    with pytest.raises(UserError, match="gt.lmdb has no key 'z'"):
        dataset[0]


def test_images_are_whole_or_an_error(opt, tmp_path):
    path = tmp_path / 'lq' / 'b.png'
    jpeg = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[1].tobytes()
    for content, message in [(b'text', 'not an image'), (jpeg[: len(jpeg) // 2], 'truncated')]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            build_dataset(opt)[1]
    path.write_bytes(jpeg)
    cv2.imwrite(str(tmp_path / 'gt' / 'b.png'), np.zeros((64, 64, 3), np.uint8))
    np.testing.assert_array_equal(
        build_dataset(opt)[1]['lq'].numpy().transpose(1, 2, 0)[..., ::-1],
        cv2.imread(str(path)).astype(np.float32) / 255,
    )

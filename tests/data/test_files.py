import cv2
import numpy as np
import pytest

from dckd_sr.data import files
from dckd_sr.errors import UserError


def write(path, image, *params):
    ok, content = cv2.imencode(path.suffix, image, list(params))
    assert ok
    path.write_bytes(content.tobytes())  # cv2.imwrite fails on other alphabets on Windows


def read(path):
    return files.decode(files.read_bytes(str(path)), str(path))


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def test_only_image_files_count_and_in_order(tmp_path):
    for name in ['b.png', 'a10.PNG', 'a2.jpg', 'Thumbs.db', '.hidden.png', 'c.txt', 'ä.webp']:
        (tmp_path / name).write_bytes(b'x')
    (tmp_path / 'folder.png').mkdir()
    assert files.image_names(str(tmp_path)) == ['a10.PNG', 'a2.jpg', 'b.png', 'ä.webp']
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no images in .*empty'):
        files.image_names(str(tmp_path / 'empty'))
    with pytest.raises(UserError, match='folder not found: .*nowhere'):
        files.image_names(str(tmp_path / 'nowhere'))


def test_meta_info_names(tmp_path):
    meta = tmp_path / 'list.txt'
    meta.write_text('0001_s001.png (480,480,3)\nsub/my photo.png (10, 12, 3)\nplain.png\n\n', encoding='utf-8')
    assert files.meta_info_names(str(meta), '') == ['0001_s001.png', 'sub/my photo.png', 'plain.png']
    with pytest.raises(UserError, match='meta_info_file not found'):
        files.meta_info_names(str(tmp_path / 'none.txt'), str(tmp_path))
    meta.write_text('\n')
    with pytest.raises(UserError, match='no image names'):
        files.meta_info_names(str(meta), '')


def test_basicsrs_own_lists_are_replaced_by_the_folder(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'x')
    with pytest.warns(UserWarning, match='not part of the PyPI package'):
        names = files.meta_info_names('basicsr/data/meta_info/meta_info_DIV2K800sub_GT.txt', str(tmp_path))
    assert names == ['x.png']


def test_lmdb_keys_keep_their_dots(tmp_path):
    folder = tmp_path / 'set.lmdb'
    folder.mkdir()
    (folder / 'meta_info.txt').write_text('b.v2.png (4,4,3) 1\na b.png (4,4,3) 1\n')
    assert files.lmdb_keys(str(folder)) == ['a b', 'b.v2']
    for wrong in (tmp_path, tmp_path / 'none.lmdb'):
        with pytest.raises(UserError, match='not an LMDB'):
            files.lmdb_keys(str(wrong))


def test_partners_by_template_and_suffix(tmp_path):
    for name in ['babyx4.png', 'birdx4.jpg', 'extra.png']:
        (tmp_path / name).write_bytes(b'x')
    pairs, unused = files.find_partners(['baby.png', 'sub/bird.png'], str(tmp_path), '{}x4')
    assert pairs == {'baby.png': 'babyx4.png', 'sub/bird.png': 'birdx4.jpg'} and unused == ['extra.png']
    with pytest.raises(UserError, match='no LQ image for 1 of 2 .* birdx4.png'):
        files.find_partners(['baby.png', 'bird.png'], str(tmp_path), '{}x4', any_suffix=False)
    with pytest.raises(UserError, match=r"baby.png \(filename_tmpl: '\{\}x4'\?\)"):
        files.find_partners(['baby.png'], str(tmp_path))


def test_decodes_colour_gray_alpha_and_sixteen_bits(tmp_path):
    colour, deep = noise(6, 5, 3), noise(6, 5, 3, dtype=np.uint16)
    for name, image, expected in [
        ('colour.png', colour, colour),
        ('gray.png', colour[..., 0], np.repeat(colour[..., :1], 3, axis=2)),
        ('deep.png', deep, deep),
        ('ünï 画像.bmp', colour, colour),
    ]:
        write(tmp_path / name, image)
        out = read(tmp_path / name)
        assert out.dtype == image.dtype and out.flags.c_contiguous
        np.testing.assert_array_equal(out, expected)
    files._warned.clear()
    write(tmp_path / 'alpha.png', np.dstack([colour, colour[..., 0]]))
    with pytest.warns(UserWarning, match='alpha.png: alpha channel dropped') as caught:
        np.testing.assert_array_equal(read(tmp_path / 'alpha.png'), colour)
        read(tmp_path / 'alpha.png')
    assert len(caught) == 1


def test_jpeg_is_read_as_basicsr_reads_it(tmp_path):
    """Including the camera's orientation (EXIF), which OpenCV applies unless it reads "unchanged"."""
    write(tmp_path / 'a.jpg', noise(16, 24, 3))
    content = (tmp_path / 'a.jpg').read_bytes()
    tiff = b'II*\0\x08\0\0\0' + b'\x01\0' + b'\x12\x01\x03\0\x01\0\0\0\x06\0\0\0' + b'\0\0\0\0'
    exif = b'\xff\xe1' + (len(tiff) + 8).to_bytes(2, 'big') + b'Exif\0\0' + tiff
    (tmp_path / 'turned.jpg').write_bytes(content[:2] + exif + content[2:])
    np.testing.assert_array_equal(read(tmp_path / 'a.jpg'), cv2.imread(str(tmp_path / 'a.jpg')))
    turned = read(tmp_path / 'turned.jpg')
    assert turned.shape == (24, 16, 3)
    np.testing.assert_array_equal(turned, cv2.imread(str(tmp_path / 'turned.jpg')))


def test_broken_files_are_named(tmp_path):
    write(tmp_path / 'whole.png', noise(40, 40, 3))
    write(tmp_path / 'whole.jpg', noise(40, 40, 3))
    for suffix in ('png', 'jpg'):
        content = (tmp_path / f'whole.{suffix}').read_bytes()
        (tmp_path / f'cut.{suffix}').write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=rf'truncated file: .*cut\.{suffix}'):
            read(tmp_path / f'cut.{suffix}')
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'text.png').write_text('hello')
    write(tmp_path / 'float.tiff', np.ones((4, 4, 3), np.float32))
    for name, message in [('empty.png', 'empty file'), ('text.png', 'not an image'), ('float.tiff', 'float32')]:
        assert message in files.check_image_file(str(tmp_path / name))
        assert name in files.check_image_file(str(tmp_path / name))
    assert 'No such file' in files.check_image_file(str(tmp_path / 'none.png'))
    assert files.check_image_file(str(tmp_path / 'whole.png')) is None

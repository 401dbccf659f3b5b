"""The reader of foreign checkpoints: nothing a file names may run, and what it returns must equal torch.load."""

import argparse
import collections
import copy
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from dckd_sr import restricted_pickle
from dckd_sr.errors import UserError
from dckd_sr.restricted_pickle import Placeholder, globals_in, load

FORMATS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'stream'])
ZERO = b'ctorch._utils\n_rebuild_tensor_v2\n'


def saved(tmp_path, content, zipped=True, name='weights.pth'):
    path = tmp_path / name
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def crafted(tmp_path, program, storages=(('0', b'\0' * 16),), zipped=True):
    """A checkpoint whose content pickle is the given opcodes."""
    path = tmp_path / 'crafted.pth'
    if zipped:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('crafted/data.pkl', program)
            for key, data in storages:
                archive.writestr(f'crafted/data/{key}', data)
    else:
        system = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}}
        head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
        tail = [pickle.dumps([key for key, _ in storages], 2)]
        tail += [struct.pack('<q', len(data) // 4) + data for _, data in storages]
        path.write_bytes(b''.join([*head, program, *tail]))
    return path


def tensor_program(size, stride, offset=0, count=4, storage='FloatStorage'):
    """Opcodes of {'w': _rebuild_tensor_v2(storage 0 of count elements, offset, size, stride, False, OrderedDict())}."""
    number = lambda n: pickle.dumps(n, 2)[2:-1]  # noqa: E731
    return (
        b'\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n'
        + storage.encode()
        + b'\n'
        b'X\x01\0\0\x000X\x03\0\0\0cpu'
        + number(count)
        + b'tQ'
        + number(offset)
        + number(size)
        + number(stride)
        + b'\x89'
        b'ccollections\nOrderedDict\n)RtRs.'
    )


def same(ours, theirs):
    assert type(ours) is type(theirs) or (isinstance(ours, dict) and isinstance(theirs, dict))
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            same(a, b)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
    else:
        assert ours == theirs


# What a checkpoint may hold


@FORMATS
def test_equals_torch_load(tmp_path, zipped):
    base = torch.randn(6, 8)
    content = collections.OrderedDict(
        float32=base,
        view=base[1:5, 2:7:2],
        transposed=base.t(),
        row=base[3],
        expanded=torch.randn(3, 1).expand(3, 5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        numbers=[
            1,
            -1,
            2**40,
            2**90,
            1.5,
            True,
            None,
            'é',
            b'\x00\xff',
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            1 + 2j,
        ],
        sets=({1, 'a'}, frozenset([2, (3, 4)])),
        nested={
            'a': {1: [torch.arange(5)]},
            (1, 'b'): collections.defaultdict(list, x=[1]),
            'c': collections.Counter('aab'),
        },
        size=tuple(torch.Size([3, 4])),
    )
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    for dtype in (*dtypes, torch.bool, torch.complex64, torch.complex128):
        content[str(dtype)] = (torch.randn(3, 4) * 50).to(dtype)
    path = saved(tmp_path, content, zipped)
    with_gradient = content['view']
    same(load(path), torch.load(path, weights_only=False))
    assert torch.equal(load(path)['view'], with_gradient)


@FORMATS
def test_shared_storages_stay_shared(tmp_path, zipped):
    base = torch.zeros(10)
    content = load(saved(tmp_path, {'a': base[2:], 'b': base, 'c': base.view(2, 5)}, zipped))
    content['b'][4] = 7
    assert content['a'][2] == 7 and content['c'][0, 4] == 7


@FORMATS
def test_parameters_become_plain_tensors(tmp_path, zipped):
    layer = torch.nn.Linear(3, 2)
    layer.weight.note = 'an attribute'  # torch then writes _rebuild_parameter_with_state
    content = load(saved(tmp_path, {'weight': layer.weight, 'bias': layer.bias}, zipped))
    assert type(content['weight']) is torch.Tensor and not content['weight'].requires_grad
    assert torch.equal(content['weight'], layer.weight) and torch.equal(content['bias'], layer.bias)


def test_tensors_with_attributes_and_new_dtypes(tmp_path):
    noted = torch.arange(3.0)
    noted.note = 'an attribute'  # _rebuild_from_type_v2
    can_save_short = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 5)
    # uint16 is a _rebuild_tensor_v3: no storage class of its own
    short = torch.arange(4).to(torch.uint16 if can_save_short else torch.int16)
    content = load(saved(tmp_path, {'noted': noted, 'short': short}))
    assert torch.equal(content['noted'], noted) and torch.equal(content['short'], short)


@FORMATS
def test_numpy_scalars_and_arrays(tmp_path, zipped):
    array = np.arange(12, dtype='>f4').reshape(3, 4)
    content = {
        'scalar': np.float64(3.25),
        'array': array,
        'fortran': np.asfortranarray(array),
        'text': np.array(['a', 'b']),
    }
    read = load(saved(tmp_path, content, zipped))
    assert read['scalar'] == 3.25 and isinstance(read['scalar'], float)
    assert np.array_equal(read['array'], array) and np.array_equal(read['fortran'], array)
    assert isinstance(read['text'], Placeholder)


@FORMATS
def test_views_of_storages_in_old_streams(tmp_path, zipped):
    """torch 0.4 saved a slice of a storage as (key, offset, size) of its root; nothing writes that any more."""
    program = tensor_program((2,), (1,), offset=1).replace(b'tQ', b'(X\x01\0\0\0vK\x01K\x03ttQ')
    data = np.arange(4, dtype='<f4').tobytes()
    path = crafted(tmp_path, program, [('0', data)], zipped)
    assert load(path)['w'].tolist() == [2, 3]


@pytest.mark.parametrize('protocol', range(6))
def test_every_protocol(tmp_path, protocol):
    content = {'a': [1, 2.5, None, 'text', 'x' * 300, b'bytes', {3: (4, 5)}, {1, 2}, -7, 2**70], 'b': False}
    assert load(crafted(tmp_path, pickle.dumps(content, protocol))) == content


def lightning_checkpoint(tmp_path, zipped=True):
    """What Lightning writes for taming's VQGAN, from classes that no longer exist when the file is read."""
    module = types.ModuleType('lightning_of_the_test')

    class ModelCheckpoint:
        def __init__(self):
            self.best = torch.ones(2)

        def __setstate__(self, state):
            raise AssertionError('called')

    class AttributeDict(dict):
        pass

    for cls in (ModelCheckpoint, AttributeDict):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    sys.modules[module.__name__] = module
    try:
        weights = collections.OrderedDict({'encoder.weight': torch.randn(4, 3), 'loss.bias': torch.randn(2)})
        weights._metadata = collections.OrderedDict({'': {'version': 1}})
        content = {
            'epoch': 3,
            'callbacks': {ModelCheckpoint: {'best': torch.ones(1)}, 'other': ModelCheckpoint()},
            'hyper_parameters': AttributeDict(lr=1e-4, args=argparse.Namespace(gpus=1)),
            'state_dict': weights,
        }
        return saved(tmp_path, content, zipped, 'last.ckpt'), weights
    finally:
        del sys.modules[module.__name__]


@FORMATS
def test_lightning_checkpoint(tmp_path, zipped):
    path, weights = lightning_checkpoint(tmp_path, zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    content = load(path)
    same(content['state_dict'], dict(weights))
    assert content['epoch'] == 3 and isinstance(content['hyper_parameters'], Placeholder)
    names = ['lightning_of_the_test.AttributeDict', 'lightning_of_the_test.ModelCheckpoint']
    assert [name for name in globals_in(path) if name.startswith('lightning')] == names
    assert 'lightning_of_the_test' not in sys.modules


# What a file may try


def attacks(marker):
    """Pickles that run `touch marker` (or its like) in Python's own unpickler, each by another way."""
    text = f'touch {marker}'
    command = f'X{{}}{text}'.encode().replace(b'{}', struct.pack('<I', len(text)))
    code = f'open({str(marker)!r}, "w")'
    code = b'X' + struct.pack('<I', len(code)) + code.encode()
    system = b'cos\nsystem\n'
    return {
        'reduce': system + command + b'\x85R.',
        'posix': b'cposix\nsystem\n' + command + b'\x85R.',
        'eval': b'cbuiltins\neval\n' + code + b'\x85R.',
        'stack_global': b'\x8c\x02os\x8c\x06system\x93' + command + b'\x85R.',
        'inst': b'(' + command + b'ios\nsystem\n.',
        'obj': b'(' + system + command + b'o.',
        'nested': b'}X\x01\0\0\0a](cbuiltins\ngetattr\n(cimportlib\nimport_module\n(X\x02\0\0\0ostRX\x06\0\0\0systemtR('
        + command
        + b'tRes.',
        'in a key': b'}' + system + command + b'\x85RNs.',
        'partial': b'cfunctools\npartial\n' + system + command + b'\x86R)R.',
        'map': b'cbuiltins\nlist\ncbuiltins\nmap\n' + system + b'](' + command + b'e\x86R\x85R.',
        'newobj_ex': b'\x80\x04csubprocess\nPopen\n](X\x05\0\0\0touchX'
        + struct.pack('<I', len(str(marker)))
        + str(marker).encode()
        + b'e\x85}\x92.',
        'build': b'\x80\x02ccollections\nOrderedDict\n)R}X\x0c\0\0\0__setstate__' + system + b'sb' + command + b'b.',
        'builder renamed': b'\x80\x02' + ZERO + b'}X\x08\0\0\0__code__' + system + b'sb.',
        'rebuild type': b'\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n('
        + system
        + b'ctorch\nTensor\n'
        + command
        + b'\x85NtR.',
        'default factory': b'\x80\x02ccollections\ndefaultdict\n' + system + b'\x85R' + command + b'Ns.',
        'persistent': b'\x80\x02' + system + command + b'\x85RQ.',
        'persistent class': b'\x80\x02(X\x06\0\0\0modulecos\nsystem\nNNtQ.',
    }


@FORMATS
@pytest.mark.parametrize('name', attacks('marker'))
def test_nothing_runs(tmp_path, name, zipped):
    marker = tmp_path / 'marker'
    path = crafted(tmp_path, attacks(marker)[name], zipped=zipped)
    try:
        load(path)
    except UserError as error:
        assert str(path) in str(error)
    assert not marker.exists()


def test_the_attacks_are_attacks(tmp_path):
    """The same opcodes do run in Python's unpickler, so that the test above means something."""
    ran = []
    for name, program in attacks(tmp_path / 'marker').items():
        try:
            item = pickle.Unpickler(io.BytesIO(program)).load()
            getattr(item, 'wait', int)()
        except (pickle.UnpicklingError, TypeError, AttributeError, NameError, ImportError, RuntimeError):
            pass
        if (tmp_path / 'marker').exists():
            ran.append(name)
            os.remove(tmp_path / 'marker')
    assert {'reduce', 'posix', 'eval', 'stack_global', 'inst', 'obj', 'nested', 'partial', 'map', 'build'} <= set(ran)


def test_unknown_names_are_not_imported(tmp_path):
    (tmp_path / 'imported_by_mistake.py').write_text('raise SystemExit("imported")')
    sys.path.insert(0, str(tmp_path))
    try:
        path = crafted(tmp_path, b'\x80\x02}X\x01\0\0\0acimported_by_mistake\nName\n)Rs.')
        assert repr(load(path)['a']) == '<imported_by_mistake.Name, not loaded>'
    finally:
        sys.path.remove(str(tmp_path))


def test_builders_cannot_be_changed_by_a_file(tmp_path):
    before = dict(restricted_pickle._BUILDERS)
    program = b'\x80\x02' + ZERO + b'}X\x04\0\0\0nameX\x01\0\0\0xsb0}.'
    assert load(crafted(tmp_path, program)) == {}  # the name is inert, its state is dropped
    assert restricted_pickle._BUILDERS == before
    path = saved(tmp_path, {'w': torch.ones(2)})
    assert torch.equal(load(path)['w'], torch.ones(2))


@FORMATS
@pytest.mark.parametrize(
    'size, stride, offset',
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((2,), (2**40,), 0),
        ((2,), (-1,), 3),
        ((1,), (1,), -1),
        ((2**62, 2**62), (0, 0), 0),
        ((2**30,), (0,), 0),
        ((0,), (1,), 5),
        ((-1,), (1,), 0),
        ((4,), (1, 1), 0),
        (('4',), (1,), 0),
        ((2.0,), (1,), 0),
        (((1, 2),), (1,), 0),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset, zipped):
    path = crafted(tmp_path, tensor_program(size, stride, offset), zipped=zipped)
    with pytest.raises(UserError, match=r'crafted\.pth'):
        load(path)


@FORMATS
def test_the_crafted_tensor_reads_when_it_is_right(tmp_path, zipped):
    path = crafted(tmp_path, tensor_program((2, 2), (2, 1)), [('0', np.arange(4, dtype='<f4').tobytes())], zipped)
    assert load(path)['w'].tolist() == [[0, 1], [2, 3]]


@FORMATS
@pytest.mark.parametrize(
    'count, storage',
    [
        (5, 'FloatStorage'),
        (3, 'FloatStorage'),
        (2**50, 'FloatStorage'),
        (-4, 'FloatStorage'),
        (4, 'DoubleStorage'),
        (4, 'NoStorage'),
    ],
)
def test_storages_have_the_size_they_claim(tmp_path, count, storage, zipped):
    path = crafted(tmp_path, tensor_program((1,), (1,), 0, count, storage), zipped=zipped)
    with pytest.raises(UserError, match=r'crafted\.pth'):
        load(path)


def test_one_byte_does_not_fill_a_storage(tmp_path):
    path = crafted(tmp_path, tensor_program((4,), (1,)), [('0', b'x')])
    with pytest.raises(UserError, match='has 1 bytes where 16 are expected'):
        load(path)


def test_many_storages_cannot_ask_for_more_than_the_file(tmp_path):
    programs = tensor_program((1,), (1,), count=10**6)
    with pytest.raises(UserError, match='larger than the file'):
        load(crafted(tmp_path, programs, zipped=False))


@pytest.mark.parametrize(
    'program, message',
    [
        (b'\x82\x01.', 'EXT1'),
        (b'\x83\x01\0.', 'EXT2'),
        (b'\x84\x01\0\0\0.', 'EXT4'),
        (b'P1\n.', 'PERSID'),
        (b'\x96\xff\xff\xff\xff\xff\x00\x00\x00.', 'truncated'),  # BYTEARRAY8 of a terabyte
        (b'B\xff\xff\xff\xff.', 'truncated'),
        (b'j\xff\xff\xff\x7f.', 'truncated'),  # a memo entry that is not there
        (b']r\xff\xff\xff\x7f0}.', None),  # a memo entry of a large number takes no memory here
        (b']' * 200 + b'a' * 199 + b'.', 'nested too deeply'),
        (b'](' + b'l' * 5 + b'.', 'truncated'),
        (b']q\x00h\x00a.', 'contains itself'),
        (b'}q\x00X\x01\0\0\0ah\x00s.', 'contains itself'),
        (b'}' + b')' + b'\x85' * 100000 + b'Ns.', 'serves as the key'),  # hashing this tuple crashes Python
        (b'}]Ns.', 'serves as the key'),
        (b'K\x01)R.', 'calls a int'),
        (b'K\x01}b.', 'sets the state'),
        (b'K\x01K\x02a.', 'fills a int'),
        (b'cos\nsystem\n)R.', 'one pickled object of os.system'),
        (b'.', 'truncated'),
        (b'\xff.', 'truncated'),
        (b'}', 'truncated'),
        (b'X\x02\0\0\0\xff\xff.', 'truncated'),
    ],
)
def test_malformed_pickles(tmp_path, program, message):
    path = crafted(tmp_path, program)
    if message is None:
        assert load(path) == {}
        return
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_shallow_parts_do_not_make_a_deep_whole(tmp_path):
    """Lists seen before count with their height, in whatever order they come."""
    program = b']q\x00(' + b''.join(b']q%c(h%ce' % (i + 1, i) if i else b']q\x01' for i in range(100)) + b'e.'
    with pytest.raises(UserError, match='nested too deeply'):
        load(crafted(tmp_path, program))


def test_laughs_stay_few(tmp_path):
    """Each list holds the one before ten times: 10^40 leaves in a few bytes; nobody walks them."""
    program = b']q\x00' + b''.join(b'0](' + b'h%c' % i * 10 + b'eq%c' % (i + 1) for i in range(40)) + b'.'
    assert len(load(crafted(tmp_path, program))) == 10
    names = b']q\x00' + b''.join(b'0](' + b'h%c' % i * 10 + b'eq%c' % (i + 1) for i in range(40)) + b'X\x01\0\0\0a\x93.'
    with pytest.raises(UserError, match='without a name'):
        load(crafted(tmp_path, names))


def test_endless_pickles_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, '_MAX_STEPS', 1000)
    assert load(crafted(tmp_path, b'N0' * 400 + b'}.')) == {}
    with pytest.raises(UserError, match='too long'):
        load(crafted(tmp_path, b'N0' * 600 + b'}.'))
    # Copies count, too: 500 items, copied five times.
    program = b'(' + b'N' * 500 + b'lq\x000' + b'ctorch\nSize\nh\x00\x85R0' * 5 + b'}.'
    with pytest.raises(UserError, match='too long'):
        load(crafted(tmp_path, program))


def rebuilt(count, data):
    """Opcodes of a list of numpy arrays, each built anew from one and the same string."""
    head = b'\x80\x02](B' + struct.pack('<I', len(data)) + data + b'q\x000'
    array = b'cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J' + struct.pack('<i', len(data)) + b'\x85'
    array += b'cnumpy\ndtype\nX\x02\0\0\0u1\x85R\x89h\x00tb'
    return head + array * count + b'e.'


def test_arrays_built_again_from_one_string_count_each(tmp_path):
    data = bytes(100_000)
    assert [array.shape for array in load(crafted(tmp_path, rebuilt(1, data)))] == [(100_000,)]
    with pytest.raises(UserError, match='its arrays are larger than the file'):
        load(crafted(tmp_path, rebuilt(2, data)))


@FORMATS
def test_tensors_that_repeat_a_storage_count_each(tmp_path, zipped, monkeypatch):
    """Whoever copies them, as `zoo convert` does, would need what they claim, not what the file holds."""
    monkeypatch.setattr(restricted_pickle, '_MAX_SEEN', (16, 2**20))
    one = saved(tmp_path, {'w': torch.zeros(1).expand(2**17)}, zipped)
    assert load(one)['w'].shape == (2**17,)
    base = torch.zeros(2**10)
    shared = saved(tmp_path, {str(i): base.expand(16, -1) for i in range(50)}, zipped)
    with pytest.raises(UserError, match='repeat their storages too often'):
        load(shared)


def test_copies_of_a_dict_cost_what_they_take(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, '_MAX_STEPS', 3000)
    items = b'}(' + b''.join(b'K%cN' % i for i in range(200)) + b'uq\x000'
    assert load(crafted(tmp_path, items + b'cbuiltins\ndict\nh\x00\x85R0' * 2 + b'}.')) == {}
    with pytest.raises(UserError, match='too long'):
        load(crafted(tmp_path, items + b'cbuiltins\ndict\nh\x00\x85R0' * 4 + b'}.'))


def compressed(source, target, only=''):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for info in old.infolist():
            kind = zipfile.ZIP_DEFLATED if only in info.filename else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), kind)
    return target


@pytest.mark.parametrize('only', ['', 'data.pkl', 'data/0', 'version'])
def test_compressed_records_are_refused_before_they_are_read(tmp_path, only, monkeypatch):
    """torch.load inflates them: 0.3 MB become 300 MB."""
    path = compressed(saved(tmp_path, {'w': torch.zeros(100_000)}), tmp_path / 'bomb.pth', only)
    monkeypatch.setattr(zipfile.ZipFile, 'read', None)
    with pytest.raises(UserError, match=r'bomb.pth cannot be read: .* is compressed, to \d+ of \d+ bytes'):
        load(path)


def test_records_that_overlap_are_refused(tmp_path):
    """A table that names the same bytes again and again claims more than the file has."""
    path = saved(tmp_path, {'w': torch.zeros(1000)})
    with zipfile.ZipFile(path, 'a') as archive:
        [info] = [info for info in archive.infolist() if info.filename.endswith('data/0')]
        for index in range(5):
            again = copy.copy(info)
            again.filename = f'{info.filename}{index}'
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(UserError, match='its records claim'):
        load(path)


@pytest.mark.filterwarnings('ignore')
def test_tensors_that_no_network_here_has_are_told():
    quantised = torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)
    content = {
        'csr': torch.eye(3).to_sparse_csr(),
        'coo': torch.eye(3).to_sparse(),
        'int8': quantised,
        'meta': torch.ones(2, device='meta'),
        'nested': torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        'plain': torch.ones(2),
    }
    torch.save(content, 'other.pth')
    read = load('other.pth')
    assert torch.equal(read.pop('plain'), torch.ones(2))
    names = {key: value.name for key, value in read.items()}
    assert names == {
        'csr': 'a sparse tensor',
        'coo': 'a sparse tensor',
        'int8': 'a quantised tensor',
        'meta': 'a tensor without values, of the device meta',
        'nested': 'a nested tensor',
    }


# Files that are none


@FORMATS
def test_truncated_files(tmp_path, zipped):
    whole = saved(tmp_path, {'w': torch.randn(64, 64), 'v': torch.randn(5)}, zipped).read_bytes()
    path = tmp_path / 'part.pth'
    for share in (0.01, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r'part\.pth'):
            load(path)


def test_damaged_bytes(tmp_path):
    whole = bytearray(saved(tmp_path, {'w': torch.zeros(1000)}).read_bytes())
    place = whole.find(b'\0' * 3000)
    whole[place + 1500] ^= 1
    (tmp_path / 'bad.pth').write_bytes(whole)
    with pytest.raises(UserError, match=r'bad\.pth.*CRC'):
        load(tmp_path / 'bad.pth')


@FORMATS
def test_random_damage_never_escapes_as_another_error(tmp_path, zipped):
    path, _ = lightning_checkpoint(tmp_path, zipped)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(whole)
        for place in draw.integers(0, len(bad), 3):
            bad[place] = draw.integers(256)
        if zipped:  # keep the checksums out of the way
            program = bytearray(zipfile.ZipFile(path).read('last/data.pkl'))
            for place in draw.integers(0, len(program), 2):
                program[place] = draw.integers(256)
            keys = [name for name in zipfile.ZipFile(path).namelist() if '/data/' in name]
            storages = [(name.rpartition('/')[2], zipfile.ZipFile(path).read(name)) for name in keys]
            file = crafted(tmp_path, bytes(program), storages)
        else:
            file = tmp_path / 'damaged.pth'
            file.write_bytes(bad)
        try:
            load(file)
        except UserError as error:
            assert file.name in str(error)


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html><html>', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
        (b'PK\x03\x04 not a zip', 'cannot be read'),
        (pickle.dumps({'w': 1}, 2), 'not one that torch.save wrote'),
        (b'\0' * 257 + b'ustar' + b'\0' * 250, 'tar file'),
        (b'\x89PNG\r\n\x1a\n' + b'\0' * 600, 'no PyTorch checkpoint'),
        (b'\x80\x02\xff', 'truncated, damaged or no PyTorch checkpoint'),
    ],
)
def test_foreign_files(tmp_path, data, message):
    path = tmp_path / 'foreign.pth'
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_foreign_zips(tmp_path):
    with pytest.raises(UserError, match='not there'):
        load(tmp_path / 'absent.pth')
    with pytest.raises(UserError, match='a folder'):
        load(tmp_path)
    path = tmp_path / 'some.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(UserError, match='not one that torch.save wrote'):
        load(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', b'N' * 10**6)
    with pytest.raises(UserError, match='compressed'):
        load(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(UserError, match='TorchScript'):
        load(path)
    program = pickle.dumps({'a': 1}, 2)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', program)
        archive.writestr('x/byteorder', 'big')
    with pytest.raises(UserError, match='big-endian'):
        load(path)


def test_whole_models_are_named(tmp_path):
    path = saved(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match='one pickled object of torch.nn.modules.linear.Linear'):
        load(path)

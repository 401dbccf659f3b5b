"""Read the tensors of a PyTorch checkpoint without importing or calling anything that the file names.

Public VQGAN checkpoints are Lightning pickles: beside the weights they name callbacks and configuration classes, so
that ``torch.load(weights_only=True)`` refuses them and plain ``torch.load`` runs whatever they name. Here a pickle is a
program for a small stack machine of our own, built on ``pickletools.genops``, which only splits it into opcodes. A
global is never more than its name: the names in ``_BUILDERS`` have a builder in this file, every other name, and
whatever is made of it, becomes an inert `Placeholder`. Attributes are never set, so there is nothing to hook into.

Every file is read by it, whatever torch could do, so that what holds for it holds for every torch. It also bounds what
a file may take: memory in proportion to its size, and steps. docs/reliability.md says which attacks torch lets through.
"""

import mmap
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from dckd_sr.errors import UserError

_CODE = 2**26  # bytes that the code of a TorchScript file may unpack to
_MAGIC = 0x1950A86A20F9469CFC6C  # torch's stream format, before 1.6
_MAX_STEPS = 8_000_000  # opcodes, copied items, objects by their size; a checkpoint of 100,000 tensors needs 5 million
_OBJECT = 10  # steps that a tensor or an array costs beside its bytes; it is as large as so many small values
_MAX_PICKLE = 512 * 2**20
_MAX_SEEN = 16, 2**30  # bytes of all tensors, those that share or repeat a storage counted each: times the file, plus
_FOREIGN = {
    b'version https://git-lfs': "a Git LFS pointer, not the file itself: fetch it with 'git lfs pull'",
    b'<': 'a web page, not a checkpoint: the download failed',
}
_DTYPES = {
    'Double': torch.float64,
    'Float': torch.float32,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
    'QInt8': torch.int8,
    'QUInt8': torch.uint8,
    'QInt32': torch.int32,
    'ComplexFloat': torch.complex64,
    'ComplexDouble': torch.complex128,
    'Untyped': torch.uint8,
}
_STORAGES = {
    f'{module}.{name}Storage': dtype
    for name, dtype in _DTYPES.items()
    for module in ('torch', 'torch.cuda', 'torch.storage')
}
_TORCH_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_SCALARS = (str, bytes, int, float, bool, type(None))


class Placeholder:
    """What stands where the file names a class or function that is not ours: a name, and nothing that can be done."""

    __slots__ = ('name',)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f'<{self.name}, not loaded>'


def load(path):
    """Read a checkpoint written by ``torch.save`` (zip file, or the stream of torch < 1.6).

    Args:
        path: the file.

    Returns:
        dicts, lists, tuples, sets, strings, numbers, numpy arrays and tensors as the file nests them. Tensors lie on
        the CPU, need no gradient and share memory as they did when saved; OrderedDict and its like are plain dicts,
        parameters are plain tensors, objects of any other class are `Placeholder`.

    Raises:
        UserError: no such file; truncated, malformed or foreign content; a tensor that reaches beyond its storage; a
            pickle that is one object of a class, or that has no end in sight.
    """
    content, _ = _read(path)
    if isinstance(content, Placeholder):
        raise UserError(f'{path} holds one pickled object of {content.name}, not the weights of a network')
    return content


def globals_in(path):
    """Names, sorted, of everything that the file would import if it were unpickled and that `load` leaves out.

    Raises:
        UserError: as `load`.
    """
    return sorted(_read(path, with_data=False)[1])


def refuse_bombs(archive, size):
    """Refuse a zip file of torch whose records are more than its bytes: compressed ones, or some that overlap.

    Args:
        archive: zipfile.ZipFile; nothing is read from it but its table.
        size: bytes of the file.

    Raises:
        UserError: naming the first such record. TorchScript's code, which torch compresses, may unpack to 64 MiB.
    """
    try:
        _refuse_bombs(archive, size)
    except _Refused as error:
        raise UserError(f'{archive.filename} cannot be read: {error}') from error


def _refuse_bombs(archive, size):
    total = code = 0
    for info in archive.infolist():
        if info.compress_type == zipfile.ZIP_STORED:
            total += info.file_size
            continue
        if '/code/' not in info.filename:
            raise _Refused(
                f'{info.filename} is compressed, to {info.compress_size} of {info.file_size} bytes; torch.save does not'
            )
        total, code = total + info.compress_size, code + info.file_size
    if total > 2 * size:
        raise _Refused(f'its records claim {total} bytes, it has {size}')
    if code > _CODE:
        raise _Refused(f'its code unpacks to {code} bytes; at most {_CODE} are expected')


def _read(path, with_data=True):
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} is {"a folder" if path.is_dir() else "not there"}; expected a checkpoint')
    try:
        with open(path, 'rb') as file:
            head = file.read(64)
            foreign = next((what for start, what in _FOREIGN.items() if head.lstrip().startswith(start)), None)
            if foreign or not head:
                raise UserError(f'{path} is {foreign or "empty"}')
            file.seek(0)
            if head.startswith(b'PK'):
                return _read_zip(file, with_data)
            if head.startswith(b'\x80') or b'ustar' in file.read(512):
                file.seek(0)
                return _read_stream(file, with_data)
            raise UserError(f'{path} is no PyTorch checkpoint')
    except zipfile.BadZipFile as error:
        raise UserError(f'{path} cannot be read, it is truncated or damaged: {error}') from error
    except (_Refused, EOFError) as error:
        raise UserError(f'{path} cannot be read: {error or "it ends too early"}') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        # The machine's own operations on a stack that a sound pickle would not have produced.
        raise UserError(
            f'{path} is truncated, damaged or no PyTorch checkpoint ({type(error).__name__}: {error})'
        ) from error


def _read_zip(file, with_data):
    """torch's zip format: <name>/data.pkl names storages, <name>/data/<key> are their bytes, stored uncompressed."""
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len('data.pkl')] for name in records if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(roots) != 1:
        raise _Refused('a zip file, but not one that torch.save wrote')
    root = roots[0]
    if f'{root}constants.pkl' in records:
        raise _Refused('a TorchScript program, not a checkpoint')
    room = _Room(file.seek(0, 2))
    _refuse_bombs(archive, room.size)
    if f'{root}byteorder' in records and _record(archive, records[f'{root}byteorder'], 16) != b'little':
        raise _Refused('its numbers are big-endian')

    def fetch(key, size):
        info = records[f'{root}data/{key}']
        if info.file_size != size:
            raise _Refused(f'storage {key} has {info.file_size} bytes where {size} are expected')
        data = room.take(size)
        if size and with_data:
            data.numpy()[:] = np.frombuffer(_record(archive, info, size), np.uint8)
        return data

    program = _record(archive, records[f'{root}data.pkl'], _MAX_PICKLE)
    machine = _Machine(fetch, room)
    return machine.run(program), machine.unknown


def _record(archive, info, limit):
    if info.file_size > limit:
        raise _Refused(f'{info.filename} is too large')
    return archive.read(info)


def _read_stream(file, with_data):
    """torch's older format: five pickles (magic, version, system, content, storage keys), then the storages' bytes."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if stream[257:262] == b'ustar':
            raise _Refused('a tar file of torch 0.1; load and save it with a torch of 0.4 to 1.5 first')
        room = _Room(len(stream))
        plain = _Machine(None, room)
        if plain.run(stream) != _MAGIC:
            raise _Refused('a pickle, but not one that torch.save wrote')
        if plain.run(stream) != 1001 or plain.run(stream).get('little_endian') is not True:
            raise _Refused('an unknown version of the format, or big-endian numbers')
        # The bytes come after the pickle that refers to them: give each storage its memory first, fill it at the end.
        storages = {}

        def fetch(key, size):
            storages[key] = room.take(size)
            return storages[key]

        machine = _Machine(fetch, room)
        content = machine.run(stream)
        if not with_data:
            return content, machine.unknown
        keys = plain.run(stream)
        if not isinstance(keys, list) or {key for key in keys if isinstance(key, _SCALARS)} != set(storages):
            raise _Refused('its list of storages does not match its content')
        for key in keys:
            (count,) = struct.unpack('<q', stream.read(8))
            data = storages[key]
            if count * machine.item_sizes[key] != len(data):
                raise _Refused(f'storage {key} has {count} elements, not those of its tensors')
            raw = stream.read(len(data))
            if len(raw) != len(data):
                raise EOFError
            if raw:
                data.numpy()[:] = np.frombuffer(raw, np.uint8)
        return content, machine.unknown


class _Refused(Exception):
    """Well-formed, perhaps, but not something to be read; the message completes "<file> cannot be read: "."""


class _Room:
    """Memory for storages and arrays: in all no more than the file has bytes, whatever its pickle claims."""

    def __init__(self, size):
        self.size = self.left = size
        self.unseen = _MAX_SEEN[0] * size + _MAX_SEEN[1]

    def spend(self, size, what='storages'):
        if not 0 <= size <= self.left:
            raise _Refused(f'its {what} are larger than the file: truncated?')
        self.left -= size

    def take(self, size):
        self.spend(size)
        return torch.empty(size, dtype=torch.uint8)

    def see(self, size):
        """Count what a tensor amounts to where somebody copies it: storages may be shared and repeated."""
        self.unseen -= size
        if self.unseen < 0:
            raise _Refused('its tensors repeat their storages too often')


class _Global(Placeholder):
    """A name that the file wants to import, before anything was made of it."""

    __slots__ = ()


class _Storage:
    __slots__ = ('data', 'dtype')

    def __init__(self, data, dtype):
        self.data, self.dtype = data, dtype


class _NumpyType:
    """A numpy dtype under construction: REDUCE gives kind and size, BUILD the byte order."""

    def __init__(self, code):
        self.dtype = np.dtype(code)

    def build(self, state):
        if state[1] in ('<', '>'):
            self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
    """A numpy array under construction: BUILD brings everything; ``value`` replaces it in the result."""

    value = Placeholder('numpy.ndarray')

    def __init__(self, machine):
        self.machine = machine

    def build(self, state):
        _, shape, kind, fortran, raw = state
        if isinstance(kind, _NumpyType):
            raw = _bytes(raw)
            self.machine.room.spend(len(raw), 'arrays')  # each is a copy, also of bytes that another one was made of
            array = np.frombuffer(raw, kind.dtype)
            self.value = array.reshape(shape, order='F' if fortran else 'C').copy()


class _Machine:
    """Runs pickles of any protocol over plain values. It has no operation that imports, calls or sets attributes.

    Args:
        fetch: (key, bytes) -> uint8 tensor of that many bytes, for the storages that persistent ids name; None where
            there are none.
        room: the memory that is left for storages and arrays.
    """

    def __init__(self, fetch, room):
        self.fetch, self.room = fetch, room
        self.storages, self.item_sizes, self.unknown = {}, {}, set()
        self.steps = _MAX_STEPS

    def run(self, program):
        """Run one pickle from bytes or from a stream's position, and leave the stream behind its end."""
        self.memo, self.stack, self.marked = {}, [], []
        for opcode, arg, _ in pickletools.genops(program):
            self.spend(1)
            name = opcode.name
            if name in _PUSHED:
                self.stack.append(arg)
            elif name == 'STOP':
                return _settled(self.stack.pop(), 0, {})[0]
            elif name not in ('PROTO', 'FRAME'):
                operation = getattr(self, f'op_{name.lower()}', None)
                if operation is None:
                    raise _Refused(f'its pickle uses {name}, which a checkpoint does not need')
                operation(arg)

    def spend(self, steps):
        self.steps -= steps
        if self.steps < 0:
            raise _Refused('its pickle is too long')

    # The stack

    def op_mark(self, _):
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self):
        items, self.stack = self.stack, self.marked.pop()
        return items

    def op_pop(self, _):
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self, _):
        self.pop_mark()

    def op_dup(self, _):
        self.stack.append(self.stack[-1])

    def op_put(self, key):
        self.memo[key] = self.stack[-1]

    def op_get(self, key):
        self.stack.append(self.memo[key])

    op_binput = op_long_binput = op_put
    op_binget = op_long_binget = op_get

    def op_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    # Values and containers

    def op_none(self, _):
        self.stack.append(None)

    def op_newtrue(self, _):
        self.stack.append(True)

    def op_newfalse(self, _):
        self.stack.append(False)

    def op_empty_list(self, _):
        self.stack.append([])

    def op_empty_tuple(self, _):
        self.stack.append(())

    def op_empty_dict(self, _):
        self.stack.append({})

    def op_empty_set(self, _):
        self.stack.append(set())

    def op_list(self, _):
        items = self.pop_mark()
        self.stack.append(items)

    def op_tuple(self, _):
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_tuple1(self, _):
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self, _):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_dict(self, _):
        items = self.pop_mark()
        self.stack.append({})
        self.fill(items)

    def op_frozenset(self, _):
        items = self.pop_mark()
        self.stack.append(frozenset(self.key(item) for item in items))

    def op_append(self, _):
        item = self.stack.pop()
        self.extend([item])

    def op_appends(self, _):
        items = self.pop_mark()
        self.extend(items)

    def extend(self, items):
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        else:
            self.expect_placeholder(self.stack[-1])

    def op_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def op_setitems(self, _):
        items = self.pop_mark()
        self.fill(items)

    def fill(self, items):
        if isinstance(self.stack[-1], dict):
            for i in range(0, len(items), 2):
                self.stack[-1][self.key(items[i])] = items[i + 1]
        else:
            self.expect_placeholder(self.stack[-1])

    def op_additems(self, _):
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(self.key(item) for item in items)
        else:
            self.expect_placeholder(self.stack[-1])

    def key(self, item):
        """Dict keys and set members: scalars, flat tuples. Hashing a deeply nested tuple overflows Python's C stack."""
        if isinstance(item, tuple):
            self.spend(len(item))
        elif isinstance(item, torch.Tensor):
            raise _Refused('a tensor serves as the key of a dict')
        for part in item if isinstance(item, tuple) else (item,):
            if not isinstance(part, (*_SCALARS, Placeholder, torch.dtype)):
                raise _Refused(f'a {type(part).__name__} serves as the key of a dict')
        return item

    def expect_placeholder(self, item):
        if not isinstance(item, Placeholder):
            raise _Refused(f'its pickle fills a {type(item).__name__}')

    # Names, and what a file asks to be done with them

    def op_global(self, arg):
        module, _, name = arg.partition(' ')
        self.push_global(f'{module}.{name}')

    def op_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused('its pickle imports something without a name')
        self.push_global(f'{module}.{name}')

    def push_global(self, name):
        if name in _TORCH_DTYPES:
            self.stack.append(_TORCH_DTYPES[name])
            return
        if name not in _BUILDERS and name not in _STORAGES and name not in _TYPES:
            self.unknown.add(name)
        self.stack.append(_Global(name))

    def apply(self, function, args):
        """What REDUCE, INST, OBJ and NEWOBJ call a call: a builder of ours, or a placeholder."""
        if not isinstance(function, Placeholder):
            raise _Refused(f'its pickle calls a {type(function).__name__}')
        builder = _BUILDERS.get(function.name) if isinstance(function, _Global) else None
        if builder is None:
            return Placeholder(function.name)
        if not isinstance(args, tuple):
            raise _Refused(f'its pickle calls {function.name} without arguments')
        self.spend(len(args))
        return builder(self, *args)

    def op_reduce(self, _):
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.apply(function, args))

    op_newobj = op_reduce

    def op_newobj_ex(self, _):
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Placeholder(function.name) if keywords else self.apply(function, args))

    def op_obj(self, _):
        function, *args = self.pop_mark()
        self.stack.append(self.apply(function, tuple(args)))

    def op_inst(self, arg):
        args = self.pop_mark()
        self.op_global(arg)
        self.stack.append(self.apply(self.stack.pop(), tuple(args)))

    def op_build(self, _):
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (_NumpyType, _NumpyArray)):
            target.build(state)
        elif not isinstance(target, (dict, Placeholder)):  # a dict's attributes, such as _metadata, are not needed
            raise _Refused(f'its pickle sets the state of a {type(target).__name__}')

    def op_binpersid(self, _):
        self.stack.append(self.storage(self.stack.pop()))

    def storage(self, saved_id):
        """The storage of ('storage', type, key, device, elements[, view of another]); its bytes are fetched once."""
        if self.fetch is None or not isinstance(saved_id, tuple) or saved_id[0] not in ('storage', b'storage'):
            raise _Refused('its pickle refers to something that is not a storage')
        _, kind, key, _, count = saved_id[:5]
        view = saved_id[5] if len(saved_id) > 5 else None
        dtype = _STORAGES.get(getattr(kind, 'name', None))
        if dtype is None or not isinstance(count, int) or not isinstance(key, _SCALARS):
            raise _Refused('a storage of unknown type')
        item = _item_size(dtype)
        if key not in self.storages:
            self.item_sizes[key] = item
            self.storages[key] = self.fetch(key, count * item)
        data = self.storages[key]
        if view is not None:
            _, offset, size = view
            first, last = offset * item, (offset + size) * item
            if not 0 <= first <= last <= len(data):
                raise _Refused(f'a view reaches beyond storage {key}')
            data = data[first:last]
        return _Storage(data, dtype)


# Opcodes whose argument is the value. EXT1, EXT2, EXT4 (the extension registry), PERSID and out-of-band buffers have no
# operation here and are refused with every opcode that is not known.
_PUSHED = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT'),
    *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
    *('UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
}


def _settled(value, depth, seen):
    """(the result without half-built numpy objects, its height); at most 64 levels, so that walking it is safe."""
    if isinstance(value, _NumpyArray):
        return value.value, 0
    if isinstance(value, (_NumpyType, _Storage)):
        return Placeholder(type(value).__name__[1:]), 0
    if not isinstance(value, (dict, list, tuple)):
        return value, 0
    if id(value) not in seen and depth < 64:
        pairs = [_settled(item, depth + 1, seen) for item in (value.values() if isinstance(value, dict) else value)]
        items = [item for item, _ in pairs]
        result = dict(zip(value, items)) if isinstance(value, dict) else type(value)(items)
        # The value is kept alive, and with it its id.
        seen[id(value)] = value, result, 1 + max((height for _, height in pairs), default=0)
    if id(value) not in seen or depth + seen[id(value)][2] > 64:
        raise _Refused('it is nested too deeply, or contains itself')
    return seen[id(value)][1:]


def _item_size(dtype):
    return torch.empty(0, dtype=dtype).element_size()


def _bytes(raw):
    return raw.encode('latin-1') if isinstance(raw, str) else bytes(memoryview(raw))


# Builders: what the known names make of their arguments. The first parameter is the machine.


def _tensor(machine, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    return _strided(machine, storage, storage.dtype, offset, size, stride, metadata)


def _tensor_v3(machine, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    return _strided(machine, storage, dtype, offset, size, stride, metadata)


def _strided(machine, storage, dtype, offset, size, stride, metadata):
    """A view of the storage, after a check that its first and last element lie inside."""
    data = storage.data.view(dtype)
    if not len(size) == len(stride) <= 16 or any(
        type(n) is not int or not 0 <= n < 2**48 for n in (offset, *size, *stride)
    ):
        raise _Refused('a tensor with a size or stride that is none')
    count = 1
    for length in size:
        count *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if count else offset - 1
    if last >= len(data):
        raise _Refused(f'a tensor of size {tuple(size)} reaches beyond its storage of {len(data)} elements')
    machine.spend(_OBJECT)
    machine.room.see(count * _item_size(dtype))
    if metadata:
        return Placeholder('a conjugated or negated view')
    return data.as_strided(tuple(size), tuple(stride), data.storage_offset() + offset)


def _parameter(machine, data, *_):
    return data


def _other_tensor(what):
    """Builder of a tensor that no network here has: a placeholder that says what it is."""
    return lambda machine, *_: Placeholder(what)


def _from_type(machine, function, kind, args, state):
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass; the former loses them."""
    if getattr(kind, 'name', None) not in _TYPES:
        return Placeholder(getattr(kind, 'name', 'a tensor subclass'))
    return machine.apply(function, args)


def _dict(machine, items=()):
    """OrderedDict and dict, of Python 2 with their items as argument."""
    machine.spend(4 * len(items))
    return dict(items) if isinstance(items, dict) else {machine.key(key): value for key, value in items}


def _default_dict(machine, factory=None, items=()):
    return _dict(machine, items)


def _set(machine, items=()):
    machine.spend(4 * len(items))
    return {machine.key(item) for item in items}


def _frozen_set(machine, items=()):
    return frozenset(_set(machine, items))


def _sequence(machine, items=()):
    machine.spend(len(items))
    return tuple(items)


def _complex(machine, real, imaginary):
    return complex(real, imaginary)


def _encoded(machine, text='', encoding='latin1'):
    if encoding != 'latin1':
        raise _Refused('it has text in an encoding other than latin1')
    machine.spend(len(text) // 16)
    return text.encode('latin-1')


def _numpy_dtype(machine, code, *_):
    numeric = isinstance(code, str) and code[:1] in tuple('biufc') and code[1:].isdigit()
    return _NumpyType(code) if numeric else Placeholder('numpy.dtype')


def _numpy_array(machine, *_):
    machine.spend(_OBJECT)
    return _NumpyArray(machine)


def _numpy_scalar(machine, kind, raw):
    return (
        np.frombuffer(_bytes(raw), kind.dtype, count=1)[0].item()
        if isinstance(kind, _NumpyType)
        else Placeholder('numpy scalar')
    )


_TYPES = frozenset(['torch.Tensor', 'torch._tensor.Tensor', 'torch.nn.parameter.Parameter', 'numpy.ndarray'])
_BUILDERS = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._tensor._rebuild_from_type_v2': _from_type,
    'torch._utils._rebuild_sparse_tensor': _other_tensor('a sparse tensor'),
    'torch._utils._rebuild_sparse_csr_tensor': _other_tensor('a sparse tensor'),
    'torch._utils._rebuild_qtensor': _other_tensor('a quantised tensor'),
    'torch._utils._rebuild_nested_tensor': _other_tensor('a nested tensor'),
    'torch._utils._rebuild_meta_tensor_no_storage': _other_tensor('a tensor without values, of the device meta'),
    'torch._utils._rebuild_device_tensor_from_numpy': _other_tensor("a tensor of another device's own format"),
    'torch.serialization._get_layout': _other_tensor('a layout'),
    'torch.Size': _sequence,
    'collections.OrderedDict': _dict,
    'collections.Counter': _dict,
    'collections.defaultdict': _default_dict,
    '_codecs.encode': _encoded,
    'numpy.dtype': _numpy_dtype,
}
for _module in ('builtins', '__builtin__'):
    _BUILDERS.update(
        {
            f'{_module}.{_name}': _builder
            for _name, _builder in (
                ('dict', _dict),
                ('set', _set),
                ('frozenset', _frozen_set),
                ('complex', _complex),
                ('bytes', _encoded),
            )
        }
    )
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _BUILDERS.update({f'{_module}._reconstruct': _numpy_array, f'{_module}.scalar': _numpy_scalar})

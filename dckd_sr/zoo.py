"""Weights of other projects.

python -m dckd_sr.zoo list                 what there is
python -m dckd_sr.zoo get NAME             download, verified
python -m dckd_sr.zoo show NAME            where it is from, and the lines of an option file
python -m dckd_sr.zoo show FILE            what a weights file is: entries, tensors, the network that they are of
python -m dckd_sr.zoo convert last.ckpt    a clean file: tensors alone, which any reader opens without running code
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dckd_sr import checkpoint, restricted_pickle, safe_yaml
from dckd_sr.download import fetch, sha256_of, unpack
from dckd_sr.errors import UserError, entry_point, nearest
from dckd_sr.zoo_table import ENTRIES

FOLDER = Path('experiments', 'pretrained_models')

_ENCODER = ('encoder.', 'quant_conv.', 'quantize.')
_DECODER = ('decoder.', 'post_quant_conv.')
_FORMATS = ('.pth', '.safetensors')
_SAFETENSORS, _PROGRAMS = 'safetensors', ('ONNX, a model', 'TorchScript, a program')
_SUFFIXES = (*_FORMATS, '.pt', '.ckpt', '.onnx', '.bin', '.state')


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in arguments or files (one message, no traceback).
    """
    parser = argparse.ArgumentParser(prog='python -m dckd_sr.zoo', description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    sub = commands.add_parser('list', help='the public weights that are known here')
    sub.set_defaults(run=_list)
    sub = commands.add_parser(
        'get',
        help='download weights, verified; an interrupted download continues',
        description='Downloads to experiments/pretrained_models, where option files look for it.',
    )
    sub.add_argument('name', help='a name of the list')
    sub.add_argument('-o', '--output', metavar='FOLDER', help=f'default: {FOLDER.as_posix()}/FAMILY')
    sub.set_defaults(run=_get)
    sub = commands.add_parser(
        'show', help='where weights are from, and what an option file needs to use them; or what a file holds'
    )
    sub.add_argument('name', metavar='NAME_OR_FILE', help='a name of the list, or a weights file')
    sub.set_defaults(run=_show)
    sub = commands.add_parser(
        'convert',
        help='make a clean weights file of any checkpoint',
        description="Reads a checkpoint's tensors without running its code and writes a .pth ({'params': ...}) or "
        '.safetensors. Of a VQGAN (taming-transformers, or our VQGANModel) encoder, codebook and decoder are kept.',
    )
    sub.add_argument('file', help='.ckpt, .pth or .safetensors')
    sub.add_argument('-o', '--output', metavar='OUT', help='default: FILE_clean.pth beside FILE')
    sub.add_argument('--key', help='the entry with the weights; default: params_ema, params, state_dict, ...')
    sub.add_argument('--prefix', default='', help='keep the keys that start with this, and take it off')
    sub.add_argument('--no-decoder', action='store_true', help='of a VQGAN: what distillation needs and no more')
    sub.add_argument('--force', action='store_true', help='replace OUT if it exists')
    sub.set_defaults(run=_convert)
    args = parser.parse_args(argv)
    args.run(args)


def find(name):
    """The entry of a name.

    Raises:
        UserError: no such entry, with the nearest name.
    """
    if name not in ENTRIES:
        raise UserError(f'the zoo has no {name}{nearest(name, ENTRIES)}; all names: python -m dckd_sr.zoo list')
    return ENTRIES[name]


def path_of(entry, folder=None):
    """Where an entry's file is expected, relative to the current folder."""
    return (Path(folder) if folder else FOLDER / entry.family) / entry.file


def command_for(path):
    """The command that gets the file of a path, or None where the zoo has no file of this name."""
    name = Path(path).name
    return next((f'python -m dckd_sr.zoo get {e.name}' for e in ENTRIES.values() if e.file == name), None)


def resolve_zoo(block, path_block, letter='t'):
    """The plain network block and paths that ``{type: zoo, name: NAME}`` stands for.

    Args:
        block: the network block; besides type and name it may have allow_random, which stays.
        path_block: the section ``path``; a file that it names already is used instead of the default one.
        letter: g, t or vqgan.

    Returns:
        (network block, section ``path``, entry), both new.

    Raises:
        UserError: no such entry, other keys, or a network of another kind.
    """
    if block.get('name') is None:
        raise UserError('expected a name; all names: python -m dckd_sr.zoo list')
    entry = find(block['name'])
    extra = [key for key in block if key not in ('type', 'name', 'allow_random')]
    if extra:
        raise UserError(f'the zoo states all options; drop {", ".join(extra)}, or write what `zoo show` prints')
    if (entry.letter == 'vqgan') != (letter == 'vqgan'):
        raise UserError(f'{entry.name} is {"no" if letter == "vqgan" else "a"} VQGAN; it cannot be network_{letter}')
    network, paths = copy.deepcopy(entry.network), dict(path_block)
    key, file = f'pretrain_network_{letter}', path_of(entry).as_posix()
    if entry.network['type'] == 'spandrel':
        network['path'] = paths.pop(key, None) or file
    elif not block.get('allow_random') or paths.get(key) is not None:
        paths[key] = paths.get(key) or file
        if entry.param_key and paths[key] == file:
            paths.setdefault(f'param_key_{letter}', entry.param_key)
    if 'allow_random' in block:
        network['allow_random'] = block['allow_random']
    return network, paths, entry


def _list(_):
    width = max(map(len, ENTRIES))
    print(f'{"name":<{width}}  scale  hash        file')
    for entry in ENTRIES.values():
        print(f'{entry.name:<{width}}  x{entry.scale:<4}  {_hash(entry):<10}  {_state(entry)}')
    print('hash: unverified means that no public page states one; `show` names the pages.')


def _hash(entry):
    return 'unverified' if entry.sha256 is None else 'sha256' if len(entry.sha256) == 64 else 'sha256[:8]'


def _state(entry):
    path = path_of(entry)
    return path.as_posix() if path.is_file() else '-'


def _show(args):
    if args.name not in ENTRIES and (os.path.lexists(args.name) or Path(args.name).suffix in _SUFFIXES):
        for title, text in describe_file(args.name):
            print(f'{title:<9} {text}')
        return
    entry = find(args.name)
    print(f'name      {entry.name}')
    print(f'page      {entry.page}')
    print(f'url       {entry.url}' + (f' ({entry.member})' if entry.member else ''))
    if entry.sha256:
        print(f'sha256    {entry.sha256} (from {entry.hash_page})')
    else:
        print('sha256    unverified: no public page states it')
    print(f'license   {entry.license}')
    if entry.note:
        print(f'note      {entry.note}')
    path = path_of(entry)
    print(
        f'file      {path.as_posix()}'
        + ('' if path.is_file() else f' (missing: python -m dckd_sr.zoo get {entry.name})')
    )
    scale = '' if entry.letter == 'vqgan' else f', with scale: {entry.scale}'
    print(f'\nIn an option file{scale}:\n\n{_snippet(entry)}\nor, shorter:\n')
    print(f'network_{entry.letter}: {{type: zoo, name: {entry.name}}}')


def describe_file(path):
    """What a weights file is, without running code from it.

    Returns:
        list of (title, text): size, hash, format; each entry with its tensors; the network, as far as tensors tell.

    Raises:
        UserError: the file cannot be read; it says what it is instead where that is known.
    """
    from dckd_sr.archs import spandrel_arch  # late: spandrel is slow to import

    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} is {"a folder" if path.is_dir() else "not there"}; expected a file with weights')
    form, size = _format(path), path.stat().st_size
    lines = [('file', path), ('size', f'{size:,} bytes'), ('sha256', sha256_of(path)), ('format', form)]
    if form in _PROGRAMS:
        return [*lines, ('network', f'in the file; python -m dckd_sr.upscale IMAGE_OR_FOLDER -m {path} runs it')]
    content = checkpoint.read_file(path)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not the weights of a network')
    if {'epoch', 'iter', 'optimizers', 'schedulers'}.issubset(content):
        return [*lines, ('holds', f'the training state of iteration {content["iter"]}; no weights of networks')]
    entries = {name: value for name, value in content.items() if isinstance(value, dict)}
    found = {name: value for name, value in entries.items() if any(map(torch.is_tensor, value.values()))}
    if any(map(torch.is_tensor, content.values())) or not entries:
        found = {checkpoint.BARE: content}
    lines += [('entry', f'{name}: {_amount(weights)}') for name, weights in found.items()]
    others = [str(name) for name in content if name not in found] if checkpoint.BARE not in found else []
    if others:
        lines.append(('beside', ', '.join(others)))
    if form != _SAFETENSORS and (code := restricted_pickle.globals_in(path)):
        lines.append(('code', f'named, and not run: {", ".join(code)}'))
    told = checkpoint.read_metadata(path)
    if told:
        lines.append(('metadata', ', '.join(f'{key}: {value}' for key, value in told.items())))
    try:
        weights, used = checkpoint.read_entry(path)
        _, prefix = spandrel_arch.without_wrapper(weights)
        if prefix:
            lines.append(('prefix', f'{prefix} before all names of {used}; left out where they are loaded'))
        lines.append(('taken', f'{used}, where no key is set'))
        if f'{prefix}quantize.embedding.weight' in weights:
            return [*lines, ('network', 'VQGAN, which network_vqgan describes')]
        net = spandrel_arch.describe(path)
        options = ', '.join(f'{key}: {value}' for key, value in net.options.items())
        channels = f'{net.num_in_ch} to {net.num_out_ch} channels'
        lines.append(('network', f'{net.type}, x{net.scale}, {channels}{f"; {options}" if options else ""}'))
    except UserError as error:
        unknown = 'not told by its tensors; an option file says what it is'
        lines.append(('network', unknown if spandrel_arch.UNKNOWN in str(error) else str(error)))
    return lines


def _format(path):
    if checkpoint.is_safetensors(path):
        return _SAFETENSORS
    if path.suffix == '.onnx':
        return _PROGRAMS[0]
    if not zipfile.is_zipfile(path):
        return 'PyTorch, a stream as before 1.6'
    with zipfile.ZipFile(path) as archive:
        script = any(name.endswith('/constants.pkl') for name in archive.namelist())
    return _PROGRAMS[1] if script else 'PyTorch, a zip file'


def _amount(weights):
    """How many tensors, numbers, and of which types; what else there is."""
    tensors = [value for value in weights.values() if torch.is_tensor(value)]
    kinds = Counter(str(value.dtype).removeprefix('torch.') for value in tensors)
    types = ', '.join(kind if len(kinds) == 1 else f'{kind} ({count})' for kind, count in kinds.items())
    text = f'{len(tensors)} tensors, {sum(value.numel() for value in tensors):,} parameters and buffers, {types}'
    foreign = checkpoint.foreign_in(weights)
    return text + (f'; no tensors: {", ".join(foreign[:5])}' if foreign else '')


def _snippet(entry):
    network, paths, _ = resolve_zoo({'name': entry.name}, {}, entry.letter)
    lines = safe_yaml.dump({f'network_{entry.letter}': network})
    return lines + ''.join(['path:\n'] * bool(paths) + [f'  {key}: {value}\n' for key, value in paths.items()])


def _get(args):
    entry = find(args.name)
    target = get(entry, args.output)
    print(f'file      {target}')
    print(f'license   {entry.license}; {entry.page}')
    if entry.note:
        print(f'note      {entry.note}')
    if entry.sha256:
        print(f'sha256    verified against {entry.hash_page}')
    else:
        print(f'sha256    unverified, no public page states it; this file has {sha256_of(target)}')


def get(entry, folder=None, progress=True):
    """Download an entry's file, where it is not there yet.

    Returns:
        Path: the file.

    Raises:
        UserError: as `download.fetch` and `download.unpack`; it names the page where a browser finds the file.
    """
    target = path_of(entry, folder)
    try:
        if entry.member is None:
            return fetch(entry.url, target, entry.sha256, progress=progress)
        if not target.is_file():
            archive = target.with_name(entry.url.rpartition('/')[2].partition('?')[0])
            fetch(entry.url, archive, entry.sha256, progress=progress)
            [found] = unpack(archive, target.parent, [entry.member], progress=False)
            os.replace(found, target)
            found.parent.rmdir()
        return target
    except UserError as error:
        raise UserError(f'{error}; by hand: {entry.page}') from error


def _convert(args):
    source = Path(args.file)
    target = Path(args.output) if args.output else source.with_name(f'{source.stem}_clean.pth')
    weights, kept, dropped = convert(source, target, args.key, args.prefix, args.no_decoder, args.force)
    print(f'source    {source}')
    print(f'sha256    {sha256_of(source)}')
    print(f'weights   {weights}')
    for title, keys in (('kept', kept), ('dropped', dropped)):
        groups = Counter(key.split('.')[0] for key in keys)
        listed = ', '.join(f'{name} ({count})' for name, count in groups.items())
        print(f'{title:<9} {len(keys)} tensors: {listed}' if keys else f'{title:<9} nothing')
    code = restricted_pickle.globals_in(source) if source.suffix != '.safetensors' else []
    if code:
        print(f'left out  code that the file names and that was not run: {", ".join(code)}')
    print(f'written   {target}')


def convert(source, target, key=None, prefix='', no_decoder=False, force=False):
    """Write the tensors of a checkpoint, and nothing else of it, to a clean file.

    Args:
        source: any file that `checkpoint.read_weights` reads.
        target: .pth ({'params': state dict}) or .safetensors.
        key: the entry with the weights, see `checkpoint.read_weights`.
        prefix: keep the keys that start with it, without it. Where it is empty, a prefix of all keys that a program
            which trains has put there is left out, see `spandrel_arch.without_wrapper`.
        no_decoder: drop a VQGAN's decoder.
        force: replace an existing target.

    Returns:
        (entry used, with the prefix left out, keys kept, keys dropped). Of a VQGAN (which has a codebook,
        ``quantize.embedding.weight``) encoder, codebook and decoder are kept, its discriminator and perceptual loss
        dropped; of others everything.

    Raises:
        UserError: the source cannot be read or holds more than tensors, nothing is left, or the target exists.
    """
    target = Path(target)
    if target.suffix not in _FORMATS:
        raise UserError(f'{target} should end in {" or ".join(_FORMATS)}')
    if target.exists() and (not force or target.resolve() == Path(source).resolve()):
        raise UserError(f'{target} exists; name another file' + ('' if force else ' or add --force'))
    if prefix:
        weights, used = checkpoint.read_weights(source, key, '--key')
    else:
        from dckd_sr.archs import spandrel_arch  # late: spandrel is slow to import

        weights, used = checkpoint.read_entry(source, key, '--key')
        weights, wrapper = spandrel_arch.without_wrapper(weights)
        used += f', without {wrapper} before its names' if wrapper else ''
    kept = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    parts = ('',)
    if 'quantize.embedding.weight' in kept:
        parts = _ENCODER if no_decoder else _ENCODER + _DECODER
    elif no_decoder:
        raise UserError(f'{source} is no VQGAN: it has no {prefix}quantize.embedding.weight')
    kept = {name: value.detach().contiguous().clone() for name, value in kept.items() if name.startswith(parts)}
    if not kept:
        raise UserError(
            f"{source} ({used}) has no key that starts with '{prefix}'; the first is '{next(iter(weights))}'"
        )
    if target.suffix == '.pth':
        checkpoint.write({'params': kept}, target)
    else:
        _write_safetensors(kept, target)
    return (
        used,
        list(kept),
        [name for name in weights if name[: len(prefix)] != prefix or name[len(prefix) :] not in kept],
    )


def _write_safetensors(weights, target):
    temporary = target.with_name(f'.{target.name}.tmp')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(weights, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f'cannot save {target}: {error}') from error


if __name__ == '__main__':
    sys.exit(main())

"""Weights of other projects: ``python -m dckd_sr.zoo convert last.ckpt -o vqgan.safetensors`` makes a clean file.

A clean file holds tensors alone, so that any reader opens it without running code.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from dckd_sr import checkpoint, restricted_pickle
from dckd_sr.errors import UserError

_ENCODER = ('encoder.', 'quant_conv.', 'quantize.')
_DECODER = ('decoder.', 'post_quant_conv.')
_FORMATS = ('.pth', '.safetensors')


def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in arguments or files (one message, no traceback).
    """
    parser = argparse.ArgumentParser(prog='python -m dckd_sr.zoo', description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    sub = commands.add_parser(
        'convert',
        help='make a clean weights file of any checkpoint',
        description="Reads a checkpoint's tensors without running its code and writes a .pth ({'params': ...}) or "
        '.safetensors. Of a VQGAN (taming-transformers, or our VQGANModel) encoder, codebook and decoder are kept.',
    )
    sub.add_argument('file', help='.ckpt, .pth or .safetensors')
    sub.add_argument('-o', '--output', metavar='OUT', help='default: FILE_clean.pth beside FILE')
    sub.add_argument('--key', help='the entry with the weights; default: params_ema, params or state_dict')
    sub.add_argument('--prefix', default='', help='keep the keys that start with this, and take it off')
    sub.add_argument('--no-decoder', action='store_true', help='of a VQGAN: what distillation needs and no more')
    sub.add_argument('--force', action='store_true', help='replace OUT if it exists')
    sub.set_defaults(run=_convert)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        args.run(args)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _convert(args):
    source = Path(args.file)
    target = Path(args.output) if args.output else source.with_name(f'{source.stem}_clean.pth')
    weights, kept, dropped = convert(source, target, args.key, args.prefix, args.no_decoder, args.force)
    print(f'source    {source}')
    print(f'sha256    {sha256(source)}')
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
        prefix: keep the keys that start with it, without it.
        no_decoder: drop a VQGAN's decoder.
        force: replace an existing target.

    Returns:
        (entry used, keys kept, keys dropped). Of a VQGAN (which has a codebook, ``quantize.embedding.weight``)
        encoder, codebook and decoder are kept, its discriminator and perceptual loss dropped; of others everything.

    Raises:
        UserError: the source cannot be read or holds more than tensors, nothing is left, or the target exists.
    """
    target = Path(target)
    if target.suffix not in _FORMATS:
        raise UserError(f'{target} should end in {" or ".join(_FORMATS)}')
    if target.exists() and (not force or target.resolve() == Path(source).resolve()):
        raise UserError(f'{target} exists; name another file' + ('' if force else ' or add --force'))
    weights, used = checkpoint.read_weights(source, key)
    if key is not None and used != key:
        raise UserError(f"{source} has no entry '{key}'; found: {used}")
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


def sha256(path):
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == '__main__':
    sys.exit(main())

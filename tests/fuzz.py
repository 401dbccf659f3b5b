"""Random option files and images: each is answered in one line or works, within ten seconds, inside its output folder.

    python tests/fuzz.py --cases 2000        (or: make fuzz)

Cases are drawn by hypothesis and shrunk where they fail; the failing case is printed. tests/test_fuzz.py runs fewer of
them, always the same.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

import dckd_sr  # noqa: F401  (makes basicsr importable)

# isort: split
import cv2
import numpy as np
import torch
from basicsr.archs import build_network
from PIL import Image
from small_run import VQGAN, dckd_run, edsr

from dckd_sr import options, safe_yaml, test, train

PHASES = (hypothesis.Phase.generate, hypothesis.Phase.shrink)
LIMIT = 10  # seconds for a case
MEMORY = 4 << 30  # bytes that a case may take
OUTPUTS = ('experiments', 'results', 'tb_logger')
# What a case may write besides: Python's caches, devices, the sockets of loader processes.
_ELSEWHERE = re.compile(r'__pycache__|^/dev/|/pymp-|/torch(inductor)?_\w+$')
# Mistakes of ours that a general handler could hide in a neat line.
_BUG = re.compile(r'\b(?:Attribute|Name|UnboundLocal|Recursion|Assertion|Import|Key)Error\b')


class Hang(BaseException):
    """A case took too long; no `except Exception` may keep it."""


# ---------------------------------------------------------------------------------------------------------------------
# Running a case


class Sandbox:
    """A folder with the files of small runs, and a watch over what a case does beside its output folders."""

    hooked = None  # the sandbox whose case is running; audit hooks cannot be taken away

    def __init__(self, folder):
        self.root = Path(folder).resolve()
        self.work = self.root / 'work'
        self.work.mkdir()
        self.bases = _bases(self.work)
        self.files = {path: path.read_bytes() for path in self.root.rglob('*') if path.is_file()}
        self.count, self.outside = Counter(), []
        sys.addaudithook(_watch)

    def run(self, command, overrides=()):
        """Start an entry point on opt.yml in the folder; check how it ends and what it wrote.

        Returns:
            exit code.
        """
        before, told = self._tree(), io.StringIO()
        # A console that knows no letters but ASCII's, as one of Windows may.
        shown = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
        name, *flags = command.split()
        main = {'train': train.main, 'test': test.main, 'show': options.main}[name]
        arguments = ['show', 'opt.yml', *flags] if name == 'show' else ['-opt', 'opt.yml']
        arguments += ['--force_yml', *overrides] if overrides else []
        self.outside = []
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(shown), self._limits():
                Sandbox.hooked = self
                try:
                    code = main(arguments)
                except Hang:
                    raise AssertionError(f'more than {LIMIT} s') from None
                finally:
                    Sandbox.hooked = None
            beside = sorted(set(self._tree().items()) ^ set(before.items()))
        finally:
            for name in OUTPUTS:
                shutil.rmtree(self.work / name, ignore_errors=True)
        said = told.getvalue()
        self.count[f'{command} {code}'] += 1
        assert code in (0, 2), f'exit code {code}: {said}'
        assert 'Traceback' not in said, said
        if code == 2:
            errors = re.findall(r'^(?:dckd-\w+: )?error: .*', said, re.M)
            assert len(errors) == 1 and not _BUG.search(errors[0]), f'not one error of a user: {said}'
        assert not beside and not self.outside, f'written outside of {OUTPUTS}: {beside} {self.outside}'
        return code

    def restore(self):
        """The files as they were."""
        for path in [path for path in self.root.rglob('*') if path.is_symlink() or path.is_file()]:
            if path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)

    def _tree(self):
        found = {}
        for folder, folders, files in os.walk(self.root):
            if Path(folder) == self.work:
                folders[:] = [name for name in folders if name not in OUTPUTS]
            found.update({os.path.join(folder, name): 'folder' for name in folders})
            for path in (os.path.join(folder, name) for name in files):
                status = os.lstat(path)
                found[path] = (status.st_size, status.st_mtime_ns)
        return found

    @contextlib.contextmanager
    def _limits(self):
        """Ten seconds, by an alarm; a C function that does not come back is shown by its stack. Some memory."""

        def hang(number, frame):
            raise Hang(f'more than {LIMIT} s')

        former, limit = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path('/proc/self/statm').read_text().split()[0]) if Path('/proc/self/statm').exists() else 0
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limit[1]))
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        faulthandler.dump_traceback_later(6 * LIMIT, exit=True, file=_stderr)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_AS, limit)
            signal.signal(signal.SIGALRM, former)


_stderr = os.fdopen(os.dup(2), 'w')


def _watch(event, args):
    """An audit hook: whatever Python writes, wherever."""
    sandbox = Sandbox.hooked
    if sandbox is None or event not in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.symlink'):
        return
    if event == 'open' and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    for path in args[: 2 if event in ('os.rename', 'os.symlink') else 1]:
        if isinstance(path, (str, os.PathLike)):
            path = os.path.abspath(path)
            inside = any(path == str(top) or path.startswith(f'{top}/') for top in map(sandbox.work.joinpath, OUTPUTS))
            if not inside and not _ELSEWHERE.search(path):
                sandbox.outside.append(f'{event} {path}')


# ---------------------------------------------------------------------------------------------------------------------
# Option files

TYPES = ('EDSR', 'SwinIR', 'VQGAN', 'NAFNet', 'RRDBNet', 'UNetDiscriminatorSN', 'L1Loss', 'MSELoss', 'PSNRLoss')
TYPES += ('CharbonnierLoss', 'WeightedTVLoss', 'PerceptualLoss', 'GANLoss', 'DynamicContrastiveLoss')
TYPES += ('DistributionMappingLoss', 'Adam', 'AdamW', 'SGD', 'Rprop', 'ASGD', 'MultiStepLR', 'CosineAnnealingRestartLR')
TYPES += ('calculate_psnr', 'calculate_ssim', 'SRImageDataset', 'PairedImageDataset', 'SingleImageDataset')
TYPES += ('FFHQDataset', 'Dataset_PairedImage', 'Dataset_GaussianDenoising', 'SRModel', 'KDModel', 'DCKDModel')
TYPES += ('VQGANModel', 'ImageRestorationModel', 'SRGANModel', 'SwinIRModel', 'lmdb', 'spandrel', 'zoo')
TEXTS = (
    '',
    ' ',
    'x',
    'none',
    '~',
    '../x',
    '/nowhere/x',
    '/dev/zero',
    '.',
    'HR',
    'LR',
    'teacher.pth',
    'HR/0.png',
    'opt.yml',
)
TEXTS += (
    '../../../x',
    '/../../../x',
    '~nobody9/x',
    'nan',
    '1e-4',
    '0x10',
    'yes',
    '日本語',
    'a\x00b',
    'a\nb',
    '{}',
    '{0}',
    '{x}',
    '{',
    '%s',
    'a' * 300,
    'a' * 5000,
    '\ud800',
)
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e-300, 1e300)
ODD = (None, True, False, *NUMBERS, float('nan'), float('inf'), -float('inf'), *TEXTS)
ODD += ([], [[]], [0], [1], [-1], [1, 2, 3], [1.5], ['a'], [None], [10**30], {}, {'type': None}, {'a': {'b': [1]}})


def _bases(work):
    """The files of the runs, and name -> (command, options)."""
    opt = dckd_run(work)
    opt['train'].update(total_iter=1)
    opt['val']['val_freq'] = 1
    torch.save({'params': build_network(edsr()).state_dict()}, work / 'student.pth')
    plain = copy.deepcopy(opt)
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del plain[key]
    plain.update(model_type='SRModel', path={}, scale=2)
    plain['train'] = {
        key: opt['train'][key] for key in ('total_iter', 'optim_g', 'scheduler', 'pixel_opt', 'ema_decay')
    }

    swin = copy.deepcopy(plain)
    swin['network_g'] = {'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 4, 'img_range': 1.0}
    swin['network_g'].update(depths=[1], embed_dim=4, num_heads=[2], mlp_ratio=1, upsampler='pixelshuffle')
    swin['train']['scheduler'] = {'type': 'CosineAnnealingRestartLR', 'periods': [2], 'restart_weights': [1]}
    for block in swin['datasets'].values():
        block.update(type='SRImageDataset', lq_convention='uint8', cache='ram')
    swin['val'].update(tile_size=16, tile_overlap=4, save_img=True)
    swin['logger'].update(keep_checkpoints=1, save_checkpoint_format='safetensors')

    naf = copy.deepcopy(plain)
    naf.update(model_type='ImageRestorationModel', scale=1)
    naf['network_g'] = {'type': 'NAFNet', 'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1], 'dec_blk_nums': [1]}
    naf['train'].update(accum_iter=2, grad_clip=1.0, on_nonfinite='skip')
    for block in naf['datasets'].values():
        block.update(dataroot_lq='HR')
    naf['datasets']['train'].update(mini_batch_sizes=[2, 1], gt_sizes=[16, 32], iters=[1, 1])

    vqgan = copy.deepcopy(plain)
    vqgan.update(model_type='VQGANModel', scale=1, network_g={**copy.deepcopy(VQGAN), 'decoder': True})
    del vqgan['network_g']['allow_random']
    vqgan['train'].update(commit_opt={'type': 'MSELoss', 'loss_weight': 0.25})
    for block in vqgan['datasets'].values():
        block.update(dataroot_lq='HR')

    tested = copy.deepcopy(opt)
    tested['val'].update(save_img=True, suffix='out')
    tested['path'].update(pretrain_network_g='student.pth', strict_load_g=True, param_key_g='params')
    for entry in (plain, swin, naf, vqgan, tested):
        (work / 'opt.yml').write_text(safe_yaml.dump(entry), encoding='utf-8')
    bases = {'dckd': opt, 'plain': plain, 'swinir': swin, 'nafnet': naf, 'vqgan': vqgan}
    return {**{name: ('train', base) for name, base in bases.items()}, 'test': ('test', tested)}


def _places(value, path=()):
    """The paths of everything in an option dict."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def values():
    """A value that an option may hold by mistake."""
    plain = st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans())
    return st.one_of(
        st.sampled_from(ODD), st.sampled_from(TYPES), plain, st.lists(plain, max_size=3),
        st.dictionaries(st.text(max_size=4), plain, max_size=2),
    )  # fmt: skip


def tweaks(value):
    """A value of the same kind, more likely to pass the checks."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, (int, float)):
        return st.sampled_from((0, 1, 2, 3, 4, 5, 8, 12, 31, 32, 64, 0.3, 1e-30, 1e30))
    if isinstance(value, list):
        return st.sampled_from((value * 2, value[1:], [item for item in value if not item], value + [1], [2, 2]))
    return st.sampled_from(TYPES) if isinstance(value, str) else values()


@st.composite
def option_files(draw, bases):
    """(command, text of an option file): a valid one with one to three mistakes, of values, keys or characters."""
    command, base = bases[draw(st.sampled_from(sorted(bases)))]
    opt = copy.deepcopy(base)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = list(_places(opt))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        block = opt
        for key in above:
            block = block[key]
        action = draw(st.sampled_from(('replace', 'tweak', 'tweak', 'tweak', 'drop', 'rename', 'nest', 'swap', 'add')))
        if action == 'replace':
            block[last] = copy.deepcopy(draw(values()))
        elif action == 'tweak':
            block[last] = copy.deepcopy(draw(tweaks(block[last])))
        elif action == 'drop':
            del block[last]
        elif action == 'nest':
            block[last] = draw(st.sampled_from(([block[last]], {'type': block[last]}, {str(last): block[last]})))
        elif action == 'swap':
            block[last] = copy.deepcopy(_at(opt, draw(st.sampled_from(places))))
        elif isinstance(block, dict):
            name = draw(st.one_of(st.sampled_from([str(place[-1]) for place in places]), st.text(max_size=8)))
            block[name] = block.pop(last) if action == 'rename' else copy.deepcopy(draw(values()))
    try:
        text = safe_yaml.dump(opt)
    except (UnicodeError, ValueError):  # a text that no file can hold
        text = 'name: [\n'
    if draw(st.integers(0, 5)) == 0:
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(start + 20, len(text))))
        text = text[:start] + draw(st.text(max_size=6)) + text[end:]
    return command, text


@st.composite
def displays(draw, bases):
    """(command, text of an option file, overrides): values of a valid file taken away or of another type, and shown."""
    _, base = bases[draw(st.sampled_from(sorted(bases)))]
    opt, overrides = copy.deepcopy(base), []
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(opt))
        *above, last = draw(st.sampled_from(places))
        value = draw(st.one_of(st.none(), st.none(), values()))
        if draw(st.booleans()) and all(isinstance(key, str) for key in (*above, last)):
            text = draw(st.sampled_from(('null', '~', '', '[]', '{}', '1', 'x', '{type: ~}', '{type: [1]}', '[{}]')))
            overrides.append(f'{":".join([*above, last])}={text}')
        elif not draw(st.booleans()):
            _at(opt, above)[last] = copy.deepcopy(value)
        else:
            del _at(opt, above)[last]
    try:
        text = safe_yaml.dump(opt)
    except (UnicodeError, ValueError):  # a text that no file can hold
        text = 'name: ~\n'
    return draw(st.sampled_from(('show', 'show --test'))), text, overrides


def _at(opt, place):
    for key in place:
        opt = opt[key]
    return opt


def tame(value, key='', network=False):
    """Options without what is legal and only asks for hours: many iterations, large batches, deep or wide networks."""
    if isinstance(value, dict):
        return {k: tame(v, str(k), network or str(k).startswith(('network_', 'encoder'))) for k, v in value.items()}
    if isinstance(value, list):
        return [tame(item, key, network) for item in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return value
    most = {'total_iter': 2, 'mini_batch_sizes': 4, 'accum_iter': 3}.get(key)
    bounded = {'num_worker_per_gpu': 1, 'batch_size_per_gpu': 4, 'num_neg': 3, 'num_prefetch_queue': 3}
    if key in bounded and value <= 65536:
        most = bounded[key]
    if most is None and key == 'ch_mult':
        most = 2
    if most is None and re.search(r'block|group|layer|depth|blk|num_conv|num_mlp', key) and network:
        most = 3
    if most is None and (network or key in ('window_size', 'tile_size', 'scale')) and value < 10**10:
        most = 64
    return value if most is None or value <= most else most


def tell(text):
    """What a case is, for the report of one that fails."""
    with contextlib.suppress(hypothesis.errors.InvalidArgument):  # outside of hypothesis
        hypothesis.note(text)


def try_options(sandbox, command, text, overrides=()):
    """Start a command on a text as opt.yml."""
    try:
        opt = safe_yaml.parse(text)
        text = safe_yaml.dump(tame(opt)) if isinstance(opt, dict) else text
    except safe_yaml.YAMLError:
        pass
    tell(f'{command} {overrides}, opt.yml:\n{text}')
    try:
        (sandbox.work / 'opt.yml').write_text(text, encoding='utf-8', errors='surrogatepass', newline='')
        return sandbox.run(command, overrides)
    finally:
        sandbox.restore()


# ---------------------------------------------------------------------------------------------------------------------
# Images

FORMATS = {'PNG': ('.png', ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16')), 'JPEG': ('.jpg', ('L', 'RGB', 'CMYK'))}
FORMATS.update(
    {'TIFF': ('.tif', ('1', 'L', 'RGB', 'RGBA', 'CMYK', 'I;16', 'F')), 'BMP': ('.bmp', ('1', 'L', 'P', 'RGB'))}
)
FORMATS.update({'WEBP': ('.webp', ('RGB', 'RGBA')), 'PPM': ('.ppm', ('RGB',))})
READERS = ('PairedImageDataset', 'SRImageDataset', 'SingleImageDataset', 'Dataset_PairedImage', 'FFHQDataset')


def encoded(kind, mode, height, width):
    """The bytes of an image file."""
    pixels = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == 'I;16':
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


@st.composite
def image_cases(draw):
    """(command, dataset class, {path: content}): an image of any format, mode and size, whole, cut, or with changed
    bytes, or anything else under its name; and its partner, which is fine.
    """
    command, reader = draw(st.sampled_from(('train', 'test'))), draw(st.sampled_from(READERS))
    kind = draw(st.sampled_from(sorted(FORMATS)))
    suffix, modes = FORMATS[kind]
    place, partner = draw(st.permutations(('HR', 'LR')))
    size = st.one_of(st.just(24), st.just(24), st.sampled_from((1, 2, 3, 25)), st.integers(1, 40))
    height, width = draw(size), draw(size)
    if draw(st.integers(0, 4)) == 0:
        partner_height, partner_width = draw(size), draw(size)
    else:
        partner_height, partner_width = height, width
    factors = {'HR': 2, 'LR': 1}
    content = encoded(kind, draw(st.sampled_from(modes)), height * factors[place], width * factors[place])
    content = draw(st.one_of(st.just(content), damaged(content), st.binary(max_size=64)))
    other = encoded(kind, modes[-1], partner_height * factors[partner], partner_width * factors[partner])
    if draw(st.integers(0, 9)) == 0:
        suffix = draw(st.sampled_from([entry[0] for entry in FORMATS.values()]))
    return command, reader, {f'{place}/1{suffix}': content, f'{partner}/1{suffix}': other}


@st.composite
def damaged(draw, content):
    """A file cut short, with changed bits, anywhere or in its header, or with more bytes."""
    content, kind = bytearray(content), draw(st.sampled_from(('cut', 'bits', 'header', 'insert')))
    if kind == 'cut':
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == 'insert':
        place = draw(st.integers(0, len(content)))
        content[place:place] = draw(st.binary(max_size=16))
    else:
        last = len(content) if kind == 'bits' else min(64, len(content))
        for _ in range(draw(st.integers(1, 8))):
            content[draw(st.integers(0, last - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


def try_image(sandbox, command, reader, files):
    """Put files in the place of an image and its partner, and train or test a plain network on them."""
    tell(f'{command}, {reader}: ' + ', '.join(f'{name} {content.hex()}' for name, content in files.items()))
    opt = copy.deepcopy(sandbox.bases['plain'][1])
    opt['path'] = {'pretrain_network_g': 'student.pth'} if command == 'test' else {}
    for name, block in opt['datasets'].items():
        training = name == 'train'
        if reader in ('PairedImageDataset', 'SRImageDataset', 'Dataset_PairedImage') or not training:
            block['type'] = reader if reader != 'FFHQDataset' else 'SRImageDataset'
        if block['type'] == 'SingleImageDataset':
            del block['dataroot_gt']
        if block['type'] in ('SingleImageDataset', 'Dataset_PairedImage'):
            for key in ('gt_size', 'use_hflip', 'use_rot') if not training else ('use_hflip', 'use_rot'):
                block.pop(key, None)
    try:
        for name, content in files.items():
            (sandbox.work / name).with_name('1.png').unlink()
            (sandbox.work / name).write_bytes(content)
        (sandbox.work / 'opt.yml').write_text(safe_yaml.dump(opt), encoding='utf-8')
        return sandbox.run(command)
    finally:
        sandbox.restore()


# ---------------------------------------------------------------------------------------------------------------------
# All


def properties(sandbox):
    """The three properties, for `hypothesis.settings` and `hypothesis.seed`."""

    @hypothesis.given(option_files(sandbox.bases))
    def options_property(case):
        try_options(sandbox, *case)

    @hypothesis.given(image_cases())
    def images_property(case):
        try_image(sandbox, *case)

    @hypothesis.given(displays(sandbox.bases))
    def display_property(case):
        try_options(sandbox, *case)

    return options_property, images_property, display_property


def settings(cases, **more):
    """Hypothesis' settings for so many cases of unequal length."""
    checks = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=cases, phases=PHASES, deadline=None, database=None, suppress_health_check=checks, **more
    )


@contextlib.contextmanager
def quiet():
    """The image libraries' own words on the error stream, which no Python code can hold back."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def main(argv=None):
    """``python tests/fuzz.py``.

    Returns:
        exit code: 0 all fine, 1 a case failed, and is printed.
    """
    parser = argparse.ArgumentParser(description='Random option files and images.')
    parser.add_argument('--cases', type=int, default=2000, help='half of them option files, a quarter images')
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(2**32), help='drawn if not given')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f'seed {args.seed}', flush=True)
    began, home = time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(folder)
        os.chdir(sandbox.work)
        try:
            quarter = args.cases // 4
            for check, count in zip(properties(sandbox), (args.cases - 2 * quarter, quarter, quarter)):
                with quiet():
                    hypothesis.seed(args.seed)(settings(count)(check))()
        finally:
            os.chdir(home)
            total = sum(sandbox.count.values())
            ends = ', '.join(f'{name}: {number}' for name, number in sorted(sandbox.count.items()))
            print(f'{total} cases in {time.monotonic() - began:.0f} s; exit codes: {ends}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())

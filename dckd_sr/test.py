"""Test networks on any number of sets: ``python dckd_sr/test.py -opt options/test_edsr_x4.yml --with_teacher``."""

from __future__ import annotations

import functools
import os
import sys
from copy import deepcopy
from pathlib import Path

if __name__ == '__main__':
    # Run as a file, Python puts this folder first on the path, where this test.py hides the standard library's `test`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or '.').resolve() != Path(__file__).resolve().parent]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dckd_sr  # noqa: F401  (everything registers; what is not installed is told)

# isort: split
import torch
from basicsr.archs import build_network
from basicsr.utils import get_env_info, get_time_str
from basicsr.utils.options import dict2str

from dckd_sr import checkpoint, devices, logs, option_keys, options, precision, processes, sources
from dckd_sr.commands import test_parser as parser
from dckd_sr.data import build_val_loader
from dckd_sr.errors import SeveralErrors, UserError, entry_point, reason
from dckd_sr.evaluation import bicubic, evaluate, format_table, format_value, write_results
from dckd_sr.inference import VAL_KEYS
from dckd_sr.speed import Speed


@entry_point()
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in options, paths or images (one message, no traceback), 130 interrupted.
    """
    opt, args, notes = options.parse(sys.argv[1:] if argv is None else argv, is_train=False, command=parser())
    if args.launcher == 'none' or int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0:
        test(opt, args, notes)  # in one process


def test(opt, args, notes=()):
    """Run the test that a resolved option dict describes: networks x sets -> table, files and, if asked, images.

    Args:
        opt: see `options.parse`; reads datasets, network_g, network_t, path, val, scale, num_gpu, name
            and the keys of `speed.Speed`.
        args: with_teacher, bicubic, no_bicubic, save_img, self_ensemble, device, see `commands.test_parser`.
        notes: warnings for the log.

    Returns:
        network -> set -> `evaluation.Result`.
    """
    logs.start()
    device = _device(args.device, opt)
    if device.type == 'cpu':
        processes.keep_freed_memory()
    found, missing = split_sets(opt['datasets'])
    # One line per skipped set is enough.
    skipped = tuple(f'datasets.{key}.' for key in missing)
    notes = [note for note in notes if not note.startswith(skipped)] + list(missing.values())
    loaders = {name: build_val_loader(opt, name) for name in found}
    made = made_from(opt, args)
    if args.save_img or (opt.get('val') or {}).get('save_img'):
        refuse_among_inputs(opt, found)
    networks = _networks(opt, args, device)
    speed, slow = _speed(opt, device)
    notes += slow

    root = Path(opt['path']['results_root'])
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write to {root}: {error}') from error
    logger = logs.start(root / f'test_{opt["name"]}_{get_time_str()}.log')
    logger.info(get_env_info().strip('\n') + dict2str(opt), extra=logs.FILE_ONLY)
    for note in notes:
        logger.warning(note)
    if device.type == 'cuda':
        logger.info(precision.describe(opt, device))

    val, scale = opt.get('val') or {}, opt.get('scale', 1)
    metrics, save_img = val.get('metrics') or {}, args.save_img or val.get('save_img', False)
    sizes = {key: val.get(key) for key in VAL_KEYS}
    sizes['self_ensemble'] = args.self_ensemble or val.get('self_ensemble', False)
    if not metrics and not save_img:
        logger.warning('val.metrics is empty and no image is saved: set val.metrics or pass --save_img')
    results = {}
    for network, (net, suffix) in networks.items():
        results[network] = {}
        if isinstance(net, torch.nn.Module):
            speed.prepare(network, net)
        for key, loader in loaders.items():
            set_name = opt['datasets'][key].get('name', key)
            with logs.explained(f'{network} on {set_name}'):
                result = evaluate(
                    net,
                    loader,
                    scale=scale,
                    metrics=metrics,
                    device=device,
                    **sizes,
                    run=functools.partial(speed, network),
                    save_dir=Path(opt['path']['visualization']) / set_name if save_img else None,
                    suffix=suffix,
                    progress=True,
                )
            results[network][set_name] = result
            scores = [f'{name} {format_value(name, value)}' for name, value in result.means.items()]
            seconds = sum(row['seconds'] for row in result.rows) / len(result.rows)
            logger.info(
                ', '.join([f'{network} on {set_name}: {len(result.rows)} images', *scores, f'{seconds:.3f} s/image'])
            )
            for note in result.notes:
                logger.warning(f'{network} on {set_name}: {note}')

    about = _about(opt, results, metrics, missing, {**sizes, **_fast(opt, device)})
    paths = write_results(root, results, about, made)
    logger.info('Results:\n' + format_table(results))
    logger.info(f'Written to {root}: ' + ', '.join(path.name for path in paths))
    if save_img:
        logger.info(f'Images in {opt["path"]["visualization"]}')
    return results


def refuse_among_inputs(opt, found):
    """Raises UserError if the images of a set would be written into a folder that images are read from."""
    written = {Path(opt['path']['visualization'], opt['datasets'][key].get('name', key)).resolve() for key in found}
    for key, path in sources.inputs(opt):
        if Path(path).resolve() in written:
            raise UserError(f'{key} = {path}: the images of this test would be written there: give it another name')


def made_from(opt, args):
    """What the scores of this test are made from, for who wants to use them again; see `sources.of_test`."""
    return sources.of_test(opt, self_ensemble=bool(args.self_ensemble))


def _device(name, opt):
    """The device of the command line, else that of the options."""
    if name is None:
        return devices.of(opt)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise UserError(f'--device {name}: not usable here, where {count} GPUs are: {reason(error)}') from error


def _speed(opt, device):
    """How networks run, and warnings."""
    if not opt.get('use_compile') or (opt.get('val') or {}).get('tile_size'):
        return Speed(opt, device), []
    why = 'without effect in a test without val.tile_size: each size of image would be compiled'
    return Speed({**opt, 'use_compile': False}, device), [f'use_compile: {why}']


def _fast(opt, device):
    """What changes scores a little, as a reader of the table must know."""
    rounded = [name for name, used in precision.rounds(device)._asdict().items() if used]
    fast = {key: opt[key] for key in ('use_amp', 'amp_bf16', 'amp_networks') if opt.get(key)}
    return {**fast, 'TF32': ', '.join(rounded)}


def split_sets(datasets):
    """Keys of the sets to test on (test*, or val* of a training file), and key -> what is missing of the others.

    Raises:
        UserError: there is no set to test on.
    """
    for phase in ('test', 'val'):
        keys = [key for key in datasets if key.split('_')[0] == phase]
        if keys:
            break
    else:
        raise UserError('datasets: no entry named test, test_1, ... (or val, val_1, ...)')
    found, missing = [], {}
    for key in keys:
        if datasets[key].get('missing') is None:
            found.append(key)
        else:
            # GT and LQ of a set come from the same place: that is said once.
            why = '; '.join(dict.fromkeys(datasets[key]['missing'].split('; ')))
            missing[key] = f'{datasets[key].get("name", key)} is skipped: {why}'
    if not found:
        raise SeveralErrors(missing.values(), 'there is no set to test on')
    return found, missing


def _networks(opt, args, device):
    """label -> (network, suffix of its images), in the table's order."""
    networks, val = {}, opt.get('val') or {}
    suffix = f'_{val.get("suffix") or opt["name"]}'  # BasicSR's
    scale = opt.get('scale', 1)
    if args.bicubic and scale == 1:
        raise UserError('--bicubic: scale is 1, there is nothing to enlarge')
    if scale > 1 and not args.no_bicubic:
        networks['bicubic'] = bicubic(scale), f'{suffix}_bicubic'
    labels = {'g': ('student', suffix), 't': ('teacher', f'{suffix}_teacher')}
    for letter in ('g', 't') if args.with_teacher else ('g',):
        label, ending = labels[letter]
        networks[label] = load_network(opt, letter).to(device), ending
    return networks


def load_network(opt, letter):
    """network_g or network_t in eval mode with its weights; the log says which entry of the file was used."""
    network_opt, path_opt = opt.get(f'network_{letter}'), opt.get('path') or {}
    if not network_opt:
        raise UserError(f'network_{letter} is missing' + (', --with_teacher needs it' if letter == 't' else ''))
    path = path_opt.get(f'pretrain_network_{letter}')
    in_block = path is None and network_opt.get('type') in option_keys.OWN_WEIGHTS
    files = {f'path.pretrain_network_{letter}': path}
    if in_block:
        files = _files_of(network_opt, f'network_{letter}')
    key = next((key for key, value in files.items() if value is None), None)
    if key is not None:
        hint = ''
        trained = Path('experiments') / opt['name'] / 'models' / 'net_g_latest.pth'
        if letter == 'g' and trained.is_file():
            hint = f'; add --force_yml path:pretrain_network_g={trained}'
        raise UserError(f'{key} is not set: there are no weights to test{hint}')
    report = options.Report()
    for key, value in files.items():
        options.check_file(report, key, value)
    if report.problems:
        raise options.OptionError(report.problems)
    network_opt = {key: value for key, value in deepcopy(network_opt).items() if key != 'allow_random'}
    try:
        net = build_network(network_opt).eval()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'network_{letter}: {reason(error)}') from error
    if not in_block:
        key = f'param_key_{letter}'
        checkpoint.load_network(net, path, path_opt.get(f'strict_load_{letter}'), path_opt.get(key), f'path.{key}')
    return net.requires_grad_(False)


def _files_of(network_opt, where):
    """Option key -> weights file of a network that is built with the weights that its block names."""
    members = network_opt.get('networks') if network_opt['type'] == 'Ensemble' else None
    if members is None:
        key = 'path' if network_opt['type'] == 'spandrel' else 'pretrain'
        return {f'{where}.{key}': network_opt.get(key)}
    parts = [_files_of(member, f'{where}.networks.{index}') for index, member in enumerate(members)]
    return {key: path for part in parts for key, path in part.items()}


def _about(opt, results, metrics, missing, sizes):
    """Lines under the table: which weights, which protocol, which sets are not in it."""
    labels = {'student': 'g', 'teacher': 't'}
    lines = []
    for name in results:
        if name in labels:
            letter = labels[name]
            own = _files_of(opt[f'network_{letter}'], '').values()
            lines.append(f'{name}: {opt["path"].get(f"pretrain_network_{letter}") or ", ".join(map(str, own))}')
    for name, metric_opt in metrics.items():
        arguments = ', '.join(f'{key} {value}' for key, value in metric_opt.items() if key != 'type')
        lines.append(f'{name}: {metric_opt["type"]}' + (f' ({arguments})' if arguments else ''))
    lines += [f'{key}: {value}' for key, value in sizes.items() if value]
    tested = [opt['datasets'][key] for key in split_sets(opt['datasets'])[0]]
    made = [block for block in tested if block.get('type') == 'SRImageDataset' and not block.get('dataroot_lq')]
    if made and opt.get('scale', 1) > 1:
        names = ', '.join(block.get('name', '') for block in made)
        lines.append(f"LR made from HR, as MATLAB's imresize: {names}")
    if missing:
        lines.append('not there: ' + ', '.join(opt['datasets'][key].get('name', key) for key in missing))
    return lines


if __name__ == '__main__':
    sys.exit(main())

"""Train any BasicSR model, ours included: ``python dckd_sr/train.py -opt options/train_edsr_x4.yml``."""

import contextlib
import copy
import datetime
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    # Run as a file, Python puts this folder first on the path, where our test.py hides the standard library's `test`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or '.').resolve() != Path(__file__).resolve().parent]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dckd_sr  # noqa: F401  (everything registers; what is not installed is told)

# isort: split
import torch
from basicsr.models import build_model
from basicsr.utils import AvgTimer, MessageLogger, get_env_info, get_time_str, set_random_seed
from basicsr.utils.logger import init_tb_logger, init_wandb_logger
from basicsr.utils.options import dict2str
from tqdm import tqdm

from dckd_sr import (
    checkpoint,
    locks,
    logs,
    network_facts,
    option_changes,
    option_keys,
    options,
    precision,
    processes,
    sources,
)
from dckd_sr.data import build_train_loader, build_val_loaders
from dckd_sr.data.seeded import SeededDataset
from dckd_sr.errors import UserError, entry_point, reason
from dckd_sr.evaluation import bicubic, evaluate

NEED_GPU = ('RealESRNetModel', 'RealESRGANModel')  # of BasicSR
PATIENCE = 10  # iterations in a row that may be left out with train.on_nonfinite: skip


@entry_point('interrupted; continue with --auto_resume')
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done (or stopped by SIGUSR1), 2 a mistake in options, paths or images, or no room to save (one
        message, no traceback), 130 stopped by SIGINT, 143 by SIGTERM.
    """
    try:
        opt, args, notes = options.parse(sys.argv[1:] if argv is None else argv, is_train=True)
        return train(opt, args, notes)
    finally:
        processes.stop()


def train(opt, args, notes=()):
    """Run the training that a resolved option dict describes; see `options.parse` for its entries.

    Returns:
        exit code, see `main`.
    """
    processes.start(opt, args.launcher)
    with processes.Signals() as signals, contextlib.ExitStack() as held, processes.together():
        try:
            signals.interruptible = True
            prepared = prepare(opt, args, notes, held)
            signals.interruptible = False
        except processes.Stopped:
            text = 'stopped before the first iteration: there is nothing to save'
            processes.tell(signals.exit_code, text)
            print(text, file=sys.stderr)
            return signals.exit_code
        return run(opt, *prepared, signals)


def prepare(opt, args, notes, held):
    """Everything before the first iteration: state, data, model, first look, folders, log.

    Args:
        held: the stack that keeps the run's folder from other processes until the run ends.

    Returns:
        what `run` needs, in its order.
    """
    set_random_seed(opt['manual_seed'])  # networks start equal on all ranks
    torch.backends.cudnn.benchmark = True
    precision.set_tf32(opt.get('use_tf32'))  # also for BasicSR's own models
    if opt['num_gpu'] == 0:
        processes.keep_freed_memory()
    bar = sys.stderr.isatty() and opt['rank'] == 0
    logs.start(bar=bar)

    root = Path(opt['path']['experiments_root'])
    occupied = opt['rank'] == 0 and root.is_dir()
    if occupied:
        occupy(root, held)
    processes.share(None, opt)  # states are looked for when no other training writes them
    state, state_path = checkpoint.find_state(opt)
    if processes.largest(state['iter'] if state else 0, opt) != (state['iter'] if state else 0):
        raise UserError(f'the ranks see different checkpoints in {opt["path"]["training_states"]}: share that folder')
    keep = state is not None and checkpoint.is_of_run(state_path, opt)
    if not keep:
        refuse_moving(opt)
    text = options.to_yaml(opt)
    made_from = sources.of_training(opt, opt['world_size']) if opt['rank'] == 0 else None
    changes = option_changes.compare(state, text) if state else {}
    start = state['iter'] if state else 0
    train_loader, sampler = build_train_loader(opt, opt['manual_seed'], opt['world_size'], opt['rank'], start)
    val_loaders = build_val_loaders(opt)
    if state:
        for name in checkpoint.trained_networks(opt):
            opt['path'][f'pretrain_network_{name}'] = None  # the state's weights replace it
    model = build(opt)
    if opt['rank'] > 0:
        set_random_seed(opt['manual_seed'] + opt['rank'])  # their stochastic layers do not
    if state:
        checkpoint.resume(model, opt, state, state_path, option_changes.concern_rates(changes))
    else:
        try_networks(model, train_loader.dataset, sampler, val_loaders, opt)
        look_first(model, val_loaders, opt)

    make_folders(opt, args.opt, text, state_path if keep else None, start, held, occupied)
    if opt['rank'] == 0:
        sources.begin(root, made_from, keep)
    processes.share(None, opt)  # the folders are there
    logger = logs.start(Path(opt['path']['log']) / f'train_{opt["name"]}_{get_time_str()}.log', bar)
    logger.info(get_env_info().strip('\n') + dict2str(opt), extra=logs.FILE_ONLY)
    for note in [*notes, *changes.values()]:
        logger.warning(note)
    about = {
        'images': len(train_loader.dataset),
        'batch': describe_batch(opt, sampler),
        'device': str(model.device),
        'iterations_per_epoch': sampler.iterations_per_epoch,
        'total_iter': int(opt['train']['total_iter']),
        'versions': logs.versions(),
    }
    logger.info(
        f'Training: {about["images"]} images, batch {about["batch"]} on {model.device}, '
        f'{sampler.iterations_per_epoch} iterations an epoch, {about["total_iter"]} iterations.'
    )
    if model.device.type == 'cuda':
        logger.info(precision.describe(opt, model.device))
        advice = precision.advice(opt, model.device)
        if advice:
            logger.warning(advice)
    if state:
        logger.info(f'Resuming from {state_path}, iteration {start}.')
    model.run_state = {'options': text, 'failures': ((state or {}).get('dckd_sr') or {}).get('failures', 0)}
    return model, train_loader, sampler, val_loaders, start, bar, about


def run(opt, model, train_loader, sampler, val_loaders, start, bar, about, signals):
    """The training loop, from the iteration after ``start`` to the last, or to a signal.

    Args:
        about: what ``metrics.jsonl`` says of the training at its start.

    Returns:
        exit code.
    """
    logger, tb_logger = logs.logging.getLogger('basicsr'), start_dashboards(opt)
    total, accum_iter = int(opt['train']['total_iter']), sampler.accum_iter
    print_freq, save_freq = int(opt['logger']['print_freq']), int(opt['logger']['save_checkpoint_freq'])
    val_freq = int(opt['val']['val_freq']) if opt.get('val') and val_loaders else 0
    message_logger = MessageLogger(opt, start, tb_logger)
    message_logger.max_iters = total + 1  # it takes one off, which makes the last ETA negative
    metrics = logs.Metrics(Path(opt['path']['log']) / 'metrics.jsonl' if opt['rank'] == 0 else None, start)
    metrics.write({'iter': start, 'start': about})
    data_timer, iter_timer = AvgTimer(), AvgTimer()
    progress = tqdm(total=total, initial=start, disable=not bar, dynamic_ncols=True, unit='it')
    batches, began, saved, stage = iter(train_loader), time.time(), start, None

    def validate(iteration):
        """True if a signal cut it short: its turn comes again after resuming."""
        if not val_freq or not iteration or not (iteration % val_freq == 0 or iteration == total):
            return False
        try:
            signals.interruptible = opt['world_size'] == 1 and not signals.received
            for loader in val_loaders:
                name = loader.dataset.opt['name']
                vars(model).pop('metric_results', None)  # of another set
                with logs.explained(f'validation on {name}'):
                    model.validation(loader, iteration, tb_logger, opt['val']['save_img'])
                metrics.write_scores(iteration, name, getattr(model, 'metric_results', {}))
        except processes.Stopped:
            return True
        finally:
            signals.interruptible = False
        return False

    if start == 0 and accum_iter > 1 and hasattr(model, 'start_from'):
        model.start_from(batch_of(train_loader, sampler.keys(0, micro)) for micro in range(accum_iter))
    # A state is saved before its validation, which is repeated here: it decides the best metrics.
    validate(start)
    for current_iter in range(start + 1, total + 1):
        if sampler.stage(current_iter - 1)[0] != stage and len(sampler.stages) > 1:
            stage = sampler.stage(current_iter - 1)[0]
            now = sampler.stages[stage]
            logger.info(f'Stage {stage + 1} of {len(sampler.stages)}: gt_size {now.gt_size}, batch {now.batch_size}.')
        model.update_learning_rate(current_iter, warmup_iter=opt['train'].get('warmup_iter', -1))
        for micro in range(accum_iter):
            batch = next(batches)
            data_timer.record()
            with logs.explained(f'iteration {current_iter}', opt):
                model.steps.begin(current_iter, micro)
                model.feed_data(batch)
                model.optimize_parameters(current_iter)
            data_timer.start()
        iter_timer.record()
        if current_iter == start + 1:
            message_logger.reset_start_time()  # the first iteration loads kernels and starts workers

        progress.update()
        epoch = (current_iter - 1) // sampler.iterations_per_epoch
        stopping = processes.largest(signals.received, opt)
        due = current_iter % save_freq == 0 or current_iter == total or bool(stopping)
        if current_iter % print_freq == 0 or due:
            check_finite(model, train_loader, sampler, opt)
        if current_iter % print_freq == 0 or current_iter == total:
            losses = model.get_current_log()
            progress.set_postfix({name: f'{value:.3g}' for name, value in losses.items()})
            line = {
                'epoch': epoch,
                'iter': current_iter,
                'lrs': model.get_current_learning_rate(),
                'time': iter_timer.get_avg_time(),
                'data_time': data_timer.get_avg_time(),
                **losses,
            }
            message_logger(dict(line))  # which it empties
            details = getattr(model, 'details', {})  # name -> one number a level
            metrics.write({**line, **details})
            for name, values in details.items() if tb_logger else ():
                for level, value in enumerate(values, 1):
                    tb_logger.add_scalar(f'contrast/{name}_{level}', value, current_iter)
        if due:
            logger.info('Saving models and training states.')
            saved = current_iter if save(model, epoch, current_iter, opt) else saved
        if not stopping and validate(current_iter):
            stopping = signals.received
            if saved != current_iter:
                save(model, epoch, current_iter, opt)
        if stopping:
            progress.close()
            signals.received = stopping
            name = signal.Signals(stopping).name
            logger.warning(f'Stopped by {name} after iteration {current_iter}. Continue with: {resume_command(opt)}')
            return signals.exit_code
        iter_timer.start()
        data_timer.start()

    progress.close()
    seconds = time.time() - began
    logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(seconds))}')
    metrics.write({'iter': total, 'end': {'seconds': round(seconds, 1)}})
    save(model, -1, -1, opt)
    if opt['rank'] == 0:
        sources.end(opt['path']['experiments_root'])
    logger.info(f'Saved the latest model in {opt["path"]["models"]}.')
    if tb_logger:
        tb_logger.close()
    return 0


def describe_batch(opt, sampler):
    """'16', '16 x 4 processes', '8/5/4 (progressive) x 2 accumulated'."""
    sizes = [stage.batch_size for stage in sampler.stages]
    text = f'{"/".join(map(str, sizes))}{" (progressive)" if len(sizes) > 1 else ""}'
    text += f' x {sampler.accum_iter} accumulated' if sampler.accum_iter > 1 else ''
    return text + (f' x {opt["world_size"]} processes' if opt['world_size'] > 1 else '')


def resume_command(opt):
    """The command line of this run, with --auto_resume."""
    words = ['python', *sys.argv] if sys.argv and sys.argv[0].endswith('.py') else list(sys.argv)
    words += [] if '--auto_resume' in words else ['--auto_resume']
    launcher = f'torchrun --nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", opt["world_size"])} '
    if opt['dist'] and 'TORCHELASTIC_RUN_ID' in os.environ:
        return launcher + ' '.join(words[1:] if words[0] == 'python' else words)
    return ' '.join(words)


def save(model, epoch, current_iter, opt):
    """Write a checkpoint and delete those that are not to be kept.

    Returns:
        whether it was written.

    Raises:
        UserError: it could not be written, and ``logger.on_save_error`` is not continue.
    """
    try:
        model.save(epoch, current_iter)
    except UserError as error:
        if opt['logger'].get('on_save_error') != 'continue':
            raise UserError(f'{error}. {last_checkpoint(opt)}') from error
        logs.logging.getLogger('basicsr').error(f'{error}. Training goes on without this checkpoint.')
        return False
    keep = opt['logger'].get('keep_checkpoints')
    if keep and opt['rank'] == 0 and current_iter > 0:
        best = {m['iter'] for metrics in getattr(model, 'best_metric_results', {}).values() for m in metrics.values()}
        checkpoint.prune(opt, keep, current_iter, best)
    return True


def last_checkpoint(opt):
    """A sentence about what there is to continue from."""
    states = [int(f.stem) for f in Path(opt['path']['training_states']).glob('*.state') if f.stem.isdigit()]
    return f'The checkpoint of iteration {max(states)} is intact' if states else 'There is no earlier checkpoint'


def build(opt):
    """BasicSR's build_model; arguments that a network, loss or optimiser refuses are the user's, not ours."""
    has_gpu = torch.cuda.is_available()
    if opt['model_type'] in NEED_GPU and (opt['num_gpu'] == 0 or not has_gpu):
        why = 'num_gpu is 0' if has_gpu else 'there is none that torch can use'
        raise UserError(f'{opt["model_type"]} needs a GPU, where it makes its training images; {why}')
    try:
        return build_model(opt)
    except UserError:
        raise
    except Exception as error:
        # Models that call .cuda() whatever the options say.
        if not has_gpu and re.search('not compiled with CUDA|NVIDIA driver|No CUDA GPU', str(error)):
            raise UserError(f'{opt["model_type"]} needs a GPU: {reason(error)}') from error
        raise UserError(f'{opt["model_type"]} cannot be built from these options: {reason(error)}') from error


def refuse_moving(opt):
    """An earlier run of this name will be moved aside: not with what this one reads in it.

    Raises:
        UserError: a file or a folder that the options name lies there.
    """
    for folder in run_folders(opt):
        for key, path in sources.inputs(opt) if folder.is_dir() else ():
            if folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UserError(
                    f'{key} = {path} lies in {folder}, which this run would move aside to begin anew: '
                    'give it another name, or continue the one that is there with --auto_resume'
                )


def run_folders(opt):
    """What a run writes to, and what is moved aside together."""
    return [Path(opt['path']['experiments_root']), Path(opt['root_path']) / 'tb_logger' / opt['name']]


def make_folders(opt, opt_file, text, state_path, start, held, occupied):
    """The run's folders, with the option file and its resolved form.

    Args:
        state_path: of the run's own, from which it goes on: later checkpoints are moved aside. None: it begins, and an
            earlier run of that name is moved aside.
        start: iteration of the state.
        occupied: ``held`` keeps other trainings from the folder that is there.

    Raises:
        UserError: no room, no right, or another training under way in this folder.
    """
    if opt['rank'] > 0:
        return
    root, logger, now = Path(opt['path']['experiments_root']), logs.logging.getLogger('basicsr'), get_time_str()
    try:
        written = Path(opt_file).read_bytes()  # it may lie in the folder that is moved
        if state_path is None:
            if root.exists() and not occupied:
                occupy(root, held)
            if os.name == 'nt':
                held.close()  # Windows moves no folder with an open file in it
            for folder in run_folders(opt):
                if folder.exists():
                    archived = unused(folder.with_name(f'{folder.name}_archived_{now}'))
                    folder.rename(archived)
                    logger.info(f'{folder} exists: moved to {archived.name}')
        for key in ('experiments_root', 'models', 'training_states', 'log', 'visualization'):
            Path(opt['path'][key]).mkdir(parents=True, exist_ok=True)
        if state_path is None:
            occupy(root, held)
        else:
            aside = unused(root / f'set_aside_{now}')
            names = checkpoint.set_aside(opt, state_path, start, aside)
            if names:
                logger.info(f'The run goes on from {state_path}: {", ".join(names)} moved to {aside}')
                if (root / 'metrics.jsonl').is_file():
                    shutil.copy2(root / 'metrics.jsonl', aside)
        (root / Path(opt_file).name).write_bytes(written)
        (root / 'resolved.yml').write_text(text, encoding='utf-8')
        checkpoint.sweep(opt)
    except OSError as error:
        raise UserError(f'cannot write the run to {root}: {error}') from error


def unused(path):
    """A path that is not there, with a number at its end where it must be."""
    names = itertools.chain([path.name], (f'{path.name}_{number}' for number in itertools.count(2)))
    return next(path for path in map(path.with_name, names) if not path.exists())


def occupy(root, held):
    """Keep a run's folder from other trainings until the stack ``held`` closes."""
    try:
        alone = held.enter_context(locks.sole_writer(root))
    except OSError as error:
        raise UserError(f'cannot write the run to {root}: {error}') from error
    if not alone:
        raise UserError(
            f'another training is writing to {root}: wait for its end, stop it, or give this one another name'
        )


def start_dashboards(opt):
    """BasicSR's TensorBoard writer, and W&B fed from it; both off in debug mode, as there."""
    logger_opt = opt['logger']
    if 'debug' in opt['name'] or opt['rank'] != 0:
        return None
    if (logger_opt.get('wandb') or {}).get('project') is not None:
        if not logger_opt.get('use_tb_logger'):
            raise UserError('logger.wandb.project: W&B shows what TensorBoard gets; set logger.use_tb_logger: true')
        try:
            init_wandb_logger(opt)
        except ImportError as error:
            raise UserError('logger.wandb.project is set, but wandb is not installed: pip install wandb') from error
    if logger_opt.get('use_tb_logger'):
        return init_tb_logger(log_dir=str(Path(opt['root_path']) / 'tb_logger' / opt['name']))
    return None


def try_networks(model, dataset, sampler, val_loaders, opt):
    """Before step 1, run student and teacher once on a training sample as it is, whatever their options say.

    Raises:
        UserError: they do not take it, or give another size or other channels than the ground truth; on all ranks.
    """
    problem = processes.share(_first_try(model, dataset, sampler, val_loaders, opt) if opt['rank'] == 0 else None, opt)
    if problem:
        raise UserError(problem)


def _first_try(model, dataset, sampler, val_loaders, opt):
    if opt['model_type'] not in option_keys.MODELS or opt['model_type'] == 'VQGANModel':
        return None  # what they feed their networks with is their own
    sample = _first_sample(dataset, sampler.keys(0)[0])
    lq, gt = sample.get('lq'), sample.get('gt')
    if lq is None or gt is None or lq.dim() != 3:
        return None
    scale, data = opt['scale'], opt['datasets']['train']
    color = {'PairedImageDataset': 'set color: y in datasets.train and in the sets of validation'}
    color = color.get(data['type'], 'use a PairedImageDataset with color: y')
    crop = (data.get('gt_sizes') or [data.get('gt_size')])[0]
    sizes = f'gt_size {crop} / scale {scale}' if crop else 'no gt_size'
    for name, net in (('network_g', model.get_bare_model(model.net_g)), ('network_t', getattr(model, 'net_t', None))):
        problem = net and network_facts.problem_with(net, lq, gt, scale, color, sizes)
        if problem:
            return f'{name} ({opt[name]["type"]}) {problem}'
    for loader in val_loaders:
        with contextlib.suppress(UserError):  # of the image, which validation says
            count = len(_first_sample(loader.dataset, 0)['lq'])
            if count != len(lq):
                key = next(key for key, block in opt['datasets'].items() if block['name'] == loader.dataset.opt['name'])
                return (
                    f'datasets.{key} gives images of {count} channels, datasets.train of {len(lq)}: write color: y in '
                    'both or in none'
                )
    return None


def _first_sample(dataset, key):
    """A sample, read by a copy: what a dataset opens, and takes out of its options then, workers do themselves."""
    inner = copy.copy(dataset.dataset)
    for name in ('opt', 'io_backend_opt'):
        if hasattr(inner, name):
            setattr(inner, name, copy.deepcopy(getattr(inner, name)))
    return SeededDataset(inner, dataset.seed)[key]


def look_first(model, val_loaders, opt):
    """Before step 1, score one validation image: bicubic, teacher, student. A teacher below bicubic is a wrong teacher.

    Raises:
        UserError: the teacher scores below bicubic and ``train.check_teacher`` is not false; on all ranks.
    """
    if not hasattr(model, 'net_t'):
        return
    problem = processes.share(_first_look(model, val_loaders, opt) if opt['rank'] == 0 else None, opt)
    if problem:
        raise UserError(problem)


def _first_look(model, val_loaders, opt):
    batch = next((batch for loader in val_loaders for batch in loader if 'gt' in batch), None)
    if batch is None:
        return None
    scale = opt.get('scale', 1)
    metric = next(
        (m for m in (opt['val'].get('metrics') or {}).values() if m['type'] == 'calculate_psnr'),
        {'type': 'calculate_psnr', 'crop_border': scale, 'test_y_channel': True},
    )
    same_channels = batch['lq'].shape[1] == batch['gt'].shape[1]  # dual-pixel input has two images
    nets = {
        'bicubic' if scale > 1 else 'input': bicubic(scale) if same_channels else None,
        'teacher': model.net_t,
        'student': model.get_bare_model(model.net_g),
    }
    image = Path(batch['lq_path'][0]).name
    sizes = {key: opt['val'].get(key) for key in ('window_size', 'tile_size', 'tile_overlap')}
    psnr = {}
    for name, net in nets.items():
        if net is not None:
            with logs.explained(f'{name} on {image}'):
                result = evaluate(net, [batch], scale=scale, metrics={'psnr': metric}, device=model.device, **sizes)
            if 'psnr' not in result.means:
                logs.logging.getLogger('basicsr').warning(f'No first look: {"; ".join(result.notes)}')
                return None
            psnr[name] = result.means['psnr']
    logs.logging.getLogger('basicsr').info(
        f'First look, PSNR of {image}: ' + ', '.join(f'{name} {value:.2f} dB' for name, value in psnr.items())
    )
    floor = psnr.get('bicubic', psnr.get('input', -math.inf))
    if psnr.get('teacher', math.inf) < floor and opt['train'].get('check_teacher', True):
        return (
            f'network_t: the teacher reaches {psnr["teacher"]:.2f} dB on {image}, below {floor:.2f} dB without any '
            'network. Are these its weights, its scale, its img_range? train.check_teacher: false trains all the same'
        )
    return None


def batch_of(loader, keys):
    """A batch is a function of its keys: it need not be kept on the device until somebody asks."""
    return torch.utils.data.default_collate([loader.dataset[key] for key in keys])


def check_finite(model, loader, sampler, opt):
    """Look at the losses and gradients since the last look; what was not finite has moved no weight.

    Raises:
        UserError: one was not finite and ``train.on_nonfinite`` is stop, or ten iterations in a row were not.
    """
    bad, looked = model.steps.take()
    wrong, row = {step.iteration for step in bad}, model.run_state['failures']
    longest = row
    for iteration in dict.fromkeys(step.iteration for step in looked):
        row = row + 1 if iteration in wrong else 0
        longest = max(longest, row)
    model.run_state['failures'] = row
    if not bad:
        return
    first = bad[0]
    terms = [f'{name} = {value}' for name, value in first.terms.items() if not math.isfinite(value)] or ['the gradient']
    what = f'iteration {first.iteration}: {", ".join(terms)} is not finite'
    skip = opt['train'].get('on_nonfinite') == 'skip'
    if skip and longest < PATIENCE:
        count = f'{len(wrong)} of {len({step.iteration for step in looked})} iterations'
        logs.logging.getLogger('basicsr').warning(f'{what}; {count} since the last line moved no weight')
        return
    path = Path(opt['path']['experiments_root']) / f'nonfinite_{first.iteration}_rank{opt["rank"]}.pth'
    batch = batch_of(loader, sampler.keys(first.iteration - 1, first.micro))
    checkpoint.write({**batch, 'iteration': first.iteration, 'terms': first.terms}, path)
    more = f'{PATIENCE} iterations in a row; ' if skip else ''
    raise UserError(
        f'{what}; {more}it moved no weight. The batch is in {path}. {last_checkpoint(opt)}. Is train.optim_g.lr too '
        'high? train.grad_clip limits gradients, train.on_nonfinite: skip leaves such iterations out'
    )


if __name__ == '__main__':
    sys.exit(main())

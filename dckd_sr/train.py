"""Train any BasicSR model, ours included: ``python dckd_sr/train.py -opt options/train_edsr_x4.yml``."""

import datetime
import math
import os
import shutil
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    # Run as a file, Python puts this folder first on the path, where our test.py hides the standard library's `test`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or '.').resolve() != Path(__file__).resolve().parent]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from dckd_sr import checkpoint, logs, options
from dckd_sr.errors import UserError

try:
    import dckd_sr.models  # noqa: F401  (everything registers)
except ImportError as error:
    raise SystemExit(f'error: {error}') from error

from basicsr.models import build_model
from basicsr.utils import AvgTimer, MessageLogger, get_env_info, get_time_str, set_random_seed
from basicsr.utils.logger import init_tb_logger, init_wandb_logger
from basicsr.utils.options import dict2str

from dckd_sr.data import build_train_loader, build_val_loaders
from dckd_sr.evaluation import bicubic, evaluate


def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 2 a mistake in options, paths or images (one message, no traceback), 130 interrupted.
    """
    try:
        opt, args, notes = options.parse(sys.argv[1:] if argv is None else argv, is_train=True)
        train(opt, args, notes)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse: --help, or an unknown flag
        return stop.code or 0
    except KeyboardInterrupt:
        print('interrupted; continue with --auto_resume', file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(opt, args, notes=()):
    """Run the training that a resolved option dict describes; see `options.parse` for its entries."""
    start_processes(opt, args.launcher)
    set_random_seed(opt['manual_seed'] + opt['rank'])
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 (torch leaves TF32 on for convolutions)
    bar = sys.stderr.isatty() and opt['rank'] == 0
    logs.start(bar=bar)

    state, state_path = checkpoint.find_state(opt)
    train_loader, sampler = build_train_loader(
        opt, opt['manual_seed'], opt['world_size'], opt['rank'], state['iter'] if state else 0
    )
    val_loaders = build_val_loaders(opt)
    if state:
        for name in checkpoint.trained_networks(opt):
            opt['path'][f'pretrain_network_{name}'] = None  # the state's weights replace it
    model = build(opt)
    if state:
        checkpoint.resume(model, opt, state, state_path)
    else:
        look_first(model, val_loaders, opt)

    make_folders(opt, args.opt, keep=state is not None)
    logger = logs.start(Path(opt['path']['log']) / f'train_{opt["name"]}_{get_time_str()}.log', bar)
    logger.info(get_env_info().strip('\n') + dict2str(opt), extra=logs.FILE_ONLY)
    for note in notes:
        logger.warning(note)
    tb_logger = start_dashboards(opt)
    total = int(opt['train']['total_iter'])
    start = state['iter'] if state else 0
    logger.info(
        f'Training: {len(train_loader.dataset)} images, batch {train_loader.batch_size} x {opt["world_size"]} on '
        f'{model.device}, {sampler.iterations_per_epoch} iterations an epoch, {total} iterations.'
    )
    if state:
        logger.info(f'Resuming from {state_path}, iteration {start}.')

    message_logger = MessageLogger(opt, start, tb_logger)
    message_logger.max_iters = total + 1  # it takes one off, which makes the last ETA negative
    data_timer, iter_timer = AvgTimer(), AvgTimer()
    progress = tqdm(total=total, initial=start, disable=not bar, dynamic_ncols=True, unit='it')
    print_freq, save_freq = int(opt['logger']['print_freq']), int(opt['logger']['save_checkpoint_freq'])
    val_freq = int(opt['val']['val_freq']) if opt.get('val') and val_loaders else 0
    batches = iter(train_loader)
    current_iter, began = start, time.time()
    for current_iter in range(start + 1, total + 1):
        batch = next(batches)
        data_timer.record()

        model.update_learning_rate(current_iter, warmup_iter=opt['train'].get('warmup_iter', -1))
        model.feed_data(batch)
        model.optimize_parameters(current_iter)
        iter_timer.record()
        if current_iter == start + 1:
            message_logger.reset_start_time()  # the first iteration loads kernels and starts workers

        progress.update()
        epoch = (current_iter - 1) // sampler.iterations_per_epoch
        if current_iter % print_freq == 0 or current_iter == total:
            losses = model.get_current_log()
            check_finite(losses, current_iter)
            progress.set_postfix({name: f'{value:.3g}' for name, value in losses.items()})
            message_logger(
                {
                    'epoch': epoch,
                    'iter': current_iter,
                    'lrs': model.get_current_learning_rate(),
                    'time': iter_timer.get_avg_time(),
                    'data_time': data_timer.get_avg_time(),
                    **losses,
                }
            )
        if current_iter % save_freq == 0:
            logger.info('Saving models and training states.')
            model.save(epoch, current_iter)
        if val_freq and (current_iter % val_freq == 0 or current_iter == total):
            for loader in val_loaders:
                model.validation(loader, current_iter, tb_logger, opt['val']['save_img'])
        data_timer.start()
        iter_timer.start()

    progress.close()
    logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(time.time() - began))}')
    model.save(epoch=-1, current_iter=-1)
    logger.info(f'Saved the latest model in {opt["path"]["models"]}.')
    if tb_logger:
        tb_logger.close()


def build(opt):
    """BasicSR's build_model; arguments that a network, loss or optimiser refuses are the user's, not ours."""
    try:
        return build_model(opt)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f'{opt["model_type"]} cannot be built from these options: {message}') from error


def start_processes(opt, launcher):
    """Join the process group of torchrun or SLURM: nccl where there is a GPU, gloo elsewhere."""
    if launcher == 'slurm':
        for ours, theirs in (('RANK', 'SLURM_PROCID'), ('WORLD_SIZE', 'SLURM_NTASKS'), ('LOCAL_RANK', 'SLURM_LOCALID')):
            os.environ.setdefault(ours, os.environ.get(theirs, ''))
        os.environ.setdefault('MASTER_PORT', str((opt.get('dist_params') or {}).get('port', 29500)))
        if 'SLURM_STEP_NODELIST' in os.environ and 'MASTER_ADDR' not in os.environ:
            import subprocess

            names = subprocess.run(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_STEP_NODELIST']], capture_output=True, text=True
            )
            os.environ['MASTER_ADDR'] = names.stdout.split()[0]
    if launcher != 'none':
        missing = [
            name
            for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
            if not os.environ.get(name)
        ]
        if missing:
            raise UserError(
                f'--launcher {launcher}: {", ".join(missing)} not set; '
                'start with torchrun --nproc_per_node=N dckd_sr/train.py -opt ... --launcher pytorch'
            )
        use_cuda = torch.cuda.is_available() and opt['num_gpu'] != 0
        if use_cuda:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
        torch.distributed.init_process_group('nccl' if use_cuda else 'gloo')
        opt['rank'], opt['world_size'] = torch.distributed.get_rank(), torch.distributed.get_world_size()


def make_folders(opt, opt_file, keep):
    """The run's folders, with the option file and its resolved form; an earlier run of that name is moved aside."""
    if opt['rank'] == 0:
        root = Path(opt['path']['experiments_root'])
        try:
            for folder in [root, Path(opt['root_path']) / 'tb_logger' / opt['name']]:
                if folder.exists() and not keep:
                    archived = folder.with_name(f'{folder.name}_archived_{get_time_str()}')
                    folder.rename(archived)
                    logs.logging.getLogger('basicsr').info(f'{folder} exists: moved to {archived.name}')
            for key in ('experiments_root', 'models', 'training_states', 'log', 'visualization'):
                Path(opt['path'][key]).mkdir(parents=True, exist_ok=True)
            shutil.copy(opt_file, root)
            (root / 'resolved.yml').write_text(options.to_yaml(opt), encoding='utf-8')
        except OSError as error:
            raise UserError(f'cannot write the run to {root}: {error}') from error
    if opt['dist']:
        torch.distributed.barrier()


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


def look_first(model, val_loaders, opt):
    """Before step 1, score one validation image: bicubic, teacher, student. A teacher below bicubic is a wrong teacher.

    Raises:
        UserError: the teacher scores below bicubic and ``train.check_teacher`` is not false.
    """
    batch = next((batch for loader in val_loaders for batch in loader if 'gt' in batch), None)
    if batch is None or not hasattr(model, 'net_t') or opt['rank'] != 0:
        return
    scale = opt.get('scale', 1)
    metric = next(
        (m for m in (opt['val'].get('metrics') or {}).values() if m['type'] == 'calculate_psnr'),
        {'type': 'calculate_psnr', 'crop_border': scale, 'test_y_channel': True},
    )
    nets = {
        'bicubic' if scale > 1 else 'input': bicubic(scale),
        'teacher': model.net_t,
        'student': model.get_bare_model(model.net_g),
    }
    image = Path(batch['lq_path'][0]).name
    sizes = {key: opt['val'].get(key) for key in ('window_size', 'tile_size', 'tile_overlap')}
    psnr = {}
    for name, net in nets.items():
        if net is not None:
            result = evaluate(net, [batch], scale=scale, metrics={'psnr': metric}, device=model.device, **sizes)
            psnr[name] = result.means.get('psnr', math.nan)
    logs.logging.getLogger('basicsr').info(
        f'First look, PSNR of {image}: ' + ', '.join(f'{name} {value:.2f} dB' for name, value in psnr.items())
    )
    floor = psnr.get('bicubic', psnr.get('input'))
    if psnr.get('teacher', math.inf) < floor and opt['train'].get('check_teacher', True):
        raise UserError(
            f'network_t: the teacher reaches {psnr["teacher"]:.2f} dB on {image}, below {floor:.2f} dB without any '
            'network. Are these its weights, its scale, its img_range? train.check_teacher: false trains all the same'
        )


def check_finite(losses, current_iter):
    """Stop at the first printed loss that is not a number: nothing after it can be of use."""
    bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if bad:
        shown = ', '.join(f'{name} = {value}' for name, value in bad.items())
        raise UserError(
            f'iteration {current_iter}: {shown}; the last checkpoint is intact. Is train.optim_g.lr too high?'
        )


if __name__ == '__main__':
    sys.exit(main())

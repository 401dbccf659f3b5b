"""What the loss block of the README makes of plain BasicSR files: ``python -m tests.pasted``.

Small EDSR, RCAN, SwinIR and SRVGGNetCompact students, x2 and x4, are trained as plain files, and again with the
README's block pasted in, with a teacher and without one. The table says how far the block is above its plain file, in
dB on Set5.
The command again goes on where it was. Before it:

    python -m dckd_sr.prepare download set5 bsds400
    python dckd_sr/train.py -opt options/results/train_teacher_x4.yml
    python dckd_sr/train.py -opt options/results/train_teacher_x2.yml
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import yaml

from dckd_sr import logs, train

ROOT = Path(__file__).resolve().parents[1]
BOUND = -0.1  # dB: what the block may cost
STUDENTS = {
    'EDSR': {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_block': 4, 'img_range': 255.0},
    'RCAN': {
        'type': 'RCAN',
        'num_in_ch': 3,
        'num_out_ch': 3,
        'num_feat': 16,
        'num_group': 2,
        'num_block': 2,
        'squeeze_factor': 4,
        'img_range': 255.0,
    },
    'SwinIR': {
        'type': 'SwinIR',
        'in_chans': 3,
        'img_size': 16,
        'window_size': 8,
        'img_range': 1.0,
        'depths': [2, 2],
        'embed_dim': 24,
        'num_heads': [2, 2],
        'mlp_ratio': 2,
        'upsampler': 'pixelshuffledirect',
        'resi_connection': '1conv',
    },
    'SRVGGNetCompact': {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_conv': 4},
}
BLOCKS = ('plain', 'block', 'block and teacher')


def plain(student, scale, seed):
    """A file as BasicSR users have it, for a small network and little data."""
    return {
        'model_type': 'SRModel',
        'scale': scale,
        'num_gpu': 0,
        'manual_seed': seed,
        'datasets': {
            'train': {
                'name': 'BSDS400',
                'type': 'SRImageDataset',
                'dataroot_gt': 'datasets/BSDS400',
                'io_backend': {'type': 'disk'},
                'cache': 'ram',
                'gt_size': 64 if student == 'SwinIR' and scale == 4 else 48,  # whole windows
                'use_hflip': True,
                'use_rot': True,
                'num_worker_per_gpu': 0,
                'batch_size_per_gpu': 2,
            },
            'val': {
                'name': 'Set5',
                'type': 'SRImageDataset',
                'dataroot_gt': 'datasets/Set5/HR',
                'dataroot_lq': f'datasets/Set5/LR_bicubic/X{scale}',
                'filename_tmpl': f'{{}}x{scale}',
                'io_backend': {'type': 'disk'},
            },
        },
        'network_g': {**STUDENTS[student], 'upscale': scale},
        'path': {},
        'train': {
            'ema_decay': 0.98,
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [200000], 'gamma': 0.5},
            'warmup_iter': -1,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0},
        },
        'val': {
            'val_freq': 1000000,
            'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': scale, 'test_y_channel': True}},
        },
        'logger': {'print_freq': 50, 'save_checkpoint_freq': 1000, 'keep_checkpoints': 1},
    }


def paste(options, block, teacher):
    """Put the README's block into a plain file, with a teacher and an encoder that are there."""
    ours = yaml.safe_load((ROOT / 'options/demo/distill.yml').read_text(encoding='utf-8'))
    weights = Path('experiments/pretrained_models/demo/codebook.pth')
    options['network_vqgan'] = ours['network_vqgan']
    options['path'].update(pretrain_network_vqgan=str(ROOT / weights), param_key_vqgan='params')
    options['train'].update(block['train'])
    if not teacher:
        del options['train']['logits_opt']  # which needs one
        return
    scale = options['scale']
    options['network_t'] = {**ours['network_t'], 'num_feat': 64, 'num_block': 16, 'upscale': scale}
    options['path'].update(
        pretrain_network_t=f'experiments/results_teacher_x{scale}/models/net_g_latest.pth',
        param_key_t='params_ema' if scale == 4 else 'params',
    )


def readme_block():
    """The YAML under 'Our losses in a file you have'."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    return yaml.safe_load(re.search(r'```yaml\n(.*?\n)```', text.split('## Our losses in a file you have')[1], re.S)[1])


def scores(student, scale, kind, seed, steps, folder):
    """PSNR on Set5 after each of these numbers of steps; one training, stopped and continued there."""
    name = re.sub(r'\W+', '_', f'pasted_{student}_x{scale}_{kind}_s{seed}')
    kept = folder / f'{name}.json'
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    options = {'name': name, **plain(student, scale, seed)}
    if kind != 'plain':
        paste(options, readme_block(), 'teacher' in kind)
    for total in steps:
        if str(total) in found:
            continue
        options['train']['total_iter'] = total
        file = folder / f'{name}.yml'
        file.write_text(yaml.safe_dump(options))
        with contextlib.redirect_stdout(io.StringIO()):  # the log file has it
            code = train.main(['-opt', str(file), '--auto_resume'])
        if code:
            sys.exit(code)
        rows = logs.read_metrics(Path('experiments', name, 'metrics.jsonl'))
        found[str(total)] = next(row['validation']['Set5']['psnr'] for row in reversed(rows) if 'validation' in row)
        kept.write_text(json.dumps(found))
    return [found[str(total)] for total in steps]


def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m tests.pasted', description=__doc__.partition('\n')[0])
    parser.add_argument('--steps', type=int, nargs='+', default=[60, 200, 1000, 4000])
    parser.add_argument('--students', nargs='+', default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument('--scales', type=int, nargs='+', default=[2, 4])
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args(argv)
    folder = Path('results/pasted')
    folder.mkdir(parents=True, exist_ok=True)
    rows, worst = [], 0.0
    for student, scale in itertools.product(args.students, args.scales):
        seeds, steps = range(10, 10 + args.seeds), sorted(args.steps)
        found = {kind: [scores(student, scale, kind, seed, steps, folder) for seed in seeds] for kind in BLOCKS}
        for kind in BLOCKS[1:]:
            cells = []
            for i in range(len(steps)):
                gains = [ours[i] - theirs[i] for ours, theirs in zip(found[kind], found['plain'])]
                spread = f' ± {statistics.stdev(gains):.2f}' if len(gains) > 1 else ''
                cells.append(
                    f'{statistics.mean(one[i] for one in found["plain"]):.2f} {statistics.mean(gains):+.2f}{spread}'
                )
                worst = min(worst, statistics.mean(gains))
            rows.append(f'| {student} x{scale} | {"yes" if "teacher" in kind else "no"} | {" | ".join(cells)} |')
    print(f'| student | teacher | {" | ".join(f"{n} steps" for n in sorted(args.steps))} |')
    print('| --- | --- |' + ' ---: |' * len(args.steps))
    print('\n'.join(rows))
    print(f'lowest mean difference {worst:+.2f} dB, bound {BOUND} dB')
    return int(worst < BOUND)


if __name__ == '__main__':
    sys.exit(main())

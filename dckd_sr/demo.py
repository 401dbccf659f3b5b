"""``python -m dckd_sr.demo [sr|deblur|derain]``: distil a small student on real photographs, show what came of it.

The photographs are those of scikit-image's wheel, so nothing is downloaded. The same student is trained twice, on the
ground truth alone and with DCKD, from the same initial weights, on the same batches, for the same number of steps.
The teacher of super-resolution comes with this package, those of deblurring and deraining are trained first.
"""

import argparse
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import skimage

from dckd_sr import logs, options, test, train
from dckd_sr.data import build_val_loader
from dckd_sr.data.files import decode, read_bytes
from dckd_sr.errors import UserError, entry_point
from dckd_sr.evaluation import bicubic, evaluate, format_table, score, write_image, write_results
from dckd_sr.ops import photo_damage
from dckd_sr.ops.resize import imresize, modcrop
from dckd_sr.option_files import shipped_root

ROOT = shipped_root()
SCALE = 4
PHOTOGRAPHS = {
    'train': ('astronaut.png', 'motorcycle_left.png', 'motorcycle_right.png', 'brick.png', 'grass.png', 'gravel.png'),
    'test': ('chelsea.png', 'coffee.png', 'rocket.jpg'),
}
DAMAGE = {'deblur': photo_damage.motion_blur, 'derain': photo_damage.rain}
VARIANTS = 4  # differently damaged copies of each training photograph
DEFAULT_STEPS = {'sr': 800, 'deblur': 300, 'derain': 250}


@entry_point()
def main(argv=None):
    """Returns the exit code: 0 done, 2 with one message where something is missing."""
    parser = argparse.ArgumentParser(prog='python -m dckd_sr.demo', description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=list(DEFAULT_STEPS), default='sr', help='default: sr')
    listed = ', '.join(f'{task} {steps}' for task, steps in DEFAULT_STEPS.items())
    parser.add_argument('--steps', type=int, help=f'training iterations of each student (default: {listed})')
    args = parser.parse_args(argv)
    steps = DEFAULT_STEPS[args.task] if args.steps is None else args.steps
    if steps < 8:
        raise UserError(f'--steps {steps}: at least 8')
    paths = run(steps) if args.task == 'sr' else run_restoration(args.task, steps)
    print('\nWritten:\n' + '\n'.join(f'  {path}' for path in paths))


def run(steps):
    """Super-resolution: data, two trainings, one table, two pictures; all under the folder the user stands in.

    Returns:
        list of the paths of what was written.
    """
    make_photographs(Path('datasets/demo'))
    runs = {}
    for name in ('scratch', 'distill'):
        runs[name] = train_student(name, steps)
    results = compare(runs)
    folder = Path('results/demo')
    paths = write_results(folder, results, [f'{steps} iterations a student, {SCALE}x, PSNR and SSIM on Y'])
    print('\n' + format_table(results))
    paths.append(draw_curves(runs, folder / 'curve.png'))
    paths.append(draw_crops(results, folder / 'crops.png'))
    return paths


def make_photographs(folder):
    """Write HR and MATLAB-exact LR of the photographs to ``<folder>/{train,test}/{HR,LR_bicubic/X4}``."""
    source = Path(skimage.__file__).parent / 'data'
    for part, names in PHOTOGRAPHS.items():
        for name in names:
            stem, image = Path(name).stem, read_photograph(source / name)
            write_image(folder / part / 'HR' / f'{stem}.png', image)
            write_image(folder / part / 'LR_bicubic' / 'X4' / f'{stem}x4.png', imresize(image, 1 / SCALE))


def read_photograph(path):
    """A photograph of scikit-image, cut to a multiple of SCALE."""
    if not path.is_file():
        raise UserError(f'{path.name} is not in this scikit-image ({skimage.__version__}): pip install -U scikit-image')
    return modcrop(read_image(path), SCALE)


def run_restoration(task, steps):
    """Deblurring or deraining: data, a teacher, two students, one table, two pictures.

    Returns:
        list of the paths of what was written.
    """
    make_pairs(Path(f'datasets/demo_{task}'), DAMAGE[task])
    train_network(f'{task}_teacher', 2 * steps)
    # The teacher is what so many steps make it, below the input perhaps; the table tells.
    short = ['train:check_teacher=false']
    runs = {name: train_network(f'{task}_{name}', steps, short[: name == 'distill']) for name in ('scratch', 'distill')}
    results = compare(runs, task)
    folder = Path(f'results/demo_{task}')
    channel = 'RGB' if task == 'deblur' else 'Y'
    about = f'{steps} iterations a student, {2 * steps} the teacher, PSNR and SSIM on {channel}'
    paths = write_results(folder, results, [about])
    print('\n' + format_table(results))
    paths.append(draw_curves(runs, folder / 'curve.png', f'PSNR on {channel}, dB', f'Held-out photographs, {task}'))
    paths.append(draw_crops(results, folder / 'crops.png', task))
    return paths


def make_pairs(folder, damage):
    """Write photographs and damaged ones, equal in every run, to ``<folder>/{train,test}/{gt,lq}``."""
    source = Path(skimage.__file__).parent / 'data'
    for part, names in PHOTOGRAPHS.items():
        for name in names:
            image = read_photograph(source / name)
            for variant in range(VARIANTS if part == 'train' else 1):
                file = f'{Path(name).stem}_{variant}.png'
                write_image(folder / part / 'gt' / file, image)
                seeded = np.random.RandomState(zlib.crc32(file.encode()))  # its streams never change
                write_image(folder / part / 'lq' / file, damage(image, seeded))


def train_student(name, steps):
    """Train options/demo/<name>.yml for so many steps.

    Returns:
        the resolved options of the run.
    """
    return train_network(name, steps, shipped('t', 'teacher_EDSR_x4.pth') if name == 'distill' else [])


def train_network(name, steps, more=()):
    """As `train_student`, with further overrides."""
    overrides = [
        f'train:total_iter={steps}',
        f'train:scheduler:periods=[{steps}]',
        f'val:val_freq={max(1, steps // 8)}',
        f'logger:print_freq={max(1, steps // 8)}',
        *more,
    ]
    if name.endswith('distill'):
        overrides += [f'train:step=[{max(1, steps // 32)}]', *shipped('vqgan', 'codebook.pth')]
    argv = ['-opt', str(ROOT / 'options' / 'demo' / f'{name}.yml'), '--force_yml', *overrides]
    if train.main(argv) != 0:
        raise UserError(f'the training {name} failed; its message is above')
    return options.load(argv[1], overrides)[0]


def shipped(network, file):
    """The override that names one of the weights that come with this package."""
    return [f'path:pretrain_network_{network}={ROOT / "experiments" / "pretrained_models" / "demo" / file}']


def compare(runs, task='sr'):
    """Score both students, the baseline and the teacher on the held-out photographs.

    Returns:
        network -> set -> Result, and the images under results/demo_<run> (sr) or results/demo_<task>_<run>.
    """
    file, prefix = ('test', 'demo') if task == 'sr' else (f'{task}_test', f'demo_{task}')
    rows, loader = {}, None
    for name, opt in runs.items():
        weights = Path(opt['path']['models']) / 'net_g_latest.pth'
        argv = ['-opt', str(ROOT / 'options' / 'demo' / f'{file}.yml'), '--force_yml', f'name={prefix}_{name}']
        argv += [f'path:pretrain_network_g={weights}', *(shipped('t', 'teacher_EDSR_x4.pth') if task == 'sr' else [])]
        argv += ['--with_teacher'] if name == 'distill' else ['--no_bicubic']
        opt, args, notes = options.parse(argv, is_train=False, command=test.parser())
        rows[name] = test.test(opt, args, notes)
        loader = build_val_loader(opt, 'test')
    distill = rows['distill']
    if task == 'sr':
        baseline = {'bicubic': distill['bicubic']}
    else:
        scored = evaluate(bicubic(1), loader, scale=1, metrics=opt['val']['metrics'], device='cpu')
        baseline = {'input': {opt['datasets']['test']['name']: scored}}
    return {
        **baseline,
        'scratch': rows['scratch']['student'],
        'DCKD': distill['student'],
        'teacher': distill['teacher'],
    }


def draw_curves(runs, path, label='PSNR on Y, dB', title='Held-out photographs, x4'):
    """Validation PSNR over iterations of both students."""
    pyplot = matplotlib()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
    for name, opt in runs.items():
        rows = logs.read_metrics(Path(opt['path']['log'], 'metrics.jsonl'))
        scores = {row['iter']: next(iter(row['validation'].values()))['psnr'] for row in rows if 'validation' in row}
        points = sorted(scores.items())
        axes.plot(*zip(*points), marker='o', label='DCKD' if name == 'distill' else name)
    axes.set(xlabel='iteration', ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def draw_crops(results, path, task='sr', side=96):
    """A row per held-out photograph, at the crop where the teacher gains most over the baseline; PSNR of each crop."""
    pyplot = matplotlib()
    prefix, truth, baseline = ('demo', 'HR', 'bicubic') if task == 'sr' else (f'demo_{task}', 'sharp', 'input')
    truth = 'dry' if task == 'derain' else truth
    saved = f'results/{prefix}_{{run}}/visualization/held-out/{{{{image}}}}_{prefix}_{{run}}'
    distilled = saved.format(run='distill')
    columns = {
        truth: f'datasets/{prefix}/test/' + ('HR/{stem}.png' if task == 'sr' else 'gt/{image}.png'),
        baseline: f'{distilled}_bicubic.png' if task == 'sr' else f'datasets/{prefix}/test/lq/{{image}}.png',
        'scratch': saved.format(run='scratch') + '.png',
        'DCKD': f'{distilled}.png',
        'teacher': f'{distilled}_teacher.png',
    }
    names = [row['image'] for row in results['DCKD']['held-out'].rows]
    metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'test_y_channel': task != 'deblur'}}
    figure, axes = pyplot.subplots(
        len(names), len(columns), figsize=(2.2 * len(columns), 2.5 * len(names)), layout='constrained'
    )
    for name, row in zip(names, axes):
        places = {'image': name, 'stem': name.removesuffix(f'x{SCALE}')}
        images = {column: read_image(pattern.format(**places)) for column, pattern in columns.items()}
        window = most_gained(images[truth], images[baseline], images['teacher'], side)
        for column, cell in zip(columns, row):
            crop = np.ascontiguousarray(images[column][window])
            shown = '' if column == truth else f' {score(crop, images[truth][window], metric)["psnr"]:.2f} dB'
            cell.imshow(crop[..., ::-1], interpolation='nearest')
            cell.set_title(f'{column}{shown}', fontsize=9)
            cell.axis('off')
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def most_gained(hr, before, after, side):
    """The window of this side in which the squared error falls most from one image to the other."""
    error = [np.square(image.astype(np.float64) - hr).sum(axis=2) for image in (before, after)]
    gain = cv2.boxFilter(error[0] - error[1], -1, (side, side), anchor=(0, 0), normalize=False)
    gain = gain[: hr.shape[0] - side + 1, : hr.shape[1] - side + 1]
    top, left = np.unravel_index(gain.argmax(), gain.shape)
    return slice(top, top + side), slice(left, left + side)


def read_image(path):
    """uint8 (h, w, 3) BGR."""
    return decode(read_bytes(path), str(path))


def matplotlib():
    """pyplot without a display, imported late: nothing else needs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the demo's pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot


if __name__ == '__main__':
    sys.exit(main())

"""``python -m dckd_sr.demo``: distil a small student on real photographs and show what came of it.

The photographs are those of scikit-image's wheel, so nothing is downloaded. The same student is trained twice, on the
ground truth alone and with DCKD, from the same initial weights, on the same batches, for the same number of steps.
"""

import argparse
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import skimage

from dckd_sr import options, test, train
from dckd_sr.data.files import decode, read_bytes
from dckd_sr.errors import UserError
from dckd_sr.evaluation import format_table, score, write_image, write_results
from dckd_sr.ops.resize import imresize, modcrop

ROOT = Path(__file__).resolve().parents[1]
SCALE = 4
PHOTOGRAPHS = {
    'train': ('astronaut.png', 'motorcycle_left.png', 'motorcycle_right.png', 'brick.png', 'grass.png', 'gravel.png'),
    'test': ('chelsea.png', 'coffee.png', 'rocket.jpg'),
}


def main(argv=None):
    """Returns the exit code: 0 done, 2 with one message where something is missing."""
    parser = argparse.ArgumentParser(prog='python -m dckd_sr.demo', description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=800, help='training iterations of each student (default: 800)')
    steps = parser.parse_args(argv).steps
    try:
        if steps < 8:
            raise UserError(f'--steps {steps}: at least 8')
        paths = run(steps)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print('\nWritten:\n' + '\n'.join(f'  {path}' for path in paths))
    return 0


def run(steps):
    """Data, two trainings, one table, two pictures; all under the folder the user stands in.

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
            if not (source / name).is_file():
                raise UserError(
                    f'{name} is not in this scikit-image ({skimage.__version__}): pip install -U scikit-image'
                )
            image = modcrop(read_image(source / name), SCALE)
            stem = Path(name).stem
            write_image(folder / part / 'HR' / f'{stem}.png', image)
            write_image(folder / part / 'LR_bicubic' / 'X4' / f'{stem}x4.png', imresize(image, 1 / SCALE))


def train_student(name, steps):
    """Train options/demo/<name>.yml for so many steps.

    Returns:
        the resolved options of the run.
    """
    overrides = [
        f'train:total_iter={steps}',
        f'train:scheduler:periods=[{steps}]',
        f'val:val_freq={max(1, steps // 8)}',
    ]
    overrides.append(f'logger:print_freq={max(1, steps // 8)}')
    if name == 'distill':
        overrides += [
            f'train:step=[{max(1, steps // 32)}]',
            *shipped('t', 'teacher_EDSR_x4.pth'),
            *shipped('vqgan', 'codebook.pth'),
        ]
    argv = ['-opt', str(ROOT / 'options' / 'demo' / f'{name}.yml'), '--force_yml', *overrides]
    if train.main(argv) != 0:
        raise UserError(f'the training {name} failed; its message is above')
    return options.load(argv[1], overrides)[0]


def shipped(network, file):
    """The override that names one of the repository's own weights."""
    return [f'path:pretrain_network_{network}={ROOT / "experiments" / "pretrained_models" / "demo" / file}']


def compare(runs):
    """Score both students, bicubic and the teacher on the held-out photographs.

    Returns:
        network -> set -> Result, and the images under results/demo_<run>.
    """
    rows = {}
    for name, opt in runs.items():
        weights = Path(opt['path']['models']) / 'net_g_latest.pth'
        argv = ['-opt', str(ROOT / 'options' / 'demo' / 'test.yml'), '--force_yml', f'name=demo_{name}']
        argv += [f'path:pretrain_network_g={weights}', *shipped('t', 'teacher_EDSR_x4.pth')]
        argv += ['--with_teacher'] if name == 'distill' else ['--no_bicubic']
        opt, args, notes = options.parse(argv, is_train=False, command=test.parser())
        rows[name] = test.test(opt, args, notes)
    distill = rows['distill']
    return {
        'bicubic': distill['bicubic'],
        'scratch': rows['scratch']['student'],
        'DCKD': distill['student'],
        'teacher': distill['teacher'],
    }


def draw_curves(runs, path):
    """Validation PSNR over iterations of both students, from their logs."""
    pyplot = matplotlib()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
    for name, opt in runs.items():
        log = max(Path(opt['path']['log']).glob('train_*.log')).read_text(encoding='utf-8')
        points, iteration = [], 0
        for match in re.finditer(r'iter: *([\d,]+), lr|# psnr: ([\d.]+)', log):
            if match[1]:
                iteration = int(match[1].replace(',', ''))
            else:
                points.append((iteration, float(match[2])))
        axes.plot(*zip(*points), marker='o', label='DCKD' if name == 'distill' else name)
    axes.set(xlabel='iteration', ylabel='PSNR on Y, dB', title='Held-out photographs, x4')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def draw_crops(results, path, side=96):
    """A row per held-out photograph, at the crop where the teacher gains most over bicubic; PSNR of each crop."""
    pyplot = matplotlib()
    columns = {
        'HR': 'datasets/demo/test/HR/{}.png',
        'bicubic': 'results/demo_distill/visualization/held-out/{}_demo_distill_bicubic.png',
        'scratch': 'results/demo_scratch/visualization/held-out/{}_demo_scratch.png',
        'DCKD': 'results/demo_distill/visualization/held-out/{}_demo_distill.png',
        'teacher': 'results/demo_distill/visualization/held-out/{}_demo_distill_teacher.png',
    }
    names = [row['image'].removesuffix(f'x{SCALE}') for row in results['DCKD']['held-out'].rows]
    figure, axes = pyplot.subplots(
        len(names), len(columns), figsize=(2.2 * len(columns), 2.5 * len(names)), layout='constrained'
    )
    for name, row in zip(names, axes):
        images = {
            column: read_image(pattern.format(name if column == 'HR' else f'{name}x{SCALE}'))
            for column, pattern in columns.items()
        }
        window = most_gained(images['HR'], images['bicubic'], images['teacher'], side)
        metric = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'test_y_channel': True}}
        for column, cell in zip(columns, row):
            crop = np.ascontiguousarray(images[column][window])
            title = name if column == 'HR' else f'{column} {score(crop, images["HR"][window], metric)["psnr"]:.2f} dB'
            cell.imshow(crop[..., ::-1], interpolation='nearest')
            cell.set_title(title, fontsize=9)
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

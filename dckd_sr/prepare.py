"""Training and test data: ``python -m dckd_sr.prepare sr HR OUT --scales 2 3 4`` makes LR images as MATLAB does.

Sources are read only, what exists is never overwritten by something else, and the same command continues after an
interruption. Images of damaged files are left out, named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys

from dckd_sr.commands import Parser
from dckd_sr.data import downloads, jobs, lmdb_maker, teacher_cache
from dckd_sr.data.files import not_searched
from dckd_sr.data.lr_images import make_sr, make_subimages
from dckd_sr.data.pairs import check, make_pairs
from dckd_sr.data.preparing import Outcome, Result, read_image, refuse_inside, some, stems_of, unfit_text
from dckd_sr.errors import UserError, entry_point
from dckd_sr.ops.resize import CONVENTIONS


@entry_point('interrupted: the same command continues')
def main(argv=None):
    """Command line entry point.

    Returns:
        exit code: 0 done, 1 done but for some images, which are named, 2 a mistake in arguments, paths or the network
        (one message, no traceback), 130 interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        result = args.run(args)
    except OSError as error:
        raise UserError(f'{error.filename}: {error.strerror}') from error
    for folder in (getattr(args, key, None) for key in ('hr', 'images', 'gt', 'lq')):
        told = not_searched(folder).removeprefix('; ') if folder else ''
        if told:
            print(f'{folder}: {told}')
    for what, names in result.lost.items():
        print(f'{what}: {some(names)}')
    for problem in result.problems:
        print(problem, file=sys.stdout if args.command == 'check' else sys.stderr)
    print(result.summary)
    return 1 if result.problems else 0


def _parser():
    parser = Parser(
        prog='python -m dckd_sr.prepare',
        description=__doc__.splitlines()[0],
        epilog='exit codes: 0 done; 1 some images are unfit, they are named; 2 a mistake; 130 interrupted',
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name, run, text, description, workers=True):
        sub = commands.add_parser(name, help=text, description=description)
        sub.set_defaults(run=run)
        if workers:
            sub.add_argument(
                '--workers', type=_integer(1), default=jobs.cores(), metavar='N', help='processes; all cores'
            )
        return sub

    sub = command(
        'sr',
        make_sr,
        'LR images for super-resolution',
        "Bicubic LR images, every value equal to MATLAB's imresize. OUT/HR holds the HR images as they are (uncropped: "
        'datasets crop while loading; PNG files are linked, others converted), OUT/LR_bicubic/X4/NAMEx4.png the LR of '
        'HR cut to a multiple of the scale. HR may be OUT/HR.',
    )
    sub.add_argument('hr', metavar='HR', help='folder of images')
    sub.add_argument('out', metavar='OUT')
    sub.add_argument('--scales', type=_integer(2), nargs='+', default=[2, 3, 4], metavar='S', help='default: 2 3 4')
    sub.add_argument(
        '--layout',
        choices=('standard', 'basicsr'),
        default='standard',
        help='basicsr: OUT/GTmod12 (cut to multiples of 12) and OUT/LRbicx4, equal names',
    )
    sub.add_argument(
        '--convention', choices=CONVENTIONS, default='uint8', help="uint8: imresize on integers; double: BasicSR's"
    )
    sub.add_argument('--copy', action='store_true', help='copy HR files instead of linking them')

    sub = command(
        'subimages',
        make_subimages,
        'overlapping crops for fast training',
        'Crops NAME_s001.png of HR images to OUT and, with --lr, the same places of LR/X4/NAMEx4.png to LR/X4_sub. '
        'Images are cut to a multiple of all scales first, so that HR and LR have the same crops.',
    )
    sub.add_argument('images', metavar='IN', help='folder of images')
    sub.add_argument('out', metavar='OUT')
    sub.add_argument('--size', type=_integer(1), default=480, help='side of an HR crop (480)')
    sub.add_argument('--step', type=_integer(1), default=240, help='distance of crops (240)')
    sub.add_argument(
        '--thresh',
        type=_integer(0),
        default=0,
        help='leave a rest of up to this many pixels at the border uncovered (0)',
    )
    sub.add_argument('--lr', metavar='LR', help='folder with X2, X3, X4')
    sub.add_argument(
        '--scales', type=_integer(2), nargs='+', metavar='S', help='which of them; default: those that exist'
    )
    sub.add_argument('--lr_out', metavar='DIR', help='where X4_sub goes; default: LR')
    sub.add_argument('--filename_tmpl', type=_template, metavar='T', help="LR name; default: '{}x4' at scale 4")

    sub = command(
        'lmdb',
        make_lmdb,
        "BasicSR's LMDB of a folder",
        'Packs a folder for io_backend {type: lmdb}; made anew or not at all.',
    )
    sub.add_argument('images', metavar='IN', help='folder of images')
    sub.add_argument('out', metavar='OUT.lmdb')
    sub.add_argument(
        '--filename_tmpl', type=_template, default='{}', metavar='T', help="'{}x4' for LR: keys are names without x4"
    )
    sub.add_argument(
        '--level',
        type=int,
        choices=range(10),
        default=lmdb_maker.LEVEL,
        metavar='N',
        help=f'of compression ({lmdb_maker.LEVEL}); 0: about twice the size, read several times as fast',
    )

    sub = command(
        'pairs',
        make_pairs,
        'lq/gt folders of GoPro and Rain13K',
        'gopro: {train,test}/SEQUENCE/{blur,sharp} -> {train,test}/{lq,gt}/SEQUENCE_FRAME.png. rain13k: '
        'train/Rain13K/{input,target} -> train/{lq,gt}, test/SET/{input,target} -> test/SET/{lq,gt}.',
    )
    sub.add_argument('dataset', choices=('gopro', 'rain13k'))
    sub.add_argument('source', metavar='SRC')
    sub.add_argument('out', metavar='OUT')
    sub.add_argument('--copy', action='store_true', help='copy files instead of linking them')

    sub = command(
        'check',
        check,
        'find unfit images before training',
        'Lists images that are unreadable, without partner, of sizes that do not belong together, or smaller than '
        'gt_size. GT and LQ are folders or LMDBs.',
    )
    sub.add_argument('gt', metavar='GT')
    sub.add_argument('lq', metavar='LQ', nargs='?')
    sub.add_argument('--scale', type=_integer(1), default=1, help='GT size over LQ size (1)')
    sub.add_argument('--filename_tmpl', type=_template, default='{}', metavar='T', help="LQ name, such as '{}x4'")
    sub.add_argument('--gt_size', type=_integer(1), default=1, metavar='N', help='the training patch')

    sub = command(
        'teacher_cache',
        teacher_cache.make,
        "the teacher's outputs of the training images",
        'Writes the LMDB that datasets.train.teacher_cache of an option file names: what network_t makes of every '
        'whole image, for trainings that need not run it again. val.tile_size saves memory.',
        workers=False,
    )
    sub.add_argument('-opt', '--opt', required=True, metavar='FILE', help='option file of the training')
    sub.add_argument('--force_yml', nargs='+', default=(), metavar='A:B=VALUE', help='set keys of the file')
    sub.add_argument(
        '--format',
        choices=teacher_cache.FORMATS,
        default='uint8',
        help='uint8 (default): 3 bytes a pixel, rounded; float16: 6, as good as the teacher itself',
    )
    sub.add_argument(
        '--self_ensemble',
        action='store_true',
        help='mean over the 8 flips and transpositions of each image, which training turns, too; 8 times the work',
    )

    sub = command(
        'download',
        get_data,
        'public datasets',
        'Known: ' + ', '.join(downloads.DATASETS) + '. Downloads resume and are verified.',
        workers=False,
    )
    sub.add_argument('names', metavar='NAME', nargs='+')
    sub.add_argument('-o', '--out', default='datasets', metavar='DIR', help='default: datasets')
    return parser


def _integer(least):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f'{text!r} is no integer from {least} on')
        return value

    return parse


def _template(text):
    if text.count('{}') != 1 or set(text.replace('{}', '')) & set('{}/\\'):
        raise argparse.ArgumentTypeError(f"{text!r} needs {{}} once, as in '{{}}x4'")
    return text


def make_lmdb(args):
    """``lmdb``: a folder as BasicSR's LMDB."""
    result = Result()
    stems = stems_of(args.images, result.problems)
    keys = {_key(stem, args): os.path.join(args.images, name) for stem, name in stems.items()}
    refuse_inside([args.out], [args.images])
    settings = () if args.level == lmdb_maker.LEVEL else (args.level,)
    stamps = {key: jobs.stamp(path, *settings) for key, path in keys.items()}
    if not result.problems and lmdb_maker.is_made(args.out, stamps):
        return Result(f'{args.out}: {len(keys)} images, was ready')
    todo = [(key, path, args.level) for key, path in keys.items()]
    encoded = jobs.run(_encode, todo, args.workers, args.command)
    count = lmdb_maker.write(args.out, _fit(encoded, result), stamps, result.problems, args.level)
    result.summary = f'{args.out}: {count} images' if count else f'{args.out} not made{unfit_text(result)}'
    return result


def _key(stem, args):
    before, after = args.filename_tmpl.split('{}')
    if not (stem.startswith(before) and stem.endswith(after) and len(stem) > len(before + after)):
        raise UserError(f'{args.images}/{stem} is not named as --filename_tmpl {args.filename_tmpl} says')
    return stem[len(before) : len(stem) - len(after)]


def _encode(item):
    """(key, PNG file, shape) of an image, or the Outcome that tells what is wrong."""
    key, path, level = item
    try:
        image, lost = read_image(path)
        return Outcome(lost=lost), key, jobs.encode_png(image, path, level), image.shape
    except UserError as error:
        return Outcome(problem=str(error)), key, b'', ()


def _fit(encoded, result):
    for outcome, *entry in encoded:
        if outcome.problem:
            result.problems.append(outcome.problem)
        else:
            yield tuple(entry)
        result.add_lost(outcome.lost)


def get_data(args):
    """``download``: data sets by name."""
    names = [name.lower() for name in args.names]
    for name in names:
        downloads.check_name(name)
    lines = [line for name in dict.fromkeys(names) for line in downloads.get(name, args.out)]
    return Result('\n'.join(lines))


if __name__ == '__main__':
    sys.exit(main())

"""The pages of the tasks: every line that they show is understood, names what there is, and the pages agree with it."""

import re
import shlex
from pathlib import Path

import pytest

from dckd_sr import demo, option_files, options, prepare, safe_yaml, test, zoo
from dckd_sr.data import downloads

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page: (ROOT / 'docs' / f'{page}.md') for page in ('super_resolution', 'deblurring', 'deraining')}
TEXTS = {page: path.read_text(encoding='utf-8') for page, path in PAGES.items()}
LINES = [(page, line) for page, text in TEXTS.items() for line in re.findall(r'^ {4}(\S.*)$', text, flags=re.M)]


def test_there_are_lines_for_each_step():
    for page in PAGES:
        lines = [line for its, line in LINES if its == page]
        for start in ('python -m dckd_sr.prepare download', 'python -m dckd_sr.zoo get', 'dckd-train', 'dckd-test'):
            assert any(line.startswith(start) for line in lines), (page, start)


@pytest.mark.parametrize('page, line', LINES)
def test_a_line_is_understood(page, line, capsys):
    words = shlex.split(line)
    if words[0] == 'torchrun':
        assert words[2] == '-m'
        words = ['python', *words[2:]]
    if words[:3] == ['python', '-m', 'dckd_sr.train']:
        words = ['dckd-train', *words[3:]]
    if words[0] in ('dckd-train', 'dckd-test'):
        is_train = words[0] == 'dckd-train'
        args = (options.parser() if is_train else test.parser()).parse_args(words[1:])
        assert option_files.find(args.opt)[1]
        try:
            options.load(args.opt, ['num_gpu=0', *(args.force_yml or [])], is_train=is_train)
        except options.OptionError as error:
            assert all(re.search(r': no such (file|folder)', problem) for problem in error.problems), error
        return
    assert words[:2] == ['python', '-m']
    command, arguments = words[2], words[3:]
    if command == 'dckd_sr.zoo':
        assert arguments[0] == 'get' and zoo.find(arguments[1])
    elif command == 'dckd_sr.demo':
        assert arguments[0] in demo.DEFAULT_STEPS
    else:
        assert command == 'dckd_sr.prepare'
        args = prepare._parser().parse_args(arguments)
        for name in getattr(args, 'names', []):
            downloads.check_name(name)


@pytest.mark.parametrize('page', PAGES)
def test_variants_are_whole_files(page):
    for text in re.findall(r'```yaml\n(.*?)```', TEXTS[page], flags=re.S):
        Path('variant.yml').write_text(text, encoding='utf-8')
        opt = option_files.read('variant.yml').options
        assert opt['name'] == safe_yaml.parse(text)['name'] and opt['network_t']['type'] == 'spandrel'
        with pytest.raises(options.OptionError) as error:
            options.load('variant.yml', ['num_gpu=0'])
        assert all(re.search(r': no such (file|folder)', problem) for problem in error.value.problems)
        assert any(problem.startswith('network_t.path = teacher.pth') for problem in error.value.problems)


@pytest.mark.parametrize('page', PAGES)
def test_names_and_results(page):
    text = TEXTS[page]
    for link in re.findall(r'\]\(([^)]+)\)', text):
        assert (PAGES[page].parent / link).is_file()
    for name in re.findall(r'`((?:EDSR|RCAN|SwinIR|NAFNet|Restormer)[\w-]*_\w[\w-]*)`', text):
        assert zoo.find(name)
    for name in re.findall(r'name: (\w[\w-]*)\}', text):
        assert zoo.find(name)
    for run in re.findall(r'`results/(\w+)/results\.md`', text):
        shipped = [option_files.read(line.split()[2]).options for _, line in LINES if line.startswith('dckd-test')]
        assert run in [opt['name'] for opt in shipped]
    assert f'docs/{page}.md' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_folders_follow_each_other():
    """What prepare writes is what the option files read."""
    for page, names in (
        ('deblurring', ('train_nafnet_deblur', 'test_nafnet_deblur')),
        ('deraining', ('train_restormer_derain',)),
    ):
        for name in names:
            for block in option_files.read(name).options['datasets'].values():
                for key in ('dataroot_gt', 'dataroot_lq'):
                    folder = block[key].split('/test/')[0].split('/train/')[0]
                    assert re.search(rf'prepare pairs \w+ \S+ {folder}\n', TEXTS[page])
                    if block[key].endswith('_sub'):
                        assert f' {block[key]} --size' in TEXTS[page]

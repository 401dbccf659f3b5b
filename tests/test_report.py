"""The page about runs: numbers against the files that they are from, HTML that holds and escapes, missing parts."""

import html.parser
import json
import math
import re
import shutil
import statistics
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from small_run import dckd_run, edsr, write

from dckd_sr import compare, logs, report, report_networks, test, train

ODD = '</script><img src=x>&"\''  # a method's name


class Page(html.parser.HTMLParser):
    """Tables, ids, attributes and scripts of a page; unbalanced tags raise."""

    VOID = {'meta', 'link', 'img', 'input', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.ids, self.links, self.data, self.tags = [], [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes['id']] if 'id' in attributes else []
        self.links += [value for key, value in attributes.items() if key in ('src', 'href', 'xlink:href')]
        if tag not in self.VOID:
            self.open.append((tag, attributes.get('id')))
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.getpos(), self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ('td', 'th'):
            self.tables[-1][-1][-1] += data
        elif self.open:
            self.data[self.open[-1]] = self.data.get(self.open[-1], '') + data

    def table(self, head):
        """Rows of the table whose first cell is this, as dicts."""
        rows = next(table for table in self.tables if table[0][0] == head)
        return [dict(zip(rows[0], row)) for row in rows[1:]]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """One training, with validation, under two methods of a comparison, and the page about it."""
    path = tmp_path_factory.mktemp('report')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        opt = dckd_run(path)
        opt['val']['val_freq'] = 3  # of 4 iterations: not that of a line before it
        opt['logger']['print_freq'] = 2
        assert train.main(['-opt', write(opt)]) == 0
        shutil.copytree('experiments/run', 'experiments/other')
        values = {'dckd': {1: 30.125, 2: 30.25}, ODD: {1: 31.5, 2: 31.0}}
        psnr = {method: {('Set', 'psnr'): by_seed} for method, by_seed in values.items()}
        Path('results/compare_run').mkdir(parents=True)
        runs = [
            compare.Run(m, seed, {'name': n, 'train': {'total_iter': 4}}, path)
            for m, n, seed in zip(psnr, ('run', 'other'), (1, 2))
        ]
        compare.write_tables(Path('results/compare_run'), psnr, {'Teacher': {('Set', 'psnr'): [33.0]}}, runs)
        assert report.main(['results/compare_run', '--images', '2']) == 0
    return path


@pytest.fixture(scope='module')
def page(folder):
    return Page((folder / 'results/compare_run/report.html').read_text(encoding='utf-8'))


def test_the_page_needs_nothing_else(page, folder):
    text = (folder / 'results/compare_run/report.html').read_text(encoding='utf-8')
    assert page.tags[0][0] == 'html' and len(page.ids) == len(set(page.ids))
    assert all(link.startswith(('data:', '#')) for link in page.links)
    assert not re.findall(r'https?://', re.sub(r'data:[^"]*', '', text)) and not re.findall(r'@import|url\((?!#)', text)
    referenced = set(re.findall(r"get\('([\w-]+)'\)", text)) | {link[1:] for link in page.links if link[0] == '#'}
    assert {'slider', 'divide', 'data'} < referenced and referenced <= set(page.ids)
    assert set(re.findall(r'url\(#(\w+)\)', text)) <= set(page.ids)
    assert all(f'{side}-{part}' in page.ids for side in ('left', 'right') for part in ('image', 'text'))
    drawn = {path.stem for path in (folder / 'results/compare_run/report_figures').glob('*.pdf')}
    assert drawn == {path.stem for path in (folder / 'results/compare_run/report_figures').glob('*.png')}
    for start in (
        'curves1_PSNR_Set',
        'curves2_l_pix',
        'contrast2_Level_2',
        'contrast4_Level_2_part',
        'costs3_',
        'crops',
    ):
        assert any(name.startswith(start) for name in drawn), start


def test_scores_are_those_of_the_comparison(page):
    rows = page.table('Method')
    assert [row['Method'] for row in rows] == ['Teacher', 'DCKD', ODD]
    assert [row['Set PSNR'] for row in rows] == ['33.00', '30.19 ± 0.09', '31.25 ± 0.35']
    marked = [attributes['class'] for tag, attributes in page.tags if tag == 'td' and 'class' in attributes]
    assert marked == ['second', 'best']


def test_names_are_no_markup(page):
    assert not [attributes for tag, attributes in page.tags if tag == 'img' and attributes.get('src') == 'x']
    assert [tag for tag, _ in page.tags].count('script') == 2
    shown = json.loads(page.data['script', 'data'])
    assert ODD in shown['pictures']['0'] and shown['sides'] == ['Teacher', ODD]
    assert list(shown['pictures']['0']) == ['ground truth', 'bicubic', 'Teacher', 'DCKD', ODD]


def test_numbers_of_the_logs(page, folder):
    log = next((folder / 'experiments/run').glob('train_*.log')).read_text()
    printed = [float(value) for value in re.findall(r'# psnr: ([\d.]+)', log)]
    best = max(range(2), key=lambda i: printed[i])
    first, second = page.table('run')
    assert first['best PSNR in validation'] == f'{printed[best]:.4f} (Set, iteration {(3, 4)[best]})'
    assert (first['iterations'], first['state'], first['method'], second['method']) == ('4', 'finished', 'DCKD', ODD)
    rows = [json.loads(line) for line in (folder / 'experiments/run/metrics.jsonl').read_text().splitlines()]
    kinds = [next((kind for kind in ('start', 'validation', 'end') if kind in row), 'losses') for row in rows]
    assert kinds == ['start', 'losses', 'validation', 'losses', 'validation', 'end']
    assert rows[0]['start']['total_iter'] == 4 and rows[0]['start']['versions']['PyTorch'] == torch.__version__
    assert [row['validation']['Set']['psnr'] for row in rows if 'validation' in row] == pytest.approx(printed, abs=1e-4)
    rows = [row for row in rows if 'l_pix' in row]
    assert [row['iter'] for row in rows] == [2, 4]
    assert first['s / iteration'] == f'{statistics.median(row["time"] for row in rows):.3f}'
    sums = next(table for table in page.tables if table[0][1] == 'level')[1:]
    assert [row[:2] for row in sums] == [['DCKD', '1'], ['DCKD', '2'], [ODD, '1'], [ODD, '2']]
    for level, row in enumerate(sums[:2]):
        ends = [rows[i][part][level] for part in ('numerator', 'denominator') for i in (0, 1)]
        assert [row[i] for i in (2, 3, 5, 6)] == [f'{value:.4g}' for value in ends]
        assert row[7] == f'×{ends[3] / ends[2]:.2f}'
        assert row[8] == f'{sum(r["left_out"][level] for r in rows) / 2:.0%}'
    line = re.search(r'iter: +4, .* l_pix: (\S+)', log)
    assert float(line[1]) == pytest.approx(rows[1]['l_pix'], rel=1e-4)


def test_costs_and_overlap(page):
    for row in page.table('network'):
        net = build_network(edsr(16 if row['network'] == 'Teacher' else 8))
        assert row['parameters'] == f'{sum(p.numel() for p in net.parameters()):,}'
    rows = {row['against the teacher']: row for row in page.table('against the teacher')}
    assert list(rows) == ['ground truth', 'bicubic', 'DCKD', ODD]
    assert all(0 < float(row['overlap']) < 1 for row in rows.values())


def test_overlap_against_loops():
    p, q = (torch.randn(7, 5).mul(2).softmax(1) for _ in range(2))
    total = equal = 0
    for a, b in zip(p.tolist(), q.tolist()):
        total += sum(min(x, y) for x, y in zip(a, b))
        equal += a.index(max(a)) == b.index(max(b))
    assert report_networks.overlap(p, q) == pytest.approx((total / 7, equal / 7))
    assert report_networks.overlap(p, p) == pytest.approx((1, 1))


def line(iteration, loss):
    return {'iter': iteration, 'epoch': 0, 'lrs': [1e-4], 'time': 0.5, 'data_time': 0.001, 'l_pix': loss}


def validation(iteration, score):
    return {'iter': iteration, 'validation': {'A: b': {'psnr': score}}}


def starts(total, start=0):
    about = {'images': 6, 'batch': '4', 'device': 'cpu', 'total_iter': total, 'versions': {'PyTorch': '2'}}
    return {'iter': start, 'start': about}


def metrics(folder, *rows):
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder / 'metrics.jsonl'


def test_metrics_of_a_resumed_run(tmp_path):
    first = [starts(1050), line(400, 4), line(800, 3), validation(1000, 20)]
    path = metrics(tmp_path, *first)
    log = report.read_log(path)
    assert not log.finished and log.scores[1000] == {('A: b', 'psnr'): 20.0}
    ended = [validation(1050, 22), {'iter': 1050, 'end': {'seconds': 1}}]
    metrics(tmp_path, *first, starts(1050, 1000), validation(1000, 21), line(1050, 1e-3), *ended)
    log = report.read_log(path)
    assert log.losses == {400: {'l_pix': 4.0}, 800: {'l_pix': 3.0}, 1050: {'l_pix': 0.001}}
    assert log.scores == {1000: {('A: b', 'psnr'): 21.0}, 1050: {('A: b', 'psnr'): 22.0}}
    assert log.finished and log.total == 1050 and log.seconds == [0.5] * 3
    with open(path, 'a') as file:  # and goes on, for longer
        file.write(json.dumps(starts(2000, 1050)) + '\n{"iter": 1100, "l_p')
    log = report.read_log(path)
    assert not log.finished and log.total == 2000


def test_a_score_that_is_not_finite(tmp_path):
    logs.Metrics(tmp_path / 'metrics.jsonl').write_scores(3, 'Set', {'psnr': math.inf, 'ssim': 1.0, 'odd': 'text'})
    log = report.read_log(tmp_path / 'metrics.jsonl')
    assert log.scores == {3: {('Set', 'psnr'): None, ('Set', 'ssim'): 1.0}}
    assert report.summary(report.Run('a', tmp_path, {}, '', log))[-1] == '-'


def test_curves_of_scores_show_where_the_methods_differ():
    matplotlib, figures = pytest.importorskip('matplotlib.figure'), pytest.importorskip('dckd_sr.report_figures')
    limits = []

    class Stub:
        def draw(self, section, title, plot, **options):
            axes = matplotlib.Figure().add_subplot()
            plot(axes)
            limits.append(axes.get_ylim())

    def run(label, *values):
        scores = {10 * i: {('Set', 'psnr'): value} for i, value in enumerate(values, 1)}
        return report.Run(label, Path(label), {}, '', report.Log(scores=scores))

    figures.draw(Stub(), [run('a', 5, 20, 29, 30), run('b', 4, 22, 28, 29)], {}, {})
    figures.draw(Stub(), [run('a', 31, 20, 29, math.nan)], {}, {})
    figures.draw(Stub(), [run('a', 20), run('b', math.nan)], {}, {})
    assert limits[0] == pytest.approx((19.5, 30.5)) and limits[1] == pytest.approx((19.45, 31.55))
    assert limits[2][0] < 20 < limits[2][1]


def test_metrics_follow_the_run_over_a_resume(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'again', symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / 'again')
        path = Path('experiments/run/metrics.jsonl')
        whole = logs.read_metrics(path)
        path.write_text(path.read_text() + '{"iter": 9, "l_pi')
        Path('experiments/run/training_states/4.state').unlink()
        assert train.main(['-opt', 'opt.yml', '--auto_resume']) == 0
        again = logs.read_metrics(path)
    assert sum('start' in row for row in again) == 2 and sum('validation' in row for row in again) == 2
    whole, again = ([row for row in rows if 'l_pix' in row] for rows in (whole, again))
    assert [row['iter'] for row in again] == [2, 4]
    for part in ('l_pix', 'numerator', 'denominator', 'left_out', 'lrs'):
        assert again[1][part] == whole[1][part]


def test_metrics_are_json_and_of_rank_0(tmp_path):
    logs.Metrics(None).write({'iter': 1})
    written = logs.Metrics(tmp_path / 'm.jsonl')
    written.write({'iter': 1, 'l_pix': float('nan'), 'numerator': [1.5, float('inf')]})
    assert (tmp_path / 'm.jsonl').read_text() == '{"iter": 1, "l_pix": null, "numerator": [1.5, null]}\n'
    (tmp_path / 'm.jsonl').write_text('{"iter": 1}\n[1]\n{"iter": 7}\n{"ite')
    logs.Metrics(tmp_path / 'm.jsonl', 3)
    assert (tmp_path / 'm.jsonl').read_text() == '{"iter": 1}\n'


def test_an_interrupted_run_without_weights(tmp_path, capsys):
    run = Path('experiments/a<b>')
    run.mkdir(parents=True)
    metrics(run, starts(100), line(20, 4))
    assert report.main(['a<b>', '-o', 'page.html']) == 0
    page = Page(Path('page.html').read_text(encoding='utf-8'))
    assert page.table('run')[0] == {
        'run': 'a<b>',
        'method': 'a<b>',
        'iterations': '20',
        'state': 'stopped at 20 of 100',
        's / iteration': '0.500',
        'best PSNR in validation': '-',
    }
    assert any('a<b>: no pictures: it has no resolved.yml' in text for text in page.data.values())
    assert 'slider' not in page.ids and 'contrast' not in page.ids


def one_run(folder, change):
    """A run of these options, changed, with random weights."""
    opt = dckd_run(Path('.'))
    change(opt)
    models = Path('experiments/one/models')
    models.mkdir(parents=True)
    torch.save({'params': build_network(opt['network_g']).state_dict()}, models / 'net_g_2.pth')
    (models.parent / 'resolved.yml').write_text(yaml.safe_dump(opt))
    notes = []
    return report_networks.restore([report.read_run(models.parent, 'one')], 1, notes), notes


def without_teacher(opt):
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del opt[key]
    opt['path'] = {}


def deblurring(opt):
    without_teacher(opt)
    opt.update(scale=1, network_g=edsr(8, 1))
    for data in opt['datasets'].values():
        data['dataroot_lq'] = 'HR'


@pytest.mark.parametrize(
    'change, labels, said',
    [
        (without_teacher, ['ground truth', 'bicubic', 'one'], 'No overlap of codes'),
        (deblurring, ['ground truth', 'input', 'one'], 'No overlap of codes'),
        (lambda opt: opt['path'].update(pretrain_network_t='gone.pth'), ['ground truth', 'bicubic', 'one'], 'gone.pth'),
        (lambda opt: opt['datasets']['val_1'].update(dataroot_gt='gone'), [], 'Set: no images to look at'),
        (lambda opt: opt.update(scale=3), [], 'one: no pictures'),
    ],
)
def test_missing_parts_are_named(tmp_path, change, labels, said):
    shown, notes = one_run(tmp_path, change)
    assert any(said in note for note in notes), notes
    assert list(shown['pictures']['0'] if shown else []) == labels
    assert not shown or (shown['overlap'] == [] and shown['sides'] == ['ground truth', 'one'])


def test_the_newest_weights_are_taken(tmp_path):
    run = report.Run('r', tmp_path, {}, '', report.Log())
    (tmp_path / 'models').mkdir()
    for name, newest in (
        ('net_g_9.pth', 'net_g_9.pth'),
        ('net_g_10.pth', 'net_g_10.pth'),
        ('net_g_x.pth', 'net_g_10.pth'),
        ('net_g_latest.safetensors', 'net_g_latest.safetensors'),
        ('net_g_ema_latest.safetensors', 'net_g_ema_latest.safetensors'),
    ):
        (tmp_path / 'models' / name).touch()
        assert report_networks.newest_weights(run.path).name == newest


def test_the_window_where_images_differ_most():
    rng = np.random.default_rng(0)
    truth, first, second = rng.integers(0, 256, (3, 20, 17, 3), np.uint8)
    errors = [np.square(image.astype(int) - truth).sum(2) for image in (first, second)]
    gaps = {
        (y, x): abs(int(errors[0][y : y + 6, x : x + 6].sum()) - int(errors[1][y : y + 6, x : x + 6].sum()))
        for y in range(15)
        for x in range(12)
    }
    top, left = max(gaps, key=gaps.get)
    assert report_networks.most_different([first, second], truth, 6) == (slice(top, top + 6), slice(left, left + 6))


def test_pictures_of_noise_keep_to_the_size_of_a_page(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    cost = report_networks.Cost('EDSR', 1, 1, 1.0, (1, 3, 8, 8))
    scene = types.SimpleNamespace(
        names=['0', '1', '2', '3'],
        made=[dict(zip(('ground truth', 'a'), noise))] * 4,
        metric={'type': 'calculate_psnr', 'crop_border': 0},
        **{'costs': {'a': cost}, 'overlaps': {}, 'target': None, 'device': torch.device('cpu')},
    )
    one = sum(len(report_networks.data_uri(image, 'WEBP', quality=90)) for image in noise)
    for most, count in ((8e6, 4), (4 * one, 1), (0, 1)):  # a crop is as large as a picture here
        monkeypatch.setattr(report_networks, 'MOST_BYTES', most)
        shown = report_networks.arrange(scene, ['a'])
        size = sum(len(uri) for labels in shown['pictures'].values() for uri in labels.values())
        size += sum(len(part[-1]) for _, parts in shown['crops'] for part in parts)
        assert len(shown['pictures']) == len(shown['crops']) == count and (size <= most or count == 1)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['rum'], "(did you mean 'run'?)"),
        (['empty'], 'empty has neither a metrics.jsonl nor a compare.json'),
        (['run', '-o', 'empty'], '-o empty: a folder; expected the name of the HTML file'),
        (['run', '-o', 'file/page.html'], 'cannot write file/page.html'),
        (['run', '-o', 'experiments/run/metrics.jsonl'], 'metrics.jsonl: expected a name that ends in .html'),
        (['run', '--images', '-1'], '--images -1: expected 0 or more'),
        (['broken'], 'not what dckd_sr.compare writes'),
        (['odd'], 'experiments/odd/resolved.yml: '),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    for name in ('run', 'odd'):
        Path('experiments', name).mkdir(parents=True)
        metrics(Path('experiments', name), line(1, 1))
    Path('experiments/odd/resolved.yml').write_text('a: [')
    for name in ('empty', 'broken'):
        Path(name).mkdir()
    Path('broken/compare.json').write_text('{"methods": 3}')
    Path('file').touch()
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1


def test_scores_of_other_weights_are_left_out_and_said(tmp_path):
    """The run was trained again under its name, or a test under its name was of another file."""
    opt = dckd_run(tmp_path)
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt)]) == 0
    weights = 'experiments/run/models/net_g_latest.pth'
    test_opt = ['-opt', 'opt.yml', '--no_bicubic', '--force_yml', f'path:pretrain_network_g={weights}']
    assert test.main(test_opt) == 0

    def table():
        run = report.read_run(Path('experiments/run'), 'run')
        return report.table_of([run])

    tested = table()
    assert tested['notes'] == [f'run: tested, {Path("results/run/results.json")}'] and tested['scores']['run']
    shutil.copytree('results/run', 'results/compare_x/tests/run')
    assert test.main([*test_opt[:-1], 'path:pretrain_network_g=experiments/run/models/net_g_2.pth']) == 0
    assert len(table()['notes']) == 1  # of this run, too
    shutil.copy(weights, 'student.pth')
    assert test.main([*test_opt[:-1], 'path:pretrain_network_g=student.pth']) == 0
    assert table()['notes'][1] == f'run: tested, {Path("results/compare_x/tests/run/results.json")}'
    runs = [compare.Run('dckd', 1, opt, tmp_path)]
    scores = {'dckd': {('Set', 'psnr'): {1: 30.0}}}
    compare.write_tables(Path('results/compare_x'), scores, {}, runs)
    assert not any('other weights' in note for note in report.read_comparison(Path('results/compare_x'))[0]['notes'])
    opt['train']['optim_g']['lr'] = 0.1
    assert train.main(['-opt', write(opt)]) == 0
    notes = table()['notes']
    assert len(notes) == 3 and all('left out, it is of other weights' in note for note in notes[:2])
    assert notes[2] == 'run: validation at iteration 2'
    notes = report.read_comparison(Path('results/compare_x'))[0]['notes']
    assert notes[-1] == 'other weights than when the table was made: run; compare makes it anew'


PROBE = """<script>
window.wrong = [];
window.addEventListener('error', event => wrong.push(event.message));
document.addEventListener('securitypolicyviolation', event => wrong.push(event.blockedURI));
window.addEventListener('load', () => {
  const input = document.getElementById('divide'), slider = document.getElementById('slider');
  input.value = 25;
  input.dispatchEvent(new Event('input'));
  document.getElementById('left').value = 'bicubic';
  document.getElementById('left').dispatchEvent(new Event('change'));
  const image = document.getElementById('left-image');
  document.title = JSON.stringify({
    wrong, at: getComputedStyle(slider).getPropertyValue('--at'), cut: getComputedStyle(slider.children[1]).clipPath,
    alt: image.alt, text: document.getElementById('left-text').textContent.slice(0, 9), wide: image.naturalWidth,
  });
});
</script>"""
BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(BROWSER is None, reason='no Chromium')
def test_the_slider_moves_in_a_browser(folder, tmp_path):
    text = (folder / 'results/compare_run/report.html').read_text(encoding='utf-8')
    Path('page.html').write_text(text.replace('<head>', f'<head>{PROBE}'), encoding='utf-8')
    command = [BROWSER, '--headless=new', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / "profile"}']
    command += ['--virtual-time-budget=3000', '--dump-dom', (tmp_path / 'page.html').as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r'<title>(.*?)</title>', dom)[1].replace('&quot;', '"'))
    assert found == {
        'wrong': [],
        'at': '25%',
        'cut': 'inset(0px 0px 0px 25%)',
        'alt': '0, bicubic',
        'text': 'bicubic, ',
        'wide': 48,
    }

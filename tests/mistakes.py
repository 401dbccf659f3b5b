"""The mistakes of docs/errors.md, and the odd inputs that work, each by its text in the table's first column.

An entry is what --force_yml takes, or a function that changes a `Run` in whose folder it stands.
"""

import importlib
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import cv2
import lmdb
import numpy as np
import tifffile
import torch
from basicsr.archs import build_network
from PIL import Image
from small_run import dckd_run, edsr, write

from dckd_sr import option_files, prepare, processes


class Run:
    """A small run in the current folder, about to be started.

    Attributes:
        opt (dict): its options, written to opt.yml unless there is such a file.
        command (str), arguments (list): module of the package, and what it is started with.
        patch: pytest's monkeypatch, for what is no file.
    """

    def __init__(self, patch=None):
        self.opt, self.command, self.arguments = dckd_run(Path('.')), 'train', ['-opt', 'opt.yml']
        self.patch = patch
        self.opt['train']['total_iter'] = 1
        self.opt['val']['val_freq'] = 1

    @property
    def train(self):
        return self.opt['train']

    @property
    def data(self):
        return self.opt['datasets']['train']

    def prepare(self, entry):
        """Make a mistake."""
        if callable(entry):
            entry(self)
        else:
            option_files.apply_overrides(self.opt, [entry] if isinstance(entry, str) else entry)
        if not os.path.lexists('opt.yml'):
            write(self.opt)

    def start(self):
        """Returns: exit code."""
        return importlib.import_module(f'dckd_sr.{self.command}').main(self.arguments)

    def becomes_test(self, *arguments):
        """A test of weights that network_g fits."""
        torch.save({'params': build_network(edsr()).state_dict()}, 'student.pth')
        self.opt['path']['pretrain_network_g'] = 'student.pth'
        self.command, self.arguments = 'test', ['-opt', 'opt.yml', *arguments]

    def made_of(self, kind, **options):
        """Training and validation images are read by another dataset class."""
        for block in self.opt['datasets'].values():
            block.update(type=kind, **options)

    def validates_apart(self):
        """Validation has copies of the images as they are now: what happens to others is training's affair."""
        for key, folder in (('dataroot_gt', 'HR'), ('dataroot_lq', 'LR')):
            shutil.copytree(folder, f'{folder}_val')
            self.opt['datasets']['val_1'][key] = f'{folder}_val'


MISTAKES, WORKS = {}, {}


def mistake(text):
    return lambda function: MISTAKES.setdefault(text, function)


def works(text):
    return lambda function: WORKS.setdefault(text, function)


# ---------------------------------------------------------------------------------------------------------------------
# Option files

for _text, _content in {
    'an empty option file': b'',
    'an option file that is not YAML': b'name: [run\nscale: 2\n',
    'a tab in front of a key': b'train:\n\ttotal_iter: 1\n',
    'an option file that is a list': b'- name: run\n- scale: 2\n',
    'an option file that is no text': b'\x89PNG\r\n\xff\xfe',
    'a key that is set twice': b'name: run\nscale: 2\nscale: 4\n',
    'a key that is a number': b'name: run\n4: scale\n',
    'a Python object in the option file': b'name: !!python/object/apply:os.system ["touch HACKED"]\n',
    'a Windows path in double quotes': b'path: {pretrain_network_t: "C:\\new\\teacher.pth"}\n',
    'a block that contains itself': b'train: &a\n  optim_g: *a\n',
    'a thousand levels of YAML': b'train: ' + b'[' * 1000,
    'YAML aliases that multiply': b'a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n'
    + b''.join(b'%c: &%c [%s]\n' % (c, c, b', '.join([b'*%c' % (c - 1)] * 9)) for c in b'bcdefgh'),
    'a `_base_` that is not there': b'_base_: none\n',
    'a `_base_` that is the file itself': b'_base_: opt.yml\n',
}.items():
    MISTAKES[_text] = lambda run, content=_content: Path('opt.yml').write_bytes(content)


@mistake('an option file that is not there')
def _(run):
    run.arguments = ['-opt', 'optt.yml']


@mistake('a folder as option file')
def _(run):
    Path('opt.yml').mkdir()


@mistake('a device as option file')
def _(run):
    run.arguments = ['-opt', '/dev/zero']


@mistake('no `-opt`')
def _(run):
    run.arguments = []


@mistake('an option file without `-opt`')
def _(run):
    run.arguments = ['opt.yml']


@mistake('`--force_yml` without a value')
def _(run):
    run.arguments += ['--force_yml', 'train:total_iter']


@mistake('`--force_yml` through a value')
def _(run):
    run.arguments += ['--force_yml', 'scale:x=1']


@mistake('a home folder that the shell wrote in the place of ~')
def _(run):
    run.arguments += ['--force_yml', f'network_t={os.path.expanduser("~")}']


# The run as a file of BasicSR.
PLAIN = ['model_type=SRModel', 'network_t=null', 'network_his=null', 'network_vqgan=null', 'path=null']
PLAIN += ['train={total_iter: 1, optim_g: {type: Adam, lr: 1e-4}, pixel_opt: {type: L1Loss}}']

MISTAKES.update(
    {
        'text for a number': 'train:total_iter=many',
        'a list for a number': 'scale=[2]',
        'text for a block': 'network_g=EDSR',
        'a list for the datasets': 'datasets=[train, val]',
        'text for true or false': 'datasets:train:use_hflip=perhaps',
        'a fraction of iterations': 'train:total_iter=1.5',
        'a number for a path': 'path:pretrain_network_t=3',
        '`total_iter: 0`': 'train:total_iter=0',
        'a negative crop': 'datasets:train:gt_size=-32',
        'a crop that scale does not divide': 'datasets:train:gt_size=33',
        'a batch of none': 'datasets:train:batch_size_per_gpu=0',
        'ten million loader workers': 'datasets:train:num_worker_per_gpu=10000000',
        'a batch of a million': 'datasets:train:batch_size_per_gpu=1000000',
        'a seed beyond 32 bits': 'manual_seed=10000000000',
        'negative features': 'network_g:num_feat=-8',
        'no feature': 'network_g:num_feat=0',
        'more features than memory holds': 'network_g:num_feat=10000000000000',
        'a number beyond 64 bits': 'network_g:num_feat=100000000000000000000000000000',
        '`step` not positive': 'train:step=[0]',
        'an empty `step`': 'train:step=[]',
        'a probability above 1': 'train:gaussian_noise_prob=1.5',
        'a moving average that never moves': 'train:ema_decay=1',
        'a rate that is nan': 'train:optim_g:lr=.nan',
        'a negative learning rate': 'train:optim_g:lr=-0.001',
        'a learning rate in words': 'train:optim_g:lr=fast',
        'Adam with one beta': 'train:optim_g:betas=[0.9]',
        'an unknown key': 'train:total_itre=1',
        'a near miss of a key in a file of BasicSR': [*PLAIN, 'train:ema_deacy=0.9'],
        'a loss that the model does not compute': [*PLAIN, 'train:fft_opt={type: L1Loss, loss_weight: 0.05}'],
        'a key that the program sets': 'dist=true',
        'a key in the wrong section': 'num_neg=4',
        "another toolbox's name of a key": 'datasets:train:patch_size=32',
        'an unknown model': 'model_type=DCKDModle',
        'an unknown network': 'network_g:type=EDSRR',
        'an unknown argument of a network': 'network_g:num_feats=8',
        'an unknown loss': 'train:pixel_opt:type=L1loss',
        'an unknown optimiser': 'train:optim_g:type=Adan',
        'an unknown schedule': 'train:scheduler:type=CosineLR',
        'an unknown dataset': 'datasets:train:type=PairedImages',
        'an unknown metric': 'val:metrics:psnr:type=psnr',
        'a schedule that ends early': 'train:scheduler={type: CosineAnnealingRestartLR, periods: [0.5]}',
        'restart weights that do not match the periods': (
            'train:scheduler={type: CosineAnnealingRestartLR, periods: [1, 1], restart_weights: [1]}'
        ),
        'no loss': ['train:pixel_opt=~', 'train:logits_opt=~', 'train:cl_opt=~', 'train:ce_opt=~'],
        'a loss against a teacher without a teacher': ['network_t=~', 'path:pretrain_network_t=~'],
        'a teacher without weights': 'path:pretrain_network_t=~',
        'a super-resolution without `scale`': 'scale=null',
        'a student of another scale': 'network_g:upscale=4',
        'a teacher of another scale': 'network_t:upscale=4',
        'a teacher with other channels': 'network_t:num_out_ch=1',
        'a VQGAN with other channels': 'network_vqgan:ddconfig:in_channels=1',
        'a VQGAN whose groups do not divide': 'network_vqgan:ddconfig:ch=24',
        '`cl_opt` without an encoder': ['network_vqgan=~', 'train:ce_opt=~'],
        'weights that do not match the levels': 'train:cl_opt:weights=[0.5, 0.5, 1]',
        '`cl_opt` without negatives': ['train:num_neg=0', 'train:neg_clean=false'],
        'stages of a progressive run that do not match': 'datasets:train:iters=[5, 5]',
        'a teacher cache for a dataset that does not read it': 'datasets:train:teacher_cache=cache.lmdb',
        'a teacher cache beside `lcr_opt`': [
            'datasets:train:type=SRImageDataset',
            'datasets:train:teacher_cache=cache.lmdb',
            'train:lcr_opt={type: L1Loss}',
        ],
        'a teacher cache beside mixup': [
            'datasets:train:type=SRImageDataset',
            'datasets:train:teacher_cache=cache.lmdb',
            'train:mixing_augs={mixup: true}',
        ],
        'a teacher cache beside `dukd_opt`': [
            'datasets:train:type=SRImageDataset',
            'datasets:train:teacher_cache=cache.lmdb',
            'train:dukd_opt={type: UpcyclingLoss}',
        ],
        'a teacher cache beside `fakd_opt`': [
            'datasets:train:type=SRImageDataset',
            'datasets:train:teacher_cache=cache.lmdb',
            'train:fakd_opt={type: SpatialAffinityLoss, student: body.0, teacher: body.0}',
        ],
        '`mclir_opt` as the only loss': [
            *('train:pixel_opt=~', 'train:logits_opt=~', 'train:cl_opt=~', 'train:ce_opt=~'),
            'train:mclir_opt={type: HistoryNegativeLoss, allow_random: true}',
        ],
        'a module in `fakd_opt` that the student does not have': (
            'train:fakd_opt={type: SpatialAffinityLoss, student: body.7, teacher: body.0}'
        ),
        'more modules of the student than of the teacher in `fakd_opt`': (
            'train:fakd_opt={type: SpatialAffinityLoss, student: [body.0, conv_after_body], teacher: body.0}'
        ),
        'maps of other sizes in `fakd_opt`': (
            'train:fakd_opt={type: SpatialAffinityLoss, student: body.0, teacher: upsample}'
        ),
        'more negatives in `csd_opt` than the batch has images': (
            'train:csd_opt={type: CSDLoss, num_neg: 3, allow_random: true}'
        ),
        'an unknown layer in `mclir_opt`': (
            'train:mclir_opt={type: HistoryNegativeLoss, layer_weights: {conv5_5: 1}, allow_random: true}'
        ),
        'more tiles in `dukd_opt` than GT has': 'train:dukd_opt={type: UpcyclingLoss, n_gt_sub: 5}',
        'a crop that `dukd_opt` cannot shrink twice': [
            'train:dukd_opt={type: UpcyclingLoss}',
            'datasets:train:gt_size=30',
        ],
        'an Ensemble without networks': ['network_t={type: Ensemble, networks: []}', 'path:pretrain_network_t=~'],
        'a network of an Ensemble without weights': [
            'network_t={type: Ensemble, networks: [{type: EDSR, num_in_ch: 3, num_out_ch: 3, upscale: 2}]}',
            'path:pretrain_network_t=~',
        ],
        'an unknown network in an Ensemble': [
            'network_t={type: Ensemble, networks: [{type: EDSRR, pretrain: teacher.pth}]}',
            'path:pretrain_network_t=~',
        ],
        '`pretrain_network_t` beside an Ensemble': (
            'network_t={type: Ensemble, networks: [{type: spandrel, path: teacher.pth}]}'
        ),
        'tiles that overlap whole': ['val:tile_size=16', 'val:tile_overlap=16'],
        'two sets of one name': ['datasets:val_2={type: SRImageDataset, dataroot_gt: HR, name: Set}'],
        'a set that is neither train, val nor test': 'datasets:vla={type: SRImageDataset, dataroot_gt: HR}',
        'no training set': 'datasets:train=~',
        'a run name that leads elsewhere': 'name=../run',
        'a set name that leads elsewhere': 'datasets:val_1:name=../../x',
        'a suffix of images that leads elsewhere': 'val:suffix=/../x',
        'a training set without ground truth': 'datasets:train={type: SingleImageDataset, dataroot_lq: LR}',
        'a module of `imports` that is not there': 'imports=my_archs',
        'a negative border of a metric': 'val:metrics:psnr:crop_border=-3',
        'W&B without TensorBoard': 'logger:wandb={project: p}',
        # -------------------------------------------------------------------------------------------------------------
        # Data
        'a folder of images that is not there': 'datasets:train:dataroot_gt=HR2',
        'a file as folder of images': 'datasets:train:dataroot_gt=HR/0.png',
        'a template that matches nothing': "datasets:train:filename_tmpl='{}x2'",
        'a template with a misspelt field': "datasets:train:filename_tmpl='{name}'",
        'images smaller than the crop': 'datasets:train:gt_size=64',
        'a list of images that is not there': 'datasets:train:meta_info_file=list.txt',
    }
)


@mistake('an empty folder of images')
def _(run):
    Path('none').mkdir()
    run.data['dataroot_gt'] = 'none'


@mistake('images in sub-folders only')
def _(run):
    Path('sub').mkdir()
    shutil.copytree('HR', 'sub/HR')
    run.data['dataroot_gt'] = 'sub'


@mistake('LQ of another suffix than GT')
def _(run):
    Path('JPEG').mkdir()
    for file in Path('LR').iterdir():
        cv2.imwrite(f'JPEG/{file.stem}.jpg', cv2.imread(str(file)))
    run.data['dataroot_lq'] = 'JPEG'


@mistake('an LMDB whose keys have a suffix')
def _(run):
    Path('LRx2').mkdir()
    for file in Path('LR').iterdir():
        shutil.copy(file, f'LRx2/{file.stem}x2.png')
    for folder in ('HR', 'LRx2'):
        assert prepare.main(['lmdb', folder, f'{folder}.lmdb', '--workers', '1']) == 0
    run.data.update(dataroot_gt='HR.lmdb', dataroot_lq='LRx2.lmdb', io_backend={'type': 'lmdb'})


@mistake('a damaged image, with `datasets.train.check_images`')
def _(run):
    run.data['check_images'] = True
    cut('HR/1.png')


@mistake('a GT image without LQ')
def _(run):
    Path('LR/2.png').unlink()


@mistake('an LQ image without GT')
def _(run):
    Path('HR/2.png').unlink()


@mistake('LQ of another size than GT needs')
def _(run):
    run.validates_apart()
    save('LR/1.png', image(20, 24))


@mistake('validation images of another scale')
def _(run):
    Path('LR4').mkdir()
    for index in range(4):
        save(f'LR4/{index}.png', image(12, 12))
    run.opt['datasets']['val_1']['dataroot_lq'] = 'LR4'


@mistake('an image of 1 x 1 in training')
def _(run):
    save('HR/1.png', image(2, 2))
    save('LR/1.png', image(1, 1))


def cut(path, keep=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


@mistake('a truncated PNG')
def _(run):
    cut('HR/1.png')


@mistake('a truncated PNG, read by `SRImageDataset`')
def _(run):
    run.made_of('SRImageDataset')
    cut('LR/1.png')


@mistake('a truncated JPEG')
def _(run):
    run.validates_apart()
    as_jpeg(run)
    cut('LR/1.jpg')


@mistake('a damaged PNG')
def _(run):
    content = bytearray(Path('HR/1.png').read_bytes())
    content[60:90] = bytes(30)
    Path('HR/1.png').write_bytes(content)


@mistake('an archive named .png')
def _(run):
    with zipfile.ZipFile('LR/1.png', 'w') as archive:
        archive.write('HR/0.png')


@mistake('a JPEG with damage inside')
def _(run):
    as_jpeg(run)
    content = Path('LR/1.jpg').read_bytes()
    Path('LR/1.jpg').write_bytes(content[: content.find(b'\xff\xda') + 40] + content[-2:])


@mistake('text named .png')
def _(run):
    run.validates_apart()
    Path('LR/1.png').write_text('no image')


@mistake('an image file without content')
def _(run):
    run.validates_apart()
    Path('LR/1.png').write_bytes(b'')


@mistake('a PNG whose header claims 100000 x 100000')
def _(run):
    run.validates_apart()
    Path('HR/1.png').write_bytes(png_header(100000, 100000))


@mistake('a PNG whose header claims 20000 x 20000')
def _(run):
    run.validates_apart()
    Path('HR/1.png').write_bytes(png_header(20000, 20000))


@mistake('a TIFF of floats')
def _(run):
    run.validates_apart()
    run.made_of('SRImageDataset')
    Path('HR/1.png').unlink()
    cv2.imwrite('HR/1.tif', np.zeros((48, 48, 3), np.float32))


@mistake('a damaged image in a loader process')
def _(run):
    run.data['num_worker_per_gpu'] = 1
    cut('HR/1.png')
    cut('HR/2.png')


@mistake('a damaged image in validation')
def _(run):
    run.opt['datasets']['val_1'].update(dataroot_gt='HR2', dataroot_lq='LR2')
    for old, new in (('HR', 'HR2'), ('LR', 'LR2')):
        Path(new).mkdir()
        Path(new, '0.png').write_bytes(Path(old, '0.png').read_bytes())
    cut('LR2/0.png')


@mistake('an image that is a link to nowhere')
def _(run):
    Path('HR/1.png').unlink()
    Path('HR/1.png').symlink_to('elsewhere.png')


@mistake('an image that is a link to itself')
def _(run):
    Path('HR/1.png').unlink()
    Path('HR/1.png').symlink_to('1.png')


@mistake('a folder that is a link to itself')
def _(run):
    Path('loop').symlink_to('loop')
    run.data['dataroot_gt'] = 'loop'


@mistake('a list with an image that is not there')
def _(run):
    Path('list.txt').write_text('0.png (48,48,3)\n7.png (48,48,3)\n')
    run.data['meta_info_file'] = 'list.txt'


@mistake('an empty list of images')
def _(run):
    Path('list.txt').write_text('\n')
    run.data['meta_info_file'] = 'list.txt'


def as_lmdb(run):
    """The training images in two LMDBs."""
    for name in ('HR', 'LR'):
        with lmdb.open(f'{name}.lmdb', map_size=2**24) as environment, environment.begin(write=True) as transaction:
            for index in range(4):
                transaction.put(str(index).encode(), Path(name, f'{index}.png').read_bytes())
        Path(f'{name}.lmdb/meta_info.txt').write_text(''.join(f'{index}.png (48,48,3) 1\n' for index in range(4)))
    run.data.update(dataroot_gt='HR.lmdb', dataroot_lq='LR.lmdb', io_backend={'type': 'lmdb'})


@mistake('an LMDB without its list')
def _(run):
    as_lmdb(run)
    Path('HR.lmdb/meta_info.txt').unlink()


@mistake('an LMDB without its data')
def _(run):
    as_lmdb(run)
    Path('HR.lmdb/data.mdb').unlink()


@mistake('a folder of images as LMDB')
def _(run):
    as_lmdb(run)
    run.data['dataroot_gt'] = 'HR'


@mistake('a broken LMDB')
def _(run):
    as_lmdb(run)
    Path('HR.lmdb/data.mdb').write_bytes(b'not a database' * 1000)


@mistake('a truncated LMDB')
def _(run):
    as_lmdb(run)
    cut('HR.lmdb/data.mdb', 0.1)


@mistake('an LMDB that lacks a key of its list')
def _(run):
    as_lmdb(run)
    for name in ('HR', 'LR'):
        Path(f'{name}.lmdb/meta_info.txt').write_text('0.png (48,48,3) 1\n9.png (48,48,3) 1\n')


@mistake('a test without any of its sets')
def _(run):
    run.becomes_test()
    run.opt['datasets']['val_1']['dataroot_gt'] = 'Set5/HR'


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@mistake("a teacher's weights that are not there")
def _(run):
    Path('teacher.pth').unlink()


@mistake('a folder as weights')
def _(run):
    run.opt['path']['pretrain_network_t'] = 'HR'


@mistake('truncated weights')
def _(run):
    cut('teacher.pth')


@mistake('weights without content')
def _(run):
    Path('teacher.pth').write_bytes(b'')


@mistake('text as weights')
def _(run):
    Path('teacher.pth').write_text('<html>404</html>')


@mistake('truncated safetensors')
def _(run):
    Path('teacher.safetensors').write_bytes(b'\xff' * 20)
    run.opt['path']['pretrain_network_t'] = 'teacher.safetensors'


@mistake('`csd_opt` without VGG19')
def _(run):
    run.patch.setattr(torch.hub, 'get_dir', lambda: 'hub')
    run.train['csd_opt'] = {'type': 'CSDLoss', 'num_neg': 2}


@mistake('weights of another network as VGG19')
def _(run):
    run.train['csd_opt'] = {'type': 'CSDLoss', 'num_neg': 2, 'pretrain': 'teacher.pth'}


@mistake('a teacher cache that is not there')
def _(run):
    run.made_of('SRImageDataset')
    run.data['teacher_cache'] = 'cache.lmdb'


@mistake('a teacher cache of another teacher')
def _(run):
    run.made_of('SRImageDataset')
    run.data['teacher_cache'] = 'cache.lmdb'
    write(run.opt, 'cache.yml')
    assert prepare.main(['teacher_cache', '-opt', 'cache.yml']) == 0
    torch.save({'params': build_network(edsr(16)).state_dict()}, 'teacher.pth')


@mistake('weights of another size of network')
def _(run):
    run.opt['network_t']['num_feat'] = 8


@mistake('weights of another network')
def _(run):
    torch.save({'params': {'conv.weight': torch.zeros(1)}}, 'teacher.pth')


@mistake('weights under another key')
def _(run):
    weights = torch.load('teacher.pth', weights_only=True)['params']
    torch.save({'ema': weights, 'raw': weights}, 'teacher.pth')
    run.opt['path']['param_key_t'] = 'params_ema'


@mistake('bare weights where `param_key_t` is set')
def _(run):
    torch.save(torch.load('teacher.pth', weights_only=True)['params'], 'teacher.pth')
    run.opt['path']['param_key_t'] = 'params'


@mistake('a file of two networks as weights')
def _(run):
    weights = torch.load('teacher.pth', weights_only=True)['params']
    torch.save({'a': weights, 'b': weights}, 'teacher.pth')


@mistake('weights with a prefix of their own beside others')
def _(run):
    weights = torch.load('teacher.pth', weights_only=True)['params']
    both = {f'{name}.{key}': value for name in ('net_g', 'net_d') for key, value in weights.items()}
    torch.save({'params': both}, 'teacher.pth')


@mistake('compressed weights')
def _(run):
    with zipfile.ZipFile('teacher.pth') as old, zipfile.ZipFile('small.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    os.replace('small.pth', 'teacher.pth')


@mistake('sparse weights')
def _(run):
    torch.save({'params': {'conv.weight': torch.eye(2).to_sparse()}}, 'teacher.pth')


@mistake('a list as weights')
def _(run):
    torch.save([1, 2], 'teacher.pth')


class Code:
    def __reduce__(self):
        return os.mkdir, ('HACKED',)


@mistake('a pickle with code as weights')
def _(run):
    Path('teacher.pth').write_bytes(pickle.dumps({'params': Code()}))


@mistake('a torch file with code as weights')
def _(run):
    torch.save({'params': Code()}, 'teacher.pth')


@mistake('weights in the folder of an earlier run of that name')
def _(run):
    Path('experiments/run/models').mkdir(parents=True)
    shutil.move('teacher.pth', 'experiments/run/models/t.pth')
    run.opt['path']['pretrain_network_t'] = 'experiments/run/models/t.pth'


@mistake('weights of another network as `resume_state`')
def _(run):
    run.opt['path']['resume_state'] = 'teacher.pth'


@mistake('a teacher that is worse than bicubic')
def _(run):
    del run.train['check_teacher']


@mistake('a test without weights')
def _(run):
    run.becomes_test()
    del run.opt['path']['pretrain_network_g']


@mistake('a test of weights of another network')
def _(run):
    run.becomes_test()
    run.opt['network_g']['num_feat'] = 12


@mistake('a test of weights that are nan')
def _(run):
    run.becomes_test()
    weights = build_network(edsr()).state_dict()
    torch.save({'params': {key: value * torch.nan for key, value in weights.items()}}, 'student.pth')


@mistake('`zoo convert` of a file without weights')
def _(run):
    Path('notes.pth').write_text('no weights')
    run.command, run.arguments = 'zoo', ['convert', 'notes.pth']


@mistake('`zoo show` of a file that is no checkpoint')
def _(run):
    Path('notes.pth').write_text('no weights')
    run.command, run.arguments = 'zoo', ['show', 'notes.pth']


@mistake('`zoo get` of an unknown name')
def _(run):
    run.command, run.arguments = 'zoo', ['get', 'EDSR_x9']


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@mistake('a GPU that is not there')
def _(run):
    run.becomes_test('--device', 'cuda:99')


@mistake('a device that does not exist')
def _(run):
    run.becomes_test('--device', 'gpu')


@mistake('a file where training writes its folder')
def _(run):
    Path('experiments').write_text('')


@mistake('a file where a test writes its folder')
def _(run):
    run.becomes_test()
    Path('results').write_text('')


@mistake('a read-only folder')
def _(run):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(path))

    run.patch.setattr('pathlib.Path.mkdir', refuse)


def launched(run, port):
    run.arguments += ['--launcher', 'pytorch']
    for name, value in {'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0, 'MASTER_PORT': port}.items():
        run.patch.setenv(name, str(value))
    run.patch.setenv('MASTER_ADDR', '127.0.0.1')


@mistake('a port in use')
def _(run):
    run.socket = socket.create_server(('127.0.0.1', 0))
    launched(run, run.socket.getsockname()[1])


@mistake('`--launcher pytorch` without torchrun')
def _(run):
    for name in processes._NEEDED:
        run.patch.delenv(name, raising=False)
    run.arguments += ['--launcher', 'pytorch']


@mistake('ranks that are no numbers')
def _(run):
    launched(run, 29500)
    run.patch.setenv('RANK', 'first')


@mistake('a learning rate that blows up')
def _(run):
    run.train['optim_g']['lr'] = 1e30
    run.train['total_iter'] = 4
    run.opt['val']['val_freq'] = 100


# ---------------------------------------------------------------------------------------------------------------------
# What looks odd and works


def image(height, width, channels=3, dtype=np.uint8):
    """A smooth image of the sizes given."""
    small = np.random.default_rng(1).random((3, 3, channels))
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)
    return (large * np.iinfo(dtype).max).astype(dtype)


def save(path, pixels):
    assert cv2.imwrite(str(path), pixels)


def as_jpeg(run):
    for name in ('HR', 'LR'):
        for file in sorted(Path(name).glob('*.png')):
            save(file.with_suffix('.jpg'), cv2.imread(str(file)))
            file.unlink()


def png_header(width, height):
    """A PNG of the size given, with no pixels in it."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


def both(kind, pixels):
    """Two entries: the image in training and validation, read by BasicSR's dataset and by ours."""

    def change(run, reader=None):
        if reader:
            run.made_of(reader)
        for name, size in (('HR', 48), ('LR', 24)):
            Path(name, '1.png').unlink()
            pixels(Path(name), size)

    WORKS[f'{kind}'] = change
    WORKS[f'{kind}, read by `SRImageDataset`'] = lambda run: change(run, 'SRImageDataset')


both('a grayscale image', lambda folder, size: save(folder / '1.png', image(size, size, 1)))
both('an image with alpha', lambda folder, size: save(folder / '1.png', image(size, size, 4)))
both('an image of 16 bits', lambda folder, size: save(folder / '1.png', image(size, size, 3, np.uint16)))


def turned(folder, size):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(image(size, size)).save(folder / '1.png', exif=exif)


both('an image with an orientation', turned)
both(
    'a TIFF of 16 bits with its colours apart',
    lambda folder, size: tifffile.imwrite(
        folder / '1.tif', np.moveaxis(image(size, size, 3, np.uint16), 2, 0), photometric='rgb', planarconfig='separate'
    ),
)
both(
    'an animation',
    lambda folder, size: Image.fromarray(image(size, size)).save(
        folder / '1.webp', save_all=True, append_images=[Image.new('RGB', (size, size))]
    ),
)


@works('validation images too small for NIQE')
def _(run):
    run.opt['val']['metrics']['niqe'] = {'type': 'calculate_niqe', 'crop_border': 2}


@works('a test set whose bicubic LR folder is not there')
def _(run):
    run.becomes_test()
    run.opt['datasets']['val_1'].update(type='SRImageDataset', dataroot_lq='LR_bicubic/X2')


@works('CMYK JPEG')
def _(run):
    as_jpeg(run)
    for name, size in (('HR', 48), ('LR', 24)):
        Image.fromarray(image(size, size)).convert('CMYK').save(f'{name}/1.jpg')


@works('validation images of 1 x 1')
def _(run):
    run.opt['datasets']['val_1'].update(dataroot_gt='HR1', dataroot_lq='LR1')
    for name, size in (('HR1', 2), ('LR1', 1)):
        Path(name).mkdir()
        save(f'{name}/0.png', image(size, size))


@works('a folder named x.png among the images')
def _(run):
    Path('HR/x.png').mkdir()
    Path('LR/x.png').mkdir()


@works('hidden files and Thumbs.db among the images')
def _(run):
    for name in ('._0.png', 'Thumbs.db', 'notes.txt'):
        Path('HR', name).write_text('')


@works('images that are links')
def _(run):
    Path('HR').rename('store')
    Path('HR').mkdir()
    for file in Path('store').iterdir():
        Path('HR', file.name).symlink_to(Path('..', file))


@works('images in LMDB')
def _(run):
    as_lmdb(run)


@works('an option file with a byte order mark')
def _(run):
    text = Path(write(run.opt)).read_text()
    Path('opt.yml').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())


@works('a test where one of two sets is missing')
def _(run):
    run.becomes_test()
    run.opt['datasets']['val_2'] = {'type': 'SRImageDataset', 'name': 'Set5', 'dataroot_gt': 'Set5/HR'}


@works('`num_gpu: 1` where there is no GPU')
def _(run):
    run.opt['num_gpu'] = 1

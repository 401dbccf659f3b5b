"""Every kind of mistake in an option file: the message starts with the key and says what was meant."""

from pathlib import Path

import pytest
from option_files import DDCONFIG, VQGAN, dckd, esrgan, load, make_files, problems_of, vqgan

from dckd_sr import option_checks, option_files, option_keys, options
from dckd_sr.archs import vqgan_arch


@pytest.fixture(autouse=True)
def files(tmp_path):
    make_files(tmp_path)


MISTAKES = [  # override, start of the message, what else it says
    # unknown keys, in every section
    ('scael=4', 'scael = 4: unknown key', "did you mean 'scale'?"),
    ('network_x={type: EDSR}', 'network_x = ', "did you mean 'network_"),
    ('network_d={type: EDSR}', 'network_d = ', 'unknown key'),
    ('use_amp=yes please', 'use_amp = yes please: expected a valid boolean', ''),
    ('amp=true', 'amp = true: unknown key', 'here it is use_amp'),
    ('amp_networks=[studnet]', 'amp_networks.0 = studnet: expected', 'student'),
    ('compile_mode=fastest', 'compile_mode = fastest: expected', 'max-autotune'),
    ('train:negatives_micro_batch=0', 'train.negatives_micro_batch = 0: expected greater than or equal to 1', ''),
    ('datasets:train:gt_sise=192', 'datasets.train.gt_sise = 192: unknown key', "did you mean 'gt_size'?"),
    ('datasets:val_1:io_backend:typ=disk', 'datasets.val_1.io_backend.typ = disk', "did you mean 'type'?"),
    ('path:teacher=teacher.pth', 'path.teacher = teacher.pth: unknown key', 'pretrain_network_t'),
    ('path:pretrain_network_d=teacher.pth', 'path.pretrain_network_d = teacher.pth: unknown', 'did you mean'),
    ('train:accum_iter=0', 'train.accum_iter = 0: expected greater than or equal to 1', ''),
    ('train:grad_clip=-1', 'train.grad_clip = -1: expected greater than 0', ''),
    ('train:on_nonfinite=ignore', 'train.on_nonfinite = ignore: expected', 'skip'),
    ('train:accumulate=2', 'train.accumulate = 2: unknown key', 'accum_iter'),
    ('datasets:train:iters=[5, 5]', 'datasets.train.iters = [5, 5]: iters, mini_batch_sizes and gt_sizes go', ''),
    ('logger:keep_checkpoints=0', 'logger.keep_checkpoints = 0: expected greater than or equal to 1', ''),
    ('logger:save_checkpoint_format=onnx', 'logger.save_checkpoint_format = onnx: expected', 'safetensors'),
    ('train:net_d_iters=1', 'train.net_d_iters = 1: unknown key', ''),
    ('train:noisy:porb=1', 'train.noisy.porb = 1: unknown key', "did you mean 'prob'?"),
    ('val:windowsize=8', 'val.windowsize = 8: unknown key', "did you mean 'window_size'?"),
    ('logger:wandb:proj=x', 'logger.wandb.proj = x: unknown key', "did you mean 'project'?"),
    ('dist_params:prot=1', 'dist_params.prot = 1: unknown key', "did you mean 'port'?"),
    ('train:cl_opt:loss_wieght=0.1', 'train.cl_opt.loss_wieght = 0.1: unknown argument of ContrasLoss', 'loss_weight'),
    ('train:pixel_opt:weight=1', 'train.pixel_opt.weight = 1: unknown argument of L1Loss', 'loss_weight'),
    ('network_g:num_feats=64', 'network_g.num_feats = 64: unknown argument of EDSR', "did you mean 'num_feat'?"),
    ('network_g:allow_random=true', 'network_g.allow_random = true: unknown argument', ''),
    ('network_vqgan:ddconfig:chmult=[1]', 'network_vqgan.ddconfig.chmult = [1]: unknown', "did you mean 'ch_mult'?"),
    ('network_vqgan:n_embd=1', 'network_vqgan.n_embd = 1: unknown argument of VQGAN', "did you mean 'n_embed'?"),
    ('train:optim_g:beta=1', 'train.optim_g.beta = 1: unknown argument of Adam', "did you mean 'betas'?"),
    ('train:scheduler:gama=1', 'train.scheduler.gama = 1: unknown argument of MultiStepLR', "did you mean 'gamma'?"),
    ('val:metrics:psnr:test_y=true', 'val.metrics.psnr.test_y = true: unknown', "did you mean 'test_y_channel'?"),
    ('val:metrics:psnr:better=hihger', 'val.metrics.psnr.better = hihger: expected higher or lower', "'higher'?"),
    # keys of another section, or of another toolbox
    ('train:window_size=8', 'train.window_size = 8: unknown key', "it belongs in 'val'"),
    ('num_neg=4', 'num_neg = 4: unknown key', "it belongs in 'train'"),
    ('train:cl_opt:num_neg=4', 'train.cl_opt.num_neg = 4: unknown argument', "it belongs in 'train'"),
    ('train:scale=4', 'train.scale = 4: unknown key', 'it belongs in the top level'),
    ('train:gt_size=192', 'train.gt_size = 192: unknown key', "it belongs in 'datasets.train'"),
    ('network_g_teacher={type: EDSR}', 'network_g_teacher = ', 'here it is network_t'),
    ('path:pretrain_network_g_teacher=x', 'path.pretrain_network_g_teacher = x', 'here it is path.pretrain_network_t'),
    ('datasets:train:lq_size=48', 'datasets.train.lq_size = 48', 'here it is gt_size'),
    # names that nobody registered
    ('model_type=DCKDModle', 'model_type = DCKDModle: no such model', "did you mean 'DCKDModel'?"),
    ('network_g:type=EDSRR', 'network_g.type = EDSRR: no such arch', "did you mean 'EDSR'?"),
    ('train:pixel_opt:type=L1loss', 'train.pixel_opt.type = L1loss: no such loss', "did you mean 'L1Loss'?"),
    ('val:metrics:psnr:type=psnr', 'val.metrics.psnr.type = psnr: no such metric', 'calculate_psnr'),
    ('datasets:val_1:type=PairedImage', 'datasets.val_1.type = PairedImage: no such dataset', 'PairedImageDataset'),
    ('train:optim_g:type=Adan', 'train.optim_g.type = Adan: no such optimiser', "did you mean 'Adam'?"),
    ('train:optim_g:type=LBFGS', 'train.optim_g.type = LBFGS: no such optimiser', ''),
    ('train:scheduler:type=CosineLR', 'train.scheduler.type = CosineLR: no such schedule', 'CosineAnnealingLR'),
    ('train:cl_opt:type=L1Loss', 'train.cl_opt.type = L1Loss: no such loss for train.cl_opt', 'Loss'),
    (
        'train:ce_opt:type=ContrasLoss',
        'train.ce_opt.type = ContrasLoss: no such loss for train.ce_opt',
        'DistributionMappingLoss',
    ),
    # missing
    ('name=~', 'name: missing', ''),
    ('model_type=~', 'model_type: missing', 'DCKDModel'),
    ('network_g=~', 'network_g: missing', ''),
    ('datasets=~', 'datasets: missing', ''),
    ('train:total_iter=~', 'train.total_iter: missing', ''),
    ('train:optim_g=~', 'train.optim_g: missing', ''),
    ('train:optim_g={type: Adam}', 'train.optim_g.lr: missing', ''),
    ('network_g={num_in_ch: 3}', 'network_g.type: missing', 'EDSR'),
    ('network_g={type: EDSR, num_in_ch: 3, upscale: 4}', 'network_g.num_out_ch: missing; EDSR needs it', ''),
    ('datasets:train:dataroot_gt=~', 'datasets.train.dataroot_gt: missing; PairedImageDataset', ''),
    ('datasets:train:gt_size=~', 'datasets.train.gt_size: missing; PairedImageDataset', ''),
    ('datasets:train:type=~', 'datasets.train.type: missing', 'PairedImageDataset'),
    ('path:pretrain_network_t=~', 'path.pretrain_network_t: missing', 'teacher'),
    ('path:pretrain_network_vqgan=~', 'path.pretrain_network_vqgan: missing', 'dckd_sr.zoo get'),
    # values
    ('name=a/b', 'name = a/b: expected a plain folder name', ''),
    ('name=..', 'name = ..: expected a plain folder name', ''),
    ("name=''", 'name = : expected a plain folder name', ''),
    ('name=001', 'name = 1: expected text', 'quotes'),
    ('scale=0', 'scale = 0: expected', 'greater'),
    ('scale=x4', 'scale = x4: expected a valid integer', ''),
    ('num_gpu=two', "num_gpu = two: expected 'auto'", ''),
    ('num_gpu=-1', "num_gpu = -1: expected 'auto'", ''),
    ('manual_seed=-1', 'manual_seed = -1: expected', ''),
    ('train=1', 'train = 1: expected a block of keys', ''),
    ('network_t=teacher.pth', 'network_t = teacher.pth: expected a block of keys', ''),
    ('train:pixel_opt=L1Loss', 'train.pixel_opt = L1Loss: expected a block of keys', ''),
    ('train:total_iter=0', 'train.total_iter = 0: expected', ''),
    ('train:total_iter=true', 'train.total_iter = true: expected a number', ''),
    ('train:total_iter=2.5', 'train.total_iter = 2.5: expected a valid integer', ''),
    ('train:ema_decay=1', 'train.ema_decay = 1: expected less than 1', ''),
    ('train:ema_decay=.nan', 'train.ema_decay = NaN: expected', ''),
    ('train:update_decay=1.5', 'train.update_decay = 1.5: expected less than or equal to 1', ''),
    ('train:gray_noise_prob=-0.1', 'train.gray_noise_prob = -0.1: expected', ''),
    ('train:noisy:prob=2', 'train.noisy.prob = 2: expected', ''),
    ('train:step=[1000, 0]', 'train.step.1 = 0: expected', ''),
    ('train:step=often', 'train.step.0 = often: expected a valid integer', ''),
    ('train:num_neg=-1', 'train.num_neg = -1: expected', ''),
    ('train:history_from=teacher', "train.history_from = teacher: expected 'ema' or 'student'", ''),
    ('train:neg_clean=perhaps', 'train.neg_clean = perhaps: expected', ''),
    ('train:check_teacher=7', 'train.check_teacher = 7: expected', ''),
    ('train:ce_opt:form=eq9', 'train.ce_opt.form = eq9: expected released or paper', ''),
    ('train:cl_opt:reduce=local', 'train.cl_opt.reduce = local: expected global or rank', ''),
    ('train:cl_opt:guard=soft', 'train.cl_opt.guard = soft: expected', ''),
    ('train:cl_opt:margin=soft', 'train.cl_opt.margin = soft: expected', ''),
    ('train:pixel_opt:reduction=none', 'train.pixel_opt.reduction = ~: expected mean or sum', ''),
    ('train:pixel_opt:loss_weight=much', 'train.pixel_opt.loss_weight = much: expected a number', ''),
    ('network_vqgan:input_range=[0, 255]', 'network_vqgan.input_range = [0, 255]: expected [0, 1] or [-1, 1]', ''),
    ('network_g:num_in_ch=three', 'network_g.num_in_ch = three: expected a whole number', ''),
    ('network_g:rgb_mean=0.5', 'network_g.rgb_mean = 0.5: expected a list', ''),
    ("train:optim_g:lr='fast'", 'train.optim_g.lr = fast: expected a number', ''),
    ('train:scheduler:milestones=1000', 'train.scheduler.milestones = 1000: expected a list of numbers', ''),
    ('val:metrics=psnr', 'val.metrics = psnr: expected a block of keys', ''),
    ('val:tile_overlap=8', 'val.tile_overlap = 8: expected less than val.tile_size', ''),
    ('datasets:train:batch_size_per_gpu=0', 'datasets.train.batch_size_per_gpu = 0: expected', ''),
    ('datasets:train:prefetch_mode=fast', "datasets.train.prefetch_mode = fast: expected 'cpu' or 'cuda'", ''),
    ('datasets:train:io_backend:type=zip', 'datasets.train.io_backend.type = zip: expected', "'lmdb'"),
    ('datasets:train:gt_size=190', 'datasets.train.gt_size = 190: expected a multiple of scale = 4', ''),
    ('datasets:valid={name: a}', 'datasets.valid: expected train, val, val_* or test_*', 'did you mean'),
    ('datasets:val_1:name=Set14', 'datasets.val_2.name = Set14: datasets.val_1 has the same name', ''),
    # files
    ('path:pretrain_network_g=no.pth', 'path.pretrain_network_g = no.pth: no such file', ''),
    ('path:pretrain_network_t=HR', 'path.pretrain_network_t = HR: a folder, not a file', ''),
    ('path:resume_state=9.state', 'path.resume_state = 9.state: no such file', ''),
    ('path:pretrain_network_t=SwinIR.pth', 'path.pretrain_network_t = SwinIR.pth', 'github.com/JingyunLiang/SwinIR'),
    ('datasets:train:dataroot_gt=none/here', 'datasets.train.dataroot_gt = none/here: no such folder', ''),
    ('datasets:train:dataroot_gt=DIV2K/HR', 'datasets.train.dataroot_gt = DIV2K/HR', 'data.vision.ee.ethz.ch'),
    ('datasets:val_2:dataroot_lq=list.txt', 'datasets.val_2.dataroot_lq = list.txt: a file, not a folder', ''),
    ('datasets:train:meta_info_file=no.txt', 'datasets.train.meta_info_file = no.txt: no such file', ''),
    # what belongs together
    ('network_g:upscale=2', 'network_g.upscale = 2: differs from scale = 4', ''),
    ('network_t:upscale=2', 'network_t.upscale = 2: differs from scale = 4', ''),
    ('network_t:num_in_ch=1', 'network_t.num_in_ch = 1: network_g.num_in_ch = 3', ''),
    ('network_t:num_out_ch=1', 'network_t.num_out_ch = 1: network_g.num_out_ch = 3', ''),
    ('network_his=false', 'network_his = false: cl_opt', 'write true'),
    ('network_his=~', 'network_his = ~: cl_opt', 'write true'),
    ('train:cl_opt:weights=[1, 1]', 'train.cl_opt.weights = [1, 1]: expected 5 numbers', 'ch_mult'),
    ('network_vqgan:ddconfig:ch_mult=[1, 2]', 'train.cl_opt.weights = ', 'expected 2 numbers'),
    ('train:cl_opt:encoder={type: VQGAN}', 'train.cl_opt.encoder: not used', 'network_vqgan is the encoder'),
    ('train:logits_opt={type: ContrasLoss}', 'train.logits_opt.encoder: missing', 'pretrain'),
]


@pytest.mark.parametrize(('override', 'start', 'hint'), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistakes(override, start, hint, tmp_path):
    problems = problems_of(dckd(), override)
    assert len(problems) == 1, problems
    assert problems[0].startswith(start) and hint in problems[0], problems
    assert not list(tmp_path.glob('experiments/run*')) and not (tmp_path / 'tb_logger').exists()


def test_which_values_of_a_metric_are_better_is_never_guessed_wrong():
    opt = dckd()
    opt['val']['metrics'] = {
        'psnr': {'type': 'calculate_psnr', 'crop_border': 4, 'better': None},
        'niqe': {'type': 'calculate_niqe', 'crop_border': 4},
    }
    metrics = load(opt)[0]['val']['metrics']
    assert 'better' not in metrics['psnr'] and metrics['niqe']['better'] == 'lower'


def test_all_problems_at_once():
    overrides = ['scael=4', 'train:num_neg=-1', 'network_g:type=EDSRR', 'path:pretrain_network_t=no.pth']
    overrides += ['datasets:train:gt_size=x', 'val:metrics:psnr:type=psnr', 'train:step=[0, 0]']
    with pytest.raises(options.OptionError) as error:
        load(dckd(), *overrides)
    lines = str(error.value).split('\n')
    assert lines[0] == 'opt.yml: 8 problems' and len(lines) == 9
    assert sorted(line.split(' = ')[0].strip() for line in lines[1:]) == [
        'datasets.train.gt_size',
        'network_g.type',
        'path.pretrain_network_t',
        'scael',
        'train.num_neg',
        'train.step.0',
        'train.step.1',
        'val.metrics.psnr.type',
    ]


@pytest.mark.parametrize(
    ('removed', 'starts'),
    [
        (['network_t'], ['train.logits_opt: needs network_t', 'train.lcr_opt: needs network_t']),
        (['network_vqgan'], ['train.cl_opt: needs network_vqgan', 'train.ce_opt: needs network_vqgan']),
        (['train'], ['train.total_iter: missing', 'train.optim_g: missing', 'train: no loss']),
    ],
)
def test_removed_blocks(removed, starts):
    opt = dckd()
    for key in removed:
        del opt[key]
    problems = problems_of(opt)
    assert len(problems) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in problems), problems


def test_random_networks_are_allowed_where_said():
    opt = dckd()
    for name in ('t', 'vqgan'):
        del opt['path'][f'pretrain_network_{name}']
        opt[f'network_{name}']['allow_random'] = True
    assert load(opt)[0]['network_t']['allow_random'] is True


def test_no_negatives():
    assert problems_of(dckd(), 'train:num_neg=0', 'train:neg_clean=false')[0].startswith('train.num_neg = 0: cl_opt')


@pytest.mark.parametrize('keep', ['pixel_opt', 'logits_opt', 'lcr_opt', 'cl_opt', 'ce_opt'])
def test_any_single_loss(keep):
    opt = dckd()
    for key in ('pixel_opt', 'logits_opt', 'lcr_opt', 'cl_opt', 'ce_opt'):
        if key != keep:
            del opt['train'][key]
    load(opt)


def test_an_encoder_that_nothing_needs_needs_no_file():
    opt = dckd()
    del opt['train']['cl_opt'], opt['train']['ce_opt']
    opt['path']['pretrain_network_vqgan'] = 'no.ckpt'
    assert any(line.startswith('path.pretrain_network_vqgan = no.ckpt: not used') for line in load(opt)[1])


def test_history_is_assumed_with_cl_opt():
    opt = dckd()
    del opt['network_his']
    opt, warnings = load(opt)
    assert opt['network_his'] is True and any(line.startswith('network_his: true is assumed') for line in warnings)


def test_without_a_teacher_the_contrastive_loss_gets_a_share():
    """And only then: not where the file says something about shares, nor for the released name."""
    alone = (
        'network_t=null',
        'train:logits_opt=null',
        'train:lcr_opt=null',
        'train:cl_opt:type=DynamicContrastiveLoss',
    )
    opt, warnings = load(dckd(), *alone)
    assert opt['train']['gradient_shares'] == {'cl_opt': 0.1}
    assert any(line.startswith('train.gradient_shares: {cl_opt: 0.1} is assumed') for line in warnings)
    for more in (alone[3:], (*alone, 'train:gradient_shares=null'), (*alone[:3], 'train:cl_opt:type=ContrasLoss')):
        assert not load(dckd(), *more)[0]['train'].get('gradient_shares'), more
    opt = load(dckd(), *alone, 'train:gradient_shares={ce_opt: 0.1}')[0]
    assert opt['train']['gradient_shares'] == {'ce_opt': 0.1}


class TestLossesByName:
    """Our losses as pixel_opt, with an encoder of their own."""

    def block(self, **changes):
        return {'type': 'ContrasLoss', 'weights': [1] * 5, 'encoder': {**VQGAN, 'pretrain': 'vqgan.ckpt', **changes}}

    def test_good(self):
        for model in ('SRModel', 'DCKDModel'):
            opt = dckd()
            opt['model_type'] = model
            opt['train']['pixel_opt'] = self.block(param_key='state_dict')
            load(opt)

    @pytest.mark.parametrize(
        ('changes', 'start'),
        [
            ({'pretrain': None}, 'train.pixel_opt.encoder.pretrain: missing; an encoder needs trained weights'),
            ({'pretrain': 'no.ckpt'}, 'train.pixel_opt.encoder.pretrain = no.ckpt: no such file'),
            ({'type': 'VQGANN'}, 'train.pixel_opt.encoder.type = VQGANN: no such arch'),
            ({'pretrian': 'x'}, 'train.pixel_opt.encoder.pretrian = x: unknown argument of VQGAN'),
            ({'ddconfig': {**DDCONFIG, 'chh': 1}}, 'train.pixel_opt.encoder.ddconfig.chh = 1: unknown'),
        ],
    )
    def test_bad(self, changes, start):
        opt = dckd()
        opt['train']['pixel_opt'] = self.block(**changes)
        problems = problems_of(opt)
        assert len(problems) == 1 and problems[0].startswith(start), problems

    def test_random_encoder_where_said(self):
        opt = dckd()
        opt['train']['pixel_opt'] = self.block(pretrain=None, allow_random=True)
        load(opt)


class TestOtherModels:
    def test_unknown_keys_are_warnings(self):
        warnings = load(esrgan(), 'train:fix_flow=5000', 'datasets:train:cahce=ram')[1]
        assert [line.split(' = ')[0] for line in warnings] == ['train.fix_flow', 'datasets.train.cahce']

    @pytest.mark.parametrize(
        ('override', 'start'),
        [
            ('network_g:type=RRDB', 'network_g.type = RRDB: no such arch'),
            ('datasets:train:dataroot_gt=none/here', 'datasets.train.dataroot_gt = none/here: no such folder'),
            ('network_g:upscale=3', 'network_g.upscale = 3: differs from scale = 4'),
            ('network_d=~', 'network_d: missing; ESRGANModel needs it'),
            ('train:gan_opt=~', 'train.gan_opt: missing; ESRGANModel needs it'),
            ('train:optim_d=~', 'train.optim_d: missing; ESRGANModel needs it'),
            ('train:gan_opt:gan_type=mine', 'train.gan_opt.gan_type = mine: expected vanilla or lsgan'),
            ('train:optim_d:type=Adan', 'train.optim_d.type = Adan: no such optimiser'),
        ],
    )
    def test_mistakes(self, override, start):
        problems = problems_of(esrgan(), override)
        assert len(problems) == 1 and problems[0].startswith(start), problems

    def test_a_scale_that_is_missing(self):
        opt = dckd()
        del opt['scale']
        assert problems_of(opt) == ['scale: missing; network_g.upscale = 4']  # once, for both networks
        assert problems_of(dckd(), 'scale=null') == ['scale: missing; network_g.upscale = 4']
        opt['network_g'] = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3}
        assert problems_of(opt) == ['scale: missing; network_g.scale = 4, its default']
        opt['network_g'] = {'type': 'zoo', 'name': 'SwinIR-M_DF2K_s64w8_x4'}
        assert 'scale: missing; network_g.name = SwinIR-M_DF2K_s64w8_x4 is of scale 4' in problems_of(opt)
        opt = esrgan()
        del opt['scale']
        opt['network_g'] = {'type': 'NAFNet'}
        assert load(opt)[0]['scale'] == 1
        opt['datasets']['val_2'] = {'type': 'SRImageDataset', 'dataroot_gt': 'HR'}
        assert problems_of(opt) == ['scale: missing; datasets.val_2 makes LQ from GT, scale times smaller']

    def test_a_path_with_an_escape_in_it(self):
        (problem,) = problems_of(dckd(), 'path:pretrain_network_g="models\\new.pth"')
        assert (
            problem.startswith('path.pretrain_network_g = models\\new.pth: no such file in ')
            and 'single quotes' in problem
        )

    def test_a_default_scale_that_differs(self):
        opt = esrgan()
        opt['network_g'] = {'type': 'SwinIR', 'window_size': 8, 'upsampler': 'pixelshuffle'}
        assert problems_of(opt) == ['network_g.upscale = 2: differs from scale = 4 (the default of SwinIR)']

    def test_swinir_windows(self):
        opt = dckd()
        swinir = {'type': 'SwinIR', 'upscale': 4, 'img_size': 48, 'window_size': 8, 'upsampler': 'pixelshuffle'}
        opt['network_g'] = swinir
        assert problems_of(opt, 'datasets:train:gt_size=180')[0].startswith('datasets.train.gt_size = 180: expected')
        assert problems_of(opt, 'network_g:winow_size=8')[0].startswith('network_g.winow_size = 8: unknown argument')

    def test_swinir_that_keeps_the_size(self):
        opt = esrgan()
        opt['scale'] = 1
        opt['network_g'] = {'type': 'SwinIR', 'img_size': [48, 48], 'window_size': 8}
        load(opt)


# The networks' own models, and their losses, are BasicSR's; the keys are those of its forks.
KNOWN = ('SRModel', 'SwinIRModel', 'SRGANModel', 'ESRGANModel', 'RealESRGANModel', 'RealESRNetModel')
KNOWN += ('VideoBaseModel', 'EDVRModel', 'VideoRecurrentModel', 'HiFaceGANModel')
FORKS = [  # keys of BasicSR's earlier files, and of NAFNet, NAFSSR, Restormer, HAT, SwinIR, Real-ESRGAN, SAFMN
    *('train:manual_seed=0', 'train:mixup=false', 'train:fix_iter=5000', 'train:flow_lr_mul=0.125', 'train:niter=9'),
    *('train:fft_opt=~', 'train:fft_opt={type: FFTLoss, loss_weight: 0}', 'train:clip_grad_norm=true'),
    *('train:optim_e={type: Adam, lr: 1}', 'train:gt_usm=true', 'train:pixel_opt2=~'),
    *('datasets:train:use_vflip=true', 'datasets:train:flip_RGB=true', 'datasets:train:gt_size_h=120'),
    *('datasets:train:use_shuffle=true', 'datasets:train:use_flip=true', 'datasets:train:meta_info=list.txt'),
    *('datasets:train:geometric_augs=true', 'datasets:train:task=SR', 'datasets:train:batch_size=4'),
    *('val:trans_num=1', 'val:use_image=false', 'val:grids=false', 'val:max_minibatch=8', 'val:use_pbar=true'),
    *('logger:use_wandb=false', 'gpu_ids=[0]', 'dist=true', 'set_CUDA_VISIBLE_DEVICES=true', 'queue_size=180'),
    *('network_d={type: VGGStyleDiscriminator, num_in_ch: 3, num_feat: 64}', 'path:strict_load_d=true'),
    *('network_e={type: EDSR}', 'path:strict_load_e=true', 'path:param_key_d=params', 'path:root=./'),
    *('tile={tile_size: 256, tile_pad: 32}', 'self_ensemble_scale=1', 'high_order_degradation=true', 'gt_usm=true'),
]


class TestKnownModels:
    """Models of BasicSR: what looks like a mistake is one, and keys of forks are no more than warned of."""

    def opt(self, model='SRModel'):
        opt = esrgan()
        opt['model_type'] = model
        if 'GAN' not in model:
            for block in (opt, opt['train']):
                for key in ('network_d', 'optim_d', 'gan_opt'):
                    block.pop(key, None)
        return opt

    @pytest.mark.parametrize('model', KNOWN)
    @pytest.mark.parametrize(
        ('override', 'start'),
        [
            ('train:ema_deacy=0.9', "train.ema_deacy = 0.9: unknown key (did you mean 'ema_decay'?)"),
            ('train:pixle_opt={type: L1Loss}', 'train.pixle_opt = {"type": "L1Loss"}: unknown key (did you mean'),
            ('train:warmup_iters=10', "train.warmup_iters = 10: unknown key (did you mean 'warmup_iter'?)"),
            ('train:fft_opt={type: L1Loss}', 'train.fft_opt = {"type": "L1Loss"}: MODEL does not compute this loss'),
            ('train:fft_opt={type: FFTLoss}', 'train.fft_opt = {"type": "FFTLoss"}: MODEL does not compute this loss'),
            ('train:cl_opt={type: MSELoss}', 'train.cl_opt = '),
            ('datasets:train:gt_sise=64', "datasets.train.gt_sise = 64: unknown key (did you mean 'gt_size'?)"),
            ('datasets:val_1:filename_tmp={}', "datasets.val_1.filename_tmp = {}: unknown key (did you mean 'filename"),
            ('datasets:train:io_backend:tpye=disk', 'datasets.train.io_backend.tpye = disk: unknown key'),
            ('val:val_frq=10', "val.val_frq = 10: unknown key (did you mean 'val_freq'?)"),
            ('val:metrics:psnr:test_y_chanel=true', 'val.metrics.psnr.test_y_chanel = true: unknown argument of'),
            ('logger:print_frq=1', 'logger.print_frq = 1: unknown key'),
            ('path:pretrain_netwrok_g=teacher.pth', 'path.pretrain_netwrok_g = teacher.pth: unknown key'),
            ('scael=4', "scael = 4: unknown key (did you mean 'scale'?)"),
            ('manual_sed=4', "manual_sed = 4: unknown key (did you mean 'manual_seed'?)"),
            ('network_g:img_rnge=255', 'network_g.img_rnge = 255: unknown argument of EDSR'),
            ('network_g:depth=255', 'network_g.depth = 255: unknown argument of EDSR'),  # which takes no others
            ('train:optim_g:momentun=1', 'train.optim_g.momentun = 1: unknown argument of Adam'),
        ],
    )
    def test_mistakes(self, model, override, start):
        if model in ('SRModel', 'SwinIRModel') and 'cl_opt' in override:
            pytest.skip('runs as DCKDModel')
        problems = problems_of(self.opt(model), override)
        assert len(problems) == 1 and problems[0].startswith(start.replace('MODEL', model)), problems

    @pytest.mark.parametrize('override', FORKS)
    def test_keys_of_forks(self, override):
        opt, notes = load(self.opt(), override)
        where = override.partition('=')[0].replace(':', '.')
        assert len([note for note in notes if note.startswith(where)]) == len(notes) == 1, notes
        assert opt['model_type'] == 'SRModel'

    @pytest.mark.parametrize(
        ('model', 'able'), [('SRGANModel', False), ('ESRGANModel', False), ('RealESRGANModel', True)]
    )
    def test_a_loss_that_is_built_and_not_computed(self, model, able):
        ldl = 'train:ldl_opt={type: L1Loss, loss_weight: 1.0}'
        if able:
            assert load(self.opt(model), ldl)
        else:
            assert problems_of(self.opt(model), ldl)[0].endswith(
                f'{model} does not compute this loss; remove the block, or take one that does, such as RealESRGANModel'
            )

    def test_a_gan_loss_without_its_model(self):
        (problem,) = problems_of(self.opt('RealESRNetModel'), 'train:gan_opt={type: GANLoss, gan_type: vanilla}')
        assert problem.endswith('or take one that does, such as ESRGANModel')

    def test_what_is_taken_away_need_not_be_there(self):
        assert load(self.opt(), 'train:cl_opt=null', 'network_his=null')[1] == []
        assert load(vqgan(), 'train:cl_opt=null', 'network_t=null')[1] == []
        assert problems_of(vqgan(), 'train:cl_optt=null')[0].startswith('train.cl_optt = ~: unknown key')

    def test_keys_that_a_model_reads_are_known(self):
        keys = (
            'gt_usm=true',
            'resize_prob2=[0.3, 0.4, 0.3]',
            'gaussian_noise_prob=0.5',
            'queue_size=180',
            'gt_size=64',
        )
        assert load(self.opt('RealESRNetModel'), *keys)[1] == []
        assert load(self.opt('VideoRecurrentModel'), 'train:fix_flow=5000', 'train:flow_lr_mul=0.1')[1] == []

    def test_a_name_of_another_toolbox_counts_where_its_own_is_missing(self):
        opt = self.opt()
        del opt['datasets']['train']['batch_size_per_gpu']
        (problem,) = problems_of(opt, 'datasets:train:batch_size=4')
        assert problem == 'datasets.train.batch_size = 4: unknown key; here it is batch_size_per_gpu'

    def test_what_a_run_sets_itself(self):
        assert load(self.opt(), 'dist=true')[1] == ['dist = true: unknown key; set by --launcher, remove it']
        assert problems_of(dckd(), 'dist=true') == ['dist = true: unknown key; set by --launcher, remove it']

    def test_sets_of_basicsr_without_a_section_here(self):
        reds = 'datasets:train={type: REDSDataset, dataroot_gt: HR, num_frame: 5, interval_lst: [1], use_shuffle: true}'
        (problem,) = problems_of(self.opt(), reds)
        assert problem == "datasets.train.interval_lst = [1]: unknown key (did you mean 'interval_list'?)"

    def test_models_of_others_are_warned(self, monkeypatch):
        models = option_checks.known_types(options.MODEL_REGISTRY)
        theirs = type('TheirModel', (models['SRModel'],), {'__module__': 'their_models'})
        monkeypatch.setitem(options.MODEL_REGISTRY._obj_map, 'TheirModel', theirs)
        slips = ('train:ema_deacy=0.9', 'train:fft_opt={type: L1Loss}', 'network_g:num_feats=8', 'scael=4')
        _, notes = load(self.opt('TheirModel'), *slips)
        assert sorted(note.split(' = ')[0] for note in notes) == [
            'network_g.num_feats',
            'scael',
            'train.ema_deacy',
            'train.fft_opt',
        ]


class TestPerceptualLoss:
    block = {'type': 'PerceptualLoss', 'layer_weights': {'conv5_4': 1}, 'vgg_type': 'vgg19', 'criterion': 'l1'}

    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch, tmp_path):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))

    def opt(self, **changes):
        opt = esrgan()
        opt['train']['perceptual_opt'] = {**self.block, **changes}
        return opt

    def test_weights_are_missing(self):
        problem = problems_of(self.opt())[0]
        assert problem.startswith(
            'train.perceptual_opt: no weights of vgg19 at experiments/pretrained_models/vgg19-dcbb9e9d'
        )
        assert 'https://download.pytorch.org/models/vgg19-dcbb9e9d.pth' in problem and 'hub' in problem

    def test_weights_in_either_place(self, tmp_path):
        for place in ('experiments/pretrained_models', 'torch/hub/checkpoints'):
            file = tmp_path / place / 'vgg19-dcbb9e9d.pth'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            load(self.opt())
            file.unlink()

    @pytest.mark.parametrize(
        ('changes', 'start'),
        [
            ({'layer_weights': {'conv5_5': 1}}, 'train.perceptual_opt.layer_weights.conv5_5: no such layer of vgg19'),
            ({'layer_weights': 1}, 'train.perceptual_opt.layer_weights = 1: expected'),
            ({'vgg_type': 'vgg18'}, 'train.perceptual_opt.vgg_type = vgg18: expected one of vgg11'),
            ({'criterion': 'l2'}, 'train.perceptual_opt.criterion = l2: expected l1 or fro'),
        ],
    )
    def test_mistakes(self, changes, start):
        Path('experiments/pretrained_models/vgg19-dcbb9e9d.pth').touch()
        problems = problems_of(self.opt(**changes))
        assert len(problems) == 1 and problems[0].startswith(start), problems


class TestSchedules:
    cosine = '{type: CosineAnnealingRestartLR, periods: [5, 5], restart_weights: [1, 1], eta_min: 1e-7}'

    def test_good(self):
        opt = load(dckd(), f'train:scheduler={self.cosine}', 'train:total_iter=10')[0]
        assert opt['train']['scheduler']['eta_min'] == 1e-7
        assert load(dckd(), 'train:scheduler=~')[0]['train']['scheduler'] == {'type': 'MultiStepLR', 'milestones': []}

    @pytest.mark.parametrize(
        ('override', 'start'),
        [
            ('train:total_iter=11', 'train.scheduler.periods = [5, 5]: they end before total_iter = 11'),
            ('train:scheduler:restart_weights=[1]', 'train.scheduler.restart_weights = [1]: expected as many'),
            ('train:scheduler:periods=10', 'train.scheduler.periods = 10: expected a list of numbers'),
        ],
    )
    def test_mistakes(self, override, start):
        problems = problems_of(dckd(), f'train:scheduler={self.cosine}', 'train:total_iter=10', override)
        assert len(problems) == 1 and problems[0].startswith(start), problems


class TestDatasets:
    def test_lmdb(self):
        folders = ['datasets:train:dataroot_gt=HR.lmdb', 'datasets:train:dataroot_lq=LR.lmdb']
        load(dckd(), 'datasets:train:io_backend:type=lmdb', *folders)
        problems = problems_of(dckd(), 'datasets:train:io_backend:type=lmdb', folders[0])
        assert problems == [
            'datasets.train.dataroot_lq = LR: expected a folder *.lmdb, because io_backend.type is lmdb'
        ]

    def test_lists_that_the_wheel_lacks(self):
        path = 'basicsr/data/meta_info/meta_info_DIV2K800sub_GT.txt'
        opt, warnings = load(dckd(), f'datasets:train:meta_info_file={path}')
        assert 'meta_info_file' not in opt['datasets']['train']
        assert warnings[0].startswith(f'datasets.train.meta_info_file = {path}: not in')
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
        opt, warnings = load(dckd(), f'datasets:train:meta_info_file={path}')
        assert opt['datasets']['train']['meta_info_file'] == path and not warnings

    def test_ours_makes_its_lq(self):
        train = 'datasets:train={type: SRImageDataset, dataroot_gt: HR, gt_size: 192, cache: ram}'
        data = load(dckd(), train)[0]['datasets']['train']
        assert data['lq_convention'] == 'uint8' and data['batch_size_per_gpu'] == 16 and data['name'] == 'train'
        assert problems_of(dckd(), train, 'datasets:train:cache=disk')[0].startswith('datasets.train.cache = disk')

    def test_teacher_cache(self):
        """Only what the cache can stand for: images as they are, turned and cropped, of a run that has a teacher."""
        cache = ['datasets:train={type: SRImageDataset, dataroot_gt: HR, gt_size: 192, teacher_cache: t.lmdb}']
        cache.append('train:lcr_opt=~')
        where = 'datasets.train.teacher_cache'
        assert load(dckd(), *cache)[0]['datasets']['train']['teacher_cache'] == 't.lmdb'
        load(dckd(), *cache, 'train:mixing_augs={mixup: false}')
        for changed, start in [
            ('train:lcr_opt={type: L1Loss}', f'train.lcr_opt: needs the teacher on augmented input, which {where}'),
            ('train:mixing_augs={mixup: true}', 'train.mixing_augs.mixup = true: needs the teacher on mixed'),
            ('datasets:train:teacher_cache=t', f'{where} = t: expected a folder *.lmdb'),
            ('datasets:train:type=FFHQDataset', f'{where} = t.lmdb: FFHQDataset does not read it; SRImageDataset and '),
            ('datasets:val_1:teacher_cache=t.lmdb', 'datasets.val_1.teacher_cache = t.lmdb: unknown key'),
            ('model_type=VQGANModel', f'{where} = t.lmdb: needs network_t, the teacher'),
        ]:
            problems = problems_of(dckd(), *cache, changed)
            assert [problem for problem in problems if problem.startswith(start)], problems
        noise = 'datasets:train={type: Dataset_GaussianDenoising, dataroot_gt: HR, gt_size: 192, sigma_range: [0, 5]}'
        problems = problems_of(dckd(), noise, 'datasets:train:teacher_cache=t.lmdb')
        assert f'{where} = t.lmdb: Dataset_GaussianDenoising does not read it; ' in '\n'.join(problems)

    def test_real_esrgan_needs_its_kernels(self):
        problems = problems_of(esrgan(), 'datasets:train={type: RealESRGANDataset, dataroot_gt: HR}')
        assert len(problems) == 15 and 'datasets.train.blur_sigma2: missing; RealESRGANDataset needs it' in problems

    def test_other_classes_keep_their_keys(self):
        opt = load(esrgan(), 'datasets:train={type: REDSDataset, dataroot_gt: HR, num_frame: 5, random_reverse: false}')
        assert opt[0]['datasets']['train']['num_frame'] == 5 and not opt[1]

    def test_missing_sets_of_a_test(self):
        opt = dckd()
        opt['datasets'] = {
            'test_1': opt['datasets']['val_1'],
            'test_2': {**opt['datasets']['val_2'], 'dataroot_gt': 'none/here'},
        }
        opt, warnings = load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)
        assert 'missing' not in opt['datasets']['test_1']
        assert (
            opt['datasets']['test_2']['missing']
            == f'datasets.test_2.dataroot_gt = none/here: no such folder in {Path.cwd()}'
        )
        assert warnings == [f'{opt["datasets"]["test_2"]["missing"]}; skipped']

    def test_bicubic_lr_that_is_not_there_is_made_from_hr_in_every_file_that_ships(self):
        sets = ('Set5', 'Set14', 'B100', 'Urban100', 'Manga109')
        for name in sets:
            Path('datasets', name, 'HR').mkdir(parents=True)
        files = sorted((Path(__file__).resolve().parents[1] / 'options').glob('test_*_x?.yml'))
        assert len(files) >= 9
        for file in files:
            opt = option_files.read(str(file)).options
            loaded, warnings = load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)
            blocks = loaded['datasets'].values()
            assert {block['name'] for block in blocks} == set(sets)
            assert not any('missing' in block or 'dataroot_lq' in block for block in blocks), file
            made = [line for line in warnings if "LR is made from HR, as MATLAB's imresize" in line]
            assert len(made) == len(blocks), file
            assert made[0].startswith('datasets.test_1.dataroot_lq = datasets/Set5/LR_bicubic/X')

    def test_other_lq_that_is_not_there_is_no_reason_to_make_another(self):
        Path('B100/HR').mkdir(parents=True)
        block = {'name': 'B100', 'type': 'SRImageDataset', 'dataroot_gt': 'B100/HR'}
        for change in (
            {'dataroot_lq': 'B100/LR_unknown/X2'},
            {'dataroot_lq': 'B100/LR_bicubic', 'type': 'PairedImageDataset'},
            {'dataroot_lq': 'B100/LR_bicubic', 'dataroot_gt': 'none'},
        ):
            opt = {**dckd(), 'datasets': {'test_1': {**block, **change}}}
            loaded, _ = load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)
            assert 'missing' in loaded['datasets']['test_1']

    def test_subfolders_that_are_not_searched(self):
        Path('HR2/more').mkdir(parents=True)
        Path('HR2/more/a.png').touch()
        told = 'datasets.train.dataroot_gt = HR2: sub-folders are not searched: more'
        assert told in load(dckd(), 'datasets:train:dataroot_gt=HR2')[1]
        Path('list.txt').write_text('more/a.png\n')
        listed = load(dckd(), 'datasets:train:dataroot_gt=HR2', 'datasets:train:meta_info_file=list.txt')
        assert told not in listed[1]

    def test_sets_of_the_other_kind(self):
        opt = dckd()
        opt['datasets']['test_1'] = opt['datasets'].pop('val_1')
        loaded, warnings = load(opt)
        assert list(loaded['datasets']) == ['train', 'val_2']
        assert warnings == ['datasets.test_1: not used in training']
        loaded, warnings = load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)
        assert list(loaded['datasets']) == ['val_2', 'test_1'] and warnings == ['datasets.train: not used in a test']


class TestCodebooks:
    def test_good(self):
        train = load(vqgan())[0]['train']
        assert train['codebook_decay'] == 0.99 and train['restart_after'] == 256

    @pytest.mark.parametrize(
        ('override', 'start'),
        [
            ('network_g:decoder=false', 'network_g: expected a VQGAN with decoder: true'),
            ('train:commit_opt=~', 'train.commit_opt: missing; VQGANModel needs it'),
            ('train:cl_opt={type: ContrasLoss}', 'train.cl_opt = '),
            ('train:codebook_decay=2', 'train.codebook_decay = 2: expected'),
            ('datasets:train:gt_size=200', 'datasets.train.gt_size = 200: expected a multiple of 16'),
        ],
    )
    def test_mistakes(self, override, start):
        problems = problems_of(vqgan(), override)
        assert len(problems) == 1 and problems[0].startswith(start), problems


def test_registered_types_have_no_suffix():
    types = option_checks.known_types(options.MODEL_REGISTRY)
    assert 'RealESRNetModel' in types and all(not name.endswith('_basicsr') for name in types)


def test_tables_name_real_things():
    models = option_checks.known_types(options.MODEL_REGISTRY)
    datasets = option_checks.known_types(option_checks.DATASET_REGISTRY)
    assert set(option_keys.MODELS) <= set(models)
    assert set(option_keys.DATASETS) <= set(datasets) and set(option_keys.DATASET_NEEDS) == set(option_keys.DATASETS)
    ours = {name for name, cls in models.items() if cls.__module__.startswith('dckd_sr')}
    assert ours <= set(option_keys.MODELS)
    for kind, needs in option_keys.DATASET_NEEDS.items():
        assert {key for group in needs for key in group} <= set(option_keys.DATASETS[kind].model_fields)
    for where in option_keys.FEATURE_LOSSES:
        assert where.split('.')[1] in option_keys.DCKDTrain.model_fields


def test_ddconfig_of_the_public_codebook():
    vqgan_arch._parse_ddconfig(DDCONFIG)


def test_progressive_stages_are_checked_like_the_crop():
    stages = 'datasets:train:mini_batch_sizes=[4, 2]', 'datasets:train:iters=[5, 5]'
    load(dckd(), *stages, 'datasets:train:gt_sizes=[64, 128]')
    (problem,) = problems_of(dckd(), *stages, 'datasets:train:gt_sizes=[64, 130]')
    assert problem == 'datasets.train.gt_sizes.1 = 130: expected a multiple of scale = 4'
    (problem,) = problems_of(dckd(), *stages, 'datasets:train:gt_sizes=[64]')
    assert 'iters has 2' in problem and 'gt_sizes has 1' in problem


def test_shares_are_of_something():
    assert problems_of(dckd(), 'train:gradient_shares={cl_op: 0.3}') == [
        "train.gradient_shares.cl_op = 0.3: unknown key (did you mean 'cl_opt'?)"
    ]
    alone = (
        'train:pixel_opt=~',
        'train:logits_opt=~',
        'train:lcr_opt=~',
        'train:gradient_shares={cl_opt: 0.3, ce_opt: 0.1}',
    )
    assert problems_of(dckd(), *alone) == [
        "train.gradient_shares: of what? There is no other loss of the student's output, as pixel_opt is"
    ]
    _, notes = load(dckd(), 'train:gradient_shares={cl_opt: 0.3, csd_opt: 0.1}')
    assert [note for note in notes if 'shares' in note] == [
        'train.gradient_shares.csd_opt = 0.1: without effect: there is no train.csd_opt'
    ]


def test_speed_keys_belong_to_models_that_read_them():
    found = problems_of(esrgan(), 'use_amp=true')
    assert found == ['use_amp = true: ESRGANModel does not read it; KDModel and DCKDModel do']
    found = problems_of(esrgan(), 'logger:gradients=true')
    assert found == ['logger.gradients = true: ESRGANModel does not read it; KDModel and DCKDModel do']
    opt, notes = load(dckd(), 'use_compile=true', 'use_checkpoint=true', 'amp_bf16=true')
    assert opt['use_compile'] and opt['model_type'] == 'DCKDModel'
    assert any(note.endswith('amp_bf16 = true: without effect: use_amp is false') for note in notes)


def test_a_plain_file_with_a_speed_key_runs_as_kdmodel():
    opt = dckd()
    for key in ('network_t', 'network_his', 'network_vqgan'):
        del opt[key]
    opt['train'] = {key: value for key, value in opt['train'].items() if key in ('optim_g', 'total_iter', 'pixel_opt')}
    opt['path'], opt['model_type'] = {}, 'SRModel'
    assert load(opt)[0]['model_type'] == 'SRModel'
    assert load(opt, 'use_amp=true')[0]['model_type'] == 'KDModel'


def test_tiles_in_batches_need_tiles():
    key = 'val.tile_batch_size'
    assert load(dckd(), 'val:tile_batch_size=4')[1] == [f'{key} = 4: without effect: val.tile_size is empty']
    assert load(dckd(), 'val:tile_batch_size=4', 'val:tile_size=64')[1] == []

"""The keys of option files: sections with types, defaults and meanings, and tables of names.

A new key is one line in a section; a new model type is one line in `MODELS`. `option_checks` does the checking.
"""

import functools
import keyword
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError('expected a number')
    return value


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _without_empty(value):
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _gpus(value):
    if value != 'auto' and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError("expected 'auto' or a number of GPUs, 0 for the CPU")
    return value


def _no_folder(value):
    if value not in (None, 'none'):
        raise ValueError('expected none: this dataset has no such folder')
    return None


def _folder_name(value):
    if not value.strip() or value.strip('. ') != value or re.search(r'[\\/:*?"<>|\x00-\x1f]', value):
        raise ValueError('expected a plain folder name: the run is written to experiments/NAME')
    return value


def is_name_part(value):
    """Whether a text can be a part of the name of a file or folder, and leads nowhere else."""
    return value not in ('.', '..') and not re.search(r'[\\/\x00-\x1f]', value)


def _name_part(value):
    if not is_name_part(value):
        raise ValueError('expected a plain name, without / or \\: images are written under it')
    return value


def _template(value):
    try:
        varies = value.format('a') != value.format('b')
    except (ValueError, LookupError, AttributeError):
        varies = False
    if not varies:
        raise ValueError("expected {} where the name of the GT image goes, such as '{}x4'")
    return value


def _or_list(item):
    """For editors: what `_listed` admits."""
    return WithJsonSchema({'anyOf': [item, {'type': 'array', 'items': item, 'minItems': 1}]})


def is_module_name(value):
    """Whether a value is a plain dotted name, as in an import statement."""
    return isinstance(value, str) and all(n.isidentifier() and not keyword.iskeyword(n) for n in value.split('.'))


def is_entry(value):
    """Whether a value can be an entry of `imports`: a module, or the path of a file or folder."""
    return isinstance(value, str) and bool(value.strip()) and '\0' not in value


def _entry(value):
    if not is_entry(value):
        raise ValueError('expected a module such as my_package.archs, a file or a folder')
    return value


def expand(path):
    """A path with ~ expanded; anything else as it is."""
    return os.path.expanduser(path) if isinstance(path, str) else path


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
# With upper bounds: a slip of some zeros must not fill the memory, or start processes until the machine stops.
Workers = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=1024)]
BatchSize = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=65536)]
Negatives = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=1024)]
Queue = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1024)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=2**31)]  # numpy takes 32 bits, ranks add to it
Probability = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)]
PositiveNumber = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
Positives = Annotated[
    list[Positive], BeforeValidator(_listed), Field(min_length=1), _or_list({'type': 'integer', 'minimum': 1})
]
Gpus = Annotated[
    Any, AfterValidator(_gpus), WithJsonSchema({'anyOf': [{'const': 'auto'}, {'type': 'integer', 'minimum': 0}]})
]
FolderName = Annotated[str, AfterValidator(_folder_name)]
NamePart = Annotated[str, AfterValidator(_name_part)]
Template = Annotated[str, AfterValidator(_template)]
PathName = Annotated[str, AfterValidator(expand)]
# Restormer's files write `none`.
NoFolder = Annotated[None, BeforeValidator(_no_folder), WithJsonSchema({'enum': ['none', None]})]
ModuleNames = Annotated[
    list[Annotated[str, AfterValidator(_entry)]], BeforeValidator(_listed), _or_list({'type': 'string'})
]
Roles = Annotated[
    Optional[list[Literal['student', 'teacher', 'history', 'encoder']]],
    BeforeValidator(lambda value: value if value is None else _listed(value)),
]
Block = dict[str, Any]


class Section(BaseModel):
    """Keys with their types; an empty value (~) means the default."""

    model_config = ConfigDict(extra='forbid', protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode='before')
    @classmethod
    def _empty_is_default(cls, data):
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in cls.model_fields or cls.model_fields[key].default is None
        }


class Train(Section):
    """SRModel's keys."""

    total_iter: Optional[Positive] = Field(None, description='number of iterations')
    warmup_iter: Whole = Field(-1, description='iterations of linear warm-up, -1 for none')
    optim_g: Optional[Block] = Field(None, description='optimiser: a class of torch.optim and its arguments')
    scheduler: Block = Field({'type': 'MultiStepLR', 'milestones': []}, description='learning rate schedule')
    ema_decay: float = Field(0, ge=0, lt=1, description="decay of the student's moving average, 0 for none")
    accum_iter: Positive = Field(1, description='batches whose gradients make one iteration')
    grad_clip: Optional[PositiveNumber] = Field(None, description='largest norm of the gradient')
    use_grad_clip: Optional[bool] = Field(None, description="NAFNet's and Restormer's name for grad_clip: 0.01")
    on_nonfinite: Literal['stop', 'skip'] = Field('stop', description='what a loss that is not finite leads to')
    pixel_opt: Optional[Block] = Field(None, description='loss against the ground truth')
    perceptual_opt: Optional[Block] = Field(None, description='perceptual loss against the ground truth')


class GANTrain(Train):
    """SRGANModel's and ESRGANModel's keys."""

    gan_opt: Optional[Block] = Field(None, description='adversarial loss')
    ldl_opt: Optional[Block] = Field(None, description='LDL loss')
    optim_d: Optional[Block] = Field(None, description="the discriminator's optimiser")
    net_d_iters: Positive = Field(1, description='train the generator every so many iterations')
    net_d_init_iters: Count = Field(0, description='iterations of the discriminator alone')


class MixingAugs(Section):
    """Restormer's keys."""

    mixup: bool = Field(False, description='train on weighted means of two samples')
    mixup_beta: PositiveNumber = Field(1.2, description='weights are drawn from Beta(mixup_beta, mixup_beta)')
    use_identity: bool = Field(False, description='every other batch stays as it is')


class KDTrain(Train):
    """KDModel's keys."""

    logits_opt: Optional[Block] = Field(None, description="loss against the teacher's output")
    check_teacher: bool = Field(True, description='stop before step 1 where the teacher is worse than bicubic')
    mixing_augs: Optional[MixingAugs] = Field(None, description='mixup of training batches')


class Noisy(Section):
    prob: Probability = Field(0.5, description='probability of each augmentation (invert, flips, transpose)')


class GradientShares(Section):
    cl_opt: Optional[PositiveNumber] = None
    ce_opt: Optional[PositiveNumber] = None
    csd_opt: Optional[PositiveNumber] = None
    mclir_opt: Optional[PositiveNumber] = None


class DCKDTrain(KDTrain):
    """DCKDModel's keys: the released code's, and ours for what the paper says differently."""

    lcr_opt: Optional[Block] = Field(None, description='label consistency: loss against the teacher on augmented input')
    noisy: Optional[Noisy] = Field(None, description='the augmentations of lcr_opt')
    cl_opt: Optional[Block] = Field(None, description='dynamic contrastive loss')
    ce_opt: Optional[Block] = Field(None, description='distribution mapping loss')
    fakd_opt: Optional[Block] = Field(None, description='FAKD: spatial affinity of feature maps')
    csd_opt: Optional[Block] = Field(None, description="CSD: contrast with enlarged inputs in VGG19's features")
    mclir_opt: Optional[Block] = Field(None, description='MCLIR: push from the history on the clean input')
    dukd_opt: Optional[Block] = Field(None, description='DUKD: teacher and student on zoomed inputs')
    gradient_shares: Optional[GradientShares] = Field(
        None, description="gradient of these losses at the student's output over that of the others, for loss_weight"
    )
    num_neg: Negatives = Field(4, description='degraded negatives')
    neg_clean: bool = Field(True, description='the clean input is one more negative')
    negatives_micro_batch: Optional[Positive] = Field(
        None, description='negatives that are computed at a time, for less memory; all if empty'
    )
    update_decay: Probability = Field(0.1, description='weight of the old history at its update')
    step: Positives = Field([1000, 2000, 3000], description='iterations between history updates, per step_period')
    step_period: Positive = Field(100000, description='iterations that one entry of step holds for')
    history_from: Literal['ema', 'student'] = Field('ema', description='what the history follows')
    gaussian_blur_prob: Probability = Field(1.0, description='probability of blur, per negative')
    resize_prob: Probability = Field(0.0, description='probability of resizing, per negative')
    gaussian_noise_prob: Probability = Field(0.0, description='probability of noise, per negative')
    gray_noise_prob: Probability = Field(0.0, description='probability that noise is gray, per sample')


class VQGANTrain(Train):
    """VQGANModel's keys."""

    commit_opt: Optional[Block] = Field(None, description='loss between features and codes')
    codebook_decay: Probability = Field(0.99, description="decay of the codes' moving averages")
    restart_after: Count = Field(256, description='iterations after which an unused code is drawn anew, 0 for never')


class Val(Section):
    val_freq: Positive = Field(5000, description='validate every so many iterations')
    save_img: bool = Field(False, description='write the output images')
    suffix: NamePart = Field('', description='suffix of written images; the run name if empty')
    pbar: bool = Field(False, description='progress bar over the images')
    window_size: Optional[Positive] = Field(None, description='pad inputs to multiples of it, not only of the needed')
    tile_size: Optional[Positive] = Field(None, description='run in tiles of this many input pixels')
    tile_overlap: Optional[Count] = Field(None, description='input pixels that tiles share')
    tile_batch_size: Optional[Positive] = Field(None, description='tiles in one forward pass; 1 if empty')
    self_ensemble: bool = Field(False, description='mean over the 8 flips and transpositions of the input')
    metrics: Annotated[Optional[dict[str, Block]], BeforeValidator(_without_empty)] = Field(
        None, description='name -> metric with its arguments'
    )


class Wandb(Section):
    project: Optional[str] = None
    resume_id: Optional[str] = None


class Logger(Section):
    print_freq: Positive = Field(100, description='log every so many iterations')
    gradients: bool = Field(False, description="log each loss's gradient beside the first one's, at print_freq")
    save_checkpoint_freq: Positive = Field(5000, description='save every so many iterations')
    save_checkpoint_format: Literal['pth', 'safetensors'] = Field('pth', description='format of the network files')
    keep_checkpoints: Optional[Positive] = Field(
        None, description='keep this many of the last checkpoints, and the best of each metric; all if empty'
    )
    on_save_error: Literal['stop', 'continue'] = Field('stop', description='what follows a checkpoint not written')
    use_tb_logger: bool = Field(False, description='write TensorBoard files')
    wandb: Optional[Wandb] = None


class DistParams(Section):
    backend: Optional[str] = Field(None, description='accepted; nccl is used on GPUs, gloo on CPUs')
    port: Optional[Positive] = Field(None, description='port of rank 0 under SLURM')


class Top(Section):
    """The keys of a file, but for networks, paths and train, which depend on the model type."""

    name: Optional[FolderName] = Field(None, description='name of the run and of its folder')
    model_type: Optional[str] = Field(None, description='model class')
    imports: Optional[ModuleNames] = Field(
        None, description='modules, files, folders with archs, losses, models, ... of your own'
    )
    scale: Positive = Field(1, description='output size over input size')
    num_gpu: Gpus = Field('auto', description='upper bound of the GPUs used; 0 for the CPU')
    device: Optional[Literal['cpu', 'cuda', 'mps', 'xpu']] = Field(
        None, description='where networks are; if empty, on GPUs that CUDA (or ROCm) sees, else on the CPU'
    )
    manual_seed: Optional[Seed] = Field(None, description='seed; drawn if empty')
    find_unused_parameters: bool = Field(False, description="DistributedDataParallel's argument")
    use_amp: bool = Field(False, description='mixed precision: float16, or bfloat16 with amp_bf16')
    amp_bf16: bool = Field(False, description='bfloat16 in place of float16: no loss scaling, more range, fewer digits')
    amp_networks: Roles = Field(None, description='which networks use_amp is for; all if empty')
    use_channels_last: bool = Field(False, description='images as NHWC in memory')
    use_compile: bool = Field(False, description='torch.compile, in training and for the tiles of a test')
    compile_mode: Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'] = Field(
        'default', description="torch.compile's mode"
    )
    use_checkpoint: bool = Field(False, description="compute the student's activations twice, to keep fewer of them")
    use_tf32: Optional[bool] = Field(
        None, description="TF32 on GPUs: true in convolutions and matrix products, false in none; torch's way if empty"
    )
    compare: Optional[Block] = Field(None, description='of dckd_sr.compare: methods of the file, by name')
    val: Val = Val()
    logger: Logger = Logger()
    dist_params: Optional[DistParams] = None


class IOBackend(Section):
    type: Literal['disk', 'lmdb', 'memcached'] = 'disk'
    readonly: Optional[bool] = None  # lmdb
    lock: Optional[bool] = None
    readahead: Optional[bool] = None
    server_list_cfg: Optional[str] = None  # memcached
    client_cfg: Optional[str] = None
    sys_path: Optional[str] = None


class Dataset(Section):
    """The keys of every dataset."""

    name: NamePart = Field('', description='name in logs and tables; the key of the block if empty')
    type: Optional[str] = Field(None, description='dataset class')
    io_backend: IOBackend = IOBackend()
    num_worker_per_gpu: Optional[Workers] = Field(None, description='loader processes')
    batch_size_per_gpu: Optional[BatchSize] = Field(None, description='samples per process')
    dataset_enlarge_ratio: Optional[Positive] = Field(None, description='passes over the images that make an epoch')
    prefetch_mode: Optional[Literal['cpu', 'cuda']] = None
    num_prefetch_queue: Optional[Queue] = None
    pin_memory: Optional[bool] = Field(None, description='pinned memory; on GPUs, training has it unless false')
    persistent_workers: Optional[bool] = None


class OtherDataset(Dataset):
    """A dataset whose own keys are unknown here: they pass unchecked."""

    model_config = ConfigDict(extra='allow')


class TrainLoader(Section):
    """Defaults of the loader keys in datasets.train."""

    num_worker_per_gpu: Workers = 4
    batch_size_per_gpu: BatchSize = 16
    dataset_enlarge_ratio: Positive = 1
    mini_batch_sizes: Optional[Positives] = Field(None, description='progressive training: samples per stage')
    gt_sizes: Optional[Positives] = Field(None, description='progressive training: gt_size per stage')
    iters: Optional[Positives] = Field(None, description='progressive training: iterations of each stage')
    check_images: bool = Field(
        False, description='read all training images before the first iteration, and name all that are unfit'
    )
    teacher_cache: Optional[PathName] = Field(
        None, description='NAME.lmdb with the outputs of network_t, made by python -m dckd_sr.prepare teacher_cache'
    )


class _Crops(Dataset):
    gt_size: Optional[Positive] = Field(None, description='side of the training crop of GT')
    use_hflip: bool = True
    use_rot: bool = True


def _color(value):
    if value not in (None, 'y', 'rgb', 'RGB'):
        raise ValueError('expected y, for one channel (the luma), or no such key, for RGB')
    return value


class SingleImageDataset(Dataset):
    dataroot_lq: Optional[PathName] = None
    meta_info_file: Optional[PathName] = None
    color: Annotated[Optional[str], AfterValidator(_color)] = Field(None, description='y: one channel, the luma')
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None


class PairedImageDataset(_Crops, SingleImageDataset):
    dataroot_gt: Optional[PathName] = None
    filename_tmpl: Template = Field('{}', description='LQ file name for a GT file name, both without suffix')


class SRImageDataset(_Crops):
    dataroot_gt: Optional[PathName] = None
    dataroot_lq: Optional[PathName] = Field(None, description='made from GT if empty')
    lq_convention: Literal['uint8', 'double'] = Field('uint8', description="MATLAB's imresize on uint8 or on double")
    filename_tmpl: Template = Field('{}', description='LQ file name for a GT file name, both without suffix')
    meta_info_file: Optional[PathName] = None
    cache: Optional[Literal['ram']] = None


class PairedImage(Dataset):
    """Restormer's Dataset_PairedImage."""

    dataroot_gt: Optional[PathName] = None
    dataroot_lq: Optional[PathName] = None
    meta_info_file: Optional[PathName] = None
    filename_tmpl: Template = Field('{}', description='LQ file name for a GT file name, both without suffix')
    gt_size: Optional[Positive] = Field(None, description='side of the training crop of GT')
    geometric_augs: bool = Field(True, description='one of the eight flips and rotations')
    cache: Optional[Literal['ram']] = None


class GaussianDenoising(PairedImage):
    """Restormer's Dataset_GaussianDenoising."""

    dataroot_lq: NoFolder = Field(None, description='none: LQ is made from GT')
    in_ch: Literal[1, 3] = Field(3, description='1 for gray images')
    sigma_type: Literal['constant', 'random', 'choice'] = Field('random', description='how training noise is drawn')
    sigma_range: Union[float, list[float], None] = Field(None, description='training noise, in levels of 255')
    sigma_test: Optional[float] = Field(None, ge=0, description='noise of validation and test, in levels of 255')


class DualPixel(PairedImage):
    """Restormer's Dataset_DefocusDeblur_DualPixel_16bit."""

    dataroot_lq: NoFolder = Field(None, description='none: there are two')
    dataroot_lqL: Optional[PathName] = Field(None, description='left views')
    dataroot_lqR: Optional[PathName] = Field(None, description='right views')


class RealESRGANPairedDataset(_Crops):
    dataroot_gt: Optional[PathName] = None
    dataroot_lq: Optional[PathName] = None
    meta_info: Optional[PathName] = None
    filename_tmpl: Template = '{}'
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None


class FFHQDataset(Dataset):
    dataroot_gt: Optional[PathName] = None
    use_hflip: bool = True
    mean: list[float] = [0.5, 0.5, 0.5]
    std: list[float] = [0.5, 0.5, 0.5]


_KERNEL_KEYS = (
    'blur_kernel_size',
    'kernel_list',
    'kernel_prob',
    'blur_sigma',
    'betag_range',
    'betap_range',
    'sinc_prob',
)
RealESRGANDataset = create_model(
    'RealESRGANDataset',
    __base__=_Crops,
    dataroot_gt=(Optional[PathName], None),
    meta_info=(Optional[PathName], None),
    final_sinc_prob=(Optional[Probability], None),
    **{key + order: (Optional[Any], None) for key in _KERNEL_KEYS for order in ('', '2')},
)

DATASETS = {
    'SRImageDataset': SRImageDataset,
    'PairedImageDataset': PairedImageDataset,
    'SingleImageDataset': SingleImageDataset,
    'RealESRGANDataset': RealESRGANDataset,
    'RealESRGANPairedDataset': RealESRGANPairedDataset,
    'FFHQDataset': FFHQDataset,
    'Dataset_PairedImage': PairedImage,
    'Dataset_GaussianDenoising': GaussianDenoising,
    'Dataset_DefocusDeblur_DualPixel_16bit': DualPixel,
}
# What a dataset cannot do without: always, and in training.
DATASET_NEEDS = {
    'SRImageDataset': (['dataroot_gt'], ['gt_size']),
    'PairedImageDataset': (['dataroot_gt', 'dataroot_lq'], ['gt_size']),
    'SingleImageDataset': (['dataroot_lq'], []),
    'RealESRGANDataset': (['dataroot_gt', 'final_sinc_prob', *(k + o for o in ('', '2') for k in _KERNEL_KEYS)], []),
    'RealESRGANPairedDataset': (['dataroot_gt', 'dataroot_lq'], ['gt_size']),
    'FFHQDataset': (['dataroot_gt'], []),
    'Dataset_PairedImage': (['dataroot_gt', 'dataroot_lq'], ['gt_size']),
    'Dataset_GaussianDenoising': (['dataroot_gt'], ['gt_size', 'sigma_range']),
    'Dataset_DefocusDeblur_DualPixel_16bit': (['dataroot_gt', 'dataroot_lqL', 'dataroot_lqR'], ['gt_size']),
}


PATH_KEYS = ('pretrain_network', 'strict_load', 'param_key')  # of a network, which ends them as in network_g


@dataclass(frozen=True)
class ModelKeys:
    """Which networks and which `train` keys a model type has, and which of them it cannot do without."""

    train: type
    networks: tuple
    needs: tuple = ()
    losses: tuple = ()  # at least one of them


MODELS = {
    'SRModel': ModelKeys(Train, ('g',), losses=('pixel_opt', 'perceptual_opt')),
    'SwinIRModel': ModelKeys(Train, ('g',), losses=('pixel_opt', 'perceptual_opt')),
    'ImageRestorationModel': ModelKeys(KDTrain, ('g',), losses=('pixel_opt', 'perceptual_opt')),  # NAFNet's
    'ImageCleanModel': ModelKeys(KDTrain, ('g',), losses=('pixel_opt', 'perceptual_opt')),  # Restormer's
    'SRGANModel': ModelKeys(GANTrain, ('g', 'd'), needs=('network_d', 'train.optim_d', 'train.gan_opt')),
    'ESRGANModel': ModelKeys(GANTrain, ('g', 'd'), needs=('network_d', 'train.optim_d', 'train.gan_opt')),
    'KDModel': ModelKeys(KDTrain, ('g', 't'), losses=('pixel_opt', 'perceptual_opt', 'logits_opt')),
    'VQGANModel': ModelKeys(VQGANTrain, ('g',), needs=('train.commit_opt',), losses=('pixel_opt', 'perceptual_opt')),
    'DCKDModel': ModelKeys(
        DCKDTrain,
        ('g', 't', 'vqgan'),
        losses=(
            'pixel_opt',
            'perceptual_opt',
            'logits_opt',
            'lcr_opt',
            'cl_opt',
            'ce_opt',
            'fakd_opt',
            'csd_opt',
            'dukd_opt',  # not mclir_opt, which only pushes
        ),
    ),
}
OTHER_MODEL = ModelKeys(GANTrain, ('g', 'd'))  # video, third parties: unknown keys are warnings
# A file of these types that has one of these blocks runs as DCKDModel.
DROP_IN_TYPES = ('SRModel', 'SwinIRModel', 'ImageRestorationModel', 'ImageCleanModel')
# What a type's own code assumes in `train` where its files are silent; holds as DCKDModel, too.
TYPE_DEFAULTS = {'ImageRestorationModel': {'use_grad_clip': True}}
DROP_IN_NETWORKS = ('network_t', 'network_his', 'network_vqgan')
DROP_IN_LOSSES = ('logits_opt', 'lcr_opt', 'cl_opt', 'ce_opt', 'fakd_opt', 'csd_opt', 'mclir_opt', 'dukd_opt')
# Types of network_t that are built with the weights that their own blocks name.
OWN_WEIGHTS = ('spandrel', 'Ensemble')
# How networks run; a file of these types that has one of these keys runs as KDModel, which is the same training.
SPEED_KEYS = ('use_amp', 'use_channels_last', 'use_compile', 'use_checkpoint')
SPEED_TYPES = ('SRModel', 'SwinIRModel')

# Earlier names of BasicSR itself, still found in its option files: renamed.
RENAMED = {
    'path': {'strict_load': 'strict_load_g', **{f'pretrain_model_{n}': f'pretrain_network_{n}' for n in 'gd'}},
    'datasets': {'use_flip': 'use_hflip'},
}
# Keys of theirs that have nothing to decide here: dropped, and said.
NEEDLESS = {
    'path': {'ignore_resume_networks': 'only trained networks are resumed'},
    'datasets': {'use_shuffle': 'training always shuffles, validation never'},
    # NAFNet's and Restormer's.
    'val': {
        'use_image': 'metrics are computed on 8-bit images',
        'rgb2bgr': 'networks see RGB, files hold RGB',
        'max_minibatch': 'images and tiles are restored one by one',
        **dict.fromkeys(
            ('grids', 'crop_size_h', 'crop_size_w', 'crop_size_h_ratio', 'crop_size_w_ratio'),
            'val.tile_size and val.tile_overlap make tiles',
        ),
    },
}
# Names that other toolboxes give to things that have a name here; used in messages only.
OTHER_NAMES = {
    'network_g_teacher': 'network_t',
    'network_teacher': 'network_t',
    'pretrain_network_g_teacher': 'path.pretrain_network_t',
    'pretrain_network_teacher': 'path.pretrain_network_t',
    'strict_load_g_teacher': 'path.strict_load_t',
    'param_key_g_teacher': 'path.param_key_t',
    'lq_size': 'gt_size (lq_size times scale)',
    'patch_size': 'gt_size',
    'batch_size': 'batch_size_per_gpu',
    'accumulate': 'train.accum_iter',
    'n_workers': 'num_worker_per_gpu',
    'num_workers': 'num_worker_per_gpu',
    'num_worker': 'num_worker_per_gpu',
    'iters': 'total_iter',
    'total_iters': 'total_iter',
    'niter': 'total_iter',
    'ema': 'ema_decay',
    'tile': 'val.tile_size, with val.tile_overlap',
    'tile_pad': 'val.tile_overlap',
    'kd_opt': 'logits_opt',
    'distill_opt': 'logits_opt',
    'contrastive_opt': 'cl_opt',
    'losses': 'one block per loss, such as pixel_opt',
    'amp': 'use_amp',
    'bf16': 'use_amp with amp_bf16',
    'fp16': 'use_amp',
    'compile': 'use_compile',
    'channels_last': 'use_channels_last',
    'fast_matmul': 'use_tf32',
    'gradient_checkpointing': 'use_checkpoint',
}
# What a run adds to its options; older files and logs hold some of it.
SET_BY_PROGRAM = {
    'dist': 'set by --launcher',
    **dict.fromkeys(('rank', 'world_size', 'local_rank'), 'set by torchrun or srun'),
    'auto_resume': 'set by --auto_resume',
    **dict.fromkeys(('is_train', 'root_path'), 'set by the command'),
    'gpu_ids': 'set by CUDA_VISIBLE_DEVICES',
}
# Keys of forks that resemble one of BasicSR's and mean something else.
FORK_KEYS = ('use_vflip',)
# Losses that a model of BasicSR builds, and that only this one computes.
COMPUTED_BY = {'ldl_opt': 'RealESRGANModel'}
# Values of arguments that a constructor would refuse with a traceback, or late. Of BasicSR's classes and ours.
LOSS_VALUES = {
    'reduction': ('mean', 'sum'),
    'd_func': ('L1',),
    'form': ('released', 'paper'),
    'reduce': ('global', 'rank'),
    'guard': (True, False),
    'criterion': ('l1', 'fro'),  # BasicSR 1.4.2 asks PyTorch for 'l2' by a name that does not exist
    'features': ('vgg', 'vqgan'),
    'zoom_out': (True, False),
    'gan_type': ('vanilla', 'lsgan', 'wgan', 'wgan_softplus', 'hinge'),
}
# The method that DCKDModel calls on the loss of a block.
FEATURE_LOSSES = {
    'train.cl_opt': 'from_levels',
    'train.ce_opt': 'from_logits',
    'train.fakd_opt': 'from_maps',
    'train.csd_opt': 'contrast',
    'train.mclir_opt': 'push',
    'train.dukd_opt': 'zoomed_in',
}
ARCH_VALUES = {'input_range': ([0, 1], [-1, 1]), 'LayerNorm_type': ('WithBias', 'BiasFree')}
SCALE_KEYS = ('upscale', 'scale', 'upscale_factor')
CHANNEL_KEYS = {
    'input': ('num_in_ch', 'in_chans', 'in_channels', 'inp_channels', 'img_channel'),
    'output': ('num_out_ch', 'out_chans', 'out_channels', 'num_in_ch', 'in_chans', 'in_channels', 'img_channel'),
}
# torch.optim classes that do not fit a training step of BasicSR: abstract, closures, sparse gradients, matrices only.
UNFIT_OPTIMIZERS = ('Optimizer', 'LBFGS', 'SparseAdam', 'Muon')


@functools.cache
def known_anywhere():
    """The keys of all sections, whatever the model and the dataset."""
    sections = [Top, Val, Logger, Wandb, DistParams, IOBackend, TrainLoader, Dataset, MixingAugs, Noisy]
    sections += [spec.train for spec in MODELS.values()] + list(DATASETS.values())
    letters = {letter for spec in MODELS.values() for letter in spec.networks}
    named = {'network_his'} | {f'{key}_{letter}' for key in ('network', *PATH_KEYS) for letter in letters}
    return named.union(*(section.model_fields for section in sections))


# Where things that option files name come from: the pages of the projects themselves.
DATA_SOURCES = {
    r'datasets.demo_': 'python -m dckd_sr.demo deblur (or derain), which writes it',
    r'datasets.demo': 'make demo, which writes it',
    'DIV2K': 'https://data.vision.ee.ethz.ch/cvl/DIV2K/, see datasets/README.md',
    'GoPro|Rain13K': 'python -m dckd_sr.prepare download, see datasets/README.md',
    'DF2K|Flickr2K|Set5|Set14|B100|BSD|Urban100|Manga109': (
        'https://github.com/XPixelGroup/BasicSR/blob/master/docs/DatasetPreparation.md, see datasets/README.md'
    ),
}
WEIGHT_SOURCES = {
    r'pretrained_models.demo': 'the repository, which holds it',
    'VQGAN': 'https://github.com/CompVis/taming-transformers#overview-of-pretrained-models (ImageNet f=16, 1024)',
    'SwinIR': 'https://github.com/JingyunLiang/SwinIR/releases',
    'EDSR|RCAN|MSR|ESRGAN|RRDB': 'https://github.com/XPixelGroup/BasicSR/blob/master/docs/ModelZoo.md',
}
ENCODER_ADVICE = (
    'train one (python -m dckd_sr.train -opt options/train_vqgan.yml), or get that of taming-transformers: '
    'python -m dckd_sr.zoo get VQGAN_ImageNet_s256_f16_1024'
)
RUNTIME_KEYS = ('dist', 'rank', 'world_size', 'is_train', 'auto_resume', 'root_path')
RUNTIME_PATHS = ('experiments_root', 'models', 'training_states', 'log', 'visualization', 'results_root')
RUNTIME_DATASET_KEYS = ('phase', 'scale', 'missing')

"""Every repair of BasicSR 1.4.2 (and of torchvision) that a current stack needs: one function per defect.

``apply()`` runs before the first ``import basicsr``. BasicSR's files stay untouched: modules that no longer exist are
put into ``sys.modules``, and methods that lose data or crash are replaced on the imported classes.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
import types
import warnings
from pathlib import Path

from dckd_sr.errors import UserError, nearest

BASICSR_VERSION = '1.4.2'
_applied = False
_kept_alive = []


def apply():
    """Make ``import basicsr`` work and repair it; later calls do nothing.

    Raises:
        ImportError: no BasicSR, or another package of that name in its place; the message names the folder.
    """
    global _applied
    if _applied:
        return
    check_basicsr()
    with deferred('torch._dynamo.utils', 'is_compile_supported'):
        restore_torchvision_operators()
    restore_functional_tensor()
    restore_distutils()
    restore_scipy_filters()
    with warnings.catch_warnings(), deferred('scipy.stats', 'multivariate_normal'):
        # Their deprecation notices are about lines that a user of ours cannot change.
        warnings.simplefilter('ignore')
        importlib.import_module('basicsr')
    name_registry_entries()
    repair_networks()
    repair_devices()
    repair_optimizers()
    repair_schedulers()
    repair_ema()
    repair_logs()
    repair_checkpoints()
    repair_weight_files()
    repair_validation()
    speed_up_ssim()
    _applied = True


def check_basicsr():
    """Forks of BasicSR (NAFNet, Restormer, DCKD itself) install or lie around as `basicsr` and hide the real one."""
    module = sys.modules.get('basicsr')
    spec = module.__spec__ if module is not None else importlib.util.find_spec('basicsr')
    if spec is None:
        raise ImportError(f'BasicSR is not installed: pip install basicsr=={BASICSR_VERSION}')
    folder = Path(next(iter(spec.submodule_search_locations or []), spec.origin or '?'))
    version_file = folder / 'version.py'
    found = re.search(r"__version__\s*=\s*'([^']*)'", version_file.read_text()) if version_file.is_file() else None
    version = found.group(1) if found else 'unknown'
    # NAFNet's and Restormer's copies state 1.2/1.3; a bare folder of that name has no version at all.
    if version != BASICSR_VERSION or not (folder / 'archs' / 'swinir_arch.py').is_file():
        raise ImportError(
            f'the package `basicsr` found at {folder} (version {version}) is not BasicSR {BASICSR_VERSION} and hides '
            f'it. Leave that folder or rename it, or: pip uninstall basicsr && pip install basicsr=={BASICSR_VERSION}'
        )


@contextlib.contextmanager
def deferred(module, function):
    """Load a module when its function is called or anything else of it is needed, not where it is imported from here.

    torchvision/ops/roi_align.py:7 imports torch's compiler (1.1 s) and basicsr/data/degradations.py:7 SciPy's
    statistics (0.6 s), of the 4 s that ``import dckd_sr`` took: for one function each, which hardly anybody calls.
    """
    if module in sys.modules:
        yield
        return
    stand_in = types.ModuleType(module)

    def needed(name):
        if name.startswith('__'):  # the import system looks for these, and inspect in every module
            raise AttributeError(name)
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
        return getattr(importlib.import_module(module), name)

    stand_in.__getattr__ = needed
    setattr(stand_in, function, lambda *args, **kwargs: needed(function)(*args, **kwargs))
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]


def restore_torchvision_operators():
    """A CPU torch beside PyPI's torchvision (built for CUDA) fails with "operator torchvision::nms does not exist".

    Its compiled half cannot load, so the operators that its Python half refers to are declared here, without kernels:
    restoration needs none of them.
    """
    try:
        importlib.import_module('torchvision')
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        library = torch.library.Library('torchvision', 'DEF')
        library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _kept_alive.append(library)  # the definitions end with the object
        importlib.import_module('torchvision')


def restore_functional_tensor():
    """torchvision >= 0.17 dropped `transforms.functional_tensor`, which basicsr/data/degradations.py:8 imports."""
    name = 'torchvision.transforms.functional_tensor'
    if name not in sys.modules and importlib.util.find_spec(name) is None:  # many put one there themselves
        from torchvision.transforms import functional

        module = types.ModuleType(name)
        module.rgb_to_grayscale = functional.rgb_to_grayscale
        sys.modules[name] = module


def restore_distutils():
    """Python 3.12 has no `distutils`; basicsr/archs/arch_util.py:6 compares torchvision's version with it."""
    try:
        importlib.import_module('distutils.version')  # Python < 3.12, or setuptools' stand-in
    except ImportError:
        package, module = types.ModuleType('distutils'), types.ModuleType('distutils.version')
        module.LooseVersion = _Version
        package.version = module
        sys.modules['distutils'], sys.modules['distutils.version'] = package, module


class _Version:
    """Compares the leading numbers of versions such as '0.28.0+cpu'."""

    def __init__(self, text):
        self.numbers = [int(n) for n in re.findall(r'\d+', text.split('+')[0])]

    def __ge__(self, other):
        return self.numbers >= other.numbers


def restore_scipy_filters():
    """SciPy 2 removes `scipy.ndimage.filters`, which basicsr/metrics/niqe.py:5 imports."""
    from scipy import ndimage

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            importlib.import_module('scipy.ndimage.filters')
        except ImportError:
            sys.modules['scipy.ndimage.filters'] = ndimage


def name_registry_entries():
    """basicsr/utils/registry.py:65-71 prints a fallback that may not exist, then raises a KeyError without names."""
    from basicsr.utils.registry import Registry

    def get(self, name, suffix='basicsr'):
        for known in (name, f'{name}_{suffix}'):
            if known in self._obj_map:
                return self._obj_map[known]
        raise KeyError(
            f"no {self._name} named '{name}'{nearest(name, self._obj_map)}; known: {', '.join(self._obj_map)}"
        )

    Registry.get = get


def repair_networks():
    """edsr_arch.py:42, rcan_arch.py:110, swinir_arch.py:752 and four others keep constants where ``Module.to`` does not
    find them; swinir_arch.py:306 makes a mask on the CPU in every layer of every forward.
    """
    from basicsr import archs
    from basicsr.archs.swinir_arch import SwinTransformerBlock

    from dckd_sr.ops import swin

    build = archs.build_network

    @functools.wraps(build)
    def build_network(opt):
        return hold_constants(build(opt))

    for name, module in list(sys.modules.items()):  # the models have imported it
        if name.startswith('basicsr.') and getattr(module, 'build_network', None) is build:
            module.build_network = build_network
    swin.share_masks(SwinTransformerBlock)


def hold_constants(net):
    """Make buffers, which states do not have, of the tensors that a network's modules keep as plain attributes.

    ``Module.to`` leaves such tensors on the CPU, where the first forward finds them: it waits for the copy, and a
    compiled network is compiled again for the second one. The attention masks of a copy of SwinIR are shared, too.

    Returns:
        the network, which is changed in place.
    """
    import torch

    from dckd_sr.ops import swin

    names = []
    for prefix, module in net.named_modules():
        if swin.is_block(module):
            swin.share_masks(type(module))
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
                names.append(f'{prefix}.{name}' if prefix else name)
    if names:  # constants are equal in all processes: DistributedDataParallel need not send them
        net._ddp_params_and_buffers_to_ignore = [*getattr(net, '_ddp_params_and_buffers_to_ignore', ()), *names]
    return net


def repair_devices():
    """base_model.py:18 and :97 assume CUDA: without it `num_gpu: 1` crashes, and so does DistributedDataParallel;
    sr_model.py:88 waits for the GPU in every step.
    """
    from basicsr.models.base_model import BaseModel
    from basicsr.models.sr_model import SRModel
    from torch.nn.parallel import DistributedDataParallel

    from dckd_sr import devices
    from dckd_sr.ops.stepping import Stepping

    def __init__(self, opt):
        self.opt = opt
        self.device = devices.of({'num_gpu': 0, **opt})
        self.is_train = opt['is_train']
        self.schedulers = []
        self.optimizers = []
        train_opt = opt.get('train') or {}
        clip = train_opt.get('grad_clip', 0.01 if train_opt.get('use_grad_clip') else None)
        self.steps = Stepping(train_opt.get('accum_iter', 1), clip)

    def model_to_device(self, net):
        net = net.to(self.device)
        if self.opt.get('dist'):
            devices = [self.device.index] if self.device.type == 'cuda' else None
            unused = self.opt.get('find_unused_parameters', False)
            net = DistributedDataParallel(net, device_ids=devices, find_unused_parameters=unused)
        return net

    def feed_data(self, data):
        for name in ('lq', 'gt'):
            if name in data:
                setattr(self, name, data[name].to(self.device, non_blocking=True))

    BaseModel.__init__ = __init__
    BaseModel.model_to_device = model_to_device
    SRModel.feed_data = feed_data


def repair_optimizers():
    """base_model.py:104 knows Adam only; any class of torch.optim serves, behind the gate of `ops.stepping`."""
    import torch
    from basicsr.models.base_model import BaseModel

    from dckd_sr.ops.stepping import device_settings

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        params, cls = list(params), getattr(torch.optim, optim_type)
        return self.steps.attach(cls(params, lr=lr, **device_settings(cls, self.device, kwargs), **kwargs))

    BaseModel.get_optimizer = get_optimizer


def repair_schedulers():
    """base_model.py:119 knows three schedules and takes ``type`` out of the options.

    Schedules that continue from the last rate would take the warm-up's, which :178 writes over theirs, for it.
    """
    from basicsr.models.base_model import BaseModel

    from dckd_sr.ops.schedulers import SCHEDULERS

    warm_up = BaseModel.update_learning_rate

    def setup_schedulers(self):
        options = dict(self.opt['train']['scheduler'])
        cls = SCHEDULERS[options.pop('type')]
        self.schedulers.extend(cls(optimizer, **options) for optimizer in self.optimizers)

    def update_learning_rate(self, current_iter, warmup_iter=-1):
        if 1 < current_iter <= warmup_iter:
            self._set_lr([scheduler.get_last_lr() for scheduler in self.schedulers])
        warm_up(self, current_iter, warmup_iter)

    BaseModel.setup_schedulers = setup_schedulers
    BaseModel.update_learning_rate = update_learning_rate


def repair_ema():
    """base_model.py:75-82 leaves the buffers of the averaged network at their initial values."""
    from basicsr.models.base_model import BaseModel

    from dckd_sr.ops.history import average_

    def model_ema(self, decay=0.999):
        if self.steps.due:
            average_(self.net_g_ema, self.get_bare_model(self.net_g), decay, self.steps.ok)

    BaseModel.model_ema = model_ema


def repair_logs():
    """base_model.py:378 reads every loss on the host at every iteration; :149 prints the whole network."""
    import torch
    from basicsr.models.base_model import BaseModel
    from basicsr.utils import get_root_logger
    from basicsr.utils.dist_util import master_only

    @torch.no_grad()
    def reduce_loss_dict(self, loss_dict):
        values = {name: torch.as_tensor(value).detach().mean() for name, value in loss_dict.items()}
        if self.opt.get('dist'):
            stacked = torch.stack([value.to(self.device).float() for value in values.values()])
            torch.distributed.all_reduce(stacked)
            values = dict(zip(values, stacked / torch.distributed.get_world_size()))
        return self.steps.record(values)

    def get_current_log(self):
        return {name: float(value) for name, value in self.log_dict.items()}

    @master_only
    def print_network(self, net):
        net = self.get_bare_model(net)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        get_root_logger().info(f'Network: {type(net).__name__}, with parameters: {parameters:,d}')

    BaseModel.reduce_loss_dict = reduce_loss_dict
    BaseModel.get_current_log = get_current_log
    BaseModel.print_network = print_network


def repair_checkpoints():
    """base_model.py:226-338 writes in place and goes on after a failure; :262-300 loads without naming what differs."""
    from basicsr.models.base_model import BaseModel
    from basicsr.utils.dist_util import master_only

    from dckd_sr import checkpoint

    def load_network(self, net, load_path, strict=True, param_key='params'):
        role = next((name[4:] for name, value in vars(self).items() if value is net and name.startswith('net_')), 'g')
        key = f'param_key_{role.removesuffix("_ema")}'
        # BasicSR's models ask for 'params' where nothing is set, and for 'params_ema' of averages whatever is set.
        first = 'params_ema' if param_key == 'params_ema' else None
        if param_key in (None, 'params', 'params_ema'):
            param_key = (self.opt.get('path') or {}).get(key)
        checkpoint.load_network(self.get_bare_model(net), load_path, strict, param_key, f'path.{key}', first)

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        name = 'latest' if current_iter == -1 else current_iter
        suffix = (self.opt.get('logger') or {}).get('save_checkpoint_format', 'pth')
        path = Path(self.opt['path']['models']) / f'{net_label}_{name}.{suffix}'
        files = checkpoint.save_network({key: self.get_bare_model(net_) for key, net_ in zip(keys, nets)}, path)
        self.saved_files = {**getattr(self, 'saved_files', {}), **files}

    def save_training_state(self, epoch, current_iter):
        if current_iter != -1:
            checkpoint.save_state(self, epoch, current_iter)
        self.saved_files = {}

    def resume_training(self, resume_state):
        checkpoint.restore_state(self, resume_state)

    BaseModel.load_network = load_network
    BaseModel.save_network = save_network
    BaseModel.save_training_state = save_training_state
    BaseModel.resume_training = resume_training


def repair_weight_files():
    """vgg_arch.py:105 and the networks that load files of their own unpickle them, and so does torchvision."""
    import torch

    from dckd_sr import checkpoint

    for name in ('basicvsr_arch', 'dfdnet_arch', 'spynet_arch', 'tof_arch'):
        module = importlib.import_module(f'basicsr.archs.{name}')
        module.torch = _Instead(torch, load=lambda path, **_: checkpoint.read_file(path))
    module = importlib.import_module('basicsr.archs.vgg_arch')
    module.torch = _Instead(torch, load=lambda path, **_: checkpoint.read_weights(path)[0])
    names = [name for name in vars(module.vgg) if re.fullmatch(r'vgg\d+(_bn)?', name)]
    module.vgg = _Instead(module.vgg, **{name: functools.partial(_vgg, getattr(module.vgg, name)) for name in names})


class _Instead:
    """A module, for another one that is to call some functions in place of its own."""

    def __init__(self, module, **functions):
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _vgg(build, pretrained=False):
    """torchvision's ``vgg19(pretrained)`` and its like, with the file that torch.hub has."""
    from dckd_sr import checkpoint, vgg

    net = build(weights=None)
    if pretrained:
        places, url = vgg.vgg_places(build.__name__)
        if not os.path.isfile(places[-1]):
            raise UserError(f'no weights of {build.__name__} at {places[-1]}; download them from {url}')
        checkpoint.load_network(net, places[-1])
    return net


def repair_validation():
    """sr_model.py:130-197: scores an image without ground truth against the previous one's, crashes on an empty set,
    empties the CUDA cache per image, and hangs when a network with buffers is wrapped for several processes;
    swinir_model.py:13-21 cannot pad images smaller than its pad.
    """
    import torch
    from basicsr.models.sr_model import SRModel
    from basicsr.models.swinir_model import SwinIRModel

    from dckd_sr import evaluation
    from dckd_sr.inference import VAL_KEYS, infer

    @torch.no_grad()
    def test(self):
        net = getattr(self, 'net_g_ema', None) or self.get_bare_model(self.net_g)
        val = self.opt.get('val') or {}
        training = net.training
        net.eval()
        self.output = infer(net, self.lq, self.opt.get('scale', 1), **{key: val.get(key) for key in VAL_KEYS})
        net.train(training)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        evaluation.validate(self, dataloader, current_iter, tb_logger, save_img)

    def dist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)  # its loader has this rank's share

    SRModel.test = test
    SwinIRModel.test = test
    SRModel.nondist_validation = nondist_validation
    SRModel.dist_validation = dist_validation


def speed_up_ssim():
    """psnr_ssim.py:_ssim weighs each pixel's 11x11 neighbours at once: by columns and then rows it is the same sum."""
    import cv2
    from basicsr.metrics import psnr_ssim

    window = cv2.getGaussianKernel(11, 1.5)
    stability = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def weighted(image):
        return cv2.sepFilter2D(image, -1, window, window)[5:-5, 5:-5]

    def _ssim(img, img2):
        mean, mean2 = weighted(img), weighted(img2)
        squares, product = mean**2 + mean2**2, mean * mean2
        variances = weighted(img**2 + img2**2) - squares
        covariance = weighted(img * img2) - product
        luminance = (2 * product + stability[0]) / (squares + stability[0])
        return (luminance * (2 * covariance + stability[1]) / (variances + stability[1])).mean()

    psnr_ssim._ssim = _ssim

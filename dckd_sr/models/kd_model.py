"""A student and a frozen teacher: building, the training step, saving. Methods differ in ``terms()`` alone."""

from collections import OrderedDict
from functools import partial

import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from dckd_sr import checkpoint, devices
from dckd_sr.ops import gradients
from dckd_sr.ops.history import average_
from dckd_sr.ops.mixup import mixup
from dckd_sr.option_keys import OWN_WEIGHTS
from dckd_sr.speed import Speed


@MODEL_REGISTRY.register()
class KDModel(SRModel):
    """Knowledge distillation by outputs: |S(x) - y| + w |S(x) - T(x)| (Eqs. 2 and 3 of the DCKD paper).

    Options beyond SRModel's: ``network_t`` with ``path.pretrain_network_t``, ``param_key_t``, ``strict_load_t``;
    ``train.logits_opt``. Without a teacher the ground truth stands in for its output.
    """

    def __init__(self, opt):
        for key, value in (('dist', False), ('rank', 0), ('world_size', 1), ('num_gpu', 'auto'), ('is_train', True)):
            opt.setdefault(key, value)
        opt.setdefault('path', {})
        self.net_t = None
        super().__init__(opt)

    def model_to_device(self, net):
        """The student, set up as the speed options say before it is wrapped for several processes."""
        self.run = Speed(self.opt, self.device)
        self.steps.scaler = self.run.scaler
        return super().model_to_device(self.run.prepare('student', net))

    def init_training_settings(self):
        train_opt = self.opt['train']
        self.net_g.train()
        self.ema_decay = train_opt.get('ema_decay', 0)
        if self.ema_decay > 0:
            self.net_g_ema = self.build_frozen(self.opt['network_g'], 'history')
            average_(self.net_g_ema, self.get_bare_model(self.net_g), 0)
            path = self.opt['path'].get('pretrain_network_g')
            if path is not None:
                self.load_network(self.net_g_ema, path, self.opt['path'].get('strict_load_g'), 'params_ema')
        if self.opt.get('network_t') is not None:
            self.net_t = self.build_frozen(self.opt['network_t'], 'teacher')
            path = self.opt['path'].get('pretrain_network_t')
            if path is not None:
                strict, key = self.opt['path'].get('strict_load_t'), self.opt['path'].get('param_key_t')
                checkpoint.load_network(self.net_t, path, strict, key, 'path.param_key_t')
            elif self.opt['network_t']['type'] not in OWN_WEIGHTS:
                get_root_logger().warning('The teacher has random weights: path.pretrain_network_t is not set.')
        logger_opt = self.opt.get('logger') or {}
        self.gradients, self.gradients_freq = {}, logger_opt.get('gradients') and logger_opt.get('print_freq', 100)
        self.watch = gradients.Watch(train_opt.get('total_iter', 0))
        self.cri_pix = self.build_criterion('pixel_opt')
        self.cri_perceptual = self.build_criterion('perceptual_opt')
        self.cri_logits = self.build_criterion('logits_opt')
        self.setup_optimizers()
        if train_opt.get('scheduler') is not None:
            self.setup_schedulers()

    def build_frozen(self, network_opt, role):
        """A network without gradients, in eval mode; torch's generator, which is the student's, stays where it was."""
        network_opt = {key: value for key, value in network_opt.items() if key != 'allow_random'}
        with torch.random.fork_rng(devices=[]):
            net = build_network(network_opt)
        return self.run.prepare(role, net.to(self.device).eval().requires_grad_(False))

    def build_criterion(self, key):
        """The loss of ``train.<key>`` on the device, or None."""
        loss_opt = self.opt['train'].get(key)
        return None if loss_opt is None else build_loss(loss_opt).to(self.device)

    def feed_data(self, data):
        self.lq = data['lq'].to(self.device, non_blocking=True)
        if 'gt' in data:
            self.gt = data['gt'].to(self.device, non_blocking=True)
        self.own = len(self.lq) if 'own' not in data else int(data['own'].sum())  # the others are partners, for mixup
        self.cached_teacher = None
        if 'teacher' in data:  # datasets.train.teacher_cache
            self.cached_teacher = data['teacher'].to(self.device, non_blocking=True)

    def mix(self, current_iter):
        """Restormer's mixup, where ``train.mixing_augs`` asks for it; the batch may be spread in any way."""
        mixing = self.opt['train'].get('mixing_augs') or {}
        if mixing.get('mixup'):
            settings = mixing.get('mixup_beta', 1.2), mixing.get('use_identity', False)
            seed, total = self.opt.get('manual_seed') or 0, self.own * self.opt['world_size'] * self.steps.accum_iter
            first = (self.steps.micro * self.opt['world_size'] + self.opt['rank']) * self.own
            rows = range(first, first + self.own)
            # Zeros for what the draws depended on once, so that runs in one process stay what they were.
            which = current_iter, 0, 0
            self.lq, self.gt = mixup(self.lq, self.gt, *settings, seed, *which, rows=rows, total=total)

    def terms(self, current_iter):
        """The weighted losses of this iteration.

        Returns:
            dict: log name -> 0-d tensor; their sum is minimised.
        """
        student = self.run('student', self.net_g, self.lq)
        return self.image_terms(student, self.teacher())

    def pulls(self, terms):
        """What is minimised: the terms, or others with the gradients that they shall have."""
        return terms

    @torch.no_grad()
    def teacher(self):
        """The teacher's output for this batch: cached, or computed; without a teacher the ground truth."""
        if self.cached_teacher is not None:
            return self.cached_teacher
        return self.gt if self.net_t is None else self.run('teacher', self.net_t, self.lq)

    def image_terms(self, student, teacher):
        """The losses that compare images: l_pix, l_percep and l_style against GT, l_ts against the teacher."""
        terms = OrderedDict()
        if self.cri_pix is not None:
            terms['l_pix'] = self.cri_pix(student, self.gt)
        if self.cri_perceptual is not None:
            for name, value in zip(('l_percep', 'l_style'), self.cri_perceptual(student, self.gt)):
                if value is not None:
                    terms[name] = value
        if self.cri_logits is not None:
            terms['l_ts'] = self.cri_logits(student, teacher)
        return terms

    def optimize_parameters(self, current_iter):
        compiler = self.run.begin_step(any(self.measures(current_iter)))
        self.optimizer_g.zero_grad()
        self.mix(current_iter)
        work = partial(self.backward, current_iter)
        terms = work() if compiler is None else compiler.backward(work, self.keep)
        self.optimizer_g.step()
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
        self.log_dict = self.reduce_loss_dict(terms)

    def backward(self, current_iter):
        """The losses of this micro-batch, and their gradient added to the student's; returns the losses."""
        terms = self.terms(current_iter)
        pulls = self.pulls(terms)
        self.measure(pulls, current_iter)
        self.steps.scaled(sum(pulls.values())).backward()
        return terms

    def keep(self):
        """Note what `backward` changes; returns a function that sets it back, as often as it is called."""
        parameters, buffers = list(self.net_g.parameters()), list(self.net_g.buffers())
        gradients = [None] * len(parameters)
        if self.steps.micro > 0:  # of the micro-batches before
            gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        values = [buffer.clone() for buffer in buffers]
        losses = [loss for name, loss in vars(self).items() if name.startswith('cri_') and loss is not None]
        counts, found = [dict(vars(loss)) for loss in losses], list(self.watch.found)
        states = torch.get_rng_state(), devices.generator_state(self.device)

        def undo():
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = None if gradient is None else gradient.clone()
                for buffer, value in zip(buffers, values):
                    buffer.copy_(value)
            for loss, before in zip(losses, counts):
                vars(loss).update(before)
            self.watch.found = list(found)
            torch.set_rng_state(states[0])
            if states[1] is not None:
                devices.set_generator_state(states[1], self.device)

        return undo

    def measures(self, current_iter):
        """Whether this micro-batch's gradients are compared: for a log line that asks for it, and for `watch`."""
        asked = bool(self.gradients_freq) and current_iter % self.gradients_freq == 0
        return asked and self.steps.due, self.steps.due and self.watch.wants(current_iter)

    def measure(self, pulls, current_iter):
        """Each loss's gradient beside the first one's: where `watch` wants it, and at the log lines that ask for it."""
        asked, watched = self.measures(current_iter)
        if not (asked or watched):
            return
        try:
            found = gradients.against_first(pulls, self.net_g.parameters(), self.steps.scaled)
        except torch.OutOfMemoryError:
            if asked or self.opt['dist']:  # other processes wait for these gradients
                raise
            self.watch.starts = []  # nobody asked: the training goes on without
            return
        self.gradients = found if asked else {}
        if watched:
            self.watch.add(current_iter, found)

    def get_current_log(self):
        log = super().get_current_log()
        log.update((name, float(value)) for name, value in self.gradients.items())
        self.gradients = {}
        self.tell_gradients()
        return log

    def tell_gradients(self):
        """One line about how strongly each loss pulls, and a warning about those that pull against the first one."""
        first = next(iter(self.log_dict))
        for span, sizes in self.watch.report():
            text = ', '.join(f'{name} {size:.2g} (cosine {cosine:+.2f})' for name, (size, cosine) in sizes.items())
            if text:
                get_root_logger().info(f'Gradients, that of {first} being 1, in iterations {span}: {text}')
            for name, (size, cosine) in sizes.items():
                if -size * cosine > gradients.Watch.AGAINST:
                    what = f'works against {first} with {-size * cosine:.2g} times its gradient'
                elif size > gradients.Watch.LARGEST:
                    what = f'has {size:.2g} times the gradient of {first}, which hardly counts beside it'
                else:
                    continue
                get_root_logger().warning(f'{name} {what} (iterations {span}); set {self.remedy(name)}.')

    def remedy(self, name):
        """The key that weakens a loss, for a message about it."""
        return 'its loss_weight lower'

    def extra_state(self):
        """What a training state must hold besides BasicSR's entries: the scale of float16's gradients, and the
        measurement of gradients that is under way."""
        scaler = {} if self.run.scaler is None else {'scaler': self.run.scaler.state_dict()}
        return {**scaler, 'gradients': self.watch.found}

    def load_extra_state(self, state):
        self.watch.found = state.get('gradients', [])
        if self.run.scaler is not None and state.get('scaler'):
            self.run.scaler.load_state_dict(state['scaler'])

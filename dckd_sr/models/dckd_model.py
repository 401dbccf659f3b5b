"""DCKD: Dynamic Contrastive Knowledge Distillation for Efficient Image Restoration (AAAI 2025)."""

from functools import partial

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from dckd_sr.encoder import build_encoder
from dckd_sr.errors import UserError
from dckd_sr.inference import infer
from dckd_sr.models.kd_model import KDModel
from dckd_sr.ops import augment, gradients, upcycling
from dckd_sr.ops.degradations import Degradation, degrade
from dckd_sr.ops.history import average_, update_interval
from dckd_sr.ops.taps import Taps


@MODEL_REGISTRY.register()
class DCKDModel(KDModel):
    """L = L_rec + L_kd + w_dcl L_dcl + w_ce L_ce (Eq. 10), and the released code's label consistency L_lcr.

    Other methods are further terms, with or without DCKD's: ``fakd_opt``, ``csd_opt``, ``mclir_opt``, ``dukd_opt``.

    Options of the released code: ``network_his``, ``network_vqgan`` and its paths; in ``train`` ``logits_opt``,
    ``lcr_opt`` with ``noisy.prob``, ``cl_opt``, ``ce_opt``, ``num_neg``, ``update_decay``, ``step``,
    ``gaussian_blur_prob`` (1 where absent), ``resize_prob``, ``gaussian_noise_prob``, ``gray_noise_prob`` (0 where
    absent). Ours, for the printed paper where it differs: ``neg_clean`` (true: the clean LQ is one more negative),
    ``history_from`` ('ema' or 'student'), ``step_period`` (100000). ``gradient_shares`` takes
    the place of loss weights. Any subset of the losses works, and so does ``ema_decay: 0``.
    """

    def __init__(self, opt):
        self.net_his = self.net_vqgan = self.student_output = self.csd_inputs = None
        super().__init__(opt)

    def init_training_settings(self):
        super().init_training_settings()
        train_opt = self.opt['train']
        self.cri_lcr = self.build_criterion('lcr_opt')
        self.cri_cl = self.build_criterion('cl_opt')
        self.cri_ce = self.build_criterion('ce_opt')
        if self.cri_ce is not None and self.cri_ce.form == 'released':
            get_root_logger().info(
                'l_ce hardly changes: form: released applies softmax twice, so that the loss stays near loss_weight x '
                'ln(n_embed), also between equal images. What it does shows in its gradient (logger.gradients: true).'
            )
        self.cri_fakd = self.build_criterion('fakd_opt')
        self.cri_csd = self.build_criterion('csd_opt')
        self.cri_mclir = self.build_criterion('mclir_opt')
        self.cri_dukd = self.build_criterion('dukd_opt')
        if self.cri_cl is not None:
            self.cri_cl.compare = self.run.compiled(self.cri_cl.compare, 'contrastive distance')
        if self.cri_mclir is not None:
            self.cri_mclir.run = partial(self.run, 'encoder')
        if self.cri_csd is not None and not ('encoder' in self.run.amp and self.run.dtype == torch.float16):
            self.cri_csd.run = partial(self.run, 'encoder')
        self.student_taps, self.teacher_taps = self.tap('student', self.net_g), self.tap('teacher', self.net_t)
        self.lcr_prob = (train_opt.get('noisy') or {}).get('prob', 0.5)
        shares = (train_opt.get('gradient_shares') or {}).items()
        self.shares = {f'l_{block[: -len("_opt")]}': share for block, share in shares if share is not None}
        self.num_neg = train_opt.get('num_neg', 4)
        self.negatives_micro_batch = train_opt.get('negatives_micro_batch')
        self.neg_clean = train_opt.get('neg_clean', True)
        self.degradation = Degradation(
            blur_prob=train_opt.get('gaussian_blur_prob', 1.0),
            resize_prob=train_opt.get('resize_prob', 0),
            noise_prob=train_opt.get('gaussian_noise_prob', 0),
            gray_prob=train_opt.get('gray_noise_prob', 0),
        )
        self.update_decay = train_opt.get('update_decay', 0.1)
        self.step = train_opt.get('step') or [1000, 2000, 3000]
        self.step_period = train_opt.get('step_period', 100000)
        self.mclir_levels = self.cri_mclir is not None and self.cri_mclir.features == 'vqgan'
        if self.opt.get('network_his', self.cri_cl is not None or self.cri_mclir is not None):
            self.net_his = self.build_frozen(self.opt['network_g'], 'history')
            average_(self.net_his, self.history_source(), 0)
            self.watch = gradients.Watch(train_opt.get('total_iter', 0), self.step[0])
        if self.cri_cl is not None or self.cri_ce is not None or self.mclir_levels:
            paths = self.opt['path']
            encoder = build_encoder(
                self.opt['network_vqgan'], paths.get('pretrain_network_vqgan'), paths.get('param_key_vqgan')
            )
            self.net_vqgan = self.run.prepare('encoder', encoder.to(self.device))

    def tap(self, role, net):
        """The maps of a network that fakd_opt compares; such a network is not compiled."""
        paths = [] if self.cri_fakd is None else getattr(self.cri_fakd, role)
        if not paths:
            return Taps(net, ())
        if net is None:
            raise UserError('train.fakd_opt needs network_t, the teacher')
        self.run.keep_uncompiled(role, 'train.fakd_opt reads its modules')
        return Taps(net, paths, f'train.fakd_opt.{role}: ')

    def history_source(self):
        """What the history network follows: the student's EMA as released, or the student as printed (Eq. 6)."""
        if self.ema_decay > 0 and self.opt['train'].get('history_from', 'ema') == 'ema':
            return self.net_g_ema
        return self.get_bare_model(self.net_g)

    def terms(self, current_iter):
        with self.student_taps as s_maps:
            student = self.run('student', self.net_g, self.lq)  # I_S
        with self.teacher_taps as t_maps:
            teacher, consistent = self.teach(current_iter)  # I_T
        self.student_output = student
        terms = self.image_terms(student, teacher)  # L_rec, L_kd
        if self.cri_lcr is not None:
            terms['l_lcr'] = self.cri_lcr(student, consistent)
        if self.cri_fakd is not None:
            terms['l_fakd'] = self.cri_fakd.from_maps(s_maps, t_maps, self.lq.shape[2:])
        if self.cri_csd is not None:
            terms['l_csd'] = self.cri_csd.contrast(student, teacher, self.first_inputs(self.cri_csd.num_neg))
        if self.cri_dukd is not None:
            terms.update(self.upcycle(current_iter))
        if self.net_vqgan is not None:
            s, t, negatives = self.encode(student, teacher, current_iter)  # f^S, f^T, f^Neg
            if self.cri_cl is not None:
                terms['l_cl'] = self.cri_cl.from_parts(s.levels, t.levels, negatives)  # Eq. 5
            if self.cri_ce is not None:
                terms['l_ce'] = self.cri_ce.from_logits(s.logits, t.logits)  # Eq. 9
        if self.cri_mclir is not None:
            terms['l_mclir'] = self.push(student, s.levels if self.mclir_levels else None)
        return terms

    def pulls(self, terms):
        output, self.student_output = self.student_output, None
        return gradients.with_shares(terms, output, self.shares, self.steps.scaled)

    def first_index(self, current_iter):
        """Index of this rank's first sample among all samples of the run: draws depend on it, not on the rank."""
        micro_batch = (current_iter - 1) * self.steps.accum_iter + self.steps.micro
        return (micro_batch * self.opt['world_size'] + self.opt['rank']) * len(self.lq)

    def first_inputs(self, count):
        """LQ of the first images of the iteration's whole batch, however it is spread: all compare with the same."""
        if self.steps.micro == 0 or self.csd_inputs is None:
            self.csd_inputs = self.lq[:count].clone()
            if self.opt['dist']:
                torch.distributed.broadcast(self.csd_inputs, 0)
        return self.csd_inputs

    @torch.no_grad()
    def teach(self, current_iter):
        """The teacher's output T(x), and F^-1(T(F(x))) for random invertible augmentations F where lcr is on."""
        if self.net_t is None:
            return self.gt, self.gt
        if self.cri_lcr is None:
            return self.teacher(), None
        flags = self.draw_flags(self.lcr_prob, current_iter)
        both = torch.cat([self.lq, augment.augment(self.lq, flags)])
        output, augmented = self.run('teacher', self.net_t, both).chunk(2)
        return output, augment.invert(augmented, flags)

    def draw_flags(self, prob, current_iter, *purpose):
        """Random invertible augmentations for this batch."""
        seed = self.opt.get('manual_seed') or 0
        return augment.draw_flags(prob, len(self.lq), seed, current_iter, self.first_index(current_iter), *purpose)

    def upcycle(self, current_iter):
        """DUKD: the student on tiles of GT, augmented, and on the shrunk LQ, against the teacher on the same."""
        dukd, scale, seed = self.cri_dukd, self.opt.get('scale', 1), self.opt.get('manual_seed') or 0
        height, width = self.lq.shape[2:]
        if self.net_t is None or self.gt.shape[2:] != (height * scale, width * scale):
            raise UserError(
                f'train.dukd_opt needs network_t, and GT of scale = {scale} times LQ, but GT is '
                f'{self.gt.shape[3]}x{self.gt.shape[2]} and LQ {width}x{height}'
            )
        # The wrapper for several processes has prepared the backward pass in its first call; a second one would write
        # to buffers that the first one's gradient needs.
        net_g, net_t = self.get_bare_model(self.net_g), self.net_t
        chosen = upcycling.draw_tiles(dukd.n_gt_sub, scale, seed, current_iter, 0)
        tiles = upcycling.tiles(self.gt, scale, chosen)
        drawn = [self.draw_flags(dukd.prob, current_iter, f'dukd {k}') for k in range(dukd.n_gt_sub)]
        flags = {op: torch.cat([part[op] for part in drawn]) for op in augment.OPERATIONS}
        student = augment.invert(self.run('student', net_g, augment.augment(tiles, flags)), flags)
        with torch.no_grad():
            teacher = self.run('teacher', net_t, tiles)
        terms = {'l_dukd_in': dukd.zoomed_in(student, teacher)}
        if dukd.zoom_out:
            small = upcycling.shrink(self.lq, scale)
            # Padded where it is no multiple of the windows.
            student = infer(net_g, small, scale, run=partial(self.run, 'student'))
            with torch.no_grad():
                teacher = infer(net_t, small, scale, run=partial(self.run, 'teacher'))
            terms['l_dukd_out'] = dukd.zoomed_out(student, self.lq, teacher)
        return terms

    def push(self, student, levels):
        """MCLIR: away from the history network's output on the clean input, in VGG's features or the encoder's."""
        with torch.no_grad():
            negative = self.run('history', self.net_his, self.lq)
            if self.mclir_levels:
                negative = self.run('encoder', self.net_vqgan, negative, levels=True, codes=0).levels
        if self.mclir_levels:
            return self.cri_mclir.from_features(levels, negative)
        return self.cri_mclir.push(student, negative)

    @torch.no_grad()
    def negative_inputs(self, current_iter):
        """The clean and the degraded inputs of the history network, one after the other along the batch."""
        seed = self.opt.get('manual_seed') or 0
        inputs = [self.lq] if self.neg_clean else []
        if self.num_neg > 0:
            first = self.first_index(current_iter)
            inputs.append(degrade(self.lq, self.num_neg, self.degradation, seed, current_iter, first))
        return torch.cat(inputs) if inputs else self.lq[:0]

    def encode(self, student, teacher, current_iter):
        """Encoder levels and code distributions: one pass with gradient for the student, one without for the rest.

        Returns:
            (Encoding of the student, that of the teacher, the negatives' levels in parts; see ``from_parts``).
        """
        contrast, codes = self.cri_cl is not None, self.cri_ce is not None
        batch = len(teacher)

        def encoded(images, codes=0):
            return self.run('encoder', self.net_vqgan, images, levels=contrast, codes=codes)

        def history(inputs):
            return self.run('history', self.net_his, inputs)

        wanted = batch if codes else 0
        s = self.run('encoder', self.net_vqgan, student, levels=contrast or self.mclir_levels, codes=wanted)
        if not contrast and not codes:
            return s, None, None
        with torch.no_grad():
            inputs = self.negative_inputs(current_iter) if contrast else self.lq[:0]
            if self.negatives_micro_batch and len(inputs):  # less memory, for some speed
                t, parts = encoded(teacher, wanted), inputs.split(self.negatives_micro_batch * batch)
                return s, t, (encoded(history(part)).levels for part in parts)
            rest = encoded(torch.cat([teacher, history(inputs)]) if len(inputs) else teacher, wanted)
        if not contrast:
            return s, rest, None
        t = rest._replace(levels=[level[:batch] for level in rest.levels])
        return s, t, [[level[batch:] for level in rest.levels]]

    def optimize_parameters(self, current_iter):
        super().optimize_parameters(current_iter)
        interval = update_interval(self.step, current_iter, self.step_period)
        if self.net_his is not None and self.steps.due and current_iter % interval == 0:
            average_(self.net_his, self.history_source(), self.update_decay, self.steps.ok)

    def get_current_log(self):
        log = super().get_current_log()
        if self.cri_cl is not None:
            self.details = self.cri_cl.report()
            for level, part in enumerate(self.details.get('left_out', ()), 1):
                if part:
                    log[f'cl_left_out_{level}'] = part
        return log

    def remedy(self, name):
        block = f'{name[2:]}_opt'
        if name == 'l_cl' and self.cri_cl.margin is None:
            return 'train.cl_opt.margin: 1'
        if name in ('l_cl', 'l_ce', 'l_csd', 'l_mclir'):
            return f'train.gradient_shares: {{{block}: 0.3}}, or a lower train.{block}.loss_weight'
        return super().remedy(name)

    def extra_state(self):
        """The history network, and how often the contrastive loss has left out levels since the last log line."""
        state = super().extra_state()
        if self.net_his is not None:
            state['net_his'] = self.net_his.state_dict()
        if self.cri_cl is not None:
            state['levels_left_out'] = {'counts': self.cri_cl.counts, 'guarded': self.cri_cl.guarded}
        return state

    def load_extra_state(self, state):
        super().load_extra_state(state)
        if self.cri_cl is not None:
            left_out = state.get('levels_left_out')
            if isinstance(left_out, dict):  # states of version 0.1 have one number
                self.cri_cl.counts, self.cri_cl.guarded = left_out['counts'], left_out['guarded']
        if self.net_his is None:
            return
        if 'net_his' in state:
            self.net_his.load_state_dict(state['net_his'])
        else:
            average_(self.net_his, self.history_source(), 0)
            get_root_logger().warning('The training state has no history network: it starts as a copy of the student.')

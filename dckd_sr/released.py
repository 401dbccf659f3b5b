"""One step of DCKD in the order of the authors' released code: the yardstick of `dckd_sr.benchmark`.

Facts from super-SSS/DCKD (dckd_model.py, vqgan_arch.py, basic_loss.py, commit 2dc9479): every image set goes through
the encoder by itself, student, teacher and each negative in turn; student and teacher go through again, to the end, for
their distributions; attention and swish keep their tables, passes their activations, all losses their features. What is
computed is what `DCKDModel` computes, and negatives are drawn as there.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from dckd_sr import precision
from dckd_sr.models.dckd_model import DCKDModel
from dckd_sr.ops import augment


class ReleasedStep:
    """Copies of a model's networks, in plain memory format, with their own optimiser.

    Args:
        model: a DCKDModel in training, of one process. It is not changed; its criteria and draws are used.
    """

    def __init__(self, model: DCKDModel):
        self.model = model
        self.net_g = _plain(model.get_bare_model(model.net_g)).train()
        self.net_g_ema = _plain(model.net_g_ema) if model.ema_decay > 0 else None
        self.net_t, self.net_his, self.net_vqgan = map(_plain, (model.net_t, model.net_his, model.net_vqgan))
        cls, given = type(model.optimizer_g), model.optimizer_g.defaults
        options = {key: value for key, value in given.items() if key in inspect.signature(cls).parameters}
        self.optimizer_g = cls(self.net_g.parameters(), **{**options, 'fused': None} if 'fused' in options else options)
        self.scaler, self._unscaled = (
            torch.amp.GradScaler(model.device.type, enabled=enabled)
            for enabled in (model.run.scaler is not None, False)
        )
        self._as_model = False

    def terms(self, current_iter: int) -> dict[str, torch.Tensor]:
        """The weighted losses of the model's present batch; see `DCKDModel.terms`."""
        model, lq = self.model, self.model.lq
        student, consistent = self._images('student', self.net_g, lq), None
        if self.net_t is None:
            teacher = consistent = model.gt
        elif model.cri_lcr is None:
            teacher = self._images('teacher', self.net_t, lq)
        else:
            seed = model.opt.get('manual_seed') or 0
            flags = augment.draw_flags(model.lcr_prob, len(lq), seed, current_iter, model.first_index(current_iter))
            both = torch.cat([lq, augment.augment(lq, flags)])
            teacher, augmented = self._images('teacher', self.net_t, both).chunk(2)
            consistent = augment.invert(augmented, flags)
        terms = model.image_terms(student, teacher)
        if model.cri_lcr is not None:
            terms['l_lcr'] = model.cri_lcr(student, consistent)
        if model.cri_cl is not None:
            negatives = self._images('history', self.net_his, model.negative_inputs(current_iter)).split(len(lq))
            with self._autocast('encoder'):
                features = [self.levels(images) for images in (student, teacher, *negatives)]
            terms['l_cl'] = self.contrast(*features)
        if model.cri_ce is not None:
            with self._autocast('encoder'):
                logits = self.logits(student).float(), self.logits(teacher).float()
            scores = logits[0].softmax(1) if model.cri_ce.form == 'released' else logits[0]
            loss = F.cross_entropy(scores, logits[1].softmax(1), reduction=model.cri_ce.reduction)
            terms['l_ce'] = model.cri_ce.loss_weight * loss
        return terms

    def _autocast(self, role):
        """As the model runs the network of this role, if the present step does as the model."""
        return self.model.run.autocast(role, self._as_model)

    def _images(self, role, net, x):
        with self._autocast(role):
            return net(x).float()

    def levels(self, images):
        """The outputs of the first residual blocks; the coarsest level ends there."""
        encoder, found = self.net_vqgan.encoder, []
        kept = [encoder.conv_in(self.net_vqgan._enter(images))]
        for i, level in enumerate(encoder.down):
            for j, block in enumerate(level.block):
                h = _residual(block, kept[-1])
                if j == 0:
                    found.append(h)
                    if i + 1 == len(encoder.down):
                        return found
                kept.append(_attention(level.attn[j], h) if level.attn else h)
            kept.append(level.downsample(kept[-1]))
        return found

    def logits(self, images):
        """How near the codes are, per position: the whole encoder."""
        encoder, codes = self.net_vqgan.encoder, self.net_vqgan.quantize.embedding.weight
        kept = [encoder.conv_in(self.net_vqgan._enter(images))]
        for i, level in enumerate(encoder.down):
            for j, block in enumerate(level.block):
                h = _residual(block, kept[-1])
                kept.append(_attention(level.attn[j], h) if level.attn else h)
            if i + 1 < len(encoder.down):
                kept.append(level.downsample(kept[-1]))
        mid = encoder.mid
        h = _residual(mid.block_2, _attention(mid.attn_1, _residual(mid.block_1, kept[-1])))
        h = self.net_vqgan.quant_conv(encoder.conv_out(_swish(encoder.norm_out(h))))
        rows = h.permute(0, 2, 3, 1).flatten(0, 2)
        distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.t()
        return distances.amax(1, keepdim=True) - distances

    def contrast(self, anchors, positives, *negatives):
        """Eq. 5 with all negatives of a level stacked; the levels that count are those of the model's loss."""
        criterion, total = self.model.cri_cl, 0
        for weight, anchor, positive, *others in zip(criterion.weights, anchors, positives, *negatives):
            near = (anchor - positive).abs().mean()
            far = (anchor - torch.stack(others)).abs().sum(0).mean()
            mean = far.detach() / len(others)
            counts = 1 if criterion.margin is None else (1 - near.detach() / (criterion.margin * mean)).clamp(min=0)
            total = total + weight * (near / (far + 1e-7)) * counts
        return criterion.loss_weight * total

    def __call__(self, current_iter: int, mode: str = 'released') -> dict[str, float]:
        """A whole step: losses, gradients, weights, EMA; BasicSR reads every loss on the host.

        Args:
            mode: its precision: that of the released code, which is what torch does by itself; that of the model; or
                float32 without TF32.
        """
        self._as_model = mode == 'model'
        scaler = self.scaler if self._as_model else self._unscaled
        self.optimizer_g.zero_grad()
        self.model.mix(current_iter)
        with precision.tf32_as({'released': None, 'float32': False}.get(mode, self.model.opt.get('use_tf32'))):
            terms = self.terms(current_iter)
            scaler.scale(sum(terms.values())).backward()
        scaler.unscale_(self.optimizer_g)
        if self.model.steps.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.net_g.parameters(), self.model.steps.grad_clip)
        scaler.step(self.optimizer_g)
        scaler.update()
        losses = {name: value.mean().item() for name, value in terms.items()}
        if self.net_g_ema is not None:
            ours, decay = dict(self.net_g.named_parameters()), self.model.ema_decay
            for name, average in self.net_g_ema.named_parameters():
                average.data.mul_(decay).add_(ours[name].data, alpha=1 - decay)
        return losses


def _plain(net):
    if net is None:
        return None
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        vars(module).pop('forward', None)  # activation checkpointing
    return net


def _swish(x):
    return x * torch.sigmoid(x)


def _residual(block, x):
    h = block.conv1(_swish(block.norm1(x)))
    h = block.conv2(block.dropout(_swish(block.norm2(h))))
    return (block.nin_shortcut(x) if hasattr(block, 'nin_shortcut') else x) + h


def _attention(block, x):
    """Attention that holds its whole table of weights."""
    h = block.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (block.q, block.k, block.v))
    table = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(2)
    return x + block.proj_out((v @ table.transpose(1, 2)).view(x.shape))

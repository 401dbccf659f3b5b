"""Training of a VQGAN (encoder, codebook, decoder) on images, for users who want a codebook of their own.

Vector quantisation as in van den Oord et al., Neural Discrete Representation Learning (2017): straight-through
gradient, commitment loss, and codes that are moving averages of the features assigned to them (its appendix A.1). Codes
that stay unused are drawn anew from the features of the current batch. There is no discriminator: DCKD compares
features, and sharp reconstructions do not help it.
"""

from collections import OrderedDict

import torch
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import nn

from dckd_sr import evaluation
from dckd_sr.errors import UserError
from dckd_sr.inference import VAL_KEYS, infer
from dckd_sr.ops.seeding import generator


class Autoencoder(nn.Module):
    """The forward pass of training, as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """Images to (reconstruction, features z, codes z_q, code numbers); z gets z_q's gradient straight through."""
        z, z_q, indices = self.net.quantized(x)
        return self.net.decode(z + (z_q - z).detach()), z, z_q, indices


@MODEL_REGISTRY.register()
class VQGANModel(SRModel):
    """L = L_rec + w |z - sg(z_q)|^2; the codebook follows the features by moving averages.

    ``network_g`` is a VQGAN with ``decoder: true``; images are ``gt`` alone (scale 1). Options in ``train`` beyond
    SRModel's: ``commit_opt``, a BasicSR loss between features and codes; ``codebook_decay`` (0.99) of the moving
    averages; ``restart_after`` (256), iterations after which an unused code is drawn anew, 0 for never.

    The log has ``l_pix``, ``l_commit``, ``code_usage``, the fraction of codes used in the last ``restart_after`` (or
    256) iterations, and ``perplexity``, exp of the entropy of the moving code frequencies: n_embed where all are
    equally frequent, 1 where one code serves all.

    Raises:
        UserError: network_g is not a VQGAN with decoder, or crops are not multiples of its downsampling factor.
    """

    def __init__(self, opt):
        super().__init__(opt)
        self.codes_seen = None

    def model_to_device(self, net):
        """Only to the device: what several processes share is the `Autoencoder` around it."""
        if not hasattr(net, 'decoder') or not hasattr(net, 'quantize'):
            raise UserError('VQGANModel trains a VQGAN with its decoder: network_g: {type: VQGAN, decoder: true, ...}')
        return net.to(self.device)

    def init_training_settings(self):
        super().init_training_settings()
        train_opt = self.opt['train']
        self.cri_commit = build_loss(train_opt['commit_opt']).to(self.device)
        self.decay = train_opt.get('codebook_decay', 0.99)
        self.restart_after = train_opt.get('restart_after', 256)
        self.autoencoder = super().model_to_device(Autoencoder(self.net_g))
        self.code_vectors = self.net_g.quantize.embedding.weight
        self.follow_from_here()
        self.seen = None  # what the micro-batches of this iteration have added up
        # A pretrained codebook stays; a random one is replaced by features of the first batch.
        self.drawn = self.opt['path'].get('pretrain_network_g') is not None

    def setup_optimizers(self):
        self.net_g.quantize.embedding.weight.requires_grad_(False)
        options = dict(self.opt['train']['optim_g'])
        trained = [parameter for parameter in self.net_g.parameters() if parameter.requires_grad]
        self.optimizer_g = self.get_optimizer(options.pop('type'), trained, **options)
        self.optimizers.append(self.optimizer_g)

    def follow_from_here(self):
        """Start the moving averages from the present codes."""
        self.code_sizes = torch.ones(len(self.code_vectors), device=self.device)
        self.code_sums = self.code_vectors.detach().clone()
        self.idle = torch.zeros(len(self.code_vectors), dtype=torch.int64, device=self.device)

    def feed_data(self, data):
        self.gt = data['gt' if 'gt' in data else 'lq'].to(self.device, non_blocking=True)
        self.lq = self.gt

    def optimize_parameters(self, current_iter):
        factor = 2 ** (self.net_g.num_levels - 1)
        if self.gt.shape[2] % factor or self.gt.shape[3] % factor:
            raise UserError(
                f'datasets.train.gt_size must be a multiple of {factor}, the downsampling factor of network_g'
            )
        if not self.drawn:
            self.draw_all(current_iter)
        self.optimizer_g.zero_grad()
        self.output, z, z_q, indices = self.autoencoder(self.gt)
        terms = OrderedDict(l_pix=self.cri_pix(self.output, self.gt)) if self.cri_pix else OrderedDict()
        if self.cri_perceptual:
            for name, value in zip(('l_percep', 'l_style'), self.cri_perceptual(self.output, self.gt)):
                if value is not None:
                    terms[name] = value
        terms['l_commit'] = self.cri_commit(z, z_q.detach())
        sum(terms.values()).backward()
        self.optimizer_g.step()
        self.update_codes(rows(z), indices.flatten(), current_iter)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
        usage = (self.idle < (self.restart_after or 256)).float().mean()
        # Those of the codebook as it is now, where losses are means over processes and micro-batches.
        codes = {'code_usage': usage, 'perplexity': perplexity(self.code_sizes)}
        self.log_dict = {**self.reduce_loss_dict(terms), **codes}

    def start_from(self, batches):
        """The micro-batches of the first iteration, before it: the codes are drawn from all of them."""
        if not self.drawn:
            self.draw_all(1, [data['gt' if 'gt' in data else 'lq'] for data in batches])

    @torch.no_grad()
    def draw_all(self, current_iter, batches=None):
        """Features of the first batch become the codes: random codes would lie far from all features.

        Args:
            batches: its micro-batches, images each; by default the present one is all of it.
        """
        drawn, batches = 0, [self.gt] if batches is None else batches
        for number, images in enumerate(batches):
            features = rows(self.net_g.quantized(images.to(self.device))[0])
            drawn = drawn + self.drawn_from(features, current_iter, number, len(batches))
        self.code_vectors.copy_(self.summed(drawn))
        self.follow_from_here()
        self.drawn = True

    def drawn_from(self, features, current_iter, number=0, count=1):
        """One feature for every code, a function of seed and iteration, as far as these features have it.

        The features of all processes and micro-batches are numbered as if they were one batch: whoever has not got the
        one that is drawn gives 0, and the sum over all is the draw.

        Args:
            features: (N, embed_dim), N being the same everywhere.
            number, count: which of how many micro-batches they are of.
        """
        processes, rank = self.opt.get('world_size', 1), self.opt.get('rank', 0)
        draw = generator(self.device, self.opt.get('manual_seed') or 0, 'codes', current_iter)
        total, first = len(features) * processes * count, (number * processes + rank) * len(features)
        chosen = torch.randint(total, (len(self.code_vectors),), generator=draw, device=self.device) - first
        ours = (chosen >= 0) & (chosen < len(features))
        return torch.where(ours[:, None], features[chosen.clamp(0, len(features) - 1)], 0)

    def summed(self, tensor):
        """The sum over all processes, in place."""
        if self.opt.get('dist'):
            torch.distributed.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def update_codes(self, features, indices, current_iter):
        """Move the codes towards their features and draw the unused ones anew, without a look from the host.

        All micro-batches of an iteration are added up, on all processes; after the last one the codes move.

        Args:
            features: (N, embed_dim), detached or not.
            indices: (N,) the code of each.
        """
        codes = torch.arange(len(self.code_vectors), device=self.device)
        assigned = (indices == codes[:, None]).to(features.dtype)
        found = [assigned.sum(1), assigned @ features]
        if self.restart_after:
            found.append(self.drawn_from(features, current_iter, self.steps.micro, self.steps.accum_iter))
        self.seen = found if self.seen is None else [before + now for before, now in zip(self.seen, found)]
        if not self.steps.due:
            return
        (sizes, sums, *drawn), self.seen = map(self.summed, self.seen), None
        # A step that was left out moves no code: features that are no numbers are replaced by the codes themselves.
        ok = torch.as_tensor(self.steps.ok, device=self.device)
        sums = torch.where(ok, sums, sizes[:, None] * self.code_vectors)
        self.code_sizes.lerp_(sizes, 1 - self.decay)
        self.code_sums.lerp_(sums, 1 - self.decay)
        self.idle = torch.where(sizes > 0, 0, self.idle + 1)
        # A code that nobody has used for long keeps its place: its averages are close to 0 / 0.
        moved = self.code_sums / self.code_sizes.clamp(min=1e-3)[:, None]
        moved = torch.where(self.code_sizes[:, None] > 1e-3, moved, self.code_vectors)
        if self.restart_after:
            dead = (self.idle > 0) & (self.idle % self.restart_after == 0)
            drawn = torch.where(ok, drawn[0], self.code_vectors)
            moved = torch.where(dead[:, None], drawn, moved)
            self.code_sums = torch.where(dead[:, None], drawn, self.code_sums)
            self.code_sizes = torch.where(dead, torch.ones_like(self.code_sizes), self.code_sizes)
        self.code_vectors.copy_(moved)

    @torch.no_grad()
    def test(self):
        net = getattr(self, 'net_g_ema', self.net_g)
        val = self.opt.get('val') or {}

        def reconstruct(x):
            _, z_q, indices = net.quantized(x)
            if self.codes_seen is not None:
                self.codes_seen += torch.bincount(indices.flatten(), minlength=len(self.codes_seen))
            return net.decode(z_q)

        training = net.training
        net.eval()
        sizes = {key: val.get(key) for key in VAL_KEYS}
        sizes['window_size'] = 2 ** (net.num_levels - 1)
        self.output = infer(reconstruct, self.lq, 1, **sizes)
        net.train(training)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        """The metrics of ``val.metrics`` between reconstruction and image, and how the codes are used over the set."""
        codes = len(self.net_g.quantize.embedding.weight)
        self.codes_seen = torch.zeros(codes, dtype=torch.int64, device=self.device)
        evaluation.validate(self, dataloader, current_iter, tb_logger, save_img)
        if self.opt.get('dist'):
            torch.distributed.all_reduce(self.codes_seen)
        used, spread = int((self.codes_seen > 0).sum()), float(perplexity(self.codes_seen))
        self.codes_seen = None
        name = dataloader.dataset.opt['name']
        get_root_logger().info(
            f'Validation {name}: {used} of {codes} codes used ({used / codes:.1%}), perplexity {spread:.1f}'
        )
        if tb_logger is not None:
            tb_logger.add_scalar(f'metrics/{name}/code_usage', used / codes, current_iter)
            tb_logger.add_scalar(f'metrics/{name}/perplexity', spread, current_iter)

    def extra_state(self):
        """What a training state must hold besides BasicSR's entries: the codes' moving averages and idle times."""
        return {'code_sizes': self.code_sizes, 'code_sums': self.code_sums, 'idle': self.idle, 'drawn': self.drawn}

    def load_extra_state(self, state):
        self.follow_from_here()  # the network was loaded before
        self.drawn = state.get('drawn', True)
        for key in ('code_sizes', 'code_sums', 'idle'):
            if key in state:
                getattr(self, key).copy_(state[key])


def rows(features):
    """(B, C, h, w) to (B*h*w, C), in the order of the code numbers."""
    return features.detach().permute(0, 2, 3, 1).flatten(0, 2)


def perplexity(counts):
    """exp of the entropy of the frequencies that non-negative counts (K,) give; 1 to K."""
    frequencies = counts / counts.sum().clamp(min=1e-9)
    return torch.special.entr(frequencies).sum().exp()

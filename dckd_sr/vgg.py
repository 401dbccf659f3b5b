"""Features of a frozen VGG19, for the methods that compare images by them; never with random weights."""

from __future__ import annotations

import os

import torch
from basicsr.archs.vgg_arch import NAMES, VGG_PRETRAIN_PATH
from torch import nn
from torchvision.models import vgg

from dckd_sr.checkpoint import fitting, read_weights
from dckd_sr.errors import UserError

LAYERS = NAMES['vgg19']  # relu1_1 and so on; conv5_4 is before its ReLU


def vgg_places(vgg_type: str = 'vgg19') -> tuple[list[str], str]:
    """Where BasicSR, and we, look for torchvision's weights of a VGG, and the address that they come from."""
    url = getattr(vgg, f'{vgg_type.upper()}_Weights').IMAGENET1K_V1.url
    places = [VGG_PRETRAIN_PATH] if vgg_type == 'vgg19' else []
    return [*places, os.path.join(torch.hub.get_dir(), 'checkpoints', url.rpartition('/')[2])], url


class VGGFeatures(nn.Module):
    """Layers of VGG19, frozen.

    Args:
        layers: names out of `LAYERS`; the network ends at the last of them.
        normalise: images in [0, 1] are brought to ImageNet's mean and deviation first; else they enter as they are.
        pretrain: file with torchvision's weights, or None for the places of `vgg_places`.
        allow_random: random weights where there is no file; for tests.

    Raises:
        UserError: no file, or one that is not VGG19's.
    """

    def __init__(self, layers, normalise=True, pretrain=None, allow_random=False):
        super().__init__()
        places, url = vgg_places()
        path = pretrain or next((place for place in places if os.path.isfile(place)), None)
        if path is None and not allow_random:
            raise UserError(f'no weights of vgg19 at {" or ".join(places)}; download them from {url}')
        self.names = list(layers)
        last = max(LAYERS.index(name) for name in self.names)
        with torch.device('meta'):  # whose classifier would fill 0.5 GB
            features = vgg.vgg19(weights=None).features[: last + 1]
        self.features = features.to_empty(device='cpu')
        if path is not None:
            self._load(path)
        else:
            with torch.random.fork_rng(devices=[]):
                for module in self.features:
                    if isinstance(module, nn.Conv2d):
                        module.reset_parameters()
        mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if normalise else ([0.0], [1.0])
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer('deviation', torch.tensor(deviation).view(1, -1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def _load(self, path):
        weights, used = read_weights(path)
        own = {f'features.{key}': value for key, value in self.features.state_dict().items()}
        weights, _ = fitting(weights, own)
        wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
        if wrong:
            missing = ', '.join(wrong[:3])
            raise UserError(f'{path} ({used}) is not vgg19 of torchvision: {missing} missing or of another shape')
        self.features.load_state_dict({key[len('features.') :]: weights[key] for key in own})

    def train(self, mode=True):
        """Frozen: always in eval mode."""
        return super().train(False)

    def forward(self, images):
        """(B, 3, h, w), or (B, 1, h, w) of gray images, to the list of the layers' outputs in their order."""
        h = (images.expand(-1, 3, -1, -1) - self.mean) / self.deviation
        found = {}
        for name, layer in zip(LAYERS, self.features):
            h = layer(h)
            if name in self.names:
                found[name] = h.clone() if name.startswith('conv') else h  # ReLUs write in place
        return [found[name] for name in self.names]

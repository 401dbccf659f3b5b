"""VGG19's layers against BasicSR's extractor, and where its weights come from."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from basicsr.archs import vgg_arch
from torch import nn

from dckd_sr.errors import UserError
from dckd_sr.vgg import LAYERS, VGGFeatures, vgg_places

SMALL = ['conv1_1', 'relu1_2']  # 40000 numbers


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """torch's folder of downloads is empty."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


def weights_of(net):
    """The entries of torchvision's file that a network has."""
    return {f'features.{key}': value.clone() for key, value in net.features.state_dict().items()}


@pytest.mark.parametrize('normalise', [True, False])
def test_layers_equal_those_of_basicsr(normalise, monkeypatch):
    names = ['relu3_1', 'conv1_1', 'relu1_1', 'pool2', 'conv4_4']  # conv1_1 is followed by a ReLU in place
    net = VGGFeatures(names, normalise, allow_random=True)
    built = SimpleNamespace(features=net.features)
    monkeypatch.setattr(vgg_arch, 'vgg', SimpleNamespace(vgg19=lambda **_: built))
    theirs = vgg_arch.VGGFeatureExtractor(names, use_input_norm=normalise)
    images = torch.rand(2, 3, 32, 32)
    wanted = theirs(images)
    found = net(images)
    assert [tuple(value.shape[1:]) for value in found] == [
        (256, 8, 8),
        (64, 32, 32),
        (64, 32, 32),
        (128, 8, 8),
        (512, 4, 4),
    ]
    assert all(torch.equal(value, wanted[name]) for name, value in zip(names, found))
    assert found[1].min() < 0 <= found[2].min() and len(net.features) == LAYERS.index('conv4_4') + 1


def test_gray_images_are_three_equal_channels():
    net, gray = VGGFeatures(SMALL, allow_random=True), torch.rand(1, 1, 8, 8)
    assert torch.equal(net(gray)[1], net(gray.repeat(1, 3, 1, 1))[1])


def test_it_is_frozen_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    net = VGGFeatures(SMALL, allow_random=True).train()
    assert torch.equal(before, torch.get_rng_state())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    net(image)[-1].sum().backward()
    assert image.grad.abs().max() > 0


def test_weights_come_from_the_file_or_one_of_two_places(no_cache):
    net = VGGFeatures(SMALL, allow_random=True)
    weights = weights_of(net)
    extra = {'features.2.weight': torch.ones(64, 64, 3, 3), 'classifier.0.weight': torch.zeros(2)}
    places = [
        Path('experiments/pretrained_models/vgg19-dcbb9e9d.pth'),
        no_cache / 'vgg19-dcbb9e9d.pth',
        Path('own.pth'),
    ]
    assert [str(place) for place in places[:2]] == vgg_places()[0]
    for factor, place in enumerate(reversed(places)):  # from the last resort to the first choice
        pretrain = str(place) if place.name == 'own.pth' else None
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**extra, **{key: factor * value for key, value in weights.items()}}, place)
        found = VGGFeatures(SMALL, pretrain=pretrain, allow_random=True)
        for layer, own in zip(found.features, net.features):
            if isinstance(layer, nn.Conv2d):
                assert torch.equal(layer.weight, factor * own.weight) and torch.equal(layer.bias, factor * own.bias)


def test_files_that_are_not_there_or_of_another_network(no_cache):
    with pytest.raises(UserError, match='no weights of vgg19 at experiments.*hub.*; download them from https://'):
        VGGFeatures(SMALL)
    weights = weights_of(VGGFeatures(SMALL, allow_random=True))
    del weights['features.2.weight']
    weights['features.0.bias'] = torch.zeros(3)
    torch.save(weights, 'other.pth')
    message = (
        r'other.pth .* is not vgg19 of torchvision: features.0.bias, features.2.weight missing or of another shape'
    )
    with pytest.raises(UserError, match=message):
        VGGFeatures(SMALL, pretrain='other.pth')

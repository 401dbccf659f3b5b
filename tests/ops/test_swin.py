"""SwinIR's masks: BasicSR's values at every size, made once for a size and on the device."""

import copy
import warnings

import pytest
import torch
from basicsr.archs import build_network
from basicsr.archs.swinir_arch import SwinTransformerBlock
from small_run import SWINIR

from dckd_sr.ops import swin

BASICSRS = SwinTransformerBlock.calculate_mask.__wrapped__
SIZES = [(8, 8), (8, 40), (24, 16), (16, 16), (40, 24)]  # the fourth is img_size


@pytest.fixture(autouse=True)
def kept():
    """What is kept, of this test alone."""
    swin._kept.clear()
    yield swin._kept
    swin._kept.clear()


def network(**options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return build_network({**SWINIR, **options}).eval()


@pytest.mark.parametrize('side', [2, 3, 7, 8])
def test_equal_to_basicsrs(side):
    for shift in range(side):
        block = SwinTransformerBlock(4, (2 * side, 2 * side), 2, window_size=side, shift_size=shift)
        for height in range(side, 5 * side, side):
            for width in range(side, 5 * side, side):
                found = block.calculate_mask((height, width))
                assert torch.equal(found, BASICSRS(block, (height, width))) and found.dtype == torch.float32


@pytest.mark.parametrize('training', [False, True])
def test_networks_give_what_they_gave(training, monkeypatch):
    net = network().train(training)
    images = [torch.rand(2, 3, *size) for size in SIZES * 2]

    def results():
        torch.manual_seed(1)  # of the paths that training drops
        outs = [net(image) for image in images]
        sum(out.square().sum() for out in outs).backward()
        gradients = [parameter.grad.clone() for parameter in net.parameters()]
        net.zero_grad()
        return [*outs, *gradients]

    found = results()
    monkeypatch.setattr(SwinTransformerBlock, 'calculate_mask', BASICSRS)
    assert all(map(torch.equal, found, results()))


def test_made_once_for_a_size(kept, monkeypatch):
    made, make = [], swin.mask
    monkeypatch.setattr(swin, 'mask', lambda *arguments: made.append(arguments[:4]) or make(*arguments))
    student, teacher = network(), network(depths=[2, 2, 2], num_heads=[2, 2, 2])
    for size in SIZES * 3:
        with torch.inference_mode():
            student(torch.rand(1, 3, *size)), teacher(torch.rand(1, 3, *size))
    assert made == [(*size, 8, 4) for size in SIZES if size != (16, 16)]
    student.train()(torch.rand(1, 3, 8, 40)).sum().backward()  # what inference mode has made
    assert len(made) == 4 and student.conv_first.weight.grad is not None


def test_few_are_kept(kept, monkeypatch):
    like = torch.zeros(())
    monkeypatch.setattr(swin, '_LARGEST', 3 * swin.mask(64, 64, 8, 4, like).nbytes)
    for height in range(8, 400, 8):
        swin.shared_mask(height, 64, 8, 4, like)
        swin.shared_mask(height, 64, 8, 0, like)
    assert sum(found.untyped_storage().nbytes() for found in kept.values()) <= swin._LARGEST
    latest = swin.shared_mask(800, 800, 8, 4, like)  # alone more than that
    assert latest.nbytes > swin._LARGEST and [*kept.values()] == [latest]
    assert swin.shared_mask(800, 800, 8, 4, like) is latest


def test_what_is_saved_is_a_blocks_own():
    net, before = network(), list(swin._kept)
    masks = [module.attn_mask for module in net.modules() if getattr(module, 'attn_mask', None) is not None]
    assert len({found.data_ptr() for found in masks}) == len(masks) == 2 and before == []
    assert [key for key in net.state_dict() if 'mask' in key] == [
        f'layers.{i}.residual_group.blocks.1.attn_mask' for i in (0, 1)
    ]


def test_a_network_in_half_precision_takes_any_size():
    """BasicSR's masks are float32, so that such a network failed at every size but img_size."""
    net, image = network(), torch.rand(1, 3, 24, 40)
    half = copy.deepcopy(net).bfloat16()(image.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), net(image), atol=0.05, rtol=0)


def test_no_wait_for_a_device(gpu, kept):
    net = network().to('cuda')
    gpu.found.clear()
    for size in SIZES:
        assert net(torch.rand(1, 3, *size, device='cuda')).is_cuda
    assert not gpu.found and not kept  # fakes are of no use to others


def test_compiled_and_recorded_networks_make_their_own(kept):
    net, image, inputs = network(), torch.rand(1, 3, 24, 40), []

    def backend(module, examples):
        inputs.append([example.shape for example in examples])
        return module

    compiled = torch.compile(net, backend=backend, dynamic=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.equal(compiled(image), compiled(image))
        traced = torch.jit.trace(net, image, check_trace=False)
        assert not kept and len(inputs) == 1 and (15, 64, 64) not in inputs[0]
        for out in (compiled(image), traced(image)):
            torch.testing.assert_close(out, net(image), atol=1e-6, rtol=0)
    assert len(kept) == 2

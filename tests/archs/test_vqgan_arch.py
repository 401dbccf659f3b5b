"""VQGAN against the authors' numbers, the public checkpoint's layout, and a plain reference for everything else."""

import golden_data
import pytest
import torch
from basicsr.archs import build_network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import dckd_sr  # noqa: F401
from dckd_sr.archs.vqgan_arch import VQGAN
from dckd_sr.errors import UserError


def ddconfig(**changes):
    base = {
        'in_channels': 3,
        'out_ch': 3,
        'resolution': 16,
        'ch': 32,
        'ch_mult': [1, 1, 2],
        'num_res_blocks': 2,
        'attn_resolutions': [4],
        'z_channels': 8,
        'dropout': 0.0,
        'double_z': False,
    }
    return {**base, **changes}


def small(input_range=(0, 1), decoder=False, **changes):
    net = VQGAN(4, 16, ddconfig(**changes), input_range=input_range, decoder=decoder).eval()
    torch.nn.init.normal_(net.quantize.embedding.weight)
    return net


# Plain reference: torch functions on a state dict, written from the paper's appendix and the layout of the keys.


def norm(w, key, x):
    return F.group_norm(x, 32, w[f'{key}.weight'], w[f'{key}.bias'], 1e-6)


def conv(w, key, x):
    weight = w[f'{key}.weight']
    return F.conv2d(x, weight, w[f'{key}.bias'], padding=weight.shape[-1] // 2)


def swish(x):
    return x / (1 + torch.exp(-x))


def block(w, key, x):
    h = conv(w, f'{key}.conv1', swish(norm(w, f'{key}.norm1', x)))
    h = conv(w, f'{key}.conv2', swish(norm(w, f'{key}.norm2', h)))
    return h + (conv(w, f'{key}.nin_shortcut', x) if f'{key}.nin_shortcut.weight' in w else x)


def attention(w, key, x):
    h = norm(w, f'{key}.norm', x)
    q, k, v = (conv(w, f'{key}.{name}', h).flatten(2) for name in 'qkv')
    scores = torch.einsum('bci,bcj->bij', q, k) / x.shape[1] ** 0.5
    mixed = torch.einsum('bij,bcj->bci', scores.softmax(2), v)
    return x + conv(w, f'{key}.proj_out', mixed.view_as(x))


def middle(w, key, x):
    return block(w, f'{key}.block_2', attention(w, f'{key}.attn_1', block(w, f'{key}.block_1', x)))


def reference_encode(w, x, levels, blocks, attended):
    h, found = conv(w, 'encoder.conv_in', x), []
    for i in range(levels):
        for j in range(blocks):
            h = block(w, f'encoder.down.{i}.block.{j}', h)
            if j == 0:
                found.append(h)
            if i in attended:
                h = attention(w, f'encoder.down.{i}.attn.{j}', h)
        if i + 1 < levels:
            # Padding on all sides and skipping the first row and column: the same as padding on two sides only.
            padded = F.pad(h, (0, 1, 0, 1))
            key = f'encoder.down.{i}.downsample.conv'
            h = F.conv2d(padded, w[f'{key}.weight'], w[f'{key}.bias'], stride=2)
    h = norm(w, 'encoder.norm_out', middle(w, 'encoder.mid', h))
    return found, conv(w, 'quant_conv', conv(w, 'encoder.conv_out', swish(h)))


def reference_decode(w, z, levels, blocks, attended):
    h = middle(w, 'decoder.mid', conv(w, 'decoder.conv_in', conv(w, 'post_quant_conv', z)))
    for i in range(levels - 1, -1, -1):
        for j in range(blocks + 1):
            h = block(w, f'decoder.up.{i}.block.{j}', h)
            if i in attended:
                h = attention(w, f'decoder.up.{i}.attn.{j}', h)
        if i > 0:
            h = conv(w, f'decoder.up.{i}.upsample.conv', h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(w, 'decoder.conv_out', swish(norm(w, 'decoder.norm_out', h)))


@torch.no_grad()
def test_released_features_and_codes():
    data, config = golden_data.arrays('vqgan_small')
    net = golden_data.fill.fill_(build_network({'type': 'VQGAN', **config['arch']})).eval()
    x = golden_data.fill.image((2, 3, 64, 64), 0)
    found = net(x)
    assert len(found.levels) == 5
    for i, level in enumerate(found.levels):
        torch.testing.assert_close(level, torch.from_numpy(data[f'feas_{i}']), rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(found.logits.softmax(1), torch.from_numpy(data['encode']), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.encode(x), torch.from_numpy(data['encode']), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.quantized(x)[0], torch.from_numpy(data['z']), rtol=1e-4, atol=5e-5)
    for level, (one, two) in zip(found.levels, net.get_feas([x[:1], x[1:]])):
        torch.testing.assert_close(torch.cat([one, two]), level, rtol=1e-4, atol=5e-5)


def shapes(net):
    return {key: list(value.shape) for key, value in net.state_dict().items()}


def test_layout_of_the_public_checkpoint():
    public = golden_data.manifest('taming_vqgan_f16_1024')['keys']
    released = golden_data.manifest('dckd_vqgan')['variants']
    with torch.device('meta'):
        for variant in released.values():
            config = {key: variant['config'][key] for key in ('embed_dim', 'n_embed', 'ddconfig')}
            assert shapes(VQGAN(**config)) == variant['keys']
        whole = VQGAN(**released['released_yml']['config'], decoder=True)
    assert shapes(whole) == {key: shape for key, shape in public.items() if not key.startswith('loss.')}


CASES = [
    ({}, (2,), (16, 16)),
    ({'ch_mult': [2]}, (), (5, 6)),
    ({'ch_mult': [1, 2, 1, 2, 1, 1], 'resolution': 32, 'attn_resolutions': [16, 2]}, (1, 4), (32, 64)),
    ({'num_res_blocks': 1, 'attn_resolutions': [16, 8, 4], 'out_ch': 1}, (0, 1, 2), (12, 20)),
]


@pytest.mark.parametrize('changes, attended, size', CASES)
@torch.no_grad()
def test_equals_the_plain_reference(changes, attended, size):
    net = small(decoder=True, **changes).double()
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    weights, config = net.state_dict(), ddconfig(**changes)
    structure = (len(config['ch_mult']), config['num_res_blocks'], attended)
    assert net.num_levels == structure[0]
    x = torch.rand(2, 3, *size, dtype=torch.float64)

    levels, z = reference_encode(weights, x, *structure)
    codes = weights['quantize.embedding.weight']
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    distances = torch.stack([(rows - code).square().sum(1) for code in codes], 1)

    found = net(x)
    for level, expected in zip(found.levels, levels):
        torch.testing.assert_close(level, expected)
    torch.testing.assert_close(found.logits.softmax(1), (-distances).softmax(1))
    constant = found.logits + distances
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))

    features, z_q, indices = net.quantized(x)
    torch.testing.assert_close(features, z)
    assert torch.equal(indices, distances.argmin(1).view(2, *z.shape[2:]))
    assert torch.equal(z_q, codes[indices].permute(0, 3, 1, 2))
    torch.testing.assert_close(net.decode(z_q), reference_decode(weights, z_q, *structure))
    torch.testing.assert_close(net.reconstruct(x), net.decode(z_q))


def test_images_enter_and_leave_in_the_stated_range():
    plain, centred = small(decoder=True), small(input_range=[-1, 1], decoder=True)
    centred.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(centred(x).levels, plain(2 * x - 1).levels)
    torch.testing.assert_close(centred.encode(x), plain.encode(2 * x - 1))
    z_q = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(2 * centred.decode(z_q) - 1, plain.decode(z_q))
    with pytest.raises(UserError, match=r'\[0, 255\]'):
        small(input_range=[0, 255])


class Seen:
    """Batch sizes that the named modules were called with."""

    def __init__(self, net):
        self.batch = {}
        for name, module in net.named_modules():
            module.register_forward_hook(lambda _, inputs, __, name=name: self.batch.update({name: len(inputs[0])}))


def test_gray_images_enter_as_three_equal_channels():
    net, gray = small(), torch.rand(2, 1, 16, 16)
    found, wanted = net(gray), net(gray.repeat(1, 3, 1, 1))
    assert torch.equal(found.logits, wanted.logits) and all(map(torch.equal, found.levels, wanted.levels))


def test_one_pass_that_ends_early():
    net = small()
    x = torch.rand(3, 3, 16, 16)
    whole = net(x)
    seen = Seen(net)

    def run(**asked):
        seen.batch.clear()
        return net(x, **asked)

    found = run(codes=False)
    assert found.logits is None and 'encoder.down.2.block.0' in seen.batch
    assert not {'encoder.down.2.attn.0', 'encoder.down.2.block.1', 'encoder.mid.block_1', 'quantize'} & set(seen.batch)
    assert len(found.levels) == 3 and all(torch.equal(a, b) for a, b in zip(found.levels, whole.levels))

    found = run(codes=False, num_levels=2)
    assert len(found.levels) == 2 and torch.equal(found.levels[1], whole.levels[1])
    assert 'encoder.down.1.block.1' not in seen.batch and 'encoder.down.2.block.0' not in seen.batch

    found = run(levels=False)
    assert found.levels is None and torch.equal(found.logits, whole.logits)

    found = run(codes=2)  # all levels of all images, codes of the first two
    assert seen.batch['encoder.down.2.block.0'] == 3 and seen.batch['encoder.mid.block_1'] == 2
    assert [len(level) for level in found.levels] == [3, 3, 3] and found.logits.shape == (2 * 16, 16)
    torch.testing.assert_close(found.logits, whole.logits[: 2 * 16])

    found = run(codes=1, num_levels=1)
    assert seen.batch['encoder.down.0.block.0'] == 3 and seen.batch['encoder.down.0.block.1'] == 1
    torch.testing.assert_close(found.logits, whole.logits[:16])

    found = run(levels=False, codes=1)
    assert seen.batch['encoder.conv_in'] == 1
    torch.testing.assert_close(found.logits, whole.logits[:16])

    with pytest.raises(ValueError, match='neither'):
        net(x, levels=False, codes=False)


@pytest.mark.parametrize('height, width', [(1, 1), (2, 3), (3, 33), (17, 50), (37, 8)])
@torch.no_grad()
def test_images_of_any_size(height, width):
    net = small(decoder=True)
    x = torch.rand(1, 3, height, width)
    found = net(x)
    sides = [(height, width)]
    for _ in range(2):
        sides.append(tuple(max(side // 2, 1) for side in sides[-1]))
    assert [tuple(level.shape[2:]) for level in found.levels] == sides
    assert found.logits.shape == (sides[-1][0] * sides[-1][1], 16)
    assert all(level.isfinite().all() for level in found.levels) and found.logits.isfinite().all()
    assert net.reconstruct(x).shape == x.shape


def test_gradients():
    net = small(decoder=True)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    net(x, levels=False).logits.square().sum().backward()
    assert x.grad.abs().min() > 0
    z, z_q, _ = net.quantized(x)
    used = torch.autograd.grad(z_q.square().sum(), net.quantize.embedding.weight, retain_graph=True)[0]
    assert used.abs().sum() > 0
    assert torch.autograd.grad(z_q.sum(), net.encoder.conv_in.weight, allow_unused=True) == (None,)
    assert torch.autograd.grad(z.square().sum(), net.encoder.conv_in.weight)[0].abs().sum() > 0


def test_codes_are_decided_in_full_precision():
    net = small()
    x = torch.rand(1, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16):
        found = net(x)
    assert found.levels[1].dtype == torch.bfloat16 and found.logits.dtype == torch.float32
    z = torch.randn(1, 4, 2, 2).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        half = net.quantize(z)
    assert torch.equal(half, net.quantize(z.float()))


def test_waits_for_no_device():
    """Fake tensors have no values: reading one on the host would fail."""
    with FakeTensorMode():
        net = VQGAN(4, 16, ddconfig(), input_range=(-1, 1), decoder=True)
        x = torch.empty(2, 3, 19, 16)
        assert net(x, codes=1).logits.shape == (16, 16)
        assert net.reconstruct(x).shape == x.shape


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'chmult': [1]}, r"no key 'chmult' \(did you mean 'ch_mult'\?\)"),
        ({'double_z': True}, 'double_z'),
        ({'resamp_with_conv': False}, 'resamp_with_conv'),
        ({'ch': 24}, 'multiples of 32'),
        ({'ch_mult': []}, 'at least one'),
        ({'num_res_blocks': 0}, 'at least one'),
    ],
)
def test_mistakes_in_ddconfig(changes, message):
    for kind in (UserError, TypeError):
        with pytest.raises(kind, match=message):
            small(**changes)


def test_missing_ddconfig_keys_are_named():
    config = ddconfig()
    del config['z_channels'], config['resolution'], config['dropout']
    with pytest.raises(UserError, match='lacks z_channels, resolution$'):
        VQGAN(4, 16, config)

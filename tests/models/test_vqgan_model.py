"""Codebook training: gradients, moving averages and restarts against slow references, and whole runs."""

import logging
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dckd_sr import checkpoint, train
from dckd_sr.errors import UserError
from dckd_sr.models.vqgan_model import Autoencoder, perplexity, rows
from dckd_sr.train import build_model

OPTIONS = Path(__file__).resolve().parents[2] / 'options'
DDCONFIG = {'double_z': False, 'z_channels': 32, 'resolution': 16, 'in_channels': 3, 'out_ch': 3, 'ch': 32}
DDCONFIG.update({'ch_mult': [1, 1], 'num_res_blocks': 1, 'attn_resolutions': [], 'dropout': 0.0})


def options(folder='.', **changes):
    network = {'type': 'VQGAN', 'decoder': True, 'embed_dim': 8, 'n_embed': 16, 'ddconfig': DDCONFIG}
    opt = {'name': 'codes', 'model_type': 'VQGANModel', 'scale': 1, 'num_gpu': 0, 'manual_seed': 3, 'is_train': True}
    opt.update({'dist': False, 'rank': 0, 'world_size': 1, 'network_g': network})
    folders = {key: str(Path(folder) / key) for key in ('models', 'training_states', 'visualization')}
    opt['path'] = {**folders, **changes.pop('path', {})}
    opt['train'] = {
        'optim_g': {'type': 'Adam', 'lr': 1e-3},
        'scheduler': {'type': 'MultiStepLR', 'milestones': []},
        'pixel_opt': {'type': 'L1Loss'},
        'commit_opt': {'type': 'MSELoss', 'loss_weight': 0.25},
        **changes.pop('train', {}),
    }
    opt['val'] = {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}}
    return {**opt, **changes}


def images(count=4, size=16, seed=0):
    """Smooth random colour patches: a few large-scale waves each."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=draw)
    return torch.nn.functional.interpolate(small, size=(size, size), mode='bicubic').clamp(0, 1)


def run(model, first, last):
    for i in range(first, last + 1):
        model.feed_data({'lq': None, 'gt': images(seed=i)})
        model.optimize_parameters(i)
    return model.get_current_log()


def test_the_gradient_passes_straight_through():
    model = build_model(options())
    run(model, 1, 1)
    net, x = model.net_g, images()
    output, z, z_q, indices = Autoencoder(net)(x)
    with torch.no_grad():
        assert torch.allclose(output, net.decode(net.quantized(x)[1]), atol=1e-5)
    ours = torch.autograd.grad(output.square().sum(), net.quant_conv.weight)[0]
    leaf = z_q.detach().requires_grad_()
    at_codes = torch.autograd.grad(net.decode(leaf).square().sum(), leaf)[0]
    theirs = torch.autograd.grad(net.quantized(x)[0], net.quant_conv.weight, at_codes)[0]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())
    assert torch.equal(rows(z)[5], z[0, :, 0, 5]) and indices.flatten()[5] == indices[0, 0, 5]


def test_terms_are_the_losses_named():
    model = build_model(options())
    model.feed_data({'gt': images(seed=1)})
    model.draw_all(1)
    with torch.no_grad():
        z, z_q, _ = model.net_g.quantized(model.gt)
        l_pix = (model.net_g.decode(z_q) - model.gt).abs().mean()
        l_commit = 0.25 * (z - z_q).square().mean()
    model.optimize_parameters(1)
    log = model.get_current_log()
    assert list(log) == ['l_pix', 'l_commit', 'code_usage', 'perplexity']
    assert log['l_pix'] == pytest.approx(float(l_pix), rel=1e-5)
    assert log['l_commit'] == pytest.approx(float(l_commit), rel=1e-4)


def test_codes_are_moving_averages_of_their_features():
    model = build_model(options(train={'codebook_decay': 0.9, 'restart_after': 0}))
    run(model, 1, 1)
    codes = model.code_vectors.detach().clone()
    sizes, sums = model.code_sizes.tolist(), model.code_sums.clone()
    draw = torch.Generator().manual_seed(1)
    for i in range(2, 6):
        features = torch.randn(50, 8, generator=draw)
        indices = torch.randint(0, 12, (50,), generator=draw)  # 12 to 15 stay unused
        model.update_codes(features, indices, i)
        for code in range(16):
            mine = [features[row] for row in range(50) if indices[row] == code]
            total = torch.stack(mine).sum(0) if mine else torch.zeros(8)
            sizes[code] = 0.9 * sizes[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * total
            codes[code] = sums[code] / sizes[code]
    assert torch.allclose(model.code_vectors, codes, atol=1e-5)
    assert model.idle.tolist()[12:] == [model.idle[12]] * 4 and model.idle[12] >= 4
    assert model.net_g.quantize.embedding.weight is model.code_vectors


def test_codes_unused_for_ever_keep_their_place():
    model = build_model(options(train={'codebook_decay': 0.5, 'restart_after': 0}))
    run(model, 1, 1)
    features, indices = torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)
    model.update_codes(features, indices, 2)
    before = model.code_vectors.detach().clone()
    for i in range(3, 300):
        model.update_codes(features, indices, i)
    assert torch.allclose(model.code_vectors[1:], before[1:], atol=1e-5)
    assert torch.allclose(model.code_vectors[0], features.mean(0), atol=1e-5)


def test_unused_codes_are_drawn_anew():
    def idle_run(seed, last):
        model = build_model(options(manual_seed=seed, train={'restart_after': 5}))
        model.drawn = True
        model.code_vectors.fill_(9.0)
        model.follow_from_here()
        for i in range(1, last + 1):
            features = torch.arange(160.0).view(20, 8) + 1000 * i
            model.update_codes(features, torch.zeros(20, dtype=torch.int64), i)
        return model, features

    model, _ = idle_run(0, 4)
    assert torch.allclose(model.code_vectors[1:], torch.full((15, 8), 9.0))
    model, features = idle_run(0, 5)
    anew = model.code_vectors[1:].detach()
    assert all(any(torch.equal(code, row) for row in features) for code in anew)
    assert not any(torch.equal(model.code_vectors[0], row) for row in features)
    assert len(anew.unique(dim=0)) > 5 and torch.equal(model.code_sums[1:], anew)
    assert torch.equal(idle_run(0, 5)[0].code_vectors, model.code_vectors)
    assert not torch.equal(idle_run(1, 5)[0].code_vectors, model.code_vectors)
    assert not torch.equal(model.drawn_from(features, 5), model.drawn_from(features, 6))
    # They stay for another five iterations, then again.
    assert torch.allclose(idle_run(0, 9)[0].code_vectors[1:], anew)
    assert model.idle.tolist() == [0] + [5] * 15
    model, features = idle_run(0, 10)
    assert all(any(torch.equal(code, row) for row in features) for code in model.code_vectors[1:].detach())


def test_the_first_batch_gives_the_codes(tmp_path):
    model = build_model(options(train={'codebook_decay': 1.0, 'restart_after': 0}))  # 1: the codes stay
    with torch.no_grad():
        features = rows(model.net_g.quantized(images(seed=1))[0])
    run(model, 1, 1)
    assert all(any(torch.allclose(code, row, atol=1e-5) for row in features) for code in model.code_vectors)
    codes = model.code_vectors.detach().clone()
    run(model, 2, 2)
    assert torch.allclose(model.code_vectors, codes)
    # A pretrained codebook is kept.
    torch.save({'params': model.net_g.state_dict()}, tmp_path / 'net.pth')
    pretrained = {'pretrain_network_g': str(tmp_path / 'net.pth')}
    again = build_model(options(path=pretrained, train={'codebook_decay': 1.0, 'restart_after': 0}))
    run(again, 7, 7)
    assert torch.allclose(again.code_vectors, codes)


def test_commitment_pulls_the_features_alone():
    model = build_model(options(train={'pixel_opt': {'type': 'L1Loss', 'loss_weight': 0}}))
    run(model, 1, 1)
    model.feed_data({'gt': images(seed=2)})
    z, z_q, _ = model.net_g.quantized(model.gt)
    expected = torch.autograd.grad(0.25 * (z - z_q.detach()).square().mean(), model.net_g.quant_conv.weight)[0]
    model.optimize_parameters(2)
    assert expected.abs().max() > 0
    assert torch.allclose(model.net_g.quant_conv.weight.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert model.code_vectors.grad is None


def test_updates_do_not_wait_for_the_device(monkeypatch):
    model = build_model(options(train={'restart_after': 1}))
    run(model, 1, 1)
    features, indices = torch.randn(20, 8), torch.zeros(20, dtype=torch.int64)

    def look(*_):
        raise AssertionError('the host looked at a tensor')

    for name in ('item', '__bool__', '__int__', '__float__', 'tolist', 'nonzero', '__index__'):
        monkeypatch.setattr(torch.Tensor, name, look)
    monkeypatch.setattr(torch, 'bincount', look)  # it reads its maximum
    model.update_codes(features, indices, 2)
    perplexity(model.code_sizes)


def test_perplexity():
    assert float(perplexity(torch.ones(16))) == pytest.approx(16, rel=1e-5)
    assert float(perplexity(torch.tensor([0, 7, 0]))) == pytest.approx(1)
    counts = torch.tensor([3.0, 1.0, 0.0])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(perplexity(counts)) == pytest.approx(expected, rel=1e-5)


def test_training_learns_and_uses_its_codes():
    model = build_model(options(train={'restart_after': 10}))
    first = run(model, 1, 1)
    last = run(model, 2, 30)
    assert last['l_pix'] < 0.6 * first['l_pix']
    assert last['code_usage'] > 0.6 and last['perplexity'] > 4


def test_only_the_codebook_is_left_to_the_averages():
    model = build_model(options(train={'ema_decay': 0.9}))
    trained = {id(p) for group in model.optimizer_g.param_groups for p in group['params']}
    left = [name for name, p in model.net_g.named_parameters() if id(p) not in trained]
    assert left == ['quantize.embedding.weight']
    before = {name: p.detach().clone() for name, p in model.net_g.named_parameters()}
    run(model, 1, 2)
    assert all(not torch.equal(p, before[name]) for name, p in model.net_g.named_parameters())
    assert not torch.equal(model.net_g_ema.quantize.embedding.weight, model.code_vectors)


def test_resume_continues_exactly(tmp_path):
    opt = options(tmp_path, train={'restart_after': 3, 'codebook_decay': 0.9}, auto_resume=True)
    opt['network_g']['n_embed'] = 200
    model = build_model(opt)
    run(model, 1, 4)
    model.save(0, 4)
    log = run(model, 5, 8)
    state, path = checkpoint.find_state(opt)
    torch.manual_seed(77)
    again = build_model(opt)
    checkpoint.resume(again, opt, state, path)
    assert again.idle.max() > 0
    assert run(again, 5, 8) == log
    for key, value in model.net_g.state_dict().items():
        assert torch.equal(value, again.net_g.state_dict()[key]), key


@pytest.mark.parametrize('size', [(16, 16), (23, 17), (1, 1)])
def test_reconstructions_have_the_images_size(size):
    model = build_model(options())
    x = torch.rand(1, 3, *size)
    model.feed_data({'gt': x})
    model.test()
    assert model.output.shape == x.shape and model.net_g.training
    if size == (16, 16):
        assert torch.allclose(model.output, model.net_g.reconstruct(x), atol=1e-6)


class Loader(list):
    """Batches of one image, with the attribute that BasicSR asks for."""

    class dataset:
        opt = {'name': 'Three'}


class Writer(dict):
    def add_scalar(self, name, value, iteration):
        self[name] = value, iteration


def test_validation_reports_the_codes_of_the_whole_set(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    model = build_model(options())
    run(model, 1, 3)
    sizes = ((16, 16), (16, 14), (18, 16))
    loader = Loader(
        {'lq': x, 'gt': x, 'lq_path': [f'{i}.png'], 'gt_path': [f'{i}.png']}
        for i, x in enumerate(torch.rand(1, 3, *size) for size in sizes)
    )
    writer = Writer()
    with caplog.at_level(logging.INFO, logger='basicsr'):
        model.validation(loader, 3, writer, False)
    with torch.no_grad():
        outputs = [model.net_g.quantized(batch['gt']) for batch in loader]
        images_out = [model.net_g.decode(z_q).clamp(0, 1) for _, z_q, _ in outputs]
    counts = torch.cat([indices.flatten() for _, _, indices in outputs]).bincount(minlength=16)
    errors = [
        ((out * 255).round() - (batch['gt'] * 255).round()).square().mean() for out, batch in zip(images_out, loader)
    ]
    psnr = np.mean([10 * math.log10(255**2 / float(error)) for error in errors])
    assert model.metric_results['psnr'] == pytest.approx(psnr, abs=1e-3)
    assert model.best_metric_results['Three']['psnr']['iter'] == 3
    used = int((counts > 0).sum())
    assert f'Validation Three: {used} of 16 codes used ({used / 16:.1%})' in caplog.text
    assert writer['metrics/Three/code_usage'] == (used / 16, 3)
    assert writer['metrics/Three/perplexity'][0] == pytest.approx(float(perplexity(counts)))
    assert model.codes_seen is None


def test_mistakes_are_named():
    opt = options()
    opt['network_g'] = {**opt['network_g'], 'decoder': False}
    with pytest.raises(UserError, match='decoder: true'):
        build_model(opt)
    model = build_model(options())
    model.feed_data({'gt': torch.rand(1, 3, 16, 15)})
    with pytest.raises(UserError, match=r'gt_size must be a multiple of 2'):
        model.optimize_parameters(1)


def _rank(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder}/meeting', rank=rank, world_size=2)
    opt = options(folder, dist=True, rank=rank, world_size=2, train={'restart_after': 0})
    opt['path']['pretrain_network_g'] = f'{folder}/net.pth'
    model = build_model(opt)
    for i in range(1, 3):
        model.feed_data({'gt': images(seed=i)[2 * rank : 2 * rank + 2]})
        model.optimize_parameters(i)
    results[rank] = {**model.get_current_log(), 'weights': {k: v.numpy() for k, v in model.net_g.state_dict().items()}}
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_both_batches(tmp_path):
    opt = options(train={'restart_after': 0})
    model = build_model(opt)
    run(model, 1, 1)
    torch.save({'params': model.net_g.state_dict()}, tmp_path / 'net.pth')
    opt['path']['pretrain_network_g'] = str(tmp_path / 'net.pth')
    model = build_model(opt)
    log = run(model, 1, 2)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (str(tmp_path), results), nprocs=2)
        ranks = [results[0], results[1]]
    for rank in ranks:
        for name, value in log.items():
            assert rank[name] == pytest.approx(value, rel=1e-4), name
        codes = model.code_vectors.detach().numpy()
        assert np.allclose(rank['weights']['quantize.embedding.weight'], codes, atol=1e-4)
    for key, value in ranks[0]['weights'].items():
        assert np.array_equal(value, ranks[1]['weights'][key]), key


@pytest.mark.parametrize('name', ['train_vqgan', 'demo/train_codebook'])
def test_option_files_run(tmp_path, name):
    """The shipped files, with another folder, smaller crops and a narrower network, through the real command."""
    for i in range(3):
        picture = (images(1, 80, i)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f'{i}.png'), picture)
    changes = [f'datasets:{part}:dataroot_{kind}={tmp_path}' for part in ('train', 'val') for kind in ('gt', 'lq')]
    changes += [
        'datasets:train:gt_size=32',
        'datasets:train:batch_size_per_gpu=2',
        'datasets:train:num_worker_per_gpu=0',
    ]
    changes += ['network_g:ddconfig:ch=32', 'network_g:ddconfig:num_res_blocks=1', 'num_gpu=0', 'train:total_iter=2']
    changes += ['name=short', 'logger:print_freq=1', 'logger:use_tb_logger=false']
    assert train.main(['-opt', str(OPTIONS / f'{name}.yml'), '--force_yml', *changes]) == 0
    log = next(Path('experiments/short').glob('*.log')).read_text()
    assert 'perplexity' in log and 'codes used' in log
    weights, used = checkpoint.read_weights('experiments/short/models/net_g_latest.pth')
    assert used == 'params' and 'quantize.embedding.weight' in weights

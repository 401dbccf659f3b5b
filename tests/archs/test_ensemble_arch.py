"""An ensemble against the mean of its networks, built one by one; in an option file, and in a run."""

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from option_files import dckd as released
from option_files import load, make_files, problems_of
from small_run import dckd_run, edsr, write

from dckd_sr import train
from dckd_sr.errors import UserError
from dckd_sr.inference import infer, padding_of

NAFNET = {'type': 'NAFNet', 'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]}
MSR = {'type': 'MSRResNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
SWINIR = {
    'type': 'SwinIR',
    'upscale': 2,
    'img_size': 8,
    'window_size': 8,
    'depths': [2],
    'embed_dim': 12,
    'num_heads': [2],
    'mlp_ratio': 2,
    'upsampler': 'pixelshuffledirect',
}


def saved(block, file, key='params'):
    """A network with random weights, which are written to a file."""
    net = build_network(dict(block)).eval()
    torch.save({key: net.state_dict()}, file)
    return net


def member(block, file, **more):
    return {**block, 'pretrain': file, **more}


def test_it_is_the_weighted_mean_of_networks_with_their_weights():
    nets = [saved(edsr(), 'a.pth'), saved(MSR, 'b.pth', 'params_ema'), saved(edsr(16), 'c.pth')]
    blocks = [
        member(edsr(), 'a.pth'),
        member(MSR, 'b.pth', param_key='params_ema'),
        {'type': 'spandrel', 'path': 'c.pth'},  # its type is told by the file
    ]
    x = torch.rand(2, 3, 6, 5)
    outputs = [net(x) for net in nets]
    assert (outputs[0] - outputs[1]).abs().mean() > 1e-3
    for weights, shares in ((None, [1 / 3] * 3), ([1, 2, 5], [0.125, 0.25, 0.625])):
        ensemble = build_network({'type': 'Ensemble', 'networks': blocks, 'weights': weights}).eval()
        wanted = sum(share * output for share, output in zip(shares, outputs))
        assert torch.allclose(ensemble(x), wanted, atol=1e-6)


def test_images_are_padded_for_all_of_its_networks():
    blocks = [{**SWINIR, 'allow_random': True}, {**edsr(), 'allow_random': True}]
    ensemble = build_network({'type': 'Ensemble', 'networks': blocks}).eval()
    assert padding_of(ensemble) == 8 and ensemble.padder_size == 1
    with torch.no_grad():
        x = torch.rand(1, 3, 10, 13)
        wanted = sum(infer(net, x, 2, window_size=8) for net in ensemble.networks) / 2
        assert torch.allclose(infer(ensemble, x, 2), wanted, atol=1e-6)
    halving = [
        {**NAFNET, 'allow_random': True},
        {**NAFNET, 'enc_blk_nums': [1], 'dec_blk_nums': [1], 'allow_random': True},
    ]
    assert build_network({'type': 'Ensemble', 'networks': halving}).padder_size == 4


def test_what_is_refused():
    def refused(networks, weights=None):
        with pytest.raises(UserError) as told:
            build_network({'type': 'Ensemble', 'networks': networks, 'weights': weights})
        return str(told.value)

    fine = {**edsr(), 'allow_random': True}
    assert refused([edsr()]) == 'networks.0 of an Ensemble has no weights: set its pretrain'
    assert 'positive weight for each' in refused([])
    assert 'positive weight for each' in refused([fine, fine], [1])
    assert 'positive weight for each' in refused([fine, fine], [1, 0])
    saved(edsr(16), 'other.pth')
    assert 'does not fit this EDSR' in refused([member(edsr(), 'other.pth')])


# ---------------------------------------------------------------------------------------------------------------------
# In option files


@pytest.fixture
def opt(tmp_path):
    """The released keys, with a teacher of two networks."""
    make_files(tmp_path)
    result = released()
    network = result['network_t']
    result['network_t'] = {
        'type': 'Ensemble',
        'networks': [member(network, 'teacher.pth'), {**member(network, 'teacher.pth'), 'param_key': 'params'}],
    }
    result['path']['pretrain_network_t'] = None
    return result


def test_a_file_needs_no_weights_besides(opt):
    resolved, warnings = load(opt)
    assert len(resolved['network_t']['networks']) == 2 and not any('network_t' in line for line in warnings)
    load(opt, 'network_t:weights=[1, 2.5]')
    # A test of the student does not need the teacher's files.
    opt['network_t']['networks'][0]['pretrain'] = 'no.pth'
    load(opt, 'path:pretrain_network_g=teacher.pth', is_train=False)


@pytest.mark.parametrize(
    ('changes', 'start', 'hint'),
    [
        ({'pretrain': 'no.pth'}, 'network_t.networks.1.pretrain = no.pth: no such file', ''),
        ({'pretrain': 'HR'}, 'network_t.networks.1.pretrain = HR: a folder, not a file', ''),
        ({'pretrain': None}, 'network_t.networks.1.pretrain: missing; a teacher needs trained weights', ''),
        ({'type': 'EDSRR'}, 'network_t.networks.1.type = EDSRR: no such arch', "did you mean 'EDSR'"),
        ({'type': None}, 'network_t.networks.1.type: missing; one of', 'EDSR'),
        ({'type': 'Ensemble'}, 'network_t.networks.1.type = Ensemble: an Ensemble cannot hold another', ''),
        ({'num_feats': 1}, 'network_t.networks.1.num_feats = 1: unknown argument of EDSR', "did you mean 'num_feat'"),
        ({'pretrian': 'x'}, 'network_t.networks.1.pretrian = x: unknown argument', "did you mean 'pretrain'"),
        ({'upscale': 2}, 'network_t.networks.1.upscale = 2: differs from scale = 4', ''),
        ({'num_out_ch': 1}, 'network_t.networks.1.num_out_ch = 1: network_g.num_out_ch = 3: another output', ''),
    ],
)
def test_mistakes_in_a_network(opt, changes, start, hint):
    opt['network_t']['networks'][1].update(changes)
    problems = problems_of(opt)
    assert len(problems) == 1 and problems[0].startswith(start) and hint in problems[0], problems


@pytest.mark.parametrize(
    ('override', 'start'),
    [
        ('network_t:networks=[]', 'network_t.networks = []: expected a list of blocks, one per network'),
        ('network_t:networks={type: EDSR}', 'network_t.networks = {"type": "EDSR"}: expected a list of blocks'),
        ('network_t:networks=[EDSR]', 'network_t.networks.0 = EDSR: expected a block of keys'),
        ('network_t={type: Ensemble}', 'network_t.networks: missing; Ensemble needs it'),
        ('network_t:weights=[1]', 'network_t.weights = [1]: expected 2 positive numbers, one per network'),
        ('network_t:weights=[1, 0]', 'network_t.weights = [1, 0]: expected 2 positive numbers'),
        ('network_t:weights=[a, 1]', 'network_t.weights = ["a", 1]: expected 2 positive numbers'),
        ('path:pretrain_network_t=teacher.pth', 'path.pretrain_network_t = teacher.pth: not for an Ensemble'),
        ('network_t:networks=[{type: spandrel, path: no.pth}]', 'network_t.networks.0.path = no.pth: no such file'),
        ('network_t:networks=[{type: zoo, name: EDSR_x9}]', 'network_t.networks.0.name = EDSR_x9: '),
    ],
)
def test_mistakes_in_the_block(opt, override, start):
    problems = problems_of(opt, override)
    assert len(problems) == 1 and problems[0].startswith(start), problems


def test_networks_of_the_zoo(opt):
    opt['network_t']['networks'] = [
        {'type': 'zoo', 'name': name} for name in ('EDSR-L_DIV2K_s48_x4', 'RCAN_DIV2K_s48_x4')
    ]
    edsr_file, rcan_file = problems_of(opt)  # which are not here
    assert edsr_file.startswith('network_t.networks.0.pretrain = experiments/pretrained_models/EDSR/EDSR_Lx4')
    assert rcan_file.startswith('network_t.networks.1.path = experiments/pretrained_models/RCAN/RCAN_BIX4.pt')
    assert all('python -m dckd_sr.zoo get' in line for line in (edsr_file, rcan_file))


def test_windows_of_a_network_decide_the_crop(opt):
    opt['network_t']['networks'][1] = {**SWINIR, 'upscale': 4, 'window_size': 7, 'pretrain': 'teacher.pth'}
    (problem,) = problems_of(opt)
    assert problem.startswith('datasets.train.gt_size = 192: expected a multiple of scale times network_t.networks.1.')


def test_a_run_is_taught_by_the_mean(tmp_path, capfd):
    opt = dckd_run(tmp_path)
    saved(edsr(16), 'one.pth'), saved(MSR, 'two.pth')
    opt['network_t'] = {'type': 'Ensemble', 'networks': [member(edsr(16), 'one.pth'), member(MSR, 'two.pth')]}
    opt['path'] = {}
    opt['train']['total_iter'] = 2
    assert train.main(['-opt', write(opt)]) == 0, capfd.readouterr()
    log = next((tmp_path / 'experiments/run').glob('train_*.log')).read_text()
    assert 'l_ts' in log and 'random weights' not in log and np.isfinite(float(log.split('l_cl: ')[1].split()[0]))

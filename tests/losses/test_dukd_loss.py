"""DUKD's terms on outputs that are given."""

import torch
from basicsr.losses import build_loss


def test_the_three_terms():
    criterion = build_loss({'type': 'UpcyclingLoss', 'loss_weight': 0.5})
    student, lq, teacher = (torch.rand(2, 3, 4, 5) for _ in range(3))
    student.requires_grad_()
    assert torch.allclose(criterion.zoomed_in(student, teacher), 0.5 * (student - teacher).abs().mean())
    wanted = 0.5 * ((student - lq).abs().mean() + (student - teacher).abs().mean())
    assert torch.allclose(criterion.zoomed_out(student, lq, teacher), wanted)
    criterion.zoomed_out(student, lq, teacher).backward()
    sign = torch.sign(student - lq) + torch.sign(student - teacher)
    assert torch.allclose(student.grad, 0.5 * sign / student.numel(), atol=1e-7)


def test_defaults_are_those_of_its_code():
    criterion = build_loss({'type': 'UpcyclingLoss'})
    assert (criterion.loss_weight, criterion.n_gt_sub, criterion.prob, criterion.zoom_out) == (1.0, 1, 0.3, True)

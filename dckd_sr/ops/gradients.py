"""How strongly, and where to, each term of a loss pulls: measuring it, and setting it where a weight cannot.

A ``loss_weight`` fits one encoder, one task and one part of a training: the gradient of an L1 loss shrinks as the
student learns, that of a ratio of features need not.
"""

import torch
import torch.distributed as dist


def with_shares(terms, output, shares, scaled=lambda loss: loss):
    """Replace terms by others, whose gradient at the network's output is a given part of that of the rest.

    VQGAN's adaptive weight (Esser et al. 2021, Eq. 7) does this for its discriminator, at the last layer.

    Args:
        terms: dict name -> 0-d tensor.
        output: the network's output that they were computed from.
        shares: dict name -> 2-norm of the term's gradient at ``output`` over that of the sum of the terms not named
            here; the norms are those of the batches of all processes.
        scaled: what a loss goes through before ``backward`` (mixed precision).

    Returns:
        dict: the terms, those of ``shares`` as numbers that mean nothing but have that gradient; 0 where one of the
        two gradients is 0.
    """
    rest = [term for name, term in terms.items() if name not in shares]
    names = [name for name in terms if name in shares]
    if not names:
        return terms
    sums = [scaled(sum(rest)) if rest else output.sum() * 0, *(scaled(terms[name]) for name in names)]
    found = []
    for loss in sums:
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        found.append(torch.zeros_like(output) if gradient is None else gradient)
    squares = torch.stack([gradient.double().square().sum() for gradient in found])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(squares)
    norms, unit, result = squares.sqrt(), scaled(squares.new_ones(())), dict(terms)
    for name, norm, gradient in zip(names, norms[1:], found[1:]):
        factor = shares[name] * norms[0] / torch.where(norm == 0, 1, norm) / unit
        result[name] = (output.float() * (factor * gradient.double()).float()).sum()
    return result


def against_first(terms, parameters, scaled=lambda loss: loss):
    """The gradient of each further term beside that of the first; one backward pass a term, none of them kept.

    Gradients are those of the batches of all processes, which have to call this at the same time.

    Args:
        terms: dict name -> 0-d tensor; their graph stays.
        parameters: those that are trained.
        scaled: what a loss goes through before ``backward`` (mixed precision); its factor cancels.

    Returns:
        dict: ``<name>_grad``, the 2-norm of its gradient over that of the first, and ``<name>_cos``, the cosine
        between the two, 0 where one of them is 0: 0-d tensors. Terms that need no gradient are left out.
    """
    parameters = [p for p in parameters if p.requires_grad]

    def gradient(term):
        found = torch.autograd.grad(scaled(term), parameters, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
        if dist.is_available() and dist.is_initialized():
            for part in found:
                dist.all_reduce(part)  # their sum: a factor cancels
        return found

    def dot(ours, theirs):
        return sum((a.double() * b.double()).sum() for a, b in zip(ours, theirs))

    names = [name for name, term in terms.items() if term.requires_grad]
    if len(names) < 2:
        return {}
    first = gradient(terms[names[0]])
    length, result = dot(first, first).sqrt(), {}
    for name in names[1:]:
        ours = gradient(terms[name])
        norm, product = dot(ours, ours).sqrt(), dot(first, ours)
        result[f'{name}_grad'] = norm / length
        result[f'{name}_cos'] = torch.where(product == 0, product, product / (norm * length))
    return result


class Watch:
    """How large each term's gradient is beside the first one's, in the first iterations and once more at a tenth.

    Nothing here waits for the device but `report`.

    Args:
        total: iterations of the training.
        settled: an iteration that the second measurement is not before, if the training is that long; where there is a
            history network, that of its first update, from which on its outputs are near the student's.
    """

    LENGTH = 5  # iterations that are averaged
    # What is told: a component against the first term's gradient above this part of its size, and a gradient of so many
    # times that size. A student from random weights (EDSR f16b2 x2) had 51 times with the contrastive loss as released,
    # 0.07 without the levels whose negatives are nearer than the teacher.
    AGAINST = 0.3
    LARGEST = 5

    def __init__(self, total, settled=0):
        second = max(self.LENGTH + 1, total // 10, settled + 1 if settled < total else 0)
        self.starts = [start for start in (1, second) if start <= total]
        self.total = total
        self.found = []  # (iteration, what `against_first` returned), until they are reported

    def wants(self, iteration):
        """Whether the gradients of this iteration are to be measured."""
        return any(0 <= iteration - start < self.LENGTH for start in self.starts)

    def add(self, iteration, found):
        """Take what `against_first` returned."""
        self.found.append((iteration, found))

    def report(self):
        """What has been measured in full and not been reported.

        Returns:
            list of (iterations as text, dict: name of a term -> (2-norm of its gradient over that of the first, cosine
            between the two)), means over the iterations.
        """
        result, rest = [], []
        for start in self.starts:
            window = [(i, found) for i, found in self.found if 0 <= i - start < self.LENGTH]
            last = min(start + self.LENGTH - 1, self.total)
            if not window or window[-1][0] < last:
                rest += window
                continue
            sizes = {}
            for name in (key.removesuffix('_grad') for key in window[0][1] if key.endswith('_grad')):
                norms = [float(found[f'{name}_grad']) for _, found in window]
                along = [float(found[f'{name}_cos']) * norm for (_, found), norm in zip(window, norms)]
                sizes[name] = sum(norms) / len(norms), sum(along) / (sum(norms) or 1)
            result.append((f'{window[0][0]} to {last}' if window[0][0] < last else f'{last}', sizes))
        self.found = rest
        return result

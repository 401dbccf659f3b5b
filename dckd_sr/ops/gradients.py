"""How strongly, and where to, each term of a loss pulls: what a ``loss_weight`` amounts to with one's own networks."""

import torch


def against_first(terms, parameters, scaled=lambda loss: loss):
    """The gradient of each further term beside that of the first; one backward pass a term, none of them kept.

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
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

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

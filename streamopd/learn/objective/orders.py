"""What each branch tells each token: from facts to numbers, before any gradient.

    target ─> coefficient ─> shape ─> when ─> weight ─> scale ─> correction

A policy-gradient branch gets the coefficient of log p(written token), any other one the weight of its divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamopd.slots import Advantage, Branch, Extrapolate, Likelihood, Method

from .aim import aim
from .correction import correct
from .divergence import coefficient
from .facts import Facts, Known
from .route import holds
from .shape import bend
from .weight import weigh


def instruct(facts: Facts, known: Known, method: Method) -> Tensor:
    """[branches, T]: the order of every branch for every token, age and reduction not included."""
    free = torch.ones_like(known.ids, dtype=torch.bool)
    orders = []
    for branch in method.branches:
        active = holds(branch.when, facts, known)
        if method.routing == "exclusive":
            active, free = active & free, free & ~active
        orders.append(_order(branch, facts, known, active, method))
    return torch.stack(orders)


def _order(branch: Branch, facts: Facts, known: Known, active: Tensor, method: Method) -> Tensor:
    order = torch.ones_like(known.weight)
    if branch.form == "policy_gradient":
        order = _coefficient(branch, facts, known)
        for shape in branch.shape:
            order = bend(order, shape, facts, known)
    for weight in branch.weight:
        order = order * weigh(weight, facts, known, active)
    order = order * branch.scale  # type: ignore[operator]  # settled: a plain number; before the clip, which looks at the sign
    if branch.form == "policy_gradient":
        order = correct(order, branch.correction or method.correction, facts, known)
    return torch.where(active, order, 0.0)


def _coefficient(branch: Branch, facts: Facts, known: Known) -> Tensor:
    if isinstance(branch.loss, Advantage):
        return known.advantage
    if isinstance(branch.loss, Likelihood):
        return torch.ones_like(known.weight)
    logq = aim(facts["logp"], facts["logq"], facts["logb"] if isinstance(branch.target, Extrapolate) else None, branch.target)
    return coefficient(facts["logp"], logq, branch.loss)

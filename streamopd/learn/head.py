"""The output head of the model that learns: hidden states to logits, and back without a second copy of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def speak(head: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Logits [N, V] float32."""
    if _adds_in_place(head, hidden_ND):
        return Spoken.apply(hidden_ND, head.weight)  # type: ignore[no-any-return, no-untyped-call]
    return head(hidden_ND).float()  # type: ignore[no-any-return]


def _adds_in_place(head: nn.Module, hidden_ND: Tensor) -> bool:
    """A plain head that is trained in its own precision: no adapter, no bias, no autocast, no shards."""
    if type(head) is not nn.Linear or head.bias is not None or type(head.weight) is not nn.Parameter:
        return False
    autocast = torch.is_autocast_enabled(hidden_ND.device.type)
    return head.weight.requires_grad and not autocast and head.weight.dtype == hidden_ND.dtype


class Spoken(torch.autograd.Function):
    """hidden @ weight.T whose backward adds to `weight.grad` where it stands: [V, d] is neither made again nor gone through again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        return hidden_ND @ weight_VD.T

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        hidden_ND, weight_VD = ctx.saved_tensors
        if weight_VD.grad is None:
            weight_VD.grad = grad_NV.T @ hidden_ND
        else:
            weight_VD.grad.addmm_(grad_NV.T, hidden_ND)
        return grad_NV @ weight_VD.detach(), None

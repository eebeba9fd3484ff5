"""What the teachers say of a chunk of tokens, as the objective wants it: one view, and the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from streamopd.errors import UserError
from streamopd.slots import Pool, Teachers

from .collate import Evidences, MicroBatch
from .objective import Target, Views
from .objective.cells import on_the_same_ids
from .objective.pool import pooled


def hear(
    micro: MicroBatch, part: slice, teachers: Teachers, heads: Callable[[str], Tensor], stop_ids: Sequence[int], device: torch.device
) -> Views:
    """The views of `part` of a micro-batch's tokens, on `device`."""
    targets = [_said(evidences, part, heads, device) for evidences in micro.teachers]
    reference = None if micro.reference is None else _said(micro.reference, part, heads, device)
    if not targets:
        return Views(None, reference)
    if not isinstance(teachers, Pool):
        return Views(targets[0], reference)
    by_id = dict(teachers.weights)
    weights = [by_id[evidences.teacher[0]] if by_id else 1.0 for evidences in micro.teachers]
    together = pooled(targets, weights, teachers.kind, stop_ids)
    return Views(together, reference if reference is None or together.ids is None else on_the_same_ids(reference, together))


def _said(evidences: Evidences, part: slice, heads: Callable[[str], Tensor], device: torch.device) -> Target:
    columns = (None if column is None else column[part].to(device) for column in evidences.target)
    target = Target(*columns)  # type: ignore[arg-type]
    if evidences.hidden is None:
        return target
    return target._replace(support=_through_heads(evidences, part, heads, device))


def _through_heads(evidences: Evidences, part: slice, heads: Callable[[str], Tensor], device: torch.device) -> Tensor:
    """Log-probs [N, V] float32 of hidden states, each through its own teacher's head."""
    assert evidences.hidden is not None
    hidden_ND, rows_N = evidences.hidden[part].to(device), evidences.rows[part].to(device)
    names = sorted(set(evidences.teacher))
    if len(names) == 1:
        return _log_softmax(hidden_ND, heads(names[0]))
    parts = {name: torch.tensor([i for i, teacher in enumerate(evidences.teacher) if teacher == name], device=device) for name in names}
    found = torch.empty(len(hidden_ND), heads(names[0]).shape[0], device=device)
    for name, rows in parts.items():
        mine = torch.isin(rows_N, rows)
        found[mine] = _log_softmax(hidden_ND[mine], heads(name))
    return found


def _log_softmax(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    logits_NV = (hidden_ND.to(head_VD.dtype) @ head_VD.T).float()
    return torch.log_softmax(logits_NV, -1, out=logits_NV)


def load_head(folder: Path) -> Tensor:
    """The output head [V, d] of an HF folder, float32, without the rest of the model; UserError when it is not to be found."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings().weight
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(names & set(tensors.keys())):
                return tensors.get_tensor(name).float()
    raise UserError(f"{folder} holds no output head by any of the names {sorted(names)}: hidden states cannot be read without it.")

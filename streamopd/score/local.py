"""A teacher in this process: a frozen transformers model that scores whole groups in length-sorted micro-batches.

Shapes: R rollouts in a micro-batch, L padded tokens, G tokens of one completion, N answer tokens of a chunk, D width,
V vocabulary, K support ids, S ids of a slice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from streamopd.errors import GarbageRecord, TeacherError
from streamopd.layout import cut_micro_batches, pad_right, predicting_positions
from streamopd.schemas import Array, Evidence, Group, TopK
from streamopd.score.item import MIN_LOGPROB, Item, Views, check_ids, refuse_slice_beyond, score_groups
from streamopd.slots import EvidenceRequest

MAX_LOGITS = 16 << 20     # floats of logits that exist at once
MIN_PREFIX = 16           # tokens; a shorter common prefix is not worth a cache
KEPT_PREFIXES = 8         # of these, keys and values stay
MAX_HALF = float(np.finfo(np.float16).max)


class LocalTeacher:
    """One frozen model. Two teachers over one folder share its weights through `load_teachers`."""

    def __init__(
        self, folder: Path, teacher_id: str, dtype: str, stop_ids: Sequence[int], token_budget: int,
        tokenizer_digest: str = "", model: PreTrainedModel | None = None,
    ) -> None:
        self.teacher_id = teacher_id
        self.model = model if model is not None else load_model(folder, dtype)
        self.vocab_size = self.model.get_output_embeddings().weight.shape[0]
        self.stop_ids = tuple(stop_ids)
        self.token_budget = token_budget
        self.tokenizer_digest = tokenizer_digest
        self.moved: Callable[[], None] = lambda: None  # called after each micro-batch: slow is not hung
        self._prefixes: OrderedDict[bytes, list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._shares_prefixes = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)
        if any(stop >= self.vocab_size for stop in self.stop_ids):
            raise TeacherError(
                f"Teacher {teacher_id!r} knows {self.vocab_size} ids, but the student stops at {max(self.stop_ids)}. "
                "Name a teacher with the student's tokenizer."
            )

    def score(self, groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None = None) -> list[Views]:
        """Views by group and rollout, as `score_groups` gives them."""
        return score_groups(groups, request, beside, self.check, lambda items: self._score_items(items, request))

    def require(self, request: EvidenceRequest) -> None:
        """TeacherError when it cannot give that: a slice beyond its vocabulary, or hidden states of a head that is no mere matrix."""
        refuse_slice_beyond(request.slice_ids, f"teacher {self.teacher_id!r}", self.vocab_size)
        if request.hidden and getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise TeacherError(
                f"The output head of teacher {self.teacher_id!r} has a bias, and hidden states are read through a matrix alone. "
                'Use FullVocabulary(by="logprobs"), or another teacher.'
            )

    def check(self, item: Item) -> None:
        """GarbageRecord when this teacher cannot read it."""
        check_ids(item, self.vocab_size, self.teacher_id)

    def micro_batches(self, items: Sequence[Item]) -> Iterator[list[int]]:
        """Indices of items that go through one forward; what consumes them has moved after each."""
        for indices in cut_micro_batches([item.length for item in items], self.token_budget):
            yield [int(i) for i in indices]
            self.moved()

    def distributions(self, items: Sequence[Item]) -> Iterator[tuple[slice, Tensor]]:
        """(rows, log-probs [N, V]) over the answer tokens of one micro-batch, a few rows at a time."""
        yield from self._through_head(self._answer_states(items))

    def _through_head(self, hidden_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        rows = max(1, MAX_LOGITS // self.vocab_size)
        for start in range(0, len(hidden_MD), rows):
            part = slice(start, start + rows)
            logits_NV = self.model.get_output_embeddings()(hidden_MD[part]).float()
            yield part, torch.log_softmax(logits_NV, -1).clamp_(min=MIN_LOGPROB)

    def _score_items(self, items: Sequence[Item], request: EvidenceRequest) -> list[Evidence]:
        found: dict[int, Evidence] = {}
        for indices in self.micro_batches(items):
            found |= zip(indices, self._score_batch([items[i] for i in indices], request), strict=True)
        return [found[i] for i in range(len(items))]

    @torch.inference_mode()
    def _score_batch(self, items: Sequence[Item], request: EvidenceRequest) -> list[Evidence]:
        device = self.model.device
        completion_M = torch.from_numpy(np.concatenate([item.completion for item in items])).long().to(device)
        given_Mk = _stack_ids(items).to(device) if request.student_ids else None
        hidden_MD, chunks = self._answer_states(items), []
        for part, logp_NV in self._through_head(hidden_MD):
            given_Nk = None if given_Mk is None else given_Mk[part]
            chunks.append(_look(logp_NV, completion_M[part], given_Nk, self.stop_ids, request))
        seen = chunks[0] if len(chunks) == 1 else _join(chunks)
        if request.hidden:
            seen = seen._replace(hidden=hidden_MD.float())
        columns = _Seen(*(None if column is None else column.cpu().numpy() for column in seen))
        return list(self._evidence(items, columns, request))

    def _answer_states(self, items: Sequence[Item]) -> Tensor:
        """Last hidden states [M, D] at the positions that predict completion tokens, rollouts one after another."""
        cache, skipped = self._prefix_cache(_common_prefix([item.context for item in items]), len(items))
        rows = [np.concatenate([item.context[skipped:], item.completion[:-1]]) for item in items]
        ids_RL = torch.from_numpy(pad_right(rows, 0))
        where_M = predicting_positions(
            [len(item.context) - skipped for item in items], [len(item.completion) for item in items], ids_RL.shape[1]
        )
        device = self.model.device
        return self._trunk(ids_RL.to(device), cache, skipped).flatten(0, 1)[torch.from_numpy(where_M).to(device)]

    def _trunk(self, ids_RL: Tensor, cache: DynamicCache | None, skipped: int) -> Tensor:
        """Right padding needs no mask of its own: it lies after every token that is read."""
        if cache is None:
            return self.model.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        rows, width = ids_RL.shape
        return self.model.base_model(  # type: ignore[no-any-return]
            input_ids=ids_RL, cache=cache, use_cache=True,
            position_ids=torch.arange(skipped, skipped + width, device=ids_RL.device).expand(rows, width),
            attention_mask=torch.ones(rows, skipped + width, dtype=torch.long, device=ids_RL.device),
        ).last_hidden_state

    def _prefix_cache(self, prefix: NDArray[np.int32], rows: int) -> tuple[DynamicCache | None, int]:
        """Keys and values of what `rows` contexts begin with, and how many tokens that is; they stay: the model is frozen."""
        layers = self._known_prefix(prefix, rows)
        if layers is None and rows > 1 and len(prefix) >= MIN_PREFIX and self._shares_prefixes:
            layers = self._read_prefix(prefix)
        if layers is None:
            return None, 0
        shared = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(layers):
            shared.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return shared, layers[0][0].shape[2]

    def _known_prefix(self, prefix: NDArray[np.int32], rows: int) -> list[tuple[Tensor, Tensor]] | None:
        """The longest kept prefix that begins `prefix`, unless a longer one would pay for itself."""
        body = prefix.tobytes()
        best = max((key for key in self._prefixes if body.startswith(key)), key=len, default=None)
        if best is None or (rows > 1 and len(prefix) - len(best) // prefix.itemsize >= MIN_PREFIX):
            return None
        self._prefixes.move_to_end(best)
        return self._prefixes[best]

    def _read_prefix(self, prefix: NDArray[np.int32]) -> list[tuple[Tensor, Tensor]]:
        cache = DynamicCache(config=self.model.config)
        ids_1P = torch.from_numpy(prefix.astype(np.int64))[None].to(self.model.device)
        self.model.base_model(input_ids=ids_1P, cache=cache, use_cache=True)
        layers = self._prefixes[prefix.tobytes()] = [(layer.keys, layer.values) for layer in cache.layers]
        if len(self._prefixes) > KEPT_PREFIXES:
            self._prefixes.popitem(last=False)
        return layers

    def _evidence(self, items: Sequence[Item], seen: _Seen, request: EvidenceRequest) -> Iterator[Evidence]:
        start = 0
        for item in items:
            stop = start + len(item.completion)
            part = _Seen(*(None if values is None else values[start:stop] for values in seen))
            yield Evidence(
                rollout_id=item.rollout_id,
                role=item.role,
                teacher_id=self.teacher_id,
                context_digest=item.context_digest,
                tokenizer_digest=self.tokenizer_digest,
                logprobs=Array.of(part.logprobs, "float32"),
                support=_to_topk(part, request.full),
                mass=None if part.mass is None else Array.of(part.mass, "float32"),
                entropy=Array.of(part.entropy, "float32"),
                stop_logmass=Array.of(part.stop_logmass, "float32") if self.stop_ids else None,
                hidden=None if part.hidden is None else _to_half(part.hidden, f"teacher {self.teacher_id!r} on rollout {item.rollout_id}"),
            )
            start = stop


def load_teachers(
    folders: Mapping[str, tuple[Path, str]], stop_ids: Sequence[int], token_budget: int, tokenizer_digest: str = ""
) -> dict[str, LocalTeacher]:
    """Teachers by id from {id: (folder, dtype)}; ids over one folder and dtype share the model."""
    models: dict[tuple[Path, str], PreTrainedModel] = {}
    teachers = {}
    for teacher_id, (folder, dtype) in folders.items():
        key = (Path(folder).resolve(), dtype)
        if key not in models:
            models[key] = load_model(folder, dtype)
        teachers[teacher_id] = LocalTeacher(folder, teacher_id, dtype, stop_ids, token_budget, tokenizer_digest, models[key])
    return teachers


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The frozen model of an HF folder; TeacherError when it is none, or when its head is more than a matrix product."""
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise TeacherError(f"{folder} is not a model folder that transformers can load: {error}") from error
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    _refuse_scaled_head(model, folder)
    return model  # type: ignore[no-any-return]


@torch.inference_mode()
def _refuse_scaled_head(model: PreTrainedModel, folder: Path) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    whole = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(plain.float(), whole.float(), rtol=1e-3, atol=1e-3):
        raise TeacherError(
            f"The logits of {folder} ({model.config.model_type}) are not its last hidden states times its output head: "
            f"they differ by {float((plain - whole).abs().max()):.3g}. Scaled or capped heads are not supported."
        )


# ---------------------------------------------------------------- what a chunk of positions says
class _Seen(NamedTuple):
    """Columns of N answer tokens: tensors where they are made, numpy where they are packed."""

    logprobs: Any            # [N]
    entropy: Any             # [N]
    mass: Any                # [N], None without a support
    stop_logmass: Any        # [N]
    ids: Any = None          # [N, K] with -1 padding, None for the whole vocabulary
    support: Any = None      # [N, K] or [N, V], None where hidden states stand for it
    hidden: Any = None       # [N, D]


def _look(
    logp_NV: Tensor, completion_N: Tensor, given_Nk: Tensor | None, stop_ids: Sequence[int], request: EvidenceRequest
) -> _Seen:
    """What the request asks about N positions, from their whole distributions."""
    stop = logp_NV[:, list(stop_ids)]
    whole = (
        logp_NV.gather(1, completion_N[:, None])[:, 0],
        -(logp_NV.exp().mul_(logp_NV)).sum(-1),
    )
    stop_logmass = stop.logsumexp(-1) if stop_ids else torch.zeros(len(logp_NV), device=logp_NV.device)
    if request.full:
        return _Seen(*whole, torch.ones(len(logp_NV), device=logp_NV.device), stop_logmass, None, logp_NV)
    if request.hidden:
        return _Seen(*whole, None, stop_logmass)
    ids_NK = _support_ids(logp_NV, completion_N, given_Nk, stop_ids, request)
    support_NK = logp_NV.gather(1, ids_NK.clamp(min=0)).masked_fill_(ids_NK < 0, -torch.inf)
    return _Seen(*whole, support_NK.exp().sum(-1), stop_logmass, ids_NK, support_NK)


def _support_ids(
    logp_NV: Tensor, completion_N: Tensor, given_Nk: Tensor | None, stop_ids: Sequence[int], request: EvidenceRequest
) -> Tensor:
    """[N, K] the union of the requested ids: ascending in a row, each once, -1 at the end."""
    rows = len(logp_NV)
    parts = []
    if request.teacher_k:
        parts.append(logp_NV.topk(min(request.teacher_k, logp_NV.shape[1]), sorted=False).indices)
    if given_Nk is not None:
        parts.append(given_Nk)
    if request.sampled:
        parts.append(completion_N[:, None])
    always_S = [*(stop_ids if request.stop else ()), *request.slice_ids]
    if always_S:
        parts.append(torch.tensor(always_S, device=logp_NV.device).expand(rows, -1))
    return deduplicate(torch.cat(parts, 1)) if parts else torch.empty(rows, 0, dtype=torch.long, device=logp_NV.device)


def deduplicate(ids_NK: Tensor) -> Tensor:
    """Each id once a row, ascending, then -1; as many columns as the fullest row needs."""
    ordered = ids_NK.sort(1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    last = torch.iinfo(ordered.dtype).max
    packed = ordered.masked_fill(again | (ordered < 0), last).sort(1).values
    valid = packed != last
    width = int(valid.sum(1).max()) if len(valid) else 0
    return packed[:, :width].masked_fill(~valid[:, :width], -1)


def _join(chunks: Sequence[_Seen]) -> _Seen:
    width = max((c.ids.shape[1] for c in chunks if c.ids is not None), default=0)
    columns: list[Tensor | None] = []
    for name, values in zip(_Seen._fields, zip(*chunks, strict=True), strict=True):
        if values[0] is None:
            columns.append(None)
        elif name in ("ids", "support") and chunks[0].ids is not None:
            fill = -1 if name == "ids" else -torch.inf
            columns.append(torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]))
        else:
            columns.append(torch.cat(values))
    return _Seen(*columns)


def _to_topk(part: _Seen, full: bool) -> TopK | None:
    if full:
        return TopK(None, Array.of(part.support, "float32"))
    if part.ids is None or not part.ids.shape[1]:
        return None
    width = int((part.ids >= 0).sum(1).max())  # this rollout's fullest row, not the batch's
    return TopK(Array.of(part.ids[:, :width], "int32"), Array.of(part.support[:, :width], "float16"))


def _to_half(hidden_GD: NDArray[np.float32], where: str) -> Array:
    """float16; GarbageRecord where that cannot hold a number, which would become inf."""
    wrong = ~(np.abs(hidden_GD) <= MAX_HALF)  # NaN is wrong too
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise GarbageRecord(
            f"{where}: a hidden state is {hidden_GD[row, column]:.6g} at token {row}, and float16 ends at {MAX_HALF:,.0f}. "
            'Use FullVocabulary(by="logprobs").'
        )
    return Array.of(hidden_GD, "float16")


# ---------------------------------------------------------------- layout
def _common_prefix(contexts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """The ids that all contexts begin with, short of every context's last id (which must be read to predict)."""
    length = min(len(context) for context in contexts) - 1
    head = np.stack([context[:length] for context in contexts])
    differs = (head != head[0]).any(0)
    return contexts[0][: int(differs.argmax()) if differs.any() else length]


def _stack_ids(items: Sequence[Item]) -> Tensor:
    """[M, k] the ids that come with the items one after another, -1 where one has fewer, or none."""
    arrays = [np.empty((len(item.completion), 0), np.int32) if item.support_ids is None else item.support_ids for item in items]
    width = max(part.shape[1] for part in arrays)
    return torch.from_numpy(np.concatenate([
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in arrays
    ])).long()

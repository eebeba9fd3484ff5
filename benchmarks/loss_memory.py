"""What one loss takes, forward and backward, over a real vocabulary: memory and time of ours, of the plain way, of TRL's.

    .venv-trl/bin/python -m benchmarks.loss_memory [--repeats 3] [--out benchmarks/results/loss_memory.json]

V = 151,936 ids, d = 1,024, T = 2,048 tokens, float32, one thread, CPU. All in one run, each case in a fresh process.

What everybody is given (`before_mb`; not counted): the student's last hidden states [T, d] and head [V, d] with its gradient's
buffer, since a micro-batch adds to what the ones before left; of the teacher hidden states and head for a loss over the whole
vocabulary, and ids, log-probs and mass [T, ≤ 35] for the default. What everybody must give back: the loss, the gradient in that
buffer, and the gradient of the hidden states. Peak is the highest resident size above what was there before, as the kernel says.
One thread works, so that its CPU-seconds are comparable where a machine has other work too; wall seconds stand beside them.

ours    The learner's own function as a step calls it, monitors and the two stop ids of such a vocabulary included. The
        teacher's log-probs are made chunk by chunk from hidden states, as `FullVocabulary(by="hidden")` does.
plain   Logits [T, V] of both, log_softmax, the sum, backward: what a textbook says.
trl     Its functions as its trainers call them. Whole vocabulary: `gkd` is GKDTrainer's on logits [T, V], `chunked` that of
        the stable DistillationTrainer, on hidden states by tiles. Default: that of the asynchronous trainer on the same ids
        with its tail, in chunks that are computed twice.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.clock import ENVIRONMENT, load_average, machine, store
from streamopd.config import Learn
from streamopd.learn.collate import Evidences, MicroBatch
from streamopd.learn.head import speak
from streamopd.learn.objective import Known, Target
from streamopd.learn.trainer import Trainer, fitting_chunk
from streamopd.slots import JSD, Branch, FullVocabulary, Method, ReverseKL, Union

VOCAB, WIDTH, TOKENS = 151_936, 1_024, 2_048
STOP_IDS = (151_643, 151_645)
K = 16
HEADROOM_MB = 2_000  # left to the rest of the machine; a case that wants more fails, and says so
LOSSES: dict[str, Branch] = {
    "default": Branch(support=Union(K, K), loss=ReverseKL()),
    "reverse_kl": Branch(support=FullVocabulary(by="hidden"), loss=ReverseKL()),
    "jsd": Branch(support=FullVocabulary(by="hidden"), loss=JSD(0.5)),
}
WAYS = {"default": ("ours", "plain", "trl_async"), "reverse_kl": ("ours", "plain", "trl_gkd", "trl_chunked")}
WAYS["jsd"] = WAYS["reverse_kl"]

Run = Callable[[int], float]  # of the first so many tokens: the mean loss, gradients added where they belong


class Given(NamedTuple):
    """What everybody is given."""

    states: Tensor          # [T, d]  with gradient
    head: nn.Parameter      # [V, d]  with gradient, and a buffer for it
    teacher_states: Tensor  # [T, d]  what float16 can hold, as they travel
    teacher_head: Tensor    # [V, d]
    written: Tensor         # int64 [T]
    evidence: Target        # of the default; of the whole vocabulary without a support


def given(loss: str) -> Given:
    """A student near its teacher, with logits three nats wide."""
    source = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, generator=source).half().float()
    head = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=source).mul_(3 / WIDTH**0.5))
    head.grad = torch.zeros_like(head)
    teacher_states = (states + 0.3 * torch.randn(TOKENS, WIDTH, generator=source)).half().float()
    teacher_head = head.detach().clone()
    written = torch.randint(VOCAB, (TOKENS,), generator=source)
    evidence = _support(states, head.detach(), teacher_states, teacher_head, written) if loss == "default" else Target(
        written, torch.zeros(TOKENS, 0), logp=torch.zeros(TOKENS)
    )
    if loss == "default":
        teacher_states, teacher_head = torch.zeros(0), torch.zeros(0)
    return Given(states.requires_grad_(), head, teacher_states, teacher_head, written, evidence)


def _support(states: Tensor, head: Tensor, teacher_states: Tensor, teacher_head: Tensor, written: Tensor) -> Target:
    """Student's top 16 ∪ teacher's ∪ {written} ∪ stop ids with the teacher's log-probs, as a teacher service sends them."""
    parts = []
    for start in range(0, TOKENS, 64):
        cut = slice(start, start + 64)
        q_NV = (teacher_states[cut] @ teacher_head.T).log_softmax(1)
        student_Nk, teacher_Nk = (states[cut] @ head.T).topk(K).indices, q_NV.topk(K).indices
        stops = torch.tensor(STOP_IDS).expand(len(q_NV), -1)
        ids_NK = torch.cat([student_Nk, teacher_Nk, written[cut, None], stops], 1).sort(1).values
        twice = torch.zeros_like(ids_NK, dtype=torch.bool)
        twice[:, 1:] = ids_NK[:, 1:] == ids_NK[:, :-1]
        support = q_NV.gather(1, ids_NK).masked_fill(twice, -torch.inf)
        logp = q_NV.gather(1, written[cut, None])[:, 0]
        parts.append((ids_NK.masked_fill(twice, -1), support, support.exp().sum(1), q_NV[:, STOP_IDS].logsumexp(1), logp))
    ids, support, mass, stop_logmass, logp = (torch.cat(column) for column in zip(*parts, strict=True))
    return Target(written, support.half().float(), ids, mass, stop_logmass, logp)


# ---------------------------------------------------------------- ways
class Learner(Trainer):
    """The trainer without a model under its head: hidden states are given."""

    def __init__(self, about: Given, method: Method) -> None:
        self.about, self.method, self.stop_ids = about, method, STOP_IDS
        self.student = Speaker(about.head)  # type: ignore[assignment]
        self.head_chunk = fitting_chunk(Learn().head_chunk, VOCAB, method)
        self.teachers, self._heads = {}, {"default": about.teacher_head}

    def _states(self, micro: MicroBatch) -> Tensor:
        return self.about.states[micro.where]


class Speaker:
    """A student's head."""

    device, vocab_size = torch.device("cpu"), VOCAB

    def __init__(self, weight: nn.Parameter) -> None:
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, device="meta")
        self.head.weight = weight

    def speak(self, states_ND: Tensor) -> Tensor:
        return speak(self.head, states_ND)


def ours(about: Given, loss: str) -> Run:
    method = Method(name=loss, summary="", branches=(LOSSES[loss],))
    learner = Learner(about, method)
    hidden = None if loss == "default" else about.teacher_states.half()

    def run(tokens: int) -> float:
        known, view = _known(about.written[:tokens]), Target(*(None if c is None else c[:tokens] for c in about.evidence))  # type: ignore[arg-type]
        teacher = Evidences(view, None if hidden is None else hidden[:tokens], ["default"], torch.zeros(tokens, dtype=torch.long))
        every = torch.arange(tokens)
        value, _, _ = learner._backward(MicroBatch(every[None], every, every, [teacher], None), known, method, None)
        return value

    return run


def _known(written: Tensor) -> Known:
    zeros, ones, none = torch.zeros_like(written), torch.ones(len(written)), torch.zeros(len(written))
    return Known(
        row=zeros, group=zeros, position=torch.arange(len(written)), segment=zeros, ids=written, author=zeros, logmu=none,
        temperature=ones, correct=none + torch.nan, pass_rate=none + torch.nan, advantage=none, uniform=none, weight=ones,
    )


def plain(about: Given, loss: str) -> Run:
    def run(tokens: int) -> float:
        p_TV = (about.states[:tokens] @ about.head.T).log_softmax(-1)
        if loss == "default":
            return _finish(_with_tail(p_TV, about.evidence, tokens))
        with torch.no_grad():
            q_TV = (about.teacher_states[:tokens] @ about.teacher_head.T).log_softmax(-1)
        if loss == "reverse_kl":
            return _finish((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())
        half = torch.tensor(0.5).log()
        m_TV = torch.logaddexp(p_TV + half, q_TV + half)
        return _finish(0.5 * (p_TV.exp() * (p_TV - m_TV) + q_TV.exp() * (q_TV - m_TV)).sum(-1).mean())

    return run


def _with_tail(p_TV: Tensor, evidence: Target, tokens: int) -> Tensor:
    assert evidence.ids is not None
    assert evidence.mass is not None
    ids_TK, q_TK = evidence.ids[:tokens], evidence.support[:tokens]
    held_TK = ids_TK >= 0
    p_TK, q_TK = p_TV.gather(1, ids_TK.clamp(min=0)), q_TK.masked_fill(~held_TK, 0)
    told_T = (p_TK.exp() * (p_TK - q_TK)).masked_fill(~held_TK, 0).sum(1)
    left_T = (1 - p_TK.exp().masked_fill(~held_TK, 0).sum(1)).clamp(min=1e-7)
    return (told_T + left_T * (left_T.log() - (1 - evidence.mass[:tokens]).clamp(min=1e-7).log())).mean()


def trl_gkd(about: Given, loss: str) -> Run:
    from trl.experimental.gkd import GKDTrainer

    def run(tokens: int) -> float:
        student = (about.states[:tokens] @ about.head.T)[None]
        with torch.no_grad():
            teacher = (about.teacher_states[:tokens] @ about.teacher_head.T)[None]
        labels = torch.zeros(1, tokens, dtype=torch.long)
        return _finish(GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=_beta(loss)))

    return run


def trl_chunked(about: Given, loss: str) -> Run:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def run(tokens: int) -> float:
        states, teacher_states = about.states[None, :tokens], about.teacher_states[None, :tokens]
        mask = torch.ones(1, tokens, dtype=torch.long)
        value, *_ = _chunked_divergence_loss(states, teacher_states, about.head, about.teacher_head, mask, _beta(loss))
        return _finish(value)

    return run


def trl_async(about: Given, loss: str) -> Run:
    from trl.experimental.async_distillation.async_distillation_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_jsd_loss

    ids, logq = about.evidence.ids, about.evidence.support
    assert ids is not None

    def run(tokens: int) -> float:
        value, *_ = _chunked_jsd_loss(
            about.states[:tokens], about.head, None, 1.0, None, ids[:tokens], logq[:tokens], ids[:tokens] >= 0, _beta(loss), 1.0, True,
            None, 1, _CHUNKED_LM_HEAD_CHUNK_SIZE,
        )
        return _finish(value / tokens)

    return run


def _finish(value: Tensor) -> float:
    value.backward()
    return float(value.detach())


def _beta(loss: str) -> float:
    """GKD's, of reverse KL and of the mean between."""
    return 0.5 if loss == "jsd" else 1.0


MADE: dict[str, Callable[[Given, str], Run]] = {
    "ours": ours, "plain": plain, "trl_gkd": trl_gkd, "trl_chunked": trl_chunked, "trl_async": trl_async,
}


# ---------------------------------------------------------------- one case, in a process of its own
def measured(loss: str, way: str) -> dict[str, Any]:
    """Seconds and peak of one forward and backward."""
    torch.set_num_threads(1)
    about = given(loss)
    run = MADE[way](about, loss)
    run(8)  # libraries open, buffers of threads made
    for parameter in (about.head, about.states):
        assert parameter.grad is not None
        parameter.grad.zero_()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _leave_room()
    before_mb = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began, cpu_began = time.monotonic(), time.process_time()
    try:
        value = run(TOKENS)
    except RuntimeError as error:  # torch's word for memory that is not there
        return {"failed": str(error).splitlines()[0], "before_mb": before_mb, "peak_mb_until_then": _status_mb("VmHWM") - before_mb}
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    grads = [parameter.grad.norm().item() for parameter in (about.head, about.states) if parameter.grad is not None]
    return {
        "wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), "peak_mb": _status_mb("VmHWM") - before_mb, "before_mb": before_mb,
        "loss": round(value, 5), "grad_norms": [float(f"{norm:.4g}") for norm in grads],
    }


def _leave_room() -> None:
    """More than the machine has to give is refused to us, not taken from others."""
    free_mb = _told_mb("/proc/meminfo", "MemAvailable")
    limit = (_status_mb("VmSize") + max(0, free_mb - HEADROOM_MB)) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status_mb(field: str) -> int:
    return _told_mb("/proc/self/status", field)


def _told_mb(file: str, field: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) // 1024


# ---------------------------------------------------------------- all of them
def run_all(losses: list[str], repeats: int, out: Path) -> None:
    """Every case `repeats` times in turn; medians, and ours against the others."""
    result: dict[str, Any] = {
        "command": [Path(sys.executable).name, "-m", "benchmarks.loss_memory", *sys.argv[1:]], "machine": machine(),
        "torch": version("torch"), "trl": version("trl"), "vocab": VOCAB, "width": WIDTH, "tokens": TOKENS,
        "cases": {},
    }
    for loss in losses:
        rows: dict[str, Any] = {}
        for way in WAYS[loss]:
            tries = [_alone(loss, way) for _ in range(repeats)]
            rows[way] = _median(tries) | {"tries": tries}
            print(loss, way, json.dumps({k: v for k, v in rows[way].items() if k != "tries"}), flush=True)
            result["cases"][loss] = rows | {"ours_against": _against(rows)}
            store(out, result)


def _alone(loss: str, way: str) -> dict[str, Any]:
    load = load_average()
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--one", loss, way]
    told = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    if told.returncode:
        return {"failed": f"exit status {told.returncode}", "load_average_before": load}
    return json.loads(told.stdout.splitlines()[-1]) | {"load_average_before": load}


def _median(tries: list[dict[str, Any]]) -> dict[str, Any]:
    ended = [one for one in tries if "failed" not in one]
    if not ended:
        return {"failed": tries[0]["failed"]}
    return {
        **{key: statistics.median(one[key] for one in ended) for key in ("wall_s", "cpu_s", "peak_mb")},
        "loss": ended[0]["loss"], "grad_norms": ended[0]["grad_norms"],
    }


def _against(rows: dict[str, Any]) -> dict[str, Any]:
    """Ours over theirs, of peak and time."""
    mine = rows.get("ours", {})
    others = {way: row for way, row in rows.items() if way != "ours" and "cpu_s" in row and "cpu_s" in mine}
    return {way: {key: round(mine[key] / row[key], 3) for key in ("peak_mb", "wall_s", "cpu_s")} for way, row in others.items()}


def _asked() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_memory.json"))
    arguments.add_argument("--one", nargs=2, metavar=("LOSS", "WAY"), help=argparse.SUPPRESS)
    return arguments.parse_args()


if __name__ == "__main__":
    asked = _asked()
    if asked.one:
        print(json.dumps(measured(*asked.one)))
    else:
        run_all(asked.losses, asked.repeats, asked.out)

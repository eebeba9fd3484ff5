"""One example of each record, with round numbers."""

from __future__ import annotations

from typing import Any

from streamopd.schemas import (
    Array,
    Batch,
    Evaluation,
    Event,
    Evidence,
    Finish,
    Group,
    Heartbeat,
    Outcome,
    Prompt,
    Rollout,
    Scored,
    Span,
    StepDone,
    TensorInfo,
    TopK,
    Weights,
)
from streamopd.schemas.teaching import Complaint, Score, ScoreAnswer, ScoreItem, ScoreRequest, TeacherInfo, Vocabulary, Want

HEAD: dict[str, Any] = {"run": "demo-00000000", "method": "0123456789abcdef", "born_s": 1.5}


def prompt(seq: int = 7) -> Prompt:
    return Prompt(
        id=f"p{seq}", seq=seq, prompt_ids=Array.of([1, 10, 13], "int32"), text="7+", solution="7", meta={"terms": "1"},
        gold_ids=Array.of([10, 2], "int32"), **HEAD,
    )


def rollout(seq: int = 7) -> Rollout:
    return Rollout(
        id=f"p{seq}.0", prompt_ids=Array.of([1, 10, 13], "int32"), completion_ids=Array.of([4, 5, 2], "int32"),
        logprobs=Array.of([-0.5, -1.0, -0.25], "float32"), weight_spans=[Span(0, 3), Span(2, 4, "keep")], finish=Finish.STOP,
        student_topk=TopK(Array.of([[4, 5], [5, 6], [2, 4]], "int32"), Array.of([[-0.5, -1.5]] * 3, "float16")),
        outcome=Outcome(1.0, True),
    )


def evidence(seq: int = 7) -> Evidence:
    return Evidence(
        rollout_id=f"p{seq}.0", logprobs=Array.of([-0.25, -0.5, -0.125], "float32"),
        support=TopK(
            Array.of([[4, 5], [5, -1], [2, 4]], "int32"),
            Array.of([[-0.25, -2.0], [-0.5, float("-inf")], [-0.125, -3.0]], "float16"),
        ),
        mass=Array.of([0.9, 0.6, 0.9], "float32"), entropy=Array.of([0.5, 0.75, 0.5], "float32"),
        stop_logmass=Array.of([-8.0, -4.0, -0.125], "float32"),
    )


def group(seq: int = 7) -> Group:
    return Group(id=f"p{seq}", prompt=prompt(seq), rollouts=[rollout(seq)], **HEAD)


def scored(seq: int = 7) -> Scored:
    return Scored(id=f"p{seq}", group=group(seq), views=[[evidence(seq)]], **HEAD)


def teaching() -> dict[str, Any]:
    """name -> message to or from a teacher outside the run."""
    item = ScoreItem(
        context_ids=Array.of([1, 10, 13], "int32"), completion_ids=Array.of([4, 2], "int32"),
        support_ids=Array.of([[4, 5], [2, -1]], "int32"),
    )
    score = Score(
        logprobs=Array.of([-0.25, -0.5], "float32"), topk_ids=Array.of([[4], [2]], "int32"),
        topk_logprobs=Array.of([[-0.25], [-0.5]], "float32"), support_logprobs=Array.of([[-0.25, -2.0], [-0.5, -8.0]], "float32"),
        entropy=Array.of([0.5, 0.75], "float32"), stop_logmass=Array.of([-8.0, -0.5], "float32"),
    )
    return {
        "info": TeacherInfo(contract=1, model="a model", vocab_size=19, max_tokens=128, max_topk=20),
        "vocabulary": Vocabulary(tokens=["<pad>", "<s>", "</s>", None, "1"]),
        "request": ScoreRequest(items=[item], want=Want(topk=1, entropy=True, stop_ids=[2])),
        "answer": ScoreAnswer(scores=[score]),
        "complaint": Complaint(error="item 0 has 300 tokens, this teacher takes 128"),
    }


def examples() -> dict[str, Any]:
    """name -> record."""
    return {
        "prompt": prompt(),
        "group": group(),
        "scored": scored(),
        "batch": Batch(id="b3", n=3, items=[scored(7), scored(8)], **HEAD),
        "step_done": StepDone(n=4, born_s=1.5, metrics={"loss": 0.5}, trained=[7, 8], age_steps={"0": 2, "1": 4}),
        "weights": Weights(run="demo-00000000", boot="aa", n=4, folder="weight_v000004", nbytes=8, born_s=1.5,
                           tensors=[TensorInfo("w", "float32", (2,), "00")], stage=1),
        "evaluation": Evaluation(who="student", n=4, born_s=1.5, metrics={"accuracy_greedy": 0.5}),
        "heartbeat": Heartbeat(service="teacher", instance="teacher-0", pid=1, born_s=1.5, progress=9, state="working"),
        "event": Event(kind="join", source="teacher-0", born_s=1.5, text="teacher-0 joined"),
    }

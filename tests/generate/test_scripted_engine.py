"""The engine without a model keeps the same promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamopd.errors import ConfigError
from streamopd.generate.engine import Request
from streamopd.generate.open import open_engine
from streamopd.generate.scripted import ScriptedEngine
from streamopd.schemas import Finish, Span, Weights
from streamopd.sync.swap import Loader

from .conftest import answer_all, requests


def weights(n: int) -> Weights:
    return Weights(run="r", boot="b", n=n, folder=f"weight_v{n:06d}")


def test_company_does_not_change_a_scripted_answer() -> None:
    todo = requests(20)
    alone = answer_all(ScriptedEngine(stop_ids=[2], max_inflight=1), todo)
    crowd = answer_all(ScriptedEngine(stop_ids=[2], max_inflight=20), todo)
    assert {name: answer.completion_ids.tolist() for name, answer in alone.items()} == {
        name: answer.completion_ids.tolist() for name, answer in crowd.items()
    }
    assert {answer.finish for answer in alone.values()} == {Finish.STOP, Finish.LENGTH}


def test_a_scripted_answer_records_the_versions_that_wrote_it() -> None:
    engine = ScriptedEngine(stop_ids=[], max_inflight=2, student_k=3)
    engine.swap_in(weights(4), Path("nowhere"))
    engine.admit(requests(1, max_new=5))
    engine.step()
    engine.step()
    assert engine.swap_in(weights(6), Path("nowhere")).inflight == 1
    (answer,) = answer_all(engine, []).values()
    assert answer.spans == [Span(0, 4), Span(2, 6)]
    record = answer.rollout()
    assert record.student_topk is not None
    assert record.student_topk.logprobs.shape == (5, 3)


def test_a_scripted_engine_needs_no_torch() -> None:
    code = (
        "import sys; from streamopd.generate.open import open_engine; "
        "open_engine('scripted', stop_ids=[2], max_inflight=1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_engine_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"'sglang' is not one of 'hf', 'vllm', 'scripted'"):
        open_engine("sglang")


def test_an_aborted_request_is_named() -> None:
    engine = ScriptedEngine(stop_ids=[], max_inflight=2)
    engine.admit(requests(2))
    engine.step()
    assert sorted(request.id for request in engine.abort()) == ["p0.0", "p1.0"]
    assert engine.free == 2
    np.testing.assert_allclose(engine.probe([1, 2, 3]), -np.log(19))


@pytest.mark.parametrize("kind", ["scripted", "hf"])
def test_tokens_in_flight_are_those_that_wait_or_are_being_written(kind: str, folder: Path) -> None:
    engine = open_engine(kind, folder=folder, stop_ids=(), loader=Loader(), max_inflight=8)
    first, later = requests(3, max_new=3), requests(4, max_new=9, first=3)
    of = {name: sum(len(request.prompt_ids) + request.max_new for request in some) for name, some in (("first", first), ("later", later))}
    engine.admit([*first, Request("bad", np.zeros(0, np.int32), (0,), 5)])
    assert engine.inflight_tokens == of["first"], "what waits counts, what is refused does not"
    engine.step()
    engine.admit(later)
    assert engine.inflight_tokens == of["first"] + of["later"]
    engine.step()
    engine.step()
    assert engine.inflight_tokens == of["later"]
    engine.abort()
    assert engine.inflight_tokens == 0

"""What was written stays; what was torn is left out; what is replayed is not written twice."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from streamopd.schemas import Array, Evidence, Group, Outcome, Prompt, Rollout, Scored, Span
from streamopd.watch.journal import Journal, SampleLog, read, rewind


def scored(seq: int, group_size: int = 1, outcome: Outcome | None = None) -> Scored:
    ids, logprobs = Array.of([5, 6, 2], "int32"), Array.of([-0.123456789, -14.5, 0.0], "float32")
    facts = {"run": "r", "method": "m", "born_s": 0.0}
    prompt = Prompt(id=f"p{seq}", seq=seq, prompt_ids=Array.of([1, 3], "int32"), text="3+4=", **facts)
    rollouts = [
        Rollout(
            id=f"p{seq}.{i}", prompt_ids=prompt.prompt_ids, completion_ids=ids, logprobs=logprobs,
            weight_spans=[Span(0, 7), Span(2, 8)], outcome=outcome,
        )
        for i in range(group_size)
    ]
    views = [[Evidence(rollout_id=r.id, logprobs=Array.of([-1.0, -2.0, -3.0], "float32"))] for r in rollouts]
    return Scored(id=prompt.id, group=Group(id=prompt.id, prompt=prompt, rollouts=rollouts, **facts), views=views, **facts)


def test_lines_come_back_in_order(tmp_path):
    journal = Journal(tmp_path / "new" / "m.jsonl")
    for n in range(3):
        journal.write({"n": n, "loss": np.float32(0.5), "nan": float("nan")})
    assert read(tmp_path / "new" / "m.jsonl") == [{"n": n, "loss": 0.5, "nan": None} for n in range(3)]


def test_a_missing_file_has_no_lines(tmp_path):
    assert read(tmp_path / "nothing.jsonl") == []
    assert rewind(tmp_path / "nothing.jsonl", lambda line: False) == 0


@pytest.mark.parametrize("torn", [b'{"n":1', b'{"n":1}', b"3"])
def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next_life(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"n":0}\n' + torn)
    Journal(path).write({"n": 2})
    assert [line["n"] for line in read(path) if line["n"] != 1] == [0, 2]
    assert path.read_bytes().endswith(b'\n{"n":2}\n')


def _write_many(path, writer):
    journal = Journal(path)
    for n in range(200):
        journal.write({"writer": writer, "n": n, "text": "x" * (n * 20)})


def test_two_processes_that_append_to_one_file_lose_no_line(tmp_path):
    path = tmp_path / "events.jsonl"
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write_many, args=(path, w)) for w in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = read(path)
    assert [line["n"] for line in lines if line["writer"] == 0] == list(range(200))
    assert [line["n"] for line in lines if line["writer"] == 1] == list(range(200))


def test_a_restarted_learner_rewinds_to_its_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    for n in range(1, 11):
        journal.write({"n": n})
    journal.close()
    assert rewind(path, lambda line: line["n"] <= 6) == 4
    Journal(path).write({"n": 7})
    assert [line["n"] for line in read(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert not (tmp_path / "m.jsonl.new").exists()


def test_only_every_twentieth_group_is_sampled_whole(tmp_path):
    log = SampleLog(tmp_path / "s.jsonl")
    for seq in range(41):
        log.write(scored(seq, group_size=2), "boot.1", "trained", n=seq)
    assert [(line["seq"], line["rollout"]) for line in read(tmp_path / "s.jsonl")] == [
        (0, "p0.0"), (0, "p0.1"), (20, "p20.0"), (20, "p20.1"), (40, "p40.0"), (40, "p40.1"),
    ]


def test_a_sample_line_tells_who_wrote_which_token_and_what_both_models_thought(tmp_path):
    log = SampleLog(tmp_path / "s.jsonl", decode=lambda ids: "/".join(map(str, ids)))
    log.write(scored(0, outcome=Outcome(1.0, True)), "boot.3", "trained", n=12)
    (line,) = read(tmp_path / "s.jsonl")
    assert line == {
        "seq": 0, "attempt": "boot.3", "rollout": "p0.0", "fate": "trained", "n": 12, "group_id": "p0", "prompt": "3+4=",
        "completion": "5/6/2", "prompt_ids": [1, 3], "completion_ids": [5, 6, 2], "logprobs": [-0.12346, -14.5, 0.0],
        "teacher_logprobs": [-1.0, -2.0, -3.0], "weight_spans": [[0, 7, "keep"], [2, 8, "keep"]],
        "authors": [],
        "grade": {"reward": 1.0, "correct": True}, "finish": "stop", "temperature": 1.0, "top_p": 1.0,
    }


def test_a_replayed_step_adds_no_sample_but_another_attempt_does(tmp_path):
    SampleLog(tmp_path / "s.jsonl").write(scored(20), "boot.1", "trained", n=3)
    after_restart = SampleLog(tmp_path / "s.jsonl")
    after_restart.write(scored(20), "boot.1", "trained", n=3)
    after_restart.write(scored(20), "other.1", "trained", n=4)
    assert [line["attempt"] for line in read(tmp_path / "s.jsonl")] == ["boot.1", "other.1"]


def test_an_ungraded_rollout_has_no_grade_rather_than_a_zero(tmp_path):
    SampleLog(tmp_path / "s.jsonl").write(scored(0), "b.1", "filtered:truncated", n=-1)
    assert read(tmp_path / "s.jsonl")[0]["grade"] is None

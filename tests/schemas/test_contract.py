"""What crosses a process border does not change by accident, and no byte string does harm."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamopd.schemas import Array, Batch, Evidence, Group, Rollout, Scored, Span, TopK, decode, encode
from streamopd.schemas.teaching import JSON, MSGPACK, read_answer, read_request
from tests.schemas.examples import examples, group, rollout, scored, teaching
from tests.schemas.make_contract import CONTRACT, schema, teacher_golden, teacher_schema


@pytest.mark.parametrize("name", sorted(examples()))
def test_the_golden_bytes_are_what_is_written_and_read(name: str) -> None:
    record = examples()[name]
    golden = (CONTRACT / "golden" / f"{name}.msgpack").read_bytes()
    assert encode(record) == golden
    assert decode(type(record), golden) == record


def test_the_json_schema_is_that_of_the_structs() -> None:
    assert (CONTRACT / "schema.json").read_text() == schema()
    assert (CONTRACT / "teacher.json").read_text() == teacher_schema()


@pytest.mark.parametrize(("name", "body"), teacher_golden().items())
def test_what_is_said_to_a_teacher_outside_does_not_change_by_accident(name: str, body: bytes) -> None:
    assert (CONTRACT / "golden" / name).read_bytes() == body


@pytest.mark.parametrize("form", [JSON, MSGPACK])
def test_both_forms_say_the_same(form: str) -> None:
    end = form.rpartition("/")[2]
    golden = CONTRACT / "golden"
    assert read_request((golden / f"teacher_request.{end}").read_bytes(), form) == teaching()["request"]
    assert read_answer((golden / f"teacher_answer.{end}").read_bytes(), form) == teaching()["answer"]


@given(st.binary(max_size=300))
def test_any_byte_string_gives_a_record_or_a_value_error(body: bytes) -> None:
    for kind in (Group, Scored, Batch):
        try:
            decode(kind, body)
        except ValueError:
            continue


@given(st.integers(min_value=0, max_value=10_000), st.integers(min_value=1, max_value=255))
def test_a_flipped_byte_never_gives_a_record_of_another_length(at: int, mask: int) -> None:
    body = bytearray(encode(scored()))
    body[at % len(body)] ^= mask
    try:
        record = decode(Scored, bytes(body))
    except ValueError:
        return
    for rollout_, views in zip(record.group.rollouts, record.views, strict=True):
        assert len(rollout_.logprobs) == len(rollout_.completion_ids)
        assert all(len(view.logprobs) == len(rollout_.completion_ids) for view in views)
        assert not np.isnan(rollout_.logprobs.numpy()).any()


def test_an_over_size_record_is_refused_with_both_numbers() -> None:
    body = encode(group())
    with pytest.raises(ValueError, match=rf"{len(body)} bytes is over the cap of 100"):
        decode(Group, body, max_bytes=100)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_an_array_is_read_back_as_it_was(values: list[float]) -> None:
    array = Array.of(values, "float32")
    assert np.array_equal(decode(Array, encode(array)).numpy(), np.asarray(values, np.float32))


def _changed(**fields: object) -> Rollout:
    before = rollout()
    return Rollout(**{name: getattr(before, name) for name in before.__struct_fields__} | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"logprobs": Array.of([-1.0], "float32")}, "3 completion ids but 1 logprobs"),
        ({"logprobs": Array.of([-1.0, float("nan"), -1.0], "float32")}, "nan"),
        ({"logprobs": Array.of([-1.0, 2.0, -1.0], "float32")}, "at most 0"),
        ({"weight_spans": [Span(1, 3)]}, "do not begin at token 0"),
        ({"weight_spans": [Span(0, 4), Span(1, 3)]}, "do not cover 3 tokens in order"),
        ({"weight_spans": [Span(0, 3), Span(3, 4)]}, "do not cover 3 tokens in order"),
    ],
)
def test_an_impossible_rollout_cannot_be_made(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _changed(**fields)


def test_scores_of_another_length_are_refused_with_both_numbers() -> None:
    short = Evidence(rollout_id="p7.0", logprobs=Array.of([-1.0, -1.0], "float32"))
    with pytest.raises(ValueError, match="3 generated tokens but 2 scores"):
        Scored(id="p7", run="r", method="m", born_s=0.0, group=group(), views=[[short]])


def test_a_support_of_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[G, K\]"):
        TopK(Array.of([[1, 2]], "int32"), Array.of([[-1.0]], "float16"))


def test_the_flat_import_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent))
    for name in ("schemas", "services"):
        with pytest.raises(ImportError, match=f"streamopd.{name}"):
            importlib.import_module(name)
        sys.modules.pop(name, None)

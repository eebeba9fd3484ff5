"""Write schemas/contract/ from the Structs: the golden bytes and the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from streamopd.schemas import encode
from streamopd.schemas.teaching import JSON, MSGPACK, Complaint, PlainAnswer, PlainRequest, TeacherInfo, Vocabulary, write_message
from tests.schemas.examples import examples, teaching

CONTRACT = Path(__file__).parent.parent.parent / "schemas" / "contract"


def schema() -> str:
    """The JSON Schema of every record, as text."""
    kinds = [type(record) for record in examples().values()]
    refs, components = msgspec.json.schema_components(kinds)
    named = {kind.__name__: ref for kind, ref in zip(kinds, refs, strict=True)}
    return json.dumps({"records": named, "$defs": components}, indent=1, sort_keys=True) + "\n"


def teacher_schema() -> str:
    """The JSON Schema of the messages to and from a teacher outside, as text."""
    kinds = {"GET /info": TeacherInfo, "GET /vocabulary": Vocabulary, "POST /score": PlainRequest, "its answer": PlainAnswer,
             "not 200": Complaint}
    refs, components = msgspec.json.schema_components(list(kinds.values()))
    named = dict(zip(kinds, refs, strict=True))
    return json.dumps({"messages": named, "$defs": components}, indent=1, sort_keys=True) + "\n"


def teacher_golden() -> dict[str, bytes]:
    """File name -> bytes of each message in both forms."""
    forms = {"json": JSON, "msgpack": MSGPACK}
    return {f"teacher_{name}.{end}": write_message(message, form) for name, message in teaching().items() for end, form in forms.items()}


if __name__ == "__main__":
    (CONTRACT / "golden").mkdir(exist_ok=True)
    for name, record in examples().items():
        (CONTRACT / "golden" / f"{name}.msgpack").write_bytes(encode(record))
    for name, body in teacher_golden().items():
        (CONTRACT / "golden" / name).write_bytes(body)
    (CONTRACT / "schema.json").write_text(schema())
    (CONTRACT / "teacher.json").write_text(teacher_schema())

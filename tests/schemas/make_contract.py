"""Write schemas/contract/ from the Structs: the golden bytes and the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from streamopd.schemas import encode
from tests.schemas.examples import examples

CONTRACT = Path(__file__).parent.parent.parent / "schemas" / "contract"


def schema() -> str:
    """The JSON Schema of every record, as text."""
    kinds = [type(record) for record in examples().values()]
    refs, components = msgspec.json.schema_components(kinds)
    named = {kind.__name__: ref for kind, ref in zip(kinds, refs, strict=True)}
    return json.dumps({"records": named, "$defs": components}, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    (CONTRACT / "golden").mkdir(exist_ok=True)
    for name, record in examples().items():
        (CONTRACT / "golden" / f"{name}.msgpack").write_bytes(encode(record))
    (CONTRACT / "schema.json").write_text(schema())

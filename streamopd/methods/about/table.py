"""The tables of README.md and docs/methods.md, written between their markers: `python -m streamopd.methods.about.table`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec

from streamopd import methods, slots
from streamopd.slots import Behaviour, Method, Slot

from .describe import composition, short
from .needs import needs

PRIMITIVES: dict[str, tuple[type[Slot], ...]] = {
    "behaviour": tuple(Behaviour.__subclasses__()),
    "teachers": get_args(slots.Teachers),
    "select": get_args(slots.Select),
    "target": get_args(slots.Target),
    "support": get_args(slots.Support),
    "loss": get_args(slots.Loss),
    "shape": get_args(slots.Shape),
    "when": get_args(slots.When),
    "weight": get_args(slots.Weight),
    "score, in Keep": get_args(slots.Score),
    "correction": get_args(slots.Correction),
    "age_weight": get_args(slots.AgeWeight),
    "end of a stage": (slots.Plateau,),
    "a number that moves": (slots.Linear, slots.Cosine, slots.Cliff),
}


def every_method() -> list[Method]:
    return [methods.load(name) for name in methods.names()]


def compositions() -> str:
    """Name, paper, evidence and what it is made of."""
    return _rows(
        ("method", "paper", "evidence", "composition"),
        ((f"`{m.name}`", _link(m.paper), m.evidence_level, f"= `{m.alias_of}`" if m.alias_of else composition(m)) for m in every_method()),
    )


def all_needs() -> str:
    """What each method needs, and why it is only inspired by its paper."""
    return _rows(("method", "needs", "what is not the paper's"), ((f"`{m.name}`", "; ".join(needs(m)), m.note) for m in every_method()))


def all_slots() -> str:
    """Every setting of every primitive with its defaults."""
    return _rows(("primitive", "setting", ""), (
        (primitive if first else "", f"`{_signature(kind)}`", " ".join((inspect.getdoc(kind) or "").split()))
        for primitive, kinds in PRIMITIVES.items() for first, kind in ((kind is kinds[0], kind) for kind in kinds)
    ))


TABLES = {
    Path("README.md"): {"methods": compositions},
    Path("docs/methods.md"): {"slots": all_slots, "needs": all_needs},
}


def with_tables(text: str, file: Path) -> str:
    """The text of a file with its tables as they must be now."""
    for name, table in TABLES[file].items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert between.search(text), f"{file} has no markers <!-- {name} --> and <!-- /{name} -->"
        text = between.sub(lambda found, table=table: found[1] + table() + found[2], text)  # type: ignore[misc]
    return text


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in lines)


def _signature(kind: type[Slot]) -> str:
    told = [
        field.name if field.default is msgspec.NODEFAULT else f"{field.name}={_literal(field.default)}"
        for field in msgspec.structs.fields(kind)
    ]
    return f"{kind.__name__}({', '.join(told)})"


def _literal(value: object) -> str:
    return f"{short(value)}()" if isinstance(value, Slot) else repr(value)


def _link(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    for file in TABLES:
        file.write_text(with_tables(file.read_text(), file))

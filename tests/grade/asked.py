"""Prompts to grade."""

from __future__ import annotations

from streamopd.schemas import Array, Prompt


def asked(text: str = "1+2=", solution: str | None = "3", seq: int = 0, **meta: str) -> Prompt:
    return Prompt(
        id=f"p{seq}", run="r", method="m", born_s=0.0, seq=seq, prompt_ids=Array.of([1], "int32"),
        text=text, solution=solution, meta=meta,
    )

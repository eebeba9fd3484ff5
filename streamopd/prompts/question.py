"""One question as its source gives it: text, before any tokenizer."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from streamopd.schemas import Turn


class Question(Struct, frozen=True, omit_defaults=True):
    """What is asked, and what a grader needs to judge the answer."""

    text: str                            # the question; of a conversation, its last user turn
    solution: str | None = None          # None: nothing to verify
    teacher_id: str = "default"
    meta: dict[str, str] = {}            # what else the source says, for graders
    messages: tuple[Turn, ...] = ()      # a conversation that ends before the answer; () = only `text`
    completion: str | None = None        # the source's own answer, to learn from; None: it has none

    @property
    def key(self) -> Any:
        """Two questions with equal keys are the same question, whatever their solution."""
        return self.messages or self.text

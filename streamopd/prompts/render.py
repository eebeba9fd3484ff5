"""A question becomes a Prompt: text to ids, here and nowhere else. The ids travel from then on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from streamopd.errors import ConfigError, UserError
from streamopd.schemas import Array, Prompt, Turn

from .gold import gold_ids
from .question import Question
from .tokenizer import Tokenizer


class Renderer:
    """Renders the questions of one run, for the student and for teachers with a context of their own.

    `max_gold_length` is what an answer of the data's own may have, in tokens; 0: the method asks for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        run: str,
        method_digest: str,
        teacher_prompts: Mapping[str, Sequence[Turn]],
        system_prompt: str,
        max_prompt_length: int,
        max_gold_length: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.run = run
        self.method_digest = method_digest
        self.teacher_prompts = {teacher: tuple(turns) for teacher, turns in teacher_prompts.items() if turns}
        self.system = (Turn("system", system_prompt),) if system_prompt else ()
        self.max_prompt_length = max_prompt_length
        self.max_gold_length = max_gold_length
        self._refuse_turns_without_template()

    def prompt(self, seq: int, question: Question, *, gold: bool = True) -> Prompt:
        """The Prompt of question `seq`. UserError when it is too long, or has not the answer that the method asks for.

        `gold` = False: nothing will be learnt from it, so that none is wanted.
        """
        ids = self._student_ids(question)
        if len(ids) > self.max_prompt_length:
            raise UserError(
                f"Question {seq} has {len(ids)} tokens, and data.max_prompt_length is {self.max_prompt_length} (prompts are "
                f"never cut). Raise it to {len(ids)} or more, or take the question out of the data: {question.text[:60]!r}"
            )
        teacher_ids = self._teacher_ids(question)
        return Prompt(
            id=f"p{seq}",
            run=self.run,
            method=self.method_digest,
            born_s=time.time(),
            seq=seq,
            prompt_ids=Array.of(ids, "int32"),
            text=question.text,
            solution=question.solution,
            teacher_id=question.teacher_id,
            teacher_prompt_ids=None if teacher_ids is None else Array.of(teacher_ids, "int32"),
            meta=question.meta,
            gold_ids=self._gold_ids(seq, question) if gold and self.max_gold_length else None,
        )

    def check(self, questions: Iterable[Question], *, gold: bool = True) -> None:
        """Render each once, so that what is too long, is missing or is refused by the template is told before the run."""
        for number, question in enumerate(questions):
            self.prompt(number, question, gold=gold)

    def _gold_ids(self, seq: int, question: Question) -> Array:
        return Array.of(gold_ids(seq, question, self.tokenizer, self.max_gold_length), "int32")

    def _student_ids(self, question: Question) -> list[int]:
        if not question.messages and not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(question.text)
        turns = _conversation(question)
        own_system = any(turn.role == "system" for turn in turns)  # a row's own system turn is more particular than the run's
        return self.tokenizer.render(turns if own_system else (*self.system, *turns))

    def _teacher_ids(self, question: Question) -> list[int] | None:
        """The teacher's turns stand in the place of every system turn, before the question. None: it sees the student's."""
        opening = self.teacher_prompts.get(question.teacher_id)
        if opening is None:
            return None
        return self.tokenizer.render((*opening, *(turn for turn in _conversation(question) if turn.role != "system")))

    def _refuse_turns_without_template(self) -> None:
        keys = [f"teachers.{teacher}.teacher_prompt" for teacher in self.teacher_prompts]
        keys += ["data.system_prompt"] if self.system else []
        if keys and not self.tokenizer.has_chat_template:
            raise ConfigError(
                f"{' and '.join(keys)} would be a turn of a conversation, but the tokenizer in {self.tokenizer.folder} has no "
                "chat template. Remove the setting, or use a model with one (an instruct model)."
            )


def _conversation(question: Question) -> tuple[Turn, ...]:
    return question.messages or (Turn("user", question.text),)

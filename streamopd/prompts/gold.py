"""Gold: the dataset's own answer to a question, as the ids that its student learns to write."""

from __future__ import annotations

from streamopd.errors import UserError

from .question import Question
from .tokenizer import Tokenizer


def gold_ids(seq: int, question: Question, tokenizer: Tokenizer, longest: int) -> list[int]:
    """[G <= longest] ids of the answer to question `seq`, a stop id at the end and nowhere before.

    UserError when there is no answer, when it is longer, or when it ends before its end: an answer is never cut.
    """
    if question.completion is None:
        raise UserError(
            f"Question {seq} comes without an answer, and the method learns from the data's own: {question.text[:60]!r}. Give each row "
            "a column \"completion\" (a text, or one message of the assistant), or \"messages\" that end with the assistant's; or choose "
            "chain-sum, or a method whose answers "
            "the student or a teacher writes."
        )
    ids = tokenizer.encode_answer(question.completion)
    stops = [place for place, token in enumerate(ids[:-1]) if token in tokenizer.stop_ids]
    if stops:
        raise UserError(
            f"The answer to question {seq} has {len(ids)} tokens, and number {stops[0] + 1} of them ends it "
            f"({tokenizer.stop_ids} do): {question.completion[:60]!r}. Take that token out of the data, or the question."
        )
    if len(ids) > longest:
        raise UserError(
            f"The answer to question {seq} has {len(ids)} tokens with its end, and generator.max_completion_length is {longest} "
            f"(answers are never cut). Raise it to {len(ids)} or more, or take the question out of the data: {question.text[:60]!r}"
        )
    return ids

"""Chain sums: one-digit terms, + and -, every running total >= 0. `7+2-0=` is answered `7+2=9-0=9`."""

from __future__ import annotations

import re
from random import Random

from msgspec import Struct

from streamopd.errors import ConfigError

from .question import Question

MOVE = re.compile(r"[+-]\d")  # one more term, with its sign


class ChainSum(Struct, frozen=True, kw_only=True):
    """The task and its options. The number of terms is uniform; so is each term among those that keep the total >= 0."""

    min_terms: int = 3
    max_terms: int = 7

    name = "chain-sum"

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.max_terms:
            raise ConfigError(
                f"chain-sum has min_terms = {self.min_terms} and max_terms = {self.max_terms}. "
                "Set 2 <= min_terms <= max_terms in data.options."
            )

    def draw(self, stream: str, index: int) -> Question:
        """Question `index` of a stream: a pure function of the two and the options."""
        rng = Random(f"{self.name}/{stream}/{index}")
        total = rng.randint(0, 9)
        text = str(total)
        for _ in range(rng.randint(self.min_terms, self.max_terms) - 1):
            move = _draw_move(rng, total)
            total += int(move)
            text += move
        return Question(f"{text}=", solution=str(total), completion=work_out(text))


def work_out(question: str) -> str:
    """The answer with its working: `7+2-0=` -> `7+2=9-0=9`."""
    work, total = question[0], int(question[0])
    for move in MOVE.findall(question):
        total += int(move)
        work += f"{move}={total}"
    return work


def _draw_move(rng: Random, total: int) -> str:
    """A signed digit that keeps the running total at 0 or above."""
    while True:
        move = rng.choice("+-") + str(rng.randint(0, 9))
        if total + int(move) >= 0:
            return move

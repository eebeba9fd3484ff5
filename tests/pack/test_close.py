"""A batch is its groups in their order, of one run and one method."""

from __future__ import annotations

import pytest

from streamopd.errors import GarbageRecord
from streamopd.pack.close import to_batch
from streamopd.schemas import Array, Group, Prompt, Scored


def make_scored(seq: int, run: str = "r", method: str = "m") -> Scored:
    prompt = Prompt(id=f"p{seq}", run=run, method=method, born_s=0.0, seq=seq, prompt_ids=Array.of([1], "int32"))
    group = Group(id=f"g{seq}", run=run, method=method, born_s=0.0, prompt=prompt, rollouts=[])
    return Scored(id=f"s{seq}", run=run, method=method, born_s=0.0, group=group, views=[])


def test_a_batch_keeps_the_order_of_its_groups() -> None:
    batch = to_batch(7, "r", "m", 1.5, [make_scored(4), make_scored(2)])
    assert (batch.id, batch.n, batch.born_s) == ("b7", 7, 1.5)
    assert [item.group.prompt.seq for item in batch.items] == [4, 2]


@pytest.mark.parametrize("stranger", [make_scored(1, run="other"), make_scored(1, method="other")])
def test_a_group_of_another_run_or_method_is_refused_with_both_names(stranger: Scored) -> None:
    with pytest.raises(GarbageRecord, match=r"g1 .*other.* batch 7 is of run 'r', method 'm'"):
        to_batch(7, "r", "m", 0.0, [make_scored(0), stranger])

"""Every deliberate break turns its test red: the tests can see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.breaks import BREAKS, ROOT, Break, turns_red


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_a_break_has_exactly_one_place(broken: Break) -> None:
    assert (ROOT / broken.file).read_text().count(broken.old) == 1, f"{broken.file} and tests/breaks.py have grown apart"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_a_break_turns_its_test_red(broken: Break, tmp_path: Path) -> None:
    assert turns_red(broken, tmp_path)

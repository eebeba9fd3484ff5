"""final/ says whose end it is."""

from __future__ import annotations

from pathlib import Path

from streamopd.learn.final import mark, marked_step, unmark


def test_a_marked_folder_names_its_step_to_its_own_run_only(tmp_path: Path) -> None:
    mark(tmp_path, "mine", 7)
    assert marked_step(tmp_path, "mine") == 7
    assert marked_step(tmp_path, "yours") is None


def test_a_folder_that_is_not_there_or_not_marked_has_no_step(tmp_path: Path) -> None:
    mark(tmp_path, "mine", 7)
    unmark(tmp_path)
    unmark(tmp_path)
    assert marked_step(tmp_path, "mine") is None
    assert marked_step(tmp_path / "nowhere", "mine") is None
    unmark(tmp_path / "nowhere")

"""The report is one page that needs nothing else, shows every chart, and never runs what a model wrote."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from streamopd.watch.journal import Journal, read
from streamopd.watch.report import idle_shares, write_report
from tests.watch.conftest import EVIL

CHARTS = ("Distance from the teacher", "Accuracy", "Age of trained tokens", "Length of answers", "Throughput", "Who waited")


def test_the_page_shows_every_chart_the_figures_and_the_answers(run_folder):
    page = write_report(run_folder).read_text()
    assert re.findall(r'aria-label="([^"]+)"', page) == list(CHARTS)
    assert "nothing recorded" not in page
    assert "0.25 → 0.98" in page
    assert "teacher 0.988" in page
    assert "7+2=9+7=16-0=16+9=25  ✓" in page
    assert "completed after 120 steps" in page
    assert "teacher-0 ended with code -9" in page


def test_what_a_model_wrote_is_text_and_nothing_else(run_folder):
    page = write_report(run_folder).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;document.title" in page
    assert EVIL not in page
    assert "\x00" not in page
    assert "\x1b" not in page


def test_the_page_needs_nothing_but_itself(run_folder):
    page = write_report(run_folder).read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page


def test_settings_that_are_the_default_are_not_listed(run_folder):
    page = write_report(run_folder).read_text()
    assert "<td>learn.lr</td><td>0.0015</td>" in page
    assert "<td>group_size</td>" not in page


def test_a_run_without_any_file_still_gives_a_page(tmp_path):
    page = write_report(tmp_path).read_text()
    assert page.count("nothing recorded") == len(CHARTS)
    assert "no summary.json yet" in page
    assert "Nothing was evaluated." in page


def test_a_run_under_way_gives_a_page_so_far(run_folder):
    (run_folder / "summary.json").unlink()
    lines = read(run_folder / "metrics.jsonl")
    (run_folder / "metrics.jsonl").unlink()
    Journal(run_folder / "metrics.jsonl").write(lines[0])
    page = write_report(run_folder).read_text()
    assert "1 steps so far" in page


def test_waiting_is_between_joining_and_leaving_over_all_lives():
    def event(kind, source, born_s, **data):
        return {"kind": kind, "source": source, "born_s": born_s, "data": data}

    events = [
        event("join", "teacher-0", 0.0), event("join", "teacher-1", 0.0),
        event("leave", "teacher-1", 10.0, wait_s=9.0), event("leave", "teacher-0", 10.0, wait_s=1.0),
        event("join", "generator-0", 0.0), event("leave", "packer-0", 5.0, wait_s=1.0),
    ]
    metrics = [{"n": 1, "metrics": {"wait_s": 1.0, "busy_s": 3.0}}]
    assert idle_shares(metrics, events) == {"teacher": 0.5, "learner": 0.25}


def test_only_the_last_events_are_on_the_page_and_the_others_are_counted(run_folder):
    journal = Journal(run_folder / "events.jsonl")
    for i in range(300):
        journal.write({"kind": "alarm", "source": "learner-0", "born_s": 1020.0 + i, "text": f"alarm {i}"})
    page = write_report(run_folder).read_text()
    assert "alarm 299" in page
    assert "alarm 10<" not in page
    assert "110 earlier events are in events.jsonl" in page


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    browser = shutil.which("chromium")
    assert browser, "the browser tests need chromium: apt-get install chromium"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    own = f"--user-data-dir={page.parent / 'browser'}"
    return subprocess.run([browser, *quiet, own, *flags, page.as_uri()], capture_output=True, text=True, timeout=90, check=True)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_chart_without_a_complaint(run_folder, scheme):
    page, shot = write_report(run_folder), run_folder / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    seen = browse(page, *dark, "--window-size=1200,2200", f"--screenshot={shot}")
    dom = browse(page, *dark, "--dump-dom")
    assert "CONSOLE" not in seen.stderr + dom.stderr
    assert "<title>quickstart · streamopd</title>" in dom.stdout  # nothing the model wrote was run
    assert shot.stat().st_size > 60_000

"""The disk grants, keeps and gives back: whole checkpoints in the order of (lineage, n), and nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamopd.errors import UserError
from streamopd.learn.checkpoint import Checkpoint, grant_lineage, load_newest, newest_lineage, save


class Bytes:
    """A state of `nbytes` bytes."""

    def __init__(self, nbytes: int = 100, fill: bytes = b"x") -> None:
        self.nbytes, self.fill = nbytes, fill

    def save(self, folder: Path) -> None:
        (folder / "trainer.safetensors").write_bytes(self.fill * self.nbytes)


def checkpoint(lineage: int, n: int, **values: object) -> Checkpoint:
    record = {0: "trained", 7: "dead:poison"}
    settings: dict[str, object] = {"boot": "b", "record": record, "dataset_digest": "d", "method_digest": "c"}
    return Checkpoint(lineage=lineage, n=n, **(settings | values))


# ---------------------------------------------------------------- lineages
def test_every_learner_is_granted_a_lineage_of_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        granted = list(pool.map(lambda _: grant_lineage(tmp_path / "state"), range(24)))
    assert sorted(granted) == list(range(1, 25))
    assert newest_lineage(tmp_path / "state") == 24


def test_no_state_means_no_lineage_and_no_checkpoint(tmp_path: Path) -> None:
    assert newest_lineage(tmp_path / "none") == 0
    assert load_newest(tmp_path / "none") is None
    assert load_newest(tmp_path) is None


# ---------------------------------------------------------------- saving and loading
def test_what_was_saved_comes_back_whole(tmp_path: Path) -> None:
    saved = checkpoint(2, 9, done=True, unused=[3, 4], fed=4)
    folder = save(tmp_path, saved, Bytes())
    found = load_newest(tmp_path)
    assert found is not None
    assert found.checkpoint == saved
    assert found.folder == folder
    assert found.warnings == []
    assert (folder / "trainer.safetensors").read_bytes() == b"x" * 100


def test_the_newest_is_the_highest_lineage_then_n_whatever_the_clock_says(tmp_path: Path) -> None:
    for lineage, n in ((3, 9), (2, 100), (3, 10)):
        save(tmp_path, checkpoint(lineage, n), Bytes())
    os.utime(tmp_path / "ckpt-3-9")
    found = load_newest(tmp_path)
    assert found is not None
    assert (found.checkpoint.lineage, found.checkpoint.n) == (3, 10)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for n in range(8, 12):
        save(tmp_path, checkpoint(1, n), Bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-1-10", "ckpt-1-11"]


def test_saving_one_step_again_replaces_its_record_and_keeps_its_weights(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1, 5), Bytes(fill=b"x"))
    save(tmp_path, checkpoint(1, 5, done=True, fed=2), Bytes(fill=b"y"))
    found = load_newest(tmp_path)
    assert found is not None
    assert found.checkpoint.done
    assert (found.folder / "trainer.safetensors").read_bytes() == b"x" * 100


@pytest.mark.parametrize("harm", ["flip a bit", "cut the state", "lose the state", "cut the record", "lose the record"])
def test_an_unreadable_newest_gives_way_to_the_one_before_it_and_says_so(tmp_path: Path, harm: str) -> None:
    save(tmp_path, checkpoint(1, 4), Bytes())
    newest = save(tmp_path, checkpoint(1, 5), Bytes())
    victim = newest / ("checkpoint.json" if "record" in harm else "trainer.safetensors")
    body = victim.read_bytes()
    victim.write_bytes(bytes([body[0] ^ 1]) + body[1:] if "flip" in harm else body[:-1])
    if "lose" in harm:
        victim.unlink()
    found = load_newest(tmp_path)
    assert found is not None
    assert found.checkpoint.n == 4
    (warning,) = found.warnings
    assert "ckpt-1-5 cannot be read" in warning


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_silently_start_anew(tmp_path: Path) -> None:
    (save(tmp_path, checkpoint(1, 4), Bytes()) / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        load_newest(tmp_path)


# ---------------------------------------------------------------- what can fail
def run_python(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    head = "from pathlib import Path\nimport os, resource, signal, sys\nfrom streamopd.learn.checkpoint import *\n"
    head += "first = Checkpoint(boot='b', lineage=1, n=1, record={}, dataset_digest='', method_digest='')\n"
    head += "second = Checkpoint(boot='b', lineage=1, n=2, record={}, dataset_digest='', method_digest='')\n"
    command = [sys.executable, "-c", head + textwrap.dedent(body), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_learner_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    killed = run_python("""
        class State:
            nbytes = 100
            def __init__(self, dies): self.dies = dies
            def save(self, folder):
                (folder / "trainer.safetensors").write_bytes(b"x" * 50)
                if self.dies: os.kill(os.getpid(), signal.SIGKILL)
        save(Path(sys.argv[1]), first, State(False))
        save(Path(sys.argv[1]), second, State(True))
    """, tmp_path)
    assert killed.returncode == -9, killed.stderr
    found = load_newest(tmp_path)
    assert found is not None
    assert found.checkpoint.n == 1
    assert found.warnings == []
    save(tmp_path, checkpoint(2, 2), Bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-1-1", "ckpt-2-2"], "the half-written one is swept"


def test_a_write_that_fails_midway_is_the_users_to_mend_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    refused = run_python("""
        class State:
            nbytes = 100
            def __init__(self, size): self.size = size
            def save(self, folder): (folder / "trainer.safetensors").write_bytes(b"x" * self.size)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save(Path(sys.argv[1]), first, State(10))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(Path(sys.argv[1]), second, State(1 << 20))
        except UserError as error:
            print(error)
    """, tmp_path)
    assert "it needs 100 bytes" in refused.stdout, refused.stderr
    assert str(tmp_path) in refused.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-1-1"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it needs 1,152,921,504,606,846,976 bytes, [\d,]+ are free"):
        save(tmp_path, checkpoint(1, 1), Bytes(1 << 60))
    assert list(tmp_path.iterdir()) == []

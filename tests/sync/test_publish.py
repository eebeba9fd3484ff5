"""Publishing: complete folders only, the old ones deleted unless somebody reads them."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamopd.errors import UserError
from streamopd.schemas import TensorInfo
from streamopd.sync.digest import describe, digest
from streamopd.sync.lease import delete_unread, read_lease
from streamopd.sync.publish import publish, versions
from streamopd.sync.swap import read_manifest

from .conftest import Publish, Tied, tensors_of

READER = """
import sys
from pathlib import Path
from streamopd.sync.lease import read_lease
with read_lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_says_which_stage_of_the_method_has_begun(source: Path, weights_dir: Path) -> None:
    publish("r", "b", 3, tensors_of(Tied(3)), source, weights_dir, 4, fsync=False, stage=2)
    assert read_manifest(weights_dir, "weight_v000003").stage == 2


def test_a_version_is_a_complete_folder_under_its_manifest(publish_n: Publish, weights_dir: Path) -> None:
    weights = publish_n(12)
    assert weights.folder == "weight_v000012"
    assert names(weights_dir) == [weights.folder]
    assert names(weights_dir / weights.folder) == [
        "chat_template.jinja", "config.json", "manifest.json", "merges.txt", "model.safetensors", "tokenizer.json",
    ]
    assert read_manifest(weights_dir, weights.folder) == weights
    stored = load_file(weights_dir / weights.folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors_of(Tied(12)).items())
    assert weights.nbytes == sum(tensor.nbytes for tensor in stored.values())


def test_a_version_can_be_read_by_generators_that_are_other_users(publish_n: Publish, weights_dir: Path) -> None:
    folder = weights_dir / publish_n(1).folder
    assert folder.stat().st_mode & 0o005 == 0o005
    assert all(file.stat().st_mode & 0o004 for file in folder.iterdir())


def test_a_digest_is_of_the_bytes_whatever_the_dtype_and_layout() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert digest(values) == digest(values.clone()) != digest(values.T)
    assert digest(values.T) == digest(values.T.contiguous())
    assert digest(torch.zeros(2)) != digest(torch.tensor([0.0, -0.0]))
    info = describe("scale", torch.tensor(1.5, dtype=torch.bfloat16))
    assert info == TensorInfo("scale", "bfloat16", (), info.digest)


def test_only_the_newest_versions_are_kept(publish_n: Publish, weights_dir: Path) -> None:
    for n in (0, 1, 2, 5, 6):
        publish_n(n, keep=3)
    assert versions(weights_dir) == [2, 5, 6]


def test_versions_of_a_life_that_was_rolled_back_are_deleted(publish_n: Publish, weights_dir: Path) -> None:
    for n in range(6):
        publish_n(n)
    publish_n(3, boot="b2")
    assert versions(weights_dir) == [2, 3]
    assert read_manifest(weights_dir, "weight_v000003").boot == "b2"


def test_a_version_published_again_replaces_the_first(publish_n: Publish, weights_dir: Path) -> None:
    publish_n(1)
    again = publish_n(1, tensors_of(Tied(99)))
    assert read_manifest(weights_dir, again.folder) == again
    assert names(weights_dir) == [again.folder]


def test_what_a_killed_writer_left_is_cleared(publish_n: Publish, weights_dir: Path) -> None:
    publish_n(0)
    for left in (".unfinished-weight_v000001-x", ".replaced-weight_v000000-y/weight_v000000"):
        (weights_dir / left).mkdir(parents=True)
        (weights_dir / left / "model.safetensors").write_bytes(b"half")
    publish_n(1)
    assert names(weights_dir) == ["weight_v000000", "weight_v000001"]


def test_companions_are_shared_with_the_source_not_copied(publish_n: Publish, weights_dir: Path, source: Path) -> None:
    folder = weights_dir / publish_n(0).folder
    assert (folder / "tokenizer.json").samefile(source / "tokenizer.json")


def test_a_full_disk_names_what_is_needed_and_what_is_free(source: Path, weights_dir: Path) -> None:
    vast = {"vast": torch.zeros(1).expand(1 << 50)}
    with pytest.raises(UserError, match=r"need 4,503,\d{3},\d{3},\d{3},\d{3} bytes and [\d,]+ are free.\n.*keep_versions"):
        publish("r", "b", 0, vast, source, weights_dir, keep=2, fsync=False)
    assert shutil.disk_usage(weights_dir).free > 0
    assert names(weights_dir) == []


def test_fsync_changes_nothing_but_durability(source: Path, weights_dir: Path) -> None:
    weights = publish("r", "b", 0, tensors_of(Tied()), source, weights_dir, keep=2, fsync=True)
    assert read_manifest(weights_dir, weights.folder) == weights


# ---------------------------------------------------------------- leases
def test_a_held_version_outlives_its_time_until_it_is_released(publish_n: Publish, weights_dir: Path) -> None:
    held = weights_dir / publish_n(0, keep=2).folder
    with read_lease(held):
        for n in range(1, 4):
            publish_n(n, keep=2)
        assert versions(weights_dir) == [0, 2, 3]
    publish_n(4, keep=2)
    assert versions(weights_dir) == [3, 4]


def test_the_kernel_frees_the_lease_of_a_killed_reader(publish_n: Publish, weights_dir: Path) -> None:
    held = weights_dir / publish_n(0).folder
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "held\n"
    assert not delete_unread(held)
    assert held.exists()
    reader.kill()
    reader.communicate()
    assert delete_unread(held)
    assert not held.exists()


def test_a_replaced_version_stays_readable_to_whoever_holds_it(publish_n: Publish, weights_dir: Path) -> None:
    publish_n(1)
    with read_lease(weights_dir / "weight_v000001"):
        publish_n(1, tensors_of(Tied(99)))
        (aside,) = weights_dir.glob(".replaced-*")
        assert names(aside) == ["weight_v000001"]
    publish_n(2)
    assert names(weights_dir) == ["weight_v000001", "weight_v000002"]


def test_a_version_replaced_between_opening_and_locking_cannot_be_leased(
    publish_n: Publish, weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock = weights_dir / publish_n(1).folder, fcntl.flock

    def replace_then_lock(file: object, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        publish_n(1, tensors_of(Tied(99)))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replace_then_lock)
    with pytest.raises(FileNotFoundError, match="was replaced while it was being opened"), read_lease(folder):
        pass


def test_a_deleted_version_cannot_be_leased(publish_n: Publish, weights_dir: Path) -> None:
    folder = weights_dir / publish_n(0).folder
    assert delete_unread(folder)
    with pytest.raises(FileNotFoundError), read_lease(folder):
        pass

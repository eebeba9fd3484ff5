"""Weights that are read while answers go on: held until they are taken, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamopd.errors import SwapRefused
from streamopd.generate.coming import Coming
from streamopd.schemas import Weights
from streamopd.sync.lease import delete_unread
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader

Publish = Callable[[int], Weights]


@pytest.fixture
def publish_n(tmp_path: Path) -> Publish:
    (tmp_path / "source").mkdir()

    def make(n: int) -> Weights:
        return publish("r", "b", n, {"w": torch.full((3,), float(n))}, tmp_path / "source", tmp_path / "weights", 9, fsync=False)

    return make


@pytest.fixture
def coming() -> Coming:
    return Coming(Loader(), torch.float32)


def test_what_is_prepared_is_taken_and_its_folder_stays_until_then(coming: Coming, publish_n: Publish, tmp_path: Path) -> None:
    manifest, weights = publish_n(1), tmp_path / "weights"
    coming.prepare(manifest, weights)
    assert not delete_unread(weights / manifest.folder), "somebody may delete what is about to be swapped in"
    with coming.take(manifest, weights) as fresh:
        assert fresh["w"].tolist() == [1, 1, 1]
    assert delete_unread(weights / manifest.folder)


def test_another_version_takes_its_place(coming: Coming, publish_n: Publish, tmp_path: Path) -> None:
    first, second, weights = publish_n(1), publish_n(2), tmp_path / "weights"
    coming.prepare(first, weights)
    with coming.take(second, weights) as fresh:
        assert fresh["w"].tolist() == [2, 2, 2]
    assert delete_unread(weights / first.folder)


def test_what_cannot_be_verified_is_refused_before_the_engine_stands_still(coming: Coming, publish_n: Publish, tmp_path: Path) -> None:
    manifest, weights = publish_n(1), tmp_path / "weights"
    file = weights / manifest.folder / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    with pytest.raises(SwapRefused, match="the file has"):
        coming.prepare(manifest, weights)
    assert delete_unread(weights / manifest.folder), "a refused version is let go of"

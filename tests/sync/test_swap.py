"""Swapping: what disagrees is refused with both values before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from streamopd.errors import SwapRefused
from streamopd.schemas import Weights
from streamopd.sync.swap import TornWeights, read_manifest, swap_in

from .conftest import Publish, Tied, same, tensors_of


def test_a_swap_copies_into_the_storages_that_are_there(publish_n: Publish, weights_dir: Path) -> None:
    model = Tied(0)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    swap_in(model, publish_n(3), weights_dir)
    assert same(model, tensors_of(Tied(3)))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert model.head.weight is model.embed.weight


def test_both_names_of_a_tied_tensor_may_be_published(publish_n: Publish, weights_dir: Path) -> None:
    tensors = tensors_of(Tied(3))
    swap_in(model := Tied(0), publish_n(3, tensors | {"head.weight": tensors["embed.weight"].clone()}), weights_dir)
    assert same(model, tensors)


def edit_manifest(weights_dir: Path, weights: Weights, **changes: object) -> None:
    path = weights_dir / weights.folder / "manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(weights, **changes)))


def flip_a_byte(weights_dir: Path, weights: Weights) -> Weights:
    file = weights_dir / weights.folder / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    file.write_bytes(body)
    return weights


def cut_the_file(weights_dir: Path, weights: Weights) -> Weights:
    file = weights_dir / weights.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    return weights


def lose_a_tensor_of_the_file(weights_dir: Path, weights: Weights) -> Weights:
    file = weights_dir / weights.folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["layer.bias"]
    save_file(tensors, file)
    return weights


def name_another_run(weights_dir: Path, weights: Weights) -> Weights:
    return msgspec.structs.replace(weights, run="other")


def name_an_older_life(weights_dir: Path, weights: Weights) -> Weights:
    return msgspec.structs.replace(weights, boot="older")


def tell_another_digest(weights_dir: Path, weights: Weights) -> Weights:
    first, *rest = weights.tensors
    return msgspec.structs.replace(weights, tensors=[msgspec.structs.replace(first, digest="0" * 32), *rest])


def tell_fewer_tensors(weights_dir: Path, weights: Weights) -> Weights:
    return msgspec.structs.replace(weights, tensors=weights.tensors[:-1])


def publish_the_wrong_digest(weights_dir: Path, weights: Weights) -> Weights:
    told = tell_another_digest(weights_dir, weights)
    edit_manifest(weights_dir, weights, tensors=told.tensors)
    return told


def be_of_no_known_kind(weights_dir: Path, weights: Weights) -> Weights:
    edit_manifest(weights_dir, weights, kind="delta")
    return msgspec.structs.replace(weights, kind="delta")


def lie_elsewhere(weights_dir: Path, weights: Weights) -> Weights:
    return msgspec.structs.replace(weights, folder=f"../weights/{weights.folder}")


def be_deleted(weights_dir: Path, weights: Weights) -> Weights:
    (weights_dir / weights.folder / "manifest.json").unlink()
    return weights


def be_garbled(weights_dir: Path, weights: Weights) -> Weights:
    (weights_dir / weights.folder / "manifest.json").write_text('{"run": 3}')
    return weights


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip_a_byte, r"the manifest says [0-9a-f]{32}, the file has [0-9a-f]{32}"),
        (cut_the_file, r"Weights 3 cannot be read from .*weight_v000003"),
        (lose_a_tensor_of_the_file, r"holds 3 tensors, its manifest 4; they differ in layer.bias"),
        (name_another_run, r"the manifest says run 'other', weight_v000003 says 'r'"),
        (name_an_older_life, r"the manifest says boot 'older', weight_v000003 says 'b'"),
        (tell_another_digest, r"the manifest says scale bfloat16\[6\] 0{32}, the folder says scale bfloat16\[6\] [0-9a-f]{32}"),
        (tell_fewer_tensors, r"the manifest names 3 tensors, the folder 4"),
        (publish_the_wrong_digest, r"scale of weights 3: the manifest says 0{32}, the file has [0-9a-f]{32}"),
        (be_of_no_known_kind, r"kind 'delta'; this engine takes: full, lora"),
        (lie_elsewhere, r"'../weights/weight_v000003'; it must be a plain name"),
        (be_deleted, r"cannot be read from .*weight_v000003"),
        (be_garbled, r"is not a manifest of weights"),
    ],
)
def test_what_disagrees_is_refused_and_the_old_version_stays(
    publish_n: Publish, weights_dir: Path, spoil: Callable[[Path, Weights], Weights], words: str
) -> None:
    model = Tied(0)
    told = spoil(weights_dir, publish_n(3))
    with pytest.raises(SwapRefused, match=words):
        swap_in(model, told, weights_dir)
    assert same(model, tensors_of(Tied(0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer.bias": torch.zeros(7)}, r"layer.bias is float32\[7\] in the manifest; the model has float32\[6\]"),
        ({"scale": torch.zeros(6)}, r"scale is float32\[6\] in the manifest; the model has bfloat16\[6\]"),
        ({"extra": torch.zeros(2)}, r"hold extra, which the model does not have \(1 such\): the manifest names 5 tensors"),
        ({"layer.bias": None}, r"lack layer.bias \(1 such\): the manifest names 3 tensors, the model needs 4"),
    ],
)
def test_tensors_of_another_form_are_refused_and_the_old_version_stays(
    publish_n: Publish, weights_dir: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    tensors = {name: tensor for name, tensor in (tensors_of(Tied(3)) | change).items() if tensor is not None}
    model = Tied(0)
    with pytest.raises(SwapRefused, match=words):
        swap_in(model, publish_n(3, tensors), weights_dir)
    assert same(model, tensors_of(Tied(0)))


def test_a_model_that_does_not_keep_what_is_copied_into_it_is_torn(publish_n: Publish, weights_dir: Path) -> None:
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = torch.zeros(9)
            self.a, self.b = nn.Parameter(shared[:6]), nn.Parameter(shared[3:])

    weights = publish_n(1, {"a": torch.ones(6), "b": torch.full((6,), 2.0)})
    with pytest.raises(TornWeights, match=r"a is served as [0-9a-f]{32}; the manifest says [0-9a-f]{32}"):
        swap_in(Overlapping(), weights, weights_dir)


def test_a_manifest_that_is_not_there_is_refused(weights_dir: Path) -> None:
    with pytest.raises(SwapRefused, match="deleted or never finished"):
        read_manifest(weights_dir, "weight_v000007")

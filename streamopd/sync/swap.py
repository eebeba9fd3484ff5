"""The reader's side: new weights into a live model, in place, checked before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from streamopd.errors import SwapRefused, TornWeights
from streamopd.schemas import TensorInfo, Weights

from .adapter import merged
from .digest import describe, digest, dtype_name
from .lease import MANIFEST, read_lease
from .publish import TENSORS


class Loader:
    """Published weights into models opened from `base`, the HF folder that adapters are merged over."""

    def __init__(self, base: Path | None = None) -> None:
        self.base = base

    def verified(self, manifest: Weights, weights_dir: Path, kind: torch.dtype) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """See `verified`."""
        return verified(manifest, weights_dir, self.base, kind)

    def load(self, model: nn.Module, manifest: Weights, fresh: Mapping[str, torch.Tensor]) -> None:
        """Copy `fresh` into the parameters of `model`, in place; no forward pass may run meanwhile.

        SwapRefused, naming both values, before anything is touched when a name, a shape or a dtype disagrees. TornWeights
        when what is served afterwards is not what the manifest says, or not what was merged.
        """
        whole = manifest.kind == "full"
        if not whole:  # a base's file may name what no model has: old buffers, a head that is tied
            fresh = {name: tensor for name, tensor in fresh.items() if name in model.state_dict()}
        live = _live_tensors(model, manifest.n, manifest.tensors if whole else [_form(name, tensor) for name, tensor in fresh.items()])
        _copy(live, fresh)
        if whole:
            _require_served(live, manifest)
        else:
            _require_merged(live, fresh, manifest.n)


def swap_in(model: nn.Module, manifest: Weights, weights_dir: Path, base: Path | None = None) -> None:
    """Weights `manifest` into `model`, all at once; see `verified` and `Loader.load`."""
    loader = Loader(base)
    with loader.verified(manifest, weights_dir, next(model.parameters()).dtype) as fresh:
        loader.load(model, manifest, fresh)


@contextmanager
def verified(
    manifest: Weights, weights_dir: Path, base: Path | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, torch.Tensor]]:
    """The whole tensors of weights `manifest`, each file checked against it; adapters come merged over `base`, in `dtype`.

    The folder stays inside the block. SwapRefused when it cannot be had.
    """
    try:
        with read_lease(_folder(manifest.folder, weights_dir)):
            _require_same(manifest, read_manifest(weights_dir, manifest.folder))
            if manifest.kind == "lora" and base is None:
                raise SwapRefused(f"Weights {manifest.n} are adapters, and this reader has no base to add them to.")
            fresh = _verified(manifest, weights_dir / manifest.folder / TENSORS[manifest.kind])
            yield fresh if base is None or manifest.kind == "full" else merged(fresh, manifest, base, dtype)
    except (FileNotFoundError, SafetensorError) as error:
        where = weights_dir / manifest.folder
        raise SwapRefused(f"Weights {manifest.n} cannot be read from {where}: {error}") from error


def read_manifest(weights_dir: Path, folder: str) -> Weights:
    """The manifest that lies in `folder`; SwapRefused when it is missing or not one."""
    path = _folder(folder, weights_dir) / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Weights)
    except FileNotFoundError:
        raise SwapRefused(f"There is no {path}: these weights were deleted or never finished.") from None
    except msgspec.MsgspecError as error:
        raise SwapRefused(f"{path} is not a manifest of weights: {error}") from None


def _folder(name: str, weights_dir: Path) -> Path:
    if not name or Path(name).name != name:  # a manifest comes over the wire: it may not point elsewhere
        raise SwapRefused(f"A manifest names the folder {name!r}; it must be a plain name under {weights_dir}.")
    return weights_dir / name


def _require_same(told: Weights, lies: Weights) -> None:
    """The manifest from the stream and the one beside the tensors are one manifest."""
    for field in ("run", "boot", "n", "kind", "base", "scale"):
        mine, theirs = getattr(told, field), getattr(lies, field)
        if mine != theirs:
            raise SwapRefused(f"Weights {told.n}: the manifest says {field} {mine!r}, {told.folder} says {theirs!r}.")
    if told.kind not in TENSORS:
        raise SwapRefused(f"Weights {told.n} are of kind {told.kind!r}; this engine takes: {', '.join(TENSORS)}.")
    if told.tensors != lies.tensors:
        raise SwapRefused(f"Weights {told.n}: {_first_difference(told.tensors, lies.tensors)}")


def _first_difference(told: list[TensorInfo], lies: list[TensorInfo]) -> str:
    for mine, theirs in zip(told, lies, strict=False):
        if mine != theirs:
            return f"the manifest says {_in_words(mine)}, the folder says {_in_words(theirs)}."
    return f"the manifest names {len(told)} tensors, the folder {len(lies)}."


def _in_words(info: TensorInfo) -> str:
    return f"{info.name} {info.dtype}{list(info.shape)} {info.digest}"


def _live_tensors(model: nn.Module, n: int, forms: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
    """Each name's storage in the model; every storage is named, and shapes and dtypes agree."""
    state = model.state_dict(keep_vars=True)
    unknown = [info.name for info in forms if info.name not in state]
    if unknown:
        raise SwapRefused(
            f"Weights {n} hold {unknown[0]}, which the model does not have ({len(unknown)} such): the manifest "
            f"names {len(forms)} tensors, the model {len(state)}."
        )
    named = {state[info.name].data_ptr() for info in forms}
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in named]
    if missing:
        raise SwapRefused(
            f"Weights {n} lack {missing[0]} ({len(missing)} such): the manifest names {len(forms)} "
            f"tensors, the model needs {len({tensor.data_ptr() for tensor in state.values()})}."
        )
    for info in forms:
        _require_form(info, state[info.name], "the model has")
    return {info.name: state[info.name] for info in forms}


def _form(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape), "")


def _require_form(info: TensorInfo, tensor: torch.Tensor, who: str) -> None:
    has = (dtype_name(tensor.dtype), tuple(tensor.shape))
    if has != (info.dtype, info.shape):
        raise SwapRefused(
            f"{info.name} is {info.dtype}{list(info.shape)} in the manifest; {who} {has[0]}{list(has[1])}."
        )


def _verified(manifest: Weights, file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as maps of its pages, each checked against the manifest."""
    with safe_open(file, framework="pt") as opened:
        names = sorted(opened.keys())
        wanted = sorted(info.name for info in manifest.tensors)
        if names != wanted:
            odd = sorted(set(names) ^ set(wanted))
            raise SwapRefused(
                f"{file} holds {len(names)} tensors, its manifest {len(wanted)}; they differ in {odd[0]}."
            )
        fresh = {name: opened.get_tensor(name) for name in names}
    for info in manifest.tensors:
        _require_form(info, fresh[info.name], "the file has")
        if (found := digest(fresh[info.name])) != info.digest:
            raise SwapRefused(
                f"{info.name} of weights {manifest.n}: the manifest says {info.digest}, the file has {found}."
            )
    return fresh


@torch.no_grad()
def _copy(live: dict[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in fresh.items():
        live[name].copy_(tensor)


def _require_served(live: dict[str, torch.Tensor], manifest: Weights) -> None:
    for info in manifest.tensors:
        served = describe(info.name, live[info.name])
        if served != info:
            raise TornWeights(
                f"After the swap to weights {manifest.n}, {info.name} is served as {served.digest}; the manifest says "
                f"{info.digest}. Neither the old version nor the new one is served: restart this replica."
            )


def _require_merged(live: dict[str, torch.Tensor], fresh: Mapping[str, torch.Tensor], n: int) -> None:
    wrong = [name for name, tensor in fresh.items() if digest(live[name]) != digest(tensor)]
    if wrong:
        raise TornWeights(f"After the swap to weights {n}, {wrong[0]} is not served as it was merged. Restart this replica.")

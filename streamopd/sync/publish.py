"""The learner's side: weights n as a complete HF folder, its manifest last, in place by one rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from streamopd.errors import UserError
from streamopd.schemas import Weights

from .adapter import Form, base_digest
from .digest import describe
from .lease import MANIFEST, delete_unread

TENSORS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
PREFIX = "weight_v"
UNFINISHED = ".unfinished-"
REPLACED = ".replaced-"
COMPANIONS = (".json", ".txt", ".jinja", ".model")  # what an HF folder holds besides tensors
SLACK_BYTES = 1 << 20                               # headers, manifest, companions


def publish(
    run: str,
    boot: str,
    n: int,
    tensors: Mapping[str, torch.Tensor],
    source: Path,
    weights_dir: Path,
    keep: int,
    fsync: bool,
    adapters: Form | None = None,
    stage: int = 0,
) -> Weights:
    """Write weights `n` under `weights_dir`, delete versions that are out of `keep` and unread, return the manifest.

    `tensors` are named as in an HF file, a tied one once; configuration and tokenizer come from the folder `source`.
    With `adapters` they are these alone, named as PEFT does. `stage` is the method's, for those who write under these weights.
    A version that is there already is replaced: a reader sees the old folder or the new one, or for an instant
    none, and refuses then. UserError when the disk is full.
    """
    weights_dir.mkdir(parents=True, exist_ok=True)
    _sweep(weights_dir)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    _require_space(weights_dir, nbytes)
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder = folder_name(n)
    manifest = Weights(
        run=run, boot=boot, n=n, folder=folder, nbytes=nbytes, born_s=time.time(),
        tensors=[describe(name, tensor) for name, tensor in dense.items()], stage=stage,
    )
    if adapters:
        manifest = msgspec.structs.replace(manifest, kind="lora", base=base_digest(adapters.base), scale=adapters.scale)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{folder}-", dir=weights_dir))
    try:
        _fill(unfinished, dense, source, manifest, adapters, fsync)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if _is_full(error):
            raise _no_space(weights_dir, nbytes) from error
        raise
    _put_in_place(unfinished, weights_dir / folder, fsync)
    _prune(weights_dir, n, keep)
    return manifest


def folder_name(n: int) -> str:
    """"weight_v000012"."""
    return f"{PREFIX}{n:06d}"


def versions(weights_dir: Path) -> list[int]:
    """The versions that lie under `weights_dir`, ascending."""
    names = (path.name.removeprefix(PREFIX) for path in weights_dir.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.lstrip("-").isdigit())


def _fill(
    folder: Path, tensors: dict[str, torch.Tensor], source: Path, manifest: Weights, adapters: Form | None, fsync: bool
) -> None:
    folder.chmod(0o755)  # mkdtemp hides it from the run's other users
    file = folder / TENSORS[manifest.kind]
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # generators may be other users
    if adapters:
        (folder / "adapter_config.json").write_bytes(msgspec.json.format(msgspec.json.encode(adapters.peft_config()), indent=1))
    else:
        for companion in _companions(source):
            _link_or_copy(companion, folder / companion.name)
    if fsync:
        _sync(file)
    with (folder / MANIFEST).open("wb") as last:
        last.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        if fsync:
            last.flush()
            os.fsync(last.fileno())
    if fsync:
        _sync(folder)


def _companions(source: Path) -> list[Path]:
    return [
        file for file in sorted(source.iterdir())
        if file.is_file() and file.suffix in COMPANIONS
        and file.name != MANIFEST and not file.name.endswith(".index.json")
    ]


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another filesystem, or not ours to link
        shutil.copyfile(source, target)


def _put_in_place(finished: Path, final: Path, fsync: bool) -> None:
    if final.exists():
        aside = Path(tempfile.mkdtemp(prefix=f"{REPLACED}{final.name}-", dir=final.parent))
        final.rename(aside / final.name)
    finished.rename(final)
    if fsync:
        _sync(final.parent)
    _sweep_replaced(final.parent)


def _prune(weights_dir: Path, n: int, keep: int) -> None:
    """All but the newest `keep` up to `n`; a version above `n` is of a life that was rolled back."""
    there = versions(weights_dir)
    kept = [version for version in there if version <= n][-keep:]
    for version in there:
        if version not in kept:
            delete_unread(weights_dir / folder_name(version))


def _sweep(weights_dir: Path) -> None:
    """Clear what a killed writer left; there is one writer, so nobody is at work in it."""
    for unfinished in weights_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    _sweep_replaced(weights_dir)


def _sweep_replaced(weights_dir: Path) -> None:
    for aside in weights_dir.glob(f"{REPLACED}*"):
        if all([delete_unread(folder) for folder in aside.iterdir()]):
            shutil.rmtree(aside, ignore_errors=True)


def _require_space(weights_dir: Path, nbytes: int) -> None:
    if shutil.disk_usage(weights_dir).free < nbytes + SLACK_BYTES:
        raise _no_space(weights_dir, nbytes)


def _no_space(weights_dir: Path, nbytes: int) -> UserError:
    free = shutil.disk_usage(weights_dir).free
    return UserError(
        f"The disk of {weights_dir} is full: new weights need {nbytes + SLACK_BYTES:,} bytes and {free:,} are free.\n"
        "Free some space, lower sync.keep_versions, or move the run folder to a larger disk."
    )


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "os error 28" in str(error) or "os error 122" in str(error)  # safetensors gives only the text


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

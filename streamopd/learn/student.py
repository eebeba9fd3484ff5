"""The model that learns: its trunk and head, what is trained of it, and what is published of it."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from streamopd.errors import UserError

from .final import mark
from .head import speak

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")  # of an HF folder, beside weights: tokenizer and generation settings
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


class Adapter(Struct, frozen=True, kw_only=True):
    """Low-rank adapters; the model's own weights are frozen (arXiv 2106.09685)."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


class Student:
    """An HF causal model as the learner sees it. Parameters are float32 masters, whatever `dtype` is computed in."""

    def __init__(self, folder: Path, dtype: str, adapter: Adapter | None, device: torch.device) -> None:
        self.folder = folder
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = device
        self.model = _load(folder, device)
        self._wrapped = _with_adapters(self.model, adapter) if adapter else self.model
        self.adapted = adapter is not None
        self.trunk: nn.Module = self.model.base_model
        self.head: nn.Module = self.model.get_output_embeddings()
        self.vocab_size = int(self.head.weight.shape[0])  # type: ignore[arg-type, union-attr]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name, tied parameters once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def read(self, ids_RL: Tensor) -> Tensor:
        """Last hidden states [R, L, D] of right-padded ids."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.trunk(input_ids=ids_RL, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def speak(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return speak(self.head, hidden_ND)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Whole weights by their HF names, adapters merged, tied names once, in the dtype that is served.

        Float32 tensors without an adapter alias the live ones: use them before the next step.
        """
        added = _adapter_deltas(self.model) if self.adapted else {}
        named = {
            name.replace(".base_layer.", "."): p for name, p in self.model.named_parameters() if ".lora_" not in name
        } | _kept_buffers(self.model)
        return {name: self._served(p.detach() + added[name] if name in added else p.detach()) for name, p in named.items()}

    @torch.no_grad()
    def adapters(self) -> dict[str, Tensor]:
        """The adapters alone by PEFT's names, float32."""
        from peft import get_peft_model_state_dict

        return {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(self._wrapped).items()}

    def _served(self, tensor: Tensor) -> Tensor:
        return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()

    def save_hf(self, folder: Path, n: int, run: str) -> None:
        """A folder that plain transformers loads: merged weights, config, the source's tokenizer, and whose step `n` it is.

        A reader sees the folder that was there or the new one, always whole. UserError when the disk takes no more.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        unfinished = Path(tempfile.mkdtemp(prefix=_beside(folder), dir=folder.parent))
        try:
            self._fill(unfinished)
            mark(unfinished, run, n)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(_no_room(folder, self.nbytes, error)) from error
        _put_in_place(unfinished, folder)
        _sweep(folder)

    @property
    def nbytes(self) -> int:
        """Size of the whole weights in the dtype that is served."""
        return sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize

    def _fill(self, folder: Path) -> None:
        folder.chmod(0o755)  # mkdtemp hides it from other users
        for pattern in COPIED:
            for file in self.folder.glob(pattern):
                if not any(file.match(weights) for weights in WEIGHT_FILES):
                    shutil.copyfile(file, folder / file.name)
        self.model.config.dtype = self.dtype
        self.model.config.save_pretrained(folder)
        save_file(self.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # so may whoever takes the result


def _beside(folder: Path) -> str:
    """How the temporary siblings of `folder` are called: unfinished ones, and the one that was replaced."""
    return f".{folder.name}-"


def _put_in_place(finished: Path, folder: Path) -> None:
    """The old folder out of the way in one rename, the new one in by another."""
    if folder.exists():
        folder.rename(Path(tempfile.mkdtemp(prefix=_beside(folder), dir=folder.parent)) / folder.name)
    finished.rename(folder)


def _sweep(folder: Path) -> None:
    """Delete what was replaced, and what a killed learner left; one learner writes, so nobody is at work in it."""
    for sibling in folder.parent.glob(f"{_beside(folder)}*"):
        shutil.rmtree(sibling, ignore_errors=True)


def _no_room(folder: Path, needed: int, error: Exception) -> str:
    free = shutil.disk_usage(folder.parent).free
    return (
        f"The student could not be saved to {folder} ({error}): it needs {needed:,} bytes, {free:,} are free. "
        "Make room and start the run again: it writes the folder from its last checkpoint."
    )


def _load(folder: Path, device: torch.device) -> Any:
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a model folder that transformers can load: {error}") from error
    for parameter in model.parameters():  # away from the mapped file: these are written at every step
        parameter.data = parameter.data.clone()
    model.to(device)
    _silence_dropout(model)
    _refuse_scaled_head(model, folder)
    if device.type == "cuda":
        model.gradient_checkpointing_enable()
        model.train()
    return model


def _silence_dropout(model: nn.Module) -> None:
    """The policy that learns must be the policy that wrote: no noise in its layers."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  a plain number on the module, whatever nn.Module declares


@torch.no_grad()
def _refuse_scaled_head(model: Any, folder: Path) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    whole = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(plain, whole, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"The logits of {folder} ({model.config.model_type}) are not its last hidden states times its output head: "
            f"they differ by {float((plain - whole).abs().max()):.3g}. Scaled or capped heads are not supported."
        )


def _with_adapters(model: Any, adapter: Adapter) -> Any:
    from peft import LoraConfig, get_peft_model  # only runs with adapters pay for this import

    settings = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.target_modules), lora_dropout=0.0, bias="none"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for checkpointing by its old name
            wrapped = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"learn.lora.target_modules = {list(adapter.target_modules)} does not fit this model: {error}"
        ) from error
    _refuse_what_cannot_travel(wrapped)
    return wrapped


def _refuse_what_cannot_travel(wrapped: nn.Module) -> None:
    """Adapters are added to weights [out, in] of plain matrices where they are served."""
    for name, module in wrapped.named_modules():
        if getattr(module, "lora_embedding_A", None) or getattr(module, "fan_in_fan_out", None):
            raise UserError(
                f"learn.lora.target_modules names {name.removeprefix('base_model.model.')}, which is no plain matrix (an embedding, or a "
                "transposed layer). Leave it out, or train without adapters."
            )


def _adapter_deltas(model: nn.Module) -> dict[str, Tensor]:
    """scale · B · A of each adapted weight, by the weight's plain name."""
    return {
        f"{name}.weight": module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the saved state."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}

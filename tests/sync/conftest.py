"""A small model with a tied pair, a folder to take companions from, and a weights directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from streamopd.schemas import Weights
from streamopd.sync.publish import publish


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a layer, and a bfloat16 scale."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6).bfloat16())
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(model).items())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What an HF folder holds besides and including tensors."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "README.md"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (folder / name).write_text("not to be taken along")
    return folder


@pytest.fixture
def weights_dir(tmp_path: Path) -> Path:
    return tmp_path / "weights"


Publish = Callable[..., Weights]


@pytest.fixture
def publish_n(source: Path, weights_dir: Path) -> Publish:
    """Weights n of seed n, or of the given tensors."""

    def publish_one(
        n: int, tensors: dict[str, torch.Tensor] | None = None, keep: int = 4, run: str = "r", boot: str = "b"
    ) -> Weights:
        return publish(run, boot, n, tensors or tensors_of(Tied(n)), source, weights_dir, keep, fsync=False)

    return publish_one

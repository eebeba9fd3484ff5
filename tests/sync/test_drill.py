"""The swap drill passes on an engine that serves what it is given and fails on ones that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from streamopd.errors import SwapRefused
from streamopd.generate.hf import HFEngine
from streamopd.schemas import Weights
from streamopd.sync.drill import drill
from streamopd.sync.swap import Loader


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=request.param, initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def open_engine(folder: Path, engine: type[HFEngine] = HFEngine, dtype: str = "float32") -> HFEngine:
    return engine(folder, stop_ids=[2], max_inflight=4, loader=Loader(), dtype=dtype)


def test_where_nothing_may_be_written_the_drill_is_among_temporary_files(folder: Path, tmp_path: Path) -> None:
    assert drill(open_engine(folder, dtype="float32"), folder, tmp_path / "nowhere", "r", "float32").moved > 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_serves_what_it_is_given_passes(folder: Path, tmp_path: Path, dtype: str) -> None:
    engine = open_engine(folder, dtype=dtype)
    before = engine.probe([3, 4, 5, 6, 7])
    (tmp_path / "weights").mkdir()
    found = drill(engine, folder, tmp_path / "weights", "r", dtype)
    assert found.moved > 1
    assert found.error < (1e-4 if dtype == "float32" else 0.3)
    assert (engine.probe([3, 4, 5, 6, 7]) == before).all()
    assert engine.version == -1
    assert list((tmp_path / "weights").iterdir()) == []


class StaleHead(HFEngine):
    """Parameters are updated and verified, but decoding uses a packed copy of the old output head."""

    def __init__(self, *args: object, **values: object) -> None:
        super().__init__(*args, **values)
        packed = self.model.lm_head.weight.detach().clone()
        self.model.lm_head.forward = lambda hidden: F.linear(hidden, packed)


class Forgetful(HFEngine):
    """Says that it swapped."""

    def swap_in(self, manifest: Weights, weights_dir: Path) -> None:
        self.version = manifest.n


class OneWay(HFEngine):
    """Takes the first swap only."""

    def swap_in(self, manifest: Weights, weights_dir: Path) -> object:
        return super().swap_in(manifest, weights_dir) if self.version == -1 else None


class StaleLayer(HFEngine):
    """Keeps one norm's old weight."""

    def __init__(self, *args: object, **values: object) -> None:
        super().__init__(*args, **values)
        norm = self.model.model.layers[1].input_layernorm
        old = norm.weight.detach().clone()
        norm.forward = lambda x: F.rms_norm(x, old.shape, old, norm.variance_epsilon)


@pytest.mark.parametrize("broken", [StaleHead, Forgetful, OneWay, StaleLayer])
def test_an_engine_that_serves_anything_else_is_refused_with_both_numbers(
    folder: Path, tmp_path: Path, broken: type[HFEngine]
) -> None:
    with pytest.raises(SwapRefused, match=r"a log-prob of -?\d+\.\d{4}; a plain forward of the same folder gives -?\d+\.\d{4}"):
        drill(open_engine(folder, broken), folder, tmp_path / "weights", "r")


def test_rounding_to_bfloat16_does_not_hide_a_stale_head(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SwapRefused, match="The swap drill failed"):
        drill(open_engine(folder, StaleHead, dtype="bfloat16"), folder, tmp_path / "weights", "r", "bfloat16")

"""Adapters travel alone and are merged where they are served: the very weights that the learner holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from streamopd.errors import SwapRefused, UserError
from streamopd.learn.student import Adapter, Student
from streamopd.schemas import Weights
from streamopd.sync.adapter import Form, base_digest, require_servable
from streamopd.sync.publish import publish
from streamopd.sync.swap import swap_in

ADAPTER = Adapter(rank=3, alpha=12.0, target_modules=("q_proj", "v_proj", "down_proj"))
IDS = torch.tensor([[5, 17, 33, 8, 60]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp(request.param), seed=1, tied=request.param == "tied")


def tiny(folder: Path, seed: int, tied: bool = True) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def student(base: Path) -> Student:
    """Adapters after many steps, as it were."""
    student = Student(base, "float32", ADAPTER, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.trained.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return student


def published(student: Student, base: Path, weights_dir: Path, n: int = 7) -> Weights:
    form = Form(base=base, rank=ADAPTER.rank, alpha=ADAPTER.alpha, target_modules=ADAPTER.target_modules)
    return publish("r", "b", n, student.adapters(), base, weights_dir, 4, False, form)


def plain(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # type: ignore[no-any-return]


def test_what_is_served_is_what_the_learner_holds(student: Student, base: Path, tmp_path: Path) -> None:
    model, manifest = plain(base), published(student, base, tmp_path)
    swap_in(model, manifest, tmp_path, base)
    served = model.state_dict()
    moved = 0
    for name, tensor in student.tensors().items():
        assert torch.equal(served[name], tensor), name
        moved += not torch.equal(tensor, load_file(base / "model.safetensors")[name])
    assert moved == 6
    assert manifest.nbytes < 0.2 * student.nbytes


def test_a_later_version_is_merged_over_the_base_and_not_over_the_one_before(student: Student, base: Path, tmp_path: Path) -> None:
    model = plain(base)
    swap_in(model, published(student, base, tmp_path, 7), tmp_path, base)
    swap_in(model, published(student, base, tmp_path, 8), tmp_path, base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in student.tensors().items())


def test_peft_opens_the_published_folder(student: Student, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / published(student, base, tmp_path).folder
    assert not (folder / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(plain(base), folder)
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, student._wrapped(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_merged_in_float32_and_rounded_once(base: Path, tmp_path: Path) -> None:
    student = Student(base, "bfloat16", ADAPTER, torch.device("cpu"))
    with torch.no_grad():
        for parameter in student.trained.values():
            parameter += 0.01
    model = plain(base).bfloat16()
    swap_in(model, published(student, base, tmp_path), tmp_path, base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in student.tensors().items())


def test_another_base_is_refused_with_both_digests(student: Student, base: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", seed=9, tied=(base.name.startswith("tied")))
    model, manifest = plain(other), published(student, base, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SwapRefused, match=f"digest {base_digest(base)}; .* has {base_digest(other)}"):
        swap_in(model, manifest, tmp_path, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_what_the_base_has_not_is_refused(student: Student, base: Path, tmp_path: Path) -> None:
    strange = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in student.adapters().items()}
    form = Form(base=base, rank=3, alpha=12.0, target_modules=ADAPTER.target_modules)
    manifest = publish("r", "b", 7, strange, base, tmp_path, 4, False, form)
    with pytest.raises(SwapRefused, match=r"adapt model.layers.9.mlp.down_proj, which .* does not have \(3 such\)"):
        swap_in(plain(base), manifest, tmp_path, base)


def test_without_a_base_and_with_a_changed_scale_they_are_refused(student: Student, base: Path, tmp_path: Path) -> None:
    manifest = published(student, base, tmp_path)
    with pytest.raises(SwapRefused, match="no base to add them to"):
        swap_in(plain(base), manifest, tmp_path)
    with pytest.raises(SwapRefused, match=r"the manifest says scale 8.0, weight_v000007 says 4.0"):
        swap_in(plain(base), replace(manifest, scale=8.0), tmp_path, base)


def test_a_changed_byte_of_an_adapter_is_refused(student: Student, base: Path, tmp_path: Path) -> None:
    manifest = published(student, base, tmp_path)
    file = tmp_path / manifest.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    with pytest.raises(SwapRefused, match=r"the manifest says .*, the file has"):
        swap_in(plain(base), manifest, tmp_path, base)


def test_a_base_that_changes_under_a_run_is_refused(student: Student, tmp_path: Path, base: Path) -> None:
    copy = tiny(tmp_path / "copy", seed=1, tied=base.name.startswith("tied"))
    manifest, model = published(student, copy, tmp_path), plain(copy)
    swap_in(model, manifest, tmp_path, copy)
    tiny(copy, seed=5, tied=base.name.startswith("tied"))
    with pytest.raises(SwapRefused, match="adapters over a base of digest"):
        swap_in(model, manifest, tmp_path, copy)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda name, t: t * float("nan") if "lora_B" in name else t, "no finite number once its adapters are added"),
        (lambda name, t: t[:, :-1].contiguous() if "q_proj.lora_A" in name else t, r"its adapters are \[32, 3\] and \[3, 31\]"),
        (lambda name, t: None if "layers.0.self_attn.q_proj.lora_B" in name else t, "is not one of a pair of adapters"),
    ],
)
def test_adapters_that_fit_nothing_are_refused_and_the_old_weights_stay(
    student: Student, base: Path, tmp_path: Path, spoil: Callable[[str, torch.Tensor], torch.Tensor | None], words: str
) -> None:
    tensors = {name: new for name, tensor in student.adapters().items() if (new := spoil(name, tensor)) is not None}
    form = Form(base=base, rank=3, alpha=12.0, target_modules=ADAPTER.target_modules)
    manifest, model = publish("r", "b", 7, tensors, base, tmp_path, 4, False, form), plain(base)
    with pytest.raises(SwapRefused, match=words):
        swap_in(model, manifest, tmp_path, base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in load_file(base / "model.safetensors").items())


def test_an_embedding_is_no_plain_matrix_and_is_refused_at_the_start(base: Path) -> None:
    wanted = Adapter(rank=3, alpha=12.0, target_modules=("q_proj", "embed_tokens"))
    with pytest.raises(UserError, match="embed_tokens, which is no plain matrix"):
        Student(base, "float32", wanted, torch.device("cpu"))


def test_a_transposed_layer_is_refused_at_the_start(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="c_proj, which is no plain matrix"):
        Student(tmp_path, "float32", Adapter(rank=3, alpha=12.0, target_modules=("attn.c_proj",)), torch.device("cpu"))


def test_a_base_with_other_names_is_refused_before_the_first_step(student: Student, base: Path, tmp_path: Path) -> None:
    """transformers loads it; what is served is merged by the names in the file."""
    require_servable(student.adapters(), base)
    save_file({name.removeprefix("model."): t for name, t in load_file(base / "model.safetensors").items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot be served: .* calls its tensors otherwise"):
        require_servable(student.adapters(), tmp_path)


def test_what_else_lies_in_the_base_is_not_read(student: Student, base: Path, tmp_path: Path) -> None:
    """The same weights in another form, and a buffer that no model has any more."""
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.zeros(2)}, copy / "consolidated.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, copy / "model.safetensors", {"format": "pt"})
    model = plain(copy)
    swap_in(model, published(student, copy, tmp_path), tmp_path, copy)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in student.tensors().items())


def test_a_sharded_base_is_read_by_its_index(student: Student, base: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    plain(base).save_pretrained(shards, max_shard_size="20KB")
    assert (shards / "model.safetensors.index.json").exists()
    model = plain(shards)
    swap_in(model, published(student, shards, tmp_path), tmp_path, shards)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in student.tensors().items())

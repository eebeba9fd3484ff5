"""What the fetch leaves is the language model, whole, with its data; fetching again changes nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Turn
from tests.recipes.conftest import FETCH_SCRIPT

QUESTION = Turn("user", "What is the capital of France?")


@pytest.mark.smollm2
@pytest.mark.timeout(600)
def test_the_fetched_folder_answers_and_a_second_fetch_changes_nothing(roomy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetch = runpy.run_path(str(FETCH_SCRIPT))["fetch"]
    fetch(roomy)
    before = {file.name: file.stat().st_mtime_ns for file in roomy.glob("*.safetensors")}
    lines = {name: (roomy / name).read_bytes() for name in ("train.jsonl", "heldout.jsonl")}

    tokenizer = Tokenizer.open(roomy)
    ids = tokenizer.render([QUESTION])
    theirs = AutoTokenizer.from_pretrained(roomy)
    turns = [{"role": QUESTION.role, "content": QUESTION.content}]
    assert ids == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tokenizer.stop_ids == (2,)

    model = AutoModelForCausalLM.from_pretrained(roomy, dtype=torch.float32)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer.tolist())

    capsys.readouterr()
    fetch(roomy)
    assert "is there already" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in roomy.glob("*.safetensors")} == before
    assert {name: (roomy / name).read_bytes() for name in lines} == lines

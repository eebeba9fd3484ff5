"""The recipe smollm2-json, three steps of it: a real language model comes nearer to its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.run.runs import accounts_are_exact, no_process_is_left, overrides, streamopd, summary

SHORT = ("learn.max_steps=3", "learn.groups_per_step=8", "learn.warmup_steps=1", "data.heldout_size=8")


def in_folder(model: Path) -> list[str]:
    """The recipe's paths, wherever the model lies."""
    models = [f"{key}={model}" for key in ("student.model", "teachers.json.model", "teachers.plain.model")]
    return [*models, f"data.train={model / 'train.jsonl'}", f"data.heldout={model / 'heldout.jsonl'}"]


@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_three_steps_bring_a_language_model_nearer_to_its_teacher(smollm2: Path, roomy: Path) -> None:
    folder = roomy / "run"
    answer = streamopd(
        "run", "smollm2-json", "--out", str(folder), *overrides(*SHORT, *in_folder(smollm2)), timeout_s=800,
    )
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    found = summary(folder)
    assert (found["status"], found["steps"], found["groups_trained"]) == ("completed", 3, 24)
    accounts_are_exact(found)
    no_process_is_left(folder)

    distance = found["kl_heldout"]  # KL(teacher‖student), what the method goes down
    assert distance["before"] > 1
    assert distance["after"] < 0.95 * distance["before"]

    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    turns = [{"role": "user", "content": "What is the capital of Italy?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Rome" in tokenizer.decode(written, skip_special_tokens=True)

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

    final, begun = (next_token(of) for of in (folder / "final", smollm2))
    assert bool(torch.isfinite(final).all())
    opening = AutoTokenizer.from_pretrained(folder / "final").convert_tokens_to_ids('{"')
    assert final[opening] > begun[opening], "plain transformers finds it readier to open a JSON object"


@torch.no_grad()
def next_token(folder: Path) -> torch.Tensor:
    """[V] log-probs of an answer's first token, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": "What is the capital of Italy?"}]
    asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    logp_V: torch.Tensor = model(**asked).logits[0, -1].log_softmax(-1)
    return logp_V

"""The quickstart seen from outside: fresh problems, plain transformers, and weights versions read from disk.

Shares nothing with the code under test but the files that it wrote.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def fresh_problems(count: int, seed: int) -> list[tuple[str, int]]:
    """Chain sums of 3 to 7 one-digit terms whose running totals never fall below 0, and their results."""
    rng, problems = random.Random(seed), []
    while len(problems) < count:
        total = rng.randint(0, 9)
        text = str(total)
        for _ in range(rng.randint(2, 6)):
            term = rng.randint(0, 9)
            sign = rng.choice("+-") if total >= term else "+"
            total += term if sign == "+" else -term
            text += f"{sign}{term}"
        problems.append((text + "=", total))
    return problems


@torch.no_grad()
def greedy_accuracy(folder: Path, problems: list[tuple[str, int]]) -> float:
    """Share of problems that end by themselves with the right number after the last "="."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    right = 0
    for start in range(0, len(problems), 125):
        chunk = problems[start : start + 125]
        inputs = tokenizer([text for text, _ in chunk], padding=True, return_tensors="pt")
        written = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40, do_sample=False
        )[:, inputs["input_ids"].shape[1] :]
        for ids, (_, result) in zip(written.tolist(), chunk, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
            right += tokenizer.eos_token_id in ids and text.rpartition("=")[2] == str(result)
    return right / len(problems)


@torch.no_grad()
def replayed_logprobs(sample: dict[str, Any], weights_dir: Path) -> torch.Tensor:
    """[G] the sample's log-probs, each token under the version that its spans name, by the recorded `kv` rule.

    keep: tokens after a swap attend to keys and values that older weights made. recompute: the cache is made anew.
    """
    prompt, answer = sample["prompt_ids"], sample["completion_ids"]
    ends = [start for start, _, _ in sample["weight_spans"][1:]] + [len(answer)]
    found, cache = [], None
    for (start, version, kv), end in zip(sample["weight_spans"], ends, strict=True):
        model = AutoModelForCausalLM.from_pretrained(weights_dir / f"weight_v{version:06d}", dtype=torch.float32)
        text = prompt + answer
        if cache is None or kv == "recompute":
            read_from, cache = 0, None
        else:
            read_from = len(prompt) + start - 1
        out = model(input_ids=torch.tensor([text[read_from : len(prompt) + end - 1]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logp = out.logits[0].log_softmax(-1)[len(prompt) + start - 1 - read_from :]
        found.append(logp.gather(1, torch.tensor(answer[start:end])[:, None])[:, 0])
    return torch.cat(found)

"""On-policy distillation as one plain synchronous loop: no stream, no cache, no staleness. The oracle of `max_staleness = 0`."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from streamopd.config import Config
from streamopd.generate.draws import uniforms
from streamopd.prompts.dataset import open_dataset
from streamopd.prompts.tokenizer import Tokenizer


def write_answer(model: torch.nn.Module, prompt: list[int], draws: list[float], stop_ids: tuple[int, ...]) -> list[int]:
    """One answer at temperature 1, the whole text read anew for every token."""
    answer: list[int] = []
    for draw in draws:
        with torch.no_grad():
            probs = model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].softmax(-1)
        answer.append(int((probs.cumsum(0) <= draw * probs.sum()).sum().clamp(max=len(probs) - 1)))
        if answer[-1] in stop_ids:
            break
    return answer


def answer_logprobs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[G, V]: row g predicts answer token g."""
    return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def plain_loop(config: Config, student_folder: Path, teacher_folder: Path, steps: int) -> list[float]:
    """The losses of `steps` steps of forward KL on the student's own samples."""
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    tokenizer, learn = Tokenizer.open(student_folder), config.learn
    dataset = open_dataset(config.data, config.seed, config.passes)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learn.lr, betas=learn.betas, weight_decay=learn.weight_decay)
    losses = []
    for step in range(steps):
        terms = []
        for seq in range(step * learn.groups_per_step, (step + 1) * learn.groups_per_step):
            prompt = tokenizer.encode(dataset.question(seq).text)
            draws = uniforms((config.seed, seq, 0), config.generator.max_completion_length).tolist()
            answer = write_answer(student, prompt, draws, tokenizer.stop_ids)
            with torch.no_grad():
                q = answer_logprobs(teacher, prompt, answer)
            terms.append((q.exp() * (q - answer_logprobs(student, prompt, answer))).sum(-1))
        loss = torch.cat(terms).mean()
        held = learn.hold_fraction * learn.max_steps
        decay = learn.min_lr_ratio + (1 - learn.min_lr_ratio) * 0.5 * (1 + cos(pi * (step - held) / (learn.max_steps - held)))
        optimizer.param_groups[0]["lr"] = learn.lr * min(1.0, (step + 1) / learn.warmup_steps) * (1.0 if step < held else decay)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), learn.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses

"""Held-out KL equals a plain, unbatched, uncached forward in float64; perplexity likewise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from streamopd.errors import UserError
from streamopd.evaluate import divergence
from streamopd.evaluate.divergence import Pair, summed_kls
from streamopd.evaluate.text import text_perplexity
from tests.evaluate.conftest import VOCABULARY


def answer_log_probs(model, context, completion) -> torch.Tensor:
    """[G, V] float64, of one answer alone."""
    ids = torch.tensor([[*context, *completion]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)


def plain_kl(p, q, pair: Pair) -> float:
    p_GV = answer_log_probs(p, pair.p_context, pair.completion)
    q_GV = answer_log_probs(q, pair.q_context, pair.completion)
    return float((p_GV.exp() * (p_GV - q_GV)).sum())


def pairs(shared_p: int, shared_q: int, count: int = 7) -> list[Pair]:
    rng = np.random.default_rng(shared_p)
    begin_p, begin_q = (rng.integers(0, VOCABULARY, n) for n in (shared_p, shared_q))

    def context(begin):
        return np.concatenate([begin, rng.integers(0, VOCABULARY, rng.integers(1, 9))]).astype(np.int32)

    lengths = [0, 1, 1, *rng.integers(2, 12, count - 3)]
    return [Pair(context(begin_p), context(begin_q), rng.integers(0, VOCABULARY, g).astype(np.int32)) for g in lengths]


@pytest.mark.parametrize(("shared_p", "shared_q"), [(0, 0), (3, 3), (40, 0), (0, 40), (40, 25)])
def test_kl_is_that_of_a_plain_forward_whatever_the_contexts_share(student, teacher, shared_p, shared_q):
    seen = pairs(shared_p, shared_q)
    expected = [plain_kl(teacher, student, pair) if len(pair.completion) else 0.0 for pair in seen]
    assert summed_kls(teacher, student, seen) == pytest.approx(expected, abs=2e-4)
    assert max(expected) > 1.0  # the models do disagree


def test_small_budgets_change_nothing(student, teacher, monkeypatch):
    seen = pairs(30, 30, count=9)
    whole = summed_kls(teacher, student, seen)
    monkeypatch.setattr(divergence, "LOGIT_BUDGET", 2 * VOCABULARY)
    monkeypatch.setattr(divergence, "TOKEN_BUDGET", 60)
    assert summed_kls(teacher, student, seen) == pytest.approx(whole, abs=2e-4)


def test_a_model_is_no_distance_from_itself_in_its_own_context(student):
    same = [Pair(pair.p_context, pair.p_context, pair.completion) for pair in pairs(20, 20)]
    assert summed_kls(student, student, same) == pytest.approx([0.0] * len(same), abs=1e-5)


def test_one_context_for_all_leaves_its_last_token_to_predict_the_first(student, teacher):
    context = np.arange(20, dtype=np.int32)
    seen = [Pair(context, context, np.array([answer, 3], np.int32)) for answer in (1, 2)]
    assert summed_kls(teacher, student, seen) == pytest.approx([plain_kl(teacher, student, pair) for pair in seen], abs=2e-4)


class Softcapped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits)
        return out


def test_a_model_that_changes_its_logits_after_the_head_is_refused(student, teacher):
    capped = Softcapped(teacher.config).eval()
    capped.load_state_dict(teacher.state_dict())
    with pytest.raises(UserError, match=r"Softcapped changes its logits .* set evaluate.enabled = false"):
        summed_kls(capped, student, pairs(0, 0))


def test_perplexity_is_that_of_a_plain_forward(student):
    texts = ["a longer text of several words", "another"]

    def encode(text: str) -> list[int]:
        return [1, *(ord(c) % VOCABULARY for c in text)]

    nats, tokens = 0.0, 0
    for text in texts:
        ids = encode(text)
        logp = answer_log_probs(student, ids[:1], ids[1:])
        nats -= float(logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
        tokens += len(ids) - 1
    assert text_perplexity(student, encode, texts) == pytest.approx(math.exp(nats / tokens), rel=1e-4)

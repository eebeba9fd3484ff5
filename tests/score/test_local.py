"""A local teacher says what a plain forward of its model says, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from streamopd.errors import GarbageRecord, TeacherError
from streamopd.schemas import Evidence, Finish, Group, Rollout
from streamopd.score import local
from streamopd.score.check import check_evidence
from streamopd.score.local import LocalTeacher, load_teachers
from streamopd.slots import EvidenceRequest

FULL = EvidenceRequest(full=True, teacher_k=0, student_ids=False, sampled=True, stop=False)
UNION = EvidenceRequest(full=False, teacher_k=5, student_ids=True, sampled=True, stop=True)
SAMPLED = EvidenceRequest(full=False, teacher_k=0, student_ids=False, sampled=True, stop=False)
HIDDEN = EvidenceRequest(full=False, teacher_k=0, student_ids=False, sampled=True, stop=False, hidden=True)
STOPS = (2, 7)
GroupMaker = Callable[..., Group]


def open_teacher(folder: Path, token_budget: int = 512) -> LocalTeacher:
    return LocalTeacher(folder, "default", "float32", STOPS, token_budget)


def plain_logp(folder: Path, group: Group, rollout: Rollout) -> np.ndarray:
    """[G, V] of one rollout alone through the model's own forward, double precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    context = group.prompt.teacher_prompt_ids or rollout.prompt_ids
    ids = np.concatenate([context.numpy(), rollout.completion_ids.numpy()])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return torch.log_softmax(logits, -1).numpy()[len(context) - 1 : -1]


def only_view(views: list[list[list[Evidence]]], g: int = 0, r: int = 0) -> Evidence:
    (view,) = views[g][r]
    return view


def test_a_full_view_is_the_models_own_distribution_at_each_answer_token(folder: Path, make_group: GroupMaker) -> None:
    groups = [make_group(seq, (9, 1), prompt=3 + seq) for seq in range(6)]
    views = open_teacher(folder, token_budget=40).score(groups, FULL)
    for g, group in enumerate(groups):
        check_evidence(group, views[g], 300)
        for r, rollout in enumerate(group.rollouts):
            view, expected = only_view(views, g, r), plain_logp(folder, group, rollout)
            assert view.support is not None
            assert view.support.ids is None
            np.testing.assert_allclose(view.support.logprobs.numpy(), expected, atol=1e-4)
            np.testing.assert_allclose(view.entropy.numpy(), -(np.exp(expected) * expected).sum(1), atol=1e-4)
            np.testing.assert_allclose(view.stop_logmass.numpy(), np.logaddexp(expected[:, 2], expected[:, 7]), atol=1e-4)


def test_sampled_scores_lie_inside_union_scores_inside_the_full_distribution(
    folder: Path, make_group: GroupMaker
) -> None:
    groups = [make_group(seq, (8,)) for seq in range(4)]
    teacher = open_teacher(folder)
    full, union, sampled = (teacher.score(groups, request) for request in (FULL, UNION, SAMPLED))
    for g, group in enumerate(groups):
        logp_GV = only_view(full, g).support.logprobs.numpy()
        completion_G = group.rollouts[0].completion_ids.numpy()
        rows = np.arange(len(completion_G))
        for views in (full, union, sampled):
            np.testing.assert_allclose(only_view(views, g).logprobs.numpy(), logp_GV[rows, completion_G], atol=1e-4)
        ids, logp = only_view(union, g).support.ids.numpy(), only_view(union, g).support.logprobs.numpy()
        np.testing.assert_allclose(logp[ids >= 0], logp_GV[np.nonzero(ids >= 0)[0], ids[ids >= 0]], rtol=1e-3)
        assert only_view(sampled, g).support.ids.numpy().tolist() == completion_G[:, None].tolist()


def test_a_union_row_holds_student_teacher_sampled_and_stop_ids_each_once(folder: Path, make_group: GroupMaker) -> None:
    group = make_group(0, (12,))
    teacher = open_teacher(folder)
    logp_GV = only_view(teacher.score([group], FULL)).support.logprobs.numpy()
    view = only_view(teacher.score([group], UNION))
    rollout = group.rollouts[0]
    for g, row in enumerate(view.support.ids.numpy()):
        top = np.argsort(-logp_GV[g])[:5]
        wanted = {*top, *rollout.student_topk.ids.numpy()[g], rollout.completion_ids.numpy()[g], *STOPS}
        held = row[row >= 0]
        assert sorted(held) == sorted(wanted)
        assert len(set(held)) == len(held)
        assert np.isneginf(view.support.logprobs.numpy()[g][row < 0]).all()
        assert view.mass.numpy()[g] == pytest.approx(np.exp(logp_GV[g][held]).sum(), abs=1e-5)


def test_a_shared_context_prefix_changes_cost_not_scores(folder: Path, make_group: GroupMaker) -> None:
    groups = [make_group(seq, (6,), teacher_prompt=2 + seq % 4, shared=40) for seq in range(8)]
    teacher = open_teacher(folder, token_budget=200)
    views = teacher.score(groups, FULL)
    assert teacher._prefixes, "the common prefix was never kept"
    for g, group in enumerate(groups):
        np.testing.assert_allclose(
            only_view(views, g).support.logprobs.numpy(), plain_logp(folder, group, group.rollouts[0]), atol=1e-4
        )
        alone = open_teacher(folder).score([group], FULL)
        np.testing.assert_allclose(
            only_view(views, g).support.logprobs.numpy(), only_view(alone).support.logprobs.numpy(), atol=1e-5
        )


def test_a_kept_prefix_serves_a_later_rollout_that_comes_alone(folder: Path, make_group: GroupMaker) -> None:
    teacher = open_teacher(folder)
    teacher.score([make_group(seq, (6,), teacher_prompt=3, shared=40) for seq in range(3)], UNION)
    late = make_group(50, (6,), teacher_prompt=9, shared=40)
    np.testing.assert_allclose(
        only_view(teacher.score([late], FULL)).support.logprobs.numpy(), plain_logp(folder, late, late.rollouts[0]), atol=1e-4
    )
    assert len(teacher._prefixes) == 1


def test_answers_to_one_prompt_share_its_whole_context(folder: Path, make_group: GroupMaker) -> None:
    group = make_group(1, (5, 8, 1), prompt=30)
    views = open_teacher(folder).score([group], FULL)
    for r, rollout in enumerate(group.rollouts):
        seen = only_view(views, 0, r).support.logprobs.numpy()
        np.testing.assert_allclose(seen, plain_logp(folder, group, rollout), atol=1e-4)


def test_logits_are_made_a_few_rows_at_a_time_and_say_the_same(
    folder: Path, make_group: GroupMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [make_group(seq, (9,)) for seq in range(4)]
    whole = open_teacher(folder).score(groups, UNION)
    monkeypatch.setattr(local, "MAX_LOGITS", 300 * 5)
    for g, group in enumerate(groups):
        chunked = only_view(open_teacher(folder).score(groups, UNION), g)
        check_evidence(group, [[chunked]], 300)
        assert chunked.support.ids.numpy().tolist() == only_view(whole, g).support.ids.numpy().tolist()
        np.testing.assert_allclose(chunked.mass.numpy(), only_view(whole, g).mass.numpy(), atol=1e-6)


def test_a_slice_is_told_at_every_token_beside_what_else_is_asked(folder: Path, make_group: GroupMaker) -> None:
    group, teacher, cut = make_group(0, (9,)), open_teacher(folder), (7, 11, 250)
    logp_GV = only_view(teacher.score([group], FULL)).support.logprobs.numpy()
    plain = only_view(teacher.score([group], UNION))
    sliced = only_view(teacher.score([group], replace(UNION, slice_ids=cut)))
    check_evidence(group, [[sliced]], 300)
    for g, (before, row) in enumerate(zip(plain.support.ids.numpy(), sliced.support.ids.numpy(), strict=True)):
        assert sorted(row[row >= 0]) == sorted({*before[before >= 0], *cut})
        np.testing.assert_allclose(sliced.support.logprobs.numpy()[g][row >= 0], logp_GV[g][row[row >= 0]], rtol=1e-3)


def test_a_slice_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(TeacherError, match="VocabularySlice names id 300, and teacher 'default' has 300 ids"):
        open_teacher(folder).require(replace(UNION, slice_ids=(3, 300)))


def test_hidden_states_through_the_head_are_the_whole_view(
    folder: Path, make_group: GroupMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [make_group(seq, (9, 4)) for seq in range(3)]
    teacher = open_teacher(folder, token_budget=64)
    whole = teacher.score(groups, FULL)
    monkeypatch.setattr(local, "MAX_LOGITS", 300 * 5)
    hidden = teacher.score(groups, HIDDEN)
    head_VD = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach()
    for g, group in enumerate(groups):
        check_evidence(group, hidden[g], 300)
        for r in range(2):
            view, exact = only_view(hidden, g, r), only_view(whole, g, r)
            assert view.support is None
            assert view.mass is None
            assert (view.hidden.dtype, view.hidden.shape) == ("float16", (len(view.logprobs), 64))
            logp_GV = torch.log_softmax(torch.from_numpy(view.hidden.numpy().astype(np.float32)) @ head_VD.T, -1).numpy()
            exact_GV = exact.support.logprobs.numpy()
            np.testing.assert_allclose(np.exp(logp_GV), np.exp(exact_GV), atol=1e-3)
            np.testing.assert_allclose(logp_GV, exact_GV, atol=1e-3, rtol=1e-3)  # float16 has 11 bits
            for name in ("logprobs", "entropy", "stop_logmass"):
                np.testing.assert_allclose(getattr(view, name).numpy(), getattr(exact, name).numpy(), atol=1e-5)


def test_a_hidden_state_beyond_float16_is_refused_and_never_inf(folder: Path, make_group: GroupMaker) -> None:
    teacher = open_teacher(folder)
    teacher.model.base_model.norm.weight.mul_(1e5)
    with pytest.raises(GarbageRecord, match=r"a hidden state is .* at token \d+, and float16 ends at 65,504"):
        teacher.score([make_group(0, (5,))], HIDDEN)


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.ABORTED])
def test_failed_aborted_and_empty_rollouts_get_no_view(folder: Path, make_group: GroupMaker, finish: Finish) -> None:
    groups = [make_group(0, (4,), finish=finish), make_group(1, (0, 3)), make_group(2, (0,), finish=finish)]
    views = open_teacher(folder).score(groups, UNION)
    assert [[len(view) for view in of_group] for of_group in views] == [[0], [0, 1], [0]]


def test_a_rollout_without_the_students_ids_is_refused_when_the_method_wants_them(
    folder: Path, make_group: GroupMaker
) -> None:
    with pytest.raises(GarbageRecord, match="carries none"):
        open_teacher(folder).score([make_group(0, student_k=0)], UNION)


def test_ids_beyond_the_teachers_vocabulary_are_refused(folder: Path, make_group: GroupMaker) -> None:
    with pytest.raises(GarbageRecord, match="knows 300"):
        open_teacher(folder).score([make_group(0, vocab=5000)], FULL)
    with pytest.raises(TeacherError, match="stops at 300"):
        LocalTeacher(folder, "default", "float32", (300,), 512)


def test_two_teacher_ids_over_one_folder_share_one_model(folder: Path) -> None:
    teachers = load_teachers({"a": (folder, "float32"), "b": (folder, "float32")}, STOPS, 512)
    assert teachers["a"].model is teachers["b"].model
    assert teachers["b"].teacher_id == "b"


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=str(tmp_path)):
        load_teachers({"a": (tmp_path, "float32")}, STOPS, 512)

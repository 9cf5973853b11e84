"""The tensor contract: every token of a pack, read back one by one by the rules of `PackedBatch`."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from dspref.data.batch import CHOSEN, PROMPT, REJECTED, PackedBatch, collate, computed_tokens
from dspref.data.truncate import TokenizedPair


def random_pairs(count: int, seed: int, longest: int = 9) -> list[TokenizedPair]:
    draws = np.random.default_rng(seed)
    return [
        TokenizedPair(*(draws.integers(0, 1000, draws.integers(1, longest + 1)).astype(np.int32) for _ in range(3)))
        for _ in range(count)
    ]


def masked(pairs: list[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """The same pairs, some tokens of which are not scored; of the same answer not always the same."""
    draws = np.random.default_rng(seed)

    def mask(ids: np.ndarray) -> np.ndarray | None:
        drawn = draws.integers(0, 2, len(ids)).astype(bool)
        drawn[-1] = True
        return None if drawn.all() else drawn

    return [pair._replace(chosen_scored=mask(pair.chosen), rejected_scored=mask(pair.rejected)) for pair in pairs]


def places(ids: np.ndarray, scored: np.ndarray | None) -> list[int]:
    """Of the scored tokens of an answer."""
    return [i for i in range(len(ids)) if scored is None or scored[i]]


def visible(batch: PackedBatch) -> list[list[int]]:
    """For each token, the indices of the tokens that its attention sees, in order: the segments spelled out."""
    sees: list[list[int]] = []
    q, k = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    keys = list(range(len(batch.input_ids))) if batch.kv_index is None else batch.kv_index.tolist()
    for i in range(len(q) - 1):
        queries, own_keys = q[i + 1] - q[i], keys[k[i] : k[i + 1]]
        for t in range(queries):  # aligned at the bottom right: the last query sees every key
            sees.append(own_keys[: len(own_keys) - (queries - 1 - t)])
    return sees


@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_scored_token_is_predicted_from_its_own_prefix(seed: int, sharing: bool, score_prompt: bool) -> None:
    """Read back from the tensors alone: for each pair and side, the predictor of answer token j attends to exactly
    prompt + answer[:j] at positions 0, 1, 2, ..., and every token that it attends to has seen the same prefix. So has the
    predictor of prompt token j, where prompts are scored: tokens 2 to n, once per pair."""
    pairs = random_pairs(1 + seed % 5, seed)
    pairs = masked(pairs, seed) if seed % 2 else pairs
    batch = collate(pairs, range(100, 100 + len(pairs)), prefix_sharing=sharing, score_prompt=score_prompt)
    sees, ids, positions = visible(batch), batch.input_ids.tolist(), batch.position_ids.tolist()
    assert len(sees) == len(ids) == len(positions)
    for t, context in enumerate(sees):
        assert context[-1] == t
        assert [positions[s] for s in context] == list(range(len(context)))
        for n, s in enumerate(context):
            assert sees[s] == context[: n + 1]

    names = ("predictor_index", "targets", "span_index", "place_in_span")
    scored = list(zip(*(getattr(batch, name).tolist() for name in names)))
    for k, pair in enumerate(pairs):
        answers = [
            (CHOSEN, pair.prompt, pair.chosen, pair.chosen_scored),
            (REJECTED, pair.prompt, pair.rejected, pair.rejected_scored),
        ]
        if score_prompt:
            answers.append((PROMPT, pair.prompt[:1], pair.prompt[1:], None))
        for side, before, tokens, mask in answers:
            of_side = [(p, target, place) for p, target, span, place in scored if divmod(span, len(pairs)) == (side, k)]
            counted = places(tokens, mask)
            assert [target for _, target, _ in of_side] == tokens[counted].tolist()
            assert [place for *_, place in of_side] == list(range(len(counted)))
            for j, (predictor, _, _) in zip(counted, of_side, strict=True):
                assert [ids[s] for s in sees[predictor]] == [*before, *tokens[:j]]
    of_prompts = sum(len(p.prompt) - 1 for p in pairs) if score_prompt else 0
    of_answers = [places(p.chosen, p.chosen_scored) + places(p.rejected, p.rejected_scored) for p in pairs]
    assert len(scored) == sum(map(len, of_answers)) + of_prompts


@pytest.mark.parametrize("sharing", [False, True])
def test_segments_cover_the_pack(sharing: bool) -> None:
    pairs = random_pairs(4, seed=1)
    batch = collate(pairs, range(4), prefix_sharing=sharing)
    q, k = batch.cu_seqlens_q, batch.cu_seqlens_k
    assert q[0] == k[0] == 0
    assert q[-1] == len(batch.input_ids)
    assert k[-1] == (len(batch.input_ids) if batch.kv_index is None else len(batch.kv_index))
    assert len(q) == len(k) == 2 * 4 + 1
    assert batch.max_seqlen_q == int(q.diff().max())
    assert (
        batch.max_seqlen_k == int(k.diff().max()) == max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    )
    assert (batch.kv_index is None) == (not sharing)


def test_layouts_of_one_pair_written_out() -> None:
    pair = TokenizedPair(*(np.array(ids, dtype=np.int32) for ids in ([7, 8], [1, 2, 3], [4, 5])))
    apart, shared = (collate([pair], [42], prefix_sharing=sharing) for sharing in (False, True))
    assert apart.input_ids.tolist() == [7, 8, 1, 2, 3, 7, 8, 4, 5]
    assert apart.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert apart.cu_seqlens_q.tolist() == apart.cu_seqlens_k.tolist() == [0, 5, 9]
    assert apart.predictor_index.tolist() == [1, 2, 3, 6, 7]
    assert shared.input_ids.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert shared.cu_seqlens_q.tolist() == [0, 5, 7]
    assert shared.cu_seqlens_k.tolist() == [0, 5, 9]
    assert shared.kv_index is not None
    assert shared.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert shared.predictor_index.tolist() == [1, 2, 3, 1, 5]  # token 1 predicts the first token of both answers
    for batch in (apart, shared):
        assert batch.targets.tolist() == [1, 2, 3, 4, 5]
        assert batch.span_index.tolist() == [0, 0, 0, 1, 1]
        assert batch.place_in_span.tolist() == [0, 1, 2, 0, 1]
        assert batch.pair_ids.tolist() == [42]


def test_scored_prompts_of_one_pair_written_out() -> None:
    """Token 7 of the prompt is not scored: nothing comes before it."""
    pair = TokenizedPair(*(np.array(ids, dtype=np.int32) for ids in ([7, 8, 9], [1, 2], [4, 5, 6])))
    for sharing, predictors in ((False, [0, 1, 2, 3, 7, 8, 9]), (True, [0, 1, 2, 3, 2, 5, 6])):
        batch = collate([pair], [42], prefix_sharing=sharing, score_prompt=True)
        assert batch.targets.tolist() == [8, 9, 1, 2, 4, 5, 6]
        assert batch.predictor_index.tolist() == predictors
        assert batch.span_index.tolist() == [PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED, REJECTED, REJECTED]
        assert batch.place_in_span.tolist() == [0, 1, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("sharing", [False, True])
def test_scoring_prompts_adds_scored_tokens_and_changes_nothing_else(sharing: bool) -> None:
    """The model computes the same: the answers' log-probs cannot depend on whether an objective asks for prompts."""
    pairs = random_pairs(5, seed=7)
    plain, more = (collate(pairs, range(5), prefix_sharing=sharing, score_prompt=flag) for flag in (False, True))
    kept = more.span_index // 5 != PROMPT
    assert 0 < kept.sum() < len(kept)
    for field in fields(plain):
        left, right = getattr(plain, field.name), getattr(more, field.name)
        if field.name in ("predictor_index", "targets", "span_index", "place_in_span"):
            right = right[kept]
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


@pytest.mark.parametrize("sharing", [False, True])
def test_a_prompt_of_one_token_scores_nothing(sharing: bool) -> None:
    pairs = random_pairs(3, seed=8, longest=1)
    plain, more = (collate(pairs, range(3), prefix_sharing=sharing, score_prompt=flag) for flag in (False, True))
    for field in fields(plain):
        left, right = getattr(plain, field.name), getattr(more, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


@pytest.mark.parametrize("sharing", [False, True])
def test_index_add_by_span_sums_each_answer(sharing: bool) -> None:
    pairs = random_pairs(6, seed=2)
    batch = collate(pairs, range(6), prefix_sharing=sharing)
    sums = torch.zeros(12, dtype=torch.int64).index_add(0, batch.span_index, batch.targets).view(2, 6)
    assert sums[CHOSEN].tolist() == [int(p.chosen.sum()) for p in pairs]
    assert sums[REJECTED].tolist() == [int(p.rejected.sum()) for p in pairs]


@pytest.mark.parametrize("sharing", [False, True])
def test_computed_tokens_is_what_the_model_gets(sharing: bool) -> None:
    for seed in range(10):
        pairs = random_pairs(1 + seed, seed)
        lengths = np.array([[len(part) for part in pair[:3]] for pair in pairs])
        of_each = [len(collate([pair], [0], prefix_sharing=sharing).input_ids) for pair in pairs]
        assert computed_tokens(lengths, sharing).tolist() == of_each
        assert len(collate(pairs, range(len(pairs)), prefix_sharing=sharing).input_ids) == sum(of_each)


@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("sharing", [False, True])
def test_no_pairs_give_a_filler_that_scores_nothing(sharing: bool, score_prompt: bool) -> None:
    batch = collate([], [], prefix_sharing=sharing, score_prompt=score_prompt)
    assert batch.num_pairs == 0
    assert len(batch.input_ids) == len(batch.position_ids) > 0
    assert batch.cu_seqlens_q.tolist() == batch.cu_seqlens_k.tolist() == [0, len(batch.input_ids)]
    assert batch.kv_index is None
    scored = (batch.predictor_index, batch.targets, batch.span_index, batch.place_in_span, batch.pair_ids)
    assert [len(x) for x in scored] == [0] * 5
    assert batch.max_seqlen_q == batch.max_seqlen_k == len(batch.input_ids)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("score_prompt", [False, True])
def test_types_are_those_of_the_contract(score_prompt: bool, count: int, sharing: bool) -> None:
    """int64 to index with, int32 as the varlen kernels want it; an answer of one token included."""
    pairs = random_pairs(count, seed=3, longest=1)
    batch = collate(pairs, range(count), prefix_sharing=sharing, score_prompt=score_prompt)
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if field.name.startswith("cu_seqlens") else torch.int64), field.name
            assert value.dim() == 1
        else:
            assert value is None or type(value) is int, field.name


@pytest.mark.parametrize("sharing", [False, True])
def test_to_moves_every_tensor_and_nothing_else(sharing: bool) -> None:
    batch = collate(random_pairs(2, seed=4), [5, 6], prefix_sharing=sharing)
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta"
            assert after.shape == before.shape
        else:
            assert after == before
    assert batch.input_ids.device.type == "cpu"


def test_pairs_of_a_pack_do_not_depend_on_each_other() -> None:
    """What one pair contributes to a pack is the pack of that pair alone, moved along."""
    pairs = random_pairs(3, seed=5)
    for sharing in (False, True):
        together = collate(pairs, range(3), prefix_sharing=sharing)
        alone = [collate([pair], [k], prefix_sharing=sharing) for k, pair in enumerate(pairs)]
        starts = np.cumsum([0] + [len(b.input_ids) for b in alone]).tolist()
        assert together.input_ids.tolist() == [i for b in alone for i in b.input_ids.tolist()]
        assert together.position_ids.tolist() == [i for b in alone for i in b.position_ids.tolist()]
        moved = [i + start for b, start in zip(alone, starts) for i in b.predictor_index.tolist()]
        assert together.predictor_index.tolist() == moved


def grouped_pairs(seed: int) -> list[TokenizedPair]:
    """Pairs of few prompts, whose answers are drawn from few: many share a prompt, an answer, or both."""
    draws = np.random.default_rng(seed)
    prompts = [draws.integers(0, 1000, draws.integers(1, 9)).astype(np.int32) for _ in range(2)]
    answers = [draws.integers(0, 1000, draws.integers(1, 9)).astype(np.int32) for _ in range(4)]
    chosen = (draws.choice(4, 2, replace=False) for _ in range(1 + seed % 9))
    return [TokenizedPair(prompts[draws.integers(2)], answers[i], answers[j]) for i, j in chosen]


@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_pairs_of_one_prompt_share_it_and_their_answers(seed: int, score_prompt: bool) -> None:
    """Read back from the tensors alone: of each pair and side, every token that is counted is predicted from exactly what
    precedes it; prompt and answers are computed once each; and a token's multiplicity is how often it would be without."""
    pairs = grouped_pairs(seed)
    if seed % 3 == 0:  # few masks, so that some answers are equal in these too
        pairs = [masked([pair], int(pair.chosen.sum()) % 2)[0] for pair in pairs]
    batch = collate(pairs, range(len(pairs)), prefix_sharing=True, score_prompt=score_prompt)
    sees, ids = visible(batch), batch.input_ids.tolist()
    counted = torch.arange(len(batch.targets)) if batch.scored_index is None else batch.scored_index
    predictors, targets = batch.predictor_index[counted].tolist(), batch.targets[counted].tolist()
    scored = list(zip(predictors, targets, batch.span_index.tolist(), batch.place_in_span.tolist(), strict=True))
    for k, pair in enumerate(pairs):
        answers = [
            (CHOSEN, pair.prompt, pair.chosen, pair.chosen_scored),
            (REJECTED, pair.prompt, pair.rejected, pair.rejected_scored),
            (PROMPT, pair.prompt[:1], pair.prompt[1:] if score_prompt else pair.prompt[:0], None),
        ]
        for side, before, tokens, mask in answers:
            of_side = [(p, target, place) for p, target, span, place in scored if divmod(span, len(pairs)) == (side, k)]
            counted = places(tokens, mask)
            assert [(target, place) for _, target, place in of_side] == [(int(tokens[j]), n) for n, j in enumerate(counted)]
            for j, (predictor, _, _) in zip(counted, of_side, strict=True):
                assert [ids[s] for s in sees[predictor]] == [*before, *tokens[:j]]

    sides = [(p, *side) for p in pairs for side in ((p.chosen, p.chosen_scored), (p.rejected, p.rejected_scored))]
    sequences = {(p.prompt.tobytes(), answer.tobytes(), str(places(answer, mask))): answer for p, answer, mask in sides}
    prompts = {p.prompt.tobytes(): p.prompt for p in pairs}
    assert len(ids) == sum(map(len, prompts.values())) + sum(map(len, sequences.values()))
    apart = collate(pairs, range(len(pairs)), prefix_sharing=False)
    assert (apart.multiplicity == 1).all()
    weighed = torch.bincount(batch.input_ids, batch.multiplicity, minlength=1000)
    assert torch.equal(weighed, torch.bincount(apart.input_ids, minlength=1000).double())
    assert (batch.scored_index is None) == (
        len(sequences) == 2 * len(pairs) and not (score_prompt and len(prompts) < len(pairs))
    )


def test_a_masked_answer_written_out() -> None:
    """A conversation behind the prompt: the third of its tokens is another's, and nothing is scored there."""
    mask = np.array([True, True, False, True])
    pair = TokenizedPair(*(np.array(ids, dtype=np.int32) for ids in ([7, 8], [1, 2, 3, 4], [5, 6])), mask)
    for sharing, predictors in ((False, [1, 2, 4, 7, 8]), (True, [1, 2, 4, 1, 6])):
        batch = collate([pair], [42], prefix_sharing=sharing)
        assert batch.predictor_index.tolist() == predictors
        assert batch.targets.tolist() == [1, 2, 4, 5, 6]
        assert batch.span_index.tolist() == [0, 0, 0, 1, 1]
        assert batch.place_in_span.tolist() == [0, 1, 2, 0, 1]


def test_a_group_written_out() -> None:
    """Two pairs of one prompt with one answer in common: [prompt | best | worse | worst]."""
    prompt, best, worse, worst = (np.array(x, dtype=np.int32) for x in ([7, 8], [1, 2], [3], [4, 5]))
    pairs = [TokenizedPair(prompt, best, worse), TokenizedPair(prompt, best, worst)]
    batch = collate(pairs, [42, 43], prefix_sharing=True)
    assert batch.input_ids.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 3]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 5, 7]
    assert batch.kv_index is not None and batch.scored_index is not None
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 5, 6]
    assert batch.predictor_index.tolist() == [1, 2, 1, 1, 5]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5]
    assert batch.scored_index.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert batch.span_index.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert batch.multiplicity.tolist() == [4, 4, 2, 2, 1, 1, 1]

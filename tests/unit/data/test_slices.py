"""What one of several ranks computes of a pack: together they have all of it, each token once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dspref.data.batch import PackedBatch, collate
from dspref.data.loader import Packing
from dspref.data.slices import Part
from dspref.data.truncate import TokenizedPair


def a_pack(count: int = 3, sharing: bool = True, score_prompt: bool = False) -> PackedBatch:
    """Pairs of one prompt, some of whose answers' first tokens are predicted far before them."""
    draws = np.random.default_rng(1)
    prompt, *answers = (draws.integers(1, 99, n).astype(np.int32) for n in (7, *range(2, 2 * count + 2)))
    pairs = [TokenizedPair(prompt, *answers[2 * k : 2 * k + 2]) for k in range(count)]
    return collate(pairs, range(count), prefix_sharing=sharing, score_prompt=score_prompt)


def parts_of(batch: PackedBatch, parts: int) -> list[Part]:
    return [batch.computed.cut(number, parts) for number in range(parts)]


@pytest.fixture(params=[(3, True, False), (2, False, True), (0, True, False)], ids=["shared", "prompts scored", "filler"])
def batch(request: pytest.FixtureRequest) -> Iterator[PackedBatch]:
    yield a_pack(*request.param)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_parts_are_the_pack_and_behind_it_tokens_that_count_in_nothing(batch: PackedBatch, parts: int) -> None:
    cut, count = parts_of(batch, parts), len(batch.input_ids)
    assert len({len(part.input_ids) for part in cut}) == 1, "in an exchange all ranks have as many"
    for name in ("input_ids", "position_ids", "multiplicity"):
        whole = torch.cat([getattr(part, name) for part in cut])
        assert torch.equal(whole[:count], getattr(batch, name)), name
        assert not whole[count:].any()
    assert -(-count // parts) * parts == len(torch.cat([part.input_ids for part in cut]))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_every_scored_token_is_predicted_once_from_where_it_would_be(batch: PackedBatch, parts: int) -> None:
    found = torch.full((len(batch.targets),), -1)
    for number, part in enumerate(parts_of(batch, parts)):
        assert part.scored is not None
        start = number * len(part.input_ids)
        assert (found[part.scored] == -1).all()
        found[part.scored] = part.predictor_index + start
        assert torch.equal(part.targets, batch.targets[part.scored])
    assert torch.equal(found, batch.predictor_index)


def test_a_target_may_lie_with_another_rank() -> None:
    batch = a_pack()
    last = parts_of(batch, 2)[0]
    beyond = set(last.targets.tolist()) - set(last.input_ids.tolist())
    assert beyond, "what follows a shared prompt should be far behind it"


def test_ranks_one_behind_the_other_share_a_pack_with_room_for_all_their_tokens() -> None:
    shared = [Packing(100, True, rank, 4, takes="list").shared_by(2) for rank in range(4)]
    assert [(own.rank, own.part) for own in shared] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(own.world_size, own.parts, own.tokens_per_pack, own.takes) for own in shared} == {(2, 2, 200, "list")}
    alone = Packing(100, True, 1, 2)
    assert alone.shared_by(1) == alone
    batch = a_pack()
    assert alone.own(batch) is batch
    own = shared[3].own(batch).own
    assert own is not None and torch.equal(own.input_ids, batch.computed.cut(1, 2).input_ids)


def test_a_part_goes_to_a_device_with_its_pack() -> None:
    moved = Packing(100, True, 0, 2).shared_by(2).own(a_pack()).to("meta")
    assert moved.own is not None
    assert {x.device.type for x in vars(moved.own).values()} == {"meta"}

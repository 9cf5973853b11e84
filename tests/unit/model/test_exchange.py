"""Packs that several ranks hold between them: which models and packs cannot be, and how heads are shared out.

Ranks here are rows of a table in one process: what they exchange is a transposition of it.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config
from tiny_families import small_config

from dspref.errors import ConfigError
from dspref.model import admission, exchange
from dspref.model.exchange import Group


def alone(size: int, number: int = 0) -> Group:
    """A rank whose others have what it has."""
    return Group(size, number, lambda rows: rows[number].expand_as(rows), lambda values: values)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny_config("qwen2"), "3 does not divide the model's 4 attention heads; use 1"),
        (tiny_config("qwen2", num_attention_heads=6, hidden_size=96), ""),
        (small_config("mamba2"), "mamba2 is run one sequence at a time, as its linear_attention layers take no boundaries"),
        (small_config("qwen3_next"), "qwen3_next is run one sequence at a time"),
    ],
    ids=["heads", "fits", "recurrent", "hybrid"],
)
def test_models_that_cannot_be_shared_are_refused(config, said: str) -> None:
    admission.refuse_shared(config, 1, 64)
    if not said:
        admission.refuse_shared(config, 3, 64)
        return
    with pytest.raises(ConfigError) as raised:
        admission.refuse_shared(config, 3, 64)
    assert str(raised.value).startswith("parallel.sequence: 3") and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_layer_with_other_heads_is_refused_where_it_is_met() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.sequence: 4 does not divide the model's 6 attention heads; use 2"):
        exchange.by_heads(torch.zeros(3, 6, 8), torch.zeros(3, 6, 8), torch.zeros(3, 6, 8), 12, alone(4))


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(8, 8, 4), (8, 4, 2), (8, 2, 4), (8, 1, 8), (12, 3, 2), (12, 4, 6)])
def test_each_query_head_meets_the_key_value_head_that_it_would(heads: int, groups: int, ranks: int) -> None:
    """Fewer key-value heads than ranks, or such as these do not divide, are repeated as seldom as can be."""
    q, k = (torch.arange(n).float()[None, :, None].expand(2, -1, 1) for n in (heads, groups))
    seen = []
    for number in range(ranks):
        own, keys, values = exchange.by_heads(q, k, 100 + k, 2 * ranks, alone(ranks, number))
        assert len(own) == len(keys) == 2 * ranks and torch.equal(values, 100 + keys)
        share = own.shape[1] // keys.shape[1]
        seen += list(zip(own[0, :, 0].tolist(), keys[0].repeat_interleave(share, dim=0)[:, 0].tolist()))
    assert seen == [(float(head), float(head // (heads // groups))) for head in range(heads)]


@pytest.mark.parametrize("heads", [1, 2])
def test_what_attention_gives_back_lies_as_without(heads: int) -> None:
    """Some layers take a view of it, which heads of one rank alone would not allow."""
    tokens = exchange.by_tokens(torch.arange(5.0 * heads).view(5, heads, 1).expand(-1, -1, 8), alone(2))
    assert tokens.is_contiguous() and tokens.shape == (3, 2 * heads, 8)
    assert tokens[:, heads, 0].tolist() == [0.0, heads, 2.0 * heads]


def test_what_a_layer_has_for_each_head_is_shared_out() -> None:
    sinks = torch.arange(6.0)
    assert torch.cat([exchange.own_heads(sinks, alone(3, number)) for number in range(3)]).tolist() == sinks.tolist()  # type: ignore
    assert exchange.own_heads(None, alone(3)) is None

"""Means over the global batch from sums and counts of packs, and the watch for chosen answers that grow less likely."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dspref.data.batch import PackedBatch, collate
from dspref.data.truncate import TokenizedPair
from dspref.model.logps import TokenLogps, pair_logps
from dspref.objectives import build_objective
from dspref.objectives.families import PairLogps, total
from dspref.report.metrics import Displacement, Meter, Sources, falls

CPU = torch.device("cpu")


def meter(router_coef: float = 0.0) -> Meter:
    return Meter(CPU, router_coef)


# ------------------------------------------------------------------------------------------------------------- means

Pack = tuple[PackedBatch, TokenLogps, PairLogps, PairLogps]


def packs(sizes: list[int], score_prompt: bool = True) -> list[Pack]:
    """Packs of these sizes with random log-probs under a policy and a reference. Answers have 1 to 9 tokens."""
    draws = np.random.default_rng(0)
    found = []
    for size in sizes:
        lengths = draws.integers(1, 10, (size, 3)).tolist()
        pairs = [TokenizedPair(*(np.zeros(n, dtype=np.int32) for n in of_pair)) for of_pair in lengths]
        batch = collate(pairs, range(size), prefix_sharing=True, score_prompt=score_prompt)
        logps, mean_logits, other = (torch.as_tensor(draws.normal(-2, 1, len(batch.span_index))) for _ in range(3))
        tokens = TokenLogps(logps, mean_logits, torch.full_like(logps, 1.5), -logps, (logps > -2).float())
        found.append((batch, tokens, pair_logps(tokens, batch), pair_logps(TokenLogps(other, mean_logits), batch)))
    return found


def whole(parts: list[PairLogps]) -> PairLogps:
    """The pairs of all packs in one."""
    present = [name for name, value in vars(parts[0]).items() if value is not None]
    return PairLogps(**{name: torch.cat([getattr(part, name) for part in parts]) for name in present})


def measured(
    given: list[Pack], loss_type: str | list[str] = "sigmoid", name: str = "dpo", **keys: object
) -> dict[str, float]:
    objective, filled = build_objective(name, loss_type, **keys), meter()
    for batch, tokens, pairs, base in given:
        filled.add_pairs(objective(pairs, base), pairs)
        filled.add_logits(tokens, pairs, batch)
    return filled.reduce()


@pytest.mark.parametrize(
    ("name", "loss_type", "keys"),
    [
        ("dpo", "sigmoid", {}),
        ("dpo", ["sigmoid", "sft"], {"loss_weights": [0.8, 0.3], "use_weighting": True}),
        ("dpo", "ipo", {"rpo_alpha": 0.4}),
        ("cpo", "simpo", {"cpo_alpha": 0.2}),
        ("simpo", "simpo", {}),
        ("orpo", "orpo", {"beta": 0.3}),
        ("orpo", "orpo", {"nll_on_prompt": False}),
    ],
)
def test_means_over_packs_are_those_of_all_pairs(name: str, loss_type: str, keys: dict[str, object]) -> None:
    """Packs of unequal size, a filler among them: sums and counts add up, a mean of means would not."""
    given = packs([1, 4, 0, 2])
    found = measured(given, loss_type, name, **keys)
    pairs, base = whole([p for *_, p, _ in given]), whole([b for *_, b in given])
    objective = build_objective(name, loss_type, **keys)  # type: ignore[arg-type]
    loss = objective(pairs, base)
    names = ("pairs", "chosen_tokens", "rejected_tokens", "chosen_and_prompt_tokens")
    counts = {what: int(pairs.count(what)) for what in names}
    assert found["loss"] == pytest.approx(total(loss, counts).item())
    for metric, values in loss.metrics.items():
        assert found[metric] == pytest.approx(values.mean().item()), metric
    for component, term in loss.terms.items():
        assert found[f"loss/{component}"] == pytest.approx(term.values.sum().item() / counts[term.per])
    margins = loss.metrics["rewards/chosen"] - loss.metrics["rewards/rejected"]
    assert found["rewards/margins"] == pytest.approx(margins.mean().item())
    assert found["rewards/accuracies"] == pytest.approx((margins > 0).double().mean().item())
    assert found["lengths/chosen"] == pytest.approx(pairs.chosen_tokens.double().mean().item())
    assert found["lengths/rejected"] == pytest.approx(pairs.rejected_tokens.double().mean().item())


def test_logits_are_means_over_the_answers_tokens_of_all_packs() -> None:
    """Scored prompts are no answers; each token counts once, however many its answer has."""
    given = packs([3, 0, 1])
    found = measured(given)
    for side, name in enumerate(("chosen", "rejected")):
        logits = torch.cat([t.mean_logits[b.span_index // max(b.num_pairs, 1) == side] for b, t, *_ in given])
        assert found[f"logits/{name}"] == pytest.approx(logits.mean().item())


def test_entropy_is_of_both_answers_and_accuracy_of_the_chosen_one() -> None:
    """As TRL counts them; a forward that was not asked for them says nothing."""
    given = packs([3, 0, 1])
    found = measured(given)
    sides = [b.span_index // max(b.num_pairs, 1) for b, *_ in given]
    answers = torch.cat([t.logps[side < 2] for (_, t, *_), side in zip(given, sides)])
    chosen = torch.cat([t.logps[side == 0] for (_, t, *_), side in zip(given, sides)])
    assert found["entropy"] == pytest.approx(-answers.mean().item())
    assert found["mean_token_accuracy"] == pytest.approx((chosen > -2).double().mean().item())
    plain = [(batch, TokenLogps(tokens.logps, tokens.mean_logits), *rest) for batch, tokens, *rest in given]
    assert not {"entropy", "mean_token_accuracy"} & measured(plain).keys()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "keys"), [("dpo", {"rpo_alpha": 0.4}), ("orpo", {}), ("orpo", {"nll_on_prompt": False}), ("cpo", {})]
)
def test_each_source_has_the_loss_of_its_own_pairs(name: str, keys: dict[str, object]) -> None:
    """Pairs 0 and 1, none, 2 to 5: what they would be as a run of their own. A source without a pair is not told."""
    given = packs([1, 3, 0, 2])
    objective = build_objective(name, "orpo" if name == "orpo" else "sigmoid", **keys)  # type: ignore[arg-type]
    filled, first = Meter(CPU, sources=Sources(["a", "empty", "b"], [2, 0, 4], CPU)), 0
    for _, _, pairs, base in given:
        filled.add_pairs(objective(pairs, base), pairs, torch.arange(first, first + len(pairs.chosen)))
        first += len(pairs.chosen)
    found = filled.reduce()
    assert not [key for key in found if "empty" in key or "/loss/" in key]
    pairs, base = whole([p for *_, p, _ in given]), whole([b for *_, b in given])
    for label, rows in (("a", slice(0, 2)), ("b", slice(2, 6))):
        alone, own = meter(), [one.map(lambda x, rows=rows: x[rows]) for one in (pairs, base)]
        alone.add_pairs(objective(*own), own[0])
        expected = alone.reduce()
        for metric in ("loss", "rewards/accuracies", "rewards/margins"):
            assert found[f"source/{label}/{metric}"] == pytest.approx(expected[metric]), (label, metric)


def singles(given: list[Pack]) -> list[Pack]:
    """Packs whose first example has two answers, and the others one: chosen and rejected in turn."""
    first, found = 0, []
    for batch, tokens, *both in given:
        number = torch.arange(first, first + batch.num_pairs)
        there = {"chosen": (number % 2 == 0) | (number == 0), "rejected": (number % 2 == 1) | (number == 0)}
        names = [name for side in there for name in (side, f"{side}_tokens")]
        both = [replace(p, **{n: getattr(p, n) * there[n.removesuffix("_tokens")] for n in names}) for p in both]
        first += batch.num_pairs
        found.append((batch, tokens, *both))
    return found


@pytest.mark.parametrize(("name", "loss_type"), [("kto", "kto"), ("bco", "bco")])
def test_single_answers_are_counted_as_answers(name: str, loss_type: str) -> None:
    """Six examples with seven answers: means over those that are there; a source has its own."""
    given, objective = singles(packs([1, 3, 0, 2])), build_objective(name, loss_type, beta=0.5)
    pairs, base = whole([p for *_, p, _ in given]), whole([b for *_, b in given])
    found, first = Meter(CPU, sources=Sources(["a", "b", "one"], [2, 3, 1], CPU)), 0
    for _, _, own, other in given:
        found.add_pairs(objective(own, other, 0.2), own, torch.arange(first, first + len(own.chosen)))
        first += len(own.chosen)
    told = found.reduce()
    for prefix, rows in (("", range(6)), ("source/a/", (0, 1)), ("source/b/", (2, 3, 4)), ("source/one/", (5,))):
        rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for k in rows:
            for side in rewards:
                if getattr(pairs, f"{side}_tokens")[k]:
                    rewards[side].append(0.5 * float(getattr(pairs, side)[k] - getattr(base, side)[k]))
        limit = 0.2 if name == "bco" else 0.1
        right = [x > limit for x in rewards["chosen"]] + [x < limit for x in rewards["rejected"]]
        assert told[f"{prefix}rewards/accuracies"] == pytest.approx(sum(right) / len(right))
        signed = [x - limit for x in rewards["chosen"]] + [limit - x for x in rewards["rejected"]]
        losses = [math.log1p(math.exp(-x)) if name == "bco" else 1 / (1 + math.exp(x)) for x in signed]
        assert told[f"{prefix}loss"] == pytest.approx(sum(losses) / len(losses))
        means = [sum(of) / len(of) for of in rewards.values() if of]
        if len(means) == 2:
            assert told[f"{prefix}rewards/margins"] == pytest.approx(means[0] - means[1])
        else:
            assert f"{prefix}rewards/margins" not in told
    assert told["rewards/chosen"] == pytest.approx(float((0.5 * (pairs.chosen - base.chosen)).sum()) / 3) and told[
        "lengths/rejected"
    ] == pytest.approx(float(pairs.rejected_tokens.sum()) / 4)
    assert not [key for key in told if key.startswith("source/") and key.endswith(("/chosen", "/rejected"))]


def test_the_loss_comes_first_and_a_tie_is_no_win() -> None:
    pairs = PairLogps(*(torch.tensor([-1.0, -2.0]) for _ in range(2)), *(torch.tensor([1, 1]) for _ in range(2)))
    filled = meter()
    filled.add_pairs(build_objective("dpo", "sigmoid")(pairs, pairs), pairs)
    found = filled.reduce()
    assert next(iter(found)) == "loss"
    assert found["loss"] == pytest.approx(math.log(2))
    assert found["rewards/accuracies"] == 0.0


@pytest.mark.parametrize(
    ("name", "loss_type", "keys", "component"),
    [
        ("dpo", "sigmoid", {"rpo_alpha": 0.4}, "loss/nll"),
        ("dpo", ["sigmoid", "sft"], {"loss_weights": [1.0, 0.0]}, "loss/sft"),
        ("dpo", ["sigmoid", "sft"], {"rpo_alpha": 0.4}, "loss/sft"),
        ("cpo", "sigmoid", {}, "loss/nll"),
        ("simpo", "simpo", {}, "loss/nll"),  # logged, at weight 0
        ("orpo", "orpo", {}, "loss/nll"),
    ],
)
def test_nll_loss_is_the_unweighted_likelihood_term(
    name: str, loss_type: str, keys: dict[str, object], component: str
) -> None:
    given = packs([2, 3])
    found = measured(given, loss_type, name, **keys)
    pairs = whole([p for *_, p, _ in given])
    likelihood, tokens = pairs.chosen.sum(), pairs.chosen_tokens.sum()
    if name == "orpo":
        assert pairs.prompt is not None
        assert pairs.prompt_tokens is not None
        likelihood, tokens = likelihood + pairs.prompt.sum(), tokens + pairs.prompt_tokens.sum()
    assert found["nll_loss"] == found[component] == pytest.approx(-(likelihood / tokens).item())


def test_there_is_no_nll_loss_without_a_likelihood_term() -> None:
    assert "nll_loss" not in measured(packs([2]))


def test_a_meter_starts_anew_after_each_reduction() -> None:
    filled = meter()
    assert filled.reduce() == {}
    for value in (2.0, 5.0):
        filled.add("x", torch.tensor(3 * value), 3)
        filled.add("x", torch.tensor(value), torch.tensor(1))
        assert filled.reduce() == {"loss": 0, "x": value}
    assert filled.reduce() == {}


def test_a_mean_over_nothing_is_no_number() -> None:
    """A step of fillers alone cannot be, but an answer side without tokens in an odd set can: no crash, no zero."""
    filled = meter()
    filled.add("x", torch.tensor(0.0), 0)
    assert math.isnan(filled.reduce()["x"])


def test_of_an_answer_that_nobody_gave_there_is_no_mean() -> None:
    """Of single answers a step may have none that is desirable: nothing is said of them, and there is no margin."""
    filled = meter()
    for side, count in (("chosen", 0), ("rejected", 4)):
        filled.add(f"rewards/{side}", torch.tensor(2.0 * count), count)
        filled.add(f"logits/{side}", torch.tensor(1.0 * count), count)
    filled.add("mean_token_accuracy", torch.tensor(0.0), 0)
    assert filled.reduce() == {"loss": 0, "rewards/rejected": 2.0, "logits/rejected": 1.0}
    filled.add("rewards/chosen", torch.tensor(3.0), 3)
    filled.add("rewards/rejected", torch.tensor(2.0), 1)
    assert filled.reduce()["rewards/margins"] == 1.0 - 2.0, "the difference of the means"


def test_displacement_passes_over_steps_without_a_margin() -> None:
    watch = Displacement()
    for k in range(2 * Displacement.STEPS):
        said = watch.watch({"loss": 1.0} if k % 2 else {"rewards/chosen": -float(k), "rewards/margins": float(k)})
        if said:
            break
    assert k == 2 * Displacement.STEPS - 2, "told of as many steps that have one"


def test_sums_add_up_in_double_precision() -> None:
    """In fp32 2^24 + 1 is 2^24: a token count of a large step would stop growing."""
    filled = meter()
    for _ in range(3):
        filled.add("x", torch.tensor(float(2**24)), 1)
        filled.add("x", torch.tensor(1.0), 0)
    assert filled.reduce()["x"] == 2**24 + 1


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_the_router_loss_weighs_in_with_its_coefficient(coefficient: float) -> None:
    (batch, _, pairs, base), *_ = packs([3])
    assert batch.num_pairs == 3
    loss = build_objective("dpo", "sigmoid", rpo_alpha=0.5)(pairs, base)
    filled, plain = meter(coefficient), meter()
    for each in (filled, plain):
        each.add_pairs(loss, pairs)
        each.add("aux_loss", torch.tensor(12.0), 4)
    found, without = filled.reduce(), plain.reduce()
    assert found["aux_loss"] == 3.0
    assert found["loss"] == pytest.approx(without["loss"] + coefficient * 3.0)
    assert without["loss"] == pytest.approx(without["loss/sigmoid"] + 0.5 * without["nll_loss"])


def test_the_gap_is_the_mean_log_ratio_per_token_over_answers() -> None:
    """In size, so that nothing cancels; fillers count nothing."""
    filled, gaps = meter(), []
    for _, _, pairs, base in packs([2, 0, 3]):
        filled.add_gap(pairs, base)
        for side in ("chosen", "rejected"):
            columns = (getattr(x, name) for x, name in ((pairs, side), (base, side), (pairs, f"{side}_tokens")))
            gaps += [abs(s - r) / n for s, r, n in zip(*(column.tolist() for column in columns))]
    assert len(gaps) == 10
    assert filled.reduce()["gap"] == pytest.approx(sum(gaps) / 10, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ displacement

STEPS = 30


def series(slope: float, noise: float, seed: int = 0, steps: int = STEPS) -> list[float]:
    """A line through 0 with normal noise."""
    draws = np.random.default_rng(seed)
    return [slope * k + noise * draw for k, draw in enumerate(draws.normal(size=steps).tolist())]


def watched(chosen: list[float], margins: list[float], watch: Displacement | None = None) -> list[str]:
    """The warnings over a run with these values."""
    watch = watch or Displacement()
    told = [watch.watch({"rewards/chosen": c, "rewards/margins": m, "loss": 1.0}) for c, m in zip(chosen, margins)]
    return [warning for warning in told if warning]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (series(-1, 0), True),
        (series(-1e-6, 0), True),
        (series(1, 0), False),
        ([0.5] * 30, False),
        (series(-1, 3), True),
        (series(-0.1, 3), False),  # drowned: 3 nats of noise, 2 of trend
        ([3.0] * 10 + [1.0] * 10 + [2.0] * 10, False),  # on its way up again
        ([3.0] * 10 + [4.0] * 10 + [1.0] * 10, False),  # not before the last third
        ([3.0] * 10 + [2.0] * 10 + [1.0] * 10, True),
        ([9.0, *[0.0] * 29], False),  # one odd value is noise
    ],
)
def test_what_falls(values: list[float], expected: bool) -> None:
    assert falls(values) == expected


def test_noise_alone_seldom_falls() -> None:
    """Fewer than one in a hundred series without a trend; nearly all of those that lose six times their noise."""
    assert sum(falls(series(0, 1, seed)) for seed in range(400)) < 4
    assert sum(falls(series(-0.2, 1, seed)) for seed in range(400)) > 396


def test_the_size_of_rewards_does_not_matter() -> None:
    for factor in (1e-4, 1e4):
        for seed in range(20):
            values = series(-0.05, 1, seed)
            assert falls(values) == falls([factor * v for v in values])


def test_displacement_is_told_once() -> None:
    """Chosen answers grow less likely while the margin grows, through noise; the line names both ends and a remedy."""
    chosen, margins = series(-0.05, 0.1, 1, 300), series(0.05, 0.1, 2, 300)
    told = watched(chosen, margins)
    assert len(told) == 1
    assert "\n" not in told[0]
    assert "likelihood displacement" in told[0]
    assert all(remedy in told[0] for remedy in ("NLL", "beta", "learning rate"))
    quick = watched(series(-1, 0), series(1, 0))
    assert f"{STEPS} logged steps" in quick[0]
    assert "0 to -29" in quick[0]


def test_displacement_is_told_at_the_thirtieth_logged_step() -> None:
    assert watched(series(-1, 0, steps=STEPS - 1), series(1, 0, steps=STEPS - 1)) == []
    watch = Displacement()
    assert watched(series(-1, 0, steps=STEPS - 1), series(1, 0, steps=STEPS - 1), watch) == []
    assert len(watched([-29.0], [29.0], watch)) == 1


def test_displacement_that_starts_late_is_told() -> None:
    """Only the last 30 steps count: a long good start does not hide it."""
    good, bad = series(0.05, 0.01, 1, 200), [10.0 + x for x in series(-0.05, 0.01, 2, 60)]
    assert len(watched([*good, *bad], series(0.05, 0.01, 3, 260))) == 1


@pytest.mark.parametrize(
    ("chosen", "margins"),
    [
        (series(-1, 0.1), series(0, 0.1)),  # the margin stands still
        (series(-1, 0.1), series(-1, 0.1)),  # both fall: another trouble
        (series(1, 0.1), series(1, 0.1)),  # training as one wants it
        (series(0, 0.1), series(1, 0.1)),
        ([float("nan")] * 40, series(1, 0.1, steps=40)),
        ([-math.inf] * 40, series(1, 0.1, steps=40)),
    ],
)
def test_no_displacement(chosen: list[float], margins: list[float]) -> None:
    assert watched(chosen, margins) == []

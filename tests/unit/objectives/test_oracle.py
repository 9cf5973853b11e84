"""The oracle against published numbers: an oracle that nobody checked would only move the question.

The numbers are the specification's, computed elsewhere by other people's code.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import Scores, Sums

S_W, S_L = [-12.0, -30.5, -7.25], [-15.0, -28.0, -9.5]
GAPS = [1.5, -0.5, 2.0]
R_W, R_L = [-13.0, -31.0, -6.75], [-14.5, -29.5, -9.0]
N_W, N_L = [6, 20, 5], [8, 14, 7]

# (objective, loss of each pair, their mean)
GOLDEN: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "sigmoid": ({"loss_type": "sigmoid"}, [0.620957, 0.744397, 0.693147], 0.686167),
    "cDPO": ({"loss_type": "sigmoid", "label_smoothing": 0.1}, [0.635957, 0.734397, 0.693147], 0.687834),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, [0.602207, 0.756897, 0.693147], 0.684084),
    "hinge": ({"loss_type": "hinge"}, [0.85, 1.1, 1.0], 0.983333),
    "ipo": ({"loss_type": "ipo"}, [22.760851, 25.828176, 25.286531], 24.625186),
    "ipo sum": ({"loss_type": "ipo", "ipo_length_normalize": False}, [12.25, 36.0, 25.0], 24.416667),
    "exo_pair": ({"loss_type": "exo_pair"}, [2.505517, 2.935004, 2.761231], 2.733917),
    "nca_pair": ({"loss_type": "nca_pair"}, [1.350825, 1.413168, 1.386919], 1.383637),
    "bco_pair, delta 0": ({"loss_type": "bco_pair", "delta": 0.0}, [1.312856, 1.439417, 1.386919], 1.379731),
    "bco_pair, batch mean": ({"loss_type": "bco_pair", "delta": None}, [1.312700, 1.438324, 1.387700], 1.379575),
    "sppo_hard": ({"loss_type": "sppo_hard"}, [36.25, 62.5, 50.5], 49.75),
    "aot": ({"loss_type": "aot"}, [0.744397, 0.656350, 0.656350], 0.685699),
    "aot smoothed": ({"loss_type": "aot", "label_smoothing": 0.1}, [0.734397, 0.663850, 0.663850], 0.687366),
    "aot_pair": ({"loss_type": "aot_pair"}, [0.693147, 0.644397, 0.718460], 0.685334),
    "aot_unpaired": ({"loss_type": "aot_unpaired"}, [0.693147, 0.644397, 0.718460], 0.685334),
    "apo_zero": ({"loss_type": "apo_zero"}, [0.962523, 1.024932, 1.0], 0.995819),
    "apo_down": ({"loss_type": "apo_down"}, [0.987549, 1.037477, 0.987503], 1.004176),
    "discopop": ({"loss_type": "discopop"}, [0.849338, 0.787402, 0.846574], 0.827771),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm"}, [0.681754, 0.697263, 0.694577], 0.691198),
    "js": ({"f_divergence_type": "js_divergence"}, [0.660652, 0.706873, 0.693147], 0.686891),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, [0.631154, 0.712501, 0.693147], 0.678934),
    # the seed era's alpha 1 is forward KL
    "alpha 1": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
                [0.631154, 0.712501, 0.693147], 0.678934),
    "alpha": ({"f_divergence_type": "alpha_divergence"}, [0.627691, 0.724260, 0.693147], 0.681699),
    "alpha 0.3": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
                  [0.625438, 0.731018, 0.693147], 0.683201),
    "alpha 0.7": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
                  [0.629425, 0.718807, 0.693147], 0.680460),
    "dpop": ({"loss_type": "dpop"}, [0.620957, 0.744397, 2.57889], 1.314748),
    "chi_squared": ({"f_divergence_type": "chi_squared"}, [0.528778, 0.903049, 0.693147], 0.708325),
    "simper": ({"name": "simpo", "loss_type": "simper"}, [0.01802, -0.082286, 0.022825], -0.013814),
    "repo": ({"name": "simpo", "loss_type": "repo"}, [0.725, 0.125, 0.692857], 0.514286),
    "rpo_sq": ({"loss_type": "rpo_sq"}, [1.8225, 0.16, 4.0], 1.994167),
    "rpo_sq eta": ({"loss_type": "rpo_sq", "rpo_eta": 0.5}, [0.36, 0.0225, 1.0], 0.460833),
    "rpo_bwd_kl": ({"loss_type": "rpo_bwd_kl"}, [0.173269, 0.019303, 0.327813], 0.173462),
    "rpo_fwd_kl": ({"loss_type": "rpo_fwd_kl"}, [0.204926, 0.019689, 0.433781], 0.219465),
    "cpo": ({"name": "cpo"}, [0.554355, 0.825939, 0.586962], 0.655752),
    "simpo": ({"name": "simpo", "simpo_gamma": 0.5}, [1.136871, 0.493249, 1.093663], 0.907928),
    "cpo simpo": ({"name": "cpo", "loss_type": "simpo", "simpo_gamma": 0.5}, [1.136871, 0.493249, 1.093663], 0.907928),
    "simpo by ratio": ({"name": "simpo", "gamma_beta_ratio": 0.25}, [1.136871, 0.493249, 1.093663], 0.907928),
    "alphapo": ({"name": "simpo", "simpo_gamma": 0.5, "alpha": 0.25}, [1.245286, 0.319537, 1.146252], 0.903692),
    "log-odds": ({"name": "orpo"}, [-0.146060, 0.575003, -0.123130], 0.101937),
    "-logsig(log-odds)": ({"name": "orpo", "ratio": True}, [0.768842, 0.446417, 0.756606], 0.657288),
}  # fmt: skip


def golden_sums() -> list[Sums]:
    columns = [torch.tensor(column, dtype=torch.float64).unbind() for column in (S_W, S_L, R_W, R_L)]
    return [Sums(*row, 0.0, gap) for *row, gap in zip(*columns, N_W, N_L, GAPS, strict=True)]


@pytest.mark.parametrize("row", GOLDEN)
def test_formulas_give_the_published_numbers(row):
    objective, expected, expected_mean = GOLDEN[row]
    sums = golden_sums()
    match objective.get("name", "dpo"):
        case "dpo":
            delta = objective.get("delta")
            delta = oracle.bco_delta(sums, objective) if delta is None else delta
            losses = oracle.dpo_losses(objective.get("loss_type", "sigmoid"), sums, objective, delta)
        case "orpo":
            losses = [oracle.log_odds(s.s_w / s.n_w, s.s_l / s.n_l) for s in sums]
            if objective.get("ratio"):
                losses = [-torch.nn.functional.logsigmoid(ratio) for ratio in losses]
        case _:
            losses, _ = oracle.cpo_losses(sums, objective)
    assert [loss.item() for loss in losses] == pytest.approx(expected, abs=1e-6)
    assert oracle.mean(losses).item() == pytest.approx(expected_mean, abs=1e-6)


# ------------------------------------------------------------------------------ what the golden table does not hold


def scores(answer: list[float], collision: float = -2.0, prompt: tuple[float, ...] = ()) -> Scores:
    tensors = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (answer, prompt)]
    return Scores(list(tensors[0].unbind()), [torch.tensor(collision).double()] * len(answer), list(tensors[1].unbind()))


POLICY = [(scores([-1.0, -2.0], prompt=(-4.0,)), scores([-3.0, -1.0, -5.0])), (scores([-0.5, -3.5, -1.0]), scores([-2.0]))]
REFERENCE = [(scores([-1.5, -2.5]), scores([-2.0, -1.5, -4.5])), (scores([-1.0, -3.0, -2.0]), scores([-1.0]))]


def run(**objective: Any) -> dict[str, Any]:
    return oracle.loss_of_scores(POLICY, REFERENCE, {"name": "dpo", "beta": 1.0} | objective)


def test_pair_terms_are_means_over_pairs_and_token_terms_means_over_all_tokens():
    hinge, mixed = run(loss_type="hinge", beta=0.25), run(loss_type=["hinge", "sft"], loss_weights=[0.5, 2.0], beta=0.25)
    # c - j: (-3 + 4) - (-9 + 8) = 2 and (-5 + 6) - (-2 + 1) = 2
    assert hinge["loss"].item() == pytest.approx(1 - 0.25 * 2)
    assert mixed["nll_loss"] == pytest.approx((3 + 5) / 5)
    assert mixed["loss"].item() == pytest.approx(0.5 * 0.5 + 2.0 * 8 / 5)
    assert run(loss_type="hinge", beta=0.25, rpo_alpha=0.3)["loss"].item() == pytest.approx(0.5 + 0.3 * 8 / 5)


def test_metrics_are_raw_rewards_and_sums():
    result = run(beta=0.5, f_divergence_type="forward_kl")
    assert result["rewards/chosen"] == pytest.approx(0.5 * (1 + 1) / 2)
    assert result["rewards/rejected"] == pytest.approx(0.5 * (-1 - 1) / 2)
    assert result["rewards/margins"] == pytest.approx(1.0) and result["rewards/accuracies"] == 1.0
    assert (result["logps/chosen"], result["logps/rejected"]) == pytest.approx((-4.0, -5.5))
    assert (result["kl/chosen"], result["kl/rejected"]) == pytest.approx((1.0, -1.0))


def test_reference_free_rewards_have_no_reference():
    result = run(beta=0.5, reference_free=True)
    assert (result["rewards/chosen"], result["rewards/rejected"]) == pytest.approx((-2.0, -2.75))


def test_ld_alpha_weighs_what_is_beyond_the_shorter_answer_in_both_models():
    result = run(ld_alpha=0.5, rpo_alpha=1.0)
    # chosen: -3 and -0.5 - 0.5 * 4.5; rejected: -4 - 0.5 * 5 and -2; reference: -4, -1 - 0.5 * 5; -3.5 - 0.5 * 4.5, -1
    assert result["logps/chosen"] == pytest.approx((-3 - 2.75) / 2)
    assert result["logps/rejected"] == pytest.approx((-6.5 - 2) / 2)
    assert result["kl/chosen"] == pytest.approx(((-3 + 4) + (-2.75 + 3.5)) / 2)
    assert result["kl/rejected"] == pytest.approx(((-6.5 + 5.75) + (-2 + 1)) / 2)
    assert result["nll_loss"] == pytest.approx(8 / 5), "likelihood stays unweighted"


def test_wpo_weighs_preference_terms_by_a_clamped_constant():
    # mean(lp) - collision: chosen -1.5 + 2 = .5 and -5/3 + 2 = 1/3; rejected -3 + 2 = -1 and -2 + 2 = 0
    weights = [torch.tensor(0.5 - 1.0).double().exp().item(), 1.0]
    assert [oracle.wpo_weight(*pair).item() for pair in POLICY] == pytest.approx(weights)
    assert not oracle.wpo_weight(*POLICY[0]).requires_grad
    result = run(loss_type=["hinge", "sft"], beta=0.25, use_weighting=True)
    assert result["loss"].item() == pytest.approx(0.5 * sum(weights) / 2 + 8 / 5), "sft is no preference term"


def test_orpo_counts_prompt_tokens_unless_told_otherwise():
    with_prompt, without = run(name="orpo"), run(name="orpo", nll_on_prompt=False)
    assert with_prompt["nll_loss"] == pytest.approx((4 + 8) / 6) and without["nll_loss"] == pytest.approx(8 / 5)
    assert with_prompt["loss"].item() == pytest.approx(with_prompt["nll_loss"] - with_prompt["log_odds_ratio"])
    assert with_prompt["logps/chosen"] == pytest.approx((-1.5 - 5 / 3) / 2)


def test_bco_delta_carries_no_gradient_and_can_be_given():
    own = run(loss_type="bco_pair")
    assert own["bco_delta"] == pytest.approx(0.0)
    given = oracle.loss_of_scores(POLICY, REFERENCE, {"name": "dpo", "beta": 1.0, "loss_type": "bco_pair"}, delta=0.7)
    # both pairs have rewards 1 and -1
    z = torch.tensor([1 - 0.7, 1 + 0.7], dtype=torch.float64)
    assert given["loss"].item() == pytest.approx(-torch.nn.functional.logsigmoid(z).sum().item())


def test_cpo_adds_likelihood_and_simpo_does_not():
    cpo, bare = run(name="cpo", loss_type="ipo", cpo_alpha=0.5), run(name="cpo", loss_type="ipo", cpo_alpha=0.0)
    assert cpo["loss"].item() - bare["loss"].item() == pytest.approx(0.5 * 8 / 5)
    assert "nll_loss" not in bare and "nll_loss" not in run(name="simpo")
    assert cpo["rewards/chosen"] == cpo["logps/chosen"] == pytest.approx((-1.5 - 5 / 3) / 2)


# ------------------------------------------------------------------------------------------------- implicit prompts


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Sky? blue", "Sky? grey", "Sky?"),
        ("Sky? blue", "Sky? black", "Sky?"),
        ([{"a": 1}, {"b": 2}, {"c": 3}], [{"a": 1}, {"b": 2}, {"d": 4}], [{"a": 1}, {"b": 2}]),
    ],
)
def test_an_implicit_prompt_is_what_both_sides_begin_with(chosen, rejected, prompt):
    found, *answers = oracle.explicit({"chosen": chosen, "rejected": rejected})
    assert found == prompt and [found + answer for answer in answers] == [chosen, rejected]


def test_scores_split_a_sequence_where_the_answer_begins():
    """A model whose logits are known by hand: token v after token u has logit u * v / 4."""

    class Table(torch.nn.Module):
        def forward(self, input_ids):
            ids = input_ids.double()
            return type("Output", (), {"logits": ids[..., None] * torch.arange(5).double() / 4})

    result = oracle.score(Table(), [1, 3, 2], [4, 0])
    rows = {u: torch.log_softmax(u * torch.arange(5).double() / 4, -1) for u in range(5)}
    assert [x.item() for x in result.prompt] == pytest.approx([rows[1][3].item(), rows[3][2].item()])
    assert [x.item() for x in result.answer] == pytest.approx([rows[2][4].item(), rows[4][0].item()])
    collisions = [(rows[u].exp() ** 2).sum().log().item() for u in (2, 4)]
    assert [x.item() for x in result.collision] == pytest.approx(collisions)

"""Every objective by the book: float64, one pair after the other, one unpadded forward per sequence, no engine.

Written from the papers' formulas alone and shares no code with `dspref`, so that the two can disagree. Slow on purpose:
each number is a scalar tensor, and nothing happens to two pairs at once except where an objective says so (aot sorts,
bco averages). `step` scores with models; `loss_of_scores` is the same from log-probs; `dpo_losses`, `cpo_losses`,
`answer_loss` and `log_odds` are the formulas, from sums and counts. An answer that is not there is an empty list, and has
None for its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Objective = Mapping[str, Any]
# Of a row: weight, margin, score_chosen and score_rejected, as far as it has them; of a list the `labels` of its answers.
Given = Mapping[str, Any]

# ------------------------------------------------------------------------------------------------ rows -> token ids


class Answer(list):
    """Token ids of an answer, of which only those are scored where `scored` is true."""

    scored: list[bool]


def render(row: Mapping[str, Any], tokenizer: Any, scored: str = "assistant") -> list[list[int]]:
    """(prompt, chosen, rejected) token ids: whole texts, split where the three part; of ChatML conversations the assistant's
    words and ends are scored, or everything behind the split (`all`). Of a row with a label, the other answer is []."""
    if "label" in row:
        prompt, answer, _ = render(alone(row), tokenizer, scored)
        return [prompt, answer, []] if str(row["label"]).lower() in ("true", "1") else [prompt, [], answer]
    prompt, chosen, rejected = explicit(row)
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        texts = [prompt, *(prompt + answer + ("" if answer.endswith(eos) else eos) for answer in (chosen, rejected))]
    else:
        texts = [
            tokenizer.apply_chat_template(prompt + more, tokenize=False, add_generation_prompt=not more)
            for more in ([], chosen, rejected)
        ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    split = min(common(ids[0], ids[1]), common(ids[0], ids[2]))
    answers = [ids[1][split:], ids[2][split:]]
    if not isinstance(prompt, str) and scored == "assistant":
        answers = [written(answer, tokenizer) for answer in answers]
    return [ids[0][:split], *answers]


def written(ids: list[int], tokenizer: Any) -> Answer:
    """An answer as one reads it: the assistant speaks until its turn ends, then whoever the next header names."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    speaker, header, spoken = "assistant", None, []
    for token in ids:
        spoken.append(speaker == "assistant" and header is None)
        if header is not None:
            header += tokenizer.decode([token])
            if header.endswith("\n"):
                speaker, header = header.strip(), None
        elif token == end:
            speaker = "nobody"
        elif token == start:
            header = ""
    answer = Answer(ids)
    answer.scored = spoken
    while not answer.scored[-1]:
        answer.pop()
        answer.scored.pop()
    return answer


def explicit(row: Mapping[str, Any]) -> list[Any]:
    """[prompt, chosen, rejected]; where the row names no prompt, it is what the two sides begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return [row["prompt"], chosen, rejected]
    split = common(chosen, rejected)
    if isinstance(chosen, str):
        while split and not chosen[split - 1].isspace():  # whole words
            split -= 1
        split -= chosen[:split].endswith(" ")  # the space belongs to the answers' first word
    return [chosen[:split], chosen[split:], rejected[split:]]


def alone(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a label as one whose two answers are the same; of whole conversations, the answer is the last message."""
    if "messages" in row:
        *prompt, last = row["messages"]
        return {"prompt": prompt, "chosen": [last], "rejected": [last]}
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"]}


def common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    size = 0
    while size < min(len(left), len(right)) and left[size] == right[size]:
        size += 1
    return size


# ----------------------------------------------------------------------------------------------- token ids -> scores


@dataclass
class Scores:
    """One sequence under one model, token by token."""

    answer: list[Tensor]  # log p of each answer token
    collision: list[Tensor]  # log sum_v p(v)^2 of the distribution that each answer token was drawn from
    prompt: list[Tensor]  # log p of prompt tokens 2..n


def score(lm: torch.nn.Module, prompt: list[int], answer: list[int]) -> Scores:
    logits = lm(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = torch.log_softmax(logits[:-1], dim=-1)  # row t predicts token t + 1
    tokens = list(logps.gather(-1, torch.tensor((prompt + answer)[1:])[:, None])[:, 0].unbind())
    collisions = list(logps.exp().square().sum(-1).log().unbind())
    first = len(prompt) - 1
    scored = [i for i in range(len(answer)) if not isinstance(answer, Answer) or answer.scored[i]]
    return Scores([tokens[first + i] for i in scored], [collisions[first + i] for i in scored], tokens[:first])


def score_pairs(lm: torch.nn.Module, pairs: Sequence[Sequence[list[int]]]) -> list[tuple[Any, Any]]:
    return [tuple(score(lm, prompt, answer) if answer else None for answer in answers) for prompt, *answers in pairs]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- one step


def step(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    pairs: Sequence[Sequence[list[int]]],
    objective: Objective,
    delta: float | None = None,
    given: Sequence[Given] | None = None,
) -> dict[str, Any]:
    """Loss, with its graph, and metrics of one optimizer step over `pairs`, as `render` gives them."""
    theirs = None
    if reference is not None:
        with torch.no_grad():
            theirs = score_pairs(reference, pairs)
    point = None
    if objective["name"] == "kto" and reference is not None:
        point = reference_point(policy, reference, pairs)
    return loss_of_scores(score_pairs(policy, pairs), theirs, objective, delta, given, point)


def loss_of_scores(
    policy: Sequence[tuple[Scores, Scores]],
    reference: Sequence[tuple[Scores, Scores]] | None,
    objective: Objective,
    delta: float | None = None,
    given: Sequence[Given] | None = None,
    point: float | None = None,
) -> dict[str, Any]:
    """`delta` replaces bco's mean over this step; `given`: the numbers of each pair's row; `point`: KTO's
    `reference_point`."""
    given = given or [{}] * len(policy)
    if objective["name"] == "listwise":
        return lists_step(policy, reference, objective, given)
    if objective["name"] == "tpo":
        return tpo_step(policy, objective, given)
    if objective["name"] in ("kto", "bco"):
        return answers_step(policy, reference, objective, delta, point, given)
    if objective["name"] == "dpo":
        return dpo_step(policy, reference, objective, delta, given)
    if objective["name"] == "orpo":
        return orpo_step(policy, objective, given)
    return cpo_step(policy, objective, given)


def times(losses: Sequence[Tensor], given: Sequence[Given]) -> list[Tensor]:
    """Preference losses by the weights of their rows. The mean stays one over pairs."""
    return [of_row.get("weight", 1.0) * value for of_row, value in zip(given, losses, strict=True)]


def mean(values: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).sum() / len(values)


def total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def nll(scored: Sequence[tuple[Scores, Scores]], with_prompt: bool = False) -> Tensor:
    """-log p per token of the chosen sequences: one mean over the tokens of all pairs, not a mean of means."""
    tokens: list[Tensor] = []
    for chosen, _ in scored:
        if with_prompt:
            tokens += chosen.prompt
        tokens += chosen.answer
    return -total(tokens) / len(tokens)


def describe(rewards: Sequence[tuple[Any, Any]], logps: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """The metrics that every objective has, from (chosen, rejected) of each pair. A tie is not a win."""
    return {
        "rewards/chosen": mean([won for won, _ in rewards]).item(),
        "rewards/rejected": mean([lost for _, lost in rewards]).item(),
        "rewards/accuracies": mean([won > lost for won, lost in rewards]).item(),
        "rewards/margins": mean([won - lost for won, lost in rewards]).item(),
        "logps/chosen": mean([won for won, _ in logps]).item(),
        "logps/rejected": mean([lost for _, lost in logps]).item(),
    }


# -------------------------------------------------------------------------------------------------------------- DPO


@dataclass
class Sums:
    """One pair: summed log-probs S of the policy and R of the reference, counts n of scored tokens; w won, l lost."""

    s_w: Any
    s_l: Any
    r_w: Any
    r_l: Any
    n_w: int
    n_l: int
    target: float = 0.0
    gap: float | None = None  # of the scores of both answers

    @property
    def c(self) -> Any:
        return self.s_w - self.r_w

    @property
    def j(self) -> Any:
        return self.s_l - self.r_l


SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_pair", "sigmoid_norm")
RPO = ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
DIVERGED = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
ALIASES = {"aot_unpaired": "aot_pair", "dpo_norm": "sigmoid_norm"}


def dpo_step(
    policy: Sequence[tuple[Scores, Scores]],
    reference: Sequence[tuple[Scores, Scores]] | None,
    objective: Objective,
    delta: float | None,
    given: Sequence[Given],
) -> dict[str, Any]:
    beta = objective.get("beta", 0.1)
    if objective.get("reference_free", False):
        reference = None
    sums = []
    for i, ours in enumerate(policy):
        s_w, s_l = (total(side) for side in weighted(*ours, objective))
        r_w = r_l = torch.tensor(0.0, dtype=torch.float64)
        if reference is not None:
            r_w, r_l = (total(side).detach() for side in weighted(*reference[i], objective))
        gap = given[i]["score_chosen"] - given[i]["score_rejected"] if "score_chosen" in given[i] else None
        lengths = len(ours[0].answer), len(ours[1].answer)
        sums.append(Sums(s_w, s_l, r_w, r_l, *lengths, given[i].get("margin", 0.0), gap))

    types = objective.get("loss_type", "sigmoid")
    types = [types] if isinstance(types, str) else list(types)
    result: dict[str, Any] = describe([(beta * s.c, beta * s.j) for s in sums], [(s.s_w, s.s_l) for s in sums])
    result["kl/chosen"] = mean([s.c for s in sums]).item()
    result["kl/rejected"] = mean([s.j for s in sums]).item()

    loss = torch.tensor(0.0, dtype=torch.float64)
    for kind, weight in zip(types, objective.get("loss_weights") or [1.0] * len(types), strict=True):
        if kind == "sft":
            loss = loss + weight * nll(policy)
            continue
        if kind == "bco_pair":
            delta = bco_delta(sums, objective) if delta is None else delta
            result["bco_delta"] = delta
        losses = dpo_losses(kind, sums, objective, delta)
        if objective.get("use_weighting", False):
            losses = [wpo_weight(*ours) * value for ours, value in zip(policy, losses)]
        loss = loss + weight * mean(times(losses, given))
    if objective.get("rpo_alpha") is not None:
        loss = loss + objective["rpo_alpha"] * nll(policy)
    if "sft" in types or objective.get("rpo_alpha") is not None:
        result["nll_loss"] = nll(policy).item()
    return {"loss": loss, **result}


def weighted(chosen: Scores, rejected: Scores, objective: Objective) -> tuple[list[Tensor], list[Tensor]]:
    """LD-DPO: what the longer answer has beyond the length of the shorter one counts `ld_alpha` times."""
    alpha = objective.get("ld_alpha")
    if alpha is None:
        return chosen.answer, rejected.answer
    shorter = min(len(chosen.answer), len(rejected.answer))
    won, lost = ([t if i < shorter else alpha * t for i, t in enumerate(side.answer)] for side in (chosen, rejected))
    return won, lost


def wpo_weight(chosen: Scores, rejected: Scores) -> Tensor:
    """How likely the policy itself is to write this pair (WPO eq. 2), at most 1, without gradient."""
    exponent = torch.tensor(0.0, dtype=torch.float64)
    for side in (chosen, rejected):
        exponent = exponent + mean([lp - collision for lp, collision in zip(side.answer, side.collision)])
    return torch.clamp(torch.exp(exponent), max=1.0).detach()


def bco_delta(sums: Sequence[Sums], objective: Objective) -> float:
    """At step 1 the cumulative mean of rewards is the mean of this step's, over both sides of all pairs."""
    beta = objective.get("beta", 0.1)
    return mean([beta * s.c for s in sums] + [beta * s.j for s in sums]).item()


def f_prime(log_u: Any, objective: Objective) -> Any:
    """f'(u) of an f-divergence, at u = pi / pi_ref."""
    kind = objective.get("f_divergence_type") or "reverse_kl"
    if kind == "reverse_kl":
        return log_u
    u = torch.exp(log_u)
    if kind == "forward_kl":
        return 1 - 1 / u
    if kind == "js_divergence":
        return torch.log(2 * u / (1 + u))
    if kind == "chi_squared":
        return log_u + u - 1
    if kind == "alpha_divergence":
        alpha = objective.get("f_alpha_divergence_coef", 0.5)
        return (1 - u**-alpha) / alpha
    raise ValueError(kind)


def dpo_losses(kind: str, sums: Sequence[Sums], objective: Objective, delta: float | None = None) -> list[Tensor]:
    """The pair losses of one loss type. aot and aot_pair give theirs in sorted order."""
    kind = ALIASES.get(kind, kind)
    beta = objective.get("beta", 0.1)
    smoothing = objective.get("label_smoothing")
    if smoothing is None:
        smoothing = 1e-3 if kind == "exo_pair" else 0.0
    if kind not in SMOOTHED:
        smoothing = 0.0
    if kind not in DIVERGED and (objective.get("f_divergence_type") or "reverse_kl") != "reverse_kl":
        raise ValueError(f"{kind} has no f-divergence form")

    if kind in ("aot", "aot_pair"):
        if kind == "aot":
            left, right = sorted(s.s_w - s.s_l for s in sums), sorted(s.r_w - s.r_l for s in sums)
        else:
            left, right = sorted(s.c for s in sums), sorted(s.j for s in sums)
        return [smoothed(beta * (x - y), smoothing) for x, y in zip(left, right)]
    return [dpo_pair_loss(kind, s, beta, smoothing, objective, delta) for s in sums]


def dpo_pair_loss(kind: str, s: Sums, beta: float, smoothing: float, objective: Objective, delta: float | None) -> Tensor:
    f_w, f_l = f_prime(s.c, objective), f_prime(s.j, objective)
    h = f_w - f_l
    if kind == "sigmoid":
        return smoothed(beta * h - s.target, smoothing)
    if kind == "sigmoid_norm":
        return smoothed(beta * (f_w / s.n_w - f_l / s.n_l) - s.target, smoothing)
    if kind in RPO:
        z = torch.as_tensor(objective.get("rpo_eta", 1.0) * s.gap, dtype=torch.float64)
        if kind == "rpo_sq":
            return (beta * h - z) ** 2
        return bernoulli_kl(z, beta * h) if kind == "rpo_bwd_kl" else bernoulli_kl(beta * h, z)
    if kind == "robust":
        noisy = -(1 - smoothing) * logsigmoid(beta * h) + smoothing * logsigmoid(-beta * h)
        return noisy / (1 - 2 * smoothing)
    if kind == "hinge":
        return torch.clamp(1 - beta * h, min=0.0)
    if kind == "ipo":
        gap = f_w / s.n_w - f_l / s.n_l if objective.get("ipo_length_normalize", True) else h
        return (gap - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":
        epsilon = torch.tensor(smoothing, dtype=torch.float64)
        won = torch.sigmoid(beta * h) * (logsigmoid(beta * h) - torch.log(1 - epsilon))
        return won + torch.sigmoid(-beta * h) * (logsigmoid(-beta * h) - torch.log(epsilon))
    if kind == "discopop":
        rho = beta * h
        modulation = torch.sigmoid(rho / objective.get("discopop_tau", 0.05))
        return -logsigmoid(rho) * (1 - modulation) + torch.exp(-rho) * modulation
    if kind == "dpop":
        fallen = torch.clamp(-s.c, min=0.0)
        return -logsigmoid(beta * (s.c - s.j - objective.get("dpop_lambda", 50.0) * fallen))
    if kind == "nca_pair":
        return -logsigmoid(beta * s.c) - 0.5 * logsigmoid(-beta * s.c) - 0.5 * logsigmoid(-beta * s.j)
    if kind == "bco_pair":
        return -logsigmoid(beta * s.c - delta) - logsigmoid(-(beta * s.j - delta))
    if kind == "sppo_hard":
        return (s.c - 1 / (2 * beta)) ** 2 + (s.j + 1 / (2 * beta)) ** 2
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * s.c) + torch.sigmoid(beta * s.j)
    if kind == "apo_down":
        return torch.sigmoid(beta * s.c) + 1 - torch.sigmoid(beta * (s.c - s.j))
    raise ValueError(kind)


def bernoulli_kl(of: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of two coins by their log-odds."""
    p, q = torch.sigmoid(of), torch.sigmoid(other)
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def smoothed(z: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(z), where a label is wrong with probability `smoothing` (cDPO)."""
    return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


# ----------------------------------------------------------------------------------------------------- CPO and SimPO


def cpo_step(policy: Sequence[tuple[Scores, Scores]], objective: Objective, given: Sequence[Given]) -> dict[str, Any]:
    sums = []
    for (won, lost), of_row in zip(policy, given, strict=True):
        lengths, target = (len(won.answer), len(lost.answer)), of_row.get("margin", 0.0)
        sums.append(Sums(total(won.answer), total(lost.answer), 0.0, 0.0, *lengths, target))
    losses, rewards = cpo_losses(sums, objective)
    per_token = cpo_kind(objective) not in ("sigmoid", "hinge")
    logps = [(s.s_w / s.n_w, s.s_l / s.n_l) if per_token else (s.s_w, s.s_l) for s in sums]
    result: dict[str, Any] = {"loss": mean(times(losses, given)), **describe(rewards, logps)}
    alpha = objective.get("cpo_alpha", 1.0) if objective["name"] == "cpo" else 0.0
    if alpha:
        result["loss"] = result["loss"] + alpha * nll(policy)
        result["nll_loss"] = nll(policy).item()
    return result


def cpo_kind(objective: Objective) -> str:
    return objective.get("loss_type", {"simpo": "simpo", "cpo": "sigmoid"}[objective["name"]])


def cpo_losses(sums: Sequence[Sums], objective: Objective) -> tuple[list[Tensor], list[tuple[Any, Any]]]:
    """(preference loss, (chosen, rejected) reward) of each pair."""
    kind = cpo_kind(objective)
    beta = objective.get("beta", {"simpo": 2.0, "simper": 1.0, "repo": 1.0}.get(kind, 0.1))
    smoothing = objective.get("label_smoothing", 0.0)
    losses, rewards = [], []
    for s in sums:
        if kind in ("sigmoid", "hinge"):
            won, lost = s.s_w, s.s_l
        else:
            won, lost = (alpha_reward(value, objective.get("alpha", 0.0)) for value in (s.s_w / s.n_w, s.s_l / s.n_l))
        rewards.append((beta * won, beta * lost))
        if kind == "sigmoid":
            losses.append(smoothed(beta * (won - lost) - s.target, smoothing))
        elif kind == "hinge":
            losses.append(torch.clamp(1 - beta * (won - lost), min=0.0))
        elif kind == "simper":
            losses.append(torch.exp(lost) - torch.exp(won))
        elif kind == "repo":
            losses.append(torch.clamp(objective.get("repo_gamma", 0.6) - (won - lost), min=0.0))
        elif kind == "ipo":
            losses.append((won - lost - 1 / (2 * beta)) ** 2)
        elif kind == "simpo":
            margin = objective.get("simpo_gamma")
            if margin is None:
                ratio = objective.get("gamma_beta_ratio")
                margin = beta * (0.5 if ratio is None else ratio)
            losses.append(smoothed(beta * (won - lost) - margin - s.target, smoothing))
        else:
            raise ValueError(kind)
    return losses, rewards


def alpha_reward(average: Tensor, alpha: float) -> Tensor:
    """AlphaPO: (1 - p^-alpha) / alpha at p = exp(mean log-prob), whose limit at alpha 0 is the mean log-prob."""
    return (1 - torch.exp(-alpha * average)) / alpha if alpha else average


# ------------------------------------------------------------------------------------------------------------- ORPO


def orpo_step(policy: Sequence[tuple[Scores, Scores]], objective: Objective, given: Sequence[Given]) -> dict[str, Any]:
    beta = objective.get("beta", 0.1)
    averages = [(mean(won.answer), mean(lost.answer)) for won, lost in policy]
    ratios = [log_odds(won, lost) for won, lost in averages]
    likelihood = nll(policy, with_prompt=objective.get("nll_on_prompt", True))
    return {
        "loss": likelihood - beta * mean(times([logsigmoid(ratio) for ratio in ratios], given)),
        **describe([(beta * won, beta * lost) for won, lost in averages], averages),
        "nll_loss": likelihood.item(),
        "log_odds_chosen": mean(ratios).item(),
        "log_odds_ratio": mean([logsigmoid(ratio) for ratio in ratios]).item(),
    }


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), where odds(p) = p / (1 - p) and p = exp(mean log-prob)."""
    return (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))


# -------------------------------------------------------------------------------------------------- TPO: a third answer


def tpo_step(policy: Sequence[Sequence[Scores]], objective: Objective, given: Sequence[Given]) -> dict[str, Any]:
    """`policy`: chosen, rejected and gold answer of each row."""
    kind, beta, smoothing = (
        objective.get("loss_type", "sigmoid"),
        objective.get("beta", 0.01),
        objective.get("label_smoothing", 0),
    )
    losses, logps, tokens = [], [], []
    for won, lost, gold in policy:
        per_token = kind in ("ipo", "tpo_l")
        s_w, s_l = ((mean if per_token else total)(side.answer) for side in (won, lost))
        logps.append((s_w, s_l))
        tokens += gold.answer
        if kind == "hinge":
            losses.append(torch.clamp(1 - beta * (s_w - s_l), min=0.0))
        elif kind == "ipo":
            losses.append((s_w - s_l - 1 / (2 * beta)) ** 2)
        else:
            gamma = objective.get("tpo_l_gamma", 0.5) if kind == "tpo_l" else 0.0
            losses.append(smoothed(beta * (s_w - s_l) - gamma, smoothing))
    likelihood = -total(tokens) / len(tokens)
    return {
        "loss": mean(times(losses, given)) + objective.get("tpo_alpha", 1.0) * likelihood,
        **describe([(beta * won, beta * lost) for won, lost in logps], logps),
        "nll_loss": likelihood.item(),
    }


# --------------------------------------------------------------------------------------------------- lists of answers


def list_loss(kind: str, log_u: Sequence[Tensor], labels: Sequence[float], beta: float, scale: float = 1.0) -> Tensor:
    """One list, comparison by comparison."""
    s = [beta * x for x in log_u]
    pairs = [(i, j) for i, better in enumerate(labels) for j, worse in enumerate(labels) if better > worse]
    if kind == "plackett_luce":
        terms = []
        for i in range(len(s)):
            rest = [s[i], *(s[j] for better, j in pairs if better == i)]
            terms.append(s[i] - torch.log(total([torch.exp(x) for x in rest])))
        return -total(terms)
    # By the model's own order; level to a hundredth of a nat, the better answer is first.
    standing = [(-round(x.item() * 100), -label) for x, label in zip(log_u, labels)]
    places = [[place for place, other in enumerate(sorted(standing), start=1) if other == own] for own in standing]
    discounts = [sum(1 / math.log(1 + place) for place in own) / len(own) for own in places]
    gains = [2 ** (scale * label) - 1 for label in labels]
    weighed = [
        abs(gains[i] - gains[j]) * abs(discounts[i] - discounts[j]) * torch.log1p(torch.exp(s[j] - s[i])) for i, j in pairs
    ]
    return total(weighed)


def lists_step(
    policy: Sequence[Sequence[Scores]],
    reference: Sequence[Sequence[Scores]] | None,
    objective: Objective,
    given: Sequence[Given],
) -> dict[str, Any]:
    """`policy`: the answers of each list, whose `labels` are in `given`."""
    kind = objective.get("loss_type", "plackett_luce")
    beta = objective.get("beta", 0.05 if kind == "lipo_lambda" else 0.1)
    assert reference is not None
    losses, right, best, others = [], [], [], []
    for ours, theirs, of_row in zip(policy, reference, given, strict=True):
        labels = of_row["labels"]
        sums = [total(answer.answer) for answer in ours]
        log_u = [own - total(base.answer).detach() for own, base in zip(sums, theirs, strict=True)]
        losses.append(list_loss(kind, log_u, labels, beta, objective.get("score_scale", 1.0)))
        right += [log_u[i] > log_u[j] for i, x in enumerate(labels) for j, y in enumerate(labels) if x > y]
        for own, ratio, label in zip(sums, log_u, labels):
            (best if label == max(labels) else others).append((own, ratio))
    sides = {"chosen": best, "rejected": others}
    result = {f"rewards/{side}": beta * mean([ratio for _, ratio in of]).item() for side, of in sides.items()}
    result |= {f"kl/{side}": mean([ratio for _, ratio in of]).item() for side, of in sides.items()}
    result |= {f"logps/{side}": mean([own for own, _ in of]).item() for side, of in sides.items()}
    result |= {"rewards/margins": result["rewards/chosen"] - result["rewards/rejected"]}
    return {"loss": mean(times(losses, given)), "rewards/accuracies": mean(right).item(), **result}


# ------------------------------------------------------------------------------------------- KTO and BCO: single answers


def mismatched(examples: Sequence[Sequence[list[int]]], longest: int | None = None) -> list[Sequence[list[int]]]:
    """Each prompt of a step with the answers of the example before it; where some share prompts, in order of these, so many
    before it as the most frequent prompt has. What is beyond `longest` tokens is cut off."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, *_) in enumerate(examples):
        groups.setdefault(tuple(prompt), []).append(i)
    line = [i for group in groups.values() for i in group]
    back = max(map(len, groups.values())) if len(groups) > 1 else 1
    other_of = {i: line[place - back] for place, i in enumerate(line)}
    found = []
    for i, (prompt, *_) in enumerate(examples):
        _, *answers = examples[other_of[i]]
        cut = answers if longest is None else [shortened(answer, longest - len(prompt)) for answer in answers]
        found.append([prompt, *cut])
    return found


def longest_of(examples: Sequence[Sequence[list[int]]]) -> int:
    return max(len(prompt) + max(len(answer) for answer in answers) for prompt, *answers in examples)


def shortened(answer: list[int], size: int) -> list[int]:
    cut = type(answer)(answer[:size])
    if isinstance(cut, Answer):
        cut.scored = answer.scored[:size]  # type: ignore[attr-defined]
    return cut


def reference_point(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    examples: Sequence[Sequence[list[int]]],
    longest: int | None = None,
) -> float:
    """KTO's z: how far the policy has moved, by its log-ratio of answers to other prompts, and at least 0."""
    others = mismatched(examples, longest)
    with torch.no_grad():
        pairs = zip(score_pairs(policy, others), score_pairs(reference, others))
        log_ratios = [
            float(sum(ours.answer)) - float(sum(theirs.answer))
            for both in pairs
            for ours, theirs in zip(*both)
            if ours is not None
        ]
    return max(0.0, sum(log_ratios) / len(log_ratios))


def answer_loss(kind: str, log_u: Tensor, good: bool, beta: float, point: float, delta: float) -> Tensor:
    if kind == "kto":
        return 1 - torch.sigmoid(beta * (log_u - point) if good else beta * (point - log_u))
    if kind == "apo_zero_unpaired":
        return 1 - torch.sigmoid(beta * log_u) if good else torch.sigmoid(beta * log_u)
    if kind == "bco":
        return -logsigmoid(beta * log_u - delta) if good else -logsigmoid(delta - beta * log_u)
    raise ValueError(kind)


def answers_step(
    policy: Sequence[tuple[Scores | None, Scores | None]],
    reference: Sequence[tuple[Scores | None, Scores | None]] | None,
    objective: Objective,
    delta: float | None,
    point: float | None,
    given: Sequence[Given],
) -> dict[str, Any]:
    """One answer after the other, whether it stands alone or in a pair."""
    kind, beta = objective.get("loss_type", objective["name"]), objective.get("beta", 0.1)
    assert reference is not None
    answers, of_rows = [], []  # (is it desirable, log-prob, log-ratio), weight of its row
    for ours, theirs, of_row in zip(policy, reference, given, strict=True):
        for good, own, base in ((True, ours[0], theirs[0]), (False, ours[1], theirs[1])):
            if own is not None and base is not None:
                answers.append((good, total(own.answer), total(own.answer) - total(base.answer).detach()))
                of_rows.append(of_row.get("weight", 1.0))
    if kind == "bco" and delta is None:
        delta = mean([beta * log_u for _, _, log_u in answers]).item()
    if kind != "kto":
        point = 0.0
    assert point is not None
    threshold = delta if kind == "bco" else beta * point

    losses = []
    for (good, _, log_u), of_row in zip(answers, of_rows):
        weight = of_row * objective.get("desirable_weight" if good else "undesirable_weight", 1.0)
        losses.append(weight * answer_loss(kind, log_u, good, beta, point, delta or 0.0))
    right = [beta * log_u > threshold if good else beta * log_u < threshold for good, _, log_u in answers]
    result: dict[str, Any] = {"loss": mean(losses), "rewards/accuracies": mean(right).item()}
    for name, side in (("chosen", True), ("rejected", False)):
        if of_side := [(logp, log_u) for good, logp, log_u in answers if good is side]:
            result[f"logps/{name}"] = mean([logp for logp, _ in of_side]).item()
            result[f"kl/{name}"] = mean([log_u for _, log_u in of_side]).item()
            result[f"rewards/{name}"] = beta * result[f"kl/{name}"]
    if {"rewards/chosen", "rewards/rejected"} <= result.keys():
        result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    if kind == "bco":
        result["bco_delta"] = delta
    if kind == "kto":
        result["kl"] = point
    return result

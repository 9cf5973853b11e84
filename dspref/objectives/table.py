"""Objectives by name: one table, `OBJECTIVES`, and what a YAML section makes of it.

The keyword-only arguments of families and losses are the keys of the YAML's `objective` section; their annotations are the
ranges that the config checks. No torch is imported, so that a config is checked on a login node in a moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspref.objectives import gold, likelihoods, lists, losses, own, rewards, unpaired
from dspref.objectives.families import Key, Loss, cpo, dpo, orpo, simpo
from dspref.objectives.terms import PairLoss

# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Family:
    """The losses under one `objective.name`, and the function that feeds and weighs them."""

    assemble: Callable[..., PairLoss]
    losses: Mapping[str, Loss]
    needs_reference: bool = False
    takes: str = "pairs"
    """What a row becomes for it: `pairs`; `answers`, which may stand alone, each with a label, and a pair counts as a
    desirable and an undesirable one; a `list` of all its answers; or `gold`, a pair and a better answer beside it."""
    mixes: bool = False
    """`loss_type` may be a list, with `loss_weights` (as in MPO, Wang et al. 2024, arXiv:2411.10442)."""
    keys: Mapping[str, Key] = field(default_factory=dict)
    """Of the keys that the family has, and that several of its losses have."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names that people will type, with what to write instead."""
    own_of: tuple[str, ...] = ()
    """What a loss of the user's own is a function of; nothing: there is none."""
    own_normaliser: str = "sum"
    """What it sees of an answer's log-prob."""

    def loss(self, loss_type: str) -> Loss:
        """One of the table, or of the user's own. Raises ConfigError where that cannot be had."""
        if not own.is_own(loss_type):
            return self.losses[loss_type]
        return own.loss(loss_type, self.own_of, self.own_normaliser, keys_of(self.assemble))

    @property
    def by_rows(self) -> bool:
        """Whether all that a row gives is in one step, and steps are measured in rows."""
        return self.takes in ("list", "gold")

    @property
    def of_ratios(self) -> bool:
        """Whether a loss of the user's own sees `Ratios`, and not two scores."""
        return self.own_of == ("ratios",)


COMMON = {
    "loss_type": Key(
        "The loss; in dpo also a list of losses, added up. `module:function`: one of your own (dpo, cpo, simpo)."
    ),
    "loss_weights": Key("Weights of a list of losses; 1 each by default."),
    "beta": Key("Strength of the implicit reward; in orpo the weight of the odds-ratio term (the paper's lambda)."),
    "label_smoothing": Key("Probability that a label is wrong."),
}
_OF_DPO = {
    "reference_free": Key("A uniform reference: R = 0 everywhere, and no reference model."),
    "f_divergence_type": Key(
        "The divergence whose f'(u) takes the place of log u.",
        suits=lambda loss: loss.divergent,
        unsuited="is not built on a margin alone",
    ),
    "f_alpha_divergence_coef": Key(
        "The paper's alpha of alpha_divergence (TRL's coefficient since 0.29 is 1 - alpha).",
        has_effect=lambda section: section["f_divergence_type"] == "alpha_divergence",
        muted="it is for f_divergence_type: alpha_divergence",
    ),
    "rpo_alpha": Key("Weight of the chosen answer's NLL, a mean over tokens of the step, beside the loss."),
    "use_weighting": Key(
        "WPO: weigh each pair by the policy's own probability of it.",
        suits=lambda loss: not loss.ordered,
        unsuited="sorts its values: none belongs to a pair that could be weighed",
    ),
    "ld_alpha": Key("LD-DPO: share by which tokens beyond the shorter answer's length count."),
}
_OF_CPO = {
    "cpo_alpha": Key("Weight of the chosen answer's NLL, a mean over tokens of the step."),
    "alpha": Key(
        "AlphaPO: shape of the reward (1 - e^(-alpha A)) / alpha; 0 is A.",
        suits=lambda loss: loss.normaliser == "mean" and not loss.shaped,
        unsuited="has no mean log-probs as rewards; use simpo, ipo or repo",
    ),
}
_MARGIN = {
    "simpo_gamma": Key("SimPO's target margin, absolute."),
    "gamma_beta_ratio": Key(
        "SimPO's target margin as a multiple of beta.",
        has_effect=lambda section: section.get("simpo_gamma") is None,
        muted="simpo_gamma gives the margin; drop one",
    ),
}

LISTS = "write name: listwise; all answers of a row are one list"
KTO = "write name: kto; pairs count as a desirable and an undesirable answer each"
_AOT_PAIR = Loss(losses.aot_pair, couples=True, ordered=True)
_SIGMOID_NORM = Loss(losses.sigmoid_norm, "mean", targeted=True, divergent=True)
_SIMPER = Loss(likelihoods.simper, "mean", shaped=True)
_REPO = Loss(likelihoods.repo, "mean", keys={"repo_gamma": Key("RePO's margin of mean log-probs, in nats.")})
_SIMPO = Loss(likelihoods.simpo, "mean", targeted=True, keys=_MARGIN)

OBJECTIVES: dict[str, Family] = {
    "dpo": Family(
        dpo,
        {
            "sigmoid": Loss(losses.sigmoid, targeted=True, divergent=True),
            "sigmoid_norm": _SIGMOID_NORM,
            "dpo_norm": _SIGMOID_NORM,  # its name in open-instruct
            "hinge": Loss(losses.hinge, divergent=True),
            "ipo": Loss(
                losses.ipo,
                "mean",
                divergent=True,
                keys={"ipo_length_normalize": Key("Log-ratios per token; false: their sums, as the paper prints it.")},
            ),
            "exo_pair": Loss(losses.exo_pair, divergent=True),
            "nca_pair": Loss(losses.nca_pair),
            "robust": Loss(losses.robust, divergent=True),
            "bco_pair": Loss(losses.bco_pair, couples=True, running_mean=True),
            "sppo_hard": Loss(losses.sppo_hard),
            "aot": Loss(losses.aot, couples=True, ordered=True),
            "aot_pair": _AOT_PAIR,
            "aot_unpaired": _AOT_PAIR,  # its name since TRL 0.28
            "apo_zero": Loss(losses.apo_zero),
            "apo_down": Loss(losses.apo_down),
            "discopop": Loss(
                losses.discopop, divergent=True, keys={"discopop_tau": Key("Temperature of DiscoPOP's modulation.")}
            ),
            "dpop": Loss(
                losses.dpop, keys={"dpop_lambda": Key("Weight of a chosen answer's fall below the reference, in nats.")}
            ),
            **rewards.LOSSES,
            "sft": Loss(losses.negative_log_likelihood, "tokens", divergent=True),
        },
        needs_reference=True,
        mixes=True,
        keys=_OF_DPO,
        refused={
            "kto_pair": KTO,
            "cdpo": "write loss_type: sigmoid with label_smoothing",
            "rpo": "write loss_type: sigmoid with rpo_alpha; reward-aware: rpo_sq, rpo_bwd_kl or rpo_fwd_kl",
            "odpo": "write loss_type: sigmoid, and name the column of the offsets: data.train.columns.margin",
            "wpo": "write loss_type: sigmoid with use_weighting",
            "ld_dpo": "write loss_type: sigmoid with ld_alpha",
            "chipo": "write loss_type: sigmoid with f_divergence_type: chi_squared",
            "chi_po": "write loss_type: sigmoid with f_divergence_type: chi_squared",
            "dpo_positive": "write loss_type: dpop",
            "smaug": "write loss_type: dpop",
            "tr_dpo": "write loss_type: sigmoid with reference.sync_ref_model",
            "kto": KTO,
            "apo_zero_unpaired": "write name: kto with loss_type: apo_zero_unpaired",
            **dict.fromkeys(("plackett_luce", "lipo_lambda", "lipo", "listwise", "list_mle"), LISTS),
            "tpo": "write name: tpo",
            "simpo": "write name: simpo",
            "orpo": "write name: orpo",
        },
        own_of=("ratios",),
    ),
    "cpo": Family(
        cpo,
        {
            "sigmoid": Loss(likelihoods.cpo_sigmoid, targeted=True),
            "hinge": Loss(likelihoods.cpo_hinge),
            "ipo": Loss(likelihoods.cpo_ipo, "mean"),
            "simpo": _SIMPO,
            "simper": _SIMPER,
            "repo": _REPO,
        },
        keys=_OF_CPO,
        refused={
            "kto_pair": KTO,
            "alphapo": "write name: simpo with alpha",
            "cpo_simpo": "write loss_type: simpo with cpo_alpha",
            "cposimpo": "write loss_type: simpo with cpo_alpha",
        },
        own_of=("chosen", "rejected"),
    ),
    "simpo": Family(
        simpo,
        {"simpo": _SIMPO, "simper": _SIMPER, "repo": _REPO},
        keys=_OF_CPO,
        own_of=("chosen", "rejected"),
        own_normaliser="mean",
    ),
    "orpo": Family(
        orpo,
        {"orpo": Loss(likelihoods.orpo, "mean")},
        keys={"nll_on_prompt": Key("Whether ORPO's NLL covers the prompt too.")},
    ),
    "kto": Family(
        unpaired.of_answers,
        {
            "kto": Loss(unpaired.kto, mismatched=True),
            "apo_zero_unpaired": Loss(unpaired.apo_zero_unpaired),
        },
        needs_reference=True,
        takes="answers",
        keys={
            "desirable_weight": Key("Weight of desirable answers (the paper's lambda_D)."),
            "undesirable_weight": Key("Weight of undesirable answers (the paper's lambda_U)."),
        },
        refused={"bco": "write name: bco", "kto_pair": "write loss_type: kto"},
    ),
    "bco": Family(
        unpaired.bco_of_answers,
        {"bco": Loss(unpaired.bco, couples=True, running_mean=True)},
        needs_reference=True,
        takes="answers",
        refused={"bco_pair": "write name: dpo with loss_type: bco_pair", "kto": "write name: kto"},
    ),
    "listwise": Family(
        lists.of_lists,
        {
            "plackett_luce": Loss(lists.plackett_luce),
            "lipo_lambda": Loss(
                lists.lipo_lambda,
                keys={"score_scale": Key("LiPO: what a score is multiplied by to be a label; the paper's are from 0 to 1.")},
            ),
        },
        needs_reference=True,
        takes="list",
        refused={
            "lipo": "write loss_type: lipo_lambda",
            **dict.fromkeys(("list_mle", "pl", "dpo_pl"), "write loss_type: plackett_luce"),
            "sigmoid": "write name: dpo, or loss_type: plackett_luce, which is the same for two answers",
        },
    ),
    "tpo": Family(
        gold.tpo,
        {
            "sigmoid": Loss(gold.tpo_sigmoid),
            "hinge": Loss(gold.tpo_hinge),
            "ipo": Loss(gold.tpo_ipo, "mean"),
            "tpo_l": Loss(gold.tpo_l, "mean", keys={"tpo_l_gamma": Key("TPO-L's target margin, absolute.")}),
        },
        takes="gold",
        keys={"tpo_alpha": Key("Weight of the gold answer's NLL, a mean over tokens of the step.")},
        refused={"tpo-l": "write loss_type: tpo_l", "tpo": "write loss_type: sigmoid"},
    ),
}

KEYS: dict[str, Key] = {
    **COMMON,
    **{key: about for family in OBJECTIVES.values() for key, about in family.keys.items()},
    **{key: about for family in OBJECTIVES.values() for loss in family.losses.values() for key, about in loss.keys.items()},
}
"""Every key of an `objective` section but its name."""


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def keys_of(function: Callable) -> dict[str, inspect.Parameter]:
    """Keyword-only arguments: the YAML keys of a loss or a family, with annotation and default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def defaults(name: str, loss_types: Iterable[str]) -> dict[str, list[Any]]:
    """The keys that apply to an objective with these losses, each with its defaults: several where losses differ."""
    family = OBJECTIVES[name]
    found: dict[str, list[Any]] = {}
    # A loss's own default goes before the family's.
    for function in (*(family.loss(t).function for t in loss_types), family.assemble):
        for key, parameter in keys_of(function).items():
            known = found.setdefault(key, [])
            if parameter.default not in known and not (known and function is family.assemble):
                known.append(parameter.default)
    return found


def known_keys(name: str, loss_types: Iterable[str]) -> dict[str, Key]:
    """What must be known of the keys of an `objective` section with these losses; a loss of the user's own has the last
    word, but for what its family knows too."""
    family, found = OBJECTIVES[name], dict(KEYS)
    for loss_type in loss_types:
        if own.is_own(loss_type):
            shared = {*COMMON, *family.keys}
            found |= {key: about for key, about in family.loss(loss_type).keys.items() if key not in shared}
    return found


def as_list(loss_type: str | Sequence[str]) -> list[str]:
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def resolved(name: str, loss_type: str | Sequence[str], **keys: Any) -> dict[str, Any]:
    """An `objective` section with the value of every key that applies; keys at None are left to the defaults."""
    given = {key: value for key, value in keys.items() if value is not None}
    known = defaults(name, as_list(loss_type))
    section = {"name": name, "loss_type": loss_type} | {key: of[0] for key, of in known.items() if len(of) == 1} | given
    about = known_keys(name, as_list(loss_type))
    mute = {key for key in known if not about[key].has_effect(section)}
    applicable = {"name", "loss_type", "loss_weights", *known} - mute
    return {key: value for key, value in section.items() if key in applicable and value is not None}


def describe(name: str, loss_type: str | Sequence[str], **keys: Any) -> str:
    """An objective in one line: its losses and every key that is in force, as the YAML has them."""
    section = resolved(name, loss_type, **keys)
    kind = section.get("f_divergence_type", "reverse_kl")
    instead = f"; f'(u) = {losses.DERIVATIVES[kind]} for log u" if kind != "reverse_kl" else ""
    silent = {"name": name, "loss_type": loss_type, "f_divergence_type": "reverse_kl"}
    shown = {key: value for key, value in section.items() if silent.get(key) != value and value is not False}
    values = ", ".join(f"{key} {'true' if value is True else value}" for key, value in shown.items())
    return f"{name} / {' + '.join(as_list(loss_type))}  {values}{instead}"

"""The objective and the reference of another trainer's config."""

from __future__ import annotations

from typing import Any

from dspref.config import BemaSection
from dspref.config.foreign_values import VALUES
from dspref.convert.draft import TRUE, Draft, as_list
from dspref.objectives import OBJECTIVES, needs_reference

MARGINS = ("simpo_gamma", "gamma_beta_ratio")
# What theirs take where the file says nothing; elsewhere 0.1.
BETAS = {("alignment-handbook", "simpo"): 2.0, ("openrlhf", "kto"): 0.01, ("trl", "tpo"): 0.01}
WEIGHTS = {
    "desirable_weight": ("desirable_weight", "kto_desirable_weight", "kto_chosen_weight", "desirable_loss_weight"),
    "undesirable_weight": ("undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight", "undesirable_loss_weight"),
}


def objective(draft: Draft) -> None:
    name = draft.objective
    inner = draft.take("trl")
    if isinstance(inner, dict):
        draft.absorb("trl", inner)
    elif inner is not None:
        draft.leave("trl", inner, "is no mapping of keys")
    loss = _loss_of(draft)
    beta = draft.take("beta", "dpo_beta", "rl_beta", "pref_beta", "orpo_alpha", "model.beta")
    if name == "simpo" and (weight := draft.take("sft_weight")):
        name, loss = "cpo", "simpo"
        draft.put("objective.cpo_alpha", weight, draft.name("sft_weight"))
    draft.document["objective"] = {"name": name} | (draft.document["objective"] or {})
    if loss and loss != next(iter(OBJECTIVES[name].losses)):
        draft.put("objective.loss_type", loss)
    if beta is None:
        beta = BETAS.get((draft.dialect, name), 0.1)
        if not draft.computes("beta", "dpo_beta", "rl_beta", "pref_beta", "orpo_alpha", "model.beta"):
            draft.assume("beta", beta)
    draft.put("objective.beta", beta)
    if name == "orpo":
        draft.note("objective.beta", "the weight of the odds-ratio term, as there")
    chapters = {"dpo": _dpo, "cpo": _cpo, "simpo": _cpo, "kto": _of_answers, "bco": _of_answers, "tpo": _tpo}
    chapters.get(name, _leave_dpo)(draft)
    _reference(draft, name)


def _loss_of(draft: Draft) -> Any:
    """The loss by the name that it has here; flags that stand for one set keys on the way."""
    loss = as_list(draft.take("loss_type", "dpo_loss_type", "pref_loss"))
    if isinstance(loss, list) and len(loss) == 1:
        loss = loss[0]
    rl = draft.take("rl")
    draft.take("stage")
    if draft.flag("ipo", "model.ipo_enable"):
        draft.put("objective.ipo_length_normalize", False, "theirs takes sums of log-ratios")
        return "ipo"
    if rl == "ipo":
        return "ipo"
    if draft.flag("dpo_norm_loss"):
        return "sigmoid_norm"
    if draft.objective == "kto" and loss == "kto_pair":
        draft.note("objective", "kto_pair: a pair counts as a desirable and an undesirable answer, of one prompt")
        return None
    if loss == "wpo":
        draft.put("objective.use_weighting", True, f"{draft.name('loss_type')}: wpo")
        return "sigmoid"
    if loss in (None, draft.objective) or (draft.objective == "simpo" and loss == "sigmoid"):
        return "simpo" if draft.dialect == "axolotl" and draft.objective == "cpo" else None
    if isinstance(loss, list):
        return [VALUES["loss_type"].get(str(one).lower(), one) for one in loss]
    return VALUES["loss_type"].get(str(loss).lower(), loss)


def _cpo(draft: Draft) -> None:
    """Margins, and the NLL term, which CPO has by default."""
    is_simpo = "simpo" in (draft.get("objective.name"), draft.get("objective.loss_type"))
    absolute, ratio = draft.take("simpo_gamma"), draft.take("gamma_beta_ratio", "dpo_gamma_beta_ratio")
    if ratio is not None and is_simpo:
        draft.put("objective.gamma_beta_ratio", ratio)
    elif absolute is not None and is_simpo:
        draft.put("objective.simpo_gamma", absolute)
    elif is_simpo and draft.dialect in ("trl", "axolotl", "llamafactory"):
        draft.put("objective.simpo_gamma", 0.5, "their default")
    elif is_simpo:
        draft.put("objective.gamma_beta_ratio", 0.3 if draft.dialect == "open-instruct" else 0.25, "their default")
    for key, value in (("simpo_gamma", absolute), ("gamma_beta_ratio", ratio)):
        if value is not None and draft.get(f"objective.{key}") is None:
            draft.leave(key, value, "has no effect on this loss")
    if draft.get("objective.name") == "cpo" and draft.get("objective.cpo_alpha") is None:
        weight = draft.take("cpo_alpha")
        if weight == 0 and is_simpo:
            kept = {key: value for key, value in draft.document["objective"].items() if key != "loss_type"}
            draft.document["objective"] = kept | {"name": "simpo"}
            draft.note("objective", "CPO's simpo loss with cpo_alpha: 0 is SimPO")
        else:
            draft.put("objective.cpo_alpha", 1.0 if weight is None else weight, "their default" if weight is None else "")
    nll = draft.take("pref_ftx")
    if nll:
        draft.leave("pref_ftx", nll, "here it is objective.cpo_alpha, with objective.name: cpo and loss_type: simpo")
    _smoothing(draft)


def _dpo(draft: Draft) -> None:
    nll = draft.take("rpo_alpha", "pref_ftx", "nll_loss_coef", "model.nll_loss_coef")
    if nll:
        draft.put("objective.rpo_alpha", nll, "a mean over the tokens of the step; theirs is one over each micro-batch")
    coefficient = draft.take("f_alpha_divergence_coef")
    if coefficient is not None and draft.theirs.get("f_divergence_type") == "alpha_divergence":
        share = isinstance(coefficient, int | float) and 0 < coefficient < 1
        draft.put("objective.f_alpha_divergence_coef", round(1 - coefficient, 9) if share else coefficient,
                  f"{coefficient} there: TRL's coefficient is 1 - alpha")  # fmt: skip
    elif coefficient is not None:
        draft.leave("f_alpha_divergence_coef", coefficient, "it is for f_divergence_type: alpha_divergence")
    for key in ("simpo_gamma", "gamma_beta_ratio", "dpo_gamma_beta_ratio", "cpo_alpha", "discopop_tau"):
        if draft.has(key) and (key != "discopop_tau" or draft.get("objective.loss_type") != "discopop"):
            draft.leave(key, draft.take(key), "has no effect on this loss")
    _smoothing(draft)


def _of_answers(draft: Draft) -> None:
    """KTO's weights, and what becomes of its reference point."""
    name = draft.objective
    for ours, names in WEIGHTS.items():
        weight = draft.take(*names)
        if weight is not None and name == "kto":
            own = draft.dialect == "openrlhf" and weight != 1
            draft.put(f"objective.{ours}", weight, "its train_kto.py reads this, and trains with 1" if own else "")
        elif weight is not None:
            draft.leave(names[0], weight, "all answers weigh the same in BCO")
    if name == "kto" and draft.get("objective.loss_type") is None:
        draft.note("objective", "theirs has a KTO reference point (KL) for each micro-batch of a GPU; here the step has one")
    if name == "bco":
        draft.note("objective", "theirs moves BCO's threshold with each micro-batch of a GPU; here with each step")
    _leave_dpo(draft)


def _tpo(draft: Draft) -> None:
    """The weight of its gold answers, and TPO-L's margin. Where gold answers weigh nothing, it is CPO without an NLL, or
    SimPO."""
    weight, margin = draft.take("tpo_alpha"), draft.take("tpo_l_gamma")
    is_tpo_l = draft.get("objective.loss_type") == "tpo_l"
    if margin is not None and not is_tpo_l:
        draft.leave("tpo_l_gamma", margin, "has no effect on this loss")
    if weight == 0:
        kept = {key: value for key, value in draft.document["objective"].items() if key != "loss_type" or not is_tpo_l}
        draft.document["objective"] = kept | {"name": "simpo" if is_tpo_l else "cpo"}
        key, value = ("simpo_gamma", 0.5 if margin is None else margin) if is_tpo_l else ("cpo_alpha", 0)
        draft.put(f"objective.{key}", value)
        draft.note(
            "objective", f"tpo_alpha: 0 leaves gold answers out: it is {'SimPO' if is_tpo_l else 'CPO without its NLL'}"
        )
    else:
        draft.note(
            "objective", "rows need a gold answer, in the column `reference` as there, or data.train.columns.reference"
        )
        draft.note(
            "objective", "the NLL of gold answers is a mean over the tokens of the step; theirs is one over each micro-batch"
        )
        if weight is not None:
            draft.put("objective.tpo_alpha", weight)
        if margin is not None and is_tpo_l:
            draft.put("objective.tpo_l_gamma", margin)
    _smoothing(draft)
    _leave_dpo(draft)


def _leave_dpo(draft: Draft) -> None:
    for key in (
        "label_smoothing",
        "dpo_label_smoothing",
        "simpo_gamma",
        "gamma_beta_ratio",
        "cpo_alpha",
        "rpo_alpha",
        "pref_ftx",
    ):
        if value := draft.take(key):
            draft.leave(key, value, f"{draft.objective.upper()} has no such term here")


def _smoothing(draft: Draft) -> None:
    smoothing = draft.take("label_smoothing", "dpo_label_smoothing", "model.label_smoothing")
    if smoothing:
        draft.put("objective.label_smoothing", smoothing)


def _reference(draft: Draft, name: str) -> None:
    """The reference section, where the objective needs one."""
    free = draft.theirs.get("reference_free") in TRUE
    path = draft.take("ref_model", "ref_model_name_or_path", "ref_pretrain", "ref.model_name_or_path", "ref_model_adapters")
    stored = draft.flag("precompute_ref_log_probs")
    offload, moves, bema = draft.flag("ref_offload", "ref.offload"), draft.flag("sync_ref_model"), _bema(draft)
    said = {"ref_model": path, "precompute_ref_log_probs": stored, "ref_offload": offload, "sync_ref_model": moves}
    said["bema.update_ref_model"] = bema is not None
    if not needs_reference(name, free):
        for key, value in said.items():
            if value:
                draft.leave(key, value, f"{name} needs no reference")
        return
    own = draft.theirs.get("model_name_or_path", draft.theirs.get("pretrain"))
    if isinstance(path, str) and path != own:
        draft.put("reference.name_or_path", path)
    if bema is not None:
        draft.put("reference.bema", bema or True)
    if moves:
        draft.put("reference.sync_ref_model", True)
    elif stored:
        draft.put("reference.mode", "stored", f"{draft.name('precompute_ref_log_probs')}: true")
    elif offload:
        draft.put("reference.mode", "engine")
        draft.put("reference.offload", "cpu", draft.name("ref_offload"))


def _bema(draft: Draft) -> dict[str, Any] | None:
    """The keys of reference.bema that a script's BEMACallback gives; None where it moves no reference."""
    given = {key: draft.take(f"bema.{key}") for key in BemaSection.model_fields}
    given = {key: value for key, value in given.items() if value is not None}
    called, moves = "bema.update_ref_model" in draft.theirs, draft.flag("bema.update_ref_model")
    device, begin = draft.take("bema.device"), draft.take("bema.ref_model_update_after") or 0
    if not moves:
        if called:
            draft.leave("bema.update_ref_model", False, "averages the policy beside it, and dspref exports no average")
        return None
    if device not in (None, "cpu"):
        draft.leave("bema.device", device, "mean and beginning are in host memory")
    if begin != given.get("update_after", 0):
        draft.note("reference.bema", f"there the reference moves at steps counted from {begin}, here from update_after")
    # Theirs is 400 whatever update_freq is; ours follows that.
    every, moved = given.get("update_freq", 400), given.pop("ref_model_update_freq", 400)
    return given | ({"ref_model_update_freq": moved} if moved != every else {})

"""What TRL computes at its first step for every objective it has, written to trl_objectives.json beside this file.

Run by hand: `python tests/golden/make_trl_objectives.py`; half an hour on one core. Needs the extra `bench`
and `shared/` beside the repository. With names of variants as arguments it computes only these; the others stay in
the file if versions, data and models are still the same, and else are dropped.

Rows, models and settings are those of make_trl_first_step.py: sixteen real pairs in one batch, float32 on the CPU,
learning rate 0. `MODELS` says how the other models are made, so that a test can make them again.

Each variant is computed a second time without TRL: unpadded forwards in float64, and the formulas written in this file.
`agrees` says whether TRL's numbers are those of the formula under the variant's settings. Where some are not (`differ`),
`specification` holds the formula's numbers, `why` says who is right, and `equals` holds the settings, if any, under which
the formula does give TRL's numbers. Where float32 is at fault, the formula gives them from TRL's own log-ratios
log pi(y|x) - log pi_ref(y|x) (`gap_from_log_ratios`). The script stops at a difference that it cannot explain.

CPOTrainer and ORPOTrainer tokenize in their own way: they add the EOS token to an answer that does not *end* with it,
and a ChatML answer ends with <|im_end|> and a newline, so that each gets a second <|im_end|>. (They would add a BOS token
to the prompt too, but gpt2-chatml has none.) Their `tokenize_row` is therefore replaced: they get the token ids of
`split()`, with the label -100 on the prompt, so that the fixture is about the losses and nothing else. All else in them
is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest import mock

import make_trl_first_step as first_step  # first: goes offline, and puts `tiny` on the path
import torch
import torch.nn.functional as F
from datasets import Dataset
from make_trl_first_step import HERE, PAIRS, SHARED, RecordingTrainer, Tokens, exact_norm
from tiny import tiny_config, tiny_model, weights_digest
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TOLERANCE = 1e-5  # relative to max(1, |value|), float64 against TRL
METRICS = (
    "loss", "aux_loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm",
)  # fmt: skip

# tiny_model(tiny_config(family, vocab_size=len(tokenizer), **overrides), seed), and then
# - lm_head_scale s: lm_head.weight *= s
# - knows [k, a, b]: embed_tokens.weight[:, 0] = a, which makes column 0 of the head a bias of the logits, and
#   lm_head.weight[t, 0] = b for every token t of the answers, chosen and rejected, of the first k pairs
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
MODELS: dict[str, dict[str, Any]] = {
    "policy": {"family": "qwen2", "seed": 1},
    "reference": {"family": "qwen2", "seed": 2},
    "near_reference": {"family": "qwen2", "seed": 1, "lm_head_scale": 0.9},
    "knowing_policy": {"family": "qwen2", "seed": 1, "lm_head_scale": 2.0, "knows": [5, 1.0, 0.3]},
    "knowing_reference": {"family": "qwen2", "seed": 2, "lm_head_scale": 2.0, "knows": [5, 1.0, 0.3]},
    "partial_policy": {"family": "qwen2", "seed": 1, "knows": [1, 1.0, 1.0]},
    "moe_policy": {"family": "qwen3_moe", "seed": 1, "overrides": MOE},
    "moe_reference": {"family": "qwen3_moe", "seed": 2, "overrides": MOE},
}
assert (first_step.POLICY_SEED, first_step.REFERENCE_SEED) == (1, 2)

WHY_SMOOTHING = (
    "The formula: conservative DPO (Mitchell 2023), -(1-e) log sigma(z) - e log sigma(-z), as TRL up to 0.28 and TRL's own "
    "CPO sigmoid have it; TRL 1.16 reads label_smoothing nowhere in this loss and silently gives plain DPO."
)
WHY_ALPHA = (
    "The formula: f'(u) = (1 - u^-a) / a as in f-DPO (arXiv:2309.16240, table 1), as TRL up to 0.28 and as the docstring of "
    "TRL 1.16 (u^-a) say; its code has (u^(a-1) - 1) / (a-1), the paper's with 1 - a."
)
WHY_DELTA = (
    "The formula: BCO (arXiv:2404.04656) shifts rewards by delta, the running mean of both sides' rewards, which at the "
    "first step is this batch's mean (taken before use, without gradient); TRL 1.16 dropped delta."
)
WHY_CLAMP = (
    "The formula: WPO's authors (wzhouad/WPO, scripts/run_wpo.py) and TRL up to 0.28 clamp the weight of a pair at 1, so "
    "that no pair the policy knows outweighs the rest; eq. 2 of arXiv:2406.11827, which TRL 1.16 follows, has no bound."
)
WHY_ROUNDING = (
    "Rounding: float32 knows log-probs of -3000 to some 1e-4 only, which an exponential or beta 5 makes visible; from TRL's "
    "own log-ratios the formula gives TRL's numbers."
)


@dataclass(frozen=True)
class Variant:
    """One run of one TRL trainer; `settings` in TRL's words."""

    trainer: str
    settings: dict[str, Any]
    policy: str = "policy"
    reference: str = "reference"
    equals: dict[str, Any] = field(default_factory=dict)  # settings under which the formula gives TRL's numbers
    why: str = ""


def dpo(*loss_type: str, models: tuple[str, str] = ("policy", "reference"), **settings: Any) -> Variant:
    about = {key: settings.pop(key) for key in ("equals", "why") if key in settings}
    return Variant("dpo", {"loss_type": list(loss_type), "beta": 0.1} | settings, *models, **about)


def cpo(loss_type: str, **settings: float) -> Variant:
    return Variant("cpo", {"loss_type": loss_type, "beta": 0.1, "cpo_alpha": 1.0} | settings)


NEAR, CROSSED = ("policy", "near_reference"), ("partial_policy", "reference")
KNOWING = ("knowing_policy", "knowing_reference")
FORWARD_KL, JS = {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"}
ALPHA_05 = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}
ALPHA_07: dict[str, Any] = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
ALPHA_07 |= {"equals": {"f_alpha_divergence_coef": 0.3}, "why": WHY_ALPHA}
NO_DELTA = {"equals": {"bco_delta": "none"}, "why": WHY_DELTA}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}

VARIANTS: dict[str, Variant] = {
    "dpo_sigmoid": dpo("sigmoid"),
    "dpo_hinge": dpo("hinge"),
    "dpo_ipo": dpo("ipo"),
    "dpo_exo_pair": dpo("exo_pair", label_smoothing=1e-3),
    "dpo_nca_pair": dpo("nca_pair"),
    "dpo_robust": dpo("robust", label_smoothing=0.1),
    "dpo_bco_pair": dpo("bco_pair", **NO_DELTA),
    "dpo_sppo_hard": dpo("sppo_hard", beta=0.01),
    "dpo_aot": dpo("aot"),
    "dpo_aot_smoothed": dpo("aot", label_smoothing=0.1),
    # tiny models sort these pairs by length, all alike, which makes dpo_aot the same as dpo_sigmoid; but not this policy
    "dpo_aot_crossed": dpo("aot", beta=0.01, models=CROSSED),
    "dpo_aot_crossed_smoothed": dpo("aot", beta=0.01, label_smoothing=0.1, models=CROSSED),
    "dpo_aot_unpaired": dpo("aot_unpaired"),
    "dpo_apo_zero": dpo("apo_zero"),
    "dpo_apo_down": dpo("apo_down"),
    "dpo_discopop": dpo("discopop", discopop_tau=0.05),
    "dpo_sft": dpo("sft"),
    "dpo_sigmoid_norm": dpo("sigmoid_norm"),
    "dpo_sigmoid_norm_beta_5": dpo("sigmoid_norm", beta=5.0),
    "dpo_sigmoid_smoothed": dpo("sigmoid", label_smoothing=0.3, equals={"label_smoothing": 0.0}, why=WHY_SMOOTHING),
    "dpo_forward_kl": dpo("sigmoid", **FORWARD_KL),
    "dpo_forward_kl_near": dpo("sigmoid", **FORWARD_KL, models=NEAR),
    "dpo_js": dpo("sigmoid", **JS),
    "dpo_js_near": dpo("sigmoid", **JS, models=NEAR),
    "dpo_alpha_05": dpo("sigmoid", **ALPHA_05),
    "dpo_alpha_05_near": dpo("sigmoid", **ALPHA_05, models=NEAR),
    "dpo_alpha_07": dpo("sigmoid", **ALPHA_07),
    "dpo_alpha_07_near": dpo("sigmoid", **ALPHA_07, models=NEAR),
    "dpo_wpo": dpo("sigmoid", use_weighting=True),
    "dpo_wpo_clamped": dpo("sigmoid", use_weighting=True, models=KNOWING, equals={"wpo_clamp": None}, why=WHY_CLAMP),
    "dpo_ld": dpo("sigmoid", ld_alpha=0.5),
    "dpo_mpo": dpo("sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.0], **NO_DELTA),
    "dpo_moe": dpo("sigmoid", router_aux_loss_coef=0.01, models=("moe_policy", "moe_reference")),
    "cpo_sigmoid": cpo("sigmoid"),
    "cpo_sigmoid_smoothed": cpo("sigmoid", label_smoothing=0.1),
    "cpo_hinge": cpo("hinge"),
    "cpo_ipo": cpo("ipo"),
    "cpo_simpo": cpo("simpo", **SIMPO),
    "cpo_cpo_simpo": cpo("simpo", **SIMPO | {"cpo_alpha": 0.05}),
    "cpo_alphapo": cpo("simpo", **SIMPO, alpha=0.25),
    "orpo": Variant("orpo", {"beta": 0.1}),
}
# What the formulas read where a variant says nothing; names with no counterpart in TRL: bco_delta, wpo_clamp
DEFAULTS = {
    "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05,
    "loss_weights": None, "ld_alpha": 1.0, "use_weighting": False, "wpo_clamp": 1.0, "bco_delta": "running",
    "router_aux_loss_coef": 0.0, "alpha": 0.0, "simpo_gamma": 0.5,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# TRL


class RecordingDPOTrainer(RecordingTrainer):
    """Keeps the log-ratios of each pair too, [2, P], as TRL has them in float32."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(self.accelerator, "gather", wraps=self.accelerator.gather) as gather:
            loss = super().compute_loss(*args, **kwargs)
        of_pairs = [call.args[0] for call in gather.call_args_list if call.args[0].shape == (PAIRS,)]
        self.log_ratios = torch.stack(of_pairs[:2]).double() / self.beta  # the rewards come first
        return loss


class OurTokens:
    """Mixed into CPOTrainer and ORPOTrainer: our token ids, and what they computed before the log rounds it."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        theirs = super().tokenize_row(feature)
        prompt = feature["ours"]["prompt"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature["ours"][side]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
            # what the docstring says of theirs
            assert theirs[f"{side}_input_ids"] == prompt + answer + [self.processing_class.eos_token_id]
        assert row.keys() == theirs.keys()
        return row

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.recorded = {name: values[-1] for name, values in self._stored_metrics["train"].items()}
        self.recorded["loss"] = loss.item()
        return loss

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.recorded["grad_norm"] = exact_norm(model)
        return loss


class RecordingCPOTrainer(OurTokens, CPOTrainer):
    pass


class RecordingORPOTrainer(OurTokens, ORPOTrainer):
    pass


TRAINERS = {
    "dpo": (DPOConfig, RecordingDPOTrainer),
    "cpo": (CPOConfig, RecordingCPOTrainer),
    "orpo": (ORPOConfig, RecordingORPOTrainer),
}


@dataclass(frozen=True)
class Data:
    """The pairs: rows for TRL's own tokenization, and the token ids that it gives."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    tokens: list[Tokens]


def make_model(name: str, data: Data) -> PreTrainedModel:
    """The model that `MODELS[name]` describes."""
    recipe = MODELS[name]
    config = tiny_config(recipe["family"], vocab_size=len(data.tokenizer), **recipe.get("overrides", {}))
    model = tiny_model(config, recipe["seed"])
    with torch.no_grad():
        model.lm_head.weight.mul_(recipe.get("lm_head_scale", 1.0))
        if "knows" in recipe:
            count, column, bias = recipe["knows"]
            known = {token for _, chosen, rejected in data.tokens[:count] for token in chosen + rejected}
            model.model.embed_tokens.weight[:, 0] = column
            model.lm_head.weight[sorted(known), 0] = bias
    return model


def run_trl(variant: Variant, data: Data) -> tuple[dict[str, float], Tensor | None]:
    """One optimizer step of the variant's trainer at learning rate 0: the metrics and, of DPO, the log-ratios."""
    config, trainer_class = TRAINERS[variant.trainer]
    policy = make_model(variant.policy, data)
    before = weights_digest(policy)
    keys = ("prompt", "chosen", "rejected")
    rows = [row | {"ours": dict(zip(keys, ids))} for row, ids in zip(data.rows, data.tokens)]
    models = {"model": policy}
    if variant.trainer == "dpo":
        rows = data.rows
        models["ref_model"] = make_model(variant.reference, data)
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=2048,
            per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential", disable_dropout=True,
            learning_rate=0.0, weight_decay=0.0, max_grad_norm=1e9, max_steps=1, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **variant.settings,
        )  # fmt: skip
        dataset = Dataset.from_list(rows)
        trainer = trainer_class(**models, args=args, train_dataset=dataset, processing_class=data.tokenizer)
        if variant.trainer == "dpo":
            ids = [tuple(row[f"{key}_ids"] for key in keys) for row in trainer.train_dataset]
            assert ids == data.tokens
        trainer.train()
    assert weights_digest(policy) == before, "learning rate 0 must leave the weights alone"
    found = {name: trainer.recorded[name] for name in METRICS if name in trainer.recorded}
    return found, getattr(trainer, "log_ratios", None)


# ---------------------------------------------------------------------------------------------------------------------
# The same without TRL: forwards in float64, one sequence at a time


@dataclass(frozen=True)
class Scored:
    """One sequence under one model: log-probs of all its tokens but the first, log sum_v p(v)^2, router logits."""

    logps: Tensor
    squares: Tensor
    router: tuple[Tensor, ...]


def score(model: PreTrainedModel, ids: list[int]) -> Scored:
    moe = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    outputs = model(input_ids=torch.tensor([ids]), use_cache=False, **moe)
    logps = outputs.logits[0, :-1].log_softmax(-1)
    chosen = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    router = tuple(outputs.router_logits) if moe else ()
    return Scored(chosen, (2 * logps.detach()).logsumexp(-1), router)


class Plain:
    """The float64 models, and what they say of the chosen sequences (the first PAIRS) and of the rejected ones."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.sequences = [p + c for p, c, _ in data.tokens] + [p + r for p, _, r in data.tokens]
        answers = [len(c) for _, c, _ in data.tokens] + [len(r) for _, _, r in data.tokens]
        self.lengths = torch.tensor(answers)
        self.models: dict[str, PreTrainedModel] = {}
        self.scores: dict[str, list[Scored]] = {}

    def scored(self, name: str) -> list[Scored]:
        if name not in self.models:
            self.models[name] = make_model(name, self.data).double()
            self.models[name].set_experts_implementation("eager")  # the others know no float64
            with torch.no_grad():
                self.scores[name] = [score(self.models[name], ids) for ids in self.sequences]
        return self.scores[name]

    def run(self, variant: Variant, settings: dict[str, Any], log_ratios: Tensor | None = None) -> dict[str, float]:
        """Loss and metrics by the formulas, and the norm of the loss's gradient; with other log-ratios if given."""
        leaves = [Scored(s.logps.clone().requires_grad_(), s.squares, tuple(r.clone().requires_grad_() for r in s.router))
                  for s in self.scored(variant.policy)]  # fmt: skip
        x = SimpleNamespace(**DEFAULTS | settings, log_ratios=log_ratios, policy=leaves, n=self.lengths)
        if variant.trainer == "dpo":
            x.reference = self.scored(variant.reference)
        loss, found = {"dpo": dpo_loss, "cpo": cpo_loss, "orpo": orpo_loss}[variant.trainer](x)
        loss.backward()
        return {"loss": loss.item()} | found | {"grad_norm": self.gradient_norm(variant.policy, leaves)}

    def gradient_norm(self, name: str, leaves: list[Scored]) -> float:
        """Carry the gradients with respect to log-probs and router logits on to the model's weights."""
        model = self.models[name]
        model.zero_grad()
        for ids, leaf in zip(self.sequences, leaves):
            if leaf.logps.grad is None and not leaf.router:
                continue
            again = score(model, ids)
            pairs = [(again.logps, leaf.logps), *zip(again.router, leaf.router)]
            sum((output * like.grad).sum() for output, like in pairs).backward()
        return exact_norm(model)


# ---------------------------------------------------------------------------------------------------------------------
# The formulas. `x` has the settings, `policy` and `reference` [2P], and the numbers of answer tokens `n` [2P].


def logsig(z: Tensor) -> Tensor:
    return F.logsigmoid(z)


def smooth(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsig(z) - e * logsig(-z)


def answer_sums(scores: list[Scored], n: Tensor, ld_alpha: float = 1.0) -> Tensor:
    """[2, P] sums of the answers' log-probs; tokens beyond the shorter answer's length count ld_alpha (LD-DPO)."""
    shared = n.view(2, PAIRS).amin(0).repeat(2)
    sums = []
    for sequence, count, head in zip(scores, n.tolist(), shared.tolist()):
        answer = sequence.logps[-count:]
        sums.append(answer[:head].sum() + ld_alpha * answer[head:].sum())
    return torch.stack(sums).view(2, PAIRS)


def metrics(rewards: Tensor, logps: Tensor) -> dict[str, float]:
    """What every trainer logs, from [2, P] rewards and log-probs."""
    found = {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1]}
    found |= {"rewards/accuracies": (rewards[0] > rewards[1]).double(), "rewards/margins": rewards[0] - rewards[1]}
    found |= {"logps/chosen": logps[0], "logps/rejected": logps[1]}
    return {name: value.mean().item() for name, value in found.items()}


def f_prime(log_ratio: Tensor, kind: str, a: float) -> Tensor:
    """f'(u) of f-DPO (arXiv:2309.16240, table 1), from log u."""
    match kind:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return 1 - torch.exp(-log_ratio)
        case "js_divergence":
            return math.log(2) + logsig(log_ratio)
        case "alpha_divergence":
            return (1 - torch.exp(-a * log_ratio)) / a
    raise ValueError(kind)


def dpo_terms(name: str, x: SimpleNamespace, logps: Tensor, reference: Tensor) -> Tensor:
    """The loss of each pair (section 1.1 of the specification), from [2, P] sums of log-probs."""
    b, e = x.beta, x.label_smoothing
    ratios = logps - reference
    c, j = ratios
    scores = f_prime(ratios, x.f_divergence_type, x.f_alpha_divergence_coef)
    z = b * (scores[0] - scores[1])
    per_token = scores / x.n.view(2, PAIRS)
    match name:
        case "sigmoid":
            return smooth(z, e)
        case "hinge":
            return (1 - z).clamp(min=0)
        case "ipo":
            return (per_token[0] - per_token[1] - 1 / (2 * b)) ** 2
        case "exo_pair":
            chosen, rejected = z.sigmoid(), (-z).sigmoid()
            return chosen * (logsig(z) - math.log1p(-e)) + rejected * (logsig(-z) - math.log(e))
        case "nca_pair":
            return -logsig(b * c) - logsig(-b * c) / 2 - logsig(-b * j) / 2
        case "robust":
            return (-(1 - e) * logsig(z) + e * logsig(-z)) / (1 - 2 * e)
        case "bco_pair":
            delta = b * ratios.detach().mean() if x.bco_delta == "running" else 0.0
            return -logsig(b * c - delta) - logsig(-(b * j - delta))
        case "sppo_hard":
            return (c - 1 / (2 * b)) ** 2 + (j + 1 / (2 * b)) ** 2
        case "aot":
            policy, frozen = ((s[0] - s[1]).sort().values for s in (logps, reference))
            return smooth(b * (policy - frozen), e)
        case "aot_unpaired":
            return smooth(b * (c.sort().values - j.sort().values), e)
        case "apo_zero":
            return 1 - (b * c).sigmoid() + (b * j).sigmoid()
        case "apo_down":
            return (b * c).sigmoid() + 1 - (b * (c - j)).sigmoid()
        case "discopop":
            share = (z / x.discopop_tau).sigmoid()
            return -logsig(z) * (1 - share) + torch.exp(-z) * share
        case "sft":
            return (-logps[0].sum() / x.n[:PAIRS].sum()).expand(PAIRS)
        case "sigmoid_norm":
            return -logsig(b * (per_token[0] - per_token[1]))
    raise ValueError(name)


def wpo_weights(x: SimpleNamespace) -> Tensor:
    """Weights of the pairs: the product over both answers of exp(mean of log p(token) - log sum_v p(v)^2)."""
    aligned = [Scored(s.logps.detach() - s.squares, s.squares, ()) for s in x.policy]
    return torch.exp((answer_sums(aligned, x.n) / x.n.view(2, PAIRS)).sum(0))


def balance(x: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Load-balancing losses E x sum_i f_i P_i over all tokens of all 2P sequences, so that prompts count twice.

    f_i is the number of times a token picks expert i, P_i its mean probability. Returns the loss with f and P averaged
    over the layers first, as transformers has it, and the mean of the layers' own losses.
    """
    shares = []
    for layer in zip(*(sequence.router for sequence in x.policy)):
        probabilities = torch.cat(layer).softmax(-1)
        picked = F.one_hot(probabilities.topk(MOE["num_experts_per_tok"]).indices, MOE["num_experts"]).sum(1).double()
        shares.append(torch.stack([picked.mean(0), probabilities.mean(0)]))
    per_layer = torch.stack(shares)  # [layers, 2, experts]
    pooled = per_layer.mean(0)
    experts = MOE["num_experts"]
    return experts * (pooled[0] * pooled[1]).sum(), experts * (per_layer[:, 0] * per_layer[:, 1]).sum(-1).mean()


def dpo_loss(x: SimpleNamespace) -> tuple[Tensor, dict[str, float]]:
    logps, reference = (answer_sums(scores, x.n, x.ld_alpha) for scores in (x.policy, x.reference))
    if x.log_ratios is not None:  # the same derivatives, at TRL's log-ratios
        logps = logps + (x.log_ratios - (logps - reference)).detach()
    weights, found = torch.ones(PAIRS).double(), {}
    if x.use_weighting:
        weights = wpo_weights(x)
        found = {"max_weight": weights.max().item(), "weights_above_1": (weights > 1).sum().item()}
        weights = weights if x.wpo_clamp is None else weights.clamp(max=x.wpo_clamp)
    loss = torch.zeros(()).double()
    for name, weight in zip(x.loss_type, x.loss_weights or [1.0] * len(x.loss_type)):
        loss = loss + weight * (weights * dpo_terms(name, x, logps, reference)).mean()
    if x.router_aux_loss_coef:
        pooled, layer_mean = balance(x)
        loss = loss + x.router_aux_loss_coef * pooled
        found = {"aux_loss": pooled.item(), "aux_loss_mean_of_layers": layer_mean.item()}
    return loss, found | metrics(x.beta * (logps - reference), logps)


def cpo_loss(x: SimpleNamespace) -> tuple[Tensor, dict[str, float]]:
    """Section 1.3 of the specification: preference term + cpo_alpha x NLL, the mean over all chosen answer tokens."""
    sums = answer_sums(x.policy, x.n)
    nll = -sums[0].sum() / x.n[:PAIRS].sum() if x.cpo_alpha else torch.zeros(())
    logps = sums / x.n.view(2, PAIRS) if x.loss_type in ("ipo", "simpo") else sums
    rewards = (1 - torch.exp(-x.alpha * logps)) / x.alpha if x.alpha else logps  # AlphaPO, arXiv:2501.03884
    margin = rewards[0] - rewards[1]
    match x.loss_type:
        case "sigmoid":
            terms = smooth(x.beta * margin, x.label_smoothing)
        case "hinge":
            terms = (1 - x.beta * margin).clamp(min=0)
        case "ipo":
            terms = (margin - 1 / (2 * x.beta)) ** 2
        case "simpo":
            terms = smooth(x.beta * margin - x.simpo_gamma, x.label_smoothing)
    return terms.mean() + x.cpo_alpha * nll, {"nll_loss": nll.item()} | metrics(x.beta * rewards, logps)


def orpo_loss(x: SimpleNamespace) -> tuple[Tensor, dict[str, float]]:
    """Section 1.4: NLL, the mean over all prompt and answer tokens of the chosen side, - beta x log sigma(log odds)."""
    chosen = torch.cat([sequence.logps for sequence in x.policy[:PAIRS]])
    logps = answer_sums(x.policy, x.n) / x.n.view(2, PAIRS)
    odds = logps - torch.log(-torch.expm1(logps))
    log_odds = odds[0] - odds[1]
    ratio = logsig(log_odds).mean()
    found = {"nll_loss": -chosen.mean(), "log_odds_ratio": ratio, "log_odds_chosen": log_odds.mean()}
    found = {name: value.item() for name, value in found.items()}
    return -chosen.mean() - x.beta * ratio, found | metrics(x.beta * logps, logps)


# ---------------------------------------------------------------------------------------------------------------------
# Together


def gaps(trl: dict[str, float], formula: dict[str, float]) -> dict[str, float]:
    """|difference| / max(1, |value|) of each metric."""
    return {name: abs(trl[name] - formula[name]) / max(1.0, abs(formula[name])) for name in trl}


def gap(trl: dict[str, float], formula: dict[str, float]) -> float:
    """The largest of them, to two digits."""
    return float(f"{max(gaps(trl, formula).values()):.1e}")


def examine(name: str, variant: Variant, data: Data, plain: Plain) -> dict[str, Any]:
    """Run TRL and the formula, compare, and describe; stops where TRL's numbers have no explanation."""
    print(f"\n{name}: {variant.settings}", flush=True)
    trl, log_ratios = run_trl(variant, data)
    formula = plain.run(variant, variant.settings)
    agrees = gap(trl, formula) <= TOLERANCE
    entry: dict[str, Any] = {"trainer": variant.trainer, "settings": variant.settings, "policy": variant.policy}
    if variant.trainer == "dpo":
        entry["reference"] = variant.reference
    entry |= {"metrics": trl, "agrees": agrees, "gap": gap(trl, formula)}
    if extra := {key: value for key, value in formula.items() if key not in METRICS}:
        entry["formula_only"] = extra
    reading = formula
    if not agrees:
        entry["differ"] = [key for key, value in gaps(trl, formula).items() if value > TOLERANCE]
        entry |= {"specification": {key: formula[key] for key in trl}, "equals": variant.equals, "why": variant.why}
        if variant.equals:
            reading = plain.run(variant, variant.settings | variant.equals)
            entry["gap_from_equals"] = gap(trl, reading)
        if gap(trl, reading) > TOLERANCE:
            reading = plain.run(variant, variant.settings | variant.equals, log_ratios)
            entry["gap_from_log_ratios"] = gap(trl, reading)
            entry["why"] = f"{variant.why} {WHY_ROUNDING}".strip()

    for metric, value in trl.items():
        print(f"    {metric:20} TRL {value:18.10g}  - formula {value - formula[metric]:10.2e}", end="")
        print("" if agrees else f"  - formula as explained {value - reading[metric]:10.2e}")
    assert gap(trl, reading) <= TOLERANCE, f"{name}: no explanation"
    assert agrees == ("why" not in entry), f"{name}: a reason if and only if TRL differs"
    return entry


def differ(entry: dict[str, Any]) -> str:
    """Which numbers of an entry differ, and in a word why."""
    names = ", ".join(name for name in entry["differ"] if "/" not in name) or "rewards only"
    return f"{names}; equals {entry['equals']}" if entry["equals"] else f"{names}; rounding"


def table(entries: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield f"{'':26}{'TRL loss':>18}{'formula':>18}{'TRL |grad|':>16}{'formula':>16}{'gap':>10}  agrees"
    for name, entry in entries.items():
        trl, formula = entry["metrics"], entry.get("specification")
        numbers = [(trl[key], formula[key] if formula else None) for key in ("loss", "grad_norm")]
        cells = "".join(
            f"{ours:>{width}.8g}{'same' if theirs is None else f'{theirs:.8g}':>{width}}"
            for (ours, theirs), width in zip(numbers, (18, 16))
        )
        yield f"{name:26}{cells}{entry['gap']:10.1e}  {'yes' if entry['agrees'] else 'NO: ' + differ(entry)}"


def describe(data: Data, numbers: list[int]) -> dict[str, Any]:
    """The fixture but for the variants."""
    file = first_step.DATA
    digests = {name: weights_digest(make_model(name, data)) for name in MODELS}
    return {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("trl", "transformers", "torch", "datasets", "accelerate", "numpy")},
        "data": {
            "file": f"shared/{file}",
            "sha256": hashlib.sha256((SHARED / file).read_bytes()).hexdigest(),
            "tokenizer": f"shared/{first_step.TOKENIZER}",
            "bos_token_id": data.tokenizer.bos_token_id,
            "eos_token_id": data.tokenizer.eos_token_id,
            "max_tokens": first_step.MAX_TOKENS,
            "chosen_tokens": sum(len(chosen) for _, chosen, _ in data.tokens),
            "rejected_tokens": sum(len(rejected) for _, _, rejected in data.tokens),
        },
        "rows": numbers,
        "tolerance": TOLERANCE,
        "models": {name: recipe | {"weights_sha256": digests[name]} for name, recipe in MODELS.items()},
    }


def write(head: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    """Write the fixture, with the variants of the file that is there if it is about the same."""
    path = HERE / "trl_objectives.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"variants": {}}
    variants = old.pop("variants")
    if old == head:
        entries = variants | entries
    text = json.dumps(head | {"variants": {name: entries[name] for name in VARIANTS if name in entries}}, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # lists on one line
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / first_step.TOKENIZER)
    assert tokenizer.bos_token_id is None
    numbers, rows, tokens = first_step.load_rows(tokenizer)
    data = Data(tokenizer, rows, tokens)
    head, plain, entries = describe(data, numbers), Plain(data), {}
    for name in sys.argv[1:] or VARIANTS:
        entries[name] = examine(name, VARIANTS[name], data, plain)
        write(head, entries)
    print("", *table(entries), sep="\n")


if __name__ == "__main__":
    main()

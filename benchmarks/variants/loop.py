"""A plain DPO loop over transformers' models, as good as it can be without new kernels: logits of scored positions only.

`padded` and `dense_mask` are this loop with two layouts of a batch. It keeps the comparison honest: on the CPU, TRL scores
padding and prompts too, and a ratio against TRL alone would flatter dspref.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.measure import Measurement
from benchmarks.workload import Spec, Tokens, steps_of


@dataclass(frozen=True)
class Batch:
    """A step's sequences, all chosen before all rejected, as a model takes them."""

    inputs: dict[str, Any]
    predictors: Tensor
    """Of each scored token: the position in the flattened batch from which it is predicted."""
    targets: Tensor
    """The scored tokens."""
    owners: Tensor
    """The sequence that each belongs to."""
    sequences: int


Collate = Callable[[list[tuple[list[int], list[int]]], str], Batch]


def sequences_of(pairs: Sequence[Tokens]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of all chosen, then of all rejected."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-prob of each sequence's answer, [sequences]."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(hidden[batch.predictors]).float()
    scores = -F.cross_entropy(logits, batch.targets, reduction="none")
    return torch.zeros(batch.sequences, device=scores.device).index_add(0, batch.owners, scores)


def dpo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def run(spec: Spec, collate: Collate) -> Measurement:
    """Train on the spec's pairs, with a live reference or with its log-probs computed beforehand."""
    if spec.objective["name"] != "dpo" or spec.objective.get("loss_type", "sigmoid") != "sigmoid":
        raise SystemExit(f"the plain loop knows DPO's sigmoid loss only, not {spec.objective}")
    steps = steps_of(spec, AutoTokenizer.from_pretrained(spec.model))
    policy = AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.dtype, attn_implementation="sdpa").to(spec.device)
    reference = copy.deepcopy(policy).requires_grad_(False) if spec.reference == "live" else policy
    score = torch.no_grad(logps)
    stored = [score(reference, collate(sequences_of(pairs), spec.device)) for pairs in steps if spec.reference == "stored"]
    if spec.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()  # the models have no dropout
    optimizer = torch.optim.AdamW(policy.parameters(), lr=spec.learning_rate, weight_decay=0.0, fused=True)

    found = Measurement()
    for step, pairs in enumerate(steps):
        found.start()
        batch = collate(sequences_of(pairs), spec.device)
        expected = stored[step] if stored else score(reference, batch)
        loss = dpo(logps(policy, batch), expected, spec.objective["beta"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.item())
        found.stop()
        found.useful_tokens.append(sum(pair.useful for pair in pairs))
    return found

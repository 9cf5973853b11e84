"""Which charts there are: their keys in metrics.jsonl, and what their curves mean, in two lines each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dspref.run.curves import EVALUATION

# Parts of a step's time.
PHASES = ("data", "forward", "reference", "backward", "update")


class Spec(NamedTuple):
    """A chart: its keys with their names in it, and what it tells. `held_out`: whether the same keys of evaluations are
    drawn too; `log`: whether its axis may be logarithmic."""

    id: str
    title: str
    keys: Mapping[str, str]
    meaning: str
    held_out: bool = False
    log: bool = False


def _sides(name: str) -> dict[str, str]:
    return {f"{name}/chosen": "chosen", f"{name}/rejected": "rejected"}


LEARNING = (
    Spec(
        "loss", "Loss", {"loss": "training"},
        "Falls. Held-out loss that rises again while training loss falls is over-optimisation: stop there.", True,
    ),
    Spec(
        "accuracy", "Accuracy", {"rewards/accuracies": "training"},
        "Share of pairs whose chosen answer has the higher reward; of lists, of any two answers with different scores; of "
        "single answers, share of those on their side of the reference point. 0 before the first update, where all tie. 0.5 "
        "is chance; 1.0 in training alone: learnt by heart.",
        True,
    ),
    Spec(
        "margin", "Reward margin", {"rewards/margins": "training"},
        "Reward of the chosen answer less that of the rejected one; of single answers and lists, of the means of both. "
        "Grows, and levels off.", True,
    ),
    Spec(
        "nll", "NLL of chosen answers", {"nll_loss": "training"},
        "Per token; of TPO, of its gold answers. If it rises by much, the model forgets how to write what is chosen.", True,
    ),
)  # fmt: skip
LIKELIHOOD = (
    Spec(
        "rewards", "Rewards", _sides("rewards"),
        "Their distance is the margin. Both below zero and falling: likelihood displacement, chosen answers are left too.",
    ),
    Spec(
        "logps", "Log-probs", _sides("logps"),
        "Of whole answers, or per token where the objective has it so. The chosen line should hold as the other falls.",
    ),
    Spec(
        "kl", "KL estimate", {**_sides("kl"), "kl": "KTO's reference point"},
        "Log-ratio to the reference on the data's own answers; KTO's point is that of answers to other prompts, or 0. Far "
        "from zero and still on its way: collapse is near.",
    ),
    Spec(
        "held-out-logps", "Log-probs, held out", {f"{EVALUATION}{key}": side for key, side in _sides("logps").items()},
        "The same on held-out pairs.",
    ),
    Spec("logits", "Mean logits", _sides("logits"), "Of the scored tokens. A drift of both is normal, a jump is not."),
    Spec("entropy", "Entropy", {"entropy": "entropy"}, "Of the policy's next token. Towards zero: collapse."),
    Spec(
        "token-accuracy", "Token accuracy", {"mean_token_accuracy": "mean"},
        "Share of scored tokens that are the policy's first choice.", True,
    ),
    Spec(
        "lengths", "Lengths of answers", _sides("lengths"),
        "Mean scored tokens of the data of a step. Chosen always longer: a length bias, which the policy learns.",
    ),
)  # fmt: skip
OPTIMISER = (
    Spec(
        "grad-norm", "Gradient norm", {"grad_norm": "norm"},
        "Before clipping. Spikes are single batches; a steady rise is a learning rate that is too high.", log=True,
    ),
    Spec("learning-rate", "Learning rate", {"learning_rate": "rate"}, "Warm-up, then the schedule.", log=True),
)  # fmt: skip
SPEED = (
    Spec(
        "tokens-per-second", "Tokens per second", {"perf/tokens_per_second": "all ranks"},
        "Real tokens of prompts and answers, between a step's beginning and its end.",
    ),
    Spec("seconds", "Seconds a step", {"perf/seconds": "step"}, "Evaluations and checkpoints are not in it.", log=True),
    Spec(
        "memory", "Peak memory", {"perf/memory_gib": "GiB"},
        "GiB of one rank, the most so far. A rise late in a run is a longer pack, or a leak.",
    ),
    Spec("fill", "Pack fill", {"perf/pack_fill": "fill"}, "Share of data.tokens_per_pack that is used."),
    Spec(
        "mfu", "MFU and HFU", {"perf/mfu": "MFU", "perf/hfu": "HFU"},
        "Share of the devices' peak: of the model's own operations, and of all that were executed.",
    ),
)  # fmt: skip
# Section -> its charts.
SECTIONS = {"Learning": LEARNING, "Likelihood": LIKELIHOOD, "Optimiser": OPTIMISER, "Speed and memory": SPEED}
# Keys with a chart here, or that are none of their own; and those of the chart of phases.
KNOWN = {key for section in SECTIONS.values() for spec in section for key in spec.keys} | {"step", "epoch"}
TIMES = {f"perf/{phase}_seconds" for phase in PHASES}

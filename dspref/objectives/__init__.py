"""What is trained for: losses as pure functions of log-probabilities, unreduced. Loads no torch until one is used.

`losses` (of policy and reference), `rewards` (of scores too), `likelihoods` (of the policy alone), `unpaired` (of single
answers), `lists` (of ranked ones) and `gold` (of a pair and a third answer) have one function per loss, each with its paper
and equation. `families` (DPO, CPO) turn what a model says (`terms`) into what the losses are functions of, and weigh the
pairs (`weights`). `table` names every objective, says which keys (`key`) it reads and what it needs (a reference, scores, a
whole step at once), and an `objective` is made of it. `own` makes a row of a function of the user's, which `trial` tries.

Enters: nothing.
Shows: families, losses, own, trial.
"""

from dspref.objectives.families import component
from dspref.objectives.objective import (
    Objective,
    RunningMean,
    build_objective,
    needs_reference,
    needs_scores,
    own_sources,
)
from dspref.objectives.table import KEYS, OBJECTIVES, Family, as_list, defaults, describe, keys_of, known_keys, resolved

__all__ = [
    "KEYS", "OBJECTIVES", "Family", "Objective", "RunningMean", "as_list", "build_objective",
    "component",
    "defaults", "describe", "keys_of", "known_keys", "needs_reference", "needs_scores", "own_sources", "resolved",
]  # fmt: skip

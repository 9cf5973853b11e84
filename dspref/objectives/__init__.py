"""What is trained for: losses of pairs as pure functions of log-probabilities, unreduced. Loads no torch until one is used.

`losses` (of policy and reference) and `likelihoods` (of the policy alone) have one function per loss, each with its paper
and equation. `families` (DPO, CPO) turn what a model says of pairs into what the losses are functions of. `table` names
every objective, says which keys it reads, what it needs (a reference, all pairs of a step at once) and builds it.

Enters: nothing.
Shows: families, losses.
"""

from dspref.objectives.table import (
    KEYS,
    KTO,
    OBJECTIVES,
    Family,
    Objective,
    RunningMean,
    as_list,
    build_objective,
    defaults,
    describe,
    keys_of,
    needs_reference,
    resolved,
)  # fmt: skip

__all__ = [
    "KEYS", "KTO", "OBJECTIVES", "Family", "Objective", "RunningMean", "as_list", "build_objective",
    "defaults", "describe", "keys_of", "needs_reference", "resolved",
]  # fmt: skip

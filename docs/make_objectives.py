"""Writes objectives.md beside this file, from the table of losses; a test holds it current.

python docs/make_objectives.py
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspref.objectives import KEYS, OBJECTIVES, Family, families, keys_of, likelihoods, losses
from dspref.objectives.families import Loss

INTRODUCTION = """\
# Objectives

<!-- Written by docs/make_objectives.py from dspref/objectives/. Edit those, and run it again. -->

The keys of the YAML's `objective` section. w is the chosen answer, l the rejected one; S is the sum of an answer's log-probs
under the policy, R under the reference, n its scored tokens, A = S / n; log u = S - R; sigma is the logistic function.

**Normaliser.** *sum*: the loss sees sums of log-probs, and is averaged over the pairs of the step. *mean*: it sees means per
token, and is averaged over the pairs of the step. *tokens*: it is a mean over tokens of the step. The step is the global
batch, on however many ranks and packs.

**Whole step.** Some losses are functions of the whole step, not sums over its pairs. They take a first pass over the step's
packs without gradient, one forward more, and so give the same values on every layout. One pack on one rank needs none.

**Single answers.** kto and bco train on answers that stand alone, each with a label ([rows](rows.md)); s is 1 for a
desirable one and -1 for another. Their loss is averaged over the answers of the step, and `train.pairs_per_step` counts
rows: a row that is a pair counts once, as a desirable and an undesirable answer. z, which is logged as `kl`, is
estimated from the step's answers, each once, behind the prompt of another row of the step: of the one behind it, and
where prompts come more than once, behind another prompt, unless one has more than half of the step (or the last step of
an epoch has a row alone). That is a forward pass without gradient. A stored reference scores these answers for all
steps of the run before the first; where a run may end early (`train.stop_when`), `reference.mode: engine` asks for
those of the steps that come. `*/chosen` are means over the desirable answers of a step and `*/rejected` over the
undesirable ones, absent where it has none; `rewards/margins` is the difference of the two means; `rewards/accuracies`
is the share of answers whose reward lies beyond the reference point (beta z, or `bco_delta`) on the side of their
label.

**Lists and gold answers.** listwise trains on all scored answers of a row as one list (`completions` and `scores`, `ranks`,
or a pair, which is a list of two), tpo on a pair and a third answer, better than both (`reference`). All that a row gives
is in one step, `train.pairs_per_step` counts rows, and where a prompt is cut it is cut alike for all of them. The loss of a
list is averaged over the lists of the step, and each answer is computed once; a list that no pack has room for
(`data.tokens_per_pack`) lies in several, for one more forward pass and the same values. In metrics the best answers of a
list are the chosen ones and all others the rejected ones; `rewards/accuracies` is the share of pairs of a better and a
worse answer that the model has in order, and `rewards/margins` the difference of the two means. Gold answers are in
`nll_loss` alone.

**Rewards** (`rewards/*`): dpo, kto, bco and listwise beta (S - R), under every loss and divergence; cpo and tpo beta S, or
beta A for losses per token; simpo and orpo beta A; A alone where a loss has no beta. With `ld_alpha`, S and R (and
`logps/*`, `kl/*`) count by it; with `alpha`, (1 - e^(-alpha A)) / alpha stands for A. Metrics have TRL's names; each loss
is logged as `loss/<loss_type>`, an NLL term also as `nll_loss`. `entropy` (mean over the scored tokens of both answers,
nats), `mean_token_accuracy` (chosen answers' tokens than which none was more likely) and `num_tokens` (of all steps so far,
each answer with its prompt) are TRL's too. Of a mixture, loss, accuracy and margin of each source are `source/<name>/...`,
where the step has pairs of it.

**Weights, margins and scores of rows.** A column named as `columns.weight` multiplies the values of preference terms, pair
by pair; the mean is still one over all pairs of the step, so that what a pair adds does not depend on the others. NLL terms,
means over tokens, are not weighed. `pair_weights: score_gap` makes the weights of the scores of both answers, as the loss
`scale` of NeMo-Aligner does. `columns.margin` is a target margin m, in rewards, of `sigmoid` and `sigmoid_norm` in dpo,
`sigmoid` in cpo and `simpo`, where it is added to gamma. Logged as `pair_weight` and `target_margin`, means over pairs.
Held-out pairs are weighed where their own source says so.

**Where TRL 1.16 is not followed.** It ignores `label_smoothing` in `sigmoid`; its BCO has no delta; its WPO weight is not
clamped at 1; its `f_alpha_divergence_coef` is 1 - alpha; its NLL and AOT see a micro-batch, not the step; its length
denominators count a first token that cannot be scored; SimPO's beta defaults to CPO's 0.1. `loss_type: alphapo` is written
`name: simpo` with `alpha`. `ld_alpha` applies to policy and reference, as in TRL 1.16, not to the policy alone.

**What goes together.** Every modifier of a family goes with every loss of it, except:
"""
OWN = """
## Your own loss

No fork and no list to edit: write a function, and name it as `module:function`.

```python
# my_losses.py
from dspref.objectives.losses import NonNegative, Positive, Ratios, logsigmoid


def with_target(ratios: Ratios, *, beta: Positive = 0.1, target: NonNegative = 0.5):
    return -logsigmoid(beta * ratios.margin - target)
```

```yaml
objective: {name: dpo, loss_type: my_losses:with_target, beta: 0.2, target: 0.3, rpo_alpha: 0.5}
```

- **What it sees.** In dpo `Ratios`, of P pairs: `chosen` and `rejected` (log u, or f'(u)), `margin`,
  `margin_per_token`, `chosen_tokens`, `rejected_tokens`, `reference_margin`, and `target`, the numbers of
  `columns.margin`, or 0.0 where none is named; its `delta` is 0. In cpo and simpo two
  tensors, `chosen` and `rejected`: S in cpo, A in simpo. It returns a tensor [P], the loss of each pair; the mean
  over the pairs of the step is trained.
- **A sum over pairs.** The value of a pair must not depend on the pairs beside it: those are whoever shares its pack.
  What sorts or ranks the pairs of a step, as `aot` does, says so: `with_target.couples = True` behind the function. It
  is then given all pairs of the step at once, whatever their packs and ranks, for one more forward pass.
- **Its keys** are its keyword-only arguments, each with a default and a type: float, int, bool, str, `Literal[...]`,
  or a range of `dspref.objectives.losses` (`Positive`, `NonNegative`, `Smoothing`, `OpenShare`, ...). They are
  checked as all keys are. `beta`, where it has one, scales the logged rewards too.
- **What goes with it**: every key of the family, evaluation, resume, and in dpo a list with other losses and
  `loss_weights`. With `f_divergence_type` it sees f'(u) in the place of log u. It is logged as `loss/with_target`.
- **Where it is found**: in the working directory, which goes before installed packages of the same name and is on the
  path for that import alone; then among installed packages. Where the YAML names none, nothing is imported.
- **Before the run** it is tried out at three made-up pairs, with these keys. What raises, has another shape, no
  gradient, or a value or gradient that is not finite (at log-ratios of 0 too, where every run begins) is one line
  with file and line of your function, exit code 2. So is what it raises in a step; the run's checkpoints are whole.
- **The run keeps** the file of the function in `RUN/losses/`, and its sha256. A run does not go on with another.
  What lies in a run folder is not run: commands on the run find the module as the run did, or say where its copy is.
  Files that it imports are not looked at.
"""
MODIFIERS = (losses.divergence, families.desensitized, families.own_probability, likelihoods.power_reward)


def document() -> str:
    parts = [INTRODUCTION, exceptions()]
    for name, family in OBJECTIVES.items():
        parts += [f"\n## `name: {name}`\n\n", section(family)]
    return "".join(parts) + "\n## Modifiers\n\n" + "\n\n".join(map(prose, MODIFIERS)) + "\n" + OWN


def exceptions() -> str:
    """One line per key that not every loss can take."""
    lines = []
    for key, about in KEYS.items():
        unfit = {
            f"`{loss_type}`": None  # in order, and each once, though two families have it
            for family in OBJECTIVES.values()
            if key in keys_of(family.assemble)
            for loss_type, loss in family.losses.items()
            if not about.suits(loss)
        }
        if unfit:
            lines.append(f"- `{key}` not with {', '.join(unfit)}: it {about.unsuited}.\n")
    lines.append(
        "- `columns.weight` and `pair_weights` not with what sorts its values, nor with `sft` alone.\n"
        "- with `sft` alone no preference modifier has an effect, and beside `rpo_alpha` it would count twice: refused.\n"
    )
    return "\n" + "".join(lines)


def section(family: Family) -> str:
    """The family's own words and keys, then its losses."""
    free = ", unless `reference_free`" * ("reference_free" in keys_of(family.assemble))
    reference = f"yes{free}" if family.needs_reference else "no"
    several = "; `loss_type` may be a list, added up with `loss_weights` (1 each by default)" if family.mixes else ""
    text = f"{prose(family.assemble)}\n\nReference needed: {reference}{several}.\n"
    if keys := keys_of(family.assemble):
        text += "\n" + table(("key", "default", "values", "meaning"), [key_row(key, p) for key, p in keys.items()])
    aliases = {}
    for loss_type, loss in family.losses.items():
        aliases.setdefault(loss, []).append(loss_type)
    return text + "".join(entry(names, loss) for loss, names in aliases.items())


def entry(names: list[str], loss: Loss) -> str:
    """One loss: its names, source, formula and facts."""
    *text, formula = prose(loss.function).split("\n\n")
    title = "\n\n".join(text)
    facts = [f"normaliser: {loss.normaliser}"]
    facts += [f"`{key}` {written(p.default)} ({values(p.annotation)})" for key, p in keys_of(loss.function).items()]
    facts += ["whole step"] if loss.couples else []
    heading = ", ".join(f"`{name}`" for name in names)
    return f"\n### {heading}\n\n{title}\n\n    {formula.replace(chr(10), chr(10) + '    ')}\n\n{'; '.join(facts)}.\n"


def prose(function: Callable) -> str:
    return inspect.cleandoc(function.__doc__ or "")


def key_row(key: str, parameter: inspect.Parameter) -> tuple[str, ...]:
    return f"`{key}`", written(parameter.default), values(parameter.annotation), KEYS[key].meaning


def written(default: Any) -> str:
    """A default as YAML has it."""
    return f"{default:g}" if isinstance(default, float) else json.dumps(default).strip('"')


def values(annotation: str) -> str:
    """The range of a key in words, from the type that its annotation names."""
    kind = vars(losses).get(annotation)
    if annotation == "bool":
        return "true or false"
    if kind is None:
        return "any number"
    if not hasattr(kind, "__metadata__"):
        return ", ".join(kind.__args__)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return ", ".join(f"{signs[bound]} {limit:g}" for bound, limit in kind.__metadata__[0].items())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(__file__).with_name("objectives.md").write_text(document(), encoding="utf-8")

"""Writes the tables of DeepSpeed's keys into deepspeed.md beside this file; a test holds them current.

python docs/make_ds_keys.py
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from dspref.config import ds_keys, strategy
from dspref.config.ds_keys import KEYS, REFUSED, ZERO, Key

PAGE = Path(__file__).with_name("deepspeed.md")
BEGIN, END = "<!-- keys: ", "<!-- end of keys -->"

INTRODUCTION = """
`deepspeed:` takes the keys of these tables; the others of DeepSpeed 0.19.8 are refused in one line, with the reason. A key
that DeepSpeed would ignore at the stage of the run is refused there, unless its value is what DeepSpeed would take anyway.
**Exact**: a run ends with the weights that it has without the key, to 1e-6 in fp32 after three or four steps, and has its
losses and gradient norms. The tests stand in `tests/distributed/test_deepspeed_keys.py` (of `expert_parallel`:
`test_expert_parallel.py`) and train a small model over two CPU ranks at each stage that is named (`zero_hpz_partition_size`
over four). What a key is for is DeepSpeed's word and arithmetic; none of it was measured here. Keys that begin with
`stage3_` are told at another stage and not refused, so that the stage alone can be changed.

**Unproven** keys run on GPUs only, and no test has trained with them. `unproven: true` beside `zero_optimization` lets them
through; the run begins with a line that says so.

    deepspeed: {unproven: true, zero_optimization: {stage: 3, zero_quantized_weights: true}}
"""
ORDER = (ZERO, ds_keys.OPTIMIZER, ds_keys.PARAM, ds_keys.EXPERTS, "", "flops_profiler")


def section() -> str:
    """What stands between the marks."""
    lines = [INTRODUCTION]
    for name, keys in groupby(sorted(KEYS, key=lambda key: ORDER.index(_section_of(key))), _section_of):
        lines += [
            f"**`{name}`**\n" if name else "**Beside `zero_optimization`**\n",
            "| key | default | stages | for | exact | test |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_row(key))} |" for key in keys] + [""]
    lines += ["**Refused**\n", "| key | why |", "|---|---|"]
    lines += [f"| `{_short(path)}: nvme` | {reason} |" for path, reason in ds_keys.ON_DISK.items()]
    for reason, paths in groupby(REFUSED, REFUSED.__getitem__):
        lines.append(f"| {', '.join(f'`{_short(path)}`' for path in paths)} | {reason} |")
    owned = [f"`{key}` ({owner})" for key, owner in strategy.OWNED.items()]
    lines += ["", f"What another section of the YAML owns is refused too: {', '.join(owned)}.", ""]
    return "\n".join(lines)


def _short(path: str) -> str:
    return path.removeprefix(f"{ZERO}.")


def _section_of(key: Key) -> str:
    return key.path.rpartition(".")[0]


def _row(key: Key) -> list[str]:
    default = (
        "by the stage" if key.takes == "true or false" else json.dumps(key.default) if key.default is not None else "none"
    )
    if key.default == sys.maxsize:
        default = "no limit"
    stages = " ".join(key.stages) + (", not in bf16 at 1" if key.path in ds_keys.UNREAD_IN_BF16 else "")
    purpose = f"{key.gain}; {_needs(key)}" if key.needs else key.gain
    exact = "no" if not key.exact else "yes" if key.test else "unseen"
    test = f"`{key.test.split('::')[1]}`" if key.test else "**unproven**"
    return [f"`{key.path.rpartition('.')[2]}`", default.strip('"'), stages, purpose, exact, test]


def _needs(key: Key) -> str:
    assert key.needs is not None
    path, value = key.needs
    said = json.dumps(value) if isinstance(value, bool) else value.replace(" ", " or ")
    if key.path.endswith(".ratio"):
        said = "cpu` and `train.optim: cpu_adam"
    unless = ", but for bf16 at 1 and stage 0" if key.needs == ds_keys.WHOLE_REDUCTION else ""
    return f"needs `{_short(path)}: {said}`{unless}"


def document() -> str:
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    mark, _, rest = rest.partition("\n")
    return f"{before}{begin}{mark}\n{section()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")

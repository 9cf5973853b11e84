"""The YAML file of a run, as one strict and frozen `Config`. Loads no torch.

`load` reads a file in YAML 1.2 (`yaml12`; `16k`: `numbers`) with those it names (`include`), applies overrides and checks
everything. `sections` says what keys there are and which values they take (`section`: what all of them are;
`data_section`, `objective_section`, `reference_section`, `train_section`: the largest), `checks` (`objective_checks`,
`given_checks`, `expert_checks`, `outcome_checks`) what excludes what, `strategy` what a DeepSpeed JSON may say (`ds_keys`:
which keys, and why not others), `watched` which metrics are better when lower, `paths` where things are. What is wrong is
told at once, with file, line and the fix (`explain`, `hints`, `sound`). Keys of other trainers are in tables: `foreign`
(those that have a place here), `absent` (those that have none, and why), `foreign_values` (their values), `within` (names
that mean something in one section).

Enters: data, objectives.
Shows: absent, explain, foreign, foreign_values, hints, load, numbers, outcome_checks, sections, sound, strategy,
watched, yaml12.
"""

from dspref.config.data_section import DataSection, SourceSection
from dspref.config.load import (
    as_yaml,
    cache_folder,
    dump,
    examine,
    given,
    load,
    read,
    repeated,
    resolved,
    resolved_anew,
    schema,
    source,
)
from dspref.config.paths import expand, shipped
from dspref.config.reference_section import BemaSection, ReferenceSection
from dspref.config.sections import (
    CheckpointSection,
    Config,
    LogSection,
    LoraSection,
    ModelSection,
    Tracker,
    TrainSection,
)  # fmt: skip
from dspref.config.watched import lower_is_better

__all__ = [
    "BemaSection", "CheckpointSection", "Config", "DataSection", "LogSection", "LoraSection", "ModelSection",
    "ReferenceSection", "SourceSection", "Tracker", "TrainSection",
    "as_yaml", "cache_folder", "dump", "examine", "expand", "given", "load", "lower_is_better", "read", "repeated",
    "resolved", "resolved_anew", "schema", "shipped", "source",
]  # fmt: skip

"""DeepSpeed, and the only room that imports it.

`engine` brings DeepSpeed up around one wrapper module, and takes optimizer steps of several backwards; `ds_config` is what
DeepSpeed is told, `optimizer` what it is given, `accelerator` where it is imported. `memory` asks for weights that lie on
several ranks. `shards` is what DeepSpeed writes in a checkpoint and how it gets back, `plain` what a file of it may hold.
`finite` looks for weights that are no numbers, `misfits` for settings that these ranks cannot have. `sequence` is how ranks
that hold packs between them speak, `experts` what DeepSpeed makes of experts that they share.
`builds` (no torch) is where DeepSpeed's operators are compiled.

Enters: config, data, distributed, model, ranks.
Shows: builds, ds_config, engine, finite, memory, misfits, sequence, shards.
"""

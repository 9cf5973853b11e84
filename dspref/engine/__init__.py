"""DeepSpeed, and the only room that imports it.

`engine` completes a DeepSpeed config, brings the engine up around one wrapper module, and takes optimizer steps of several
backwards. `shards` reads what DeepSpeed writes in a checkpoint as data. `finite` looks for weights that are no numbers.
`builds` (no torch) is where DeepSpeed's operators are compiled.

Enters: config, data, distributed, model.
Shows: builds, engine, finite, shards.
"""

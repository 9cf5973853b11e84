"""What a run leaves behind: the run folder.

`folder` opens it as new or to go on; `record` is run.json, `manifest` says what is a checkpoint, `status` tells of a run by
its files alone (these load no torch). `saving` writes checkpoints behind the training, where all ranks come together in
`meeting`; `checkpoint` finds and reads them; `export` writes the model that people use.

Enters: config, distributed, engine, model, objectives, reference, watch.
Shows: checkpoint, export, folder, manifest, record, saving, status.
"""

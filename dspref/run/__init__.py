"""What a run leaves behind: the run folder.

`folder` opens it as new or to go on, and `settings` says which may have changed by then. `record` is run.json, `manifest`
says what is a checkpoint, `status` tells of a run by its files alone (these load no torch). `saving` writes checkpoints
beside the steps, where threads of all ranks come together in `meeting`; `checkpoint` finds and reads them; `export` writes
the model that people use.

Enters: config, distributed, engine, model, objectives, watch.
Shows: checkpoint, export, folder, manifest, record, saving, settings, status.
"""

"""What a run leaves behind: the run folder.

`folder` opens it as new or to go on, and `settings` says which may have changed by then. `record` is run.json, `manifest`
says what is a checkpoint, `curves` reads metrics.jsonl, `finding` knows which folders hold runs, `status` tells of a run by
its files alone, and `history` all that a report shows (these load no torch). `saving` writes checkpoints beside the steps,
where threads of all ranks come together in `meeting`; `checkpoint` finds and reads them; `best` judges evaluations,
`samples` keeps what the model answers on the way, `export` writes the model that people use, and `publish` (no torch)
uploads it to the hub.

Enters: config, distributed, engine, model, objectives, watch.
Shows: best, checkpoint, curves, export, finding, folder, history, manifest, publish, record, samples, saving, settings,
status.
"""

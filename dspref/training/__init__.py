"""A run from its config to its summary: here the other rooms meet, and sections of the config are handed out.

`trainer` reads aloud: `stages` opens what a run needs, one after another (`preparation` reads data and model config,
`demand` plans its steps), and `closing` exports the model and says how it went (`outcome`, `model_card`). Its steps work
with a `session`: `gradient` computes a step's, `numbers` guards it, `records` writes of it, `evaluate` scores held-out
pairs, `answers` has prompts answered, `rehearsal` tries the largest pack. `publishing` uploads a run's model. Beside `train`
there are `scorer` (fills a reference store), `held_out` (evaluates any model; `named`: which one), `survey` (looks at data),
`inspection` (at single pairs, and packs), `foresight` (at packs, for a plan) and `exporting` (writes a run's model, or by
`consolidate` a checkpoint's).

Enters: config, data, distributed, engine, machine, model, objectives, ranks, reference, report, run, watch.
Shows: exporting, held_out, inspection, named, publishing, scorer, stages, survey, trainer.
"""

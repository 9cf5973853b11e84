"""What a run tells people: numbers, speed, advice, and what stands on the terminal.

`metrics` reduces the numbers of a step over ranks and writes metrics.jsonl; `trackers` passes them on to wandb and
TensorBoard. `performance` measures time, tokens and operations; `advice` reads from these which setting would help.
`console` has the banner, the progress and the summary; `closeup` draws pairs and packs, `census` the data in numbers,
`plan_table` what a run will need.

Enters: config, data, distributed, engine, machine, model, objectives, reference, run.
Shows: advice, census, closeup, console, metrics, performance, plan_table.
"""

"""What a run tells people: numbers, speed, advice, what stands on the terminal, and reports of what is done.

`metrics` reduces the numbers of a step over ranks and writes metrics.jsonl; `trackers` passes them on to those
that `tracking` opens. `performance` measures time, tokens and operations, `profiling` records some steps of them;
`advice` reads from these which setting would help. `console` has the banner, the progress and the summary; `closeup` draws
pairs and packs, `census` the data in numbers, `plan_table` what a run will need, `evaluations` what held-out pairs say. For
`dspref report`, without torch, `charts` takes from run folders what is drawn (`specs`: of which keys), `page` makes one HTML
file of it with what is in assets/ and `thumbnails` of images, `plots` a picture, `tables` Markdown and CSV; `written`
chooses among them.

Enters: config, data, distributed, engine, machine, model, objectives, reference, run.
Shows: advice, census, closeup, console, evaluations, metrics, performance, plan_table, profiling, written.
"""

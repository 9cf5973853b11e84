"""What a machine has, checked before step 1. Loads no torch.

`machine` has the checks of packages, GPUs, kernels and compilers, `preflight` those of room, folders and network, and the
table of all; a run asks for some, `doctor` for all. `context` is what they look at, `places` knows files and folders.
`footprint` estimates what will be written. `run_plan` says what a run needs before it is started: `memory_plan` its memory
as arithmetic on numbers, `layers` of it a pack's, `shapes` the numbers of a model (`built`: of one with several stacks of
layers), `fitting` what fits and what to change, `flops` its operations, `gpus` the cards. `inputs` looks at what a config
names on this machine, `agreement` compares the ranks with one another.

Enters: config, data, engine, model, run.
Shows: agreement, built, context, doctor, fitting, flops, footprint, gpus, inputs, layers, machine, memory_plan, preflight,
run_plan, shapes.
"""

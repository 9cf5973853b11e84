"""What a machine has, checked before step 1. Loads no torch.

`machine` has the checks, one function each: versions, compilers, GPUs, kernels, network, disk. `preflight` runs those that a
run needs, `doctor` all of them for a person. `footprint` estimates what will be written, `inputs` looks at what a config
names on this machine, `agreement` compares the ranks with one another.

Enters: config, data, engine, model, run.
Shows: agreement, doctor, footprint, inputs, machine, preflight.
"""

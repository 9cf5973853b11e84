"""What a machine has, checked before step 1. Loads no torch.

`machine` has the checks, one function each: versions, compilers, GPUs, kernels, network, disk. `preflight` runs those that a
run needs, `doctor` all of them for a person. `context` is what they look at, `places` knows files and folders. `footprint`
estimates what will be written, `inputs` looks at what a config names on this machine, `agreement` compares the ranks with
one another.

Enters: config, data, engine, model, run.
Shows: agreement, context, doctor, footprint, inputs, machine, preflight.
"""

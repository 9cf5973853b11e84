"""One module per way to train: each runs a `Spec` in a process of its own and prints what it measured."""

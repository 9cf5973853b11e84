"""The file of another trainer's run, as a file for dspref. Loads no torch.

`files` reads it, a config or a script (`scripts`, with the `literals` in it), into `theirs`, the keys with their places;
`dialects` tells whose it is. `conversion` turns the whole by the tables of `config`: `keys`, `log`, `trackers`, `data` and
`objective` fill a `draft`, `left_open` has what a person must write, and `written` is its YAML.

Enters: config, objectives.
Shows: conversion.
"""

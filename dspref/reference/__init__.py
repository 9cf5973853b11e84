"""The reference model of an objective: none, live, the policy with its adapter off, or scored once and stored.

`spec` says which, `modes` gives each one interface; `store` (no torch) is the memory-mapped folder of scored pairs,
`filling` scores into it what a run's steps need, `trust_region` (TR-DPO) and `bema` move a live reference after the policy,
`moving` is what they share.

Enters: config, data, distributed, engine, model, objectives.
Shows: filling, modes, spec, store.
"""

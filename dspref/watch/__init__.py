"""What ends a run from outside: signals, files that ask for it, hangs, ranks that died, a folder that is another's.

`watch` is a thread on every rank that looks, and ends the job with one verdict for all. `lock` holds a run folder for one
job. `interruption` answers signals where there is no watch yet, or none at all; these two load no torch.

Enters: distributed.
Shows: interruption, lock, watch.
"""

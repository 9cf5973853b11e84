"""What ends a run from outside: signals, files that ask for it, hangs, ranks that died, a folder that is another's.

`watch` is a thread on every rank that goes round: it hears `signals`, looks at files and launchers, keeps time (`pace`),
hears its `peers`, and ends the job with one verdict for all. A `request` to save or stop is agreed on by all ranks between
two steps. `lock` holds a run folder for one job. `interruption` answers signals where there is no watch yet, or none at all.

Enters: distributed.
Shows: interruption, lock, request, watch.
"""

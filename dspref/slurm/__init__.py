"""A run, or a sweep of runs, as a SLURM job. Loads no torch.

`submission` checks it, writes config and job script into the run folder and hands it to `sbatch`; `script` makes the job
script of the template in launch/slurm. Within the job, `verdict` has the last word: done, failed and why, or queued again.
`asking` is how SLURM is asked, `job_state` what it knows of a run's job.

Enters: config, machine, ranks, run.
Shows: job_state.
"""

from dspref.slurm.script import Job, named, options_of, quote, render
from dspref.slurm.submission import load_sweep, submit

__all__ = ["Job", "load_sweep", "named", "options_of", "quote", "render", "submit"]

"""`python -m dspref`."""

from dspref.cli import app

app(prog_name="dspref")

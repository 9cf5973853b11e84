"""dspref: preference optimization of language models with DeepSpeed, from one YAML file."""

__version__ = "0.1.0"

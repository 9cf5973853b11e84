"""dspref: preference optimization of language models with DeepSpeed, from one YAML file.

In Python, `train` and `score` are the commands of the same names, with what `load_config` reads; docs/python.md has these
and the parts that are of use alone. Importing dspref loads no torch.
"""

from typing import TYPE_CHECKING

from dspref.lazily import lazily

if TYPE_CHECKING:
    from dspref.config import load as load_config
    from dspref.training.scorer import score
    from dspref.training.trainer import train

__version__ = "0.1.0"
__all__ = ["load_config", "score", "train"]
__getattr__ = lazily(
    __name__, load_config="dspref.config:load", score="dspref.training.scorer", train="dspref.training.trainer"
)

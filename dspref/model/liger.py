"""Liger's kernels for norms, rotary positions and gated MLPs, put into a model of transformers (`model.liger`).

Log-probs stay dspref's own. Liger exchanges classes and functions in the modules of transformers, for every model of a
family that this process makes. Here one model alone is changed, as others, such as the one that answers prompts when a run
is done, are on the CPU, where Liger's kernels do not run.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dspref.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Those of which Liger 0.8.5 exchanges every norm, every MLP and the rotary positions.
FAMILIES = (
    "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3",
    "smollm3",
)  # fmt: skip


def check(family: str, device_type: str) -> None:
    """Refuse, before anything is built, a family that Liger does not know, and a machine on which it does not run."""
    if family not in FAMILIES:
        raise ConfigError(f"model.liger: {family} is not known to it; drop the key, or use one of {', '.join(FAMILIES)}")
    if device_type != "cuda":
        raise EnvironmentFault(f"model.liger: its kernels run on CUDA, and this device is {device_type}; drop the key")
    if importlib.util.find_spec("liger_kernel") is None:
        raise EnvironmentFault("model.liger: liger-kernel is not installed; pip install 'dspref[liger]'")


def put_into(lm: PreTrainedModel) -> None:
    """Exchange the kernels of a model that is loaded, and of no other."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    modeling = sys.modules[type(lm).__module__]
    exchange = MODEL_TYPE_TO_APPLY_LIGER_FN[lm.config.model_type]
    losses = {"cross_entropy", "fused_linear_cross_entropy"} & inspect.signature(exchange).parameters.keys()
    before = dict(vars(modeling))
    exchange(model=lm, **dict.fromkeys(losses, False))
    for name, plain in before.items():
        if (given := getattr(modeling, name)) is not plain:
            # Classes are for models to come; of this one the instances are changed. Functions are called by all.
            setattr(modeling, name, plain if inspect.isclass(plain) else _on_cuda(given, plain))


def _on_cuda(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(query: Any, *rest: Any, **options: Any) -> Any:
        return (kernel if query.is_cuda else plain)(query, *rest, **options)

    return chosen

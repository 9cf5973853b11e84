"""Files of a checkpoint as this Python writes them, below checkpoints/ beside this file, in a folder named by its version.

Run by hand, once under each version: `python tests/golden/make_checkpoints.py`; a second. Needs nothing but dspref.
Two files of a few KB, with the same state, which is what DeepSpeed has in its own (`state`):

- as_it_is.pt: DeepSpeed's objects as this Python pickles them. dspref wrote so up to 0.1.0 of November 2026.
- plain.pt: written as dspref writes now.

They differ between versions in how a member of an Enum is pickled: by its name in 3.11.2, by its value in 3.11.7, 3.12.1
and 3.13.0. Made with torch 2.13.0, numpy 2.4.6 and DeepSpeed 0.19.8. `test_plain.py` reads them.
"""

from __future__ import annotations

import os
import platform
from collections import OrderedDict
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dspref.engine.shards import SafeCheckpointEngine

FOLDER = Path(__file__).resolve().parent / "checkpoints"


def state() -> dict[str, Any]:
    """Of the kinds that DeepSpeed's files have at any stage, in any precision."""
    weights = OrderedDict({"lm.norm.weight": torch.arange(3.0), "lm.head.weight": torch.ones(2, 3, dtype=torch.bfloat16)})
    weights._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    flat = torch.arange(4.0)
    flat.ds_id = "0_1"  # type: ignore[attr-defined]
    dynamic = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, torch.float16)
    return {
        "module": weights,
        "param_shapes": [OrderedDict((name, weight.shape) for name, weight in weights.items())],
        "buffer_names": [],
        "lr_scheduler": {"last_epoch": 2, "base_lrs": [1e-3], "_is_initial": False},
        "ds_config": {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "optimizer": None},
        "optimizer_state_dict": {
            "zero_stage": ZeroStageEnum.weights,
            "stages": {int(stage): stage for stage in ZeroStageEnum},
            "loss_scaler": LossScaler(1),
            "dynamic_loss_scaler": dynamic,
            "param_slice_mappings": [OrderedDict({"lm.norm.weight": fragment_address(numel=3, start=6)})],
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.zeros(4)}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]}],
            },
        },
    }


def numbers() -> dict[str, Any]:
    """Numpy's, which could not be read again until they were written as plain values."""
    return {"float64": np.float64(0.5), "float32": np.float32(0.25), "int64": np.int64(7), "bool": np.bool_(True)}


def main() -> None:
    folder = FOLDER / f"cpython-{platform.python_version()}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state(), folder / "as_it_is.pt")
    SafeCheckpointEngine().save(state() | {"numbers": numbers()}, str(folder / "plain.pt"))


if __name__ == "__main__":
    main()

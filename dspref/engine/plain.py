"""What a file of a checkpoint holds: tensors, plain values and three classes of DeepSpeed. So it is written, and so read.

How an object is pickled is for each version of Python to say: an Enum's member is `getattr(Class, name)` in 3.11.2 and
`Class(value)` in 3.11.7. What is written here is the same in all of them, and what was written before is still read.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspref.engine.accelerator import ACCELERATOR as ACCELERATOR  # first: it tells DeepSpeed which to use

# isort: split

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dspref.errors import EnvironmentFault

DEEPSPEEDS = (LossScaler, DynamicLossScaler, fragment_address)

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _stage(value: Any) -> int:
    """What a file gets for ZeroStageEnum: the number of a member, and never the class."""
    if type(value) is not int or value not in list(ZeroStageEnum):
        raise pickle.UnpicklingError("not a stage of ZeRO")
    return value


def _stage_by_name(enum: Any, name: Any) -> int:
    """What a file gets for getattr: the number of a member of ZeroStageEnum, and nothing else of anything."""
    if enum is not _stage or type(name) is not str or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("getattr of anything but a stage of ZeRO")
    return ZeroStageEnum[name].value


# For the whole process: torch's own context for this ends, within another, what the outer one allowed.
torch.serialization.add_safe_globals(
    [
        *DEEPSPEEDS,
        (_stage, f"{ZeroStageEnum.__module__}.{ZeroStageEnum.__qualname__}"),
        (_stage_by_name, "builtins.getattr"),
    ]
)


def read(path: Path) -> dict[str, Any]:
    """One file, on the CPU; tensors stay on disk until they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


@contextlib.contextmanager
def as_data() -> Iterator[None]:
    """While open, torch.load makes only what is allowed above, whatever its caller asks for.

    DeepSpeed asks for `weights_only=False` in forty places, the universal format's among them.
    """
    load = torch.load
    torch.load = lambda *args, **options: load(*args, **(options | {"weights_only": True}))
    try:
        yield
    finally:
        torch.load = load


def complaint(file: Path) -> str | None:
    """What keeps a file from being read as data, in words; None where nothing does. Raises OSError."""
    try:
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(file):
            return f"{file}: names {min(foreign)}, which is no part of a checkpoint"
    except OSError:
        raise
    except Exception:  # at bytes that are no pickle torch raises whatever its reader stumbles on
        return f"{file}: is not in torch's format"
    try:
        read(file)
    except OSError:
        raise
    except Exception:  # a call or an attribute that no checkpoint has: likewise
        return f"{file}: is damaged, or calls what it names in a way that is no part of a checkpoint"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(state: Any, path: Path) -> None:
    """Raises EnvironmentFault where `read` would refuse the file: now, not when the run is to go on from it."""
    with open(path, "wb") as file:
        torch.save(plain(state), file)
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        raise EnvironmentFault(
            f"{path}: DeepSpeed {deepspeed.__version__} puts {min(foreign)} into a checkpoint, which could not be read "
            "again; install the versions in constraints.txt, and the same command goes on"
        )


def plain(value: Any) -> Any:
    """The same of plain values: a number for an Enum's member and for one of numpy's, tuple for a named tuple, at any depth.

    Tensors are shared, not copied.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        content = {plain(key): plain(inner) for key, inner in value.items()}
        return _with_attributes(OrderedDict(content), value) if isinstance(value, OrderedDict) else content
    if isinstance(value, DEEPSPEEDS):
        return _with_attributes(copy.copy(value), value)
    if isinstance(value, torch.Size):
        return value
    for kind, wider in ((list, list), (tuple, tuple), (set, Set)):
        if isinstance(value, wider):
            return kind(plain(inner) for inner in value)
    return value


def _with_attributes(made: Any, like: Any) -> Any:
    """The weights are in an OrderedDict to which torch gives `_metadata`."""
    vars(made).update(plain(vars(like)))
    return made

"""Checkpoints are the same whatever Python writes them, are read whatever Python wrote them, and reach nothing else."""

from __future__ import annotations

import pickle
import struct
import sys
import tomllib
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from enum import Enum, Flag, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspref.engine import plain, shards
from dspref.errors import EnvironmentFault, IOFault

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
sys.path.append(str(GOLDEN))

import make_checkpoints  # noqa: E402  (needs the path above)

FOLDERS = sorted((GOLDEN / "checkpoints").iterdir())


def as_written(value: Any) -> Any:
    """With types, so that an Enum's member is not equal to its number, and with what objects hold."""
    if isinstance(value, dict):
        pairs = [(as_written(key), as_written(inner)) for key, inner in value.items()]
        return type(value), pairs, as_written(vars(value)) if isinstance(value, OrderedDict) and vars(value) else ()
    if isinstance(value, list | tuple):
        return type(value), [as_written(inner) for inner in value]
    if torch.is_tensor(value):
        return value.dtype, value.tolist(), as_written(vars(value))
    return type(value), as_written(vars(value)) if hasattr(value, "__dict__") else value


# ---------------------------------------------------------------------------------------------------------------------
# Every supported Python


def test_there_are_files_of_each_supported_python() -> None:
    assert [folder.name for folder in FOLDERS] == [f"cpython-{v}" for v in ("3.11.2", "3.11.7", "3.12.1", "3.13.0")]
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minor = sorted({folder.name.removeprefix("cpython-").rpartition(".")[0] for folder in FOLDERS})
    assert minor == [name.rpartition(" ")[2] for name in told["classifiers"] if "Python" in name]
    assert told["requires-python"] == f">={minor[0]},<3.{int(minor[-1].rpartition('.')[2]) + 1}"
    assert f"Python {minor[0]} to {minor[-1]}" in (ROOT / "README.md").read_text()
    first = FOLDERS[0] / "as_it_is.pt"
    assert b"getattr" in first.read_bytes(), "the spelling that differs"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_any_python_wrote_is_read(folder: Path) -> None:
    shards.refuse_foreign(folder)
    expected = plain.plain(make_checkpoints.state())
    assert as_written(plain.read(folder / "as_it_is.pt")) == as_written(expected)
    for load in (plain.read, lambda file: shards.SafeCheckpointEngine().load(str(file)), _as_deepspeed_loads):
        found = load(folder / "plain.pt")
        numbers = {"float64": 0.5, "float32": 0.25, "int64": 7, "bool": True}
        assert as_written(found) == as_written(expected | {"numbers": numbers})
    assert expected["optimizer_state_dict"]["stages"] == {0: 0, 1: 1, 2: 2, 3: 3}


def _as_deepspeed_loads(file: Path) -> Any:
    with plain.as_data():
        return torch.load(file, weights_only=False)


def test_every_python_writes_the_same_bytes() -> None:
    assert len({(folder / "plain.pt").read_bytes() for folder in FOLDERS}) == 1


def test_this_python_writes_no_name_that_another_would_spell_otherwise(tmp_path: Path) -> None:
    """Whatever version runs this: `builtins` and `enum` are where the spellings differ."""
    state = make_checkpoints.state() | {"numbers": make_checkpoints.numbers()}
    shards.SafeCheckpointEngine().save(state, str(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        written = archive.read(name)
    for foreign in (b"getattr", b"ZeroStageEnum", b"enum", b"builtin", b"numpy", b"multiarray"):
        assert foreign not in written
    assert as_written(plain.read(tmp_path / "x.pt")) == as_written(plain.plain(state))
    assert state["optimizer_state_dict"]["zero_stage"].name == "weights", "what DeepSpeed holds is not touched"


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    YES = "yes"


class Bits(Flag):
    A, B = 1, 2


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Color.RED, "red"),
        (Level.LOW, 1),
        (Word.YES, "yes"),
        (Bits.A | Bits.B, 3),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (Point(Level.LOW, [Color.RED]), (1, ["red"])),
        (defaultdict(list, {Level.LOW: np.float64(2)}), {1: 2.0}),
        (frozenset({Level.LOW}), {1}),
        (OrderedDict(a=(Level.LOW, None)), OrderedDict(a=(1, None))),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        ([True, 2**70, b"x", 1.5, 1j, torch.bfloat16, torch.device("cpu")],) * 2,
    ],
    ids=str,
)
def test_plain_values(value: Any, expected: Any, tmp_path: Path) -> None:
    plain.write({"value": value}, tmp_path / "x.pt")
    assert as_written(plain.read(tmp_path / "x.pt")) == as_written({"value": expected})


def test_tensors_that_share_memory_share_it_still(tmp_path: Path) -> None:
    whole = torch.zeros(1000)
    plain.write({"a": whole[:500], "b": [whole[500:]]}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 2 * whole.nbytes
    assert plain.plain([whole])[0] is whole


def test_what_could_not_be_read_again_is_not_written_in_silence(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"x\.pt: DeepSpeed .* puts fractions\.Fraction into a checkpoint"):
        shards.SafeCheckpointEngine().save({"ratio": Fraction(1, 2)}, str(tmp_path / "x.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing else

# A pickle by hand, protocol 2. What Python's own pickler would not write is what matters here.
GETATTR, STAGES = b"c__builtin__\ngetattr\n", b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n"
SCALER, TENSOR = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n", b"ctorch\nTensor\n"
NEWOBJ, BUILD, REDUCE = b"\x81", b"b", b"R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(function: bytes, *arguments: bytes, by: bytes = REDUCE) -> bytes:
    return function + b"(" + b"".join(arguments) + b"t" + by


def attribute(of: bytes, name: str) -> bytes:
    return call(GETATTR, of, text(name))


def number(value: int) -> bytes:
    return b"K" + bytes([value])


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def file_of(tmp_path: Path, value: bytes) -> Path:
    """{"value": value}, in torch's format."""
    with zipfile.ZipFile(tmp_path / "x_model_states.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + text("value") + value + b"s.")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return tmp_path / "x_model_states.pt"


@pytest.mark.parametrize("spelled", [GETATTR, b"cbuiltins\ngetattr\n"])
@pytest.mark.parametrize(("name", "value"), [("disabled", 0), ("optimizer_states", 1), ("gradients", 2), ("weights", 3)])
def test_a_stage_by_its_name(spelled: bytes, name: str, value: int, tmp_path: Path) -> None:
    """And these files by hand are such as torch reads: those below are refused for what they ask."""
    file = file_of(tmp_path, call(spelled, STAGES, text(name)))
    shards.refuse_foreign(tmp_path)
    assert as_written(plain.read(file)) == as_written({"value": value})
    assert as_written(plain.read(file_of(tmp_path, call(STAGES, number(value))))) == as_written({"value": value})


WEIGHTS = attribute(STAGES, "weights")
ATTRIBUTES = (
    "__class__", "__init__", "__globals__", "__reduce_ex__", "__subclasses__", "_member_map_", "mro", "from_bytes", "",
    "Weights", "weights.real", "weights\0",
)  # fmt: skip
HOSTILE: dict[str, bytes] = {
    **{f"the Enum's {name!a}": attribute(STAGES, name) for name in ATTRIBUTES},
    "a class's method": attribute(SCALER, "loss_scale"),
    "a tensor's method": attribute(TENSOR, "tolist"),
    "a method's function": attribute(attribute(SCALER, "__init__"), "__globals__"),
    "a text's method": attribute(text("x"), "format"),
    "a list's method": attribute(b"]", "append"),
    "none's class": attribute(b"N", "__class__"),
    "the class of a member": attribute(WEIGHTS, "__class__"),
    "the module of getattr": attribute(GETATTR, "__self__"),
    "the globals of getattr": attribute(GETATTR, "__globals__"),
    "getattr of an instance": attribute(call(SCALER, number(1)), "__class__"),
    "getattr of a name": attribute(text("ZeroStageEnum"), "weights"),
    "getattr with a default": call(GETATTR, STAGES, text("x"), SCALER),
    "getattr with one argument": call(GETATTR, STAGES),
    "getattr with none": call(GETATTR),
    "getattr by a name that is bytes": call(GETATTR, STAGES, call(b"c_codecs\nencode\n", text("weights"), text("latin1"))),
    "getattr by a number": call(GETATTR, STAGES, number(3)),
    "getattr by a list": call(GETATTR, STAGES, b"]"),
    "a call of what getattr gave": call(WEIGHTS, number(1)),
    "a new getattr": call(GETATTR, STAGES, text("weights"), by=NEWOBJ),
    "a new Enum": call(STAGES, number(3), by=NEWOBJ),
    "a new instance of a member": call(WEIGHTS, by=NEWOBJ),
    "getattr changed": GETATTR + table(__kwdefaults__=b"}") + BUILD,
    "the Enum changed": STAGES + table(__module__=text("os")) + BUILD,
    "a member changed": call(STAGES, number(1)) + table(_value_=number(9)) + BUILD,
    "a member changed by its name": WEIGHTS + table(_value_=number(9)) + BUILD,
    "getattr by way of torch": call(
        b"ctorch._tensor\n_rebuild_from_type_v2\n", GETATTR, TENSOR, b"(" + SCALER + text("__init__") + b"t", b"}"
    ),
    "a stage that there is not": call(STAGES, number(4)),
    "a stage below all": call(STAGES, b"J\xff\xff\xff\xff"),
    "a stage that is true": call(STAGES, b"\x88"),
    "a stage that is no whole number": call(STAGES, b"G" + struct.pack(">d", 1.0)),
    "a stage that is a text": call(STAGES, text("weights")),
    "a stage that is a class": call(STAGES, SCALER),
    "two stages": call(STAGES, number(1), number(2)),
    "an attribute by a dotted name": b"cdeepspeed.runtime.zero.config\nZeroStageEnum.weights\n",
    "another class beside the Enum": b"cdeepspeed.runtime.zero.config\nDeepSpeedZeroConfig\n",
    "setattr": call(b"c__builtin__\nsetattr\n", SCALER, text("x"), b"N"),
    "eval": call(b"c__builtin__\neval\n", text("1")),
    "import": call(b"c__builtin__\n__import__\n", text("os")),
    "operator's getter": call(b"coperator\nattrgetter\n", text("x")),
    "Enum's own": b"cenum\nEnum\n",
    "a name from the stack": text("os") + text("system") + b"\x93",
    "an instance of old": b"(ios\nsystem\n",
    "an extension": b"\x82\x01",
    "a stack that is empty": b"RRRR",
    "a mark that is missing": b"tt",
    "what was never kept": b"h\x09",
    "a text that is cut": b"X\xff\xff\xff\x7f",
    "a length that is cut": b"X",
    "a name that is no text": b"c\xff\n\xff\n",
    "a storage that there is not": call(
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(4) + b"tQ",
        number(0),
        b"K\x04\x85",
        b"K\x01\x85",
        b"\x89",
        b"}",
    ),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_getattr_reaches_nothing_else(value: bytes, tmp_path: Path) -> None:
    file = file_of(tmp_path, value)
    with pytest.raises(IOFault, match=r"no part of a checkpoint|not in torch's format") as caught:
        shards.refuse_foreign(tmp_path)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    for load in (plain.read, lambda file: shards.SafeCheckpointEngine().load(str(file)), _as_deepspeed_loads):
        with pytest.raises(
            (pickle.UnpicklingError, TypeError, LookupError, ValueError, RuntimeError, EOFError, struct.error)
        ):
            load(file)


def test_no_member_was_changed_by_a_file() -> None:
    """Runs after the files above."""
    assert make_checkpoints.ZeroStageEnum.weights.value == 3 == make_checkpoints.ZeroStageEnum["weights"]

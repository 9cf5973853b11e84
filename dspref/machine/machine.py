"""What a machine has for a run: packages, GPUs, compilers. Each check says OK, WARN or FAIL, with the remedy.

Loads neither torch nor DeepSpeed, which take seconds: `preflight` has the table of checks, and those of room and folders.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dspref.engine import builds
from dspref.errors import EnvironmentFault
from dspref.machine.context import FAIL, OK, TRACKERS, WARN, CheckContext, Verdict
from dspref.machine.places import NETWORK, file_system, holder_of, others_may_write
from dspref.terminal import command

# Package -> (lowest that pyproject.toml allows, newest that is tested: constraints.txt).
VERSIONS = {
    "torch": ("2.8", "2.13.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "transformers": ("5.17", "5.23.0"),
    "datasets": ("5", "5.2.0"),
    "accelerate": ("1.10", "1.15.0"),
    "pydantic": ("2.12", "2.14.3"),
    "safetensors": ("0.5", "0.8.0"),
    "numpy": ("2", "2.4.6"),
}
CVE = " (and before 2.6 loading weights may run code that they bring: CVE-2025-32434)"
OPTIONAL = ("peft", "bitsandbytes", "flash-attn", "liger-kernel", "wandb", "tensorboard")
# What others bring along, and what tokens and templates come to depends on.
BROUGHT = ("tokenizers", "jinja2", "sentencepiece", "tiktoken")
# A build takes a minute or two, perhaps in another container of this machine, whose processes are not seen here.
BUILD_SECONDS = 300


class Gpus(NamedTuple):
    names: list[str]
    driver: str = ""
    cuda: str = ""
    """The newest CUDA that the driver knows."""


# ---------------------------------------------------------------------------------------------------------------------
# Packages and devices


def installed(names: Iterable[str] = (*VERSIONS, *OPTIONAL, *BROUGHT)) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_versions(context: CheckContext) -> Verdict:
    return judge_versions(installed(VERSIONS))


def judge_versions(found: Mapping[str, str]) -> Verdict:
    remedy = "pip install -c constraints.txt -e ."
    for name, (lowest, _) in VERSIONS.items():
        if name not in found:
            return Verdict(FAIL, f"{name} is not installed; {remedy}")
        if _numbers(found[name]) < _numbers(lowest):
            flaw = CVE if name == "torch" and _numbers(found[name]) < (2, 6) else ""
            return Verdict(FAIL, f"{name} {found[name]} is older than {lowest}{flaw}; {remedy}")
    newer = [f"{n} {found[n]} ({tested})" for n, (_, tested) in VERSIONS.items() if _minor(found[n]) > _minor(tested)]
    if newer:
        return Verdict(WARN, f"newer than tested (in brackets): {', '.join(newer)}; if it misbehaves, {remedy}")
    return Verdict(OK, "within the tested range")


def check_packages(context: CheckContext) -> Verdict:
    """Those that only some runs need. A tracker that cannot be had is switched off; the others end a run."""
    needed = context.packages
    absent = {package: key for package, key in needed.items() if find_spec(package) is None}
    said = []
    for package, key in sorted(absent.items(), key=lambda item: item[0] in TRACKERS.values()):
        extra = {"liger_kernel": "liger", "comet_ml": "comet"}.get(package, package)
        remedy = "pip install wandb" if package == "wandb" else f"pip install -e '.[{extra}]'"
        ends = package not in TRACKERS.values()
        effect = "needs it" if ends else "will be switched off without it"
        level = FAIL if ends else WARN
        said.append((level, f"{package} is not installed, and {key} {effect}; {remedy}, or drop the key"))
    if said:
        return Verdict(said[0][0], "; ".join(text for _, text in said))
    return Verdict(OK, f"installed: {', '.join(needed)}" if needed else "none beyond those of every run")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.split("+")[0])))


def _minor(text: str) -> tuple[int, ...]:
    return _numbers(text)[:2]


@cache
def gpus() -> Gpus:
    """The NVIDIA GPUs that the driver names."""
    if not shutil.which("nvidia-smi"):
        return Gpus([])
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines, overview = (
            subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (query, ["nvidia-smi"])
        )
    except (OSError, subprocess.SubprocessError):
        return Gpus([])
    rows = [line.rsplit(", ", 1) for line in lines.splitlines() if ", " in line]
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", overview)
    return Gpus([name for name, _ in rows], rows[0][1] if rows else "", cuda[1] if cuda else "")


def torch_cuda() -> str:
    """The CUDA that torch was built for; empty for a torch without. Read from its file: importing torch takes seconds."""
    spec = find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", path.read_text(), flags=re.M) if path and path.exists() else None
    return found[1] if found else ""


def check_gpu(context: CheckContext) -> Verdict:
    try:
        builds.accelerator(context.env, cuda=False)
    except EnvironmentFault as fault:
        return Verdict(FAIL, str(fault))
    return judge_gpu(gpus(), torch_cuda(), context.cuda_key)


def judge_gpu(found: Gpus, built_for: str, needed_by: str | None) -> Verdict:
    if not found.names:
        if needed_by:
            return Verdict(FAIL, f"none here, and {needed_by} needs CUDA; drop the key, or run on a machine with a GPU")
        return Verdict(OK, "none that nvidia-smi names; training runs on the CPU")
    kinds = ", ".join(f"{found.names.count(name)} x {name}" for name in dict.fromkeys(found.names))
    if not built_for:
        level = FAIL if needed_by else WARN
        return Verdict(level, f"{kinds}, but torch is built without CUDA; install torch from pytorch.org for this driver")
    if found.cuda and _numbers(built_for)[0] > _numbers(found.cuda)[0]:
        return Verdict(
            FAIL,
            f"torch is built for CUDA {built_for}, driver {found.driver} knows {found.cuda}; update the driver, or install "
            f"torch for CUDA {_numbers(found.cuda)[0]}",
        )
    if len(set(found.names)) > 1:
        return Verdict(WARN, f"{kinds}: ranks wait for the slowest; choose equal ones with CUDA_VISIBLE_DEVICES")
    return Verdict(OK, f"{kinds}, driver {found.driver} (CUDA {found.cuda}), torch for CUDA {built_for}")


def check_attention(context: CheckContext) -> Verdict:
    modules = {
        "flash_attention_2": "flash_attn.flash_attn_interface",
        "flash_attention_3": "flash_attn_interface",
        "flash_attention_4": "flash_attn.cute",
    }
    present = [name for name, module in modules.items() if _is_here(module)]
    asked = context.model.attn_implementation if context.model else "auto"
    if asked in modules and asked not in present:
        return Verdict(
            FAIL, f"model.attn_implementation: {asked} is not installed; pip install -e '.[flash-attn]', or use auto"
        )
    return Verdict(OK, f"flash-attn: {', '.join(present) or 'not installed'}; torch_varlen and sdpa come with torch")


def _is_here(module: str) -> bool:
    """Whether a module lies here; its package, which would load torch, is left alone."""
    package, _, part = module.partition(".")
    spec = find_spec(package)
    if spec is None or not part:
        return spec is not None
    folders = [Path(folder) / part for folder in spec.submodule_search_locations or ()]
    return any(folder.is_dir() or folder.with_suffix(".py").is_file() for folder in folders)


# ---------------------------------------------------------------------------------------------------------------------
# Operators that are compiled on first use


def builds_folder(context: CheckContext) -> Path:
    """Where compiled operators go; dspref has a folder of its own for cpu_adam."""
    return builds.folder(context.env, own="cpu_adam" in context.operators)


def check_compiler(context: CheckContext) -> Verdict:
    tools = {"g++": context.env.get("CXX", "g++"), "ninja": "ninja", **({"nvcc": "nvcc"} if torch_cuda() else {})}
    missing = [name for name, command in tools.items() if not shutil.which(command, path=context.env.get("PATH"))]
    built = context.operators
    if missing and built:
        remedy = "install it (ninja: pip install ninja; nvcc: the CUDA toolkit), or use train.optim: adamw"
        return Verdict(FAIL, f"{' and '.join(missing)} not found, and {built[0]} is compiled on first use; {remedy}")
    what = f"for {', '.join(built)}" if built else "only cpu_adam would be compiled"
    return Verdict(OK, f"{', '.join(name for name in tools if name not in missing) or 'none'} found; {what}")


def check_locks(context: CheckContext) -> Verdict:
    """A killed build leaves its lock, and every later start waits for it for ever, silently."""
    built, folder = context.operators, builds_folder(context)
    if folder.exists() and (whose := others_may_write(folder)):
        remedy = "remove it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
        return Verdict(FAIL, f"{folder}: {whose}, and code is loaded from there; {remedy}")
    if context.model and not built:
        return Verdict(OK, "nothing will be compiled")
    for lock, age in builds.locks(folder):
        removed = "cpu_adam" in built and age > builds.STALE_SECONDS
        if removed or holder_of(lock, context.proc):
            continue
        elsewhere = file_system(lock, context.proc) in NETWORK
        who = "no process of this machine" if elsewhere else "no process"
        level = FAIL if built and not elsewhere and age > BUILD_SECONDS else WARN
        return Verdict(
            level, f"{lock}: {who} holds it ({age / 60:.0f} minutes old), and builds wait for it: {command('rm', lock)}"
        )
    return Verdict(OK, f"none in the way in {folder}")

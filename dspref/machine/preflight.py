"""What would end a run after its first hour, found before it starts: the table of checks of a machine.

`dspref doctor` asks all of CHECKS, a run those of AT_START.
"""

from __future__ import annotations

import errno
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dspref import hub, secrets
from dspref.config import cache_folder
from dspref.config.explain import dotted
from dspref.machine import footprint, inputs
from dspref.machine.context import FAIL, OK, WARN, CheckContext, Verdict
from dspref.machine.machine import (
    builds_folder,
    check_attention,
    check_compiler,
    check_gpu,
    check_locks,
    check_packages,
    check_versions,
    gpus,
)
from dspref.machine.places import NETWORK, file_system, nearest
from dspref.model import weights
from dspref.run import record

OPEN_FILES, SHARED_MEMORY = 4096, 2**30
# Folders within a run's that it writes to all the time.
INNER = ("checkpoints", "logs")
# NCCL takes some 10 MB of shared memory for each connection; docker gives 64 MB unless told otherwise.
SHARED_MEMORY_PER_RANK = 16 * 2**20

# ---------------------------------------------------------------------------------------------------------------------
# Room


def check_disk(context: CheckContext) -> Verdict:
    usage = shutil.disk_usage(nearest(context.output_dir or Path()))
    free, needed = usage.free, context.bytes_to_write
    if context.output_dir is None:
        return Verdict(WARN if free < 2**30 else OK, f"{_size(free)} free in the working directory")
    where = f"output_dir: {context.output_dir}"
    if usage.total == 0:
        return Verdict(OK, f"{where}: this file system does not tell its size")
    if needed is None:
        return Verdict(OK, f"{where}: {_size(free)} free; what is needed shows when the model is here")
    if needed > free:
        remedy = "free some, lower checkpoint.keep_last, raise save_every, or use another output_dir="
        return Verdict(FAIL, f"{where}: checkpoints and export need about {_size(needed)}, {_size(free)} are free; {remedy}")
    return Verdict(OK, f"{where}: {_size(free)} free, about {_size(needed)} needed")


def check_shared_memory(context: CheckContext) -> Verdict:
    if not context.shared_memory.exists():
        return Verdict(
            WARN if context.on_gpu else OK, f"{context.shared_memory} is absent, which NCCL uses; mount a tmpfs there"
        )
    usage = shutil.disk_usage(context.shared_memory)
    return judge_shared_memory(usage.free, context.ranks if context.on_gpu else 1, context.shared_memory)


def judge_shared_memory(free: int, ranks: int, where: Path = Path("/dev/shm")) -> Verdict:
    text = f"{where}: {_size(free)} free"
    if ranks > 1 and free < SHARED_MEMORY:
        level = FAIL if free < ranks * SHARED_MEMORY_PER_RANK else WARN
        return Verdict(level, f"{text} for the NCCL of {ranks} ranks; docker run --shm-size=8g, or --ipc=host")
    return Verdict(OK, text)


def check_open_files(context: CheckContext) -> Verdict:
    return judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def judge_open_files(limit: int) -> Verdict:
    if 0 <= limit < OPEN_FILES:
        return Verdict(WARN, f"ulimit -n is {limit}, too few for many ranks and shards; ulimit -n 65536 before the start")
    return Verdict(OK, f"ulimit -n is {limit}")


def check_memory(context: CheckContext) -> Verdict:
    """Of the container, where it has a limit; offloaded states and training on CPU live there."""
    limit = memory_limit(context)
    model = context.model
    weights = footprint.count_weights(model) if model else None
    if limit is None:
        return Verdict(WARN, f"{context.proc}/meminfo cannot be read")
    in_host = context.offloads_optimizer or not gpus().names
    # fp32 masters, gradients and two moments
    if in_host and weights and model and model.lora is None and 16 * weights > limit:
        remedy = "raise the container's limit, or use more machines"
        return Verdict(WARN, f"{_size(limit)} for this job, the optimizer's states take {_size(16 * weights)}; {remedy}")
    return Verdict(OK, f"{_size(limit)} for this job")


def memory_limit(context: CheckContext) -> int | None:
    """Bytes: the machine's, or the cgroup's where that is less."""
    limits = []
    for path in (context.cgroup / "memory.max", context.cgroup / "memory" / "memory.limit_in_bytes"):
        text = path.read_text().strip() if path.exists() else ""
        limits += [int(text)] if text.isdecimal() else []
    path = context.proc / "meminfo"
    total = re.search(r"MemTotal:\s*(\d+) kB", path.read_text()) if path.exists() else None
    return min([*limits, *([int(total[1]) * 1024] if total else [])], default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Folders and names


def check_folders(context: CheckContext) -> Verdict:
    """A file is made and taken away again: permissions alone say nothing of read-only mounts, and nothing to root."""
    folders = {"the cache ($DSPREF_CACHE)": cache_folder(""), "$TMPDIR": Path(tempfile.gettempdir())}
    anew = context.begins_anew
    if run := context.output_dir:
        if not run.is_file() and (said := record.misplaced(run, anew)):
            return Verdict(FAIL, f"output_dir: {said}")
        within = {} if anew else {f"output_dir: {name}": run / name for name in INNER if (run / name).is_dir()}
        folders = {"output_dir": run, **within, **folders}
        if context.store:
            folders["reference.store"] = context.store
    if context.operators:
        folders["$TORCH_EXTENSIONS_DIR"] = builds_folder(context)
    for name, folder in folders.items():
        if name == "output_dir" and folder.is_file():
            continue  # refused where the run folder is opened, with what to do
        if reason := inputs.unwritable(folder):
            return Verdict(FAIL, f"{name}: {folder} {reason}; choose another folder")
    for path in [folders["output_dir"] / name for name in record.APPENDED] if run and not anew else []:
        try:
            if path.is_file():
                open(path, "ab").close()
        except OSError as error:
            return Verdict(
                FAIL, f"output_dir: {path} cannot be written ({error.strerror}); mend it, or choose another folder"
            )
    return Verdict(OK, f"can be written: {', '.join(map(str, folders.values()))}")


def check_inputs(context: CheckContext) -> Verdict:
    """What the config names: of a machine, these are the user's files."""
    if context.model is None:
        return Verdict(OK, "no config was given")
    found = context.look()
    if found.faults:
        return Verdict(FAIL, "; ".join(f"{dotted(path)}: {reason}" for path, reason in found.faults))
    aside = f"; not checked (hub): {', '.join(found.on_hub)}" if found.on_hub else ""
    return Verdict(OK, f"what the config names is there{aside}")


def check_network_folders(context: CheckContext) -> Verdict:
    folders = {"$TMPDIR": Path(tempfile.gettempdir())}
    if context.operators:
        folders["$TORCH_EXTENSIONS_DIR"] = builds_folder(context)
    for name, folder in folders.items():
        if (kind := file_system(folder, context.proc)) in NETWORK:
            return Verdict(WARN, f"{name}: {folder} is on {kind}, where machines share locks and builds; use a local disk")
    return Verdict(OK, f"local: {', '.join(map(str, folders.values()))}")


def check_meeting(context: CheckContext) -> Verdict:
    """Where ranks of several machines meet."""
    address, port = context.env.get("MASTER_ADDR"), context.env.get("MASTER_PORT", "")
    try:
        socket.gethostbyname(name := address or socket.gethostname())
    except OSError:
        if address is None:
            return Verdict(
                WARN, f"this machine's name, {name}, cannot be resolved; add it to /etc/hosts for runs of several"
            )
        return Verdict(FAIL, f"MASTER_ADDR: {name} cannot be resolved; use a name or address that all machines know")
    if address and port.isdecimal():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return Verdict(WARN, f"MASTER_PORT: {port} is in use here; a run of several machines needs another")
            except OverflowError:
                return Verdict(FAIL, f"MASTER_PORT: {port} is no port; use 1024 to 65535")
    return Verdict(OK, f"{name} resolves" + (f", port {port}" if port else ""))


def _contact(context: CheckContext) -> tuple[bool, bool]:
    """Of the hub: (whether it is not to be asked, whether a token for it is there)."""
    token = any(context.env.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    home = footprint.hub_cache().parent
    token = token or Path(context.env.get("HF_TOKEN_PATH", home / "token")).exists()
    return context.env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"), token


def check_upload(context: CheckContext) -> Verdict:
    offline, token = _contact(context)
    if context.config is None or context.config.export.push_to_hub is None:
        return Verdict(OK, "export.push_to_hub is not asked for")
    if offline or not token:
        lacks, remedy = ("no token", "export HF_TOKEN, or run `hf auth login`")
        lacks, remedy = ("HF_HUB_OFFLINE is set", "unset it") if offline else (lacks, remedy)
        return Verdict(FAIL, f"export.push_to_hub: {lacks}; {remedy}, or drop the key and use `dspref push` later")
    return Verdict(OK, "a token is there")


def check_hub(context: CheckContext) -> Verdict:
    offline, token = _contact(context)
    state = f"{'HF_HUB_OFFLINE is set' if offline else 'not asked'}, {'a token is there' if token else 'no token'}"
    if context.model and footprint.model_folder(context.model) is None:
        name = context.model.name_or_path
        if reason := weights.no_folder(name):
            return Verdict(FAIL, f"model.name_or_path: {name}: {reason}")
        if offline or name.startswith(("/", ".", "~")):
            return Verdict(FAIL, f"model.name_or_path: {name} is neither a folder nor in the cache; {state}")
        if silent := hub.silence():
            return Verdict(FAIL, f"model.name_or_path: {name} is not in the cache, and the hub does not answer: {silent}")
        return Verdict(OK, f"{name} is not in the cache, and is downloaded when it is needed; the hub answers")
    return Verdict(OK, state)


def check_tracker(context: CheckContext) -> Verdict:
    if "wandb" not in context.trackers:
        return check_tracker_key(context)
    netrc = Path(context.env.get("NETRC", Path.home() / ".netrc"))
    known = context.env.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
    if known or context.env.get("WANDB_MODE") in ("offline", "disabled"):
        found = check_tracker_key(context)
        return found if found.level == WARN else Verdict(OK, context.env.get("WANDB_MODE") or "a key is there")
    return Verdict(WARN, "log.trackers: wandb has no key and will be switched off; wandb login, or WANDB_MODE=offline")


# Tracker -> the variable with its key, the file that its login leaves, and what keeps the run in its folder instead.
KEYS = {
    "comet": ("COMET_API_KEY", "~/.comet.config", "COMET_START_ONLINE", ("0", "false")),
    "swanlab": ("SWANLAB_API_KEY", "~/.swanlab/.netrc", "SWANLAB_MODE", ("offline", "local", "disabled")),
}


def check_tracker_key(context: CheckContext) -> Verdict:
    """Of those that ask for one, beside wandb."""
    for name in context.trackers:
        if name in KEYS:
            key, file, mode, off = KEYS[name]
            if not (context.env.get(key) or Path(file).expanduser().exists() or context.env.get(mode, "").lower() in off):
                remedy = f"export {key}, or {mode}={off[0]} to keep the run in its folder"
                return Verdict(WARN, f"log.trackers: {name} has no key and will be switched off; {remedy}")
    return Verdict(OK, f"{', '.join(context.trackers)}: nothing is missing" if context.trackers else "none is asked for")


def check_deepspeed_env(context: CheckContext) -> Verdict:
    """DeepSpeed's launcher puts these lines on the command lines of other machines, for all to see, and logs them."""
    name = context.env.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else [], start=1):
            key, _, value = line.partition("=")
            if value.strip() and (secrets.is_telling(key.strip()) or secrets.kind_of(value, context.env)):
                remedy = "DeepSpeed shows it on command lines; take it out, and set it in the job's environment"
                return Verdict(FAIL, f"{path}:{number}: {key.strip()} looks like a secret; {remedy}")
    return Verdict(OK, "no secrets in it")


def check_slurm(context: CheckContext) -> Verdict:
    path = shutil.which("sbatch", path=context.env.get("PATH"))
    return Verdict(OK, f"sbatch: {path}" if path else "no sbatch here: jobs of several machines are submitted elsewhere")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


CHECKS: dict[str, Callable[[CheckContext], Verdict]] = {
    "versions": check_versions,
    "packages": check_packages,
    "gpu": check_gpu,
    "attention": check_attention,
    "compiler": check_compiler,
    "build locks": check_locks,
    "shared memory": check_shared_memory,
    "open files": check_open_files,
    "memory": check_memory,
    "folders": check_folders,
    "disk": check_disk,
    "inputs": check_inputs,
    "local folders": check_network_folders,
    "meeting": check_meeting,
    "hub": check_hub,
    "upload": check_upload,
    "trackers": check_tracker,
    ".deepspeed_env": check_deepspeed_env,
    "slurm": check_slurm,
}
AT_START = ("versions", "build locks", "shared memory", "folders", "disk", "upload")


def examine(context: CheckContext, names: Iterable[str] = tuple(CHECKS)) -> dict[str, Verdict]:
    """The verdict of each check."""
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name](context)
        except OSError as error:
            found[name] = Verdict(WARN, f"could not be looked at: {error}")
    return found


def complaints(of_ranks: Sequence[Mapping[str, Verdict]], hosts: Sequence[str]) -> list[tuple[str, str]]:
    """(WARN or FAIL, line) of the checks of all ranks, each by the first machine that says so, failures first."""
    found: dict[tuple[str, str], str] = {}
    for host, verdicts in zip(hosts, of_ranks):
        where = f" on {host}" if len(set(hosts)) > 1 else ""
        for name, verdict in verdicts.items():
            if verdict.level != OK:
                found.setdefault((verdict.level, name), f"{name}{where}: {verdict.text}")
    return sorted((level, line) for (level, _), line in found.items())

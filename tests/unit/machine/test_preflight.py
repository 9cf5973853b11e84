"""What a machine lacks is found before the run, in one line with its remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from tiny import tiny_config, tiny_model

from dspref import config
from dspref.config import Config
from dspref.engine.builds import STALE_SECONDS
from dspref.machine import agreement, doctor, footprint, machine, places, preflight
from dspref.machine.context import OK, CheckContext, Verdict
from dspref.machine.machine import FAIL, VERSIONS, WARN, Gpus
from dspref.machine.preflight import CHECKS

GIGABYTE = 2**30


def run_of(folder: Path, *overrides: str) -> Config:
    values = {"model": {"name_or_path": "m"}, "data": {"train": {"path": "p"}}, "output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return config.load(folder / "run.yaml", overrides)


def model_of(folder: Path, **values: int) -> str:
    """A folder with a model's config and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


HUGE = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8} | {
    "intermediate_size": 28672, "vocab_size": 128256,
}  # fmt: skip
OFFLOAD = ("deepspeed=ds_configs/zero3_offload.json", "train.optim=cpu_adam")


# ---------------------------------------------------------------------------------------------------------------------
# Packages and devices


def test_versions_are_those_of_pyproject_and_constraints():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    required = dict(line.split(">=") for line in project["dependencies"] if ">=" in line)
    tested = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: (required[name], tested[name]) for name in VERSIONS} == VERSIONS


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({}, OK, "tested"),
        ({"torch": "2.13.1+cu128"}, OK, "tested"),
        ({"torch": "2.5.1"}, FAIL, "CVE-2025-32434"),
        ({"torch": "2.7.0"}, FAIL, "torch 2.7.0 is older than 2.8; pip install"),
        ({"deepspeed": "0.18.2"}, FAIL, "deepspeed 0.18.2"),
        ({"transformers": "6.0.0"}, WARN, "transformers 6.0.0 (5.23.0)"),
        ({"datasets": None}, FAIL, "datasets is not installed"),
    ],
)
def test_versions(changed, level, words):
    found = {name: tested for name, (_, tested) in VERSIONS.items()} | changed
    verdict = machine.judge_versions({name: version for name, version in found.items() if version})
    assert verdict.level == level and words in verdict.text


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("found", "built_for", "needed_by", "level", "words"),
    [
        (Gpus([]), "", None, OK, "CPU"),
        (Gpus([]), "12.8", "model.load_in_4bit", FAIL, "model.load_in_4bit needs CUDA"),
        (Gpus([H100] * 8, "570.1", "12.8"), "12.8", None, OK, f"8 x {H100}"),
        (Gpus([H100], "550.1", "12.4"), "12.8", None, OK, "CUDA 12.4"),  # minor versions are compatible
        (Gpus([H100], "470.1", "11.4"), "12.8", None, FAIL, "install torch for CUDA 11"),
        (Gpus([H100], "570.1", "12.8"), "", None, WARN, "without CUDA"),
        (Gpus([H100, "NVIDIA A100"], "570.1", "12.8"), "12.8", None, WARN, "1 x NVIDIA A100"),
    ],
)
def test_gpus(found, built_for, needed_by, level, words):
    verdict = machine.judge_gpu(found, built_for, needed_by)
    assert verdict.level == level and words in verdict.text


def test_what_a_config_asks_of_a_machine_without_gpu(tmp_path):
    if machine.gpus().names:
        pytest.skip("there is a GPU")
    for override in ("train.optim=adamw_8bit", "model.attn_implementation=flash_attention_2"):
        verdict = CHECKS["gpu"](CheckContext(run_of(tmp_path, override)))
        assert verdict.level == FAIL and override.split("=")[0] in verdict.text
    for kernel in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        asked = run_of(tmp_path, f"model.attn_implementation={kernel}")
        assert CHECKS["attention"](CheckContext(asked)).level == FAIL


def test_compiler(tmp_path):
    nowhere = {"PATH": str(tmp_path)}
    assert CHECKS["compiler"](CheckContext(None, nowhere)).level == OK
    assert CHECKS["compiler"](CheckContext(run_of(tmp_path), nowhere)).level == OK
    verdict = CHECKS["compiler"](CheckContext(run_of(tmp_path, *OFFLOAD), nowhere))
    assert verdict.level == FAIL and "g++ and ninja" in verdict.text and "cpu_adam" in verdict.text


def test_stale_build_locks_are_named_and_left_alone(tmp_path):
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    builds, plain = CheckContext(run_of(tmp_path, *OFFLOAD), env), CheckContext(run_of(tmp_path), env)
    assert CHECKS["build locks"](builds).level == OK
    with open(lock, "w"):  # as torch's baton holds it while it builds
        assert places.holder_of(lock) == os.getpid()
        assert CHECKS["build locks"](builds).level == OK
    assert CHECKS["build locks"](builds).level == WARN  # perhaps of another container
    stuck = time.time() - 2 * machine.BUILD_SECONDS
    os.utime(lock, (stuck, stuck))
    verdict = CHECKS["build locks"](builds)
    assert verdict.level == FAIL and verdict.text.endswith(f"rm {lock}")
    assert CHECKS["build locks"](plain).level == OK  # compiles nothing
    old = time.time() - 2 * STALE_SECONDS
    os.utime(lock, (old, old))
    assert CHECKS["build locks"](builds).level == OK  # the engine removes it, and says so
    assert CHECKS["build locks"](CheckContext(None, env)).level == WARN
    assert lock.exists()


def test_an_accelerator_that_there_is_none_of(tmp_path):
    verdict = CHECKS["gpu"](CheckContext(None, {"DS_ACCELERATOR": "banana"}))
    assert verdict.level == FAIL and verdict.text.startswith("DS_ACCELERATOR: 'banana' is no accelerator; unset it")
    assert CHECKS["gpu"](CheckContext(None, {"DS_ACCELERATOR": "cpu"})).level != FAIL


def test_operators_are_loaded_from_no_folder_that_others_may_write(tmp_path):
    """What is there is code: in /tmp anybody may have been first."""
    context = CheckContext(None, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "builds")})
    assert CHECKS["build locks"](context).level == OK
    for mode, level in ((0o700, OK), (0o755, OK), (0o775, OK), (0o777, FAIL), (0o1777, FAIL)):
        (tmp_path / "builds").mkdir(exist_ok=True)
        (tmp_path / "builds").chmod(mode)
        assert CHECKS["build locks"](context).level == level, oct(mode)
    (tmp_path / "builds").chmod(0o700)
    if os.geteuid() == 0:
        os.chown(tmp_path / "builds", 65534, 65534)
        assert "belongs to user 65534" in CHECKS["build locks"](context).text or os.geteuid() == 65534
        assert CHECKS["build locks"](context).level == FAIL


# ---------------------------------------------------------------------------------------------------------------------
# Room


def test_weights_are_counted_without_loading_them(tmp_path):
    for family, extra in (("qwen2", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {"tie_word_embeddings": True}), (
        "qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    )):  # fmt: skip
        model = tiny_model(tiny_config(family, **extra), seed=1)
        real = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(tmp_path / family)
        section = run_of(tmp_path, f"model.name_or_path={tmp_path}/{family}").model
        assert footprint.count_weights(section) == real, family
        by_config = footprint.count_weights(section.model_copy(update={"init": "random"}))
        assert by_config and abs(by_config / real - 1) < 0.05, (family, by_config, real)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"text_config": 3}', b'{"num_attention_heads": 0}', b"\xff"])
def test_broken_models_are_left_to_those_who_read_them(content, tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes(content)
    for overrides in ([], ["model.init=random"], ["model.lora={r: 8}"]):
        broken = run_of(tmp_path, f"model.name_or_path={tmp_path}/m", "checkpoint.save_every=1", *overrides)
        assert CheckContext(broken).bytes_to_write is None
        assert CHECKS["disk"](CheckContext(broken)).level == CHECKS["memory"](CheckContext(broken)).level == OK


def test_a_disk_that_is_too_small_is_found_before_the_run(tmp_path):
    model = model_of(tmp_path / "m", **HUGE)
    huge = run_of(tmp_path, f"model.name_or_path={model}", "checkpoint.save_every=10")
    weights = footprint.count_weights(huge.model)
    assert weights and abs(weights / 70.6e9 - 1) < 0.02  # Llama 3 70B
    # Three checkpoints of masters and two moments, the export in bf16; at stage 2 the weights are in the checkpoint too.
    assert CheckContext(huge).bytes_to_write == weights * (3 * 12 + 2)
    assert CheckContext(run_of(tmp_path, f"model.name_or_path={model}")).bytes_to_write == weights * 2
    stage2 = ("deepspeed=ds_configs/zero2.json", "checkpoint.save_every=10", "train.max_steps=15", "checkpoint.keep_last=5")
    assert CheckContext(run_of(tmp_path, f"model.name_or_path={model}", *stage2)).bytes_to_write == weights * (2 * 14 + 2)
    # A reference that moves: masters; what it is, its mean and its beginning.
    for moves, size in (("sync_ref_model=true", 4), ("bema=true", 2 + 4 + 2), ("mode=engine", 0)):
        moving = run_of(tmp_path, f"model.name_or_path={model}", "checkpoint.save_every=10", f"reference.{moves}")
        assert CheckContext(moving).bytes_to_write == weights * (3 * (12 + size) + 2)
    adapter = run_of(tmp_path, f"model.name_or_path={model}", "model.lora={r: 8}", "checkpoint.save_every=10")
    assert (CheckContext(adapter).bytes_to_write or 0) < 0.1 * weights
    layers = run_of(tmp_path, f"model.name_or_path={model}", "checkpoint.save_every=10", "model.freeze=[layers]")
    still = footprint.count_weights(layers.model, ["layers"])
    assert still and 0.9 * weights < still < weights  # weights alone, without masters and moments
    assert CheckContext(layers).bytes_to_write == (weights - still) * 3 * 12 + still * 3 * 2 + weights * 2
    (tmp_path / "out" / "checkpoints" / "step-000010").mkdir(parents=True)
    assert CheckContext(huge).bytes_to_write == weights * (2 * 12 + 2)
    verdict = CHECKS["disk"](CheckContext(huge))
    assert verdict.level == FAIL and f"output_dir: {tmp_path}/out" in verdict.text and "keep_last" in verdict.text
    assert CHECKS["disk"](CheckContext(run_of(tmp_path, "model.name_or_path=some/model"))).level == OK  # not here yet


@pytest.mark.parametrize(
    ("free", "ranks", "level"),
    [(64 * 2**20, 1, OK), (64 * 2**20, 2, WARN), (64 * 2**20, 8, FAIL), (8 * GIGABYTE, 8, OK), (GIGABYTE - 1, 8, WARN)],
)
def test_shared_memory(free, ranks, level):
    verdict = preflight.judge_shared_memory(free, ranks)
    assert verdict.level == level and (level == OK or "--shm-size" in verdict.text)


def test_open_files():
    assert preflight.judge_open_files(1024).level == WARN and "ulimit -n 65536" in preflight.judge_open_files(1024).text
    assert preflight.judge_open_files(4096).level == preflight.judge_open_files(-1).level == OK


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_memory_of_a_container(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("1000000000\n")
    model = model_of(tmp_path / "m", **HUGE)
    context = CheckContext(run_of(tmp_path, f"model.name_or_path={model}", *OFFLOAD), cgroup=tmp_path)
    assert preflight.memory_limit(context) == 10**9
    assert CHECKS["memory"](context).level == WARN
    (tmp_path / name).write_text("max\n")
    assert (preflight.memory_limit(context) or 0) > 10**9


# ---------------------------------------------------------------------------------------------------------------------
# Folders and names


def test_folders_that_cannot_be_written(tmp_path):
    assert CHECKS["folders"](CheckContext(run_of(tmp_path))).level == OK
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]  # the probe is gone
    verdict = CHECKS["folders"](CheckContext(run_of(tmp_path, "output_dir=/proc/no/run")))
    assert verdict.level == FAIL and "output_dir: /proc/no/run cannot be written" in verdict.text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output_dir={}/link/run", "output_dir: {0}/link/run"),
        ("reference.store={}/link", "reference.store: {0}/link is a link that leads nowhere"),
        ("reference.store={}/run.yaml", "reference.store: {0}/run.yaml is a file"),
        ("reference.store=/proc/no/store", "reference.store: /proc/no/store cannot be written"),
    ],
)
def test_folders_that_lead_nowhere(override, said, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    verdict = CHECKS["folders"](CheckContext(run_of(tmp_path, override.format(tmp_path))))
    assert verdict.level == FAIL and verdict.text.startswith(said.format(tmp_path)), verdict.text


def test_folders_of_a_network(tmp_path, monkeypatch):
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    context = CheckContext(run_of(tmp_path, *OFFLOAD), {"TORCH_EXTENSIONS_DIR": f"{tmp_path}/builds"}, proc=tmp_path)
    verdict = CHECKS["local folders"](context)
    assert verdict.level == WARN and "is on nfs4" in verdict.text


def test_where_ranks_meet():
    assert CHECKS["meeting"](CheckContext(env={"MASTER_ADDR": "no.such.host.invalid"})).level == FAIL
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        assert CHECKS["meeting"](CheckContext(env=env)).level == WARN
    assert CHECKS["meeting"](CheckContext(env=env)).level == OK
    assert CHECKS["meeting"](CheckContext(env=env | {"MASTER_PORT": "99999"})).level == FAIL


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    wanted = run_of(tmp_path, "model.name_or_path=some/model")
    assert CHECKS["hub"](CheckContext(wanted, {})).level == OK
    verdict = CHECKS["hub"](CheckContext(wanted, {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_value_that_is_not_shown"}))
    assert verdict.level == FAIL and "some/model" in verdict.text and "a token is there" in verdict.text
    assert "not_shown" not in verdict.text
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(HUGE))
    assert CHECKS["hub"](CheckContext(wanted, {"HF_HUB_OFFLINE": "1"})).level == OK
    assert (footprint.count_weights(wanted.model) or 0) > 7e10


def test_wandb_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = run_of(tmp_path, "log.trackers=[wandb]")
    assert CHECKS["trackers"](CheckContext(asked, {})).level == WARN
    assert CHECKS["trackers"](CheckContext(asked, {"WANDB_MODE": "offline"})).level == OK
    assert CHECKS["trackers"](CheckContext(run_of(tmp_path), {})).level == OK


@pytest.mark.parametrize(
    ("text", "level"),
    [("HF_TOKEN=x", FAIL), ("FOO=hf_abcdefghijABCDEFGHIJklmnop1234", FAIL), ("NCCL_DEBUG=INFO\nHF_TOKEN=", OK)],
)
def test_secrets_for_the_launcher_of_deepspeed(text, level, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text(f"PATH=/bin\n{text}\n")
    verdict = CHECKS[".deepspeed_env"](CheckContext(env={}))
    assert verdict.level == level and "hf_abc" not in verdict.text
    assert level == OK or ".deepspeed_env:2: " in verdict.text


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_ranks_that_are_not_alike(tmp_path):
    one, hosts = agreement.identity(config.dump(run_of(tmp_path))), ["node0", "node0", "node1"]
    assert agreement.difference([one, one, one], hosts) is None
    other = agreement.identity(config.dump(run_of(tmp_path, "train.seed=7")))
    said = agreement.difference([one, one, other], hosts)
    assert said and said.startswith("rank 2 on node1 has the config ") and "rank 0 on node0" in said
    assert "torch 2.9.0" in (agreement.difference([one, one | {"torch": "2.9.0"}, one], hosts) or "")
    without = {name: version for name, version in one.items() if name != "deepspeed"}
    assert "deepspeed not installed" in (agreement.difference([one, one, without], hosts) or "")
    assert agreement.skew([100.0, 100.1, 104.0], hosts) is None
    assert "node1 (rank 2) is +9 s" in (agreement.skew([100.0, 100.1, 109.0], hosts) or "")


def test_complaints_of_machines_are_said_once_and_failures_first():
    few, full = Verdict(WARN, "few"), Verdict(FAIL, "full; free some")
    of_ranks = [{"files": few, "disk": Verdict(OK, "")}, {}, {"files": few, "disk": full}]
    assert preflight.complaints(of_ranks, ["a", "a", "b"]) == [
        (FAIL, "disk on b: full; free some"),
        (WARN, "files on a: few"),
    ]
    assert preflight.complaints([{"files": few}], ["a"]) == [(WARN, "files: few")]
    assert preflight.complaints([{"files": Verdict(OK, "many")}], ["a"]) == []


def test_a_start_on_a_good_machine_is_silent(tmp_path):
    found = preflight.examine(CheckContext(run_of(tmp_path), ranks=8), preflight.AT_START)
    assert preflight.complaints([found], ["here"]) == []


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-no-shape")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2abc@hub")
    report = doctor.examine(CheckContext(run_of(tmp_path, "output_dir=/proc/no/run")), "run.yaml")
    assert report["verdict"] == FAIL and set(report["checks"]) == set(CHECKS)
    text = doctor.as_text(report)
    assert json.loads(doctor.as_json(report))["checks"] == report["checks"]
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(OK))
    table = lines[begin : begin + len(CHECKS)]
    assert [line.split("  ")[0].strip() in (OK, WARN, FAIL) for line in table] == [True] * len(CHECKS)
    assert len({len(line) - len(line[6:].split("  ", 1)[1].lstrip()) for line in table}) == 1  # aligned
    assert "HF_TOKEN=***" in text and "HF_ENDPOINT=https://***@hub" in text
    for shown in (text, doctor.as_json(report)):
        assert "a-secret-of-no-shape" not in shown and "hunter2abc" not in shown


def test_the_command_answers_without_torch_and_with_an_exit_code(tmp_path):
    run_of(tmp_path)
    script = (
        "import sys; from dspref.cli import app\n"
        "try: app(['doctor', *sys.argv[1:], '--json'])\n"
        "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    for arguments, code in (([], 0), ([f"{tmp_path}/run.yaml", "output_dir=/proc/no/run"], 4), (["/no/such.yaml"], 2)):
        result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == code and "Traceback" not in result.stderr, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["checkpoints", "logs", "metrics.jsonl"])
def test_what_a_run_goes_on_to_write_is_tried_too(name):
    """The folder itself may be written, and still what is in it not."""
    # Not below pytest's own folder, which is root's alone: root may write anywhere, so the test is somebody else.
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        folder, own = Path(scratch), os.geteuid()
        folder.chmod(0o777)
        run = run_of(folder)
        inner = Path(run.output_dir) / name
        inner.parent.mkdir(mode=0o777)
        inner.parent.chmod(0o777)
        inner.touch() if "." in name else inner.mkdir()
        caches = {"DSPREF_CACHE": f"{scratch}/cache", "TORCH_EXTENSIONS_DIR": f"{scratch}/builds"}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in caches.items():
                patch.setenv(key, value)
            patch.setattr(tempfile, "tempdir", scratch)
            inner.chmod(0o777)
            assert preflight.check_folders(CheckContext(run)).level == OK
            inner.chmod(0o444 if "." in name else 0o555)
            if own == 0:
                os.seteuid(65534)
            try:
                verdict = preflight.check_folders(CheckContext(run))
            finally:
                os.seteuid(own)
        assert verdict.level == FAIL and str(inner) in verdict.text and "cannot be written" in verdict.text
        inner.rmdir() if inner.is_dir() else inner.unlink()


def test_a_file_where_a_run_keeps_its_checkpoints(tmp_path):
    run = run_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoints").touch()
    verdict = preflight.check_folders(CheckContext(run))
    assert verdict.level == FAIL and "is no folder" in verdict.text

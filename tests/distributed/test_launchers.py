"""The same train.py under every launcher, on machines that lack what one expects; trackers, good and bad."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    save_tiny(folder / "model", tiny_config("qwen2", save_tokenizer(folder / "tokenizer")), seed=1)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8, seed=2)))
    values = {
        "model": {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}},
        "train": {"pairs_per_step": 4, "max_steps": 2, "learning_rate": 1e-3},
        "output_dir": "unset",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell: nothing that a launcher, or these tests, have set."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {k: v for k, v in os.environ.items() if k not in launcher} | changes


def run(command: list[str], run_folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*command, f"output_dir={run_folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=clean_environment(**environment))


def assert_trained(done: subprocess.CompletedProcess[str], run_folder: Path, ranks: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and math.isclose(losses[0], math.log(2), abs_tol=1e-5)
    assert json.loads((run_folder / "run.json").read_text())["world_size"] == ranks
    assert (run_folder / "final" / "model.safetensors").exists()


def test_the_deepspeed_launcher_on_a_bare_machine(folder, tmp_path):
    """No compiler, no ninja, the launcher's port taken, a stale build lock in the user's cache; and few lines to read."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("deepspeed", "python", "python3"):
        (tools / tool).symlink_to(BIN / tool)
    for tool in ("bash", "sh", "env", "ssh", "which"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    lock = tmp_path / "cache" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        except OSError:
            pass  # somebody else has it: taken all the same
        command = ["deepspeed", "--num_gpus", "2", "launch/train.py", "--config", f"{folder}/run.yaml"]
        done = run(command, tmp_path / "run", PATH=str(tools), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert_trained(done, tmp_path / "run", ranks=2)
    # A remark on these rows is not on others.
    lines = [line for line in (done.stderr + done.stdout).splitlines() if not line.startswith("data: 3 x")]
    first_step = next(i for i, line in enumerate(lines) if "step 1/2" in line)
    assert first_step <= 12, "\n".join(lines[:first_step])
    assert "the first pair, scored tokens in [[ ]]" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert not [line for line in lines if "warning" in line.lower() and "[WARNING]" not in line]


@pytest.mark.slow
def test_plain_python_with_trackers(folder, tmp_path):
    command = [str(BIN / "python"), "launch/train.py", "--config", f"{folder}/run.yaml"]
    done = run([*command, "log.trackers=[wandb, tensorboard]"], tmp_path / "run", WANDB_MODE="offline")
    assert_trained(done, tmp_path / "run", ranks=1)
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_stop_the_run(folder, tmp_path):
    command = [str(BIN / "dspref"), "train", f"{folder}/run.yaml", "log.trackers=[wandb]"]
    done = run(command, tmp_path / "run", WANDB_MODE="nonsense")
    assert_trained(done, tmp_path / "run", ranks=1)
    assert done.stdout.count("wandb: switched off") == 1


@pytest.mark.slow
def test_torchrun(folder, tmp_path):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "launch/train.py"]
    assert_trained(run([*command, "--config", f"{folder}/run.yaml"], tmp_path / "run"), tmp_path / "run", ranks=2)


@pytest.mark.slow
def test_a_mistake_is_said_under_torchrun_by_the_first_rank_alone(folder, tmp_path):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "launch/train.py"]
    done = run([*command, "--config", f"{folder}/run.yaml", "train.lerning_rate=1"], tmp_path / "run")
    assert done.returncode and done.stderr.count("train.lerning_rate: unknown key; did you mean 'learning_rate'?") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_tasks_as_srun_starts_them(nodes, folder, tmp_path):
    """Two tasks, on one node or on two, each with what SLURM sets and the job script exports."""
    port, tasks = free_port(), []
    for rank in range(2):
        environment = clean_environment(
            SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank if nodes == 1 else 0), SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_TASKS_PER_NODE="2" if nodes == 1 else "1(x2)", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        command = [str(BIN / "python"), "launch/train.py", "--config", f"{folder}/run.yaml", f"output_dir={tmp_path}/run"]
        tasks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment))
    outputs = [task.communicate(timeout=150)[0] for task in tasks]
    done = subprocess.CompletedProcess([], max(task.returncode for task in tasks), "".join(outputs), "")
    assert_trained(done, tmp_path / "run", ranks=2)


@pytest.mark.slow
def test_one_task_in_an_interactive_job(folder, tmp_path):
    """`srun --pty bash` sets SLURM's variables for one task, and no MASTER_ADDR."""
    command = [str(BIN / "python"), "launch/train.py", "--config", f"{folder}/run.yaml"]
    done = run(command, tmp_path / "run", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1")
    assert_trained(done, tmp_path / "run", ranks=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

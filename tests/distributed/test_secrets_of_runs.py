"""Secrets are planted wherever a run could pick one up; afterwards they are in no file, log, tracker or report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import preference_rows, save_tokenizer, tiny_config

from dspref import config
from dspref.machine.context import CheckContext

pytestmark = pytest.mark.slow  # whole processes, as a user starts them

SECRETS = {  # made up
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanary0001",
    "WANDB_API_KEY": "ca7a1100ca7a1100ca7a1100ca7a1100ca7a1100",
    "DB_PASSWORD": "canary sings at dawn",
    "in .env": "sk-canary0123456789abcdefghij",
    "on the command line": "ca7a1111ca7a1111ca7a1111ca7a1111ca7a1111",
    "in the origin of the repository": "canary-origin-password",
    "in a comment of the config": "ghp_CanaryCanaryCanaryCanaryCanary0001",
    "in HTTPS_PROXY": "canary-proxy-password",
    "in .deepspeed_env": "canary-of-the-launcher",
}

# A program of the user's own, whose command line dspref does not read.
PROGRAM = """
import os, sys
from pathlib import Path
from dspref import config, distributed, launcher
from dspref.training import trainer

def job():
    trainer.train(config.load("run.yaml"), Path("run.yaml"))
    distributed.log("a library says " + os.environ["DB_PASSWORD"])
    raise ValueError("a bug with " + os.environ["HF_TOKEN"])

launcher.guarded(job)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with secrets in it, and a tiny run with wandb offline."""
    folder = tmp_path_factory.mktemp("project")
    tiny_config("qwen2", save_tokenizer(folder / "tokenizer")).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(4, seed=5)))
    values = {
        "model": {"name_or_path": "model", "tokenizer_name_or_path": "tokenizer", "init": "random", "dtype": "float32"},
        "data": {"train": {"path": "pairs.jsonl"}},
        "objective": {"name": "orpo"},  # without a reference: a step less
        "train": {"pairs_per_step": 2, "max_steps": 1},
        "checkpoint": {"save_every": 1},
        "log": {"trackers": ["wandb"], "project": "a-known-word"},
        "output_dir": "run",
    }
    comment = f"# {SECRETS['in a comment of the config']}\n"
    (folder / "run.yaml").write_text(comment + yaml.safe_dump(values))
    (folder / "program.py").write_text(PROGRAM)
    (folder / ".env").write_text(f"OPENAI_API_KEY={SECRETS['in .env']}\n")
    (folder / ".deepspeed_env").write_text(f"MY_TOKEN={SECRETS['in .deepspeed_env']}\n")
    origin = f"https://me:{SECRETS['in the origin of the repository']}@example.org/x.git"
    for command in (["init", "-q"], ["add", "."], ["remote", "add", "origin", origin]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def said(project: Path) -> dict[str, subprocess.CompletedProcess]:
    """What the run and the doctor printed."""
    home = project / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "WANDB_DIR"} | {
        **{name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")},
        "HTTPS_PROXY": f"http://me:{SECRETS['in HTTPS_PROXY']}@127.0.0.1:1",
        **{"HOME": str(home), "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    }
    dspref = str(Path(sys.executable).parent / "dspref")
    commands = {
        "run": [sys.executable, "program.py", "--wandb-key", SECRETS["on the command line"]],
        "doctor": [dspref, "doctor", "run.yaml"],
        "json": [dspref, "doctor", "run.yaml", "--json"],
    }
    options = {"cwd": project, "env": env, "capture_output": True, "text": True, "timeout": 240}
    return {name: subprocess.run(command, **options) for name, command in commands.items()}


def test_the_run_leaves_no_secret(project, said):
    run = project / "run"
    assert (run / "final" / "model.safetensors").exists(), said["run"].stdout + said["run"].stderr
    planted = {project / name for name in ("run.yaml", ".env", ".deepspeed_env")}
    files = [path for path in project.rglob("*") if path.is_file() and ".git" not in path.parts and path not in planted]
    assert len(files) > 25
    contents = {path: path.read_bytes() for path in files}
    for where, secret in SECRETS.items():
        for path, content in contents.items():
            assert secret.encode() not in content, (where, path)
    # The search finds what is there, in wandb's files too.
    wandb = [path for path in files if "wandb" in path.parts]
    assert any(b"a-known-word" in contents[path] for path in wandb if path.suffix == ".wandb")
    assert any(b"--wandb-key" in contents[path] for path in wandb)
    assert "a library says ***" in (run / "logs" / "rank-0.log").read_text()


def test_nothing_that_is_printed_has_a_secret(said):
    for name, result in said.items():
        for where, secret in SECRETS.items():
            assert secret not in result.stdout + result.stderr, (name, where)
    assert "a library says ***" in said["run"].stdout
    assert "ValueError: a bug with ***" in said["run"].stderr
    report = json.loads(said["json"].stdout)
    assert report["environment"]["HF_TOKEN"] == "***"
    assert report["environment"]["HTTPS_PROXY"] == "http://***@127.0.0.1:1"
    assert (
        report["checks"][".deepspeed_env"]["level"] == "FAIL" and said["json"].returncode == said["doctor"].returncode == 4
    )


def test_the_estimate_of_disk_is_what_the_run_wrote(project, said, monkeypatch):
    """A checkpoint, the export, and the weights that were drawn; the rest is kilobytes."""
    monkeypatch.chdir(project)
    estimated = CheckContext(config.load("run.yaml", ["output_dir=elsewhere"])).bytes_to_write
    assert estimated
    written = sum(
        path.stat().st_size for path in (project / "run").rglob("*") if path.is_file() and "wandb" not in path.parts
    )
    assert 0.85 * written < estimated < 1.15 * written

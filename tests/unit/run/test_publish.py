"""`dspref push`, against a stand-in of the hub: what is there afterwards, private unless asked for, and no token told."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub import Hub

from dspref.run import publish

TOKEN = "hf_" + "q" * 34
SUMMARY = {"step": 3, "seconds": 1.0, "seconds_in_steps": 0.5, "starts": 1, "tail": 1, "warnings": [], "speed": {}}
LFS = b"\x08\0\0\0\0\0\0\0{}      weights"


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub(TOKEN)
    found.bases["some/base"] = "apache-2.0"
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, as far as it is looked at."""
    run = tmp_path / "mine"
    (run / "final").mkdir(parents=True)
    card = "---\nlibrary_name: transformers\ntags: [dspref]\n---\n# mine\n\nTrained.\n"
    files = {"final/model.safetensors": LFS, "final/config.json": b"{}", "final/README.md": card.encode()}
    for name, content in files.items():
        (run / name).write_bytes(content)
    exported = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    learned = {"eval_rewards/accuracies": [0.5, 0.75], "eval_loss": [0.7, 0.6], "loss": [0.7, 0.5]}
    said = {"run_id": "1", "state": "finished", "exported": exported, "summary": SUMMARY | {"learned": learned}}
    (run / "run.json").write_text(json.dumps(said))
    config = {
        "model": {"name_or_path": "some/base"},
        "data": {"train": [{"path": "some/pairs"}, {"path": f"{tmp_path}/own.jsonl"}]},
        "objective": {"name": "simpo"},
        "output_dir": str(run),
    }
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    return run


def push(hub: Hub, run: Path, *arguments: str, token: str = TOKEN) -> tuple[int, str]:
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run.parent / "hf")}
    command = [sys.executable, "-m", "dspref", "push", str(run), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert TOKEN not in said and "hf_" not in said, said
    return done.returncode, said


def test_the_accuracy_is_that_of_the_exported_weights(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 2, "eval_rewards/accuracies": 0.9}\n{"step": 4, "eval_loss": 1.0}\n')
    summary = json.loads((run / "run.json").read_text())["summary"] | {"step": 4}
    assert publish.held_out_of(run, summary) == {"eval_rewards/accuracies": 0.75, "eval_loss": 0.6}
    assert publish.held_out_of(run, summary | {"weights_of": 2}) == {"eval_rewards/accuracies": 0.9}


def test_weights_and_card_are_there_private(hub: Hub, run: Path) -> None:
    assert push(hub, run, "me/mine") == (0, f"{run / 'final'} -> {hub.url}/me/mine\n")
    repo = hub.repos["me/mine"]
    assert repo["private"] is True and repo["files"].keys() == {"model.safetensors", "config.json", "README.md"}
    assert repo["files"]["model.safetensors"] == LFS
    card = repo["files"]["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "some/base" and front["license"] == "apache-2.0" and front["datasets"] == ["some/pairs"]
    assert front["tags"] == ["dspref", "preference-optimization", "simpo"] and front["metrics"] == ["accuracy"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert card.endswith("# mine\n\nTrained.\n") and str(run.parent) not in card.split("---\n")[1]
    assert push(hub, run, "me/mine")[0] == 0, "again"


@pytest.mark.slow
def test_public_only_where_somebody_says_so(hub: Hub, run: Path) -> None:
    assert push(hub, run, "me/open", "--public")[0] == 0 and hub.repos["me/open"]["private"] is False
    hub.repos["me/open"]["files"].clear()
    code, said = push(hub, run, "me/open")
    assert code == 2 and "public; give --public" in said and not hub.repos["me/open"]["files"]


@pytest.mark.slow
def test_what_is_refused_is_one_line(hub: Hub, run: Path) -> None:
    def refused(code: int, words: str, *arguments: str, token: str = TOKEN) -> None:
        found, said = push(hub, run, *arguments, token=token)
        assert found == code and words in said and said.count("\n") == 1, said

    refused(4, "refuses the token (401)", "me/mine", token="hf_" + "w" * 34)
    refused(4, "export HF_TOKEN", "me/mine", token="")
    refused(2, "owner/name", "mine")
    (run / "final/config.json").write_text("{} ")
    refused(7, "is not what the run wrote", "me/mine")
    (run / "run.json").write_text('{"run_id": "1", "state": "running"}')
    refused(2, "is not finished", "me/mine")
    assert not hub.repos


def test_a_card_keeps_what_is_not_known_better() -> None:
    card = publish.with_metadata("---\nlanguage: de\ntags: [a]\n---\ntext\n", {"tags": ["b"], "license": "mit"})
    assert card == "---\nlanguage: de\ntags:\n- b\nlicense: mit\n---\ntext\n"
    assert publish.with_metadata("text", {"a": 1}) == "---\na: 1\n---\ntext"


@pytest.mark.slow
def test_a_run_pushes_its_model_when_it_is_done(hub: Hub, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    root = Path(__file__).resolve().parents[3]

    def train(run: str, **more: str) -> tuple[int, str]:
        words = [f"output_dir={tmp_path / run}", "export.push_to_hub=me/mine", "train.max_steps=1", "data.eval=null"]
        words += ["train.eval_every=null", "log.samples=0", "log.every=1"]
        command = [sys.executable, "-m", "dspref", "train", "launch/configs/quickstart.yaml", *words]
        done = subprocess.run(command, cwd=root, env=env | more, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert "Traceback" not in said and "hf_" not in said, said
        return done.returncode, said

    code, said = train("none")
    assert code == 4 and "upload: export.push_to_hub: no token; export HF_TOKEN" in said and not (tmp_path / "none").exists()
    code, said = train("one", HF_TOKEN="hf_" + "x" * 34)
    again = f"`dspref push {tmp_path / 'one'} me/mine` uploads it"
    assert code == 0 and "warning: export.push_to_hub: me/mine: the hub refuses the token (401)" in said and again in said
    assert not hub.repos and (tmp_path / "one/final/model.safetensors").is_file()
    code, said = train("two", HF_TOKEN=TOKEN)
    assert code == 0 and f"pushed  {hub.url}/me/mine\n" in said
    assert hub.repos["me/mine"]["private"] is True and "model.safetensors" in hub.repos["me/mine"]["files"]

"""docs/memory.md says what is so: its commands run on its run, and print what stands below them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspref.cli import app

DOC = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False, "max_position_embeddings": 32_768,
}  # fmt: skip


def commands() -> list[str]:
    return re.findall(r"^    dspref (plan .*)$", DOC.read_text(encoding="utf-8"), flags=re.M)


def printed() -> dict[str, str]:
    """Command -> the block right below it."""
    return dict(
        re.findall(r"^    dspref (plan [^\n]*)\n\n```\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.M | re.S)
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document's run in a folder of its own, and its model's config in the hub's cache."""
    prepare(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(folder: Path) -> None:
    snapshot = folder / "hub" / "hub" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN))
    (example,) = re.findall(r"```yaml\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.S)
    (folder / "run.yaml").write_text(example)


def said(command: str) -> str:
    result = CliRunner().invoke(app, command.split(), prog_name="dspref")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command: str, run: Path) -> None:
    output = said(command)
    assert json.loads(output)["machine"]["ranks"] == 32 if "--format json" in command else "fits" in output
    assert not (run / "runs").exists(), "a plan writes nothing"


@pytest.mark.parametrize("command", printed())
def test_what_stands_below_a_command_is_what_it_prints(command: str, run: Path) -> None:
    assert stripped(said(command)) == stripped(printed()[command])


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_the_document_has_output() -> None:
    assert len(printed()) == 3 and len(commands()) == 6


if __name__ == "__main__":  # write the output anew: python tests/unit/test_memory_doc.py FOLDER
    prepare(Path(sys.argv[1]))
    os.environ["HF_HOME"] = str(Path(sys.argv[1]) / "hub")
    os.chdir(sys.argv[1])
    text = DOC.read_text(encoding="utf-8")
    for command, old in printed().items():
        new = "\n".join(stripped(said(command))) + "\n"
        text = text.replace(f"    dspref {command}\n\n```\n{old}```", f"    dspref {command}\n\n```\n{new}```")
    DOC.write_text(text, encoding="utf-8")

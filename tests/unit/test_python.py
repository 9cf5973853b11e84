"""docs/python.md says what is so: its blocks run, in their order, and what they print is right."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(program: str, clone: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=clone, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_blocks_run_and_agree_with_transformers(clone: Path) -> None:
    """Two runs in one process, and what is beside them."""
    assert len(BLOCKS) == 5
    begin, scored, logps, *_ = BLOCKS
    again = begin.replace("from-python", "again")
    check = """
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained("runs/from-python/final", dtype=torch.float32)
for k, pair in enumerate(pairs):
    for side, found in (("chosen", logps.chosen), ("rejected", logps.rejected)):
        answer = torch.tensor(getattr(pair, side)).long()
        ids = torch.cat([torch.tensor(pair.prompt).long(), answer])
        with torch.no_grad():
            all_logps = plain(ids[None]).logits[0].log_softmax(-1)
        own = all_logps[len(pair.prompt) - 1 : -1].gather(1, answer[:, None]).sum()
        assert abs(own - found[k]) < 1e-4, (own, found[k])
print("agreed")
"""
    said = run("\n".join([begin, again, scored, logps, "import torch", check]), clone)
    assert said.rstrip().endswith("agreed")
    for name in ("from-python", "again"):
        assert (clone / "runs" / name / "final" / "model.safetensors").is_file()
    weights = [(clone / "runs" / name / "final" / "model.safetensors").read_bytes() for name in ("from-python", "again")]
    assert weights[0] == weights[1]
    assert list((clone / "runs" / "store").rglob("*"))


def test_the_pure_blocks(clone: Path) -> None:
    """The loss of the example by hand: the margin of the log-ratios is (-11 + 14) - (-12 + 13) = 2, times beta."""
    *_, loss, pack = BLOCKS
    said = run(loss, clone)
    by_hand = math.log1p(math.exp(-0.1 * 2))
    assert f"{by_hand:.4f}" in said and "0.1000" in said, said
    said = run(pack, clone)
    assert said.count("tensor(") == 7


def test_importing_dspref_loads_no_torch() -> None:
    program = (
        "import sys, dspref, dspref.data, dspref.model, dspref.objectives, dspref.config; "
        "from dspref import load_config; assert 'torch' not in sys.modules; "
        "from dspref.model import PackedCausalLM; assert 'torch' in sys.modules; "
        "import dspref.data as data; assert set(data.__all__) and all(getattr(data, name) for name in data.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    import dspref

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dspref.nothing  # noqa: B018
    assert torch.is_tensor(torch.zeros(1)) and callable(dspref.train)

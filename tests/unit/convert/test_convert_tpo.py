"""Configs of TRL's TPO trainer, which trains on a gold answer beside each pair: what `dspref convert` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspref import config
from dspref.config.load import examine
from dspref.config.yaml12 import parse
from dspref.convert.conversion import convert

NEEDS = "rows need a gold answer, in the column `reference` as there"
# File -> (its text, key -> value in the result, words of its comments, and words that are in none).
FILES: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "tpo.yaml": (
        "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\nloss_type: tpo-l\nbeta: 0.02\ntpo_alpha: 0.5\n"
        "tpo_l_gamma: 0.3\nlabel_smoothing: 0.1\nper_device_train_batch_size: 4\n",
        {"name": "tpo", "loss_type": "tpo_l", "beta": 0.02, "tpo_alpha": 0.5, "tpo_l_gamma": 0.3, "label_smoothing": 0.1,
         "train.pairs_per_step": 32, "train.learning_rate": 5e-7, "data.max_length": 1024, "data.shuffle": True},
        [NEEDS, "theirs is one over each micro-batch"],
        ["no such term", "single answers"],
    ),
    "tpo.py": (
        "from trl.experimental.tpo import TPOConfig, TPOTrainer\n"
        "args = TPOConfig(output_dir='o', precompute_ref_log_probs=True)\nTPOTrainer(model='m', args=args)\n",
        {"name": "tpo", "loss_type": "sigmoid", "beta": 0.01, "tpo_alpha": 1.0, "model.name_or_path": "m"},
        [NEEDS, "beta 0.01", "precompute_ref_log_probs: true -- tpo needs no reference"],
        [],
    ),
    "gamma.yaml": (
        "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\nloss_type: ipo\ntpo_l_gamma: 0.3\n"
        "label_smoothing: 0.1\n",
        {"name": "tpo", "loss_type": "ipo", "label_smoothing": 0.0},
        ["tpo_l_gamma: 0.3 -- has no effect on this loss", "label_smoothing: 0.1"],
        [],
    ),
    "named/tpo-qwen.yaml": (
        "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\nloss_type: hinge\n",
        {"name": "tpo", "loss_type": "hinge"},
        [NEEDS],
        [],
    ),
    "no_gold.py": (
        "args = TPOConfig(output_dir='o', loss_type='ipo', tpo_alpha=0.0)\nTPOTrainer(model='m', args=args)\n",
        {"name": "cpo", "loss_type": "ipo", "beta": 0.01, "cpo_alpha": 0.0},
        ["tpo_alpha: 0 leaves gold answers out: it is CPO without its NLL"],
        [NEEDS],
    ),
    "no_gold_l.yaml": (
        "model_name_or_path: m\ndataset_name: d.jsonl\noutput_dir: o\nloss_type: tpo-l\ntpo_alpha: 0\nbeta: 2\n"
        "label_smoothing: 0.1\n",
        {"name": "simpo", "loss_type": "simpo", "beta": 2, "simpo_gamma": 0.5, "label_smoothing": 0.1},
        ["tpo_alpha: 0 leaves gold answers out: it is SimPO"],
        [NEEDS],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_configs_of_gold_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("named").mkdir()
    Path("d.jsonl").write_text('{"prompt": "q", "reference": "c", "chosen": "a", "rejected": "b"}\n')
    text, values, words, absent = FILES[name]
    Path(name).write_text(text)
    made = convert(Path(name))
    Path("made.yaml").write_text(made.replace(": FILL_IN/", ": me/"))
    assert not examine(parse(Path("made.yaml"))[0])[1], made
    loaded = config.load("made.yaml")
    for key, value in values.items():
        found: Any = loaded if "." in key else loaded.objective
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, (key, found, made)
    comments = " ".join(line.strip("# ") for line in made.splitlines() if line.lstrip().startswith("#"))
    assert [word for word in words if word not in comments] == [], comments
    assert [word for word in absent if word in comments] == [], comments

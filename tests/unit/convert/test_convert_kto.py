"""Configs of KTO and BCO, which train on single answers: what `dspref convert` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspref import config
from dspref.config.load import examine
from dspref.config.yaml12 import parse
from dspref.convert.conversion import convert

OPENRLHF = "deepspeed --module openrlhf.cli.train_kto --save_path o --pretrain m --bf16 --dataset d"
# File -> (its text, key -> value in the result, words of its comments).
FILES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "trl.yaml": (
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.2\ndesirable_weight: 1.5\nlabel_smoothing: 0.1\n"
        "per_device_train_batch_size: 4\n",
        {"name": "kto", "loss_type": "kto", "beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 1.0,
         "train.pairs_per_step": 32, "train.learning_rate": 1e-6, "data.shuffle": False, "data.max_length": 1024},
        ["for each micro-batch of a GPU; here the step has one", "KTO has no such term here", "of a row that is a pair"],
    ),
    "apo.yaml": (
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nloss_type: apo_zero_unpaired\n"
        "train_sampling_strategy: random\n",
        {"name": "kto", "loss_type": "apo_zero_unpaired", "beta": 0.1, "data.shuffle": True},
        [],
    ),
    "kto.py": (
        "args = KTOConfig(output_dir='o', loss_type='kto', undesirable_weight=1.2)\nKTOTrainer(model='m', args=args)\n",
        {"name": "kto", "undesirable_weight": 1.2, "model.name_or_path": "m"},
        [],
    ),
    "trainer.py": (
        "args = TrainingArguments(output_dir='o')\nKTOTrainer(model='m', args=args, beta=0.3, desirable_weight=1.3)\n",
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.3},
        [],
    ),
    "bco.py": (
        "args = BCOConfig(output_dir='o', min_density_ratio=0.4)\nBCOTrainer(model='m', args=args)\n",
        {"name": "bco", "beta": 0.1, "train.learning_rate": 5e-7, "data.shuffle": False},
        ["min_density_ratio: 0.4", "theirs moves BCO's threshold with each micro-batch"],
    ),
    "trl.sh": (
        "accelerate launch --num_processes 2 trl kto --model_name_or_path m --dataset_name d --output_dir o\n",
        {"name": "kto", "train.pairs_per_step": 16},
        [],
    ),
    "factory.yaml": (
        "model_name_or_path: m\nstage: kto\npref_beta: 0.3\nkto_chosen_weight: 1.1\nkto_rejected_weight: 2.0\n"
        "finetuning_type: lora\ndataset: chats,texts,named\noutput_dir: o\npref_ftx: 0.1\n",
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.1, "undesirable_weight": 2.0, "data.shuffle": True,
         "data.train_sources.0.columns.named": {"label": "good"},
         "data.train_sources.1.columns.named": {"label": "tag", "prompt": "instruction", "completion": "output"},
         "data.train_sources.2.columns.named": {"label": "kto_tag", "completion": "talk"}},
        ["pref_ftx: 0.1 -- KTO has no such term here", "texts: theirs adds the column input to the prompt"],
    ),
    "pairs.yaml": (
        "model_name_or_path: m\nstage: dpo\npref_loss: kto_pair\nfinetuning_type: full\ndataset: d\noutput_dir: o\n",
        {"name": "kto", "loss_type": "kto", "data.train_sources.0.columns.named": {}},
        ["kto_pair: a pair counts as a desirable and an undesirable answer"],
    ),
    "axolotl.yaml": (
        "base_model: m\nrl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\nmicro_batch_size: 2\nsequence_len: 1024\n"
        "datasets:\n- {path: d, type: llama3.ultra}\n- {path: d, type: chatml.argilla}\n"
        "- {path: d, type: {field_prompt: q, field_completion: a, field_label: good, prompt_format: 'Q {q}'}}\n"
        "output_dir: o\n",
        {"name": "kto", "beta": 0.5, "desirable_weight": 0.2, "train.pairs_per_step": 16,
         "data.train_sources.0.columns.named": {}, "data.train_sources.1.columns.named": {"prompt": "instruction"},
         "data.train_sources.2.columns.named": {"prompt": "q", "completion": "a", "label": "good"}},
        ['prompt_format: "Q {q}"'],
    ),
    "rlhf.sh": (
        f"{OPENRLHF} --train_batch_size 256 --beta 0.1 --output_key response --label_key good --desirable_loss_weight 1.5\n",
        {"name": "kto", "beta": 0.1, "desirable_weight": 1.5, "train.pairs_per_step": 256, "data.max_length": 2048,
         "data.train_sources.0.columns.named": {"prompt": "input", "completion": "response", "label": "good"}},
        ["reads this, and trains with 1"],
    ),
    "rlhf_bare.sh": (
        f"{OPENRLHF} --zero_stage 3\n",
        {"name": "kto", "beta": 0.01, "train.pairs_per_step": 128,
         "data.train_sources.0.columns.named": {"prompt": "instruction", "completion": "response", "label": "score"}},
        ["beta 0.01"],
    ),
    "named/kto-qwen.yaml": (
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 5e-6\n",
        {"name": "kto", "train.learning_rate": 5e-6},
        [],
    ),
    "named/dpo-with-bco.yaml": (
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o/dpo-bco\nloss_type: bco_pair\n",
        {"name": "dpo", "loss_type": "bco_pair"},
        [],
    ),
}  # fmt: skip
INFO = {
    "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"}},
    "texts": {"file_name": "texts.json", "columns": {"kto_tag": "tag"}},
    "named": {"file_name": "named.json", "formatting": "sharegpt", "columns": {"messages": "talk"}},
}


@pytest.mark.parametrize("name", FILES)
def test_configs_of_single_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "named"):
        Path(folder).mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    for stem in ("chats", "texts", "named", "d"):
        Path(f"data/{stem}.json").write_text('[{"prompt": "q", "completion": "a", "label": true}]')
    text, values, words = FILES[name]
    Path(name).write_text(text)
    made = convert(Path(name))
    Path("made.yaml").write_text(made.replace(": FILL_IN/", ": me/"))
    assert not examine(parse(Path("made.yaml"))[0])[1], made
    loaded = config.load("made.yaml")
    for key, value in values.items():
        found: Any = loaded if "." in key else loaded.objective
        for part in key.split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        assert found == value, (key, found, made)
    comments = " ".join(line.strip("# ") for line in made.splitlines())
    for word in words:
        assert word in comments, (word, comments)

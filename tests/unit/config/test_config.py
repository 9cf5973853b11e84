"""From a YAML file to a `Config`, or to one line that says where and why not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dspref import config
from dspref.config import Config, yaml12
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.sections import OBJECTIVE_SECTIONS
from dspref.errors import ConfigError
from dspref.objectives import OBJECTIVES, build_objective

ROOT = Path(__file__).resolve().parents[3]

MINIMAL = """\
model: {name_or_path: m}
data:
  train: {path: p.jsonl}
output_dir: out
"""

# The YAML block of the design's section 3, whole.
EXAMPLE = """\
model:
  name_or_path: Qwen/Qwen2.5-7B-Instruct    # folder or hub id
  revision: null
  tokenizer_name_or_path: null              # default: the model's
  chat_template: null                       # default: the tokenizer's; or a path
  init: pretrained                          # pretrained | random (weights from the config alone)
  dtype: bfloat16                           # bfloat16 | float32 | float16
  attn_implementation: auto                 # auto | flash_attention_2 | flash_attention_3 | torch_varlen | sdpa
  gradient_checkpointing: true
  disable_dropout: true                     # true: base model only | all: LoRA dropout too | false
  router_aux_loss_coef: null                # null: the model's own when it has a router; 0 turns it off
  lora: null                                # {r, lora_alpha, lora_dropout, target_modules, ...}, as in peft
  trust_remote_code: false
reference:
  mode: auto              # auto | stored | engine | adapter | none     (auto: what the objective needs, cheapest first)
  name_or_path: null      # default: the policy's initial weights
  offload: none           # none | cpu
  store: null             # folder of the reference store; default inside the cache
  sync_ref_model: false   # TR-DPO
  ref_model_mixup_alpha: 0.6
  ref_model_sync_steps: 512
data:
  train:                  # a list is a mixture
    - path: data/pairs.jsonl          # file, glob, folder or hub id
      split: null
      max_samples: null
      weight: 1.0
      columns: {prompt: prompt, chosen: chosen, rejected: rejected}
      template: null                  # {prompt: "Translate: {input}", chosen: "{good}", rejected: "{bad}", system: "..."}
  eval: null              # one source, or {name: source}
  max_length: 2048
  max_prompt_length: null
  max_completion_length: null
  truncation_mode: keep_end           # which end of the prompt survives
  tokens_per_pack: 16384
  prefix_sharing: auto                # auto | true | false
  shuffle: true
  on_bad_row: error       # error | drop
objective:
  name: dpo               # dpo | cpo | simpo | orpo ; the other keys depend on it
  loss_type: sigmoid      # or a list, with loss_weights
  beta: 0.1
train:
  pairs_per_step: 128     # the global batch
  num_train_epochs: 1
  max_steps: null
  learning_rate: 5.0e-7
  lr_scheduler_type: linear
  warmup_ratio: 0.1
  weight_decay: 0.0
  max_grad_norm: 1.0
  optim: adamw            # adamw | adamw_8bit | cpu_adam ...
  seed: 42
  eval_every: null
deepspeed: ds_configs/zero3.json      # or a mapping; batch size, precision, optimizer, clipping belong to this file's other sections
checkpoint: {save_every: null, keep_last: 2, resume: auto}
log: {every: 1, trackers: [], project: dspref, run_name: null}
output_dir: runs/example
"""  # noqa: E501


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a config file into an empty working directory; its path, as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "x.yaml") -> Path:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path(name)

    return write


def with_data(lines: str) -> str:
    return MINIMAL.replace("output_dir", f"  {lines}\noutput_dir")


def with_model(key: str) -> str:
    return MINIMAL.replace("name_or_path: m", f"name_or_path: m, {key}")


def with_train(source: str) -> str:
    return MINIMAL.replace("{path: p.jsonl}", source)


def with_reference(section: str, model: str = "") -> str:
    return (with_model(model) if model else MINIMAL) + f"reference: {section}\n"


def with_objective(section: str, more: str = "") -> str:
    return MINIMAL + f"objective: {section}\n{more}"


def refusal(path: Path, *overrides: str) -> str:
    """The message of a refused config, which is one line and exits with 2."""
    with pytest.raises(ConfigError) as error:
        config.load(path, overrides)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


# ------------------------------------------------------------------------------------------------------ good files


def test_the_designs_example_loads(write) -> None:
    loaded = config.load(write(EXAMPLE))
    assert loaded.model.name_or_path == "Qwen/Qwen2.5-7B-Instruct"
    assert loaded.train.learning_rate == 5e-7
    assert loaded.train.num_train_epochs == 1.0
    assert [source.path for source in loaded.data.train_sources] == ["data/pairs.jsonl"]
    assert loaded.deepspeed == "ds_configs/zero3.json"
    assert loaded.zero_stage == 3


def test_the_example_spells_out_the_defaults(write) -> None:
    """What a user leaves out is what the example says."""
    short = (
        with_train("[{path: data/pairs.jsonl}]")
        .replace(" m}", " Qwen/Qwen2.5-7B-Instruct}")
        .replace("out\n", "runs/example\n")
    )
    assert config.load(write(EXAMPLE)) == config.load(write(short, "short.yaml"))


def test_sources_are_called_by_the_last_part_of_their_path(write) -> None:
    paths = "[data/hard.jsonl, other/hard.json.gz, Org/set-v1.5, data/hard-2.csv, runs/, {path: data/hard.jsonl, weight: 2}]"
    labels = config.load(write(with_train(paths))).data.labels
    assert labels == ["hard", "hard-2", "set-v1.5", "hard-2-2", "runs", "hard-3"]


def test_sources_one_and_many(write) -> None:
    one = config.load(write(with_data("eval: {path: q.jsonl}"))).data
    assert [s.path for s in one.train_sources] == ["p.jsonl"]
    assert {name: s.path for name, s in one.eval_sources.items()} == {"eval_": "q.jsonl"}
    many = config.load(
        write(
            with_train("[{path: a, weight: 2.5}, {path: b}]").replace(
                "output", "  eval: {x: {path: q}, y: {path: r}}\noutput"
            )
        )
    ).data
    assert [(s.path, s.weight) for s in many.train_sources] == [("a", 2.5), ("b", 1.0)]
    assert {name: s.path for name, s in many.eval_sources.items()} == {"eval_x_": "q", "eval_y_": "r"}


def test_a_config_is_frozen(write) -> None:
    loaded = config.load(write(MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        loaded.train.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        loaded.output_dir = "y"  # type: ignore[misc]


# Every loss of every objective, and what modifies them.
OBJECTIVE_FILES = [
    *(with_objective(f"{{name: {n}, loss_type: {loss}}}") for n, family in OBJECTIVES.items() for loss in family.losses),
    *(
        with_objective(section)
        for section in (
            "{beta: 0.2}",  # dpo, unless named
            "{name: dpo, beta: 1, label_smoothing: 0.1, reference_free: true, ld_alpha: 0.5}",
            "{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.3, rpo_alpha: 0.005}",
            "{f_divergence_type: alpha_divergence}",
            "{f_divergence_type: js_divergence, loss_type: [sigmoid, sft]}",
            "{f_divergence_type: reverse_kl, use_weighting: false, loss_type: aot}",  # said, and nothing but the defaults
            "{loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1]}",
            "{loss_type: [sigmoid], loss_weights: [0.5]}",
            "{loss_type: hinge, loss_weights: [0.5]}",
            "{loss_type: [sigmoid, exo_pair]}",  # each with its own label_smoothing
            "{loss_type: [sigmoid, exo_pair, robust], label_smoothing: 0.1, use_weighting: true}",
            "{loss_type: exo_pair, label_smoothing: 0.2}",
            "{loss_type: ipo, ipo_length_normalize: false}",
            "{loss_type: discopop, discopop_tau: 0.1}",
            "{rpo_alpha: null, label_smoothing: null, loss_weights: null, ld_alpha: 0}",
            "{name: cpo, cpo_alpha: 0, label_smoothing: 0.1}",
            "{name: cpo, loss_type: simpo, beta: 10, simpo_gamma: 5.4, cpo_alpha: 0.05}",
            "{name: cpo, loss_type: simpo, beta: null, gamma_beta_ratio: 0.25}",
            "{name: cpo, loss_type: ipo, alpha: -0.5}",
            "{name: simpo, simpo_gamma: 0, alpha: 0.25, label_smoothing: 0.1}",
            "{name: simpo, gamma_beta_ratio: 0.8, simpo_gamma: null}",
            "{name: orpo, beta: 0.05, nll_on_prompt: false}",
        )
    ),
    with_objective("{name: simpo}", "reference: {mode: none}\n"),
    with_objective("{reference_free: true}", "reference: {mode: none}\n"),
    with_objective("{reference_free: true}", "reference: {mode: auto}\n"),
    with_objective("{loss_type: ipo}", "reference: {mode: engine, name_or_path: r}\n"),
]

RESOLVED = [
    *OBJECTIVE_FILES,
    MINIMAL,
    EXAMPLE,
    MINIMAL + "train: {warmup_steps: 3}\n",
    MINIMAL + "train: {warmup_ratio: 0.2, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}}\n",
    MINIMAL + "train: {lr_scheduler_type: constant}\n",
    MINIMAL + "objective: {rpo_alpha: 1.0, label_smoothing: 0.1}\n",
    MINIMAL + "reference: {mode: stored}\n",
    with_model("lora: {r: 8, lora_alpha: 16, target_modules: [q_proj], modules_to_save: [lm_head], use_dora: true}"),
    with_model("lora: {path: a, lora_dropout: 0.1}, adapter_name: b, disable_dropout: false"),
    with_reference("{mode: adapter, adapter_name: base}", "lora: {path: a}"),
    with_reference("{mode: adapter, name_or_path: b, adapter_name: c}", "lora: {}"),
    with_reference("{sync_ref_model: true, ref_model_mixup_alpha: 0.6, offload: cpu}"),
    with_reference("{bema: true, mode: engine}"),
    with_reference("{bema: {update_freq: 10, ref_model_update_freq: 400, min_ema_multiplier: 0.1}}"),
    with_model("lora: {}, load_in_4bit: true") + "deepspeed: ds_configs/zero2.json\ntrain: {optim: adamw_8bit}\n",
    MINIMAL + "deepspeed: {zero_optimization: {stage: 2}}\n",
    with_train("[{path: 'a: #b', weight: 2.5}, {path: 24:00:00, template: {prompt: '{x}', chosen: é, rejected: 'off'}}]"),
    with_data("eval: {x: {path: q}, y: {path: r}}") + "train: {eval_every: 5}\ncheckpoint: {keep_best: eval_x_loss}\n",
]


@pytest.mark.parametrize("text", RESOLVED)
def test_the_resolved_config_is_a_config_and_the_same(text: str, write) -> None:
    """It is what `config.resolved.yaml` holds, and what resuming loads again."""
    first = config.load(write(text))
    second = config.load(write(config.dump(first), "resolved.yaml"))
    assert second.strategy == first.strategy
    # A default of the objective that hangs on its loss is spelled out the second time, and the objective is the same.
    changed = {"deepspeed": "", "objective": first.objective}
    assert second.model_copy(update=changed) == first.model_copy(update=changed)
    assert build_objective(**second.objective.model_dump()) == build_objective(**first.objective.model_dump())
    assert config.resolved(second) == config.resolved(first)
    assert config.dump(second) == config.dump(first)


def test_every_objective_loads_as_it_was_written(write) -> None:
    """Each value arrives; what was left out is the loss's or the family's own default."""
    for text in OBJECTIVE_FILES:
        written = yaml.safe_load(text)["objective"]
        section = config.load(write(text)).objective
        assert section.name == written.get("name", "dpo")
        for key, value in written.items():
            assert getattr(section, key) == value, text
        assert section.model_fields_set == written.keys()


def test_the_resolved_config_has_every_key(write) -> None:
    """Of the objective, those that apply and have a value."""
    loaded = config.load(write(MINIMAL))
    resolved = yaml.safe_load(config.dump(loaded))
    assert resolved.keys() == Config.model_fields.keys()
    for name in ("model", "reference", "data", "train", "checkpoint", "log"):
        assert resolved[name].keys() == type(getattr(loaded, name)).model_fields.keys()
    assert resolved["objective"] == {
        "name": "dpo",
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "reference_free": False,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
    }


def test_a_loss_resolves_to_its_own_defaults(write) -> None:
    """In one objective, too, losses have different ones: what a run folder keeps says which."""
    cpo = [config.resolved(config.load(write(with_objective(f"{{name: cpo, loss_type: {x}}}")))) for x in ("ipo", "simpo")]
    assert [r["objective"]["beta"] for r in cpo] == [0.1, 2.0]
    assert ["gamma_beta_ratio" in r["objective"] for r in cpo] == [False, True]
    dpo = [config.resolved(config.load(write(with_objective(f"{{loss_type: {x}}}")))) for x in ("robust", "exo_pair")]
    assert [r["objective"]["label_smoothing"] for r in dpo] == [0.0, 1e-3]


def test_importing_the_config_loads_no_torch() -> None:
    code = "import dspref.config, sys; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_loading_a_config_with_a_shipped_strategy_loads_no_torch(write) -> None:
    path = write(MINIMAL).resolve()
    code = f"import sys; from dspref import config; config.load({str(path)!r}).strategy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ----------------------------------------------------------------------------------------------------- YAML 1.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("5.0e-7", 5e-7),
        ("1E3", 1000.0),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("0x10", 16),
        ("0o17", 15),
        ("017", 17),
        ("-3", -3),
        ("1_000", "1_000"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("24:00:00", "24:00:00"),
        ("2001-01-01", "2001-01-01"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("1e", "1e"),
        ("0b1", "0b1"),
        ("<<", "<<"),
        ("[1, off, {a: 2.5}]", [1, "off", {"a": 2.5}]),
    ],
)
def test_scalars_are_those_of_yaml_12(text: str, value: Any, write) -> None:
    """On the command line and in a file alike; 5e-7 is text, off is false and 24:00:00 is 86400 in YAML 1.1."""
    for parsed in (yaml12.parse_value(text), yaml12.parse(write(f"key: {text}\n"))[0]["key"]):
        assert parsed == value
        assert isinstance(parsed, type(value)) and isinstance(parsed, bool) is isinstance(value, bool)


def test_infinity_and_nan_are_numbers() -> None:
    assert yaml12.parse_value("-.inf") == float("-inf")
    assert yaml12.parse_value(".nan") != yaml12.parse_value(".nan")


def test_every_key_knows_its_place(write) -> None:
    _, positions = yaml12.parse(write("a: 1\nb:\n  - c: 2\n    d: {e: 3}\n  - 4\n"))
    places = {path: (p.line, p.column) for path, p in positions.items() if path}
    assert places == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 0): (3, 5),
        ("b", 0, "c"): (3, 5),
        ("b", 0, "d"): (4, 5),
        ("b", 0, "d", "e"): (4, 9),
        ("b", 1): (5, 5),
    }


def test_a_byte_order_mark_is_no_part_of_the_first_key(write) -> None:
    assert config.load(write(b"\xef\xbb\xbf" + MINIMAL.encode())).output_dir == "out"


# ------------------------------------------------------------------------------------------------- bad files

# (file, line:column, key, reason). Where the file as a whole is at fault the place is the file, or its first character.
BAD: dict[str, tuple[str, str, str, str]] = {
    # unknown keys, at every depth
    "unknown section": (MINIMAL + "trian: {}\n", "5:1", "trian", "unknown key; did you mean 'train'"),
    "unknown key": (
        MINIMAL + "train:\n  lerning_rate: 1\n",
        "6:3",
        "train.lerning_rate",
        "did you mean 'learning_rate'",
    ),
    "unknown key of a source": (
        with_train("[{path: a}, {path: b, wieght: 1}]"),
        "3:32",
        "data.train.1.wieght",
        "did you mean 'weight'",
    ),
    "unknown key of the only source": (
        with_train("{path: a, wieght: 1}"),
        "3:20",
        "data.train.wieght",
        "did you mean 'weight'",
    ),
    "unknown column": (
        with_train("{path: a, columns: {promt: x}}"),
        "3:30",
        "data.train.columns.promt",
        "did you mean 'prompt'",
    ),
    "unknown key of an eval set": (
        with_data("eval: {val: {path: p, splitt: x}}"),
        "4:25",
        "data.eval.val.splitt",
        "did you mean 'split'",
    ),
    "eval set named as an objective": (
        with_data("eval: {dpo: {path: p, foo: 1}}"),
        "4:25",
        "data.eval.dpo.foo",
        "unknown key",
    ),
    "eval set named one": (with_data("eval: {one: {path: 3}}"), "4:16", "data.eval.one.path", "must be text, not 3"),
    "no key of a source": (with_train("{pth: a}"), "3:11", "data.train.pth", "unknown key; did you mean 'path'"),
    # types: strict
    "float for int": (MINIMAL + "train: {pairs_per_step: 1.5}\n", "5:9", "train.pairs_per_step", "integer, not 1.5"),
    "whole float for int": (
        MINIMAL + "train: {pairs_per_step: 8.0}\n",
        "5:9",
        "train.pairs_per_step",
        "integer, not 8.0",
    ),
    "text for int": (MINIMAL + "train: {pairs_per_step: '8'}\n", "5:9", "train.pairs_per_step", "integer, not '8'"),
    "text for float": (MINIMAL + "train: {learning_rate: fast}\n", "5:9", "train.learning_rate", "number, not 'fast'"),
    "bool for float": (MINIMAL + "objective: {beta: true}\n", "5:13", "objective.beta", "number, not true"),
    "off for bool": (with_data("shuffle: off"), "4:3", "data.shuffle", "true or false, not 'off'; write false"),
    "off for bool or auto": (with_data("prefix_sharing: off"), "4:3", "data.prefix_sharing", "auto.*not 'off'"),
    "off for bool or all": (with_model("disable_dropout: off"), "1:26", "model.disable_dropout", "all.*not 'off'"),
    "number for text": (MINIMAL.replace("out\n", "3\n"), "4:1", "output_dir", "must be text, not 3; write '3', in quotes"),
    "number for text or mapping": (MINIMAL + "deepspeed: 3\n", "5:1", "deepspeed", "not 3"),
    "number for list": (MINIMAL + "log: {trackers: 3}\n", "5:7", "log.trackers", "must be a list, not 3"),
    "number for section": (MINIMAL + "train: 3\n", "5:1", "train", "not 3"),
    "nothing for section": (MINIMAL + "train:\n", "5:1", "train", "not null"),
    "number for source": (with_train("3"), "3:3", "data.train", r"a path or a mapping of keys \(\{path: ...\}\), not 3"),
    "no sources": (with_train("[]"), "3:3", "data.train", "empty list"),
    # ranges
    "zero": (MINIMAL + "train: {pairs_per_step: 0}\n", "5:9", "train.pairs_per_step", "greater than 0, not 0"),
    "negative": (MINIMAL + "objective: {beta: -1}\n", "5:13", "objective.beta", "greater than 0, not -1"),
    "half": (with_objective("{label_smoothing: 0.5}"), "5:13", "objective.label_smoothing", "less than 0.5, not 0.5"),
    "below no smoothing": (with_objective("{label_smoothing: -0.1}"), "5:13", "objective.label_smoothing", "not -0.1"),
    "no smoothing for exo": (
        with_objective("{loss_type: exo_pair, label_smoothing: 0}"),
        "5:34",
        "objective.label_smoothing",
        "greater than 0 for loss_type exo_pair, not 0",
    ),
    "no smoothing for exo in a list": (
        with_objective("{loss_type: [sigmoid, exo_pair], label_smoothing: 0.0}"),
        "5:45",
        "objective.label_smoothing",
        "greater than 0 for loss_type exo_pair, not 0",
    ),
    "alpha 0 of a divergence": (
        with_objective("{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0}"),
        "5:50",
        "objective.f_alpha_divergence_coef",
        "greater than 0, not 0",
    ),
    "alpha 1 of a divergence": (
        with_objective("{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 1.0}"),
        "5:50",
        "objective.f_alpha_divergence_coef",
        "less than 1, not 1",
    ),
    "alpha 1.5 of a divergence": (
        with_objective("{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 1.5}"),
        "5:50",
        "objective.f_alpha_divergence_coef",
        "less than 1, not 1.5",
    ),
    "ld_alpha above 1": (
        with_objective("{ld_alpha: 1.5}"),
        "5:13",
        "objective.ld_alpha",
        "less than or equal to 1, not 1.5",
    ),
    "ld_alpha below 0": (with_objective("{ld_alpha: -0.5}"), "5:13", "objective.ld_alpha", "to 0, not -0.5"),
    "negative rpo_alpha": (with_objective("{rpo_alpha: -1}"), "5:13", "objective.rpo_alpha", "to 0, not -1"),
    "negative cpo_alpha": (with_objective("{name: cpo, cpo_alpha: -1}"), "5:24", "objective.cpo_alpha", "to 0, not -1"),
    "negative gamma": (with_objective("{name: simpo, simpo_gamma: -1}"), "5:26", "objective.simpo_gamma", "to 0, not -1"),
    "no tau": (
        with_objective("{loss_type: discopop, discopop_tau: 0}"),
        "5:34",
        "objective.discopop_tau",
        "greater than 0, not 0",
    ),
    "no beta of simpo": (with_objective("{name: simpo, beta: 0}"), "5:26", "objective.beta", "greater than 0, not 0"),
    "negative weight of a loss": (
        with_objective("{loss_type: [sigmoid, sft], loss_weights: [1.0, -1]}"),
        "5:60",
        "objective.loss_weights.1",
        "to 0, not -1",
    ),
    "negative router_aux_loss_coef": (
        with_model("router_aux_loss_coef: -0.1"),
        "1:26",
        "model.router_aux_loss_coef",
        "to 0, not -0.1",
    ),
    "nan": (MINIMAL + "train: {learning_rate: .nan}\n", "5:9", "train.learning_rate", "finite number, not nan"),
    "infinity": (MINIMAL + "train: {weight_decay: .inf}\n", "5:9", "train.weight_decay", "finite number, not inf"),
    "max_length": (with_data("max_length: 1"), "4:3", "data.max_length", "greater than or equal to 2, not 1"),
    "weight": (with_train("[{path: a, weight: 0}]"), "3:21", "data.train.0.weight", "greater than 0, not 0"),
    # one of a few
    "dtype": (with_model("dtype: bf16"), "1:26", "model.dtype", "'bfloat16'.*not 'bf16'; did you mean 'bfloat16'"),
    "schedule": (
        MINIMAL + "train: {lr_scheduler_type: liner}\n",
        "5:9",
        "train.lr_scheduler_type",
        "did you mean 'linear'",
    ),
    "loss": (with_objective("{loss_type: sigmod}"), "5:13", "objective.loss_type", "not 'sigmod'; did you mean 'sigmoid'"),
    "loss in a list": (
        with_objective("{loss_type: [ipo, sigmod]}"),
        "5:30",
        "objective.loss_type.1",
        "not 'sigmod'; did you mean 'sigmoid'",
    ),
    "loss of cpo": (
        with_objective("{name: cpo, loss_type: bco_pair}"),
        "5:24",
        "objective.loss_type",
        "'sigmoid', 'hinge', 'ipo', 'simpo', 'simper' or 'repo', not 'bco_pair'",
    ),
    "loss of orpo": (
        with_objective("{name: orpo, loss_type: sigmoid}"),
        "5:25",
        "objective.loss_type",
        "'orpo', not 'sigmoid'",
    ),
    "no losses": (with_objective("{loss_type: []}"), "5:13", "objective.loss_type", "empty list"),
    "number for loss": (with_objective("{loss_type: 3}"), "5:13", "objective.loss_type", "'sigmoid'.*not 3"),
    "list of losses of cpo": (
        with_objective("{name: cpo, loss_type: [sigmoid, simpo]}"),
        "5:24",
        "objective.loss_type",
        r"'sigmoid', 'hinge', 'ipo', 'simpo', 'simper' or 'repo', not \['sigmoid', 'simpo'\]",
    ),
    "list of losses of simpo": (
        with_objective("{name: simpo, loss_type: [simpo]}"),
        "5:26",
        "objective.loss_type",
        r"'simpo', 'simper' or 'repo', not \['simpo'\]",
    ),
    "objective": (with_objective("{name: kta}"), "5:13", "objective.name", "dpo, cpo, simpo, orpo, kto, bco"),
    "objective in capitals": (with_objective("{name: DPO}"), "5:13", "objective.name", "dpo, cpo, simpo, orpo"),
    "list for objective": (with_objective("{name: [dpo]}"), "5:13", "objective.name", "dpo, cpo, simpo, orpo"),
    "nothing for objective": (with_objective("{name: null}"), "5:13", "objective.name", "dpo, cpo, simpo, orpo"),
    "divergence": (
        with_objective("{f_divergence_type: js}"),
        "5:13",
        "objective.f_divergence_type",
        "'reverse_kl', 'forward_kl', 'js_divergence', 'alpha_divergence' or 'chi_squared', not 'js'",
    ),
    "router scope": (
        with_model("router_aux_scope: steps"),
        "1:26",
        "model.router_aux_scope",
        "'micro' or 'step', not 'steps'; did you mean 'step'",
    ),
    # losses that other tools have
    "kto_pair": (with_objective("{loss_type: kto_pair}"), "5:13", "objective.loss_type", "write name: kto"),
    "kto_pair of cpo": (
        with_objective("{name: cpo, loss_type: kto_pair}"),
        "5:24",
        "objective.loss_type",
        "write name: kto",
    ),
    "alphapo": (with_objective("{name: cpo, loss_type: alphapo}"), "5:24", "objective.loss_type", "simpo with alpha"),
    "cdpo": (with_objective("{loss_type: cdpo}"), "5:13", "objective.loss_type", "sigmoid with label_smoothing"),
    "cdpo in a list": (
        with_objective("{loss_type: [ipo, cdpo]}"),
        "5:30",
        "objective.loss_type.1",
        "sigmoid with label_smoothing",
    ),
    "rpo": (with_objective("{loss_type: rpo}"), "5:13", "objective.loss_type", "sigmoid with rpo_alpha"),
    "simpo as a loss of dpo": (with_objective("{loss_type: simpo}"), "5:13", "objective.loss_type", "name: simpo"),
    "orpo as a loss of dpo": (with_objective("{loss_type: orpo}"), "5:13", "objective.loss_type", "name: orpo"),
    "tracker": (
        MINIMAL + "log: {trackers: [wandb, aim]}\n",
        "5:25",
        "log.trackers.1",
        "'wandb', 'tensorboard', 'mlflow', 'trackio', 'comet' or 'swanlab', not 'aim'",
    ),
    "yes for resume": (MINIMAL + "checkpoint: {resume: yes}\n", "5:14", "checkpoint.resume", "'auto'.*not 'yes'"),
    # missing
    "no model": ("data: {train: {path: a}}\noutput_dir: o\n", "", "model", "is missing"),
    "no name": (MINIMAL.replace("name_or_path: m", ""), "1:1", "model.name_or_path", "is missing"),
    "no path": (with_train("[{path: a}, {split: b}]"), "3:22", "data.train.1.path", "is missing"),
    "half a template": (
        with_train("{path: a, template: {prompt: x, chosen: y}}"),
        "3:20",
        "data.train.template.rejected",
        "is missing",
    ),
    # options that do not go together
    "both warm-ups": (
        MINIMAL + "train: {warmup_steps: 3, warmup_ratio: 0.1}\n",
        "5:9",
        "train.warmup_steps",
        "not both",
    ),
    "samples of nothing": (MINIMAL + "log: {samples: 3}\n", "5:7", "log.samples", "set data.eval, or drop it"),
    "samples of a file": (
        MINIMAL + "log: {samples: 3, samples_file: p.txt}\n",
        "5:7",
        "log.samples",
        "log.samples_file alone has its prompts",
    ),
    "every without samples": (
        MINIMAL + "log: {sample_every: 3}\n",
        "5:7",
        "log.sample_every",
        "has no effect without prompts",
    ),
    "style without samples": (
        MINIMAL + "log: {generation: {temperature: 1}}\n",
        "5:7",
        "log.generation",
        "has no effect without prompts",
    ),
    "top_p without draws": (
        MINIMAL + "log: {samples_file: p.txt, generation: {top_p: 0.9}}\n",
        "5:41",
        "log.generation.top_p",
        "has no effect with temperature: 0",
    ),
    "generation misspelt": (
        MINIMAL + "log: {samples_file: p.txt, generation: {temprature: 1}}\n",
        "5:41",
        "log.generation.temprature",
        "did you mean 'temperature'?",
    ),
    "no eval set": (MINIMAL + "train: {eval_every: 3}\n", "5:9", "train.eval_every", "set data.eval"),
    "stop, no eval": (MINIMAL + "train: {stop_when: {metric: eval_loss}}\n", "5:9", "train.stop_when", "set data.eval"),
    "stop, no such metric": (
        with_data("eval: {path: p}") + "train: {eval_every: 5, stop_when: {metric: eval_acc}}\n",
        "6:36",
        "train.stop_when.metric",
        "for example eval_loss",
    ),
    "stop, misspelt": (
        with_data("eval: {path: p}") + "train: {eval_every: 5, stop_when: {metric: eval_los}}\n",
        "6:36",
        "train.stop_when.metric",
        "did you mean eval_loss",
    ),
    "stop, entropy": (
        with_data("eval: {path: p}") + "train: {eval_every: 5, stop_when: {metric: eval_entropy}}\n",
        "6:36",
        "train.stop_when.metric",
        "set direction: min or max",
    ),
    **{
        f"push to {repo}": (MINIMAL + f"export: {{push_to_hub: '{repo}'}}\n", "5:10", "export.push_to_hub", "as owner/name")
        for repo in ("", "model", "a/b/c", "owner/a--b", "owner/a..b", "owner/name.git", "owner/x.", "owner/" + "x" * 100)
    },
    "stop, which way": (
        with_data("eval: {path: p}") + "train: {eval_every: 5, stop_when: {metric: eval_rewards/rejected}}\n",
        "6:36",
        "train.stop_when.metric",
        "set direction: min or max",
    ),
    "stop, only at the end": (
        with_data("eval: {path: p}") + "train: {stop_when: {metric: eval_loss}}\n",
        "6:9",
        "train.stop_when",
        "set train.eval_every",
    ),
    "best of what": (with_data("eval: {path: p}") + "export: best\n", "6:1", "export", "by which metric?"),
    "two best": (
        with_data("eval: {path: p}") + "train: {eval_every: 5, stop_when: {metric: eval_loss}}\n"
        "checkpoint: {save_every: 5, keep_best: eval_rewards/margins}\nexport: best\n",
        "7:29",
        "checkpoint.keep_best",
        "it must be eval_loss",
    ),
    "start, no eval": (MINIMAL + "train: {eval_at_start: true}\n", "5:9", "train.eval_at_start", "set data.eval"),
    "no best": (MINIMAL + "checkpoint: {keep_best: eval_loss}\n", "5:14", "checkpoint.keep_best", "set data.eval"),
    "warm-up of a constant": (
        MINIMAL + "train: {lr_scheduler_type: constant, warmup_steps: 3}\n",
        "5:9",
        "train.lr_scheduler_type",
        "constant_with_warmup",
    ),
    "option of another schedule": (
        MINIMAL + "train: {lr_scheduler_kwargs: {foo: 1}}\n",
        "5:9",
        "train.lr_scheduler_kwargs",
        "linear takes no foo",
    ),
    "schedule without its option": (
        MINIMAL + "train: {lr_scheduler_type: cosine_with_min_lr}\n",
        "5:1",
        "train.lr_scheduler_kwargs",
        "needs min_lr",
    ),
    "best by no metric": (
        with_data("eval: {path: p}") + "checkpoint: {keep_best: eval_acc}\n",
        "6:14",
        "checkpoint.keep_best",
        "eval_rewards/margins",
    ),
    "best without evaluations": (
        with_data("eval: {path: p}") + "checkpoint: {keep_best: eval_loss, save_every: 3}\n",
        "6:14",
        "checkpoint.keep_best",
        "train.eval_every",
    ),
    "cpu_adam on the GPU": (MINIMAL + "train: {optim: cpu_adam}\n", "5:9", "train.optim", "offload_optimizer"),
    "no reference": (MINIMAL + "reference: {mode: none}\n", "5:13", "reference.mode", "dpo needs a reference"),
    "no reference for sft": (
        with_objective("{loss_type: sft}", "reference: {mode: none}\n"),
        "6:13",
        "reference.mode",
        "dpo needs a reference",
    ),
    "live reference of simpo": (
        with_objective("{name: simpo}", "reference: {mode: engine}\n"),
        "6:13",
        "reference.mode",
        "simpo uses no reference",
    ),
    "stored reference of simpo": (
        with_objective("{name: simpo}", "reference: {mode: stored}\n"),
        "6:13",
        "reference.mode",
        "simpo uses no reference",
    ),
    "reference of orpo": (
        with_objective("{name: orpo}", "reference: {name_or_path: r}\n"),
        "6:13",
        "reference.name_or_path",
        "orpo uses no reference",
    ),
    "live reference of none": (
        with_objective("{reference_free: true}", "reference: {mode: engine}\n"),
        "6:13",
        "reference.mode",
        "reference_free uses no reference",
    ),
    "reference of none": (
        with_objective("{reference_free: true}", "reference: {name_or_path: r}\n"),
        "6:13",
        "reference.name_or_path",
        "reference_free uses no reference",
    ),
    "a loss twice": (
        with_objective("{loss_type: [ipo, hinge, ipo]}"),
        "5:13",
        "objective.loss_type",
        "ipo is there twice",
    ),
    "a loss twice by its other name": (
        with_objective("{loss_type: [aot_pair, aot_unpaired]}"),
        "5:13",
        "objective.loss_type",
        "aot_unpaired is there twice",
    ),
    "a loss twice by open-instruct's name": (
        with_objective("{loss_type: [dpo_norm, sigmoid_norm]}"),
        "5:13",
        "objective.loss_type",
        "sigmoid_norm is there twice",
    ),
    "too few weights": (
        with_objective("{loss_type: [sigmoid, sft], loss_weights: [1.0]}"),
        "5:40",
        "objective.loss_weights",
        "1 .*2 ",
    ),
    "too many weights": (with_objective("{loss_weights: [1.0, 2]}"), "5:13", "objective.loss_weights", "2 .*1 "),
    "number for weights": (with_objective("{loss_weights: 2}"), "5:13", "objective.loss_weights", "list, not 2"),
    "tau of sigmoid": (
        with_objective("{discopop_tau: 0.05}"),
        "5:13",
        "objective.discopop_tau",
        "does not apply to loss_type sigmoid.*discopop",
    ),
    "smoothing of hinge": (
        with_objective("{loss_type: hinge, label_smoothing: 0.1}"),
        "5:31",
        "objective.label_smoothing",
        "does not apply to loss_type hinge.*sigmoid.*robust.*aot",
    ),
    "smoothing of cpo hinge": (
        with_objective("{name: cpo, loss_type: hinge, label_smoothing: 0.1}"),
        "5:42",
        "objective.label_smoothing",
        "does not apply to loss_type hinge.*sigmoid, simpo",
    ),
    "length normalisation of sigmoid": (
        with_objective("{ipo_length_normalize: false}"),
        "5:13",
        "objective.ipo_length_normalize",
        "does not apply to loss_type sigmoid.*ipo",
    ),
    "divergence of nca": (
        with_objective("{loss_type: nca_pair, f_divergence_type: js_divergence}"),
        "5:34",
        "objective.f_divergence_type",
        "js_divergence .*nca_pair",
    ),
    "divergence of one in a list": (
        with_objective("{loss_type: [sigmoid, bco_pair], f_divergence_type: forward_kl}"),
        "5:45",
        "objective.f_divergence_type",
        "forward_kl .*bco_pair",
    ),
    "weighting of aot": (
        with_objective("{loss_type: aot, use_weighting: true}"),
        "5:29",
        "objective.use_weighting",
        "does not go with loss_type aot,",
    ),
    "weighting of one in a list": (
        with_objective("{loss_type: [sigmoid, aot_unpaired], use_weighting: true}"),
        "5:49",
        "objective.use_weighting",
        "does not go with loss_type aot_unpaired,",
    ),
    "alpha of sums": (
        with_objective("{name: cpo, alpha: 0.25}"),
        "5:24",
        "objective.alpha",
        "0.25 does not go with loss_type sigmoid.*simpo, ipo or repo",
    ),
    "alpha beside another reward": (
        with_objective("{name: simpo, loss_type: simper, alpha: 0.25}"),
        "5:45",
        "objective.alpha",
        "0.25 does not go with loss_type simper, which has no mean log-probs as rewards",
    ),
    "beta of simper": (
        with_objective("{name: simpo, loss_type: simper, beta: 2.0}"),
        "5:45",
        "objective.beta",
        "does not apply to loss_type simper; it is for simpo",
    ),
    "chi-PO": (
        with_objective("{loss_type: chipo}"),
        "5:13",
        "objective.loss_type",
        "write loss_type: sigmoid with f_divergence_type: chi_squared",
    ),
    "alpha of cpo hinge": (
        with_objective("{name: cpo, loss_type: hinge, alpha: -0.25}"),
        "5:42",
        "objective.alpha",
        "-0.25 does not go with loss_type hinge",
    ),
    "two margins": (
        with_objective("{name: simpo, simpo_gamma: 1, gamma_beta_ratio: 0.5}"),
        "5:42",
        "objective.gamma_beta_ratio",
        "simpo_gamma.*drop one",
    ),
    "two margins of cpo": (
        with_objective("{name: cpo, loss_type: simpo, gamma_beta_ratio: 0.5, simpo_gamma: 1}"),
        "5:42",
        "objective.gamma_beta_ratio",
        "simpo_gamma.*drop one",
    ),
    "margin of cpo sigmoid": (
        with_objective("{name: cpo, simpo_gamma: 1}"),
        "5:24",
        "objective.simpo_gamma",
        "does not apply to loss_type sigmoid.*simpo",
    ),
    "alpha of no divergence": (
        with_objective("{f_alpha_divergence_coef: 0.5}"),
        "5:13",
        "objective.f_alpha_divergence_coef",
        "f_divergence_type: alpha_divergence",
    ),
    "alpha of another divergence": (
        with_objective("{f_divergence_type: js_divergence, f_alpha_divergence_coef: 0.5}"),
        "5:47",
        "objective.f_alpha_divergence_coef",
        "f_divergence_type: alpha_divergence",
    ),
    "offloaded copies": (
        MINIMAL + "reference: {offload: cpu, zero_stage: 0}\n",
        "5:13",
        "reference.offload",
        "zero_stage 3",
    ),
    "offloaded nothing": (
        MINIMAL + "reference: {mode: stored, offload: cpu}\n",
        "5:27",
        "reference.offload",
        "mode: engine",
    ),
    "no room for answers": (with_data("max_prompt_length: 2048"), "4:3", "data.max_prompt_length", "below max_length"),
    "misspelt key of an objective": (
        with_objective("{lable_smoothing: 0.1}"),
        "5:13",
        "objective.lable_smoothing",
        "unknown key; did you mean 'label_smoothing'",
    ),
    # what TRL calls it
    "TRL batch": (
        MINIMAL + "per_device_train_batch_size: 4\n",
        "5:1",
        "per_device_train_batch_size",
        "train.pairs_per_step.*data.tokens_per_pack",
    ),
    "TRL batch in a section": (
        MINIMAL + "train: {per_device_train_batch_size: 4}\n",
        "5:9",
        "train.per_device_train_batch_size",
        "train.pairs_per_step",
    ),
    "TRL accumulation": (
        MINIMAL + "gradient_accumulation_steps: 4\n",
        "5:1",
        "gradient_accumulation_steps",
        "train.pairs_per_step",
    ),
    "TRL bf16": (MINIMAL + "bf16: true\n", "5:1", "bf16", "model.dtype: bfloat16"),
    "TRL loss": (MINIMAL + "loss_type: sigmoid\n", "5:1", "loss_type", "objective.loss_type"),
    "TRL rate": (MINIMAL + "learning_rate: 5e-7\n", "5:1", "learning_rate", "train.learning_rate"),
    "TRL model": (MINIMAL + "model_name_or_path: m\n", "5:1", "model_name_or_path", "model.name_or_path"),
    "TRL reference_free": (MINIMAL + "reference_free: true\n", "5:1", "reference_free", "objective.reference_free"),
    "TRL gamma": (MINIMAL + "simpo_gamma: 0.5\n", "5:1", "simpo_gamma", "objective.simpo_gamma"),
    "TRL router": (MINIMAL + "router_aux_loss_coef: 0.1\n", "5:1", "router_aux_loss_coef", "model.router_aux_loss_coef"),
    # DeepSpeed
    "DeepSpeed typo": (
        MINIMAL + "deepspeed:\n  zero_optimization: {stage: 3, overlap_com: true}\n",
        "6:33",
        "deepspeed.zero_optimization.overlap_com",
        "did you mean 'overlap_comm'",
    ),
    "DeepSpeed top-level typo": (
        MINIMAL + "deepspeed: {zero_optimisation: {}}\n",
        "5:13",
        "deepspeed.zero_optimisation",
        "did you mean 'zero_optimization'",
    ),
    "auto": (
        MINIMAL + "deepspeed: {zero_optimization: {stage: auto}}\n",
        "5:33",
        "deepspeed.zero_optimization.stage",
        "auto",
    ),
    "stage 0 in bf16": (
        MINIMAL + "deepspeed: {zero_optimization: {stage: 0}}\n",
        "5:33",
        "deepspeed.zero_optimization.stage",
        "stage 0 in bfloat16.*use 1",
    ),
    "no stage in bf16": (
        MINIMAL + "deepspeed: {}\n",
        "5:1",
        "deepspeed.zero_optimization.stage",
        "stage 0 in bfloat16",
    ),
    "stage 4": (
        MINIMAL + "deepspeed: {zero_optimization: {stage: 4}}\n",
        "5:33",
        "deepspeed.zero_optimization.stage",
        "0, 1, 2 or 3, not 4",
    ),
    "owned batch": (
        MINIMAL + "deepspeed: {train_batch_size: 4, zero_optimization: {stage: 2}}\n",
        "5:13",
        "deepspeed.train_batch_size",
        "train.pairs_per_step",
    ),
    "owned precision": (
        MINIMAL + "deepspeed: {bf16: {enabled: true}, zero_optimization: {stage: 2}}\n",
        "5:13",
        "deepspeed.bf16",
        "model.dtype",
    ),
    "offload without stage 3": (
        MINIMAL + "deepspeed: {zero_optimization: {stage: 2, offload_param: {device: cpu}}}\n",
        "5:59",
        "deepspeed.zero_optimization.offload_param.device",
        "needs stage 3, not 2",
    ),
    "no mapping": (
        MINIMAL + "deepspeed: {zero_optimization: 3}\n",
        "5:13",
        "deepspeed.zero_optimization",
        "must be a mapping",
    ),
    "no such JSON": (MINIMAL + "deepspeed: nope.json\n", "5:1", "deepspeed", "nope.json: no such file"),
    # adapters
    "LoRA key": (with_model("lora: {rank: 8}"), "1:33", "model.lora.rank", "unknown key; in dspref this is model.lora.r$"),
    "LoRA and frozen": (with_model("lora: {}, freeze: [layers.0]"), "1:36", "model.freeze", "an adapter leaves the whole"),
    "frozen": (with_model("freeze: ['']"), "1:35", "model.freeze.0", "must be a text that is not empty, not ''"),
    "LoRA rank": (with_model("lora: {r: 0}"), "1:33", "model.lora.r", "greater than 0"),
    "LoRA of TRL": (MINIMAL + "lora_r: 8\n", "5:1", "lora_r", "in dspref this is model.lora.r"),
    "settings of a saved adapter": (
        with_model("lora: {path: a, r: 8}"),
        "1:42",
        "model.lora.r",
        "brings its own; drop the key, or the path",
    ),
    "dropout twice": (
        with_model("disable_dropout: all, lora: {lora_dropout: 0.1}"),
        "1:55",
        "model.lora.lora_dropout",
        "has no effect with model.disable_dropout: all",
    ),
    "name without adapter": (with_model("adapter_name: a"), "1:26", "model.adapter_name", "no adapter to name"),
    "name with a dot": (
        with_model("lora: {}, adapter_name: a.b"),
        "1:36",
        "model.adapter_name",
        "must be letters, digits, _ and - only",
    ),
    "4 bits without adapter": (with_model("load_in_4bit: true"), "1:26", "model.load_in_4bit", "cannot be trained"),
    "4 bits in shards": (
        with_model("load_in_4bit: true, lora: {}"),
        "1:26",
        "model.load_in_4bit",
        "each rank would hold them all; use stage 2",
    ),
    "4 bits offloaded": (
        with_reference("{offload: cpu}", "load_in_4bit: true, lora: {}") + "deepspeed: ds_configs/zero2.json\n",
        "5:13",
        "reference.offload",
        "cannot shard weights in 4 bits; use mode: adapter",
    ),
    "adapter without adapter": (
        with_reference("{mode: adapter}"),
        "5:13",
        "reference.mode",
        r"needs a policy with an adapter \(model.lora\)",
    ),
    "adapter in another type": (
        with_reference("{mode: adapter, dtype: float32}", "lora: {}"),
        "5:28",
        "reference.dtype",
        "has no effect with mode: adapter",
    ),
    "adapter by no name": (
        with_reference("{adapter_name: a}", "lora: {}"),
        "5:13",
        "reference.adapter_name",
        "needs the folder it lies in",
    ),
    "base of another": (
        with_reference("{adapter_name: base, name_or_path: r}", "lora: {}"),
        "5:13",
        "reference.adapter_name",
        "base is the policy's own model",
    ),
    "adapter of no model": (
        with_reference("{adapter_name: base}"),
        "5:13",
        "reference.adapter_name",
        "names no adapter without model.lora",
    ),
    "store of a live reference": (
        with_reference("{mode: engine, store: s}"),
        "5:27",
        "reference.store",
        "has no effect with mode: engine; it is for stored",
    ),
    "pairs of a template": (
        with_train("{path: a, pairs: all, template: {prompt: x, chosen: y, rejected: z}}").replace(
            "all", "best_against_rest"
        ),
        "3:20",
        "data.train.pairs",
        "a template makes one pair of a row",
    ),
    "completions beside a template": (
        with_train("{path: a, template: {prompt: x, chosen: y, rejected: z}, columns: {scores: s}}"),
        "3:77",
        "data.train.columns.scores",
        "a template makes one pair of a row",
    ),
    "ranks of a template": (
        with_train("{path: a, template: {prompt: x, chosen: y, rejected: z}, columns: {ranks: s}}"),
        "3:77",
        "data.train.columns.ranks",
        "a template makes one pair of a row",
    ),
    "columns beside a template": (
        with_train("{path: a, template: {prompt: x, chosen: y, rejected: z}, columns: {prompt: q}}"),
        "3:77",
        "data.train.columns.prompt",
        "has no effect beside a template",
    ),
    "two answers and several": (
        with_train("{path: a, columns: {chosen: good, scores: s}}"),
        "3:30",
        "data.train.columns.chosen",
        "two answers",
    ),
    "scores and ranks": (
        with_train("{path: a, columns: {scores: s, ranks: r}}"),
        "3:41",
        "data.train.columns.ranks",
        "higher is better",
    ),
    "ranks as scores": (
        with_train("[{path: a}, {path: b, columns: {completions: answers.answer, scores: answers.rank}}]"),
        "3:71",
        "data.train.1.columns.scores",
        "use columns.ranks",
    ),
    "a column for two fields, of an evaluation": (
        with_data("eval: {path: a, columns: {prompt: q, system: q}}"),
        "4:40",
        "data.eval.columns.system",
        "names the column of prompt once more",
    ),
    "system of a text": (
        with_train("{path: a, as: text, template: {prompt: x, chosen: y, rejected: z, system: s}}"),
        "3:76",
        "data.train.template.system",
        "has no effect with as: text",
    ),
    "as what it cannot be": (
        with_train("{path: a, as: char}"),
        "3:20",
        "data.train.as",
        "did you mean 'chat'?",
    ),
    "company in the order of the files": (
        with_data("shuffle: false\n  keep_together: prompt"),
        "5:3",
        "data.keep_together",
        "has no effect with shuffle: false",
    ),
    "packs of a score that is not stored": (
        with_reference("{sync_ref_model: true, tokens_per_pack: 9}"),
        "5:35",
        "reference.tokens_per_pack",
        "has no effect with mode: engine; it is for stored",
    ),
    # TR-DPO
    "sync of what is stored": (
        with_reference("{mode: stored, sync_ref_model: true}"),
        "5:27",
        "reference.sync_ref_model",
        "use mode: engine",
    ),
    "sync of adapters": (
        with_reference("{sync_ref_model: true}", "lora: {}"),
        "5:13",
        "reference.sync_ref_model",
        "the mean of two adapters",
    ),
    "sync of shards and wholes": (
        with_reference("{sync_ref_model: true, zero_stage: 0}"),
        "5:13",
        "reference.sync_ref_model",
        "drop reference.zero_stage",
    ),
    # BEMA
    "a moving average of what is stored": (
        with_reference("{mode: stored, bema: true}"),
        "5:27",
        "reference.bema",
        "use mode: engine",
    ),
    "a moving average of adapters": (
        with_reference("{bema: {update_freq: 10}}", "lora: {}"),
        "5:13",
        "reference.bema",
        "the mean of two adapters is not the adapter of the mean; drop it, or model.lora",
    ),
    "two that move the reference": (
        with_reference("{sync_ref_model: true, bema: {}}"),
        "5:35",
        "reference.bema",
        "give one of them",
    ),
    "a reference between two averages": (
        with_reference("{bema: {update_freq: 10, ref_model_update_freq: 25}}"),
        "5:37",
        "reference.bema.ref_model_update_freq",
        "must be a multiple of update_freq, 10",
    ),
    "a moving average of shards and wholes": (
        with_reference("{bema: true, zero_stage: 0}"),
        "5:13",
        "reference.bema",
        "drop reference.zero_stage",
    ),
    "a moving average of the adapter mode": (
        with_reference("{mode: adapter, bema: true}", "lora: {}"),
        "5:28",
        "reference.bema",
        "the mean of two adapters",
    ),
    "a moving average that nothing is compared with": (
        with_objective("{name: simpo}", "reference: {bema: true}\n"),
        "6:13",
        "reference.bema",
        "objective simpo uses no reference",
    ),
    "a lag that makes a share of more than all": (
        with_reference("{bema: {lag: 0}}"),
        "5:20",
        "reference.bema.lag",
        "greater than or equal to 1",
    ),
    "share without sync": (
        with_reference("{ref_model_mixup_alpha: 0.5}"),
        "5:13",
        "reference.ref_model_mixup_alpha",
        "without sync_ref_model",
    ),
    # optimizers
    "8 bits offloaded": (
        MINIMAL + "train: {optim: adamw_8bit}\n"
        "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}\n",
        "5:9",
        "train.optim",
        "keeps its states on the GPU",
    ),
}

NOT_YAML: dict[str, tuple[str | bytes, str, str]] = {
    "open bracket": (MINIMAL + "a: [1\n", "6:1", "not valid YAML: expected ',' or ']'"),
    "tab": (MINIMAL + "a:\n\tb: 1\n", "6:1", "not valid YAML: .*'.t' that cannot start any token"),
    "two colons": (MINIMAL + "a: b: c\n", "5:5", "not valid YAML: mapping values are not allowed here"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, "5:1", "not valid YAML: holds several documents"),
    "list": ("- a\n- b\n", "1:1", "a config is a mapping"),
    "text": ("hello\n", "1:1", "a config is a mapping"),
    "empty": ("", "1:1", "a config is a mapping"),
    "comments": ("# nothing\n", "1:1", "a config is a mapping"),
    "duplicate section": (MINIMAL + "train: {}\ntrain: {}\n", "6:1", "train: duplicate key; first at x.yaml:5:1"),
    "duplicate key": (
        MINIMAL + "train: {seed: 1, seed: 2}\n",
        "5:18",
        "train.seed: duplicate key; first at x.yaml:5:9",
    ),
    "number as key": (MINIMAL + "1: 2\n", "5:1", "a key must be text"),
    "list as key": (MINIMAL + "? [a]\n: 2\n", "5:3", "a key must be text"),
    "two-line key": (MINIMAL + '"a\\nb": 1\n', "5:1", "key"),
    "Python object": (
        MINIMAL + "train: {seed: !!python/object/apply:os.getpid []}\n",
        "5:15",
        "not valid YAML: .*python/object",
    ),
    "own tag": (MINIMAL + "train: {seed: !env SEED}\n", "5:15", "not valid YAML: .*!env"),
    "tagged integer": (MINIMAL + "train: {seed: !!int abc}\n", "5:15", "not valid YAML"),
    "tagged boolean": (MINIMAL + "train: {seed: !!bool abc}\n", "5:15", "not valid YAML"),
    "integer of 5,000 digits": (MINIMAL + f"train: {{seed: {'1' * 5000}}}\n", "5:15", "not valid YAML"),
    "alias": (MINIMAL + "a: &x [1]\nb: *x\n", "6:4", "aliases .* are not allowed"),
    "alias bomb": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "2:10",
        "aliases",
    ),
    "merge key": ("a: &x {b: 1}\nc: {<<: *x}\n", "2:9", "aliases"),
    "deep nesting": (MINIMAL + "a: " + "[" * 20_000 + "\n", "", "not valid YAML|nested"),
    "Latin 1": ("a: é\n".encode("latin1"), "", r"not UTF-8 text \(byte 3\)"),
    "UTF-16": (MINIMAL.encode("utf-16"), "", r"not UTF-8 text \(byte 0\)"),
    "null byte": (b"a: \x00\n", "", "not valid YAML: unacceptable character #x0000"),
    "a megabyte": (b"#" * 1_000_001, "", "larger than 1000000 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_line_with_place_key_and_reason(case: str, write) -> None:
    text, place, key, reason = BAD[case]
    message = refusal(write(text))
    assert message.startswith(f"x.yaml:{place}: {key}: " if place else f"x.yaml: {key}: ")
    assert re.search(reason, message)


KEYS = {name: section.model_fields.keys() for name, section in OBJECTIVE_SECTIONS.items()}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_another_objective_leads_to_that_objective(name: str, write) -> None:
    """It is no typo: the line must not propose the very key that it refuses, but say whose key it is."""
    for key in sorted({key for keys in KEYS.values() for key in keys} - KEYS[name]):
        message = refusal(write(with_objective(f"{{name: {name}, {key}: 1}}")))
        place, _, reason = message.partition(f" objective.{key}: ")
        assert place == f"x.yaml:5:{13 + len(f'name: {name}, ')}:"
        assert f"did you mean '{key}'" not in reason
        assert any(re.search(rf"\b{other}\b", reason) for other in KEYS if key in KEYS[other]), message


def test_the_keys_known_here_are_those_of_the_objective(write) -> None:
    """A key that is close to none gets the list; keys of other objectives would be refused in turn."""
    message = refusal(write(with_objective("{name: orpo, zzz: 0.1}")))
    listed = set(re.split(r"[ ,;:]+", message.split("known here: ")[1]))
    assert listed == set(KEYS["orpo"])


@pytest.mark.parametrize("case", NOT_YAML)
def test_a_bad_file_is_one_line_with_place_and_reason(case: str, write) -> None:
    text, place, reason = NOT_YAML[case]
    message = refusal(write(text))
    assert message.startswith(f"x.yaml:{place}: " if place else "x.yaml")
    assert re.search(reason, message)


def test_no_such_file_and_not_a_file(write, tmp_path: Path) -> None:
    assert "no such file" in refusal(Path("nope.yaml"))
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('{"zero_optimization":\n {stage: 3}}', "s.json:2:3", "not valid JSON"),
        ("[]", "s.json:1:1", "one JSON object"),
        ("", "s.json:1:1", "not valid JSON"),
        (b"\xff", "s.json", "cannot be read"),
        ('{"zero_optimization": {"stage": "auto"}}', "x.yaml:5:1", "deepspeed.zero_optimization.stage: .*auto"),
        (
            '{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}',
            "x.yaml:5:1",
            "deepspeed.optimizer: belongs to train.optim",
        ),
    ],
)
def test_a_bad_deepspeed_json_is_one_line(text: str | bytes, place: str, reason: str, write) -> None:
    write(text, "s.json")
    message = refusal(write(MINIMAL + "deepspeed: s.json\n"))
    assert place in message
    assert re.search(reason, message)


# ------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("output_dir=x", ("output_dir",), "x"),
        ("train.learning_rate=1e-6", ("train", "learning_rate"), 1e-6),
        ("train.max_steps=", ("train", "max_steps"), None),
        ("train.pairs_per_step= 4", ("train", "pairs_per_step"), 4),
        ("model.name_or_path=a=b", ("model", "name_or_path"), "a=b"),
        ("log.trackers=[wandb]", ("log", "trackers"), ["wandb"]),
        ("checkpoint={save_every: 3}", ("checkpoint", "save_every"), 3),
        ("data.train.1.path=q", ("data", "train", 1, "path"), "q"),
        ("data.train.0.columns.prompt=q", ("data", "train", 0, "columns", "prompt"), "q"),
        ("deepspeed.zero_optimization.stage=2", ("deepspeed", "zero_optimization", "stage"), 2),
        ("reference.mode=stored", ("reference", "mode"), "stored"),
    ],
)
def test_overrides_win(override: str, path: tuple[str | int, ...], value: Any, write) -> None:
    node: Any = config.load(
        write(with_train("[{path: a}, {path: b}]") + "train: {max_steps: 9, learning_rate: 1.0}\n"), [override]
    )
    for key in path:
        node = getattr(node, key) if isinstance(key, str) and not isinstance(node, dict) else node[key]
    assert node == value
    assert type(node) is type(value)


def test_the_last_override_wins_and_leaves_the_rest(write) -> None:
    loaded = config.load(write(MINIMAL + "train: {seed: 1, max_steps: 2}\n"), ["train.seed=3", "train.seed=4"])
    assert (loaded.train.seed, loaded.train.max_steps) == (4, 2)


def test_an_override_fills_an_empty_section(write) -> None:
    assert config.load(write(MINIMAL + "train:\n"), ["train.seed=3"]).train.seed == 3


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("foo", "not of the form section.key=value"),
        ("=x", "not of the form section.key=value"),
        ("train.max_steps=[", "not valid YAML"),
        ("train.max_steps=a: b: c", "not valid YAML"),
        ("train.max_steps=!!int abc", "not valid YAML"),
        ("train.max_steps=*x", "not valid YAML"),
        ("train.²=1", "train.²: unknown key"),
        (f"output_dir={'x' * 256}", "output_dir: longer than a name may be"),
        (f"data.train.0.path={'x/' * 120}{'y' * 256}", "data.train.0.path: longer than a name may be"),
        ('model.name_or_path="a\\0b"', "model.name_or_path: has characters that do not print"),
        ("train.lerning_rate=1", "train.lerning_rate: unknown key; did you mean 'learning_rate'"),
        ("trian.seed=1", "unknown key; did you mean 'train'"),
        ("train.max_steps=99999999999999999999999", "train.max_steps: 99999999999999999999999 is more than anything"),
        ("data.tokens_per_pack=99999999999999999999999", "data.tokens_per_pack: 99999999999999999999999 is more than"),
        ("train.max_steps=1.5", "train.max_steps: must be an integer, not 1.5"),
        ("train.seed.x=1", "train.seed"),
        ("output_dir.x=1", "output_dir"),
        ("model=3", "model: "),
        ("data.train.5.path=q", "data.train.5"),
        ("data.train.0.weigth=2", "data.train.0.weigth: unknown key; did you mean 'weight'"),
        ("data.train.path=q", "data.train"),
        ("log.trackers.0=wandb", "log.trackers"),
        ("train.eval_every=3", "train.eval_every: there is nothing to evaluate"),
        ("per_device_train_batch_size=4", "train.pairs_per_step"),
        ("deepspeed.zero_optimization.stage=0", "deepspeed.zero_optimization.stage: stage 0 in bfloat16"),
        ("0=1", "0"),
        (".=1", "not of the form|unknown key"),
    ],
)
def test_a_bad_override_is_one_line_that_quotes_it(override: str, reason: str, write) -> None:
    message = refusal(write(with_train("[{path: a}, {path: b}]") + "train: {seed: 1}\n"), override)
    assert message.startswith(f"override '{override}': " if len(override) <= 300 else f"override '{override[:140]} ... ")
    assert re.search(reason, message)


def test_an_overridden_section_is_blamed_and_not_the_file(write) -> None:
    message = refusal(write(MINIMAL + "train:\n  pairs_per_step: 3\n"), "train={pairs_per_step: x}")
    assert message.startswith("override 'train={pairs_per_step: x}': train.pairs_per_step: ")


def test_an_index_into_one_source_says_that_there_is_no_list(write) -> None:
    message = refusal(write(MINIMAL), "data.train.0.path=q")
    assert message.startswith("override 'data.train.0.path=q': data.train")


SHORT = """model:
  name_or_path: m
  lora: true
data:
  train: [a.jsonl, b.jsonl]
  eval: held.jsonl
log: {trackers: wandb}
output_dir: o
"""


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["data.train.1.path=q"], {"data.train.0.path": "a.jsonl", "data.train.1.path": "q"}),
        (["data.train.0.columns.chosen=c"], {"data.train.0.path": "a.jsonl", "data.train.0.columns.chosen": "c"}),
        (["data.eval.split=test"], {"data.eval.path": "held.jsonl", "data.eval.split": "test"}),
        (["data.eval.template={prompt: '{p}', chosen: c, rejected: r}"], {"data.eval.template.prompt": "{p}"}),
        (["model.lora.r=4"], {"model.lora.r": 4, "model.lora.lora_alpha": 32}),
        (["model.lora=false", "model.lora.r=4"], {"model.lora.r": 4}),
        (["data.train=c.jsonl", "data.train.weight=2.0"], {"data.train.path": "c.jsonl", "data.train.weight": 2.0}),
        (["data.train=[c, d]", "data.train.1.weight=2.0"], {"data.train.1.path": "d", "data.train.1.weight": 2.0}),
        (["train.profile=5"], {"train.profile.steps": [5, 5]}),
        (["train.profile=[5, 8]"], {"train.profile.steps": [5, 8]}),
        (["train.profile={steps: 5}"], {"train.profile.steps": [5, 5]}),
        (["train.profile=[5, 8]", "train.profile.steps=[6, 8]"], {"train.profile.steps": [6, 8]}),
        (["log.trackers.0=tensorboard"], {"log.trackers": ["tensorboard"]}),
        (["data.train.0=c.jsonl", "data.train.0.path=d.jsonl"], {"data.train.0.path": "d.jsonl"}),
    ],
)
def test_keys_below_a_short_form_are_set_as_below_its_long_one(overrides, changes, write) -> None:
    loaded = config.resolved(config.load(write(SHORT), overrides))
    for key, value in changes.items():
        node: Any = loaded
        for part in key.split("."):
            node = node[int(part) if part.isdecimal() else part]
        assert node == value, key


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["data.train.0.colums.chosen=c"], "override 'data.train.0.colums.chosen=c': data.train.0.colums: unknown key"),
        (["model.lora.r=x"], "override 'model.lora.r=x': model.lora.r: must be an integer"),
        (["data.eval.path=$X/a"], "override 'data.eval.path=$X/a': data.eval.path: $X: variables"),
        (["data.train.2.path=q"], "override 'data.train.2.path=q': data.train.2: no such section or list item"),
        (["data.train=c", "data.train.0.path=q"], "override 'data.train.0.path=q': data.train.0: no such"),
        (["log.trackers.1=wandb"], "override 'log.trackers.1=wandb': log.trackers.1: no such"),
        (["model.name_or_path.x=1"], "override 'model.name_or_path.x=1': model.name_or_path.x: no such"),
    ],
)
def test_what_is_wrong_below_a_short_form_is_blamed_on_the_override(overrides, place, write) -> None:
    assert refusal(write(SHORT), *overrides).startswith(place)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.profile=[8, 5]"], "takes the first step and the last one, in that order, such as [5, 8], not [8, 5]"),
        (["train.profile=[5, 6, 8]"], "takes the first step and the last one, in that order, such as [5, 8], not [5, 6, 8]"),
        (["train.profile=0"], "must be greater than or equal to 1, not 0"),
        (["train.profile=[0, 3]"], "must be greater than or equal to 1, not 0"),
        (["train.profile=true"], "must be the first step and the last one, such as [5, 8], or a step, not true"),
        (['train.profile="5-8"'], "must be the first step and the last one, such as [5, 8], or a step, not '5-8'"),
        (["train.profile=[5, 8]", "train.max_steps=7"], "there is no step 8, the run has 7"),
        (["train.profile=5", "train.overfit=4"], "there is no step 5, the run has 4"),
        (["train.profile={step: 5}"], "train.profile.step: unknown key; did you mean 'steps'?"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused_in_one_line(overrides, reason, write) -> None:
    message = refusal(write(SHORT), *overrides)
    assert reason in message and "train.profile" in message and "\n" not in message


def test_what_the_file_said_in_a_short_form_is_blamed_on_its_line(write) -> None:
    message = refusal(write(SHORT.replace("held.jsonl", "$X/held.jsonl")), "data.eval.split=test")
    assert message.startswith("x.yaml:6:3: data.eval.path: $X: variables are not expanded")
    message = refusal(write(SHORT.replace("b.jsonl", "''")), "data.train.1.weight=2.0")
    assert message.startswith("x.yaml:5:20: data.train.1.path: is empty")


# ---------------------------------------------------------------------------------------------------------- shipped


def shipped_configs() -> list[Path]:
    return sorted((ROOT / "launch" / "configs").glob("*.yaml"))


@cache
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(config.schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_every_shipped_config_loads_and_fits_the_schema() -> None:
    paths = shipped_configs()
    assert paths, "launch/configs ships no YAML"
    for path in paths:
        config.load(path)
        validator().validate(yaml12.parse(path)[0])


@pytest.mark.parametrize("text", RESOLVED)
def test_the_schema_takes_what_loads(text: str, write) -> None:
    loaded = config.load(write(text))
    validator().validate(yaml12.parse(Path("x.yaml"))[0])
    validator().validate(yaml.safe_load(config.dump(loaded)))


@pytest.mark.parametrize(
    "case",
    [
        "unknown section",
        "unknown key",
        "unknown column",
        "unknown key of a source",
        "float for int",
        "text for float",
        "off for bool",
        "off for bool or auto",
        "number for section",
        "zero",
        "half",
        "dtype",
        "loss",
        "loss in a list",
        "loss of cpo",
        "list of losses of cpo",
        "objective",
        "ld_alpha above 1",
        "negative weight of a loss",
        "alpha 1 of a divergence",
        "misspelt key of an objective",
        "router scope",
        "no model",
        "no path",
        "no sources",
        "TRL batch",
    ],
)
def test_the_schema_rejects_what_an_editor_can_see(case: str, write) -> None:
    document, _ = yaml12.parse(write(BAD[case][0]))
    assert not validator().is_valid(document)


def test_the_schema_documents_every_key() -> None:
    """An editor shows the text below each key."""
    schema = json.loads(config.schema())
    for section in (schema, *schema["$defs"].values()):
        for key, field in section["properties"].items():
            # The keys of an objective are documented at their loss, in docs/objectives.md.
            if section["title"] not in {section.__name__ for section in OBJECTIVE_SECTIONS.values()}:
                assert field.get("description"), (section["title"], key)


def test_foreign_keys_lead_to_keys_that_exist() -> None:
    """Each hint that names `section.key` names one of ours, and no foreign key is a key of ours at the top level."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    named = 0
    for foreign, hint in FOREIGN_KEYS.items():
        assert foreign not in sections
        for section, key in re.findall(r"\b(model|reference|data|objective|train|checkpoint|log)\.(\w+)", hint):
            known = {k for keys in KEYS.values() for k in keys} if section == "objective" else sections[section].model_fields
            assert key in known, (foreign, hint)
            named += 1
    assert named >= 40

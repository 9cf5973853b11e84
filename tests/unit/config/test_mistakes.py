"""Typical mistakes in a config: every fault is told at once, in words of the field, and every hint works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dspref import config
from dspref.config import hints, yaml12
from dspref.config.absent import NOT_NEEDED
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.foreign_values import VALUES, WHOLE_VALUES
from dspref.config.load import MAX_LINES
from dspref.config.sections import OBJECTIVE_SECTIONS, Config, DataSection, SourceSection
from dspref.config.within import WITHIN
from dspref.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": {"path": "p.jsonl"}}, "output_dir": "out"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_(path: str, value: Any, base: dict[str, Any] = MINIMAL) -> dict[str, Any]:
    """The document with a key set."""
    document = json.loads(json.dumps(base))
    node, keys = document, path.split(".")
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
    return document


def without(path: str, document: dict[str, Any]) -> Any:
    node = document
    *above, last = path.split(".")
    for key in above:
        node = node[key]
    return node.pop(last)


def load(document: dict[str, Any] | str, *overrides: str) -> Config:
    text = document if isinstance(document, str) else json.dumps(document, indent=1)
    Path("x.yaml").write_text(text)
    return config.load("x.yaml", overrides)


def faults(document: dict[str, Any] | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(document, *overrides)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


# ------------------------------------------------------------------------------------------------------- all at once


def test_every_fault_of_a_config_is_told_at_once() -> None:
    """Of pydantic, of the checks and of the DeepSpeed settings; unknown keys first, then values, then the rest."""
    Path("s.json").write_text('{"optimizer": {}, "zero_optimization": {"stage": 2, "overlap_com": true}}')
    text = (
        "model: {name_or_path: m, dtype: bf16, adapter_name: a}\n"
        "data:\n  train: {path: p.jsonl, wieght: 2}\n  max_length: 100\n  max_prompt_length: 200\n"
        "objective: {beta: -1}\n"
        "train: {lerning_rate: 1e-6, seed: x, lr_scheduler_type: cosine_with_min_lr}\n"
        "deepspeed: s.json\n"
    )
    lines = faults(text)
    assert [line.split(": ")[1] for line in lines] == [
        "data.train.wieght", "train.lerning_rate",
        "model.dtype", "objective.beta", "train.seed",
        "model.adapter_name", "data.max_prompt_length", "train.lr_scheduler_kwargs",
        "deepspeed.optimizer", "deepspeed.zero_optimization.overlap_com",
        "output_dir",
    ]  # fmt: skip
    assert all(re.match(r"x\.yaml(:\d+:\d+)?: ", line) for line in lines)
    assert lines[0].startswith("x.yaml:3:26: ") and lines[-1].startswith("x.yaml: output_dir: is missing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modle: {name_or_path: m}\ndata: {train: a}\noutput_dir: o\n", ["modle"]),
        ("model_name_or_path: m\ndataset: x\noutput: o\n", ["model_name_or_path", "dataset", "output"]),
        ("model: {name: m}\ndata: {train: {file: a}}\noutput_dir: o\n", ["model.name", "data.train.file"]),
        ("model: {name_or_path: m}\ndata: {tran: a}\noutput_dir: o\n", ["data.tran"]),
    ],
)
def test_what_is_misspelt_is_not_missing_too(text: str, told: list[str]) -> None:
    assert [line.split(": ")[1] for line in faults(text)] == told


def test_a_check_says_nothing_that_hangs_on_a_wrong_key() -> None:
    """`eval_evry: 10` would make keep_best look as if nothing was evaluated at its checkpoints."""
    document = with_("data.eval", "q.jsonl") | {"checkpoint": {"keep_best": "eval_loss", "save_every": 10}}
    assert len(faults(document)) == 1  # which is told where nothing is misspelt
    assert [line.split(": ")[1] for line in faults(document | {"train": {"eval_evry": 10}})] == ["train.eval_evry"]
    # A strategy that cannot be read is no ground to judge an optimizer by.
    lines = faults(MINIMAL | {"deepspeed": {"zero_optimization": 3}, "train": {"optim": "cpu_adam"}})
    assert len(lines) == 1 and "deepspeed.zero_optimization: must be a mapping" in lines[0]


def test_a_check_that_hangs_on_nothing_wrong_speaks() -> None:
    lines = faults(MINIMAL | {"train": {"eval_every": 3, "warmup_steps": 3, "warmup_ratio": 0.1, "seed": "x"}})
    assert [line.split(": ")[1] for line in lines] == ["train.seed", "train.eval_every", "train.warmup_steps"]


def test_faults_of_overrides_come_with_those_of_the_file() -> None:
    lines = faults(with_("train.sed", 3), "output_dr=x", "train.seed.x=1", "foo")
    assert [line.split(": ")[0] for line in lines] == [
        "override 'foo'", "x.yaml:12:3", "override 'output_dr=x'", "override 'train.seed.x=1'",
    ]  # fmt: skip


def test_hundreds_of_faults_are_counted() -> None:
    lines = faults(MINIMAL | {f"key_{k}": k for k in range(100)})
    assert len(lines) == MAX_LINES + 1 and lines[-1] == f"... and {100 - MAX_LINES} more"


def test_overrides_that_replace_each_other_are_said() -> None:
    assert config.repeated(["train.seed=3", "output_dir=a", "train.seed=4"]) == [
        "override 'train.seed=3': is replaced by 'train.seed=4' behind it"
    ]
    assert len(config.repeated(["train.seed=3", "train={}"])) == 1
    assert config.repeated(["train.seed=3", "train.seedling=4", "output_dir=a"]) == []


# ------------------------------------------------------------------------------------------------------------- hints

# (key, value) -> what the file should have said; the hint must lead there.
MISTAKES: dict[tuple[str, Any], tuple[str, Any]] = {
    ("train.lr", 1e-6): ("train.learning_rate", 1e-6),
    ("train.save_steps", 3): ("checkpoint.save_every", 3),
    ("train.epochs", 3): ("train.num_train_epochs", 3),
    ("train.batch_size", 8): ("train.pairs_per_step", 8),
    ("train.max_length", 99): ("data.max_length", 99),
    ("train.beta", 0.2): ("objective.beta", 0.2),
    ("train.optimizer", "adamw"): ("train.optim", "adamw"),
    ("train.warmup", 0.2): ("train.warmup_ratio", 0.2),
    ("train.logging_steps", 2): ("log.every", 2),
    ("train.output_dir", "x"): ("output_dir", "x"),
    ("train.lerning_rate", 0.1): ("train.learning_rate", 0.1),
    ("model.lora.rank", 8): ("model.lora.r", 8),
    ("model.lora.alpha", 8): ("model.lora.lora_alpha", 8),
    ("model.lora.dropout", 0.1): ("model.lora.lora_dropout", 0.1),
    ("model.r", 8): ("model.lora.r", 8),
    ("model.lora_r", 8): ("model.lora.r", 8),
    ("model.torch_dtype", "float32"): ("model.dtype", "float32"),
    ("model.tokenizer", "t"): ("model.tokenizer_name_or_path", "t"),
    ("model.flash_attention", "sdpa"): ("model.attn_implementation", "sdpa"),
    ("reference.model", "r"): ("reference.name_or_path", "r"),
    ("data.cutoff_len", 9): ("data.max_length", 9),
    ("data.test", "q.jsonl"): ("data.eval", "q.jsonl"),
    ("data.train.limit", 9): ("data.train.max_samples", 9),
    ("data.train.wieght", 2.0): ("data.train.weight", 2.0),
    ("data.train.file", None): ("data.train.path", None),
    ("lerning_rate", 1e-3): ("train.learning_rate", 1e-3),
    ("seed", 3): ("train.seed", 3),
    ("simpo_gamma", 0.5): ("objective.simpo_gamma", 0.5),
    ("num_epochs", 2): ("train.num_train_epochs", 2),
    ("wandb_project", "p"): ("log.project", "p"),
    ("report_to", "wandb"): ("log.trackers", ["wandb"]),
    ("sequence_len", 100): ("data.max_length", 100),
    ("pref_beta", 0.2): ("objective.beta", 0.2),
    ("ref_model", "r"): ("reference.name_or_path", "r"),
    ("train.optim", "adamw_torch"): ("train.optim", "adamw"),
    ("train.optim", "paged_adamw_8bit"): ("train.optim", "adamw_8bit"),
    ("train.lr_scheduler_type", "linaer"): ("train.lr_scheduler_type", "linear"),
    ("model.dtype", "bf16"): ("model.dtype", "bfloat16"),
    ("model.attn_implementation", "eager"): ("model.attn_implementation", "sdpa"),
    ("model.init", "scratch"): ("model.init", "random"),
    ("data.truncation_mode", "left"): ("data.truncation_mode", "keep_end"),
    ("data.on_bad_row", "skip"): ("data.on_bad_row", "drop"),
    ("data.shuffle", "no"): ("data.shuffle", False),
    ("data.prefix_sharing", "on"): ("data.prefix_sharing", True),
    ("checkpoint.resume", True): ("checkpoint.resume", "auto"),
    ("checkpoint.resume", False): ("checkpoint.resume", "never"),
    ("reference.mode", "precompute"): ("reference.mode", "stored"),
    ("log.trackers", "tb"): ("log.trackers", ["tensorboard"]),
    ("log.trackers", "none"): ("log.trackers", []),
    ("log.trackers", "all"): ("log.trackers", ["wandb", "tensorboard"]),
    ("objective.loss_type", "dpo"): ("objective.loss_type", "sigmoid"),
    ("objective.loss_type", "bco"): ("objective.loss_type", "bco_pair"),
    ("objective.f_divergence_type", "js"): ("objective.f_divergence_type", "js_divergence"),
    ("objective", "simpo"): ("objective", {"name": "simpo"}),
    ("objective", "ipo"): ("objective", {"name": "dpo", "loss_type": "ipo"}),
    ("objective.name", "ipo"): ("objective", {"name": "dpo", "loss_type": "ipo"}),
    ("objective.name", "sppo"): ("objective", {"name": "dpo", "loss_type": "sppo_hard"}),
    ("objective.name", "SimPO"): ("objective.name", "simpo"),
    ("objective.type", "cpo"): ("objective.name", "cpo"),
    ("model", "m"): ("model", {"name_or_path": "m"}),
    ("data", "p.jsonl"): ("data", {"train": "p.jsonl"}),
    ("model.lora", "yes"): ("model.lora", {}),
    ("model.lora", 8): ("model.lora", {"r": 8}),
    ("train.seed", 8.0): ("train.seed", 8),
    ("train.seed", "8"): ("train.seed", 8),
    ("train.pairs_per_step", "1_000"): ("train.pairs_per_step", 1000),
    ("train.learning_rate", "1e-6"): ("train.learning_rate", 1e-6),
    ("output_dir", 3): ("output_dir", "3"),
    ("model.lora.modules_to_save", "lm_head"): ("model.lora.modules_to_save", ["lm_head"]),
    ("objective.loss_weights", 2): ("objective.loss_weights", [2]),
    ("packing", True): ("", None),
    ("train.group_by_length", True): ("", None),
    ("wandb_entity", "x"): ("", None),
}  # fmt: skip


def corrected(document: dict[str, Any], line: str) -> dict[str, Any]:
    """The document with the hint of a line applied, as a person would."""
    key = line.split(": ")[1]
    value = without(key, document)
    if "; drop it" in line:
        return document
    if found := re.search(r"; write objective: (.*)$", line):
        return with_("objective", yaml12.parse_value(found[1]), document)
    if found := re.search(r"; write (.*?)(, in quotes)?$", line):
        return with_(key, yaml12.parse_value(found[1]), document)
    if found := re.search(r"in dspref this is ([\w.]+)(: ([\w.]+|\[\w+\]))?", line):
        parent = key.rpartition(".")[0]
        place = found[1] if "." in found[1] or found[1] == "output_dir" else f"{parent}.{found[1]}"
        return with_(place, yaml12.parse_value(found[3]) if found[3] else value, document)
    found = re.search(r"did you mean '?([\w.]+)'?\?$", line)
    assert found, line
    if "unknown key" not in line:
        return with_(key, found[1], document)
    place = found[1] if "." in found[1] else ".".join([*key.split(".")[:-1], found[1]])
    return with_(place, value, document)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake[0]}: {mistake[1]}")
def test_every_hint_applied_makes_the_fault_go_away(mistake: tuple[str, Any]) -> None:
    key, value = mistake
    wanted, wanted_value = MISTAKES[mistake]
    base = MINIMAL
    if key == "simpo_gamma":
        base = MINIMAL | {"objective": {"name": "simpo"}}
    if key == "data.train.file":
        base, value = with_("data.train", {}), "p.jsonl"
        wanted_value = "p.jsonl"
    document = with_(key, value, base)
    lines = faults(document)
    assert len(lines) == 1, lines
    loaded = load(corrected(document, lines[0]))
    if wanted:
        assert loaded == load(with_(wanted, wanted_value, base))


def test_names_that_are_not_close_are_not_proposed() -> None:
    for key in ("train.loss", "train.zzz", "model.lora.zero", "log.loss"):
        (line,) = faults(with_(key, 1))
        assert "did you mean" not in line, line
    for name in ("rdpo", "ppo", "grpo", "tdpo"):
        (line,) = faults(with_("objective.name", name))
        assert "did you mean" not in line, line
    (line,) = faults(with_("train.optim", "sgd"))
    assert line.endswith("not 'sgd'; the optimizers are AdamW's three")


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("trian", ["train", "data"], "train"),
        ("lerning-rate", ["learning_rate", "lr_scheduler_type"], "learning_rate"),
        ("lr", ["lr_scheduler_type"], None),
        ("ipo", ["dpo", "cpo"], None),
        ("attn", ["attn_implementation", "dtype"], "attn_implementation"),
        ("adam", ["adam_beta1", "adam_beta2"], None),
        ("save_steps", ["max_steps", "save_every"], None),
        ("rank", ["rank_pattern", "r"], "rank_pattern"),  # of model.lora, WITHIN knows better
        ("DPO", ["dpo"], "dpo"),
    ],
)
def test_near(word: str, choices: list[str], meant: str | None) -> None:
    assert hints.near(word, choices) == meant


def test_slips_are_counted() -> None:
    assert [hints.slips(*pair) for pair in (("ab", "ab"), ("ab", "ba"), ("ab", "abc"), ("abc", "axc"), ("pth", "path"))] == [
        0, 1, 1, 1, 1,
    ]  # fmt: skip


def test_every_answer_names_a_key_that_exists_or_says_why_there_is_none() -> None:
    known = keys_of_the_schema()
    for hint in {*FOREIGN_KEYS.values(), *(h for table in WITHIN.values() for h in table.values())}:
        named = {".".join(map(str, path)) for path in hints.named(hint)}
        assert named <= known, (hint, named - known)
        if not named:  # of a source, relative to it
            assert re.match(r"\w+", hint)[0] in {*SourceSection.model_fields, *DataSection.model_fields}, hint  # type: ignore
    assert all(len(why.split()) > 2 for why in NOT_NEEDED.values())
    assert len(FOREIGN_KEYS) + len(NOT_NEEDED) > 200
    assert not {*FOREIGN_KEYS} & {*NOT_NEEDED}


def test_every_foreign_value_leads_to_one_of_ours() -> None:
    texts = json.dumps(Config.model_json_schema())
    for key, table in VALUES.items():
        for theirs, ours in table.items():
            assert f'"{ours}"' in texts, (key, theirs, ours)
    assert set(WHOLE_VALUES) == {"trackers"}


def keys_of_the_schema() -> set[str]:
    found = {*Config.model_fields}
    for name, paths in hints.all_homes().items():
        found |= {*paths, name}
    found |= {f"objective.{key}" for section in OBJECTIVE_SECTIONS.values() for key in section.model_fields}
    return found


OF_OTHER_TOOLS = """
    base_model model_type tokenizer_type rl rl_beta datasets dataset_prepared_path val_set_size sequence_len
    sample_packing eval_sample_packing pad_to_sequence_len adapter lora_model_dir lora_target_linear
    lora_modules_to_save peft_use_dora micro_batch_size num_epochs optimizer lr_scheduler flash_attention
    sdp_attention wandb_name wandb_watch evals_per_epoch saves_per_epoch auto_resume_from_checkpoints fsdp
    stage do_train finetuning_type lora_rank lora_target additional_target template cutoff_len overwrite_cache
    preprocessing_num_workers pref_beta pref_loss pref_ftx quantization_bit neat_packing plot_loss val_size
    overwrite_output_dir ddp_timeout flash_attn ref_model adapter_name_or_path loraplus_lr_ratio use_unsloth
    per_device_train_batch_size gradient_accumulation_steps precompute_ref_log_probs dataset_num_proc hub_model_id
"""


@pytest.mark.parametrize("key", OF_OTHER_TOOLS.split())
def test_keys_of_other_tools_are_answered(key: str) -> None:
    (line,) = faults(MINIMAL | {key: 1})
    assert "in dspref this is " in line or "drop it: " in line, line


# ------------------------------------------------------------------------------------------------------------- paths

PATHS = (
    "model.name_or_path", "model.tokenizer_name_or_path", "model.chat_template", "model.lora.path", "reference.name_or_path",
    "reference.store", "data.train.path", "data.train", "data.eval.path", "data.eval", "output_dir",
)  # fmt: skip


def value_at(loaded: Any, path: str) -> Any:
    for key in path.split("."):
        loaded = getattr(loaded, key)
    return getattr(loaded, "path", loaded)


@pytest.mark.parametrize("key", PATHS)
def test_home_is_home_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the config, in what a run folder keeps of it, and in what is loaded from there."""
    monkeypatch.setenv("HOME", "/home/ada")
    loaded = load(with_(key, "~/x"))
    assert value_at(loaded, key) == "/home/ada/x"
    Path("resolved.yaml").write_text(config.dump(loaded))
    monkeypatch.setenv("HOME", "/home/bob")
    assert value_at(config.load("resolved.yaml"), key) == "/home/ada/x"
    assert value_at(load(with_(key, "a~/x")), key) == "a~/x"


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["$OUT/x", "${OUT}/x", "a/$OUT", "${OUT"])
def test_variables_in_paths_are_refused(key: str, value: str) -> None:
    (line,) = faults(with_(key, value))
    key = key if "train" not in key and "eval" not in key else key.removesuffix(".path")
    assert f": {key}" in line and "variables are not expanded" in line and f'="{value}"' in line


@pytest.mark.parametrize("value", ["", " ", "a\0b", "a\nb"])
def test_paths_that_name_nothing_are_refused(value: str) -> None:
    (line,) = faults(with_("output_dir", value))
    assert "is empty" in line or "do not print" in line


def test_the_home_of_nobody_is_refused() -> None:
    (line,) = faults(with_("output_dir", "~no-such-user/x"))
    assert "no such user" in line and "./~no-such-user/x" in line
    assert load(with_("output_dir", "./~no-such-user/x")).output_dir == "./~no-such-user/x"


def test_the_strategy_and_the_config_itself_may_lie_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DSPREF_CACHE", "~/cache")
    (tmp_path / "s.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "home.yaml").write_text(json.dumps(MINIMAL | {"deepspeed": "~/s.json"}))
    assert config.load("~/home.yaml").zero_stage == 2
    assert config.cache_folder("tokens") == tmp_path / "cache" / "tokens"


def test_a_template_written_out_is_no_path() -> None:
    text = "{{ messages[0].content }}~$x"
    assert load(with_("model.chat_template", text)).model.chat_template == text


# ------------------------------------------------------------------------------------------------------- short forms


@pytest.mark.parametrize(
    ("key", "short", "long"),
    [
        ("data.train", "p.jsonl", {"path": "p.jsonl"}),
        ("data.train", ["a", "b"], [{"path": "a"}, {"path": "b"}]),
        ("data.train", ["a", {"path": "b", "weight": 2.0}], [{"path": "a"}, {"path": "b", "weight": 2.0}]),
        ("data.eval", "q.jsonl", {"path": "q.jsonl"}),
        ("model.lora", True, {}),
        ("model.lora", False, None),
        ("log.trackers", "wandb", ["wandb"]),
    ],
)
def test_short_forms_are_the_long_ones(key: str, short: Any, long: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    first, second = load(with_(key, short)), load(with_(key, long))
    assert first == second and config.dump(first) == config.dump(second)
    jsonschema.validate(with_(key, short), json.loads(config.schema()))
    assert load(MINIMAL, f"{key}={yaml.safe_dump(short, default_flow_style=True).splitlines()[0]}") == second


def test_what_a_conversion_left_open_is_refused_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(
        "model: {name_or_path: m, lora: {target_modules: FILL_IN}}\ndata: {train: d}\n"
        "objective: {name: dpo, beta: FILL_IN}\n"
        "deepspeed: FILL_IN\nlog: {run_name: FILL_IN}\nexport: {push_to_hub: FILL_IN/mine}\noutput_dir: FILL_IN\n"
    )
    with pytest.raises(ConfigError) as error:
        config.load(path)
    told = {line.split(": ")[1]: line for line in str(error.value).splitlines()}
    assert {*told} == {
        "model.lora.target_modules", "objective.beta", "deepspeed", "log.run_name", "export.push_to_hub", "output_dir",
    }  # fmt: skip
    assert all("is still to be filled in" in line for line in told.values())

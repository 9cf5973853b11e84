"""Configs of other trainers, in their form: what `dspref convert` makes of them, and that `dspref check` takes it."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dspref import config
from dspref.cli import app
from dspref.config.foreign import FOREIGN_KEYS, place_of
from dspref.convert.conversion import convert, convert_keys
from dspref.convert.dialects import DEFAULTS, DIALECTS
from dspref.convert.theirs import Theirs
from dspref.errors import ConfigError

THEIRS = Path(__file__).parent / "theirs"
KEYS = Path(__file__).parents[1] / "config" / "keys"
FILES = sorted(path.name for path in THEIRS.iterdir() if path.suffix in (".yaml", ".py", ".sh"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the local data that the files name."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    row = json.dumps({"prompt": "q", "question": "q", "chosen": "yes", "rejected": "no", "good": "yes", "bad": "no"})
    for name in ("mine.jsonl", "dpo_en_demo.json", "pairs_a.json", "pairs_b.json", "ultra.json", "ultra_eval.json"):
        Path("data", name).write_text(row + "\n" if name.endswith("l") else f"[{row}]")


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, prog_name="dspref")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def converted(text: str, name: str = "theirs.yaml", **options: Any) -> tuple[config.Config, str]:
    Path(name).write_text(text)
    made = convert(Path(name), **options)
    Path("made.yaml").write_text(made.replace(": FILL_IN/", ": me/"))
    return config.load("made.yaml"), made


def refused(text: str, name: str = "theirs.yaml", **options: Any) -> str:
    Path(name).write_text(text)
    with pytest.raises(ConfigError) as error:
        convert(Path(name), **options)
    assert error.value.exit_code == 2 and str(error.value).count("\n") == 0
    return str(error.value)


# ------------------------------------------------------------------------------------------------- ten public configs

# File -> (whose, GPUs, key -> value in the result, words of its comments).
WANTED: dict[str, tuple[str, int | None, dict[str, Any], list[str]]] = {
    "handbook_dpo.yaml": (
        "alignment-handbook", None,
        {"objective.name": "dpo", "objective.beta": 0.01, "train.pairs_per_step": 128, "data.max_length": 1024,
         "data.max_prompt_length": 512, "data.train.split": "train_prefs", "data.eval.split": "test_prefs",
         "train.eval_every": 100, "checkpoint.save_every": 100, "checkpoint.keep_last": 1, "train.optim": "adamw",
         "model.attn_implementation": "flash_attention_2", "train.lr_scheduler_type": "cosine", "train.warmup_ratio": 0.1},
        ["8 GPUs, which is assumed", "optim: adamw_torch", "hub_model_id", "per_device_eval_batch_size: 8",
         "1 value is still to be filled in, where FILL_IN stands: export.push_to_hub"],
    ),
    "handbook_simpo.yaml": (
        "alignment-handbook", 4,
        {"objective.name": "simpo", "objective.beta": 2.5, "objective.gamma_beta_ratio": 0.55, "train.pairs_per_step": 128,
         "log.trackers": ["wandb"], "data.max_prompt_length": 1800, "log.run_name": "llama-8b-instruct-simpo"},
        ["2 per GPU x 16 accumulated x 4 GPUs", "a weight draws it anew"],
    ),
    "axolotl_dpo.yaml": (
        "axolotl", 2,
        {"objective.beta": 0.2, "model.load_in_4bit": True, "model.lora.r": 32, "model.lora.lora_dropout": 0.05,
         "model.lora.target_modules": "all-linear", "train.pairs_per_step": 16, "train.optim": "adamw_8bit",
         "train.warmup_steps": 10, "train.num_train_epochs": 4.0, "data.max_length": 4096, "log.project": "prefs"},
        ["val_set_size: 0.05", "evals_per_epoch: 4", "special_tokens", "ZeRO-3 cannot shard weights in 4 bits"],
    ),
    "axolotl_orpo.yaml": (
        "axolotl", 1,
        {"objective.name": "orpo", "objective.beta": 0.1, "train.pairs_per_step": 8, "train.max_steps": 500,
         "train.eval_every": 50, "model.lora.target_modules": ["q_proj", "v_proj", "gate_proj"], "train.seed": 7,
         "deepspeed": "ds_configs/zero2.json", "data.eval.split": "test", "checkpoint.keep_last": 3,
         "model.gradient_checkpointing": False},
        ["chat_template: chatml", "deepspeed_configs/zero2.json"],
    ),
    "llamafactory_dpo.yaml": (
        "llamafactory", 1,
        {"objective.name": "dpo", "objective.rpo_alpha": 0.2, "model.lora.r": 8, "model.lora.lora_alpha": 16,
         "model.lora.target_modules": "all-linear", "data.train.max_samples": 1000, "train.pairs_per_step": 8,
         "model.trust_remote_code": True, "data.train.path": "data/dpo_en_demo.json"},
        ["dpo_en_demo is a name of data/dataset_info.json", "template: llama3", "val_size: 0.1", "overwrite_output_dir"],
    ),
    "llamafactory_simpo.yaml": (
        "llamafactory", 8,
        {"objective.name": "simpo", "objective.beta": 2.0, "objective.simpo_gamma": 1.0, "model.lora": None,
         "train.pairs_per_step": 16, "deepspeed": "ds_configs/zero3.json", "model.attn_implementation": "flash_attention_2",
         "data.max_length": 4096},
        ["ds_z3_config.json", "template: qwen"],
    ),
    "llamafactory_orpo.yaml": (
        "llamafactory", 2,
        {"objective.name": "orpo", "objective.beta": 0.05, "model.lora.target_modules": ["q_proj", "v_proj"],
         "model.lora.lora_alpha": 64, "model.lora.modules_to_save": ["embed_tokens", "lm_head"], "train.eval_every": 100,
         "train.num_train_epochs": 3.0, "train.warmup_ratio": 0.0},
        ["num_train_epochs 3.0"],
    ),
    "trl_cli.yaml": (
        "trl", 1,
        {"objective.loss_type": ["sigmoid", "bco_pair", "sft"], "objective.loss_weights": [0.8, 0.2, 1.0],
         "reference.mode": "stored", "data.max_length": None, "train.warmup_ratio": 0.1, "train.pairs_per_step": 32,
         "model.lora.r": 32, "train.eval_every": 50, "log.trackers": ["wandb", "trackio"], "train.adam_beta2": 0.95,
         "train.num_train_epochs": 3.0, "data.eval.split": "test"},
        ["trl_cli.yaml:29: optim: adafactor -- train.optim: must be",
         "padding_free: true", "save_strategy: epoch", "env:", "keep_start"],
    ),
    "trl_script.py": (
        "trl", 4,
        {"objective.name": "cpo", "objective.loss_type": "simpo", "objective.cpo_alpha": 0.5, "objective.simpo_gamma": 1.2,
         "objective.beta": 2.0, "model.name_or_path": "example/Qwen-0.5B", "model.attn_implementation": "sdpa",
         "data.train.path": "example/pairs", "data.train.split": "train[:5000]", "model.lora.r": 16,
         "train.pairs_per_step": 128, "output_dir": "Qwen-CPO-SimPO", "train.max_steps": 9},
        ["max_steps: len(dataset) // 32 -- is computed there"],
    ),
    "open_instruct_dpo.yaml": (
        "open-instruct", 8,
        {"objective.loss_type": "dpo_norm", "objective.beta": 5, "train.max_grad_norm": 0, "train.pairs_per_step": 128,
         "model.tokenizer_name_or_path": "example/Tulu-8B-SFT", "checkpoint.save_every": 1000, "data.max_length": 2048,
         "model.lora": None, "model.revision": "main"},
        ["max_grad_norm: -1, which cuts nothing", "use_slow_tokenizer"],
    ),
    "openrlhf_dpo.sh": (
        "openrlhf", None,
        {"objective.beta": 0.1, "objective.rpo_alpha": 0.2, "train.pairs_per_step": 256, "data.max_length": 8192,
         "deepspeed": "ds_configs/zero3_offload.json", "reference.mode": "engine", "reference.offload": "cpu",
         "train.adam_beta2": 0.95, "train.lr_scheduler_type": "cosine_with_min_lr", "data.train.columns.chosen": "better",
         "data.train.columns.rejected": "worse", "output_dir": "./checkpoint/llama-8b-dpo", "log.trackers": ["wandb"],
         "checkpoint.save_every": 200, "reference.name_or_path": None,
         "model.attn_implementation": "flash_attention_2"},
        ["for 8 GPUs.", "micro-batches of 1", "packing_samples", "lr_warmup_ratio 0.03"],
    ),
}  # fmt: skip


def test_every_file_has_its_expectation() -> None:
    assert {*WANTED} == {*FILES} and len(FILES) >= 10
    assert {whose for whose, *_ in WANTED.values()} == {*DIALECTS} == {*DEFAULTS}


@pytest.mark.parametrize("name", WANTED)
def test_public_configs_are_converted_and_checked(name: str) -> None:
    whose, gpus, values, words = WANTED[name]
    shutil.copy(THEIRS / name, name)
    code, said = call("convert", name, "-o", "run.yaml", *(["--gpus", str(gpus)] if gpus else []))
    assert code == 0 and f"{name} -> run.yaml" in said, said
    text = Path("run.yaml").read_text()
    Path("run.yaml").write_text(re.sub(r"(?m)^( *max_steps: )FILL_IN$", r"\g<1>9", text).replace(": FILL_IN/", ": me/"))
    assert f"({whose})" in text.splitlines()[0]
    code, said = call("check", "run.yaml")
    assert code == 0, said
    loaded = config.load("run.yaml")
    for key, value in values.items():
        found: Any = loaded
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, (key, found)
    comments = " ".join(line.strip("# ") for line in text.splitlines() if "#" in line)
    for word in words:
        assert word in comments, (word, comments)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_nothing_is_dropped_in_silence(name: str) -> None:
    """Every key of the file is in the result: its place, or a comment that names it."""
    text = convert(THEIRS / name)
    document = yaml.safe_load(text)
    for key, value in yaml.safe_load((THEIRS / name).read_text()).items():
        place = place_of(key)
        path = place[0] if place else None
        node: Any = document
        for part in path or ():
            node = node.get(part) if isinstance(node, dict) else None
        same = [part for part in document.values() if isinstance(part, dict) and key in part]
        known = key in text or node is not None or same or str(value) in text
        assert known or value in (True, False) or key in HANDLED, (key, value)


HANDLED = {"dataset_splits", "datasets", "dataset_mixer_list", "report_to", "pref_loss", "stage", "rl", "finetuning_type"}


# ------------------------------------------------------------------------------------------------------ single questions

TRL = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
AXOLOTL = "base_model: m\ndatasets: [{path: d}]\noutput_dir: o\nrl: dpo\n"
FACTORY = "model_name_or_path: m\nstage: dpo\ndataset: d\noutput_dir: o\n"


@pytest.mark.parametrize(
    ("text", "name", "loss_type", "keys"),
    [
        (TRL + "beta: 0.1\nloss_type: ipo\n", "dpo", "ipo", {}),
        (TRL + "loss_type: [sigmoid]\nlabel_smoothing: 0.1\n", "dpo", "sigmoid", {"label_smoothing": 0.1}),
        (TRL + "beta: 0.1\nuse_weighting: true\nrpo_alpha: 1.0\n", "dpo", "sigmoid",
         {"use_weighting": True, "rpo_alpha": 1.0}),
        (TRL + "loss_type: simpo\nbeta: 2\n", "cpo", "simpo", {"cpo_alpha": 1.0, "simpo_gamma": 0.5}),
        (TRL + "loss_type: simpo\ncpo_alpha: 0.0\nsimpo_gamma: 1.5\n", "simpo", "simpo", {"simpo_gamma": 1.5}),
        (TRL + "cpo_alpha: 0.7\nbeta: 0.2\n", "cpo", "sigmoid", {"cpo_alpha": 0.7, "beta": 0.2}),
        (TRL.replace("output_dir: o", "output_dir: mistral-orpo-beta") + "beta: 0.05\n", "orpo", "orpo", {"beta": 0.05}),
        (TRL + "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.3\nbeta: 1\n", "dpo", "sigmoid",
         {"f_alpha_divergence_coef": 0.7}),
        (TRL + "f_divergence_type: js_divergence\nf_alpha_divergence_coef: 0.5\nbeta: 1\n", "dpo", "sigmoid",
         {"f_divergence_type": "js_divergence"}),
        (TRL + "gamma_beta_ratio: 0.5\nsft_weight: 0.1\nbeta: 10\n", "cpo", "simpo",
         {"cpo_alpha": 0.1, "gamma_beta_ratio": 0.5}),
        (AXOLOTL.replace("dpo", "ipo"), "dpo", "ipo", {"beta": 0.1}),
        (AXOLOTL.replace("rl: dpo", "rl: simpo\nrl_beta: 2.0\nsimpo_gamma: 0.8"), "cpo", "simpo",
         {"simpo_gamma": 0.8, "cpo_alpha": 1.0}),
        (AXOLOTL + "trl: {beta: 0.3}\ndpo_norm_loss: true\n", "dpo", "sigmoid_norm", {"beta": 0.3}),
        (AXOLOTL + "dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1.0, 0.5]\n", "dpo", ["sigmoid", "sft"],
         {"loss_weights": [1.0, 0.5]}),
        (FACTORY + "pref_loss: hinge\npref_beta: 0.3\n", "dpo", "hinge", {"beta": 0.3}),
        (FACTORY + "pref_loss: simpo\n", "simpo", "simpo", {"beta": 0.1, "simpo_gamma": 0.5}),
        ("model_name_or_path: m\ndataset_mixer_list: [d, 1.0]\ndpo_loss_type: wpo\noutput_dir: o\n", "dpo", "sigmoid",
         {"use_weighting": True}),
        ("model_name_or_path: m\ndataset_mixer_list: [d, 1.0]\ndpo_loss_type: simpo\ndpo_beta: 10\noutput_dir: o\n", "simpo",
         "simpo", {"gamma_beta_ratio": 0.3, "beta": 10}),
    ],
)  # fmt: skip
def test_objectives(text: str, name: str, loss_type: Any, keys: dict[str, Any]) -> None:
    loaded, made = converted(text)
    assert (loaded.objective.name, loaded.objective.loss_type) == (name, loss_type), made
    for key, value in keys.items():
        assert getattr(loaded.objective, key) == pytest.approx(value), (key, made)


def test_simpo_of_llamafactory_takes_its_own_beta() -> None:
    assert converted(FACTORY + "pref_loss: simpo\npref_beta: 2.5\n")[0].objective.beta == 2.5


@pytest.mark.parametrize(
    ("extra", "key", "value"),
    [
        ("fp16: true", "model.dtype", "float16"), ("bf16: false\nfp16: false", "model.dtype", "float32"),
        ("torch_dtype: float32\nbf16: true", "model.dtype", "bfloat16"), ("dtype: torch.float16", "model.dtype", "float16"),
        ("load_in_4bit: true\nuse_peft: true", "deepspeed", "ds_configs/zero2.json"),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1", "train.lr_scheduler_type", "constant_with_warmup"),
        ("lr_scheduler_type: constant", "train.lr_scheduler_type", "constant"),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}", "train.lr_scheduler_kwargs",
         {"min_lr_rate": 0.1}),
        ("eval_strategy: steps\neval_steps: 9\nearly_stopping_patience: 4", "train.stop_when.patience", 4),
        ("eval_strategy: steps\neval_steps: 9\nearly_stopping_patience: 4", "train.stop_when.metric", "eval_loss"),
        ("eval_strategy: 'no'\nearly_stopping_patience: 4", "train.stop_when", None),
        ("eval_strategy: steps\neval_steps: 9\nload_best_model_at_end: true", "export.weights", "best"),
        ("eval_strategy: steps\neval_steps: 9\nload_best_model_at_end: true\ngreater_is_better: true", "export.weights",
         "last"),
        ("eval_strategy: steps\neval_steps: 9\neval_on_start: true", "train.eval_at_start", True),
        ("max_steps: -1", "train.max_steps", None), ("max_steps: 1_000", "train.max_steps", 1000),
        ("warmup_steps: 100\nwarmup_ratio: 0.1", "train.warmup_steps", 100),
        ("optim: adamw_bnb_8bit", "train.optim", "adamw_8bit"),
        ("optim: lion_8bit", "train.optim", "adamw"), ("report_to: none", "log.trackers", []),
        ("report_to: all", "log.trackers", ["wandb", "tensorboard"]), ("save_strategy: 'no'", "checkpoint.save_every", None),
        ("save_strategy: no", "checkpoint.save_every", None),
        ("gradient_checkpointing: no", "model.gradient_checkpointing", False),
        ("activation_offloading: true", "model.gradient_checkpointing", "offload"),
        ("activation_offloading: false", "model.gradient_checkpointing", True), ("tiled_mlp: true", "model.tiled_mlp", True),
        ("model_init_kwargs: {attn_implementation: eager, revision: abc}", "model.attn_implementation", "sdpa"),
        ("model_init_kwargs: {revision: abc}", "model.revision", "abc"),
        ("sync_ref_model: true", "reference.sync_ref_model", True),
        ("ref_model: other", "reference.name_or_path", "other"), ("deepspeed: {zero_optimization: {stage: 1}}", "deepspeed",
         "ds_configs/zero1.json"), ("fsdp: full_shard auto_wrap", "deepspeed", "ds_configs/zero3.json"),
        ("deepspeed: ds/zero2_offload.json", "deepspeed", "ds_configs/zero2_offload.json"), ("seed: 3", "train.seed", 3),
        ("use_peft: false\nlora_r: 8", "model.lora", None), ("resume_from_checkpoint: true", "checkpoint.resume", "auto"),
        ("chat_template_path: my.jinja", "model.chat_template", "my.jinja"),
        ("max_prompt_length: 2000", "data.max_prompt_length", None),
        ('learning_rate: "2e-5"', "train.learning_rate", 2e-5), ("max_steps: '300'", "train.max_steps", 300),
        ("push_to_hub: true\nhub_model_id: me/mine", "export.push_to_hub", "me/mine"),
        ("hub_model_id: me/mine", "export.push_to_hub", None), ("use_swanlab: true", "log.trackers", ["swanlab"]),
    ],
)  # fmt: skip
def test_values_of_trl(extra: str, key: str, value: Any) -> None:
    Path("my.jinja").write_text("{{ messages }}")
    loaded, made = converted(TRL + "beta: 0.1\n" + extra + "\n")
    found: Any = loaded
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value, made


def test_every_key_of_every_list_is_placed_or_told() -> None:
    """One file with all of them at once, whatever their values: the result is a good config."""
    for path in sorted(KEYS.glob("*.txt")):
        keys = [key for line in path.read_text().splitlines() if not line.startswith("#") for key in line.split()]
        skipped = {"reward_model", "vllm", "process_reward_model", "center_rewards_coefficient", "num_labels", "ppo_epochs"}
        skipped |= {"compute_environment", "zero_optimization"}
        given = {key: "xyz" for key in keys if key not in skipped and "." not in key} | {"beta": 0.1, "loss_type": "sigmoid"}
        given |= {"stage": "dpo", "rl": "dpo", "pref_loss": "sigmoid"} if path.stem in ("axolotl", "llamafactory") else {}
        loaded, made = converted(json.dumps(given | {"model_name_or_path": "m"}), dialect=None, objective="dpo")
        assert loaded.objective.name == "dpo"
        lost = [key for key in given if key not in made and key not in FOREIGN_KEYS and given[key] == "xyz"]
        assert not [key for key in lost if key not in config.Config.model_fields], (path.stem, lost)


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 8, 2.5, 1e-6, "", "x", "a,b", "auto", "none", "${X}", "~nobody/x", "no", "steps", "lora",
    "a: b", [], [1], ["a", 1.0], ["a", "b", "c"], [[1]], [None], [{}], {}, {"a": 1}, {"a": {"b": [1]}}, {"path": 3},
    [{"path": ["x"]}], {"datasets": [3, {"id": 4}]}, [{"path": "p", "type": {"prompt_format": "{x"}}], 10**30, float("inf"),
    "true", "False", "4", "0.5, 1", "-1", 4.0, "\x1b[31m", "é\n# x: y", {"stage": "x"}, {"zero_optimization": 3},
    {"device": 3},
]  # fmt: skip
CODES = ["f()", "${X}", "a\n# b: c", "[1"]


@pytest.mark.parametrize("draws", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_values_are_the_result_is_a_good_config(seed: int, draws: int) -> None:
    """Or it is refused in one line."""
    draw = random.Random(seed)
    path = sorted(KEYS.glob("*.txt"))[seed]
    keys = [key for line in path.read_text().splitlines() if not line.startswith("#") for key in line.split()]
    made = 0
    for _ in range(draws):
        given = {key: draw.choice(VALUES) for key in draw.sample(keys, min(len(keys), draw.choice([5, 20, 60])))}
        computed = {key: draw.choice(CODES) for key in draw.sample(keys, draw.choice([0, 3, 8])) if key not in given}
        for dialect in DIALECTS:
            try:
                text = convert_keys(
                    Theirs(dict(given), unread=dict(computed)),
                    "x",
                    dialect,
                    objective=draw.choice(["dpo", "cpo", "simpo", "orpo", "kto", "bco"]),
                )
            except ConfigError as error:
                assert str(error).count("\n") == 0
                continue
            made += 1
            assert not [key for key in computed if key not in text], computed
            Path("made.yaml").write_text(text.replace(": FILL_IN/", ": me/"))
            try:
                config.load("made.yaml")
            except ConfigError as error:
                assert computed and all("is still to be filled in" in line for line in str(error).splitlines()), (
                    given,
                    error,
                )
    assert made or path.stem == "accelerate"  # most of which are refused


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "a config is a mapping"),
        ("", "a config is a mapping"),
        ("hello there\n", "a config is a mapping"),
        (TRL + "packing: true\nmax_seq_length: 2048\n", "supervised fine-tuning"),
        (TRL + "reward_funcs: [x]\nnum_generations: 8\nbeta: 0.1\n", "reinforcement learning"),
        (TRL + "learning_rate: 1e-5\n", "nothing in it says that it is a preference run; if it is, give --objective"),
        (
            "base_model: m\ndatasets: [{path: d, type: alpaca}]\nsequence_len: 2048\n",
            "supervised fine-tuning: it has no `rl`",
        ),
        (AXOLOTL.replace("dpo", "grpo"), "reinforcement learning"),
        (FACTORY.replace("stage: dpo", "stage: sft"), "supervised fine-tuning"),
        (FACTORY.replace("stage: dpo", "stage: ppo"), "reinforcement learning"),
        (
            "compute_environment: LOCAL_MACHINE\ndeepspeed_config: {zero_stage: 2}\nnum_processes: 8\n",
            "ds_configs/zero2.json",
        ),
        ("zero_optimization: {stage: 3}\n", "is a DeepSpeed config"),
        ("model: {name_or_path: m}\ndata: {train: d}\noutput_dir: o\n", "is a dspref config already"),
        ("colour: red\nbeta: 3\n", "give --from trl | "),
    ],
)
def test_what_is_no_preference_run_is_refused_in_one_line(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.py", "def f(:\n", "x.py:1: is no Python that can be read"),
        ("x.py", "print(3)\n", "holds no DPOConfig, CPOConfig, ORPOConfig, SimPOConfig, KTOConfig, BCOConfig or TPOConfig"),
        ("x.py", "from trl import SFTConfig\nargs = SFTConfig(output_dir='x')\n", "holds a SFTConfig"),
        ("x.py", "args = DPOConfig(beta=" + "+" * 3000 + "1)\n", "x.py"),
        ("x.py", "args = DPOConfig(beta=" + "(" * 150 + "1" + ",)" * 150 + ")\0", "is no Python"),
        ("x.sh", "ls\n", "holds no command with --key value"),
        ("x.sh", "python x.py --a 'b\n", "a quote is not closed"),
        ("x.sh", "deepspeed --module openrlhf.cli.train_sft --pretrain m --dataset d\n", "another kind of run (sft)"),
        ("x.sh", "accelerate launch --num_processes 8 trl grpo --model m --dataset d\n", "another kind of run (grpo)"),
    ],
)
def test_scripts_that_say_nothing_are_refused(name: str, text: str, said: str) -> None:
    assert said in refused(text, name)


def test_no_code_is_run(tmp_path: Path) -> None:
    code = "import os\nos.mkdir('ran')\nargs = DPOConfig(output_dir=os.mkdir('ran2'), beta=0.1, **{'max_length': 9})\n"
    Path("x.py").write_text(code)
    made = convert(Path("x.py"))
    assert not Path("ran").exists() and not Path("ran2").exists()
    document = yaml.safe_load(made)
    assert document["data"]["max_length"] == 9 and document["output_dir"] == "FILL_IN"
    assert "# output_dir: os.mkdir('ran2') -- is computed there; write the value\noutput_dir: FILL_IN" in made


def test_a_shell_line_of_trl() -> None:
    line = (
        "export CUDA_VISIBLE_DEVICES=0\nLR=5e-7\naccelerate launch --num_processes 4 --config_file z.yaml dpo.py "
        "--model_name_or_path m --dataset_name d --beta=0.2 --learning_rate $LR --bf16 --lora_target_modules q v "
        "--use_peft --run_name ${NAME} --per_device_train_batch_size 2 --output_dir out # comment\n"
    )
    Path("x.sh").write_text(line)
    made = convert(Path("x.sh"))
    Path("made.yaml").write_text(made.replace("run_name: FILL_IN", "run_name: mine"))
    loaded = config.load("made.yaml")
    assert (loaded.objective.beta, loaded.train.learning_rate, loaded.train.pairs_per_step) == (0.2, 5e-7, 8)
    assert loaded.model.lora and loaded.model.lora.target_modules == ["q", "v"]
    assert "# run_name: ${NAME} -- is computed there; write the value\n  run_name: FILL_IN" in made and "for 4 GPUs." in made


def test_what_stands_in_dataset_info_is_looked_up() -> None:
    Path("data/dataset_info.json").write_text(
        json.dumps(
            {"d": {"hf_hub_url": "org/set", "subset": "en", "ranking": True, "columns": {"prompt": "q", "chosen": "good"}}}
        )
    )
    loaded, _ = converted(FACTORY)
    (source,) = loaded.data.train_sources
    assert (source.path, source.name, source.columns.prompt, source.columns.chosen) == ("org/set", "en", "q", "good")


def test_columns_and_formats_of_axolotl() -> None:
    loaded, made = converted((THEIRS / "axolotl_dpo.yaml").read_text())
    columns = loaded.data.train_sources[1].columns
    assert (columns.prompt, columns.chosen, columns.rejected) == ("question", "good", "bad"), made
    assert loaded.data.train_sources[0].columns.prompt == "question"
    kind = "{field_prompt: q, prompt_format: 'Q: {prompt} ', chosen_format: '{chosen}!'}"
    loaded, made = converted(AXOLOTL.replace("{path: d}", f"{{path: d, type: {kind}}}"))
    template = loaded.data.train_sources[0].template
    assert template and (template.prompt, template.chosen, template.rejected) == ("Q: {q} ", "{chosen}!", "{rejected}"), made


def test_secrets_are_not_written_down() -> None:
    token = "hf_" + "a1" * 17
    _, made = converted(TRL + f"beta: 0.1\nhub_token: {token}\nrun_name: x-{token}\n")
    assert token not in made and "hub_token" in made


# ----------------------------------------------------------------------------------------------------- the command itself


def test_the_command(tmp_path: Path) -> None:
    Path("a.yaml").write_text(TRL + "beta: 0.3\n")
    code, said = call("convert", "a.yaml", "--gpus", "2")
    assert code == 0 and "pairs_per_step: 16" in said and said.startswith("# Converted from a.yaml (trl)")
    Path("run.yaml").write_text("mine")
    code, said = call("convert", "a.yaml", "-o", "run.yaml")
    assert code == 2 and "run.yaml: is there already" in said and Path("run.yaml").read_text() == "mine"
    assert call("convert", "a.yaml", "-o", "run.yaml", "--force")[0] == 0 and "beta: 0.3" in Path("run.yaml").read_text()
    Path("s.py").write_text("args = DPOConfig(output_dir='o', beta=0.4)")
    code, said = call("convert", "--from-python", "s.py")
    assert code == 0 and "beta: 0.4" in said and "FILL_IN" in said
    for arguments in ([], ["a.yaml", "--from-python", "s.py"], ["no.yaml"], ["a.yaml", "--from", "nobody"], ["data"]):
        code, said = call("convert", *arguments)
        assert code == 2 and said.count("\n") == 1, (arguments, said)
    Path("b.yaml").write_text(TRL + "learning_rate: 1e-6\n")
    assert call("convert", "b.yaml")[0] == 2
    code, said = call("convert", "b.yaml", "--objective", "orpo", "--from", "trl")
    assert code == 0 and "name: orpo" in said


def test_a_script_that_names_its_model_in_the_trainer_and_leaves_out_what_peft_has_by_default() -> None:
    text = "args = DPOConfig(output_dir='o')\nDPOTrainer(model='me/model', args=args, peft_config=LoraConfig(r=16))\n"
    loaded, _ = converted(text + "load_dataset('me/pairs')\n", "train.py")
    assert loaded.model.name_or_path == "me/model" and loaded.model.lora is not None
    assert (loaded.model.lora.r, loaded.model.lora.lora_alpha, loaded.model.lora.lora_dropout) == (16, 8, 0.0)

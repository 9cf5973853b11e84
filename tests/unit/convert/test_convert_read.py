"""How `dspref convert` reads: values that scripts compute, quotes, lists in texts, groups of keys, kinds of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dspref.cli import app
from dspref.config.yaml12 import parse_text
from dspref.convert.conversion import convert
from dspref.errors import ConfigError

TRL = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.1\n"
FACTORY = "model_name_or_path: m\nstage: dpo\ndataset: d\noutput_dir: o\n"
RLHF = "pretrain: m\ndataset: d\nsave_path: o\nbeta: 0.1\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, prog_name="dspref")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def made_of(text: str | bytes, name: str = "theirs.yaml", gpus: int | None = None) -> tuple[dict[str, Any], str]:
    """The document, and all of the text."""
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    made = convert(Path(name), gpus=gpus)
    return parse_text(made, name)[0], made


def refused(text: str | bytes, name: str = "theirs.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        convert(Path(name))
    assert error.value.exit_code == 2 and str(error.value).count("\n") == 0
    return str(error.value)


def at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


# -------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("before", "code", "value"),
    [
        ("", "0.1 * 2", 0.2), ("", "2 ** 4 - 1", 15), ("", "-(3 - 5)", 2), ("", "7 // 2 + 7 % 4", 6), ("", "1 / 4", 0.25),
        ("LR = 3", "LR", 3), ("LR: float = 3", "LR / 2", 1.5), ("A = 2\nB = A * A\n", "B + 1", 5),
        ("B = A * A\nA = 2\n", "B", 4),
        ("C = {'x': 3}", "C['x']", 3), ("C = [1, 2]", "C[-1]", 2), ("", "float('0.5')", 0.5), ("", "int('12')", 12),
        ("", "dict(x=5)['x']", 5), ("import os", "float(os.environ.get('LR', '0.5'))", 0.5), ("", "os.getenv('A', 3)", 3),
        ("def main():\n    x = 3\n", "x", 3),
    ],
)  # fmt: skip
def test_what_needs_no_run_is_worked_out(before: str, code: str, value: float) -> None:
    document, made = made_of(f"{before}\nargs = DPOConfig(weight_decay={code})\n", "train.py")
    assert at(document, "train.weight_decay") == pytest.approx(value), made
    assert (": os.environ" in made.replace("os.getenv", "os.environ")) == ("env" in code), made


@pytest.mark.parametrize(
    ("before", "code", "value"),
    [
        ("A = 'a'", "f'{A}/b'", "a/b"), ("N = 7", "f'r{N:03d}-{0.5:.2f}'", "r007-0.50"), ("", "'a' + 'b'", "ab"),
        ("import os", "os.path.join('a', 'b/', 'c')", "a/b/c"), ("", "str(3)", "3"), ("", "Path('a')", "a"),
        ("", "'x' 'y'", "xy"),
    ],
)  # fmt: skip
def test_texts_that_need_no_run_are_put_together(before: str, code: str, value: str) -> None:
    document, made = made_of(f"{before}\nargs = DPOConfig(output_dir={code})\n", "train.py")
    assert document["output_dir"] == value, made


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("", "os.environ['LR']"), ("", "os.environ.get('LR')"), ("", "args.lr"), ("", "len(x)"), ("", "a if b else c"),
        ("LR = 1\nLR = 2", "LR"), ("LR = 1\nLR += 1", "LR"), ("for LR in (1, 2): pass", "LR"),
        ("def f(LR): pass\nLR = 1", "LR"),
        ("from c import LR", "LR"), ("C = {}\nC['x'] = 1", "C['x']"), ("C = {'x': 1}\nC.update(x=2)", "C['x']"),
        ("LR = LR2\nLR2 = LR", "LR"), ("", "10 ** 10 ** 10"), ("", "2 ** 500"), ("", "'a' * 10 ** 9"), ("", "1 / 0"),
        ("", "f'{3:999999999d}'"), ("", "(-8) ** 0.5"), ("", "__import__('os').getpid()"), ("", "[1][5]"), ("", "lambda: 1"),
        ("a0 = [1]\n" + "".join(f"a{n} = [a{n - 1}, a{n - 1}]\n" for n in range(1, 39)), "a38"),
        ("if (LR := 3): pass\nLR = 4", "LR"), ("with open('x') as LR: pass", "LR"),
    ],
)  # fmt: skip
def test_what_is_computed_is_to_be_filled_in_at_its_own_place(before: str, code: str) -> None:
    document, made = made_of(f"{before}\nargs = DPOConfig(\n  weight_decay={code})\n", "train.py")
    assert at(document, "train.weight_decay") == "FILL_IN", made
    assert (
        f"# weight_decay: {code.replace(' = ', '=')[:8]}" in made
        and "-- is computed there; write the value\n  weight" in made
    )


def test_every_value_that_is_computed_is_counted_and_refused_until_it_is_there() -> None:
    Path("train.py").write_text(
        "args = DPOConfig(output_dir=o(), learning_rate=f(), beta=g(), max_steps=h(), num_train_epochs=2, run_name=n(),\n"
        "  per_device_train_batch_size=b(), gradient_accumulation_steps=4, lr_scheduler_type=s(),\n"
        "  remove_unused_columns=c(),"
        "  bf16=torch.cuda.is_bf16_supported(), eval_strategy=e(), colour=c(), report_to=r())\n"
        "peft_config = LoraConfig(r=r(), target_modules=t(), lora_alpha=32)\n"
        "model = AutoModelForCausalLM.from_pretrained(m())\ndata = load_dataset(d(), split=s())\n"
    )
    code, said = call("convert", "train.py", "-o", "run.yaml")
    assert code == 0 and "-> run.yaml; 14 values to fill in (FILL_IN); read its comments" in said
    made = Path("run.yaml").read_text()
    document = parse_text(made, "run.yaml")[0]
    assert document["model"] == {
        "name_or_path": "FILL_IN/model", "dtype": "FILL_IN",
        "lora": {"r": "FILL_IN", "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "FILL_IN"},
    }  # fmt: skip
    wanted = ("learning_rate", "max_steps", "pairs_per_step", "lr_scheduler_type")
    assert [document["train"][key] for key in wanted] == ["FILL_IN"] * 4 and document["data"]["train"][
        "path"
    ] == "FILL_IN/pairs"
    assert "per_device_train_batch_size: b() -- is computed there; here it is per GPU x accumulated x 8 GPUs" in made
    comments = " ".join(line.strip("# ") for line in made.splitlines())
    assert "14 values are still to be filled in, where FILL_IN stands: model.name_or_path" in comments
    for line in (
        "train.py:3: remove_unused_columns: c() -- is computed there; columns that are not named are ignored",
        "train.py:3: eval_strategy: e() -- is computed there; in dspref this is train.eval_every",
        "train.py:3: colour: c() -- is computed there; write the value where it belongs",
    ):
        assert line in comments, comments
    foot = comments.partition("Their defaults")[2]
    assert not [key for key in ("beta", "learning_rate", "linear", "per_device", "lora_r") if key in foot], foot
    code, said = call("check", "run.yaml")
    assert code == 2 and said.count("is still to be filled in") == said.count("\n") == 12, said  # paths are looked at later
    assert "train.learning_rate: is still to be filled in, with a number" in said and "output_dir: is still" in said


def test_a_variable_of_a_command_is_to_be_filled_in() -> None:
    text = "LR=1e-6\npython dpo.py --model_name_or_path m --dataset_name $DATA --learning_rate $LR --beta ${BETA} "
    text += "--seed ${SEED:-7}\n"
    document, made = made_of(text, "train.sh")
    assert at(document, "train.learning_rate") == 1e-6 and at(document, "train.seed") == 7
    assert at(document, "objective.beta") == "FILL_IN" and at(document, "data.train.path") == "FILL_IN/pairs", made


def test_later_changes_of_a_config_count() -> None:
    text = "args = DPOConfig(output_dir='o', beta=0.1, seed=1)\nargs.beta = 0.3\nargs.seed = f()\nargs.max_length = 77\n"
    document, made = made_of(text + "setattr(args, 'weight_decay', 0.2)\nother.beta = 0.7\n", "train.py")
    found = [at(document, path) for path in ("objective.beta", "train.seed", "data.max_length", "train.weight_decay")]
    assert found == [0.3, "FILL_IN", 77, 0.2], made


def test_a_script_that_has_its_settings_from_a_command_line_says_so() -> None:
    text = "args, model = TrlParser((DPOConfig, ModelConfig)).parse_args_and_config()\nDPOTrainer(model, args=args)\n"
    comments = " ".join(line.strip("# ") for line in made_of(text, "train.py")[1].splitlines())
    assert "train.py:1: TrlParser: TrlParser((DPOConfig, ModelConfig)) -- has its settings from the command line" in comments


def test_what_a_script_makes_of_its_rows_by_a_function_is_told() -> None:
    text = "rows = load_dataset('a/b').map(fn).filter(lambda row: row['good'])\nargs = DPOConfig(output_dir='o')\n"
    document, made = made_of(text, "train.py")
    comments = " ".join(line.strip("# ") for line in made.splitlines())
    assert at(document, "data.train.path") == "a/b", made
    for name, code in (
        ("map", "load_dataset('a/b').map(fn)"),
        ("filter", "load_dataset('a/b').map(fn).filter(lambda row: "),
    ):
        assert f"train.py:1: {name}: {code}" in comments
    assert comments.count("or by a function of yours: data.train: {path: ..., format: my_module:my_function}") == 2
    assert "map" not in made_of("pool = list(map(f, x))\nargs = DPOConfig(output_dir='o')\n", "train.py")[1]


def test_weights_in_4_bits_of_a_script() -> None:
    text = "bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')\npeft_config = LoraConfig(r=8)\n"
    document, made = made_of(text + "args = DPOConfig(output_dir='o')\n", "train.py")
    assert document["model"]["load_in_4bit"] is True and document["deepspeed"] == "ds_configs/zero2.json", made


# ------------------------------------------------------------------------------------------------------- values in quotes


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        (TRL + "gradient_checkpointing: 'False'\n", "model.gradient_checkpointing", False),
        (TRL + "trust_remote_code: 'true'\n", "model.trust_remote_code", True),
        (TRL + "bf16: 'false'\nfp16: \"true\"\n", "model.dtype", "float16"),
        (TRL + "use_peft: 'false'\nlora_r: 8\n", "model.lora", None),
        (TRL + "precompute_ref_log_probs: 'false'\n", "reference", None),
        (TRL + "reference_free: 'false'\nref_model: other\n", "reference.name_or_path", "other"),
        (TRL + "use_flash_attn: 'true'\n", "model.attn_implementation", "flash_attention_2"),
        (TRL + "flash_attention_2: 'false'\n", "model.attn_implementation", None),
        (TRL + "per_device_train_batch_size: '4'\n", "train.pairs_per_step", 32),
        (TRL + "per_device_train_batch_size: 4.0\ngradient_accumulation_steps: 2.0\n", "train.pairs_per_step", 64),
        (TRL + "max_steps: '-1'\n", "train.max_steps", None),
        (TRL + "warmup_steps: '0.1'\n", "train.warmup_ratio", 0.1),
        (TRL + "save_steps: '50'\nsave_total_limit: '3'\n", "checkpoint", {"save_every": 50, "keep_last": 3}),
        (TRL + "logging_steps: '5'\n", "log.every", 5),
        (TRL + "run_name: '7'\n", "log.run_name", "7"),
        (TRL + "report_to: wandb, tensorboard\n", "log.trackers", ["wandb", "tensorboard"]),
        (TRL + "report_to: '[wandb, mlflow]'\n", "log.trackers", ["wandb", "mlflow"]),
        (TRL + "use_peft: true\nlora_target_modules: q_proj, v_proj,\n", "model.lora.target_modules", ["q_proj", "v_proj"]),
        (TRL + "use_peft: true\nlora_modules_to_save: a,b\n", "model.lora.modules_to_save", ["a", "b"]),
        (TRL + "loss_type: sigmoid,sft\nloss_weights: '1.0, 0.5'\n", "objective.loss_weights", [1.0, 0.5]),
        (TRL + "loss_type: sigmoid,sft\nloss_weights: '1.0, 0.5'\n", "objective.loss_type", ["sigmoid", "sft"]),
        (RLHF + "adam_betas: '0.8,0.9'\n", "train.adam_beta1", 0.8),
        (FACTORY + "quantization_bit: '4'\n", "model.load_in_4bit", True),
        ("beta: 0.1\ndataset_mixer: {d: 1.0}\ndataset_splits: train_a,test_a\n", "data.train.split", "train_a"),
    ],
)  # fmt: skip
def test_quotes_and_texts_with_commas(text: str, path: str, value: Any) -> None:
    document, made = made_of(text)
    assert at(document, path) == value and type(at(document, path)) is type(value), made


# ---------------------------------------------------------------------------------------------------------- kinds of files


def test_two_escapes_of_json_are_one_letter() -> None:
    document, made = made_of(json.dumps(yaml.safe_load(TRL) | {"run_name": "\U0001f600/\\ud83d"}), "theirs.json")
    assert document["log"]["run_name"] == "\U0001f600/\\ud83d", made


def test_groups_of_keys_are_opened() -> None:
    text = (
        "model_args:\n  model_name_or_path: m\ndata_args: {dataset_name: d}\ntraining_args:\n  output_dir: o\n  beta: 0.2\n"
        "  optim: adafactor\npeft_config:\n  r: 4\n  target_modules: [q_proj]\n"
    )
    document, made = made_of(text)
    assert document["model"]["name_or_path"] == "m" and document["data"]["train"]["path"] == "d"
    assert document["objective"]["beta"] == 0.2 and document["output_dir"] == "o"
    assert document["model"]["lora"] == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]}, made
    assert "theirs.yaml:7: training_args.optim: adafactor -- train.optim: must be" in made
    said = refused("model_args:\n  beta: 1\ntraining_args:\n  beta: 2\n")
    assert said == "theirs.yaml:4: training_args.beta: is given as model_args.beta too; take one out"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", TRL.replace("\n", "\r\n")),
        ("a.yaml", "\ufeff" + TRL),
        ("a.yml", "---\n" + TRL + "...\n"),
        ("a.yaml", "<<: {beta: 0.1, dataset_name: d}\nmodel_name_or_path: m\noutput_dir: o\n"),
        ("a.json", json.dumps(yaml.safe_load(TRL), indent="\t")),
        ("a.json", "\ufeff" + json.dumps(yaml.safe_load(TRL)).replace(", ", ",\r\n")),
        ("a.toml", "".join(f"{key} = {json.dumps(value)}\n" for key, value in yaml.safe_load(TRL).items())),
        ("a.toml", 'model_name_or_path = "m"\r\ndataset_name = "d"\r\n[training_args]\r\nbeta = 0.1\noutput_dir = "o"\n'),
        ("a.py", "\ufeffx = 1\r\nDPOConfig(output_dir='o', beta=0.1,\r\n model_name_or_path='m', dataset_name='d')\r\n"),
        ("a.sh", "\ufeffpython dpo.py \\\r\n --model_name_or_path m --dataset_name d \\\r\n --beta 0.1 --output_dir o\r\n"),
        ("a.sh", "python dpo.py --model-name-or-path m --dataset-name=d \\\n--beta\t0.1 \\\n\t--output-dir o\n"),
    ],
)  # fmt: skip
def test_one_config_in_every_form(name: str, text: str) -> None:
    document, made = made_of(text, name)
    found = (document["model"], document["data"]["train"], document["objective"]["beta"], document["output_dir"])
    assert found == ({"name_or_path": "m"}, {"path": "d"}, 0.1, "o"), made
    assert "FILL_IN" not in made


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", TRL + "beta: 0.2\n", "a.yaml:5:1: beta: duplicate key; first at a.yaml:4:1"),
        ("a.yaml", TRL + "lr: &x 1e-6\nlearning_rate: *x\n", "a.yaml:6:16: not valid YAML: aliases (*name) are not allowed"),
        ("a.yaml", "b: &b {beta: 0.1}\n<<: *b\n" + TRL, "a.yaml:2:5: not valid YAML: aliases (*name) are not allowed"),
        ("a.yaml", TRL + "<<: 3\n", "<<: takes a mapping of keys"),
        ("a.yaml", TRL + "---\n" + TRL, "a.yaml:5:1: not valid YAML: holds several documents (---); give each a file"),
        ("a.yaml", TRL + "x:\n\ty: 1\n", "a.yaml:6:1: not valid YAML: found character '\\t'"),
        ("a.yaml", TRL.encode("utf-16"), "not UTF-8 text"),
        ("a.json", '{"beta": 1,', "a.json:1:12: not valid JSON"),
        ("a.json", '{"beta": 1, "beta": 2}', "a.json:1:13: beta: duplicate key"),
        ("a.json", "[1]", "a config is a mapping"),
        ("a.toml", "beta = \n", "a.toml: not valid TOML: Invalid value (at line 1"),
        ("a.toml", "beta = 1\nbeta = 2\n", "a.toml: not valid TOML: Cannot overwrite a value"),
        ("a.py", "args = DPOConfig(beta=0.1, beta=0.2)\n", "a.py:1: beta: is given twice in one call"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_for_sure_is_refused_in_one_line(name: str, text: str | bytes, said: str) -> None:
    assert said in refused(text, name)
    code, told = call("convert", name)
    assert code == 2 and told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "gpus", "sequence", "pairs", "told"),
    [
        (TRL + "per_device_train_batch_size: 2\nsp_size: 2\n", 8, 2, 8, "2 per GPU x 1 accumulated x 4 groups of 2 GPUs"),
        (TRL + "per_device_train_batch_size: 2\nparallelism_config: {sp_size: 4}\n", 8, 4, 4, "2 groups of 4 GPUs"),
        (TRL + "micro_batch_size: 1\nrl: dpo\ncontext_parallel: {size: 4}\n", 8, 4, 2, "2 groups of 4 GPUs"),
        (FACTORY + "per_device_train_batch_size: 2\nsequence_parallel_size: 1\n", 8, None, 16, "8 GPUs"),
        (TRL + "per_device_train_batch_size: 2\nsp_size: 4\n", 6, 4, 2, "does not divide 6 GPUs"),
        (RLHF + "train_batch_size: 64\nring_attn_size: 2\n", 8, 2, 64, "ring_attn_size: 2"),
    ],
)
def test_gpus_that_share_a_batch_are_counted_once(text: str, gpus: int, sequence: int | None, pairs: int, told: str) -> None:
    document, made = made_of(text, gpus=gpus)
    assert (document.get("parallel") or {}).get("sequence") == sequence, made
    assert document["train"]["pairs_per_step"] == pairs and told in made, made

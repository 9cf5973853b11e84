"""What `dspref convert` tells: by the names that the person wrote, with the line, and nothing that has no effect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dspref import config
from dspref.cli import app
from dspref.convert.conversion import convert

TRL = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.1\n"
EVALUATES = "dataset_test_split: test\n"
AXOLOTL = "base_model: m\ndatasets: [{path: d}]\noutput_dir: o\nrl: dpo\n"
FACTORY = "model_name_or_path: m\nstage: dpo\ndataset: d\noutput_dir: o\n"
INSTRUCT = "model_name_or_path: m\ndataset_mixer_list: [d, 1.0]\ndpo_loss_type: dpo_norm\noutput_dir: o\n"
RLHF = "pretrain: m\ndataset: d\nsave_path: o\nbeta: 0.1\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made_of(text: str, name: str = "theirs.yaml", **options: Any) -> tuple[dict[str, Any], str]:
    """The document, and its comments on one line. What may be loaded is loaded: its own checks refuse nothing."""
    Path(name).write_text(text)
    made = convert(Path(name), **options)
    if "FILL_IN" not in re.sub(r"(?m)#.*|FILL_IN/(model|pairs)$", "", made):
        Path("made.yaml").write_text(made)
        config.load("made.yaml")
    return yaml.safe_load(made), " ".join(line.strip("# ") for line in made.splitlines() if "#" in line)


def at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


# --------------------------------------------------------------------------------------------------- defaults of theirs


@pytest.mark.parametrize(
    ("text", "absent", "present"),
    [
        (TRL + "warmup_steps: 10\n", ["warmup_ratio"], ["num_train_epochs 3.0", "save_steps 500"]),
        (TRL + "warmup_steps: 0.1\n", ["warmup_ratio"], []),
        (TRL + "lr_scheduler_type: constant\n", ["warmup_ratio", "lr_scheduler_type linear"], []),
        (TRL + "max_steps: 10\n", ["num_train_epochs"], ["warmup_ratio 0.0"]),
        (TRL + "max_steps: -1\n", [], ["num_train_epochs 3.0"]),
        (TRL + "save_strategy: epoch\n", ["save_steps"], []),
        (TRL + "save_strategy: 'no'\n", ["save_steps"], []),
        (TRL + "save_strategy: no\n", ["save_steps"], []),
        (TRL + "save_strategy: steps\n", [], ["save_steps 500"]),
        (TRL + "max_length: null\n", ["max_length"], []),
        (TRL + "use_peft: true\n", [], ["lora_dropout 0.05"]),
        (TRL + "use_peft: true\nlora_dropout: 0.0\n", ["lora_dropout"], []),
        (AXOLOTL + "max_steps: 10\nwarmup_steps: 5\n", ["num_epochs", "warmup_ratio"], ["micro_batch_size 1"]),
        (AXOLOTL + "batch_size: 8\nmicro_batch_size: 2\n", ["gradient_accumulation_steps"], []),
        (
            FACTORY + "max_steps: 10\nsave_strategy: epoch\n",
            ["num_train_epochs", "save_steps"],
            ["lora_rank 8", "lora_alpha 16"],
        ),
        (TRL + "train_batch_size: 64\n", ["per_device_train_batch_size", "gradient_accumulation_steps"], []),
        (TRL + "use_peft: false\nlora_config: {r: 4}\n", ["lora_alpha", "lora_dropout"], []),
        (FACTORY + "adapter_name_or_path: a,b\n", ["lora_rank", "lora_alpha"], []),
        (FACTORY + "disable_gradient_checkpointing: true\n", ["gradient_checkpointing"], []),
        (INSTRUCT + "max_train_steps: 10\nwarmup_steps: 3\n", ["num_epochs", "warmup_ratio"], ["learning_rate 2e-05"]),
        (RLHF + "lr_scheduler: linear\n", ["min_lr_ratio"], ["lr_warmup_ratio 0.03"]),
    ],
)
def test_the_footer_lists_no_default_that_a_key_overrules(text: str, absent: list[str], present: list[str]) -> None:
    _, told = made_of(text)
    foot = told.partition("Their defaults, which the file does not give: ")[2].partition("Empty there:")[0]
    assert not [key for key in absent if key in foot], foot
    assert all(key in foot for key in present), foot
    assert "and not " not in told, told


@pytest.mark.parametrize(
    ("extra", "path", "value", "told"),
    [
        ("eval_strategy: epoch\neval_steps: 50", "train.eval_every", None, ":7: eval_steps: 50 -- eval_strategy: epoch"),
        ("eval_strategy: no\neval_steps: 50", "train.eval_every", None, ""),
        ("save_strategy: epoch\nsave_steps: 50", "checkpoint", None, ":7: save_steps: 50 -- save_strategy: epoch"),
        ("save_strategy: no\nsave_steps: 50", "checkpoint", None, ":7: save_steps: 50 -- save_strategy: no goes before"),
        ("logging_strategy: epoch\nlogging_steps: 5", "log", None, ":7: logging_steps: 5 -- logging_strategy: epoch"),
        ("logging_strategy: steps\nlogging_steps: 5", "log.every", 5, ""),
        ("logging_strategy: no", "log", None, ":6: logging_strategy: false -- write log.every, in steps"),
        ("eval_strategy: steps", "train.eval_every", 10, "it evaluates every logging_steps"),
        ("eval_strategy: steps\nlogging_steps: 7", "train.eval_every", 7, "it evaluates every logging_steps"),
        ("eval_strategy: steps\neval_steps: 1e2", "train.eval_every", 100, ""),
        ("warmup_steps: 0.1\nwarmup_ratio: 0.2", "train.warmup_ratio", 0.1, ":7: warmup_ratio: 0.2 -- warmup_steps: 0.1"),
        ("train_batch_size: 6\ngradient_accumulation_steps: 2", "train.pairs_per_step", 6, "train_batch_size goes"),
        ("per_device_train_batch_size: auto", "train.pairs_per_step", 8, ":6: per_device_train_batch_size: auto -- is"),
        ("gradient_accumulation_steps: 2\nbatch_size: 9", "train.pairs_per_step", 128, ":7: batch_size: 9 -- gradient_acc"),
        ("max_steps: 5\nnum_train_epochs: 2", "train.num_train_epochs", None, "and not num_train_epochs: 2"),
    ],
)  # fmt: skip
def test_a_number_that_another_key_makes_nothing_is_told(extra: str, path: str, value: Any, told: str) -> None:
    document, said = made_of(TRL + EVALUATES + extra + "\n")
    assert at(document, path) == value and told in said, said


# ----------------------------------------------------------------------------------------------------- names and lines


@pytest.mark.parametrize(
    ("text", "told", "never"),
    [
        (TRL + EVALUATES + "eval_steps: epoch\n", "theirs.yaml:6: eval_steps: epoch -- write train.eval_every", ""),
        (TRL + EVALUATES + "evaluation_strategy: epoch\n", "theirs.yaml:6: evaluation_strategy: epoch -- write", " eval_st"),
        (TRL + "eval_strategy: epoch\n", "eval_strategy: epoch", "eval_steps"),
        (TRL + "use_peft: true\nlora_r: many\n", "theirs.yaml:6: lora_r: many -- model.lora.r: must be an integer", ""),
        (TRL + "lora_r: 8\nlora_alpha: 4\n", "theirs.yaml:5: lora_r: 8 -- no adapter is trained there", " r: 8"),
        (TRL + "loss_type: foo\n", "theirs.yaml:5: loss_type: foo -- objective.loss_type: must be 'sigmoid'", "# objective"),
        (TRL + "learning_rate: fast\n", "theirs.yaml:5: learning_rate: fast -- train.learning_rate: must be a number", ""),
        (TRL + "seed: -3\n", "theirs.yaml:5: seed: -3 -- train.seed: must be", ""),
        (TRL + "lr_scheduler_type: wsd\n", "theirs.yaml:5: lr_scheduler_type: wsd -- train.lr_scheduler_type: must be", ""),
        (AXOLOTL + "optimizer: lion_8bit\n", "theirs.yaml:5: optimizer: lion_8bit -- train.optim: must be", "optim: lion"),
        (AXOLOTL + "lr_scheduler: rex\n", "theirs.yaml:5: lr_scheduler: rex -- train.lr_scheduler_type: must be", ""),
        (AXOLOTL + "adapter: lora\nlora_r: x\n", "theirs.yaml:6: lora_r: x -- model.lora.r: must be an integer", ""),
        (AXOLOTL + "rl_beta: much\n", "theirs.yaml:5: rl_beta: much -- objective.beta: must be a number", ""),
        (AXOLOTL + "trl:\n  beta: much\n", "theirs.yaml:6: trl.beta: much -- objective.beta: must be a number", ""),
        (AXOLOTL + "max_steps: 9\nnum_epochs: 2\n", "and not num_epochs: 2", "num_train_epochs"),
        (AXOLOTL + "dpo_loss_type: wpo\n", "dpo_loss_type: wpo", " loss_type"),
        (FACTORY + "lora_rank: x\n", "theirs.yaml:5: lora_rank: x -- model.lora.r: must be an integer", ""),
        (FACTORY + "pref_loss: foo\n", "theirs.yaml:5: pref_loss: foo -- objective.loss_type: must be", ""),
        (FACTORY + "pref_beta: x\n", "theirs.yaml:5: pref_beta: x -- objective.beta: must be a number", ""),
        (FACTORY + "cutoff_len: long\n", "theirs.yaml:5: cutoff_len: long -- data.max_length: must be", ""),
        (INSTRUCT + "max_train_steps: x\n", "theirs.yaml:5: max_train_steps: x -- train.max_steps: must be an integer", ""),
        (INSTRUCT + "checkpointing_steps: epoch\n", "theirs.yaml:5: checkpointing_steps: epoch -- write", "save_steps"),
        (RLHF + "max_epochs: x\n", "theirs.yaml:5: max_epochs: x -- train.num_train_epochs: must be a number", ""),
        (RLHF + "adam:\n  lr: x\n", "theirs.yaml:6: adam.lr: x -- train.learning_rate: must be a number", ""),
        (TRL + "lr: 1e-6\nlearning_rate: 1e-5\n", "theirs.yaml:5: lr: 1e-06 -- learning_rate goes before it", ""),
        (TRL + "num_epochs: 1\nepochs: 2\n", "theirs.yaml:6: epochs: 2 -- num_epochs goes before it", "num_train_epochs"),
        (TRL + "model_init_kwargs:\n  trust_remote_code: maybe\n",
         "theirs.yaml:6: model_init_kwargs.trust_remote_code: maybe -- model.trust_remote_code: must be true or false", ""),
    ],
)  # fmt: skip
def test_what_is_told_has_the_name_that_was_written_and_its_line(text: str, told: str, never: str) -> None:
    _, said = made_of(text)
    assert told in said, said
    assert not never or never not in said, said


def test_scripts_and_commands_have_lines_and_their_own_names() -> None:
    text = "args = DPOConfig(\n    output_dir='o',\n    loss_type='foo',\n)\npeft_config = LoraConfig(\n    r='x')\n"
    _, said = made_of(text, "train.py")
    assert "train.py:3: loss_type: foo -- objective.loss_type: must be" in said
    assert "train.py:6: r: x -- model.lora.r: must be an integer" in said and "lora_r" not in said, said
    text = "# --loss_type none\npython dpo.py --beta 0.1 \\\n  --model-name-or-path m \\\n  --loss-type foo\n"
    _, said = made_of(text, "train.sh")
    assert "train.sh:4: loss-type: foo -- objective.loss_type: must be" in said, said


def test_what_is_taken_over_is_not_listed_as_empty() -> None:
    document, said = made_of(TRL + "max_length: null\nref_model: null\n")
    assert document["data"]["max_length"] is None and "max_length: null; an answer of any length is scored" in said
    assert "Empty there: ref_model" in said and "max_length" not in said.partition("Empty there")[2]


# ----------------------------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize(
    ("text", "repo", "told"),
    [
        (TRL + "push_to_hub: true\nhub_model_id: me/mine\n", "me/mine", ""),
        (TRL + "push_to_hub: 'true'\nhub_model_id: me/mine\n", "me/mine", ""),
        (TRL + "push_to_hub: true\nhub_model_id: mine\n", "FILL_IN/mine", "hub_model_id: mine, of whoever runs it there"),
        (TRL + "push_to_hub: true\n", "FILL_IN/o", "push_to_hub: true, of whoever runs it there"),
        (TRL + "push_to_hub: true\npush_to_hub_model_id: mine\npush_to_hub_organization: org\n", "org/mine", ""),
        (TRL + "push_to_hub: false\nhub_model_id: me/mine\n", None, ":6: hub_model_id: me/mine -- nothing is uploaded"),
        (TRL + "hub_model_id: me/mine\n", None, "`dspref push RUN owner/name`"),
        (TRL + "push_to_hub: true\nhub_model_id: a/b/c\n", None, ":6: hub_model_id: a/b/c -- export.push_to_hub"),
        (AXOLOTL + "hub_model_id: me/mine\n", "me/mine", ""),
        (FACTORY + "export_hub_model_id: me/mine\n", "me/mine", ""),
        (INSTRUCT + "push_to_hub: true\nhf_entity: org\nhf_repo_id: mine\n", "org/mine", ""),
        (TRL + "hub_private_repo: false\npush_to_hub: true\nhub_model_id: me/mine\n", "me/mine", "RUN owner/name --public"),
        (TRL + "hub_private_repo: true\npush_to_hub: true\nhub_model_id: me/mine\n", "me/mine", ""),
        (TRL + "hub_strategy: end\npush_to_hub: true\nhub_model_id: me/mine\n", "me/mine", ""),
        (TRL + "hub_strategy: checkpoint\npush_to_hub: true\nhub_model_id: me/mine\n", "me/mine",
         ":5: hub_strategy: checkpoint -- export.push_to_hub uploads once"),
    ],
)  # fmt: skip
def test_uploads_to_the_hub(text: str, repo: str | None, told: str) -> None:
    document, said = made_of(text)
    assert at(document, "export.push_to_hub") == repo and told in said, said
    if not told:
        assert "hub_" not in said and "upload" not in said, said


@pytest.mark.parametrize(
    "key", ["hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push", "hub_model_revision"]
)
@pytest.mark.parametrize("uploads", ["push_to_hub: true\nhub_model_id: me/mine\n", ""])
def test_what_the_hub_does_elsewhere_is_answered_with_the_key_and_the_command(key: str, uploads: str) -> None:
    _, said = made_of(TRL + f"{key}: {'false' if 'private' in key else 'every_save'}\n" + uploads)
    line = said.partition(f"theirs.yaml:5: {key}: ")[2]
    assert "export.push_to_hub" in line and "dspref push" in line, said


# ------------------------------------------------------------------------------------------------------------ trackers


@pytest.mark.parametrize(
    ("text", "trackers", "project", "name", "told"),
    [
        (FACTORY + "use_swanlab: false\nswanlab_project: x\n", None, None, None, ":6: swanlab_project: x -- swanlab is off"),
        (FACTORY + "swanlab_project: x\nswanlab_run_name: y\n", None, None, None, ":6: swanlab_run_name: y -- swanlab"),
        (FACTORY + "use_swanlab: true\nswanlab_project: x\nswanlab_run_name: y\n", ["swanlab"], "x", "y", ""),
        (FACTORY + "use_swanlab: 'false'\nswanlab_project: x\n", None, None, None, "swanlab is off there"),
        (TRL + "report_to: none\nwandb_project: x\n", None, None, None, ":6: wandb_project: x -- wandb is off there"),
        (TRL + "report_to: wandb\nwandb_project: x\nproject: y\n", ["wandb"], "x", None, ":7: project: y -- trackio is off"),
        (TRL + "report_to: trackio\nproject: y\n", ["trackio"], "y", None, ""),
        (TRL + "report_to: [tensorboard]\nwandb_name: x\nrun_name: z\n", ["tensorboard"], None, "z", "wandb is off there"),
        (TRL + "report_to: wandb,tensorboard\n", ["wandb", "tensorboard"], None, None, ""),
        (AXOLOTL + "wandb_project: x\nwandb_name: y\n", ["wandb"], "x", "y", ""),
        (AXOLOTL + "use_wandb: false\nwandb_project: x\nwandb_run_id: z\n", None, None, None, ":7: wandb_run_id: z"),
        (AXOLOTL + "mlflow_experiment_name: x\nmlflow_run_name: y\n", ["mlflow"], "x", "y", ""),
        (AXOLOTL + "use_mlflow: false\nmlflow_experiment_name: x\n", None, None, None, "mlflow is off there"),
        (AXOLOTL + "use_comet: false\ncomet_project_name: x\n", None, None, None, "comet is off there"),
        (AXOLOTL + "use_comet: true\ncomet_project_name: x\n", ["comet"], "x", None, ""),
        (AXOLOTL + "use_trackio: false\ntrackio_project_name: x\ntrackio_run_name: y\n", None, None, None, "trackio is off"),
        (AXOLOTL + "wandb_project: x\nmlflow_experiment_name: y\n", ["wandb", "mlflow"], "x", None,
         ":6: mlflow_experiment_name: y -- wandb_project goes before"),
        (INSTRUCT + "with_tracking: false\nwandb_project_name: x\n", None, None, None, "wandb is off there"),
        (INSTRUCT + "with_tracking: true\nwandb_project_name: x\nexp_name: y\n", ["wandb"], "x", "y", ""),
        (RLHF + "wandb_project: x\nwandb_run_name: y\n", None, None, None, "wandb is off there"),
        (RLHF + "use_wandb: key\nwandb_project: x\nwandb_run_name: y\n", ["wandb"], "x", "y", ""),
    ],
)  # fmt: skip
def test_the_names_of_a_tracker_count_where_it_is_on(text: str, trackers: Any, project: Any, name: Any, told: str) -> None:
    document, said = made_of(text)
    found = [at(document, f"log.{key}") for key in ("trackers", "project", "run_name")]
    assert found == [trackers, project, name] and told in said, said
    assert told or "is off there" not in said, said


def test_ddp_timeout_is_the_watch_on_progress() -> None:
    for text in (TRL, FACTORY):
        document, said = made_of(text + "ddp_timeout: 7200\n")
        assert document["train"]["hang_timeout"] == 7200 and "ddp_timeout bounds one exchange" in said


def test_what_is_to_be_filled_in_is_refused_by_check() -> None:
    Path("theirs.yaml").write_text(TRL + "push_to_hub: true\nhub_model_id: mine\n")
    result = CliRunner().invoke(app, ["convert", "theirs.yaml", "-o", "run.yaml"], prog_name="dspref")
    assert result.exit_code == 0 and "1 value to fill in (FILL_IN); read its comments" in result.output
    result = CliRunner().invoke(app, ["check", "run.yaml"], prog_name="dspref")
    assert result.exit_code == 2 and "export.push_to_hub: FILL_IN/mine: the owner is still to be filled in" in result.output


@pytest.mark.parametrize(
    ("call", "bema", "told"),
    [
        ("update_ref_model=True", {}, ""),
        ("update_freq=20, update_ref_model=True, ref_model_update_freq=40, lag=3, ema_power=0.4",
         {"update_freq": 20, "ref_model_update_freq": 40, "lag": 3, "ema_power": 0.4}, ""),
        # There the reference moves every 400 steps unless they say more, whatever update_freq is.
        ("update_freq=20, update_ref_model=True", {"update_freq": 20, "ref_model_update_freq": 400}, ""),
        ("update_freq=300, update_ref_model=True", {"update_freq": 300},
         "reference.bema.ref_model_update_freq: 400 -- must be a multiple of update_freq, 300"),
        ("update_after=50, update_ref_model=True", {"update_after": 50}, "the reference moves at steps counted from 0"),
        ("update_after=50, ref_model_update_after=50, update_ref_model=True", {"update_after": 50}, ""),
        ("update_ref_model=True, device='cuda'", {}, "train.py:3: device: cuda -- mean and beginning are in host memory"),
        ("lag=3", None, "train.py:3: BEMACallback(update_ref_model): false -- averages the policy beside it"),
    ],
)  # fmt: skip
def test_a_reference_that_bema_moves_in_a_script(call: str, bema: dict[str, Any] | None, told: str) -> None:
    text = "args = DPOConfig(output_dir='o', max_length=9)\nload_dataset('me/pairs')\n"
    made, comments = made_of(f"{text}DPOTrainer(model='me/m', args=args, callbacks=[BEMACallback({call})])\n", "train.py")
    assert at(made, "reference.bema") == (bema if bema != {} else True)
    assert told in comments and (told or "Not taken over" not in comments), comments


def test_what_bema_moves_is_no_adapter_and_no_reference_that_is_not_there() -> None:
    call = "callbacks=[BEMACallback(update_ref_model=True)]"
    with_lora = f"args = DPOConfig(output_dir='o')\nDPOTrainer(model='m', args=args, peft_config=LoraConfig(), {call})\n"
    made, comments = made_of(with_lora, "train.py")
    assert "reference" not in made and "the mean of two adapters is not the adapter of the mean" in comments
    made, comments = made_of(f"args = ORPOConfig(output_dir='o')\nORPOTrainer(model='m', args=args, {call})\n", "train.py")
    assert "reference" not in made and "train.py:2: update_ref_model: true -- orpo needs no reference" in comments

"""One YAML file -> one frozen `Config`. Loads no torch, so that `dspref check` answers at once on a login node.

Every section is a strict pydantic model: an unknown key, a wrong type or an option that does not apply is an error in one
line that names file, line and column. The config refuses; it never rewrites what the user wrote.
Order: defaults < file < `section.key=value` on the command line.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model, model_validator

from dspref import strategy
from dspref.errors import ConfigError
from dspref.objectives import OBJECTIVES, Family
from dspref.yaml12 import Position, YamlError, parse, parse_value


class Section(BaseModel):
    """A part of the config: strict types, no unknown keys, immutable, each key documented by the text below it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelSection(Section):
    name_or_path: str
    """Folder or hub id of the model to train."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer, where it is not the model's own."""
    chat_template: str | None = None
    """Path of a Jinja chat template; default: the tokenizer's."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: weights are drawn from the config alone, with `train.seed`."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type of the weights in forward and backward; the optimizer keeps fp32 masters."""
    attn_implementation: Literal["auto", "flash_attention_2", "flash_attention_3", "torch_varlen", "sdpa"] = "auto"
    """Kernel of the packed attention; `auto`: the fastest that this machine has."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a quarter more compute."""
    disable_dropout: bool | Literal["all"] = True
    """true: no dropout in the base model; false: as the model's config says; all: adapters too."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the MoE load-balancing loss; 0 turns it off."""
    lora: None = None
    """LoRA settings."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""


class ReferenceSection(Section):
    mode: Literal["auto", "stored", "engine", "adapter", "none"] = "auto"
    """Where reference log-probs come from. `stored`: computed once before training; `engine`: a second model, live."""
    name_or_path: str | None = None
    """The reference model; default: the policy's initial weights."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: a live reference keeps its weights in host memory."""
    zero_stage: Literal[0, 3] | None = None
    """Stage of a live reference: 3 shards it over the ranks, 0 keeps a whole copy on each. Default: 3 if the policy is at 3."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Type of the reference's weights; default: the policy's."""
    store: str | None = None
    """Folder of the stored log-probs; default: `reference/` in the run folder."""
    sync_ref_model: Literal[False] = False
    """TR-DPO: move the reference towards the policy."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """TR-DPO: share of the policy in the new reference."""
    ref_model_sync_steps: Annotated[int, Field(gt=0)] = 512
    """TR-DPO: optimizer steps between two syncs."""


class Columns(Section):
    prompt: str = "prompt"
    """Column that holds the prompt."""
    chosen: str = "chosen"
    """Column that holds the better answer."""
    rejected: str = "rejected"
    """Column that holds the worse answer."""


class Template(Section):
    prompt: str
    """Text of the prompt, with {column} fields."""
    chosen: str
    """Text of the better answer."""
    rejected: str
    """Text of the worse answer."""
    system: str | None = None
    """System message; with it the row becomes a conversation."""


class SourceSection(Section):
    path: str
    """File, glob, folder or hub id."""
    split: str = "train"
    """Split of a hub data set, or of a folder that holds several."""
    max_samples: Annotated[int, Field(gt=0)] | None = None
    """Use only the first so many rows."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Passes over this source per epoch; a fraction is sampled by the seed."""
    columns: Columns = Columns()
    """Names of the columns in this source."""
    template: Template | None = None
    """Texts made from columns, instead of columns taken as they are."""


def _one_or_many(value: Any) -> str:
    return "one" if isinstance(value, SourceSection) or (isinstance(value, Mapping) and "path" in value) else "many"


OneOrList = Annotated[
    Union[
        Annotated[SourceSection, Tag("one")],
        Annotated[Annotated[list[SourceSection], Field(min_length=1)], Tag("many")],
    ],
    Discriminator(_one_or_many),
]
OneOrNamed = Annotated[
    Union[Annotated[SourceSection, Tag("one")], Annotated[dict[str, SourceSection], Tag("many")]],
    Discriminator(_one_or_many),
]


class DataSection(Section):
    train: OneOrList
    """A source, or a list of sources: a mixture."""
    eval: OneOrNamed | None = None
    """Held-out pairs: one source, or `name: source` for several."""
    max_length: Annotated[int, Field(ge=2)] | None = 2048
    """Longest prompt + answer in tokens; longer ones are cut."""
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt in tokens."""
    max_completion_length: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; its head is kept."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a long prompt survives."""
    tokens_per_pack: Annotated[int, Field(ge=1)] = 16384
    """Computed tokens per rank and micro-step. A longer pair gets a pack of its own."""
    prefix_sharing: bool | Literal["auto"] = "auto"
    """Compute the prompt once for both answers; `auto`: when it saves more than 3 % of the tokens."""
    shuffle: bool = True
    """Shuffle each epoch by the seed; false: the order of the files."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be used: stop and name it, or leave it out and count it."""

    @property
    def train_sources(self) -> list[SourceSection]:
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def eval_sources(self) -> dict[str, SourceSection]:
        """Held-out sets by the prefix of their metrics: `eval_`, or `eval_<name>_` where there are several."""
        if self.eval is None:
            return {}
        if isinstance(self.eval, SourceSection):
            return {"eval_": self.eval}
        return {f"eval_{name}_": source for name, source in self.eval.items()}


class TrainSection(Section):
    pairs_per_step: Annotated[int, Field(gt=0)] = 128
    """Pairs per optimizer step over all ranks: the global batch."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data; a fraction ends within an epoch."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps; overrides num_train_epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr",
    ] = "linear"  # fmt: skip
    """Schedule after warm-up, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule, such as min_lr_rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns it off."""
    optim: Literal["adamw", "cpu_adam"] = "adamw"
    """`adamw`: torch's; `cpu_adam`: DeepSpeed's, for offloaded states (built with a C++ compiler on first use)."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of data order, sampling, dropout and random weights."""
    eval_every: Annotated[int, Field(gt=0)] | None = None
    """Evaluate every so many steps; null: at the end only."""


class CheckpointSection(Section):
    save_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two checkpoints; null: none during training."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, Field(gt=0)] | None = None
    """Keep every checkpoint whose step is a multiple of this."""
    keep_best: str | None = None
    """Also keep the best checkpoint by this metric of an evaluation at its step, such as eval_rewards/margins."""
    resume: Literal["auto", "required", "never"] = "auto"
    """`auto`: go on from the newest checkpoint if there is one; `required`: fail without one; `never`: start anew."""


class LogSection(Section):
    every: Annotated[int, Field(gt=0)] = 1
    """Steps between two lines of metrics."""
    trackers: list[Literal["wandb", "tensorboard"]] = []
    """Where metrics go beside metrics.jsonl."""
    project: str = "dspref"
    """The tracker's project."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts to answer with the initial and the final model at the end, by plain transformers on rank 0."""
    run_name: str | None = None
    """The tracker's name for this run; default: the name of the run folder."""


# ---------------------------------------------------------------------------------------------------------------------
# The objective section comes from the table of losses: a loss's keyword-only arguments are its YAML keys


def loss_keys(objective: Family, loss_type: str) -> dict[str, inspect.Parameter]:
    """Keyword-only arguments of one loss: the keys that apply to it, with annotation and default."""
    parameters = inspect.signature(objective.losses[loss_type]).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _objective_section(name: str, objective: Family) -> type[Section]:
    fields: dict[str, Any] = {
        "name": (Literal[name], name),  # type: ignore[valid-type]
        "loss_type": (Literal[tuple(objective.losses)], next(iter(objective.losses))),  # type: ignore[valid-type]
    }
    for loss_type in objective.losses:
        for key, parameter in loss_keys(objective, loss_type).items():
            fields.setdefault(key, (_as_field(parameter.annotation), parameter.default))
    if objective.nll_weight:
        fields[objective.nll_weight] = (Annotated[float, Field(ge=0)] | None, None)
    return create_model(f"{name.capitalize()}Section", __base__=Section, **fields)


def _as_field(annotation: Any) -> Any:
    """`Annotated[float, {"gt": 0}]`, or its source text -> the same with a pydantic Field."""
    if isinstance(annotation, str):
        annotation = vars(inspect.getmodule(Family))[annotation]
    kind, *ranges = get_args(annotation)
    return Annotated[kind, *(Field(**r) for r in ranges)]


_OBJECTIVE_SECTIONS = {name: _objective_section(name, objective) for name, objective in OBJECTIVES.items()}
# A union of one member is that member, which needs (and takes) no discriminator.
ObjectiveSection = (
    Annotated[Union[tuple(_OBJECTIVE_SECTIONS.values())], Field(discriminator="name")]
    if len(_OBJECTIVE_SECTIONS) > 1
    else next(iter(_OBJECTIVE_SECTIONS.values()))
)


class Config(Section):
    """A whole run."""

    model: ModelSection
    """What is trained."""
    reference: ReferenceSection = ReferenceSection()
    """What it is compared with."""
    data: DataSection
    """The preference pairs."""
    objective: ObjectiveSection = Field(default_factory=_OBJECTIVE_SECTIONS["dpo"])  # type: ignore[valid-type]
    """The loss."""
    train: TrainSection = TrainSection()
    """Steps, optimizer, schedule."""
    deepspeed: str | dict[str, Any] = "ds_configs/zero3.json"
    """Path of a DeepSpeed JSON, or the mapping itself: memory and communication strategy only."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and resuming."""
    log: LogSection = LogSection()
    """Metrics and trackers."""
    output_dir: str
    """The run folder."""

    @property
    def strategy(self) -> dict[str, Any]:
        """The DeepSpeed strategy as a mapping, read from its file where `deepspeed` is a path."""
        return strategy.load(shipped(self.deepspeed)) if isinstance(self.deepspeed, str) else self.deepspeed

    @property
    def zero_stage(self) -> int:
        return self.strategy.get("zero_optimization", {}).get("stage", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Checks that concern several keys. Each yields (path of the key to blame, reason)


def _check_unsupported(config: Config):
    if config.model.router_aux_loss_coef:
        yield ("model", "router_aux_loss_coef"), "the router loss is not in this version; set 0 to train without it"
    if config.reference.mode == "adapter":
        yield (
            ("reference", "mode"),
            "adapter needs a LoRA policy, which this version does not train; use stored or engine",
        )


def _check_objective(config: Config):
    objective, section = OBJECTIVES[config.objective.name], config.objective
    applicable = {"name", "loss_type", objective.nll_weight, *loss_keys(objective, section.loss_type)}
    for key in sorted(section.model_fields_set - applicable):
        yield ("objective", key), f"does not apply to loss_type {section.loss_type}"
    if objective.needs_reference and config.reference.mode == "none":
        yield ("reference", "mode"), f"objective {section.name} needs a reference; use auto, stored or engine"


def _check_lengths(config: Config):
    data = config.data
    if data.max_length and data.max_prompt_length and data.max_prompt_length >= data.max_length:
        yield ("data", "max_prompt_length"), f"must be below max_length ({data.max_length}), or no answer token fits"


def _check_schedule(config: Config):
    train = config.train
    if {"warmup_ratio", "warmup_steps"} <= train.model_fields_set and train.warmup_steps is not None:
        yield ("train", "warmup_steps"), "give warmup_steps or warmup_ratio, not both"
    if train.eval_every and not config.data.eval:
        yield ("train", "eval_every"), "there is nothing to evaluate; set data.eval"
    if config.checkpoint.keep_best and not config.data.eval:
        yield ("checkpoint", "keep_best"), "there is nothing to evaluate; set data.eval"


def _check_reference(config: Config):
    reference = config.reference
    if reference.offload == "cpu" and reference.zero_stage == 0:
        yield ("reference", "offload"), "cpu offload needs reference.zero_stage 3"
    if reference.mode == "stored" and reference.offload == "cpu":
        yield (
            ("reference", "offload"),
            "stored log-probs leave no reference in memory; drop offload or use mode: engine",
        )


def _check_strategy(config: Config):
    problem = strategy.problem(config.strategy, config.model.dtype)
    if problem:
        yield ("deepspeed", *problem.path), problem.reason


CHECKS = (_check_unsupported, _check_objective, _check_lengths, _check_schedule, _check_reference, _check_strategy)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Raises ConfigError: `file:line:col: key: reason; did you mean ...?`
    """
    path = shipped(str(path))
    document, positions = parse(path)
    for override in overrides:
        apply_override(document, positions, override)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_explain(error, document, positions)) from None
    for check in CHECKS:
        for blamed, reason in check(config):
            raise ConfigError(f"{_locate(positions, blamed)}: {'.'.join(map(str, blamed))}: {reason}")
    return config


def apply_override(document: dict[str, Any], positions: dict[tuple, Position], override: str) -> None:
    """Set `section.key=value` in the document; the value is YAML. Numbers in the path count list items from 0."""
    path, equals, text = override.partition("=")
    where = f"override '{override}'"
    if not equals or not path:
        raise ConfigError(f"{where}: not of the form section.key=value")
    try:
        value = parse_value(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from None
    keys: list[str | int] = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = document
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, dict):
            node = node.setdefault(key, {}) if node.get(key) is not None else node.__setitem__(key, {}) or node[key]
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            raise ConfigError(f"{where}: {'.'.join(map(str, keys[: depth + 1]))} is not in a section")
    if isinstance(node, list) and isinstance(keys[-1], int) and keys[-1] < len(node):
        node[keys[-1]] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise ConfigError(f"{where}: {'.'.join(map(str, keys[:-1]))} is not a section")
    positions[tuple(keys)] = Position(where)


def shipped(path: str) -> Path:
    """`ds_configs/...` and `launch/...` that are absent in the working directory are taken from dspref itself."""
    if not Path(path).exists() and path.split("/")[0] in ("ds_configs", "launch"):
        package = Path(__file__).parent
        for root in (package.parent, package / "shipped"):
            if (root / path).exists():
                return root / path
    return Path(path)


def dump(config: Config) -> str:
    """The resolved config as YAML: every key, the strategy in place of its path; itself a valid config file."""
    import yaml

    values = config.model_dump(mode="json") | {"deepspeed": config.strategy}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def schema() -> str:
    """JSON Schema (draft 2020-12) of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema() | {"title": "dspref run"}, indent=2) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Messages

# Keys of TRL and the Hugging Face Trainer that people will type, with what to write here.
FOREIGN_KEYS = {
    "per_device_train_batch_size": "train.pairs_per_step (the global batch) and data.tokens_per_pack (memory)",
    "per_device_eval_batch_size": "data.tokens_per_pack",
    "gradient_accumulation_steps": "train.pairs_per_step; micro-steps follow from data.tokens_per_pack",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name_or_path",
    "ref_model": "reference.name_or_path",
    "precompute_ref_log_probs": "reference.mode: stored",
    "reference_free": "an objective without a reference",
    "dataset_name": "data.train: {path: ...}",
    "dataset": "data.train: {path: ...}",
    "datasets": "data.train: a list of sources",
    "padding_free": "nothing: every batch is packed",
    "packing": "nothing: every batch is packed",
    "loss_type": "objective.loss_type",
    "beta": "objective.beta",
    "rpo_alpha": "objective.rpo_alpha",
    "label_smoothing": "objective.label_smoothing",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "optim": "train.optim",
    "seed": "train.seed",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_completion_length",
    "save_steps": "checkpoint.save_every",
    "save_strategy": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "logging_steps": "log.every",
    "report_to": "log.trackers",
    "run_name": "log.run_name",
    "use_peft": "model.lora",
    "peft_config": "model.lora",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attn_implementation",
    "deepspeed_config": "deepspeed",
    "disable_dropout": "model.disable_dropout",
}


def _explain(error: ValidationError, document: Any, positions: dict[tuple, Position]) -> str:
    """The first problem, as one line."""
    problem = error.errors()[0]
    path = tuple(part for part in problem["loc"] if part not in ("one", "many", *OBJECTIVES))
    key = path[-1] if path else ""
    match problem["type"]:
        case "extra_forbidden":
            reason = "unknown key" + _suggest(str(key), _fields_at(path[:-1]), path[:-1])
        case "missing":
            return f"{_locate(positions, path[:-1])}: {'.'.join(map(str, path))}: is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            path, reason = (*path, "name"), f"must be one of {', '.join(OBJECTIVES)}"
        case "literal_error":
            reason = f"must be {problem['ctx']['expected']}, not {problem['input']!r}"
            choices = [part.strip("'") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason += _did_you_mean(str(problem["input"]), choices)
        case "none_required":
            reason = "LoRA is not in this version; remove the key to train the whole model"
        case _:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("valid ", "")
            reason = f"{message}, not {problem['input']!r}"
    return f"{_locate(positions, path)}: {'.'.join(map(str, path)) or 'config'}: {reason}"


def _suggest(key: str, siblings: Sequence[str], parent: tuple) -> str:
    close = _did_you_mean(key, siblings)
    foreign = FOREIGN_KEYS.get(key)
    if foreign and (not close or not parent):
        return f"; in dspref this is {foreign}"
    return close or f"; known here: {', '.join(siblings)}"


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _fields_at(path: tuple) -> list[str]:
    """Names of the keys that the section at `path` knows."""
    sections: dict[str, type[Section]] = {
        "model": ModelSection, "reference": ReferenceSection, "data": DataSection, "train": TrainSection,
        "checkpoint": CheckpointSection, "log": LogSection, "columns": Columns, "template": Template,
    }  # fmt: skip
    if not path:
        return list(Config.model_fields)
    if path[0] == "objective":
        return sorted({key for section in _OBJECTIVE_SECTIONS.values() for key in section.model_fields})
    if path[0] == "data" and len(path) > 1:
        return list(sections.get(str(path[-1]), SourceSection).model_fields)
    return list(sections[str(path[0])].model_fields)


def _locate(positions: dict[tuple, Position], path: tuple) -> str:
    """Where the key at `path` was written; a key that was not written is blamed on its section."""
    while path not in positions:
        path = path[:-1]
    return str(positions[path])

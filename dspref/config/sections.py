"""The sections of a run's YAML file, each a strict, frozen pydantic model whose docstrings explain its keys.

The config refuses; it does not rewrite what the user wrote. Two things are read as what they stand for, here and nowhere
else, so that runs, locks and resolved configs agree: `~` in a path (`FilePath`), and the short forms `train: file.jsonl`,
`lora: true`, `trackers: wandb`, `profile: 5`. `dspref.config` reads files into these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dspref.config import strategy
from dspref.config.data_section import Columns, DataSection, SourceSection, Template, source_in_full
from dspref.config.objective_section import DEFAULT_OBJECTIVE, OBJECTIVE_SECTIONS, ObjectiveSection, objective_section
from dspref.config.paths import FilePath, TemplatePath, shipped
from dspref.config.reference_section import BemaSection, ReferenceSection, bema_in_full
from dspref.config.section import Section
from dspref.config.train_section import ProfileSection, StopWhenSection, TrainSection, profile_in_full
from dspref.objectives import OBJECTIVES, needs_scores


class LoraSection(Section):
    """A LoRA adapter; names and meaning of the keys are peft's."""

    path: FilePath | None = None
    """Folder or hub id of a saved adapter to go on training. It brings its own settings, and is the reference by default."""
    r: Annotated[int, Field(gt=0)] = 16
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout on the adapter's input; default: none, or what a saved adapter says."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names, a regular expression, or all-linear (every linear layer but the head)."""
    exclude_modules: str | list[str] | None = None
    """Modules that get none: names or a regular expression."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole, and saved with the adapter."""
    layers_to_transform: list[int] | None = None
    """Numbers of the layers that get an adapter; default: all."""
    rank_pattern: dict[str, int] = {}
    """Module name or pattern -> its own r."""
    alpha_pattern: dict[str, float] = {}
    """Module name or pattern -> its own lora_alpha."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How A is drawn: true, Kaiming-uniform; gaussian. B starts at 0, so the first policy is the base model; with false
    B is random too."""
    merge_on_export: bool = False
    """Add the adapter to the weights of the exported model, which then needs no peft; the adapter goes to RUN/adapter."""


def _lora(value: Any) -> Any:
    """`true`: an adapter with every default; `false`: none."""
    return ({} if value else None) if isinstance(value, bool) else value


class ModelSection(Section):
    name_or_path: FilePath
    """Folder or hub id of the model to train."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer_name_or_path: FilePath | None = None
    """Tokenizer, where it is not the model's own."""
    chat_template: TemplatePath | None = None
    """Path of a Jinja chat template; default: the tokenizer's."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: weights are drawn from the config alone, with `train.seed`."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type of the weights in forward and backward; the optimizer keeps fp32 masters."""
    attn_implementation: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen", "sdpa"
    ] = "auto"
    """Kernel of the packed attention; `auto`: the fastest that this machine has."""
    liger: bool = False
    """Liger's kernels for norms, rotary positions and gated MLPs: less memory, some speed. CUDA, with `dspref[liger]`."""
    gradient_checkpointing: bool | Literal["offload"] = True
    """Recompute activations in the backward pass: less memory, about a quarter more compute; `offload`: and keep the input
    of each layer in host memory until then."""
    tiled_mlp: bool | Annotated[int, Field(gt=0)] = False
    """Run the MLP of each layer over so many tokens at a time, and recompute it in the backward pass, so that long packs
    take little memory there; true: as many as the hidden size, at least 1024."""
    disable_dropout: bool | Literal["all"] = True
    """true: no dropout in the base model; false: as the model's config says; all: adapters too."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the MoE load-balancing loss; default: the model's own; 0 turns it off."""
    router_aux_scope: Literal["micro", "step"] = "micro"
    """Tokens over which experts are balanced: `micro`, packs that run at the same time on all ranks; `step`, the whole step,
    exact on every layout, for one more forward."""
    freeze: list[Annotated[str, Field(min_length=1)]] = []
    """Parameters that are not trained, by parts of their names: `[embed_tokens, layers.0]`; `*`, `?` and `[0-7]` as in a
    shell."""
    lora: Annotated[LoraSection | None, BeforeValidator(_lora, json_schema_input_type=LoraSection | bool | None)] = None
    """Train a LoRA adapter and leave the model as it is; true: one with every default; default: train the whole model."""
    adapter_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "default"
    """Name of the adapter that is trained."""
    load_in_4bit: bool = False
    """QLoRA: keep the model in 4 bits (nf4, double quantization, bitsandbytes) below the adapter. Needs CUDA."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""


class ParallelSection(Section):
    sequence: Annotated[int, Field(gt=0)] = 1
    """So many ranks hold a pack between them, for pairs that are too long for one: each computes its share of the tokens,
    and in attention its share of the heads (Ulysses: Jacobs et al. 2023, arXiv:2309.14509). Must divide the ranks and the
    heads; a pack has room for `data.tokens_per_pack` tokens of each rank. Changes no loss."""


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


def _trackers(value: Any) -> Any:
    """One tracker may stand without its list."""
    return [value] if isinstance(value, str) else value


Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio", "comet", "swanlab"]


class GenerationSection(Section):
    """How sample prompts are answered."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy, the likeliest token each time; above, tokens are drawn, by the same random numbers at every evaluation."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this much probability between them."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Where an answer is cut that has not ended."""


class LogSection(Section):
    every: Annotated[int, Field(gt=0)] = 1
    """Steps between two lines of metrics."""
    trackers: Annotated[list[Tracker], BeforeValidator(_trackers, json_schema_input_type=list[Tracker] | Tracker)] = []
    """Where metrics go beside metrics.jsonl."""
    project: str = "dspref"
    """The tracker's project."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that the policy answers while it is trained, beside the reference: at step 0, at every evaluation and
    at the end (samples.jsonl)."""
    sample_every: Annotated[int, Field(gt=0)] | None = None
    """Answer every so many steps instead of at evaluations; at step 0 and at the end all the same."""
    samples_file: FilePath | None = None
    """Prompts of your own, all answered: rows with `prompt` (text or messages), or a line of plain text each."""
    generation: GenerationSection = GenerationSection()
    """How they are answered."""
    run_name: str | None = None
    """The tracker's name for this run; default: the name of the run folder."""


class ExportSection(Section):
    """The model in RUN/final."""

    weights: Literal["last", "best"] = "last"
    """`best`: those of the best evaluation, by the metric of train.stop_when or checkpoint.keep_best, whose checkpoint is
    saved and kept; step 0 is none of them."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, as owner/name, that the finished model is uploaded to, private."""


def _export(value: Any) -> Any:
    """`last` and `best` may stand for the section."""
    return {"weights": value} if isinstance(value, str) else value


class Config(Section):
    """A whole run."""

    model: ModelSection
    """What is trained."""
    reference: ReferenceSection = ReferenceSection()
    """What it is compared with."""
    data: DataSection
    """The preference pairs."""
    objective: ObjectiveSection = Field(default_factory=OBJECTIVE_SECTIONS[DEFAULT_OBJECTIVE])  # type: ignore[valid-type]
    """The loss."""
    train: TrainSection = TrainSection()
    """Steps, optimizer, schedule."""
    deepspeed: FilePath | dict[str, Any] = "ds_configs/zero3.json"
    """Path of a DeepSpeed JSON, or the mapping itself: memory and communication strategy only."""
    parallel: ParallelSection = ParallelSection()
    """How ranks share the work beside ZeRO."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and resuming."""
    log: LogSection = LogSection()
    """Metrics and trackers."""
    export: Annotated[
        ExportSection, BeforeValidator(_export, json_schema_input_type=ExportSection | Literal["last", "best"])
    ] = ExportSection()
    """The model that the run leaves; `export: best` for short."""
    output_dir: FilePath
    """The run folder."""

    @property
    def has_strategy_file(self) -> bool:
        """False where `deepspeed` is a path at which nothing lies."""
        return not isinstance(self.deepspeed, str) or os.path.exists(shipped(self.deepspeed))

    @property
    def strategy(self) -> dict[str, Any]:
        """The DeepSpeed strategy as a mapping, read from its file where `deepspeed` is a path."""
        return strategy.load(shipped(self.deepspeed)) if isinstance(self.deepspeed, str) else self.deepspeed

    @property
    def data_read(self) -> DataSection:
        """`data` with the columns named that the objective reads by their own names."""
        return self.data.reading(needs_scores(**self.objective.model_dump()), OBJECTIVES[self.objective.name].takes)

    @property
    def judged_by(self) -> str | None:
        """The held-out metric by which evaluations are better or worse."""
        return self.train.stop_when.metric if self.train.stop_when else self.checkpoint.keep_best

    @property
    def zero_stage(self) -> int:
        return strategy.stage_of(self.strategy)


# The section that holds all others: its fields, for those who look no value up in it.
TOP: type[Section] = Config


def in_full(path: tuple[str | int, ...], value: Any) -> Any:
    """What the value at `path` of a document stands for, where it may be a short form."""
    match path:
        case ("model", "lora"):
            return _lora(value)
        case ("reference", "bema"):
            return bema_in_full(value)
        case ("data", "train" | "eval") | ("data", "train", int()):
            return source_in_full(value)
        case ("export",):
            return _export(value)
        case ("train", "profile"):
            return profile_in_full(value)
        case ("log", "trackers"):
            return _trackers(value)
    return value


def section_at(path: tuple[str | int, ...], document: Any) -> type[Section] | None:
    """The section that the keys at `path` of a document belong to."""
    match path:
        case ():
            return Config
        case ("objective",):
            return objective_section(document.get("objective")) if isinstance(document, Mapping) else None
        case ("model", "lora"):
            return LoraSection
        case ("reference", "bema"):
            return BemaSection
        case ("train", "stop_when"):
            return StopWhenSection
        case ("train", "profile"):
            return ProfileSection
        case ("log", "generation"):
            return GenerationSection
        case ("data", "train" | "eval", *_, "columns"):
            return Columns
        case ("data", "train" | "eval", *_, "template"):
            return Template
        case ("data", "train" | "eval", *_):
            return SourceSection
        case (str(name),) if name in Config.model_fields:
            kind = Config.model_fields[name].annotation
            return kind if isinstance(kind, type) and issubclass(kind, Section) else None
    return None

"""The `data` section: sources of rows, and what becomes of their texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain, count
from typing import Annotated, Any, Literal, Union, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, create_model

from dspref import own_code
from dspref.config.paths import FilePath
from dspref.config.section import Section, one_or_list

ENDINGS = re.compile(r"(\.(jsonl|json|parquet|csv|arrow))?(\.(gz|bz2|xz))?$")


SCORES = ("score_chosen", "score_rejected")


class Columns(Section):
    prompt: str = "prompt"
    """Column that holds the prompt."""
    chosen: str = "chosen"
    """Column that holds the better answer."""
    rejected: str = "rejected"
    """Column that holds the worse answer."""
    completion: str | None = None
    """Column that holds one answer, which stands alone (objectives kto and bco); default: `completion`, in rows with a label
    and without chosen and rejected."""
    label: str | None = None
    """Column that says whether that answer is desirable: true or false, 1 or 0; default: `label` or `kto_tag`."""
    system: str | None = None
    """Column that holds a system message; default: `system`, where there is one. With it texts become a conversation."""
    tools: str | None = None
    """Column that holds the tools of a conversation, a list or JSON text of one; default: `tools`."""
    source_language: str | None = None
    """Column that holds the code of the prompt's language, as the tokenizer of an encoder-decoder model (NLLB, M2M100,
    mBART) has it; default: the one that the tokenizer is set to."""
    target_language: str | None = None
    """Column that holds the code of the answers' language."""
    images: str | None = None
    """Column that holds the images of the prompt, for a vision-language model: paths relative to the data file, bytes, or
    images of the datasets library, one or a list; default: `images` or `image`, where there is one."""
    completions: str | None = None
    """Column that holds a list of answers, in place of chosen and rejected; `column.key`: a key of each item. Default:
    `completions`, in rows without a chosen answer."""
    scores: str | None = None
    """Column that holds their scores, higher is better; `column.key`: a key of each item. Default: `scores`."""
    ranks: str | None = None
    """Column that holds their ranks, 1 is the best; `column.key`: a key of each item. Default: `ranks`, without `scores`."""
    weight: str | None = None
    """Column that holds what the pair weighs in the loss, at least 0: its value is multiplied by it, and the mean stays one
    over all pairs; null: 1."""
    margin: str | None = None
    """Column that holds the target margin of the pair's rewards, in sigmoid, sigmoid_norm and simpo; null: 0."""
    score_chosen: str | None = None
    """Column that holds the score of the better answer, of pairs of two answers. Default: `score_chosen`, where
    `objective.loss_type` (rpo_*) or `pair_weights` reads scores."""
    score_rejected: str | None = None
    """Column that holds the score of the worse answer. Default: `score_rejected`, likewise."""
    reference: str | None = None
    """Column that holds the gold answer, which is better than both (objective tpo). Default: `reference`, there."""

    @property
    def named(self) -> dict[str, str]:
        """The columns with other names than they have by default."""
        return {
            key: getattr(self, key) for key, field in Columns.model_fields.items() if getattr(self, key) != field.default
        }


class Template(Section):
    prompt: str
    """Text of the prompt, with {column} fields."""
    chosen: str
    """Text of the better answer."""
    rejected: str
    """Text of the worse answer."""
    system: str | None = None
    """System message; with it the row becomes a conversation. Rows in which it is empty have none."""
    reference: str | None = None
    """Text of the gold answer, which is better than both (objective tpo)."""


AS = """What texts are: `chat`, a user's message and an assistant's; `text`, taken as they are. Default: `chat` for a
`template` where the tokenizer has a chat template, and for rows with a system message; else `text`."""
# `as` is a keyword of Python, and no attribute that a class could declare.
_As: type[Section] = create_model(
    "_As", __base__=Section, **cast(Any, {"as": (Annotated[Literal["chat", "text"] | None, Field(description=AS)], None)})
)


class SourceSection(_As):  # pyright: ignore[reportGeneralTypeIssues]
    path: FilePath
    """File, glob, folder or hub id."""
    split: str | None = None
    """Split of a hub data set, folder or glob, or a part of one: train, train[:1000], train[10%:], train+test. Default:
    train, or what a single file or all files of a glob are."""
    name: str | None = None
    """Which data set, where a hub id or a folder holds several (configs)."""
    data_dir: str | None = None
    """Folder within a hub data set or a local folder."""
    revision: str | None = None
    """Hub revision of the data set (branch, tag or commit)."""
    max_samples: Annotated[int, Field(gt=0)] | None = None
    """Use only the first so many rows."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Passes over this source per epoch; a fraction is sampled by the seed."""
    columns: Columns = Columns()
    """Names of the columns in this source."""
    template: Template | None = None
    """Texts made from columns, instead of columns taken as they are."""
    format: Annotated[str, Field(json_schema_extra={"pattern": f"^{own_code.NAME}$"})] | None = None
    """`module:function` of your own: a function of a raw row that gives a row as dspref reads it, in place of it."""
    pairs: Literal["all", "best_against_rest", "best_against_worst", "list"] = "all"
    """Of a row with several scored answers, which two make a pair; equal scores make none. `list`: all of them are one list,
    as objective listwise has it by itself."""
    pair_weights: Literal["score_gap"] | None = None
    """`score_gap`: a pair weighs in the loss as much as the scores of its answers are apart, those of `columns.scores` or of
    `columns.score_chosen` and `score_rejected`. Scale them so that the mean gap is about 1, or the learning rate to it."""

    @property
    def as_(self) -> str | None:
        return getattr(self, "as")

    def reading(self, scores: bool, takes: str) -> SourceSection:
        """The same with the columns named of which something reads numbers or answers: the scores of both answers, where
        `scores` are read or weights are made of them, and the gold answer. `takes`: what a row becomes, as in `Family`."""
        names = [*SCORES] if scores or self.pair_weights is not None else []
        names += ["reference"] if takes == "gold" and not self.template else []
        own = {name: getattr(self.columns, name) or name for name in names}
        changed = {"columns": self.columns.model_copy(update=own)} if own else {}
        return self.model_copy(update=changed | ({"pairs": "list"} if takes == "list" else {}))


def source_in_full(value: Any) -> Any:
    """A text is the path of a source."""
    return {"path": value} if isinstance(value, str) else value


# A source as the file may have it, and in the schema.
OneSource = Annotated[SourceSection, BeforeValidator(source_in_full, json_schema_input_type=SourceSection | str)]


def _one_or_named(value: Any) -> str:
    named = isinstance(value, Mapping) and all(isinstance(v, Mapping | SourceSection) for v in value.values())
    return "many" if named else "one"


OneOrList = Annotated[
    Union[
        Annotated[OneSource, Tag("one")],
        Annotated[Annotated[list[OneSource], Field(min_length=1)], Tag("many")],
    ],
    Discriminator(one_or_list),
]
OneOrNamed = Annotated[
    Union[Annotated[OneSource, Tag("one")], Annotated[dict[str, SourceSection], Tag("many")]],
    Discriminator(_one_or_named),
]


class DataSection(Section):
    train: OneOrList
    """A source, or a list of sources: a mixture. A source that is only a path may be written as such."""
    eval: OneOrNamed | None = None
    """Held-out pairs: one source, or `name: source` for several."""
    max_length: Annotated[int, Field(ge=2)] | None = 2048
    """Longest prompt + answer in tokens; of longer ones the prompt is cut first, then the answers."""
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt in tokens."""
    max_completion_length: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; its head is kept."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a long prompt survives; with keep_end, what the template puts before the first message stays too."""
    min_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a prompt that stay before answers are cut to max_length; default: a quarter of max_length."""
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a pair that is beyond max_length, max_prompt_length or max_completion_length."""
    scored: Literal["assistant", "last", "all"] = "assistant"
    """Tokens of a conversation that are scored. `assistant`: what the model itself writes in every turn of the answer, each
    with the token that ends it; `last`: the same of the last turn alone; `all`: everything behind the prompt, headers and
    other roles' turns too, as in TRL."""
    tokens_per_pack: Annotated[int, Field(ge=1)] = 16384
    """Computed tokens per rank and micro-step. A longer pair gets a pack of its own."""
    prefix_sharing: bool | Literal["auto"] = "auto"
    """Compute the prompt once for both answers; `auto`: when it saves more than 3 % of the tokens."""
    shuffle: bool = True
    """Shuffle each epoch by the seed; false: the order of the files."""
    keep_together: Literal["row", "prompt", "none"] = "row"
    """Pairs that stay side by side when shuffled, so that what they share is computed once: those of one row, those of one
    prompt, or none."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be used: stop and name it, or leave it out and count it."""

    def reading(self, scores: bool, takes: str) -> DataSection:
        """The same with what the objective asks of each source."""
        train, held_out = self.train, self.eval
        train = [one.reading(scores, takes) for one in train] if isinstance(train, list) else train.reading(scores, takes)
        if isinstance(held_out, dict):
            held_out = {name: one.reading(scores, takes) for name, one in held_out.items()}
        elif held_out is not None:
            held_out = held_out.reading(scores, takes)
        return self.model_copy(update={"train": train, "eval": held_out})

    def placed(self) -> Iterator[tuple[tuple[str | int, ...], SourceSection]]:
        """Every source of train and eval, with the path of its keys."""
        for number, source in enumerate(self.train_sources):
            yield ("data", "train", number) if isinstance(self.train, list) else ("data", "train"), source
        named = isinstance(self.eval, dict)
        for key, source in self.source_keys("eval").items():
            yield ("data", "eval", key.removeprefix("data.eval.")) if named else ("data", "eval"), source

    def source_keys(self, of: Literal["train", "eval"]) -> dict[str, SourceSection]:
        """The sources of train or eval by their keys in the YAML."""
        part, key = getattr(self, of), f"data.{of}"
        if isinstance(part, list):
            return {f"{key}.{number}": source for number, source in enumerate(part)}
        if isinstance(part, dict):
            return {f"{key}.{name}": source for name, source in part.items()}
        return {key: part} if part else {}

    @property
    def labels(self) -> list[str]:
        """What the sources of train are called in metrics: the last part of their path, numbered where that is taken."""
        found: list[str] = []
        for source in self.train_sources:
            name = ENDINGS.sub("", source.path.rstrip("/").rpartition("/")[2])
            others = (f"{name}-{number}" for number in count(2))
            found.append(next(label for label in chain([name], others) if label not in found))
        return found

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

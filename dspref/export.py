"""The trained model as anyone loads it: safetensors, tokenizer, template, generation config and a model card in `final/`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import dspref
from dspref import checkpoint, distributed, model, reference
from dspref.checkpoint import RunFolder
from dspref.config import Config
from dspref.engine import Engine
from dspref.errors import IOFault, NumericFault
from dspref.model import PackedCausalLM
from dspref.objectives import describe

MAX_SHARD = "5GB"


def export(
    run: RunFolder, policy: Engine, tokenizer: PreTrainedTokenizerBase, config: Config, summary: Mapping[str, Any]
) -> None:
    """Write `final/`, and prove that plain `from_pretrained` reads back the very weights, before it bears that name."""
    state = policy.full_state()  # every rank takes part in the gathering
    distributed.on_main(lambda: _write(run, policy.module, state, tokenizer, config, summary))
    run.event("export", path=str(run.final))


def _write(
    run: RunFolder,
    policy: PackedCausalLM,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    summary: Mapping[str, Any],
) -> None:
    draft = run.path / ".final"
    shutil.rmtree(draft, ignore_errors=True)
    trained_config, policy.lm.config = policy.lm.config, policy.published_config
    try:
        policy.lm.save_pretrained(draft, state_dict=state, max_shard_size=MAX_SHARD)
    finally:
        policy.lm.config = trained_config
    tokenizer.save_pretrained(draft)
    (draft / "README.md").write_text(model_card(config, summary), encoding="utf-8")
    verify(draft, state, config.model.trust_remote_code)
    shutil.rmtree(run.final, ignore_errors=True)
    draft.rename(run.final)


def verify(folder: Path, state: Mapping[str, torch.Tensor], trust_remote_code: bool = False) -> None:
    """Load `folder` as a user would and compare every weight with `state`, bit by bit. Raises IOFault."""
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise NumericFault(f"{bad[0]}: the trained weights are not finite; lower train.learning_rate and start anew")
    reloaded = model.load_plain(str(folder), trust_remote_code).state_dict()
    wrong = [name for name, tensor in state.items() if name not in reloaded or not torch.equal(reloaded[name], tensor)]
    if wrong:
        raise IOFault(
            f"{folder}: the exported {wrong[0]} does not read back as it was written; check the disk and export again"
        )


PROBE = "Hello  world's 12345 tests:\n\n  lamp_é 你好\tx"


def warn_of_other_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Say so, before training, if AutoTokenizer will make another tokenizer of the exported folder.

    transformers rebuilds the tokenizer by the model's type for some families, whatever the tokenizer's own files say.
    """
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if reloaded(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        distributed.log(
            f"warning: beside a {config.model_type} model AutoTokenizer reads this tokenizer as {type(reloaded).__name__}, "
            "which splits text otherwise; load it from final/ with PreTrainedTokenizerFast.from_pretrained"
        )


CARD = Template(
    """---
library_name: transformers
{%- if base_is_hub %}
base_model: {{ config.model.name_or_path }}
{%- endif %}
tags: [dspref, preference-optimization, {{ config.objective.name }}]
---
# {{ name }}

Trained from `{{ config.model.name_or_path }}` by dspref {{ version }}.

| | |
|---|---|
| objective | {{ objective }} |
| reference | {{ reference }} |
| data | {{ data }} |
| steps | {{ summary.step }} of {{ config.train.pairs_per_step }} pairs, learning rate {{ config.train.learning_rate }} |
| precision | {{ config.model.dtype }} |
{%- for key, value in summary.metrics.items() %}
| {{ key }} | {{ "%.4f" | format(value) }} |
{%- endfor %}
{% for key, value in env.packages.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}.

To reproduce: `deepspeed launch/train.py --config config.resolved.yaml output_dir=again`, with the run folder's file.
""",
    autoescape=False,
)


def model_card(config: Config, summary: Mapping[str, Any]) -> str:
    """README.md of the model, in the Hub's form: what it was made from, how, and what was measured."""
    return CARD.render(
        config=config,
        name=Path(config.output_dir).name,
        version=dspref.__version__,
        objective=describe(**config.objective.model_dump()),
        reference=reference.describe(config),
        data=", ".join(source.path for source in config.data.train_sources),
        base_is_hub=not Path(config.model.name_or_path).exists() and config.model.init == "pretrained",
        env=checkpoint.environment(),
        summary=summary,
    )

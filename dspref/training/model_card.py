"""The model card: README.md of an exported model, in the Hub's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template

import dspref
from dspref.config import LoraSection, ModelSection
from dspref.objectives import OBJECTIVES, describe
from dspref.run import folder as run_folder

CARD = Template(
    """---
library_name: {{ library }}
{%- if base_is_hub %}
base_model: {{ recipe.model.name_or_path }}
{%- endif %}
tags: [dspref, preference-optimization, {{ recipe.objective.name }}]
---
# {{ recipe.name }}

Trained from `{{ recipe.model.name_or_path }}` by dspref {{ version }}.

| | |
|---|---|
| objective | {{ objective }} |
| reference | {{ recipe.reference }} |
{%- if adapter %}
| adapter | {{ adapter }} |
{%- endif %}
| data | {{ data }} |
| steps | {{ summary.step }} of {{ recipe.pairs_per_step }} {{ counted }}, learning rate {{ recipe.learning_rate }} |
| precision | {{ recipe.model.dtype }} |
{%- if recipe.model.freeze %}
| not trained | {{ recipe.model.freeze | join(", ") }} |
{%- endif %}
{%- for key, value in summary.metrics.items() %}
| {{ key }} | {{ "%.4f" | format(value) }} |
{%- endfor %}
{% for key, value in env.packages.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}.

To reproduce: `deepspeed launch/train.py --config config.resolved.yaml output_dir=again`, with the run folder's file.
""",
    autoescape=False,
)


# What train.pairs_per_step counts, by what a row becomes for the objective (`Family.takes`).
OF_STEP = {"pairs": "pairs", "answers": "examples", "list": "lists", "gold": "pairs with gold answers"}


class Recipe(NamedTuple):
    """What a model was made from, and how, as its card says it."""

    name: str
    model: ModelSection
    objective: Mapping[str, Any]
    reference: str
    """In words."""
    data: Sequence[str]
    """Paths."""
    pairs_per_step: int
    learning_rate: float


def model_card(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """README.md of the model, in the Hub's form: what it was made from, how, and what was measured (`step`, `metrics`)."""
    lora = recipe.model.lora
    return CARD.render(
        recipe=recipe,
        library="peft" if lora and not lora.merge_on_export else "transformers",
        adapter=adapter_in_words(lora),
        counted=OF_STEP[OBJECTIVES[recipe.objective["name"]].takes],
        version=dspref.__version__,
        objective=describe(**recipe.objective),
        data=", ".join(recipe.data),
        base_is_hub=not Path(recipe.model.name_or_path).exists() and recipe.model.init == "pretrained",
        env=run_folder.environment(),
        summary=summary,
    )


def adapter_in_words(lora: LoraSection | None) -> str:
    """The adapter that is trained, in one line; empty where the whole model is."""
    if lora is None:
        return ""
    if lora.path is not None:
        return f"LoRA, continued from {lora.path}"
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    where = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    whole = f"; trained whole: {', '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    return f"{kind}, r {lora.r}, alpha {lora.lora_alpha:g}, on {where}{whole}"

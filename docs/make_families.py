"""Writes families.md beside this file: how each decoder-only family of transformers is read; a test holds it current.

python docs/make_families.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from tiny_families import LISTED, small_config  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

from dspref.config import ModelSection  # noqa: E402
from dspref.model import admission, alone  # noqa: E402

INTRODUCTION = """\
# Families

<!-- Written by docs/make_families.py from tests/tiny_families.py and dspref/model/. Edit those, and run it again. -->

Decoder-only language models of transformers {version}, by the `model_type` of their config.json, and how dspref reads them.
Each row was shrunken and run: log-probs and the gradient of every parameter are those of one plain forward per sequence
(`tests/unit/model/test_every_family.py`, which runs in CI).

- **packed**: sequences lie one behind the other, and prompts are computed once (`data.prefix_sharing`). Softcapped scores
  and sinks are known to the kernels named here and no other; sdpa computes them with all scores of a sequence in memory.
- **one at a time**: each answer behind its prompt is a forward of its own, exact, and slower: its layers take no boundaries
  of sequences, as transformers has them (its torch code of recurrent and linear-attention layers among them). A run says so
  when it begins, `prefix_sharing: true` is refused, and under ZeRO-3 ranks with fewer sequences run fillers beside the
  others. Answers (`log.samples`) are made by reading the whole sequence again for every token.

Any family is read one at a time where `data.max_length` is beyond the length up to which its rotary positions are fixed
(longrope, dynamic). Encoder-decoder models and models that read images have [tables of their own](packing.md).
"""
_ENCODERS = """
    bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer
    xlm xlm-roberta xlm-roberta-xl xmod
"""
ENCODERS = _ENCODERS.split()
# Of other kinds, under the name of causal language models: halves of encoder-decoder models, readers of images or sound.
_OTHERS = """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper
    dots3_note dots3_note_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git
    got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe
    qwen4_exp
"""
OTHERS = _OTHERS.split()
REFUSED = {
    **admission.REFUSED,
    "bert-generation": "has layers between backbone and head, as BERT has",
}


def read_as(family: str) -> tuple[str, str]:
    """(packed | one at a time, why) of a family, as shrunken in the tests."""
    config = small_config(family)
    section: Any = ModelSection(name_or_path=family, dtype="float32", gradient_checkpointing=False)
    kernel = admission.check(section, config, 64, 0, "cpu")
    if kernel != alone.ALONE:
        return "packed", needs(config)
    return "one at a time", admission.why_alone(config, 64) or ""


def needs(config: PretrainedConfig) -> str:
    section: Any = ModelSection(name_or_path=config.model_type, dtype="float32")
    sinks = any("sink" in name for name, _ in admission.build_skeleton(section, config).named_parameters())
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "; ".join(
        ["softcapped scores: FlashAttention 2 or 3, or sdpa"] * bool(softcap) + ["attention sinks: sdpa"] * sinks
    )


def document() -> str:
    rows = [(family, *read_as(family)) for family in LISTED]
    counts = {how: sum(row[1] == how for row in rows) for how in ("packed", "one at a time")}
    lines = [INTRODUCTION.format(version=".".join(transformers.__version__.split(".")[:2]))]
    lines.append(f"{len(rows)} families: {counts['packed']} packed, {counts['one at a time']} one at a time.\n")
    lines += ["| family | read | |", "|---|---|---|", *(f"| {family} | {how} | {why} |" for family, how, why in rows)]
    lines += [
        "\n## Refused\n",
        "| family | |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in sorted(REFUSED.items())),
    ]
    lines += ["\nEncoders, which know no left to right: " + ", ".join(ENCODERS) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "families.md").write_text(document(), encoding="utf-8")

"""What happens behind the last step: the model is exported, and the run says how it went."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dspref import distributed, terminal
from dspref.engine.engine import Engine
from dspref.model import adapters
from dspref.report import console
from dspref.run import history, record
from dspref.run.export import export
from dspref.run.folder import RunFolder
from dspref.training import outcome
from dspref.training.model_card import Recipe, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def finish(
    run: RunFolder,
    recipe: Recipe,
    policy: Engine,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
    steps: int,
    seconds: float,
) -> None:
    """Export and verify the model, record the summary."""
    vocabulary: int = policy.module.lm.config.get_text_config().vocab_size

    # Rank 0 wrote that file: another would read half of a line that is still on its way.
    summary = distributed.on_main(lambda: outcome.summary(run.path, steps, seconds, vocabulary)) or {}
    card = model_card(recipe, {"step": steps, "metrics": outcome.of_card(summary)})
    exported = export(run, policy, tokenizer, recipe.model, weights, card)
    run.event("finish", step=steps)

    def close() -> None:
        run.flush()
        run.update(state="finished", summary=summary, exported=exported)

    distributed.on_main(close)


def show_summary(run: RunFolder) -> None:
    if distributed.world().rank != 0:
        return
    rows = history.samples_of(run.path / record.SAMPLES)[0]
    rows = [row for row in rows if row.step == rows[-1].step]
    if rows:
        console.samples(rows)
    final = terminal.literal(str(run.final))
    prompt = terminal.literal(harmless(console.printable(rows[0].prompt if rows else "Hello", limit=60)))
    more, loaded = "", final
    if adapters.is_saved(str(run.final), ""):
        # pipeline would look for the tokenizer beside the model below the adapter, and leave DoRA's magnitudes out.
        more = "from peft import AutoPeftModelForCausalLM as LM; "
        loaded = f"LM.from_pretrained({final}), tokenizer={final}"
    ask = f'pipeline("text-generation", {loaded})([{{"role": "user", "content": {prompt}}}])'
    console.summary(
        run.run["summary"],
        {"model": str(run.final), "metrics": str(run.path / "metrics.jsonl")},
        [terminal.command("python", "-c", f"{more}from transformers import pipeline; print({ask})")],
    )


def harmless(text: str) -> str:
    """Text from data in a command that people paste into a shell: letters, digits and plain punctuation."""
    return re.sub(r"[^\w ,.:;?()+*=-]", "", text)

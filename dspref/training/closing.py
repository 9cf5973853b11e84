"""What happens behind the last step: the model is exported, prompts are answered, and the run says how it went."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from dspref import distributed, terminal
from dspref.config import ModelSection
from dspref.data.store import PairStore
from dspref.engine.engine import Engine
from dspref.files import read_lines, write_atomically
from dspref.model import adapters, unpacked
from dspref.model.weights import one_line
from dspref.report import console
from dspref.run import checkpoint
from dspref.run.checkpoint import Progress
from dspref.run.export import export
from dspref.run.folder import RunFolder
from dspref.training import outcome
from dspref.training.model_card import Recipe, model_card
from dspref.training.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What samples.jsonl has of each prompt.
SAMPLE = ("prompt", "before", "after", "chosen")
# Tokens that a sample answer may have.
SAMPLE_TOKENS = 64


def take_best(session: Session, progress: Progress) -> None:
    """Load the weights of the best evaluation, where they are to be exported."""
    best, rule = progress.best, session.rule
    if not (rule and rule.exports and best.value is not None) or best.step == progress.step:
        return
    session.saver.wait()
    if checkpoint.load_step(session.run, best.step, session.policy):
        distributed.log(f"export: the weights of step {best.step}, where {rule.metric} was best ({best.value:.4g})")
    else:
        distributed.log(
            f"warning: export: the checkpoint of step {best.step}, where {rule.metric} was best, is gone or damaged; the "
            "weights of the last step are exported"
        )


def why_it_ended(session: Session, progress: Progress, steps: int) -> str | None:
    """In words, where a run ended before its last step."""
    if session.rule is None or progress.step == steps or not session.rule.is_over(progress.best):
        return None
    said = session.rule.in_words(progress.best, progress.step)
    session.run.event("early_stop", step=progress.step, metric=session.rule.metric, best=progress.best.step)
    distributed.log(f"stopped {said}")
    return said


def finish(
    run: RunFolder,
    recipe: Recipe,
    policy: Engine,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
    held_out: Mapping[str, PairStore],
    samples: int,
    steps: int,
    seconds: float,
    stopped: str | None = None,
) -> None:
    """Export and verify the model, answer sample prompts, record the summary; `stopped`: why before the last step."""
    vocabulary: int = policy.module.lm.config.get_text_config().vocab_size

    # Rank 0 wrote that file: another would read half of a line that is still on its way.
    summary = distributed.on_main(lambda: outcome.summary(run.path, steps, seconds, vocabulary)) or {}
    summary |= {"stopped": stopped}
    card = model_card(recipe, {"step": steps, "metrics": outcome.of_card(summary)})
    exported = export(run, policy, tokenizer, recipe.model, weights, card)
    run.event("finish", step=steps)

    def close() -> None:
        if samples and held_out:
            try:
                write_samples(run, recipe.model, tokenizer, weights, next(iter(held_out.values())), samples)
            except (RuntimeError, ValueError, TypeError) as error:  # of transformers: the model is exported all the same
                distributed.log(f"warning: log.samples: no answers ({type(error).__name__}: {one_line(error)})")
        run.flush()
        run.update(state="finished", steps=steps, summary=summary, exported=exported)

    distributed.on_main(close)


def show_summary(run: RunFolder) -> None:
    if distributed.world().rank != 0:
        return
    rows = [row for row in read_lines(run.path / "samples.jsonl") if all(isinstance(row.get(name), str) for name in SAMPLE)]
    if rows:
        console.samples(rows)
    final = terminal.literal(str(run.final))
    prompt = terminal.literal(harmless(console.printable(rows[0]["prompt"] if rows else "Hello", limit=60)))
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


def write_samples(
    run: RunFolder, model: ModelSection, tokenizer: PreTrainedTokenizerBase, weights: str, store: PairStore, count: int
) -> None:
    """Answer the first held-out prompts with the initial and the final model, by plain transformers (samples.jsonl)."""
    pairs = [store[i] for i in range(min(count, len(store)))]
    prompts = [pair.prompt.tolist() for pair in pairs]
    stop = cast(int, tokenizer.eos_token_id)
    answers = [
        unpacked.generate(load(), prompts, SAMPLE_TOKENS, stop)
        for load in (
            lambda: unpacked.load_initial_policy(model, weights),
            lambda: unpacked.load_plain(str(run.final), model.trust_remote_code),
        )
    ]
    rows = [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "before": tokenizer.decode(before, skip_special_tokens=True),
            "after": tokenizer.decode(after, skip_special_tokens=True),
            "chosen": tokenizer.decode(pair.chosen, skip_special_tokens=True),
        }
        for prompt, pair, before, after in zip(prompts, pairs, *answers)
    ]
    write_atomically(run.path / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

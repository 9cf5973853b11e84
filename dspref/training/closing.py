"""What happens behind the last step: the model is exported, and the run says how it went."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dspref import distributed, terminal
from dspref.data.image_rows import PLACE
from dspref.engine.engine import Engine
from dspref.model import adapters, families
from dspref.report import console
from dspref.run import checkpoint, history, record
from dspref.run.checkpoint import Progress
from dspref.run.export import export
from dspref.run.folder import RunFolder
from dspref.training import outcome
from dspref.training.model_card import Recipe, model_card
from dspref.training.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a vision-language model has beside its tokenizer.
PROCESSOR = "processor_config.json"


def take_best(session: Session, progress: Progress) -> int:
    """Load the weights of the best evaluation, where they are to be exported. The step whose weights the policy has then."""
    best, rule = progress.best, session.rule
    if not (rule and rule.exports and best.value is not None) or best.step == progress.step:
        return progress.step
    session.saver.wait()
    if checkpoint.load_step(session.run, best.step, session.policy):
        distributed.log(f"export: the weights of step {best.step}, where {rule.metric} was best ({best.value:.4g})")
        return best.step
    distributed.log(
        f"warning: export: the checkpoint of step {best.step}, where {rule.metric} was best, is gone or damaged; the "
        "weights of the last step are exported"
    )
    return progress.step


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
    steps: int,
    weights_of: int,
    seconds: float,
    stopped: str | None = None,
) -> None:
    """Export and verify the model, record the summary. `weights_of`: the step that the policy's weights are of; `stopped`:
    why the run ended before its last step."""
    vocabulary: int = policy.module.lm.config.get_text_config().vocab_size

    # Rank 0 wrote that file: another would read half of a line that is still on its way.
    summary = distributed.on_main(lambda: outcome.summary(run.path, steps, seconds, vocabulary)) or {}
    summary |= {"weights_of": weights_of, "stopped": stopped}
    summary |= {"encoder_decoder": True} if families.is_encoder_decoder(policy.module.lm.config) else {}
    figures = distributed.on_main(lambda: outcome.of_card(run.path, summary)) or {"step": weights_of, "metrics": {}}
    card = model_card(recipe, figures)
    exported = export(run, policy, tokenizer, recipe.model, weights, card)
    run.event("finish", step=steps)

    def close() -> None:
        run.flush()
        run.update(state="finished", steps=steps, summary=summary, exported=exported)

    distributed.on_main(close)


def show_summary(run: RunFolder) -> None:
    if distributed.world().rank != 0:
        return
    rows = history.samples_of(run.path / record.SAMPLES)[0]
    final_step = run.run["summary"].get("weights_of")
    last = final_step if any(row.step == final_step for row in rows) else rows[-1].step if rows else None
    rows = [row for row in rows if row.step == last]
    if rows:
        console.samples(rows)
    folder = f"./{run.path}" if str(run.path).startswith("-") else str(run.path)  # and no option
    final = terminal.literal(str(run.final))
    said = console.asked(rows[0].prompt).replace(PLACE, "").strip() if rows else "Hello"
    prompt = terminal.literal(harmless(console.printable(said, limit=60)))
    if run.run["summary"].get("encoder_decoder"):
        library, kind = ("peft", "PeftModel") if adapters.is_saved(str(run.final), "") else ("transformers", "Model")
        more = f"from {library} import Auto{kind}ForSeq2SeqLM as LM; from transformers import AutoTokenizer; "
        more += f"t = AutoTokenizer.from_pretrained({final}); lm = LM.from_pretrained({final}); "
        return _show(run, folder, f"{more}print(t.decode(lm.generate(**t({prompt}, return_tensors='pt'))[0]))")
    more, loaded = "", final
    if adapters.is_saved(str(run.final), ""):
        # pipeline would look for the tokenizer beside the model below the adapter, and leave DoRA's magnitudes out.
        more = "from peft import AutoPeftModelForCausalLM as LM; "
        loaded = f"LM.from_pretrained({final}), tokenizer={final}"
    ask = f'pipeline("text-generation", {loaded})([{{"role": "user", "content": {prompt}}}])'
    sees = (run.final / PROCESSOR).exists()
    if sees:
        parts = f'[{{"type": "image", "url": "IMAGE.png"}}, {{"type": "text", "text": {prompt}}}]'
        ask = f'pipeline("image-text-to-text", {loaded})(text=[{{"role": "user", "content": {parts}}}], max_new_tokens=64)'
    ask = "" if sees and more else f"{more}from transformers import pipeline; print({ask})"
    _show(run, folder, ask)


def _show(run: RunFolder, folder: str, ask: str) -> None:
    """`ask`: what has the model answer, in Python, where that is short."""
    console.summary(
        run.run["summary"],
        {"model": str(run.final), "metrics": str(run.path / "metrics.jsonl")},
        [
            terminal.command("dspref", "report", folder),
            terminal.command("dspref", "chat", folder),
            *([terminal.command("python", "-c", ask)] if ask else []),
        ],
    )


def harmless(text: str) -> str:
    """Text from data in a command that people paste into a shell: letters, digits and plain punctuation."""
    return re.sub(r"[^\w ,.:;?()+*=-]", "", text)

"""The trained model as anyone loads it: safetensors, tokenizer, template, generation config and a model card in `final/`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dspref import distributed
from dspref.config import ModelSection, shipped
from dspref.engine.engine import Engine
from dspref.errors import IOFault, NumericFault
from dspref.files import Hashes, flushed_tree, remove, sync_folder
from dspref.model import adapters, processors, unpacked
from dspref.model.packed import PackedCausalLM
from dspref.run.folder import RunFolder
from dspref.secrets import redact

MAX_SHARD = "5GB"


def export(
    run: RunFolder,
    policy: Engine,
    tokenizer: PreTrainedTokenizerBase,
    section: ModelSection,
    base: str,
    card: str,
) -> dict[str, tuple[int, str]]:
    """Write `final/`, and prove that it reads back as the very weights before it bears that name; on rank 0, size and sha256
    of each file that was written, by its path in the run folder. They are on disk by then.

    Of a policy with an adapter that is the adapter, or with `merge_on_export` the model with the adapter added to it, and
    the adapter is in `adapter/`. `base`: where the model below the adapter lies; `card`: README.md.
    """
    state = policy.full_state(trained_only=section.lora is not None)  # every rank takes part in the gathering
    adapter = run.path / "adapter"
    written = distributed.on_main(lambda: write(run.final, adapter, policy.module, state, tokenizer, section, base, card))
    run.event("export", path=str(run.final))
    return {f"{folder.name}/{name}": entry for folder, files in (written or {}).items() for name, entry in files.items()}


def write(
    final: Path,
    beside: Path,
    policy: PackedCausalLM,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    section: ModelSection,
    base: str,
    card: str,
) -> dict[Path, Hashes]:
    """Write `final`, and with `merge_on_export` the adapter to `beside`; what is in each. `state`: what was trained, by
    name."""
    lora, written = section.lora, {}
    refuse_not_finite(state)
    if lora is None:
        with _replacing(final, written) as draft:
            _write_model(draft, policy, state, section.trust_remote_code)
            accompany(draft, tokenizer, card)
        return written
    adapter = beside if lora.merge_on_export else final
    with _replacing(adapter, written) as draft:
        _write_adapter(draft, policy, state, base, section)
        accompany(draft, tokenizer, card)
    if lora.merge_on_export:
        with _replacing(final, written) as draft:
            write_merged(draft, base, adapter, section)
            accompany(draft, tokenizer, card)
    return written


@contextmanager
def _replacing(folder: Path, written: dict[Path, Hashes]) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` once it is whole and on disk; `written` says what is in it."""
    draft = folder.with_name(f".{folder.name}")
    remove(draft)
    yield draft
    written[folder] = flushed_tree(draft)
    before = folder.with_name(f".old-{folder.name}")
    remove(before)
    if os.path.lexists(folder):
        folder.rename(before)
    draft.rename(folder)
    sync_folder(folder.parent)
    remove(before)


def _write_model(draft: Path, policy: PackedCausalLM, state: dict[str, Tensor], trust_remote_code: bool) -> None:
    trained_config, policy.lm.config = policy.lm.config, policy.published_config
    try:
        policy.lm.save_pretrained(draft, state_dict=state, max_shard_size=MAX_SHARD)
    finally:
        policy.lm.config = trained_config
    verify(draft, state, trust_remote_code)


def _write_adapter(
    draft: Path, policy: PackedCausalLM, state: Mapping[str, Tensor], base: str, section: ModelSection
) -> None:
    assert policy.adapters
    revision = section.revision if base == section.name_or_path else None  # not of weights that were drawn here
    written = adapters.save(policy.adapters, state, draft, str(shipped(base)), revision)
    _compare(draft, written, adapters.read(draft))


def write_merged(draft: Path, base: str, adapter: Path, section: ModelSection) -> None:
    """The model `base` with a saved adapter, added up in fp32 and rounded once, to the section's type."""
    plain = unpacked.load_original(section, base, dtype="float32")
    lm = adapters.merged(plain, str(adapter)).to(getattr(torch, section.dtype))
    lm.save_pretrained(draft, max_shard_size=MAX_SHARD)
    verify(draft, lm.state_dict(), section.trust_remote_code)


def accompany(draft: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """What goes with weights: the tokenizer with its template, or all of a processor, and the model card."""
    if wrong := processors.save_tokenizer(tokenizer, draft):
        raise IOFault(f"{draft}: the exported processor makes other {wrong} than the run's; check the disk and export again")
    (draft / "README.md").write_text(redact(card), encoding="utf-8")


def refuse_not_finite(state: Mapping[str, Tensor]) -> None:
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise NumericFault(f"{bad[0]}: the trained weights are not finite; lower train.learning_rate and start anew")


def verify(folder: Path, state: Mapping[str, Tensor], trust_remote_code: bool = False) -> None:
    """Load `folder` as a user would and compare every weight with `state`, bit by bit. Raises IOFault."""
    _compare(folder, state, unpacked.load_plain(str(folder), trust_remote_code).state_dict())


def _compare(folder: Path, state: Mapping[str, Tensor], reloaded: Mapping[str, Tensor]) -> None:
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

"""Log-probs of pairs under a model, by one call and without a run: for research, and to look at a model by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspref.config import ModelSection
from dspref.data.apart import read_apart
from dspref.data.batch import collate, computed_tokens
from dspref.data.truncate import TokenizedPair
from dspref.model import admission, alone, families, loading, weights
from dspref.model.logps import pair_logps
from dspref.model.packed import PackedCausalLM
from dspref.objectives.families import PairLogps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(name_or_path: str, dtype: str = "bfloat16", device: str = "cpu", **section: object) -> PackedCausalLM:
    """A pretrained causal LM by folder or hub id, ready to be run over packs, on a device.

    `section`: other keys of the YAML's `model` section. Raises ConfigError in one line where the model cannot be had, or
    cannot be packed.
    """
    asked = ModelSection.model_validate({"name_or_path": name_or_path, "dtype": dtype, **section})
    kernel = admission.check(asked, loading.load_config(asked), None, 0, torch.device(device).type)
    admission.check_weights(asked, loading.load_config(asked))
    weights.fetch(asked)
    return loading.load(asked, name_or_path, kernel, dtype, zero3=None).to(device).eval()


def read_as(model: PackedCausalLM, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which from now on reads pairs as the model does: an encoder-decoder model reads prompts apart."""
    if families.is_encoder_decoder(model.lm.config):
        read_apart(tokenizer, families.start_of_answers(model.lm.config))
    return tokenizer


@torch.no_grad()
def log_probs(model: PackedCausalLM, pairs: Sequence[TokenizedPair], tokens_per_pack: int = 16_384) -> PairLogps:
    """Log-probs of P pairs: sums over each answer's scored tokens in nats, fp32 [P], on the CPU. Those of an encoder-decoder
    model are of a tokenizer that was told of it (`read_as`).

    `tokens_per_pack`: tokens that are computed in one forward; a longer pair gets one of its own.
    """
    device, found = next(model.parameters()).device, []
    apart, shared = families.is_encoder_decoder(model.lm.config), model.kernel != alone.ALONE
    for ids in _packs(pairs, tokens_per_pack, shared, apart):
        batch = collate([pairs[k] for k in ids], ids, prefix_sharing=shared, encoder_decoder=apart).to(device)
        tokens, _ = model(batch, only_logps=True)
        found.append(pair_logps(tokens, batch).map(torch.Tensor.cpu))
    return PairLogps(**{field.name: _joined([getattr(one, field.name) for one in found]) for field in fields(PairLogps)})


def _packs(pairs: Sequence[TokenizedPair], tokens_per_pack: int, shared: bool, apart: bool) -> Iterator[list[int]]:
    """Pairs in their order, as many as fit."""
    lengths = np.array([[len(side) for side in pair[:3]] for pair in pairs], dtype=np.int64).reshape(-1, 3)
    pack: list[int] = []
    size = 0
    for k, cost in enumerate(computed_tokens(lengths, prefix_sharing=shared, encoder_decoder=apart).tolist()):
        if pack and size + cost > tokens_per_pack:
            yield pack
            pack, size = [], 0
        pack.append(k)
        size += cost
    yield pack


def _joined(parts: Sequence[torch.Tensor | None]) -> Any:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None

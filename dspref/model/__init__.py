"""A causal language model that is run over packed pairs, without padding.

`loading` has a model of transformers loaded, `packed` runs it over a `PackedBatch`, `unpacked` as its authors would.
`attention` has the kernels that keep the segments of a pack apart (`sdpa`: the one that is everywhere; `exchange`: of packs
that several ranks hold); `logps` the log-probabilities of scored tokens, without all logits in memory (`head_room`: how
many; `logits`: what is computed of some); `generation` answers to prompts, by either; `router` the load-balancing loss of
mixtures of experts, `expert_parallel` which of them ranks can share; `adapters` (with `adapter_files`) LoRA; `liger` its
kernels; `tiles` MLPs over few tokens at a time (`tiling`: how few), `host_inputs` what layers keep in host memory;
`families` encoder-decoder models and `vision` those that read images (by their `processors`), which are told of a pack
(`readers`: how each kind reads one); `alone` which models can be told of none, and read a sequence at a time (`one_by_one`:
how); `pieces` which of their tokens meet what; `by_hand` a model and its log-probs without a run. Before anything is
loaded, `admission` says which models can be run, `weights` which files a model is made of and `freezing` what of it stays
as it is (no torch), `digests` their sha256.

Enters: config, data, objectives.
Shows: adapters, admission, alone, attention, digests, exchange, expert_parallel, families, freezing, generation, head_room,
loading, logps, packed, pieces, processors, router, tiles, tiling, unpacked, vision, weights.
"""

from typing import TYPE_CHECKING

from dspref.lazily import lazily

if TYPE_CHECKING:
    from dspref.model.by_hand import load_model, log_probs, read_as
    from dspref.model.packed import PackedCausalLM

__all__ = ["PackedCausalLM", "load_model", "log_probs", "read_as"]
__getattr__ = lazily(
    __name__,
    PackedCausalLM="dspref.model.packed",
    **dict.fromkeys(("load_model", "log_probs", "read_as"), "dspref.model.by_hand"),
)

"""A causal language model that is run over packed pairs, without padding.

`packed` loads a model of transformers and runs it over a `PackedBatch`; `attention` has the kernels that keep the segments
of a pack apart; `logps` the log-probabilities of scored tokens, without all logits in memory; `router` the load-balancing
loss of mixtures of experts; `adapters` (with `adapter_files`) LoRA; `liger` its kernels. Before anything is loaded,
`admission` says which models can be packed, `weights` which files a model is made of (no torch), `digests` their sha256.

Enters: config, data, objectives.
Shows: adapters, admission, attention, digests, logps, packed, router, weights.
"""

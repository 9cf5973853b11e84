"""How much a run will write, estimated before anything is loaded: from headers of weight files, or the model's config."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.config import CheckpointSection, ModelSection, ReferenceSection, TrainSection, shipped
from dspref.errors import UserError
from dspref.model import freezing, weights

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# How families call the number of experts in a layer.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def of_run(
    model: ModelSection, train: TrainSection, rules: CheckpointSection, zero_stage: int, output_dir: Path, moving: int = 0
) -> int | None:
    """Bytes that a run is still to write; None where the model is not on this machine yet.

    Checkpoints (one more than are kept, as the oldest goes last), the export, and the weights of a random model. `moving`:
    see `per_weight_moving`.
    """
    weights = count_weights(model)
    if weights is None:
        return None
    lora, size = model.lora, BYTES[model.dtype]
    still = count_weights(model, model.freeze) or 0 if model.freeze else 0
    trained = weights - still if lora is None else _adapted(model, weights)
    whole = lora is None or lora.merge_on_export
    drawn = 4 * weights if model.init == "random" else 0
    saved = trained * per_weight(train.optim, model.dtype, zero_stage) + still * size + weights * moving
    return checkpoints_to_come(rules, train.asked_steps, output_dir) * saved + (weights if whole else trained) * size + drawn


def per_weight(optim: str, dtype: str, zero_stage: int) -> int:
    """Bytes that a checkpoint has for each trained weight: fp32 masters, Adam's two moments, and at the stages that do not
    shard the weights these too."""
    moments = 2 if optim == "adamw_8bit" else 8
    return 4 + moments + (BYTES[dtype] if zero_stage in (1, 2) else 0)


def per_weight_moving(reference: ReferenceSection, dtype: str) -> int:
    """Bytes that a checkpoint has for each weight of a reference that moves: TR-DPO's in fp32; BEMA's as it is, its mean in
    fp32, and the policy of type `dtype` as it began."""
    own = BYTES[reference.dtype or dtype]
    return {None: 0, "sync_ref_model": 4, "bema": own + 4 + BYTES[dtype]}[reference.moved_by]


def checkpoints_to_come(rules: CheckpointSection, steps: int | None, output_dir: Path) -> int:
    """How many more will lie side by side at most."""
    if rules.save_every is None:
        return 0
    saved = math.ceil(steps / rules.save_every) if steps else rules.keep_last + 1
    there = len(list(output_dir.glob("checkpoints/step-*"))) if rules.resume != "never" else 0
    return max(min(saved, rules.keep_last + 1) - there, 0)


def _adapted(model: ModelSection, weights: int) -> int:
    """Weights of a LoRA adapter on every linear layer: two thin matrices of rank r in place of a square one."""
    lora, text = model.lora, read_config(model)
    hidden = number_of(text, "hidden_size", "n_embd", default=weights)
    return round(weights * min(1.0, 2 * (lora.r if lora else 0) / hidden))


def model_folder(section: ModelSection) -> Path | None:
    """Where a model's files lie: its own folder, or the newest snapshot in the hub's cache."""
    folder = shipped(section.name_or_path)
    if os.path.isdir(folder):
        return folder
    snapshots = hub_cache() / f"models--{section.name_or_path.replace('/', '--')}" / "snapshots"
    found = [path.parent for path in snapshots.glob("*/config.json")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def count_weights(section: ModelSection, patterns: Sequence[str] | None = None) -> int | None:
    """Weights of a model, or those that `patterns` name (see `freezing.chosen`); None where neither its files nor its
    config are here."""
    folder = model_folder(section)
    if folder is None:
        return None
    try:
        there = any(os.path.lexists(folder / name) for name in (weights.WEIGHTS, weights.INDEX))
        tensors = in_files(section, folder) if there and section.init != "random" else imagined(read_config(section))
        return sum(math.prod(tensors[n]) for n in (tensors if patterns is None else freezing.chosen(tensors, patterns)))
    # Broken files are reported where they are read.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, UserError):
        return None


def in_files(section: ModelSection, folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors in the files of a model, by name. Raises OSError and UserError."""
    headers = [weights.header(path, section.name_or_path) for path in weights.files_of(folder)]
    return {name: shape for header in headers for name, (_, shape) in header.items()}


def read_config(section: ModelSection) -> dict[str, Any]:
    """A model's config.json, of several parts that of the text; {} where there is none that can be read."""
    folder = model_folder(section)
    try:
        content = reading.read_json(folder / weights.CONFIG, strict=False) if folder else {}
    except (OSError, ValueError):
        return {}
    content = content.get("text_config") or content if isinstance(content, dict) else {}
    return content if isinstance(content, dict) else {}


def imagined(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-like decoder with these settings, where no weights are at hand; biases are too few to count.
    Experts are given as one tensor of three dimensions, as transformers holds them."""
    config = dict(text)
    hidden, layers = number_of(config, "hidden_size", "n_embd"), number_of(config, "num_hidden_layers", "n_layer")
    vocabulary, heads = number_of(config, "vocab_size"), number_of(config, "num_attention_heads", "n_head", default=1)
    if not (hidden and layers and vocabulary):
        raise ValueError("no sizes")
    width = number_of(config, "head_dim", default=hidden // heads)
    keys = width * number_of(config, "num_key_value_heads", default=heads)
    inner = number_of(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    experts = number_of(config, *EXPERTS, default=1)
    gpt2 = "n_embd" in config
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if gpt2:
        found["transformer.wpe.weight"] = (number_of(config, "n_positions", default=1024), hidden)
    if not config.get("tie_word_embeddings", gpt2):
        found["lm_head.weight"] = (vocabulary, hidden)
    block = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * width, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, heads * width),
    }  # fmt: skip
    if str(config.get("model_type", "")).startswith(("qwen3", "olmo2", "gemma3")):
        block |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    if experts > 1:
        own = number_of(config, "moe_intermediate_size", default=inner)
        block |= {"mlp.gate": (experts, hidden), "mlp.experts.gate_up_proj": (experts, 2 * own, hidden)}
        block |= {"mlp.experts.down_proj": (experts, hidden, own)}
        if shared := number_of(config, "shared_expert_intermediate_size"):
            parts = (("gate_proj", (shared, hidden)), ("up_proj", (shared, hidden)), ("down_proj", (hidden, shared)))
            block |= {f"mlp.shared_expert.{name}": shape for name, shape in parts}
    else:
        block |= {"mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        block |= {} if gpt2 else {"mlp.gate_proj": (inner, hidden)}
    return found | {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()}


def number_of(text: dict[str, Any], *names: str, default: int = 0) -> int:
    """The first of these that a config has; of a value for each layer, the mean."""
    for name in names:
        value = text.get(name)
        if isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            value = round(sum(value) / len(value))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default

"""Tiny models with the same weights on every machine, for tests and for the golden fixtures.

The weights do not come from torch's random numbers: each parameter is drawn by numpy from a seed made of its
name and the model's seed. Two versions of torch or transformers, or two orders of initialisation, give
the same model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}


def tiny_config(model_type: str = "qwen2", vocab_size: int = 256, **overrides: Any) -> PretrainedConfig:
    """The config of a two-layer model without dropout.

    `overrides` win and use the Llama-style names, for gpt2 too. Tried with qwen2, qwen3, llama, mistral,
    gpt2 and qwen3_moe. No special token has an id unless overridden.
    """
    keys: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "gpt2":
        keys |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        keys |= {"num_key_value_heads": 2, "attention_dropout": 0.0}
    if model_type == "mistral":
        keys |= {"sliding_window": None}
    keys |= overrides
    if model_type == "gpt2":
        keys = {GPT2_NAMES.get(key, key): value for key, value in keys.items()}
    else:
        keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    if model_type == "qwen2":  # derives it, and has no such key
        keys.pop("head_dim")
    return AutoConfig.for_model(model_type, **keys)


def tiny_encoder_decoder(model_type: str, vocab_size: int = 256, **overrides: Any) -> PretrainedConfig:
    """The config of a two-layer encoder-decoder model without dropout. Tried with the T5 and the BART families."""
    keys: dict[str, Any] = {"vocab_size": vocab_size, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
    keys |= {"decoder_start_token_id": 0 if "t5" in model_type else 2, "bos_token_id": None if "t5" in model_type else 2}
    if "t5" in model_type:
        keys |= {"d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
        keys |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    else:
        rates = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
        keys |= dict.fromkeys(rates, 0.0) | {"max_position_embeddings": 64, "forced_eos_token_id": None}
        for side in ("encoder", "decoder"):
            keys |= {f"{side}_layers": 2, f"{side}_ffn_dim": 64, f"{side}_attention_heads": 4}
    return AutoConfig.for_model(model_type, **keys | overrides)


def tiny_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model on the CPU, in eval mode, filled by `seed`; torch's random state is left as it was."""
    encoded = getattr(config, "is_encoder_decoder", False)
    kind = AutoModelForSeq2SeqLM if encoded else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = kind.from_config(config, dtype=torch.float32)
    return filled(model, seed)


def filled(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model in eval mode, its parameters drawn by `seed`."""
    encoded = getattr(model.config, "is_encoder_decoder", False)
    seen: set[int] = set()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:  # tied: the alphabetically first name decides
            continue
        if encoded and not parameter.requires_grad:  # sinusoids, which no file holds
            continue
        seen.add(id(parameter))
        value = torch.from_numpy(_values(name, tuple(parameter.shape), seed))
        with torch.no_grad():
            parameter.copy_(value)
    return model.eval()


def save_tiny(path: str | Path, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Write `tiny_model(config, seed)` to the folder `path` as safetensors, and return it."""
    model = tiny_model(config, seed)
    model.save_pretrained(path)
    return model


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over every parameter's name and float32 bytes: says whether two models have the same weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 values of one parameter. A one-dimensional weight is a norm's and lies around 1."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    normal = np.random.default_rng([seed, *words]).standard_normal(shape)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return (1.0 + 0.1 * normal if is_norm else 0.05 * normal).astype(np.float32)


def save_tokenizer(path: str | Path) -> int:
    """Save a byte-level tokenizer with a ChatML template to `path`; its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def preference_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Standard and conversational rows of unequal lengths, the same every time."""
    draws = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(
            "".join(draws.choice(list("abcdefgh"), draws.integers(1, 6))) for _ in range(draws.integers(low, high))
        )

    rows: list[dict[str, Any]] = []
    for k in range(count):
        prompt, chosen, rejected = words(1, 9) + ":", words(1, 12), words(1, 12) + "!"
        if k % 3 == 0:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
        else:
            turn = [[{"role": "user", "content": prompt}]]
            turn += [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
            rows.append(dict(zip(("prompt", "chosen", "rejected"), turn, strict=True)))
    return rows


def rows_that_share(count: int, seed: int) -> list[dict[str, Any]]:
    """`preference_rows`, of which rows 1, 2 and 5 have one prompt and three answers between them."""
    rows = preference_rows(count, seed)
    one, two, five = rows[1], rows[2], rows[5]
    two |= {"prompt": one["prompt"], "chosen": one["chosen"]}
    five |= {"prompt": one["prompt"], "chosen": two["rejected"], "rejected": one["rejected"]}
    return rows


def rows_of_turns(count: int, seed: int) -> list[dict[str, Any]]:
    """`rows_that_share`, where three answers are conversations of their own and two of them are one and the same."""
    rows = rows_that_share(count, seed)
    turns = [{"role": "user", "content": "and then"}, {"role": "assistant", "content": "gh a bed"}]
    rows[2]["rejected"] = rows[5]["chosen"] = [*rows[2]["rejected"], *turns]
    rows[4]["chosen"] = [*rows[4]["chosen"], *turns]
    return rows


def write_one_step(folder: Path, data: dict[str, Any], train: dict[str, Any]) -> None:
    """`run.yaml` of one step over all rows, under a tokenizer, a policy and a different reference, and these beside it."""
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), num_hidden_layers=1)
    save_tiny(folder / "policy", config, seed=1)
    save_tiny(folder / "reference", config, seed=2)
    model = {"name_or_path": f"{folder}/policy", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"}
    values = {
        "model": model | {"gradient_checkpointing": False},
        "reference": {"mode": "stored", "name_or_path": f"{folder}/reference"},
        "data": {"shuffle": False, "tokens_per_pack": 200, **data},
        "train": {"max_steps": 1, "max_grad_norm": 0, **train},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run's YAML file beside its model, tokenizer and pairs: four steps of four pairs, ZeRO-3, a checkpoint every two."""
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), attention_dropout=0.1)
    save_tiny(folder / "model", config, seed=3)
    for name, count in (("pairs", 11), ("held_out", 5)):
        rows = preference_rows(count, seed=count)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model": {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"}
        | {"disable_dropout": False, "gradient_checkpointing": False},  # the random generators matter
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "eval": {"path": f"{folder}/held_out.jsonl"}}
        | {"tokens_per_pack": 200},
        "objective": {"name": "dpo", "rpo_alpha": 0.5},
        "train": {"pairs_per_step": 4, "max_steps": 4, "learning_rate": 3e-3, "eval_every": 2},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "checkpoint": {"save_every": 2, "keep_last": 9},
        "output_dir": f"{folder}/run",
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if name in values else section
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"

"""Write the quick start's data, tokenizer and model config, next to this file: `python launch/quickstart/generate.py`

The task is to write a word backwards. It suits a first run: a program can check every answer, a person can see at a
glance whether a model has learned it, and a model with random weights learns it in under a minute on a laptop.

    prompt    Write lamp backwards.
    chosen    pmal
    rejected  pmla                   a near miss: two letters swapped, one lost or doubled, or the word as it stands

`words.txt` holds about 1,500 English words, listed by hand for this project. Each becomes one pair. 200 words are held
out: no prompt that measures the model was seen in training. The same bytes are written each time, with nothing but
Python's standard library; the committed files are the output, and a test compares the two.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HELD_OUT = 200
SEED = 7

# One token for each piece of fixed text and for each letter: a word is spelled, never known as a whole.
SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PIECES = ("Write ", " backwards.", *"abcdefghijklmnopqrstuvwxyz")
TOKENS = {token: number for number, token in enumerate(SPECIAL + PIECES)}

# <|user|>Write lamp backwards.<|end|><|assistant|>pmal<|end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def answer(prompt: str) -> str:
    """The right answer to `Write <word> backwards.`"""
    return prompt.removeprefix("Write ").removesuffix(" backwards.")[::-1]


def near_misses(right: str) -> list[str]:
    """Plausible wrong answers: neighbours swapped, a letter lost or doubled, the word not reversed at all."""
    swapped = [right[:i] + right[i + 1] + right[i] + right[i + 2 :] for i in range(len(right) - 1)]
    lost = [right[:i] + right[i + 1 :] for i in range(len(right))]
    doubled = [right[:i] + right[i] + right[i:] for i in range(len(right))]
    return [wrong for wrong in (*swapped, *lost, *doubled, right[::-1]) if wrong != right]


def pairs() -> list[dict[str, Any]]:
    """One conversational preference pair per word, in an order that the seed fixes."""
    draw = random.Random(SEED)
    words = (HERE / "words.txt").read_text(encoding="utf-8").split()
    draw.shuffle(words)
    rows = []
    for word in words:
        prompt = f"Write {word} backwards."
        right = answer(prompt)
        wrong = draw.choice(near_misses(right))
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": wrong}],
            }
        )
    return rows


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json, the format of the `tokenizers` library."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": TOKENS[token], "content": token, **flags} for token in SPECIAL],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"Write | backwards\.|."},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<|unk|>"},
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def model_config() -> dict[str, Any]:
    """A Llama of a third of a million parameters."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": TOKENS["<|end|>"],
        "pad_token_id": TOKENS["<|pad|>"],
    }


def files() -> dict[str, str]:
    """Every generated file: path below this folder -> text."""
    rows = [json.dumps(row) + "\n" for row in pairs()]
    documents = {
        "tokenizer/tokenizer.json": tokenizer(),
        "tokenizer/tokenizer_config.json": tokenizer_config(),
        "model/config.json": model_config(),
    }
    texts = {path: json.dumps(document, indent=2) + "\n" for path, document in documents.items()}
    return {"train.jsonl": "".join(rows[HELD_OUT:]), "eval.jsonl": "".join(rows[:HELD_OUT])} | texts


def main() -> None:
    for path, text in files().items():
        target = HERE / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
        print(f"{target}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()

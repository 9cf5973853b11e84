"""Write the data, tokenizer and model config of the encoder-decoder example, next to this file:
`python launch/quickstart/spelling/generate.py`

The task is to say letters as words, as one does on a bad line: a translation, in which every answer can be checked.

    letters  qbma
    good     quebec bravo mike alfa
    bad      quebec mike bravo alfa      a near miss: two words swapped, one lost, or another letter's

200 of the rows are held out. The same bytes are written each time, with nothing but Python's standard library; the committed
files are the output, and a test compares the two.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAIRS, HELD_OUT = 3000, 200
SEED = 11

# The spelling alphabet of the International Telecommunication Union.
WORDS = (
    *("alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike"),
    *("november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee"),
    "zulu",
)
WORD_OF = {word[0]: word for word in WORDS}
LETTERS = "".join(WORD_OF)
SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 192}
# One token for each letter, and for each word with the space before it.
SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = ("Spell ", *WORD_OF, *WORDS, *(f" {word}" for word in WORDS))
TOKENS = {token: number for number, token in enumerate(SPECIAL + PIECES)}


def answer(letters: str) -> str:
    """The right answer."""
    return " ".join(WORD_OF[letter] for letter in letters)


def near_misses(letters: str) -> list[str]:
    """Plausible wrong answers: neighbours swapped, a letter lost, the next letter's word."""
    swapped = [letters[:i] + letters[i + 1] + letters[i] + letters[i + 2 :] for i in range(len(letters) - 1)]
    lost = [letters[:i] + letters[i + 1 :] for i in range(len(letters))]
    others = [letters[:i] + chr((ord(letter) - 96) % 26 + 97) + letters[i + 1 :] for i, letter in enumerate(letters)]
    return [answer(wrong) for wrong in (*swapped, *lost, *others) if wrong != letters]


def pairs() -> list[dict[str, str]]:
    """One pair for each of some strings of 3 to 5 letters, all different, in an order that the seed fixes."""
    draw, seen = random.Random(SEED), dict[str, None]()
    while len(seen) < PAIRS:
        seen["".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 5)))] = None
    return [{"letters": letters, "good": answer(letters), "bad": draw.choice(near_misses(letters))} for letters in seen]


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json: it puts </s> behind every text, as those of such models do."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = "|".join(WORDS)
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": TOKENS[token], "content": token, **flags} for token in SPECIAL],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": rf"^Spell | ?\b(?:{words})\b|."},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [TOKENS["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<unk>"},
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }


def model_config() -> dict[str, Any]:
    """An M2M100, which NLLB's models are, of half a million parameters."""
    layers = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIZES.items()}
    return {
        "architectures": ["M2M100ForConditionalGeneration"],
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "vocab_size": len(TOKENS),
        "d_model": 96,
        **layers,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "max_position_embeddings": 64,
        "scale_embedding": True,
        "init_std": 0.05,
        "bos_token_id": TOKENS["</s>"],
        "decoder_start_token_id": TOKENS["</s>"],
        "eos_token_id": TOKENS["</s>"],
        "pad_token_id": TOKENS["<pad>"],
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

"""Write the data, processor and model config of the picture example, next to this file: `python launch/pictures/generate.py`

The task is to say what a picture shows: a shape in a colour, somewhere on a dark ground. A program can check every answer.

    images    images/017.png
    prompt    What is this?
    chosen    a red cross
    rejected  a blue cross                   another colour, or another shape

Pictures of the held-out rows are seen by no training row. The same bytes are written each time, with nothing but Python's
standard library; the committed files are the output, and a test compares the two.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURES, HELD_OUT = 300, 60
SEED = 7
SIDE, PATCH = 32, 8

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 240), "white": (240, 240, 240)}
SHAPES = ("square", "cross", "bar")
SPECIAL = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
PIECES = ("What is this?", "a ", *(f"{colour} " for colour in COLOURS), *SHAPES)
TOKENS = {token: number for number, token in enumerate(SPECIAL + PIECES)}

# <|user|><image>What is this?<|end|><|assistant|>a red cross<|end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def covers(shape: str, across: int, down: int, size: int) -> bool:
    """Whether a shape of a size covers a place, counted from its middle."""
    if max(abs(across), abs(down)) > size:
        return False
    thin = max(size // 3, 1)
    if shape == "cross":
        return min(abs(across), abs(down)) <= thin
    return shape == "square" or abs(down) <= thin


def png(shape: str, colour: str, draw: random.Random) -> bytes:
    """A picture; its pixels are stored as they are, so that every zlib writes the same bytes."""
    size = draw.randint(8, 10)
    left, top = (draw.randint(size, SIDE - 1 - size) for _ in range(2))
    ground = bytes(draw.randint(0, 40) for _ in range(3))
    inside = bytes(channel - draw.randint(0, 30) for channel in COLOURS[colour])
    rows = [bytes([0, *(covers(shape, x - left, y - top, size) for x in range(SIDE))]) for y in range(SIDE)]
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 3, 0, 0, 0)
    parts = {b"IHDR": header, b"PLTE": ground + inside, b"IDAT": zlib.compress(b"".join(rows), 0), b"IEND": b""}
    chunks = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pictures() -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """(path -> picture, a row of each), in an order that the seed fixes."""
    draw = random.Random(SEED)
    files, rows = {}, []
    for number in range(PICTURES):
        colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
        path = f"images/{number:03}.png"
        files[path] = png(shape, colour, draw)
        if draw.random() < 0.5:
            wrong = f"a {draw.choice([other for other in COLOURS if other != colour])} {shape}"
        else:
            wrong = f"a {colour} {draw.choice([other for other in SHAPES if other != shape])}"
        rows.append({"images": [path], "prompt": "What is this?", "chosen": f"a {colour} {shape}", "rejected": wrong})
    return files, rows


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json, the format of the `tokenizers` library."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = "|".join(piece.replace("?", r"\?") for piece in PIECES)
    return {
        "version": "1.0",
        "added_tokens": [{"id": TOKENS[token], "content": token, **flags} for token in SPECIAL],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": f"{words}|."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<|unk|>"},
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "image_token": "<image>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def processor_config() -> dict[str, Any]:
    side = {"height": SIDE, "width": SIDE}
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": side,
            "size": side,
            "do_center_crop": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": False,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1 / 255,
            "resample": 3,
        },
    }


def model_config() -> dict[str, Any]:
    """A LLaVA of a quarter of a million parameters."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": TOKENS["<image>"],
        "image_seq_length": (SIDE // PATCH) ** 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": 64,
            **common,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(TOKENS),
            "hidden_size": 64,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": TOKENS["<|end|>"],
            "pad_token_id": TOKENS["<|pad|>"],
            **common,
        },
    }


def files() -> dict[str, bytes]:
    """Every generated file: path below this folder -> bytes."""
    images, rows = pictures()
    lines = [json.dumps(row) + "\n" for row in rows]
    documents = {
        "model/tokenizer.json": tokenizer(),
        "model/tokenizer_config.json": tokenizer_config(),
        "model/processor_config.json": processor_config(),
        "model/config.json": model_config(),
    }
    texts = {"train.jsonl": "".join(lines[HELD_OUT:]), "eval.jsonl": "".join(lines[:HELD_OUT])}
    texts |= {path: json.dumps(document, indent=2) + "\n" for path, document in documents.items()}
    return {**images, **{path: text.encode() for path, text in texts.items()}}


def main() -> None:
    for path, content in files().items():
        target = HERE / path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    print(f"{HERE}: {len(files())} files")


if __name__ == "__main__":
    main()

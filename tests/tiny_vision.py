"""Tiny vision-language models with the same weights on every machine, and images for them by the processors of their
families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import without_videos
from tiny import filled, save_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig

VOCABULARY, IMAGE, VIDEO = 256, 250, 251  # ids of tokens that stand for images and videos


def tiny_vision_config(model_type: str, vocab_size: int = VOCABULARY, image_token: int = IMAGE) -> PretrainedConfig:
    """The config of a model with two layers in its tower and three in its language model, without dropout. Tried with the
    families of `dspref.model.vision`."""
    text: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attention_dropout": 0.0,
    }  # fmt: skip
    tower: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "attention_dropout": 0.0,
    }  # fmt: skip
    more: dict[str, Any] = {"image_token_id": image_token, "tie_word_embeddings": False}
    if model_type.startswith("qwen"):
        return _qwen(model_type, text, more)
    if model_type in ("idefics3", "smolvlm"):
        tower |= {"image_size": 32, "patch_size": 8}
        more |= {"scale_factor": 2, "pad_token_id": 0}
        return AutoConfig.for_model(
            model_type, text_config={"model_type": "llama", **text, "pad_token_id": 0}, vision_config=tower, **more
        )
    if model_type == "internvl":
        tower |= {"model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]}
        text |= {"model_type": "qwen2"}
    else:
        tower |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32}
        more |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        text |= {"model_type": "llama"}
    if model_type == "llava_next":
        more |= {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=tower, **more)


def _qwen(model_type: str, text: dict[str, Any], more: dict[str, Any]) -> PretrainedConfig:
    tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "in_channels": 3, "spatial_merge_size": 2}
    if model_type == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14}
    elif model_type == "qwen2_5_vl":
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 14}
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 16}
        tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text = {**text, "head_dim": 8}
    sections = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    more = {**more, "video_token_id": VIDEO, "vision_start_token_id": 252, "vision_end_token_id": 253}
    return AutoConfig.for_model(model_type, text_config={**text, "rope_parameters": sections}, vision_config=tower, **more)


def tiny_vision_model(config: PretrainedConfig, seed: int) -> Any:
    """A float32 model on the CPU, in eval mode, filled by `seed`; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return filled(model, seed)


def image_processor(model_type: str) -> Any:
    """The family's own image processor, for images of the tiny models' sizes."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    square, pixels = {"height": 28, "width": 28}, {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    if model_type.startswith("qwen"):
        return Qwen2VLImageProcessorPil(size=pixels, patch_size=16 if model_type == "qwen3_vl" else 14)
    if model_type == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
    if model_type == "llava_next":
        grid = [[28, 56], [56, 28], [56, 56]]
        return LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=grid)
    if model_type == "internvl":
        return GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    return {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[model_type](**tiles)


# The tokens that processors write for an image, and what a prompt has for one before.
WORDS: dict[str, tuple[list[str], str]] = {
    "qwen": (
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "llava": (["<image>"], "<image>"),
    "idefics3": (["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], "<image>"),
    "smolvlm": (["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], "<image>"),
    "internvl": (["<IMG_CONTEXT>", "<img>", "</img>", "<video>"], "<IMG_CONTEXT>"),
}


# What processors are called.
NAMES = {
    "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "smolvlm": "SmolVLM", "internvl": "InternVL",
    "llava": "Llava", "llava_next": "LlavaNext", "idefics3": "Idefics3",
}  # fmt: skip


def processor(model_type: str, folder: str | Path, videos: bool = False) -> tuple[Any, str]:
    """The family's own processor with a tiny tokenizer, made in `folder`, and what stands for an image in its prompts.

    Without its part for videos, which most families have and which needs torchvision, unless `videos`: then as it is."""
    written, stands_for_image = next(words for start, words in WORDS.items() if model_type.startswith(start))
    save_tokenizer(folder)
    more: dict[str, Any] = {}
    named: dict[str, Any] = {}
    if model_type == "internvl":
        more = {"image_seq_length": 4}
        names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
        named = {"extra_special_tokens": dict(zip(names, written))}
    elif model_type in ("idefics3", "smolvlm"):
        more = {"image_seq_len": 4}
    elif model_type.startswith("llava"):
        more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": written})
    own = image_processor(model_type)
    name = NAMES[model_type]
    without = getattr(without_videos, f"{name}Images", None)
    if without and not videos:
        return without(own, tokenizer, **more), stands_for_image
    if without:
        of_videos = {"Qwen2_5_VL": "Qwen2VL"}.get(name, name)
        more["video_processor"] = getattr(transformers, f"{of_videos}VideoProcessor")()
    return getattr(transformers, f"{name}Processor")(own, tokenizer, **more), stands_for_image


def image(height: int, width: int, seed: int) -> np.ndarray:
    """Noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_vision(folder: Path, model_type: str, seed: int, videos: bool = False, **settings: Any) -> Any:
    """Write a tiny model with its processor to a folder, whose template reads contents in parts; the model. Some families'
    processors have code of their own in the folder, unless `videos`, which needs torchvision."""
    words, stands_for_image = processor(model_type, folder, videos)
    words.chat_template = words.tokenizer.chat_template = TEMPLATE.replace("IMAGE", stands_for_image)
    if isinstance(words, without_videos.WithoutVideos):
        type(words).register_for_auto_class()
    words.save_pretrained(folder)
    token = words.tokenizer.convert_tokens_to_ids(words.image_token)
    size = -(-len(words.tokenizer) // 8) * 8
    config = tiny_vision_config(model_type, size, token)
    for name, value in settings.items():
        setattr(config, name, value)
    model = tiny_vision_model(config, seed)
    model.save_pretrained(folder)
    return model


def talkative(folder: Path, seed: int = 4) -> None:
    """The model of a folder says many things, all in printable ASCII, and other things about other images."""
    lm: Any = AutoModelForImageTextToText.from_pretrained(folder)
    words: Any = AutoTokenizer.from_pretrained(folder)
    said = [words.decode([i]) for i in range(lm.get_output_embeddings().weight.shape[0])]
    mute = torch.tensor([not (text.isascii() and text.isprintable() and len(text) == 1) for text in said])
    mute[words.eos_token_id] = False
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and "lm_head" not in name:
                parameter *= 3
        head = lm.get_output_embeddings().weight
        head += 0.02 * torch.randn(head.shape, generator=generator)
        head[mute] *= 0.01
    lm.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("e")]
    lm.save_pretrained(folder)


def image_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows with one image, several, and none, in all ways to say so; the images are written to the folder."""
    import PIL.Image

    rows: list[dict[str, Any]] = []
    for k in range(count):
        names = [f"{k}-{j}.png" for j in range((1, 2, 0)[k % 3])]
        for j, name in enumerate(names):
            PIL.Image.fromarray(image(40 + 8 * j, 60, seed=10 * k + j)).save(folder / name)
        question = f"what is {'abcdefgh'[k % 8] * (1 + k % 3)}?"
        answers = {"chosen": f"it is {k * 7}", "rejected": f"no, {'xyz'[k % 3] * 4}"}
        parts = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": question}]
        in_parts: Any = [{"role": "user", "content": parts}]
        if k % 2:
            rows.append({"prompt": in_parts, "images": None, **answers})
        else:
            rows.append({"prompt": question, "images": names, **answers})
    return rows


def trl_vision_rows(folder: Path, count: int, in_parts: bool) -> list[dict[str, Any]]:
    """Conversations with one image, two, and none, as TRL reads them too; the images are written to the folder, and stand
    before the question, or, in parts, behind it."""
    import PIL.Image

    rows: list[dict[str, Any]] = []
    for k in range(count):
        names = [f"{k}-{j}.png" for j in range((1, 2, 0)[k % 3])]
        for j, name in enumerate(names):
            PIL.Image.fromarray(image(40 + 8 * j, 60 - 24 * (k % 2), seed=100 + 10 * k + j)).save(folder / name)
        content: Any = f"what is {'abcdefgh'[k % 8] * (1 + k % 3)}?"
        if in_parts:
            content = [{"type": "text", "text": content}, *({"type": "image"} for _ in names)]
        answers = {"chosen": f"it is {k * 7}", "rejected": f"no, {'xyz'[k % 3] * (1 + k)}"}
        said = {side: [{"role": "assistant", "content": answer}] for side, answer in answers.items()}
        rows.append({"prompt": [{"role": "user", "content": content}], "images": names, **said})
    return rows

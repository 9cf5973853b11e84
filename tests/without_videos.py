"""Processors of families that read videos too, without their part for these, which needs torchvision.

A tiny model's folder has this file as its code: `model.trust_remote_code` loads it wherever the tests run.
"""

from __future__ import annotations

from transformers import InternVLProcessor, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor, SmolVLMProcessor


class WithoutVideos:
    """What the processors here have instead of their part for videos."""

    video_processor = None

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


class Qwen2VLImages(WithoutVideos, Qwen2VLProcessor):
    """That of Qwen2-VL."""


class Qwen2_5_VLImages(WithoutVideos, Qwen2_5_VLProcessor):
    """That of Qwen2.5-VL."""


class Qwen3VLImages(WithoutVideos, Qwen3VLProcessor):
    """That of Qwen3-VL."""


class SmolVLMImages(WithoutVideos, SmolVLMProcessor):
    """That of SmolVLM, which needs num2words."""

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None, **more):
        super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template, **more)


class InternVLImages(WithoutVideos, InternVLProcessor):
    """That of InternVL."""

"""A plain model that answers conversations, token by token, by its own generation config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dspref.errors import ConfigError
from dspref.model import admission, generation, unpacked, vision
from dspref.model.generation import Asked
from dspref.terminal import first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, str]]


@dataclass
class Speaker:
    """A model and its tokenizer. After an answer, `ending` says how that ended, where not by itself."""

    lm: Any
    tokenizer: PreTrainedTokenizerBase
    how: GenerationConfig
    ending: str = ""

    @classmethod
    def load(cls, folder: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool, asked: Asked) -> Speaker:
        """Of a folder of weights or of an adapter, or a hub id; on the GPU where there is one."""
        lm = unpacked.load_named(folder, trust_remote_code).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if vision.is_vision(lm.config):
            raise ConfigError(f"{folder}: is a vision-language model, and chat shows no images; ask it by transformers")
        return cls(lm, tokenizer, generation.config_of(lm, tokenizer, asked))

    @property
    def converses(self) -> bool:
        """Whether there is a chat template; without one, texts are continued."""
        return self.tokenizer.chat_template is not None

    def in_words(self) -> str:
        if not self.how.do_sample:
            drawn = "greedy"
        else:
            drawn = f"temperature {self.how.temperature or 1:g}, top_p {self.how.top_p or 1:g}"
        return f"{drawn}, up to {self.how.max_new_tokens} tokens"

    def answer(self, messages: Messages) -> Iterator[str]:
        """The answer to a conversation, in pieces of whole characters. Raises ConfigError where its template refuses it."""
        self.ending = ""
        ids = self.ids_of(messages)
        if not ids:
            raise ConfigError("the prompt has no token under this tokenizer; write some text")
        room = self._positions() - len(ids)
        if room < 1:
            self.ending = f"no room: the conversation has {len(ids)} tokens, the model {self._positions()} positions"
            return
        how = copy.deepcopy(self.how)
        how.max_new_tokens = most = min(how.max_new_tokens or generation.MOST_TOKENS, room)
        ends = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
        said: list[int] = []
        told = 0
        for token in generation.stream(self.lm, ids, how):
            said.append(token)
            text = self._text(said)
            if not text.endswith("\ufffd"):  # the first bytes of a character
                yield text[told:]
                told = len(text)
        yield self._text(said)[told:]
        if len(said) >= most and said[-1] not in ends:
            self.ending = f"cut at {most} tokens"

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def ids_of(self, messages: Messages) -> list[int]:
        if not self.converses:
            return self.tokenizer(messages[-1]["content"])["input_ids"]  # type: ignore[return-value]
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of Jinja, or raised by the template
            raise ConfigError(f"the chat template refuses this conversation: {first_line(error)}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _positions(self) -> int:
        return admission.positions_of(self.lm.config) or 2**31

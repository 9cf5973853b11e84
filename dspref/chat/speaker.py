"""A plain model that answers conversations, token by token, by its own generation config."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspref.data.image_files import Shown, look_at
from dspref.data.image_rows import NO_IMAGES, placed
from dspref.data.image_store import decoded
from dspref.data.manners import rendered
from dspref.data.sight import load_processor, sight_of
from dspref.errors import ConfigError
from dspref.model import admission, generation, processors, unpacked, vision
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
    def load(
        cls, folder: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool, asked: Asked, words: str = ""
    ) -> Speaker:
        """Of a folder of weights or of an adapter, or a hub id; on the GPU where there is one. `words`: where the tokenizer
        lies, and the processor of a model that reads images; default: there too. Raises ConfigError."""
        lm = unpacked.load_named(folder, trust_remote_code).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if vision.is_vision(lm.config):
            try:
                processor = load_processor(words or folder, None, trust_remote_code)
                tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
                processors.teach(tokenizer, processor, lm, lm.dtype)
                if (sight := sight_of(tokenizer)) is not None:
                    processors.try_on(lm, sight)
            except ConfigError as error:
                raise ConfigError(f"{folder}: {str(error).removeprefix('model.name_or_path: ')}") from None
        return cls(lm, tokenizer, generation.config_of(lm, tokenizer, asked))

    @property
    def sees(self) -> bool:
        """Whether it is shown images, which belong to messages."""
        return self.converses and sight_of(self.tokenizer) is not None

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

    def answer(self, messages: Messages, images: Sequence[Any] = ()) -> Iterator[str]:
        """The answer to a conversation, in pieces of whole characters. Images stand in its messages (`image_rows`), or
        beside it, as in a row; their paths begin in the working directory.

        Raises ConfigError where its template refuses it, and RowError for images that cannot be read, or not by the model.
        """
        self.ending = ""
        ids, given = self.read(messages, images)
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
        for token in generation.stream(self.lm, ids, how, given):
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

    def read(self, messages: Messages, images: Sequence[Any] = ()) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The tokens of a prompt, and what the model reads beside them. Raises as `answer`."""
        sight = sight_of(self.tokenizer)
        if sight is None:
            if images:
                raise NO_IMAGES
            return self.ids_of(messages), {}
        asked, names = placed(messages if self.converses else messages[-1]["content"], (), images)
        shown = Shown(look_at(names, Path()))
        turns: Any = asked if self.converses else messages
        ids, _ = sight.expanded(np.asarray(self.ids_of(turns), dtype=np.int32), shown.pictures)
        return ids.tolist(), sight.given(ids, decoded(shown))

    def ids_of(self, messages: Messages) -> list[int]:
        """The tokens of a prompt, with one for each image."""
        if not self.converses:
            return self.tokenizer(messages[-1]["content"])["input_ids"]  # type: ignore[return-value]
        try:
            text = rendered(self.tokenizer, messages, add_generation_prompt=True)
        except Exception as error:  # of Jinja, or raised by the template
            raise ConfigError(f"the chat template refuses this conversation: {first_line(error)}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _positions(self) -> int:
        return admission.positions_of(self.lm.config) or 2**31

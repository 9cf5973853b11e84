"""A plain model that answers conversations, token by token, by its own generation config."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dspref.errors import ConfigError
from dspref.model import unpacked, weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of an answer where neither the caller nor the model says how many.
MOST_TOKENS = 512
Messages = list[dict[str, str]]


class Asked(NamedTuple):
    """How answers are drawn; what is None is as the model's generation config has it."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    greedy: bool = False


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
        return cls(lm, tokenizer, generation(lm, tokenizer, asked))

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
            self.ending = f"no room: the conversation has {len(ids)} tokens, the model {self._positions()} positions; /reset"
            return
        how = copy.deepcopy(self.how)
        how.max_new_tokens = most = min(how.max_new_tokens or MOST_TOKENS, room)
        ends = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
        said: list[int] = []
        told = 0
        for token in stream(self.lm, ids, how):
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
            raise ConfigError(f"the chat template refuses this conversation: {weights.one_line(error)}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _positions(self) -> int:
        return getattr(self.lm.config.get_text_config(), "max_position_embeddings", None) or 2**31


def generation(lm: Any, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> GenerationConfig:
    """The model's own generation config with what is asked for; it stops at the tokenizer's end token too."""
    how: Any = copy.deepcopy(lm.generation_config)
    own = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
    ends = list(dict.fromkeys(token for token in (*own, tokenizer.eos_token_id) if token is not None))
    how.eos_token_id = ends or None
    how.pad_token_id = how.pad_token_id if how.pad_token_id is not None else next(iter(ends), 0)
    how.max_new_tokens, how.max_length = asked.max_tokens or how.max_new_tokens or MOST_TOKENS, None
    how.num_beams = 1  # several cannot be shown as they grow
    if asked.greedy or asked.temperature == 0:
        how.do_sample, how.temperature, how.top_p, how.top_k = False, None, None, None
    elif asked.temperature is not None or asked.top_p is not None:
        how.do_sample = True
        how.temperature = asked.temperature if asked.temperature is not None else how.temperature
        how.top_p = asked.top_p if asked.top_p is not None else how.top_p
    return how


class _Tokens(BaseStreamer):
    """Hands on each new token; what comes first is the prompt."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self._queue, self._begun = queue, False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._queue.put(int(value.reshape(-1)[0]))
        self._begun = True

    def end(self) -> None:
        pass


def stream(lm: Any, ids: Sequence[int], how: GenerationConfig) -> Iterator[int]:
    """The tokens of an answer as they are made, in a thread of its own, which ends when this is closed."""
    queue: SimpleQueue[Any] = SimpleQueue()
    stopped = threading.Event()
    prompt = torch.tensor([list(ids)], device=lm.device)

    def make() -> None:
        try:
            stopping: Any = StoppingCriteriaList([lambda found, scores, **_: torch.full((1,), stopped.is_set())])
            with torch.no_grad():
                lm.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=how, streamer=_Tokens(queue),
                    stopping_criteria=stopping,
                )  # fmt: skip
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = threading.Thread(target=make, name="answer", daemon=True)
    thread.start()
    try:
        while (found := queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()
        thread.join()

"""One message, however it was written, as the dictionary that a chat template reads.

Understood beside `{"role": ..., "content": ...}`: ShareGPT's `from` and `value`, content in text parts, arguments of tool
calls as JSON text, and OpenAI's older `function_call`, which is a tool call to every later step. Which roles there may be,
and in which order, is for the template to judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dspref.data.image_rows import PARTS as IMAGE_PARTS
from dspref.data.image_rows import mark_of
from dspref.data.rows import (
    CONVERSATIONS,
    SYSTEM,
    Message,
    RowError,
    Text,
    is_message,
    kind_of,
    one_system,
    parse_json,
    squeezed,
    what_is,
)

# Who speaks, by the names of other formats, in small letters: what such a name means to no template, or to few.
ALIASES = {
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "chatbot", "model", "llm"), "assistant"),
    **dict.fromkeys(("human", "prompter"), "user"),
}
# Roles that templates know, which some data sets write in capitals; any other is as it stands.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation")
# Those whose messages say what a tool gave back.
RESULTS = ("tool", "function", "ipython", "environment", "observation")
# More of ShareGPT's.
SPEAKERS = {
    **ALIASES,
    **dict.fromkeys(("bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
# Words and marks of who speaks, in a transcript.
_MARKS = ("q", "a", "h", "s", "sys", "inst", "im", "start", "end", "header", "id", "eot", "turn", "of", "text", "bos", "eos")
SPEAKING = frozenset([*SPEAKERS, *ROLES, *_MARKS])
ROLE = re.compile(r"\w[\w-]*")
PART = re.compile(r"(input_|output_)?(text|image|audio|video|file|document|refusal)(_url)?")
# Keys of a message that hold text of the model's beside its content, by the names that templates read.
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
WRITE_MESSAGE = 'write {"role": ..., "content": ...}'
WRITE_OBJECT = "write the arguments as a JSON object"
WRITE_CALL = 'write {"name": ..., "arguments": {...}}'


def messages_of(value: Any, field: str) -> list[Message]:
    """The messages of a list, of a single message, or of an object of lists, as some data sets store them. Keys of a message
    that are null are left out. Raises RowError."""
    items = _apart(value) if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise RowError(field, f"{what_is(value)}, not a list of messages", WRITE_MESSAGE)
    if not items:
        raise RowError(field, "empty message list")
    return [_message(item, f"{field}[{index}]") for index, item in enumerate(items)]


def unwrapped(value: Any) -> Any:
    """The conversation in an object that holds one, such as `{"messages": [...]}`, behind the system message that lies
    beside it there; anything else as it is. Raises RowError for one that has no place."""
    if not isinstance(value, dict) or is_message(value):
        return value
    inner = [value[name] for name in CONVERSATIONS if isinstance(value.get(name), list)]
    if len(inner) != 1:
        return value
    system = system_text(one_system({name: value.get(name) for name in SYSTEM}))
    return _behind_system(system, inner[0]) if system else inner[0]


def system_text(value: Any) -> str:
    """The text of a system message that is a column or a key, '' for none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("system", f"{what_is(value)}, not text", "write the text of the system message")
    return value if value.strip() else ""


def _behind_system(system: str, items: list[Any]) -> list[Any]:
    messages = messages_of(items, "messages")
    if messages[0]["role"] == "system":
        if squeezed(messages[0].get("content")) != squeezed(system):
            raise RowError("system", "the conversation has another system message", "keep one of them")
        return items
    if all(message["role"] != "user" for message in messages):
        raise RowError("system", "lies beside an answer alone", "write it before the prompt, or in a column of its own")
    return [{"role": "system", "content": system}, *messages]


def _apart(value: dict[str, Any]) -> list[Any]:
    """`{"role": [...], "content": [...]}`, or one message, as a list of messages."""
    lengths = {len(item) if isinstance(item, list) else -1 for item in value.values()}
    roles = value.get("role", value.get("from"))
    if not isinstance(roles, list) or len(lengths) != 1:
        return [value]
    return [dict(zip(value, items)) for items in zip(*value.values())]


def answer_of(value: Any, field: str, behind: Any) -> Text:
    """An answer: text, or messages. A text behind a prompt of messages is what the assistant says."""
    if kind_of(value) == "other":
        raise RowError(field, "null" if value is None else f"{what_is(value)}, not text or a message list")
    if not isinstance(value, str):
        return messages_of(value, field)
    return [{"role": "assistant", "content": value}] if isinstance(behind, list) else value


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(place, f"{what_is(item)}, not a message", WRITE_MESSAGE)
    message = {key: value for key, value in item.items() if value is not None or key == "content"}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, place)
    if message.get("role") is None:
        raise RowError(f"{place}.role", "missing", "say who speaks: system, user, assistant, tool, ...")
    if not isinstance(message["role"], str) or not ROLE.fullmatch(message["role"]):
        raise RowError(f"{place}.role", f"unknown role {message['role']!r}", "write one word, such as user or assistant")
    message["role"] = _role(message["role"], ALIASES)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{place}.tool_calls")
    return _with_text(_with_tool_call(message, f"{place}.function_call"), place)


def _role(name: str, aliases: Mapping[str, str]) -> str:
    """The role that a name stands for, in whatever case it is written."""
    small = name.lower()
    return aliases.get(small, small if small in ROLES else name)


def _from_sharegpt(message: Message, place: str) -> Message:
    """`from` and `value` as role and content; a function call as the tool call that it is."""
    speaker = message["from"]
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "content")}
    content = message.get("value", message.get("content"))
    role = _role(speaker, SPEAKERS) if isinstance(speaker, str) else speaker
    if speaker != "function_call":
        return {"role": role} | ({"content": content} if "value" in message or "content" in message else {}) | rest
    calls = parse_json(content, f"{place}.value", WRITE_OBJECT) if isinstance(content, str) else content
    calls = calls if isinstance(calls, list) else [calls]
    wrapped = [{"type": "function", "function": call} if _is_bare_call(call) else call for call in calls]
    return rest | {"role": role, "content": "", "tool_calls": wrapped}


def _is_bare_call(call: Any) -> bool:
    return isinstance(call, dict) and "name" in call and "function" not in call


def _with_text(message: Message, place: str) -> Message:
    """The message with its content as text; only a message that calls tools may have none."""
    content = message.get("content")
    if isinstance(content, list | dict):
        _refuse_result(message, content, f"{place}.content")
        message["content"] = _text_of_parts(content, f"{place}.content")
    elif content is None and not message.get("tool_calls"):
        reason = "null without tool_calls" if "content" in message else "missing"
        raise RowError(f"{place}.content", reason, "write the text of the message")
    elif content is not None and not isinstance(content, str):
        raise RowError(f"{place}.content", f"{what_is(content)}, not text", "write the message's text")
    return message


def _refuse_result(message: Message, content: Any, place: str) -> None:
    """Raise RowError for what a tool gave back as it is: an object, or a list of values that are no content parts."""
    parts = [content] if isinstance(content, dict) else content
    if message["role"] in RESULTS and not all(map(_is_part, parts)):
        what = "an object" if isinstance(content, dict) else "a list"
        raise RowError(place, f"{what}, not text", "write what the tool gave back as text, by json.dumps")


def _is_part(part: Any) -> bool:
    """Whether something is meant as a part of a message's content, of whatever kind."""
    kind = part.get("type", "text" if isinstance(part.get("text"), str) else None) if isinstance(part, dict) else None
    return isinstance(kind, str) and bool(PART.fullmatch(kind))


def _text_of_parts(content: Any, place: str) -> str:
    """The texts of content parts, one behind the other, as the templates that take parts have them; an image is a mark."""
    parts = [content] if isinstance(content, dict) else content
    if parts and not any(isinstance(part, dict) for part in parts):
        raise RowError(place, f"{what_is(content)}, not text", "write the message's text")
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else what_is(part)
        if isinstance(part, dict) and kind in IMAGE_PARTS:
            texts.append(mark_of(part, f"{place}[{number}]"))
            continue
        if not isinstance(part, dict) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            at = f"{place}[{number}]" if isinstance(content, list) else place
            raise RowError(
                at, f"{kind!r} is no text part, and no image; only these are read", 'write {"type": "text", "text": ...}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _with_tool_call(message: Message, place: str) -> Message:
    """The message with its `function_call`, which OpenAI wrote before `tool_calls` and no template prints, as one of
    these. Raises RowError where both are there and say different things."""
    if "function_call" not in message:
        return message
    message = dict(message)
    call = message.pop("function_call")
    if isinstance(call, str) and call.strip():
        call = parse_json(call, place, WRITE_CALL)
    if not call:
        return message  # empty, as a column of Arrow or CSV may have it
    call = _call(call, place)
    if not isinstance(call.get("name"), str) or not call["name"]:
        raise RowError(f"{place}.name", "missing", WRITE_CALL)
    own = message.get("tool_calls")
    if own and [_plain(other) for other in own] != [_plain(call)]:
        raise RowError(place, "the message has tool_calls that say something else", "keep one of the two")
    return message if own else message | {"tool_calls": [{"type": "function", "function": call}]}


def _plain(call: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a call says: the function's name, and its arguments."""
    function = call.get("function") or call
    return function.get("name"), function.get("arguments") or {}


def _calls(value: Any, place: str) -> Any:
    """Tool calls with arguments that are objects: OpenAI writes them as JSON text, and a template that prints them as JSON
    would quote that once more."""
    if isinstance(value, str):
        value = parse_json(value, place, "write a JSON list of tool calls")
    if not isinstance(value, list):
        raise RowError(place, f"{what_is(value)}, not a list of tool calls", "write a list of tool calls")
    return [_call(call, f"{place}[{number}]") for number, call in enumerate(value)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """One call, flat or with its `function` inside."""
    if not isinstance(call, dict):
        raise RowError(place, f"{what_is(call)}, not an object", WRITE_CALL)
    if call.get("function") is not None:
        return call | {"function": _call(call["function"], f"{place}.function")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    place = f"{place}.arguments"
    parsed = parse_json(arguments, place, WRITE_OBJECT) if arguments.strip() else {}
    if not isinstance(parsed, dict):
        raise RowError(place, f"JSON text of {what_is(parsed)}, not of an object", WRITE_OBJECT)
    return call | {"arguments": parsed}


# ------------------------------------------------------------------------------------------ comparing what was said


def says_the_same(left: Message, right: Message) -> bool:
    """Whether two messages are one, up to white space in their text."""
    if any(left.get(key) != right.get(key) for key in ("role", "tool_calls")):
        return False
    one, other = left.get("content") or "", right.get("content") or ""
    return one == other or squeezed(one) == squeezed(other)


def said_again(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many of the assistant's messages at the end of a prompt both answers say once more. Raises RowError where an
    answer says nothing else, or goes on in the same message: the prompt holds a part of the answer."""
    if prompt[-1]["role"] != "assistant" or not chosen or not rejected:
        return 0
    begins = squeezed(prompt[-1].get("content"))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if len(answer) == 1 and says_the_same(answer[0], prompt[-1]):
            raise RowError(name, "repeats the assistant's message that the prompt ends with", "keep it in one of them")
    longest = min(len(prompt), len(chosen) - 1, len(rejected) - 1)
    for size in range(longest, 0, -1):
        end = prompt[-size:]
        if all(says_the_same(*pair) for answer in (chosen, rejected) for pair in zip(end, answer)):
            return size
    openings = [answer[0] for answer in (chosen, rejected)]
    goes_on = [f"{squeezed(message.get('content'))} ".startswith(f"{begins} ") for message in openings]
    if begins and all(goes_on) and all(message["role"] == "assistant" for message in openings):
        reason = "ends with a message of the assistant that both answers repeat and go on with"
        raise RowError("prompt", reason, "end it with the user's message")
    return 0


def is_said(prompt: Any, conversation: Sequence[Message]) -> bool:
    """Whether a conversation says all of a prompt, up to white space: a text stands in one of its messages, or is a
    transcript of them; of messages, each is there."""
    if not isinstance(prompt, str):
        return all(any(says_the_same(message, other) for other in conversation) for message in messages_of(prompt, "prompt"))
    said = [squeezed(message.get("content")) for message in conversation]
    wanted = squeezed(prompt)
    return any(wanted in text for text in said) or any(_is_transcript(wanted, said[start:]) for start in (0, 1))


def _is_transcript(text: str, said: Sequence[str]) -> bool:
    """Whether a text is some others one behind the other, with no word between them but who speaks."""
    for content in filter(None, said):
        before, found, text = text.partition(content)
        if not found or not _names_speakers(before):
            return False
    return bool(said) and _names_speakers(text)


def _names_speakers(text: str) -> bool:
    return set(re.findall(r"[^\W_]+", text.lower())) <= SPEAKING


def is_blank(answer: Text) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not any((message.get("content") or "").strip() or message.get("tool_calls") for message in answer)


def is_silent(message: Message) -> bool:
    """Whether a message has no word of its speaker's: no content, no reasoning, no call."""
    texts = [message.get(key) for key in ("content", *REASONING)]
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def stripped(answer: Text) -> Text:
    if isinstance(answer, str):
        return answer.strip()
    return [message | {"content": (message.get("content") or "").strip()} for message in answer]


def behind(prompt: Sequence[Message], answer: list[Message]) -> list[Message]:
    """An answer without the end of the prompt, or all of it, where it repeats that."""
    for size in range(min(len(prompt), len(answer)), 0, -1):
        repeated = answer[:size]
        if all(map(says_the_same, repeated, prompt[-size:])) and any(m["role"] != "assistant" for m in repeated):
            return answer[size:]
    return answer

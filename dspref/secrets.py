"""Secrets in text: found by their shape, or because an environment variable with a telling name has the same value.

This module is below every layer: errors, logs and run folders pass their text through `redact`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from urllib.parse import quote

HIDDEN = "***"
# A shorter value is no secret, and would be found in ordinary words.
SHORTEST = 8

WORD = r"(?<![A-Za-z0-9])"
ASSIGNED = r"(?i:password|passwd|secret(?:_access_key)?|api[_-]?key)"
# (what it is, what stands before it and stays, its shape)
SHAPES = [
    (what, re.compile(rf"(?P<before>{before}){shape}"))
    for what, before, shape in (
        ("a Hugging Face token", WORD, r"(?:hf_|api_org_)[A-Za-z0-9]{20,}"),
        ("a GitHub token", WORD, r"(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
        ("a GitLab token", WORD, r"glpat-[\w-]{20,}"),
        ("an API key", WORD, r"(?:sk-(?=[\w-]{,99}\d)[\w-]{20,}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|wandb_v\d_\w{20,})"),
        ("an AWS key", WORD, r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        # 40 hex digits alone may be a commit, such as model.revision.
        ("an API key", r"(?i:key|token|secret|password|wandb)\W{1,4}", r"[0-9a-f]{40}(?![0-9a-fA-F])"),
        ("a web token", WORD, r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
        ("a private key", "", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^\"']*?(?:-----END[A-Z ]*-----|(?=[\"'])|\Z)"),
        ("a password in a URL", r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://", r"[^/\s:@\"']*:[^/\s@\"']+(?=@)"),
        ("a password", rf"{ASSIGNED}[\"']?\s*[=:]\s*[\"']?", r"[^\s\"',;&*{<$]{8,}"),
        # Two words of a command line, as `redact_words` joins them.
        ("a password", rf"(?:{ASSIGNED}|(?i:token))\0", r"[^\0]{8,}"),
    )
]

# What the name of an environment variable holds that keeps a secret. Words are parted by what is no letter: TOKENIZER is not
# TOKEN, XAUTHORITY not AUTH. Some also end a word, PGPASSWORD and HFTOKEN.
WITHIN = (
    "TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASES?|PASSCODES?|CREDENTIALS?|CREDS|CONNSTR|CONNECTIONSTRING|JWT|TKN|WEBHOOK"
)
ALONE = "AUTH|AUTHORIZATION|BEARER|CRED|PAT|PSK|SAS"
LAST = "CONNECTION|DSN|COOKIES?"
KEYLESS = "MONKEY|DONKEY|TURKEY|HOCKEY|JOCKEY|WHISKEY|MICKEY|LACKEY|HOTKEY|TURNKEY|SMOKEY"
PASSABLE = "BYPASS|COMPASS|SURPASS|TRESPASS|OVERPASS|UNDERPASS|ASKPASS"
TELLING = re.compile(
    rf"(?<![A-Z])(?:[A-Z]*(?:{WITHIN})|{ALONE}|(?:GITHUB|GITLAB|GH|GL|AZURE|DEVOPS|ADO)PAT|CONN(?:ECTION)?_STR(?:ING)?"
    rf"|(?:[A-Z]*AUTH|[A-Z]*PW|[A-Z]*(?<!COM)(?<!EX)(?<!S)PAT|{LAST})(?=_?\d*$)"
    rf"|(?!(?:{KEYLESS})S?(?![A-Z]))[A-Z]*KEYS?"
    rf"|(?!(?:{PASSABLE})(?![A-Z]))[A-Z]*PASS|[A-Z]*PWD)(?![A-Z])"
)
# A path to a secret may be shown, and what is said of one; but some addresses are all that it takes.
HARMLESS = re.compile(
    r"(?:^|_)(?:PATH|FILE|DIR|FOLDER|HOME|NAME|(?<!WEBHOOK_)(?<!SAS_)URL|TYPE|SOCK|SOCKET|METHOD|MODE|ENABLED|HOST|PORT|USER"
    r"|ALGORITHM)$"
    r"|^(?:(?:OLD|ORIG|ORIGINAL|INIT|INITIAL|START|STARTING|SAVED|PREV|PREVIOUS|PROJECT|BUILD|WORK|SUBMIT)_?)?PWD$"
    r"|^SSH_CONNECTION$|(?:^|_)(?:PAD|EOS|BOS|UNK|SEP|CLS|MASK|STOP|SPECIAL|IMAGE)_TOKEN$"
    r"|(?:^|_)(?:MAX|MIN|NUM|NEW|TOTAL|PER_\w+)_TOKENS$|(?:^|_)TOKENS_PER_"
)


@cache
def is_telling(name: str) -> bool:
    """Whether an environment variable of this name is expected to hold a secret."""
    return bool(TELLING.search(name.upper())) and not HARMLESS.search(name.upper())


def kind_of(text: str, env: Mapping[str, str] = os.environ) -> str | None:
    """What secret a text holds, in words that do not tell it; None if it holds none."""
    for name, value in _values(env):
        if value in text:
            return f"the value of ${name}"
    return next((what for what, shape in SHAPES if shape.search(text)), None)


def redact(text: str, env: Mapping[str, str] = os.environ) -> str:
    """The text with *** in place of secrets."""
    for _, value in _values(env):
        # As it stands, and as JSON or a URL has it.
        for form in (value, json.dumps(value)[1:-1], quote(value, safe="")):
            text = text.replace(form, HIDDEN)
    for _, shape in SHAPES:
        text = shape.sub(rf"\g<before>{HIDDEN}", text)
    return text


def redact_words(words: list[str]) -> list[str]:
    """A command line without secrets: those that follow their option too, as in `--api-key 123...`."""
    return redact("\0".join(words)).split("\0")


def _values(env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Environment variables that hold a secret, the longest value first: it may contain another."""
    found = [(name, value.strip()) for name, value in env.items() if is_telling(name)]
    return iter(sorted((pair for pair in found if len(pair[1]) >= SHORTEST), key=lambda pair: -len(pair[1])))

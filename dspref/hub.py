"""What is had from the Hugging Face hub: the snapshot of a repository, by one request that fails at once without a network.

Libraries that are given a hub id ask for each file by itself, and wait for a hub that does not answer, loudly; they are
given the folder instead. Loads no torch.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from dspref.errors import ConfigError
from dspref.terminal import first_line

# owner/name, or a name alone.
ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Files that a tokenizer may be made of.
TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@cache
def snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder with the files of a repository whose names match, downloaded first where they are not in the cache.

    Raises ConfigError where they cannot be had.
    """
    from huggingface_hub import snapshot_download

    get = partial(snapshot_download, name, revision=revision, allow_patterns=list(patterns))
    try:
        return Path(get())
    except Exception as error:  # offline, gated, misspelt: each has its own exception
        # Of a commit by its hash, huggingface_hub 1 asks the hub what is in it though all is here; 2 looks here by itself.
        with suppress(Exception):
            return Path(get(local_files_only=True))
        reason = first_line(error).removeprefix("Got: ")
        raise ConfigError(f"{name}: is no folder here, and not had from the hub: {reason}; check name and network") from None


@cache
def silence() -> str | None:
    """Why the hub gives no answer at all; None where it does. Where it gives none, libraries are told to be content with
    what is in the cache, as $HF_HUB_OFFLINE would tell them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None  # as was asked for
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of httpx, or of what stands in for it
        constants.HF_HUB_OFFLINE = True
        return first_line(error)
    return None

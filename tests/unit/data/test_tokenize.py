"""Boundary and truncation against slow, obvious versions, with tokenizers built here and the real one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dspref.data.formats import Preference, RowError
from dspref.data.pieces import Encoder
from dspref.data.tokenize import encode, load_tokenizer, tokenizer_digest
from dspref.data.truncate import Limits, TokenizedPair, truncate
from dspref.errors import ConfigError, DataError

GPT2 = Path(__file__).parents[3] / ".." / "shared" / "tokenizer" / "gpt2-chatml"
NO_LIMITS = Limits()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>"]


def words(ends: str = "", **settings: Any) -> PreTrainedTokenizerFast:
    """One token per word; `ends` names what the tokenizer adds itself: b(os), e(os)."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    single = ("<s> " if "b" in ends else "") + "$A" + (" </s>" if "e" in ends else "")
    backend.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **settings})


def merging() -> PreTrainedTokenizerFast:
    """Characters, and merges sk, sky, in, skin: words that grow across the boundary."""
    pieces = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz _", "sk", "sky", "in", "skin"]
    merges = [("s", "k"), ("sk", "y"), ("i", "n"), ("sk", "in")]
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    if not GPT2.is_dir():
        pytest.skip("shared/tokenizer/gpt2-chatml is not beside the repository")
    return load_tokenizer(str(GPT2))


def one(preference: Preference, tokenizer: PreTrainedTokenizerBase, scored: str = "all") -> TokenizedPair:
    (result,) = encode([preference], tokenizer, NO_LIMITS, scored)
    assert isinstance(result, TokenizedPair), result
    return result


def texts(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(" ".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in pair[:3])


# ----------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(("ends", "prompt"), [("", "p q"), ("b", "<s> p q"), ("e", "p q"), ("be", "<s> p q")])
@pytest.mark.parametrize("answer", ["a b", "a b </s>", "a b </s> </s>"])
def test_text_has_exactly_the_written_and_one_appended_terminator(ends: str, prompt: str, answer: str) -> None:
    pair = one(Preference("p q", " " + answer, " c"), words(ends))
    expected = answer if answer.endswith("</s>") else f"{answer} </s>"
    assert texts(pair, words()) == (prompt, expected, "c </s>")


@pytest.mark.parametrize("prompt", ["p", "<s> p"])
def test_bos_in_the_text_is_not_doubled(prompt: str) -> None:
    pair = one(Preference(prompt, " a", " b"), words("b"))
    assert texts(pair, words()) == ("<s> p", "a </s>", "b </s>")


def test_empty_prompt_follows_bos_or_gives_up_the_shared_first_token() -> None:
    assert texts(one(Preference("", "a x", "b"), words("b")), words()) == ("<s>", "a x </s>", "b </s>")
    assert texts(one(Preference("", "a x", "a y"), words()), words()) == ("a", "x </s>", "y </s>")
    (error,) = encode([Preference("", "a", "b")], words(), NO_LIMITS)
    assert isinstance(error, RowError)
    assert error.field == "prompt"


def test_merges_across_the_boundary_move_it_for_both_sides() -> None:
    pair = one(Preference("the sk", "y is", "in is"), merging())
    assert texts(pair, merging()) == ("t h e  ", "sky   i s </s>", "skin   i s </s>")
    pair = one(Preference("the sk", "y is", "_ is"), merging())
    assert texts(pair, merging())[2] == "sk _   i s </s>"


def test_boundary_is_the_common_prefix_for_random_text() -> None:
    rng, tokenizer = random.Random(0), merging()
    preferences = [
        Preference(prompt, chosen, rejected)
        for prompt, chosen, rejected in (
            ["".join(rng.choices("skyin ", k=rng.randint(1, 6))) for _ in range(3)] for _ in range(300)
        )
    ]
    for preference, result in zip(preferences, encode(preferences, tokenizer, NO_LIMITS), strict=True):
        assert_matches(result, slow_split(preference, tokenizer))


def slow_split(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...] | None:
    """Walk along the prompt while all three token lists agree."""
    assert isinstance(preference.prompt, str)
    prompt, chosen, rejected = (
        tokenizer.encode(text)
        for text in (
            preference.prompt,
            f"{preference.prompt}{preference.chosen}</s>",
            f"{preference.prompt}{preference.rejected}</s>",
        )
    )
    size = 0
    while all(size < len(ids) for ids in (prompt, chosen, rejected)) and prompt[size] == chosen[size] == rejected[size]:
        size += 1
    if size == 0 and chosen[0] == rejected[0]:
        size = 1
    usable = 0 < size < min(len(chosen), len(rejected)) and chosen != rejected
    return (chosen[:size], chosen[size:], rejected[size:]) if usable else None


def assert_matches(result: TokenizedPair | RowError, expected: Sequence[Sequence[int]] | None) -> None:
    if expected is None:
        assert isinstance(result, RowError)
        return
    assert isinstance(result, TokenizedPair), result
    assert [ids.tolist() for ids in result[:3]] == [list(ids) for ids in expected]
    assert {ids.dtype for ids in result[:3]} == {np.dtype(np.int32)}
    assert result[3:] == (None, None)


# ----------------------------------------------------------------------------------------------- chat


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_chat_is_what_the_template_renders_and_the_newline_behind_the_end_is_scored_on_request(
    gpt2: PreTrainedTokenizerBase,
) -> None:
    prompt = [message("system", "s"), message("user", "q")]
    row = Preference(prompt, [message("assistant", "a")], [message("assistant", "b")])
    assert gpt2.decode(one(row, gpt2, "assistant").chosen.tolist()) == "a<|im_end|>"
    pair = one(row, gpt2)
    assert gpt2.decode(pair.prompt.tolist()) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert gpt2.decode(pair.chosen.tolist()) == "a<|im_end|>\n"
    assert gpt2.decode(pair.rejected.tolist()) == "b<|im_end|>\n"


def test_chat_gets_no_token_that_the_template_does_not_have() -> None:
    tokenizer = words("be", chat_template="{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    pair = one(
        Preference([message("user", "p q")], [message("assistant", "a")], [message("assistant", "b")]),
        tokenizer,
    )
    assert texts(pair, tokenizer) == ("p q", "a", "b")


def test_a_prompt_that_ends_with_the_assistant_is_continued(gpt2: PreTrainedTokenizerBase) -> None:
    prompt = [message("user", "q"), message("assistant", "so")]
    more = (
        [message("user", "x"), message("assistant", "a")],
        [message("user", "y"), message("assistant", "b")],
    )
    pair = one(Preference(prompt, *more), gpt2)
    assert str(gpt2.decode(pair.prompt.tolist())).endswith("<|im_start|>assistant\nso")
    assert str(gpt2.decode(pair.chosen.tolist())).startswith("<|im_end|>\n<|im_start|>user\nx")


def test_a_template_that_opens_the_answer_moves_the_boundary() -> None:
    """As with DeepSeek-R1: the generation prompt holds a tag that the rendered answers lack."""
    template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}t z{% endif %}"
    tokenizer = words(chat_template=template)
    pair = one(
        Preference([message("user", "p")], [message("assistant", "t a")], [message("assistant", "b")]),
        tokenizer,
    )
    assert texts(pair, tokenizer) == ("p", "t a", "b")


def test_tools_and_template_kwargs_reach_the_template() -> None:
    template = "{{ tools[0].function.name + ' ' + word }}{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"
    tokenizer = words(chat_template=template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    answers = [message("assistant", "a")], [message("assistant", "b")]
    pair = one(Preference([message("user", "p")], *answers, tools, {"word": "w"}), tokenizer)
    assert texts(pair, tokenizer) == ("f w p", "a", "b")
    (error,) = encode([Preference([message("user", "p")], *answers, tools, {"chat_template": "x"})], tokenizer, NO_LIMITS)
    assert isinstance(error, RowError)
    assert error.field == "chat_template_kwargs"


def test_text_and_chat_rows_keep_their_order() -> None:
    tokenizer = words("b", chat_template="{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    letters = "abcdefgh"
    rows = [
        Preference("p", f" {letter}", " z")
        if i % 2
        else Preference([message("user", "p")], [message("assistant", letter)], [message("assistant", "z")])
        for i, letter in enumerate(letters)
    ]
    pairs = [pair for pair in encode(rows, tokenizer, NO_LIMITS, "all") if isinstance(pair, TokenizedPair)]
    assert [texts(pair, tokenizer)[1].split()[0] for pair in pairs] == list(letters)


def test_template_errors_are_one_line() -> None:
    row = Preference([message("user", "p")], [message("assistant", "a")], [message("assistant", "b")])
    with pytest.raises(DataError, match=r"^model\.chat_template: .* no chat template; fix: .*$"):
        encode([row], words(), NO_LIMITS)
    for template in (
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 + 'a' }}",
    ):
        (error,) = encode([row], words(chat_template=template), NO_LIMITS)
        assert isinstance(error, RowError)
        assert error.field == "chat_template"
        assert "\n" not in str(error)


# ----------------------------------------------------------------------------------------------- truncation


def slow_truncate(pair: Sequence[list[int]], limits: Limits, head: int) -> tuple[list[int], ...] | None:
    """The three rules, one token at a time."""
    prompt, chosen, rejected = (list(ids) for ids in pair)
    least = limits.min_prompt_length if limits.min_prompt_length is not None else (limits.max_length or 0) // 4

    def shrink(size: int) -> None:
        own = min(head, size // 2)
        while len(prompt) > size:
            prompt.pop(own if limits.truncation_mode == "keep_end" else -1)

    if limits.max_prompt_length:
        shrink(limits.max_prompt_length)
    for answer in (chosen, rejected):
        while limits.max_completion_length and len(answer) > limits.max_completion_length:
            answer.pop()
    longest = max(len(chosen), len(rejected))
    if limits.max_length and len(prompt) + longest > limits.max_length:
        shrink(max(limits.max_length - longest, least, 1))
    for answer in (chosen, rejected):
        while limits.max_length and answer and len(prompt) + len(answer) > limits.max_length:
            answer.pop()
    return (prompt, chosen, rejected) if chosen and rejected and chosen != rejected else None


def test_truncation_follows_the_three_rules_for_random_lengths() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        pair = [rng.choices(range(3), k=rng.randint(1, 12)) for _ in range(3)]
        total, of_prompt, of_answer = (rng.choice([None, *range(1, 14)]) for _ in range(3))
        least = rng.choice([None, *range(1, 6)])
        limits = Limits(total, of_prompt, of_answer, rng.choice(["keep_end", "keep_start"]), least)
        head = rng.randint(0, len(pair[0]))
        tokenized = TokenizedPair(*(np.asarray(ids, dtype=np.int32) for ids in pair))
        try:
            result = truncate(tokenized, limits, head)
        except RowError as error:
            result = error
        assert_matches(result, slow_truncate(pair, limits, head))


def test_a_long_answer_leaves_a_quarter_to_the_prompt_and_the_template_its_opening(gpt2: PreTrainedTokenizerBase) -> None:
    """Case F4: the trained prompt was one newline."""
    question = "Please tell me all about whales and their songs"
    rows = [Preference([message("user", question)], [message("assistant", "song " * 300)], [message("assistant", "no")])]
    (pair,) = encode(rows, gpt2, Limits(max_length=100))
    assert isinstance(pair, TokenizedPair)
    assert str(gpt2.decode(pair.prompt.tolist())) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert len(pair.prompt) + len(pair.chosen) == 100
    (pair,) = encode(rows, gpt2, Limits(max_length=100, min_prompt_length=12))
    assert isinstance(pair, TokenizedPair)
    assert str(gpt2.decode(pair.prompt.tolist())) == "<|im_start|>user\n and their songs<|im_end|>\n<|im_start|>assistant\n"
    for asked, droppable in (("drop", True), ("error", False)):
        (error,) = encode(rows, gpt2, Limits(max_length=100, on_overlong=asked))
        assert isinstance(error, RowError)
        assert (error.field, error.droppable) == ("pair", droppable)
        assert "data.max_length" in error.fix
    (pair,) = encode(rows, gpt2, Limits(max_length=1000, on_overlong="error"))
    assert isinstance(pair, TokenizedPair)


def test_bos_survives_in_text_rows() -> None:
    (pair,) = encode([Preference("p q r s t u v w", " a b", " c")], words("b"), Limits(max_length=7))
    assert isinstance(pair, TokenizedPair)
    assert texts(pair, words()) == ("<s> u v w", "a b </s>", "c </s>")


def test_a_cut_answer_ends_with_a_scored_token() -> None:
    ids, scored = np.arange(6, dtype=np.int32), np.array([True, True, False, False, False, True])
    pair = TokenizedPair(ids[:2], ids, ids[::-1], scored, scored)
    cut = truncate(pair, Limits(max_completion_length=4))
    assert [part.tolist() for part in cut[:3]] == [[0, 1], [0, 1], [5, 4]]
    assert cut[3:] == (None, None)
    late = TokenizedPair(ids[:2], ids, ids[::-1], ~scored, scored)
    with pytest.raises(RowError, match="no scored token"):
        truncate(late, Limits(max_completion_length=2))


def test_only_pairs_made_equal_by_truncation_are_droppable() -> None:
    results = encode([Preference("p", " a b", " a c"), Preference("p", " A", " B")], words(), Limits(max_length=2))
    assert [isinstance(result, RowError) and result.droppable for result in results] == [True, False]
    (error,) = encode([Preference("p", " a", " b")], words(), Limits(max_length=1))
    assert isinstance(error, RowError)
    assert "no scored token" in error.reason
    assert not error.droppable


# ----------------------------------------------------------------------------------------------- pieces


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As SentencePiece: a space before the first word of a text, or of each of its pieces."""
    pieces = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz▁12'.\n", "▁w", "▁wo"]
    merges = [("▁", "w"), ("▁w", "o")]
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme=scheme)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["words", "merging", "always", "first", "never", "gpt2"])
def test_pieces_give_the_ids_of_whole_texts(kind: str, request: pytest.FixtureRequest) -> None:
    made = {"words": words, "merging": merging}
    tokenizer = request.getfixturevalue("gpt2") if kind == "gpt2" else made[kind]() if kind in made else metaspace(kind)
    encoder, rng = Encoder(tokenizer), random.Random(3)
    assert encoder._cuts, "whole texts are encoded: nothing is shown"
    special = list(encoder._cuts)
    bits = [*special, " ", "  ", "\n", "wo", " wo", "sk", "y", "in", "1", "'", ".", "é"]
    texts = ["".join(rng.choices(bits, k=rng.randint(0, 9))) for _ in range(400)]
    whole = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [ids.tolist() for ids in encoder(texts, special=False)] == whole
    assert [ids.tolist() for ids in encoder(texts[::-1], special=False)] == whole[::-1], "what is remembered"


def test_real_pairs_in_pieces_have_the_ids_of_whole_texts(gpt2: PreTrainedTokenizerBase, shared: Path) -> None:
    lines = (shared / "data" / "multiturn_train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    texts = [
        gpt2.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in rows
        for side in ("chosen", "rejected")
    ]
    whole = [gpt2.encode(text, add_special_tokens=False) for text in texts]
    assert [ids.tolist() for ids in Encoder(gpt2)(texts, special=False)] == whole


def test_where_a_sample_differs_whole_texts_are_encoded() -> None:
    encoder = Encoder(words())
    encoder._known["p q"] = np.zeros(1, dtype=np.int32)  # as of a tokenizer whose pieces are not independent
    (ids,) = encoder(["</s>p q"], special=False)
    assert ids.tolist() == words().encode("</s>p q", add_special_tokens=False)


# ----------------------------------------------------------------------------------------------- tokenizers


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    words().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    digest = tokenizer_digest(loaded)
    loaded("a b", truncation=True, max_length=1)
    assert tokenizer_digest(loaded) == digest == tokenizer_digest(load_tokenizer(str(tmp_path)))
    others = [words("b"), words(chat_template=CHATML), words(eos_token="a"), merging()]
    assert len({digest, *map(tokenizer_digest, others)}) == 5


def test_chat_template_is_a_path_or_a_text(tmp_path: Path) -> None:
    words().save_pretrained(tmp_path)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert load_tokenizer(str(tmp_path), chat_template=CHATML).chat_template == CHATML
    assert load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "chatml.jinja")).chat_template == CHATML
    (tmp_path / "marked.jinja").write_text(CHATML, encoding="utf-8-sig")
    assert load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "marked.jinja")).chat_template == CHATML
    assert load_tokenizer(str(tmp_path), chat_template="\ufeff" + CHATML).chat_template == CHATML
    with pytest.raises(ConfigError, match=r"^model\.chat_template: cannot read .*; fix: .*$"):
        load_tokenizer(str(tmp_path), chat_template="absent.jinja")


def test_a_missing_tokenizer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"^model\.tokenizer_name_or_path: .*; fix: .*$"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("limits", "reason", "fix"),
    [
        (
            Limits(6, on_overlong="drop"),
            "longer than max_length 6",
            "raise data.max_length, or set data.on_overlong: truncate",
        ),
        (
            Limits(6, on_overlong="error"),
            "longer than max_length 6",
            "raise data.max_length, or set data.on_overlong: truncate or drop",
        ),
        # What is left would be equal: cutting is no way out.
        (
            Limits(None, None, 2, on_overlong="drop"),
            "longer than max_completion_length 2",
            "raise data.max_completion_length",
        ),
        (
            Limits(100, None, 2, on_overlong="error"),
            "longer than max_completion_length 2",
            "raise data.max_completion_length, or set data.on_overlong: drop",
        ),
        (Limits(None, None, 2), "identical to chosen after truncation", "raise data.max_completion_length"),
        (Limits(100, 90, 2), "identical to chosen after truncation", "raise data.max_completion_length"),
        (Limits(6, 2, 2), "identical to chosen after truncation", "raise data.max_length and data.max_prompt_length and "),
    ],
)
def test_the_limits_that_are_named_are_those_that_a_pair_is_beyond(limits: Limits, reason: str, fix: str) -> None:
    pair = TokenizedPair(*(np.array(ids, dtype=np.int32) for ids in ([1, 2, 3], [4, 5, 6, 7], [4, 5, 8])))
    with pytest.raises(RowError) as error:
        truncate(pair, limits)
    assert error.value.reason == reason
    assert error.value.fix == fix or (fix.endswith(" ") and error.value.fix.startswith(fix))

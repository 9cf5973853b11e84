"""Pairs of encoder-decoder models: what transformers' own training would read and predict, in packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_encoder_decoder, tiny_model
from transformers import BartTokenizer, DataCollatorForSeq2Seq, MBart50Tokenizer, MBartTokenizer, NllbTokenizer, T5Tokenizer

from dspref.data.apart import Start, read_apart
from dspref.data.batch import PackedBatch, collate, computed_tokens
from dspref.data.formats import RowError, to_preference
from dspref.data.loader import Packing, place
from dspref.data.manners import Learned
from dspref.data.prompts import read_prompts
from dspref.data.sources import Source
from dspref.data.store import PairStore, load_pairs
from dspref.data.template import render
from dspref.data.tokenize import tokenize_pairs, tokenizer_digest
from dspref.data.truncate import Limits
from dspref.errors import DataError
from dspref.model import families

WORDS = ["▁the", "▁cat", "▁sat", "▁on", "▁a", "mat", "▁dog", "t", "c", "a", "s", "▁"]
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SCORES = [(word, -float(k)) for k, word in enumerate([*SPECIAL, *WORDS])]
BYTES = {**SPECIAL, "<mask>": 4, "a": 5, "b": 6, "Ġa": 7, "Ġ": 8, "c": 9}
ROWS: list[dict[str, Any]] = [
    {"prompt": "the cat sat", "chosen": "a dog", "rejected": "on a mat"},
    {"prompt": "a", "chosen": "the cat sat on a cat", "rejected": "c"},
    {"prompt": "the cat sat", "chosen": "on a mat", "rejected": "sat</s>"},
]


def tokenizer_for(model_type: str) -> Any:
    if model_type == "t5":
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0 - k) for k, word in enumerate(WORDS))]
        return T5Tokenizer(vocab=scores, extra_ids=0)
    if model_type == "m2m_100":
        return NllbTokenizer(vocab={**SPECIAL, **{word: k for k, word in enumerate(WORDS, start=4)}}, merges=[])
    if model_type in ("mbart", "mbart50"):
        return (MBartTokenizer if model_type == "mbart" else MBart50Tokenizer)(vocab=SCORES)
    return BartTokenizer(vocab=BYTES, merges=[])


LANGUAGES = {"m2m_100": ("deu_Latn", "fra_Latn"), "mbart": ("de_DE", "fr_XX"), "mbart50": ("de_DE", "fr_XX")}
MODELS = ["t5", "m2m_100", "mbart", "mbart50", "bart"]


def config_of(model_type: str, tokenizer: Any) -> Any:
    own = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    start = {"decoder_start_token_id": tokenizer.pad_token_id if model_type == "t5" else tokenizer.eos_token_id}
    return tiny_encoder_decoder(model_type.removesuffix("50"), len(tokenizer) + 1, **own, **start)


def expected_of(model_type: str, text: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    """(input_ids, decoder_input_ids, labels) as transformers trains."""
    tokenizer = tokenizer_for(model_type)
    if model_type in LANGUAGES:
        tokenizer.src_lang, tokenizer.tgt_lang = LANGUAGES[model_type]
    features = {"input_ids": tokenizer(text)["input_ids"], "labels": tokenizer(text_target=answer)["input_ids"]}
    lm = tiny_model(config_of(model_type, tokenizer), seed=1)
    batch = DataCollatorForSeq2Seq(tokenizer, model=lm)([features])
    read = batch.get("decoder_input_ids")
    if read is None:  # M2M100 shifts them itself
        heard: list[torch.Tensor] = []
        embeddings: Any = lm.get_decoder().embed_tokens
        embeddings.register_forward_hook(lambda module, given, output: heard.append(given[0]))
        lm(**batch)
        read = heard[0]
    return batch["input_ids"][0].tolist(), read[0].tolist(), batch["labels"][0].tolist()


def rows_for(model_type: str) -> list[dict[str, Any]]:
    named = dict(zip(("source_language", "target_language"), LANGUAGES.get(model_type, ())))
    rows = [row for row in ROWS if "</s>" not in row["rejected"]]
    return [{**row, **{key: row[key].replace("the", "c") for key in row}, **named} for row in rows]


def pairs_for(model_type: str, tmp_path: Path, rows: list[dict[str, Any]], **limits: Any) -> PairStore:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_for(model_type)
    read_apart(tokenizer, families.start_of_answers(config_of(model_type, tokenizer)))
    columns = {name: name for name in ("source_language", "target_language") if name in rows[0]}
    return load_pairs(
        [Source(str(tmp_path / "rows.jsonl"), columns=columns)], tokenizer, Limits(**limits), on_bad_row="error",
        cache_dir=tmp_path / "cache", log=lambda line: None,
    )  # fmt: skip


def segments(ids: Any, bounds: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(ids), np.asarray(bounds)[1:-1])]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_pack_holds_what_transformers_trains_on(model_type: str, tmp_path: Path) -> None:
    """Prompts, decoder inputs and labels, with languages where the family has them."""
    rows = rows_for(model_type)
    store = pairs_for(model_type, tmp_path, rows)
    batch = collate([store[k] for k in range(len(rows))], range(len(rows)), prefix_sharing=True, encoder_decoder=store.apart)
    wanted = [expected_of(model_type, row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    assert batch.prompts is not None
    assert segments(batch.prompts.input_ids, batch.prompts.own.cu_seqlens_q) == [wanted[k][0] for k in (0, 2)]
    assert segments(batch.input_ids, batch.cu_seqlens_q) == [read for _, read, _ in wanted]
    sizes = np.cumsum([0, *(len(labels) for _, _, labels in wanted)])
    assert segments(batch.targets, sizes) == [labels for _, _, labels in wanted]
    assert batch.predictor_index.tolist() == list(range(len(batch.input_ids))), "each label at the place of its input"
    assert computed_tokens(store.lengths, True, encoder_decoder=True).sum() == len(batch.prompts.input_ids) + len(
        batch.input_ids
    )


def test_answers_read_the_prompt_that_they_have(tmp_path: Path) -> None:
    """Two prompts in three pairs, and one answer in two: gathered keys, each computed once."""
    store = pairs_for("t5", tmp_path, ROWS)
    batch = collate([store[k] for k in range(3)], range(3), prefix_sharing=True, encoder_decoder=True)
    prompts = batch.prompts
    assert prompts is not None
    assert len(segments(prompts.input_ids, prompts.own.cu_seqlens_q)) == 2
    read = prompts.input_ids[prompts.of_answers.kv_index]
    of_each = segments(read, prompts.of_answers.cu_seqlens_k)
    first, second = store[0].prompt.tolist(), store[1].prompt.tolist()
    assert of_each == [first, first, first, second, second]
    assert len(segments(batch.input_ids, batch.cu_seqlens_q)) == 5, "the answer that two pairs have is computed once"
    assert store[2].rejected[-2:].tolist() != [1, 1], "an end token that the text has is not added again"
    placed = place(store, np.arange(3), Packing(100, True))
    assert placed.tokens == len(prompts.input_ids) + len(batch.input_ids)
    own, cross = np.diff(prompts.own.cu_seqlens_q), np.diff(prompts.of_answers.cu_seqlens_k)
    answers = np.diff(batch.cu_seqlens_q)
    assert placed.attention == (own**2).sum() + (answers * cross).sum() + (answers * (answers + 1) // 2).sum()


def test_what_is_cut_keeps_the_special_tokens_of_the_prompt_and_the_start_of_answers(tmp_path: Path) -> None:
    """keep_start keeps the end token that every prompt of T5 has; a limit counts labels, and not the decoder's start."""
    for mode, kept in (("keep_end", slice(-3, None)), ("keep_start", slice(0, 2))):
        whole, cut = (
            pairs_for("t5", tmp_path, ROWS, **limits)[1 if not limits else 0]
            for limits in ({}, {"max_prompt_length": 3, "max_completion_length": 2, "truncation_mode": mode})
        )
        whole = pairs_for("t5", tmp_path, ROWS)[0]
        assert len(cut.prompt) == 3
        assert cut.prompt[-1] == 1 == whole.prompt[-1]
        if mode == "keep_start":
            assert cut.prompt[:2].tolist() == whole.prompt[kept].tolist()
        else:
            assert cut.prompt.tolist() == whole.prompt[kept].tolist()
        assert cut.chosen.tolist() == whole.chosen[:3].tolist()
        assert cut.chosen_scored is not None
        assert cut.chosen_scored.tolist() == [False, True, True]


def test_the_cache_knows_how_answers_start() -> None:
    plain, zero, one = (tokenizer_for("t5") for _ in range(3))
    read_apart(zero, Start(0))
    read_apart(one, Start(1))
    assert len({tokenizer_digest(tokenizer) for tokenizer in (plain, zero, one)}) == 3


@pytest.mark.parametrize(
    ("model_type", "row", "said"),
    [
        ("t5", {"prompt": [{"role": "user", "content": "a"}]}, "row: a conversation, .* data.train.template"),
        ("m2m_100", {}, "target_language: .* none is given; fix: name the column"),
    ],
)
def test_what_cannot_be_read_apart_is_refused(model_type: str, row: dict[str, Any], said: str) -> None:
    tokenizer = tokenizer_for(model_type)
    read_apart(tokenizer, Start(0))
    if "prompt" in row:
        row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(RowError, match=said):
        tokenize_pairs([{**ROWS[0], **row}], tokenizer)


def test_languages_are_checked_and_the_tokenizer_is_left_as_it_was(tmp_path: Path) -> None:
    rows = [{**row, "target_language": "xx"} for row in ROWS]
    with pytest.raises(DataError, match="target_language: 'xx' is no language of the tokenizer"):
        pairs_for("m2m_100", tmp_path, rows)
    with pytest.raises(DataError, match="target_language: has no effect: the tokenizer knows no languages"):
        pairs_for("t5", tmp_path, rows)
    tokenizer = tokenizer_for("m2m_100")
    read_apart(tokenizer, Start(2))
    before = tokenizer_digest(tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "the", "rejected": "c", "to": "fra_Latn"}\n')
    source = Source(str(tmp_path / "rows.jsonl"), columns={"target_language": "to"})
    load_pairs([source], tokenizer, Limits(), on_bad_row="error", cache_dir=tmp_path / "c", log=lambda line: None)
    assert tokenizer_digest(tokenizer) == before


def test_a_pack_moves_with_its_prompts() -> None:
    batch = collate([], [], prefix_sharing=True, encoder_decoder=True)
    assert batch.prompts is not None
    changed: PackedBatch = batch.to("meta")
    assert changed.prompts is not None
    assert changed.prompts.input_ids.device.type == changed.prompts.of_answers.cu_seqlens_k.device.type == "meta"


def test_languages_go_with_a_template_and_are_refused_for_other_models(tmp_path: Path) -> None:
    columns, template = {"target_language": "to"}, {"prompt": "{a}", "chosen": "{b}", "rejected": "{c}"}
    row = {"a": "the cat", "b": "a dog", "c": "on a mat", "to": "fra_Latn"}
    preference = to_preference(row, columns, template)
    assert preference.languages == (None, "fra_Latn")
    tokenizer = tokenizer_for("t5")
    refused = render(preference, tokenizer, Learned(tokenizer))
    assert isinstance(refused, RowError)
    assert "has no effect: the model is no encoder-decoder model" in str(refused)


def test_answers_that_begin_as_their_prompt_does_keep_that(tmp_path: Path) -> None:
    """A decoder's text does not go on from the encoder's: it may copy it."""
    rows = [{"prompt": "the dog", "chosen": "the dog sat", "rejected": "the dog on a mat"}]
    store = pairs_for("t5", tmp_path, rows)
    batch = collate([store[0]], [0], prefix_sharing=True, encoder_decoder=store.apart)
    wanted = [expected_of("t5", rows[0]["prompt"], rows[0][side]) for side in ("chosen", "rejected")]
    assert segments(batch.input_ids, batch.cu_seqlens_q) == [read for _, read, _ in wanted]


def test_prompts_of_ones_own_name_their_languages(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("m2m_100")
    read_apart(tokenizer, families.start_of_answers(config_of("m2m_100", tokenizer)))
    source, target = LANGUAGES["m2m_100"]
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"prompt": "c cat", "source_language": source, "target_language": target}) + "\n")
    ((ids, _, _, begins, _),) = read_prompts(path, tokenizer)
    wanted, read, _ = expected_of("m2m_100", "c cat", "c")
    assert ids == wanted and begins == read[:2], "the start, and the language that every answer begins with"
    (tmp_path / "asked.txt").write_text("c cat\n")
    with pytest.raises(DataError, match=r"asked\.txt:1: target_language: .*; fix: in a \.jsonl file, give each row"):
        read_prompts(tmp_path / "asked.txt", tokenizer)

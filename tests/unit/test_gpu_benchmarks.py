"""The GPU benchmarks: their arithmetic and masks on any machine, and the whole of them on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from math import inf, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import child, flex, models, parts, races, train
from benchmarks.gpu.clock import repeat
from benchmarks.gpu.figures import Figure, Sizes, ratio, tiny_sizes
from benchmarks.processes import Failed
from benchmarks.races import at_least, at_most
from benchmarks.variants import loop, padded
from benchmarks.workload import ROOT, Spec, Tokens
from dspref.data.batch import collate
from dspref.data.truncate import TokenizedPair
from dspref.model.attention import KERNELS, PACKED, Options, Segments
from dspref.model.logps import pair_logps
from dspref.model.packed import PackedCausalLM

LENGTHS = [[9, 5, 3], [4, 2, 7]]


def random_pairs(lengths: list[list[int]]) -> list[TokenizedPair]:
    draws = np.random.default_rng(1)
    rows = [[draws.integers(0, 99, size=n).astype(np.int32) for n in row] for row in lengths]
    return [TokenizedPair(prompt, chosen, rejected) for prompt, chosen, rejected in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and counts


@pytest.mark.parametrize(("layout", "sharing"), [(models.separate, False), (models.shared, True)])
def test_counts_are_those_of_a_pack(layout, sharing):
    batch = collate(random_pairs(LENGTHS), range(2), prefix_sharing=sharing)
    queries, keys = batch.cu_seqlens_q.diff(), batch.cu_seqlens_k.diff()
    attention = int((queries * keys - queries * (queries - 1) // 2).sum())
    assert layout(LENGTHS) == (len(batch.input_ids), len(batch.targets), attention)


def test_padding_makes_all_sequences_as_long_as_the_longest():
    assert models.padded(LENGTHS) == (4 * 14, 17, 4 * 14 * 15 // 2)


def test_lengths_are_like_ultrafeedbacks():
    prompt, chosen, rejected = models.like_ultrafeedback(2048).T
    assert 950 < (2 * prompt + chosen + rejected).mean() < 1050
    assert (prompt + np.maximum(chosen, rejected)).max() <= 2048 - models.TEMPLATE.sum()
    step = models.ordinary_step(models.like_ultrafeedback(2048), 4)
    padded, useful = models.padded(step)[0], models.separate(step)[0]
    assert 0.4 < 1 - useful / padded < 0.55  # as four pairs of UltraFeedback have it


def test_prompts_are_four_times_as_long_as_answers_where_that_is_asked_for():
    prompt, chosen, rejected = models.ordinary_step(models.prompt_heavy(4096), 4).sum(axis=0)
    assert 3.5 < 2 * prompt / (chosen + rejected) <= 4.1


def test_lengths_double():
    longest = models.with_template(models.doubling(64, 1024))[:, :2].sum(axis=1)
    assert longest.tolist() == [64, 128, 256, 512, 1024]


def test_every_word_is_one_token_and_pairs_have_the_lengths_asked_for(tmp_path: Path):
    from benchmarks.workload import read_rows, split

    tokenizer = models.word_tokenizer(700)
    assert len(tokenizer) == 700
    rows = read_rows(models.write_pairs(tmp_path / "pairs.jsonl", 700, LENGTHS, 4))
    found = [[len(part) for part in split(tokenizer, row)] for row in rows]
    assert found == 2 * models.with_template(LENGTHS).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention


def tokens_of(pairs: list[TokenizedPair]) -> list[Tokens]:
    return [Tokens(*(part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected))) for pair in pairs]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_what_dsprefs_kernel_sees():
    pairs = random_pairs(LENGTHS)
    batch = collate(pairs, range(2), prefix_sharing=True)
    count, length = len(batch.input_ids), flex.rounded(len(batch.input_ids))
    q, k, v = (torch.randn(length, heads, 8) for heads in (4, 2, 2))
    mask = flex.prefix_mask(*flex.places(tokens_of(pairs), length)[:2])
    found = flex.attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask=mask)[0].transpose(0, 1)
    keys, values = (x[:count][batch.kv_index] for x in (k, v))
    expected = KERNELS["sdpa"].compute(q[:count], keys, values, Segments(batch, "sdpa"), Options(8**-0.5, 0.0, None, None))
    assert torch.allclose(found[:count], expected, atol=1e-5)


def test_flex_scores_the_same_tokens_at_the_same_places():
    pairs = random_pairs(LENGTHS)
    batch, packed = collate(pairs, range(2), prefix_sharing=True), flex.collate(tokens_of(pairs), 128, "cpu")
    count = len(batch.input_ids)
    assert torch.equal(packed.inputs["input_ids"][0, :count], batch.input_ids)
    assert torch.equal(packed.inputs["position_ids"][0, :count], batch.position_ids)
    assert torch.equal(packed.predictors, batch.predictor_index)
    assert torch.equal(packed.targets, batch.targets)
    assert torch.equal(packed.owners, batch.span_index)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [4, 6])
def test_flex_gives_a_model_the_log_probs_of_dspref(heads):
    sizes = {"num_attention_heads": heads, "hidden_size": 8 * heads, "num_key_value_heads": 2}
    config = tiny_config("qwen2", 99, **sizes)
    model, pairs = tiny_model(config, seed=1).eval(), random_pairs(LENGTHS)
    AttentionInterface.register(flex.NAME, flex.attention)
    with torch.no_grad():
        model.config._attn_implementation = PACKED
        batch = collate(pairs, range(2), prefix_sharing=True)
        tokens = PackedCausalLM(model, "sdpa")(batch)[0]
        model.config._attn_implementation = flex.NAME
        found = loop.logps(model, flex.collate(tokens_of(pairs), 128, "cpu"))
    expected = pair_logps(tokens, batch)
    assert torch.allclose(found, torch.cat([expected.chosen, expected.rejected]), atol=1e-4)


def test_flex_trains_as_the_padded_loop_does(tmp_path, monkeypatch):
    """With torch's own attention under the same mask: FlexAttention has no backward pass on a CPU."""

    def attend(q, k, v, mask, scale=None):
        dense = create_mask(mask.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale)

    monkeypatch.setattr(flex, "attend", attend)
    folder = models.model_folder(tmp_path, "1.5B", True, "cpu", "float32")
    data = models.write_pairs(tmp_path / "pairs.jsonl", 512, LENGTHS, 6)
    spec = Spec(model=str(folder), data=str(data), work=str(tmp_path), pairs_per_step=2, steps=3, learning_rate=1e-3)
    expected, (found, chosen) = padded.run(spec), flex.run(spec)
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.useful_tokens == expected.useful_tokens
    assert len(chosen) == len(found.seconds) == 3


def test_packs_are_multiples_of_a_block():
    assert [flex.rounded(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_attention_that_differs_is_refused():
    q = torch.randn(8, 2, 4, requires_grad=True)
    expected = [torch.ones(8, 2, 4)]
    with pytest.raises(ValueError, match="away"):
        parts.attention_kernel(lambda: lambda q, *_: 2 * q, [q], expected, "cpu", 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Time and targets


def test_what_is_slow_is_repeated_less_often():
    calls: list[int] = []
    assert len(repeat(lambda: calls.append(1), "cpu", warmups=5, steps=20, limit=0.0)) == 3
    assert len(calls) == 5
    assert len(repeat(lambda: calls.append(1), "cpu", warmups=5, steps=20)) == 20
    assert len(calls) == 30


def test_all_eight_fit_a_call_of_eight_minutes_in_the_order_of_what_is_asked_first():
    shares = driver.shares_of(driver.NAMES, 8)
    assert shares == {name: pytest.approx(share) for name, share in driver.SHARES.items()}
    assert driver.NAMES == ["G3", "G1", "G2", "G4", "G7", "G5", "G6", "G8"]
    assert list(driver.shares_of(["G5", "G1"], 8)) == ["preparation", "G1", "G5"]


def test_each_has_its_own_time_and_what_those_before_it_left():
    shares = driver.shares_of(["G1", "G5", "G8"], 10)
    planned = dict(zip(shares, accumulate(shares.values())))
    assert all(a < b for a, b in pairwise(planned.values())) and planned["G8"] == pytest.approx(600)
    for name in shares:
        on_time = planned[name] - shares[name]
        assert driver.deadline(name, on_time, shares) == pytest.approx(planned[name])
        assert driver.deadline(name, on_time / 2, shares) == pytest.approx(planned[name])
        assert driver.deadline(name, on_time + 9, shares) == pytest.approx(min(planned[name] + 9, 600))


def test_what_a_race_has_found_is_saved_after_each_variant(tmp_path: Path, monkeypatch):
    sizes, saved = tiny_sizes(tmp_path), []
    races_of_two = races.RACES["G2"]
    monkeypatch.setattr(races, "ask", lambda what, arguments, **_: {"variant": arguments["variant"]})
    lengths = races_of_two.lengths(sizes, races_of_two.pairs)
    made = {"model": "m", "data": "d"}
    races.trained(races_of_two, sizes, lengths, made, lambda: 60.0, lambda found: saved.append(list(found)))
    assert saved == [["dspref"], ["dspref", "TRL precompute"]]


def test_what_was_said_before_the_time_ended_counts():
    assert child.last_result('warning\n{"a": 1}\n{"a": 1, "b": 2}\n{"a": 1, "b"') == {"a": 1, "b": 2}
    assert child.last_result("warning\n") is None
    raw = {"flex 8": {"median_seconds": 3.0}, "torch_varlen 8": {"median_seconds": 2.0}, "flex 16": {"reason": "no kernel"}}
    found = [ratio(raw, f"flex {n}", f"torch_varlen {n}", "attention", "Flex") for n in (8, 16, 32)]
    assert [figure.value for figure in found] == [1.5, None, None]
    assert "no kernel" in str(found[1].reason) and "no time" in str(found[2].reason)


def test_a_benchmark_that_fails_is_one_line():
    def fails() -> dict[str, Any]:
        raise Failed("no GPU\nand more")

    def breaks() -> dict[str, Any]:
        raise KeyError("typo")

    assert driver.judged("G1", fails)["void"] == "no GPU"
    assert driver.judged("G1", breaks)["void"] == "KeyError: 'typo'"


def test_targets_are_judged_on_real_shapes_only():
    figures = [Figure("speed", 2.0, target=at_least(1.9)), Figure("memory", 2.0, target=at_most(0.6)), Figure("other", None)]
    assert [figure.record()["met"] for figure in figures] == [True, False, None]
    job = {"figures": [figure.record() for figure in figures]}
    assert [figure["met"] for figure in driver.judged("G1", lambda: job, tiny=True)["figures"]] == [None] * 3


RESULT = {
    "ended": "steps", "losses": [log(2), 0.7], "logps": [-100.0, -99.0], "seconds": [9.0, 1.0], "useful_tokens": [50, 50],
    "peak_bytes": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"ended": "memory"}, "lack of memory in step 3"),
        ({"useful_tokens": [49, 50]}, "49 useful tokens, not 50"),
        ({"losses": [0.72, 0.7]}, "first loss"),
        ({"losses": [log(2), 0.81]}, "differ from dspref's by 0.11 in step 2"),
        ({"losses": [log(2), 0.74]}, "mean loss differs from dspref's by 0.02"),
        ({"losses": [log(2), float("nan")]}, "differ"),
        ({"losses": [log(2)]}, "did 1 steps"),
        ({"logps": [-101.0, -99.0]}, "log-probs"),
    ],
)
def test_a_race_is_void_unless_all_do_the_same(change, why):
    found = races.fault(RESULT | change, RESULT, 50, log(2), races.TOLERANCES["bfloat16"])
    assert found is None if why is None else why in str(found)


def test_figures_of_a_race():
    found = {"dspref": RESULT, "TRL": RESULT | {"seconds": [9.0, 3.0], "peak_bytes": 200}}
    assert races.claimed(races.Claim("TRL", at_least(2.0)), found, 1).value == 3.0
    assert races.claimed(races.Claim("TRL", at_most(0.6), "memory"), found, 1).value == 0.5
    assert "TRL all in bf16" not in races.variants_of(races.RACES["G1"], tiny_sizes(Path()))
    found["TRL"] = {"reason": "out of luck"}
    assert races.claimed(races.Claim("TRL", None), found, 1).reason == "TRL: out of luck"


def test_utilization_counts_what_is_useful_and_what_is_executed():
    made = {"flops": {"separate": 40.0, "shared": 30.0, "padded": 80.0}, "peak_flops": 100.0}
    values = {figure.what: figure.value for figure in races.absolute("TRL", RESULT, made, 1)}
    assert values["TRL: MFU, useful tokens"] == 40.0
    assert values["TRL: MFU, executed tokens"] == 80.0


@pytest.mark.parametrize(
    ("ours", "peer", "value", "why"),
    [
        ("memory", "memory", 2.0, None),
        ("time", "memory", 2.0, None),
        ("failure", "memory", 2.0, None),
        ("memory", "time", None, "until its time ended"),
        ("memory", "failure", None, "until it failed"),
        ("steps", "steps", None, "the longest tried"),
    ],
)
def test_the_longest_pair_is_compared_where_the_peers_memory_ends(ours, peer, value, why):
    found = {"dspref": {"ended": ours, "losses": [log(2)] * 3}, "TRL": {"ended": peer, "losses": [log(2)] * 2}}
    figure, *each = races.longest_figures(found, [8, 16, 32, 64], races.TOLERANCES["float32"])
    assert figure.value == value
    assert why is None or why in str(figure.reason)
    assert [figure.value for figure in each] == [32, 16]
    assert ("at least" in figure.what) == (ours != "memory" and peer == "memory")


def test_what_ends_for_lack_of_memory_is_told_from_what_fails():
    def raises(error: Exception) -> Callable[[], None]:
        def job() -> None:
            raise error

        return job

    assert train.until_memory_ends(lambda: None) == "steps"
    assert train.until_memory_ends(raises(torch.OutOfMemoryError("CUDA out of memory"))) == "memory"
    assert train.until_memory_ends(raises(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))) == "memory"
    with pytest.raises(RuntimeError, match="illegal"):
        train.until_memory_ends(raises(RuntimeError("illegal memory access")))


def test_no_step_at_all_is_no_length():
    found = {"dspref": {"ended": "memory", "losses": []}, "TRL": {"reason": "it is not here"}}
    figures = races.longest_figures(found, [8], races.TOLERANCES["float32"])
    assert [figure.value for figure in figures] == [None] * 3
    assert all(figure.reason for figure in figures)


def test_every_race_leaves_room_for_its_pairs(tmp_path: Path):
    for sizes in (Sizes(tmp_path), tiny_sizes(tmp_path)):
        for name, race in races.RACES.items():
            lengths = race.lengths(sizes, race.pairs)
            spec = races.spec_of(sizes, race, lengths, {"model": "m", "data": "d"})
            seen = models.with_template(lengths)
            assert spec.max_length == (seen[:, 0] + seen[:, 1:].max(axis=1)).max()
            assert races.wish(sizes, name)["count"] == spec.steps * spec.pairs_per_step


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_eight_run_on_tiny_shapes(tmp_path: Path):
    pytest.importorskip("trl", reason="TRL is the peer of the races; it comes with dspref[bench]")
    out = tmp_path / "gpu.json"
    options = ["--tiny", "--minutes", "25", "--work", str(tmp_path), "--out", str(out)]  # however slow this machine is
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text(), parse_constant=lambda name: {"NaN": inf}[name])
    by_id = {benchmark["id"]: benchmark for benchmark in result["benchmarks"]}
    assert sorted(by_id) == [f"G{k}" for k in range(1, 9)]
    for name, benchmark in by_id.items():
        assert benchmark["void"] is None, (name, benchmark["void"])
        assert benchmark["figures"] and benchmark["raw"]
        for figure in benchmark["figures"]:
            assert (figure["value"] is None) == bool(figure["reason"]), (name, figure)
            assert figure["met"] is None
            assert "\n" not in (figure["reason"] or "")
    for name in ("G1", "G2", "G7"):  # against TRL, which is here
        assert all(figure["value"] > 0 for figure in by_id[name]["figures"] if figure["peer"]), name
    assert {"hardware", "versions", "date", "minutes"} <= result.keys()

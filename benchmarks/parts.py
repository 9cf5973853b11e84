"""Benchmarks that are no race of whole runs: attention, planning, lookups, tokenizing, start-up.

Each is a plain function `Setup -> (figures, raw numbers)`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.processes import Failed, cpu_seconds, measure
from benchmarks.races import OBJECTIVES, Setup, Target, at_least, at_most
from benchmarks.workload import MULTI_TURN, SEED, SINGLE_TURN, Spec, invented_file, model_folder, ultrafeedback_lengths


@dataclass(frozen=True)
class Figure:
    """A measured value, with what it is measured against."""

    what: str
    value: float
    target: Target | None
    unit: str = "x"
    peer: str = ""


Outcome = tuple[list[Figure], dict[str, Any]]


def least(rounds: int, job: Callable[[], Any]) -> float:
    """The least CPU seconds that `job` took in so many rounds, after one that does not count."""
    job()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        job()
        spent.append(time.process_time() - start)
    return min(spent)


# ---------------------------------------------------------------------------------------------------------------------
# B9: attention is linear in the length of a pack

HEADS, KV_HEADS, HEAD_SIZE = 8, 4, 32
LENGTHS = (512, 384, 320, 256, 224, 160, 128, 64)  # 2,048 tokens


def attention(setup: Setup) -> Outcome:
    """Forward and backward of the packed attention against right-padded rows, for one, two and four times `LENGTHS`."""
    import torch

    torch.set_num_threads(1)
    packed, padded, dense = [], [], []
    for times in (1, 2, 4):
        lengths = LENGTHS * times
        packed.append(least(setup.rounds, _packed(lengths)))
        padded.append(least(setup.rounds, _padded(lengths)))
        dense.append(least(1, _dense(lengths)))
    growth, dense_growth = (max(b / a for a, b in pairwise(costs)) for costs in (packed, dense))
    figures = [
        Figure("attention, cost of twice the tokens", growth, at_most(2.4)),
        Figure("attention, cost of twice the tokens by dense mask", dense_growth, None),
        Figure("attention, packed over padded at its worst", max(a / b for a, b in zip(packed, padded)), at_most(1.0)),
        Figure("attention of 8,192 tokens", dense[-1] / packed[-1], None, peer="dense mask"),
    ]
    return figures, {"tokens": [2048, 4096, 8192], "packed": packed, "padded": padded, "dense": dense}


def _packed(lengths: Sequence[int]) -> Callable[[], None]:
    from dspref.data.batch import collate
    from dspref.data.truncate import TokenizedPair
    from dspref.model.attention import KERNELS, Options, Segments

    prompt = np.zeros(16, dtype=np.int32)
    answers = [np.zeros(length - len(prompt), dtype=np.int32) for length in lengths]
    pairs = [TokenizedPair(prompt, *two) for two in zip(answers[::2], answers[1::2])]
    segments = Segments(collate(pairs, range(len(pairs)), prefix_sharing=False), "sdpa")
    options = Options(HEAD_SIZE**-0.5, 0.0, None, None)
    q, k, v = (_random(sum(lengths), heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return lambda: KERNELS["sdpa"].compute(q, k, v, segments, options).sum().backward()


def _padded(lengths: Sequence[int]) -> Callable[[], None]:
    shape = (len(lengths), HEADS, max(lengths), HEAD_SIZE)
    return _sdpa(shape, is_causal=True)


def _dense(lengths: Sequence[int]) -> Callable[[], None]:
    import torch

    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    return _sdpa((1, HEADS, sum(lengths), HEAD_SIZE), attn_mask=torch.block_diag(*blocks).bool())


def _sdpa(shape: tuple[int, ...], **options: Any) -> Callable[[], None]:
    import torch

    q, k, v = (_random(*shape) for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).sum().backward()


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), requires_grad=True)


# ---------------------------------------------------------------------------------------------------------------------
# B10: a step costs a constant, and so much per pair


def global_batch(setup: Setup) -> Outcome:
    """Real runs with 8 to 128 pairs per step; eight lengths recur, so that every eight pairs cost the same."""
    model = model_folder("small", setup.work, setup.data)
    lengths = [(8, 40, 24), (16, 24, 56), (32, 64, 48), (12, 96, 40), (48, 32, 80), (24, 56, 56), (20, 72, 32), (40, 48, 64)]
    sizes = (8, 16, 32, 64, 128)
    run = Spec(str(model), str(invented_file(model, 128 * setup.steps, lengths)), str(setup.work), steps=setup.steps)
    specs = [replace(run, pairs_per_step=size, reference="none", objective=OBJECTIVES["SimPO"]) for size in sizes]
    rounds = [[measure("dspref_run", spec)["cpu_seconds"][1:] for spec in specs] for _ in range(setup.rounds)]
    costs = np.min(rounds, axis=(0, 2)).tolist()
    # Relative deviations count: each cost is one after division by itself.
    design = np.stack([1 / np.array(costs), np.array(sizes) / np.array(costs)], axis=1)
    (constant, per_pair), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
    deviation = float(np.abs(design @ (constant, per_pair) - 1).max())
    figures = [
        Figure("step of 8 to 128 pairs: off a constant + so much per pair", 100 * deviation, at_most(5.0), " %"),
        Figure("the constant's share of a step of 128 pairs", 100 * float(constant) / costs[-1], None, " %"),
    ]
    return figures, {"pairs": sizes, "cpu_seconds": costs, "constant": float(constant), "per_pair": float(per_pair)}


# ---------------------------------------------------------------------------------------------------------------------
# B11: work of ranks is even

RANKS, TOKENS_PER_PACK, BATCHES = 8, 16_384, 100


def balance(setup: Setup) -> Outcome:
    """`plan.pack` on lengths like UltraFeedback's for eight ranks, against pairs dealt out as they come; the worst size."""
    from dspref.data.plan import pack

    raw = {}
    for pairs in (32, 64, 128):
        drawn = [shared_tokens(ultrafeedback_lengths(pairs, seed)) for seed in range(BATCHES)]
        start = time.process_time()
        plans = [pack(lengths, TOKENS_PER_PACK, RANKS) for lengths in drawn]
        rate = pairs * BATCHES / (time.process_time() - start)
        planned = np.concatenate([_loads(lengths, plan) for lengths, plan in zip(drawn, plans)])
        dealt = np.stack([lengths.reshape(RANKS, -1).sum(axis=1) for lengths in drawn])
        raw[pairs] = {"planned": _straggling(planned), "dealt out": _straggling(dealt), "pairs_per_second": rate}
    worst = {name: max(of_size[name] for of_size in raw.values()) for name in ("planned", "dealt out")}
    figures = [
        Figure("32 to 128 pairs on 8 ranks: busiest rank over the mean", worst["planned"], at_most(1.03)),
        Figure("the same, pairs dealt out as they come", worst["dealt out"], None),
        Figure("32 to 128 pairs on 8 ranks: fill", 100 / worst["planned"], at_least(97.0), " %"),
        Figure("planning", min(of_size["pairs_per_second"] for of_size in raw.values()), at_least(200_000), " pairs/s"),
    ]
    return figures, raw


def shared_tokens(lengths: np.ndarray) -> np.ndarray:
    from dspref.data.batch import computed_tokens

    return computed_tokens(lengths, prefix_sharing=True)


def _loads(lengths: np.ndarray, plan: list[list[np.ndarray]]) -> np.ndarray:
    """Tokens of each rank in each micro-step, [micro-steps, ranks]."""
    return np.array([[lengths[members].sum() for members in rank] for rank in plan]).T


def _straggling(loads: np.ndarray) -> float:
    """Tokens of the busiest rank over those of the mean rank, summed over micro-steps: all wait for the busiest."""
    return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())


# ---------------------------------------------------------------------------------------------------------------------
# B12: stored log-probs are found again (the pass that computes them is a race)

KNOWN_PAIRS = 20_000


def lookup(setup: Setup) -> Outcome:
    """What a later run pays for a reference that is stored: keys of its pairs, opening the store, finding the values."""
    from dspref.reference.store import BLOCK_PAIRS, KEY_BYTES, ReferenceStore, sequence_keys

    draws = np.random.default_rng(SEED)
    lengths = draws.integers(50, 500, 3 * KNOWN_PAIRS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draws.integers(0, 32_000, offsets[-1], dtype=np.int32)
    pairs: Any = SimpleNamespace(flat=lambda: (tokens, offsets), flat_mask=lambda: None)
    rows = np.arange(KNOWN_PAIRS)
    root = Path(tempfile.mkdtemp(dir=setup.work))
    try:
        store, size = ReferenceStore(root, {}), 2 * BLOCK_PAIRS
        keys = sequence_keys(pairs, rows).reshape(-1, KEY_BYTES)
        for start in range(0, len(keys), size):
            block = keys[start : start + size]
            store.append(block, np.ones((len(block), 2), np.float32), np.ones(len(block), np.int32))
        spent = least(setup.rounds, lambda: ReferenceStore(root, {}).look_up(sequence_keys(pairs, rows)))
        assert ReferenceStore(root, {}).look_up(keys)[1].all()
    finally:
        shutil.rmtree(root)
    per_100k = spent * 100_000 / KNOWN_PAIRS
    return [Figure("stored reference found again, 100,000 pairs", per_100k, at_most(1.0), " s")], {"cpu_seconds": spent}


# ---------------------------------------------------------------------------------------------------------------------
# B13: text becomes tokens


def tokenizing(setup: Setup) -> Outcome:
    """Wall seconds, since threads and processes count here, to tokenize all pairs of a file."""
    figures, raw = [], {}
    for source, title in ((SINGLE_TURN, "tokenizing, 2 cores"), (MULTI_TURN, "tokenizing many turns, 2 cores")):
        raw[source] = _tokenized(setup, setup.data / source)
        wall = {name: min(found["tokens_seconds"] for found in rounds) for name, rounds in raw[source]["rounds"].items()}
        own = wall.pop("dspref")
        figures += [Figure(title, seconds / own, at_least(3.0), peer=peer) for peer, seconds in wall.items()]
        figures.append(Figure(title, raw[source]["rows"] / own, None, " rows/s"))
    return figures, raw


def _tokenized(setup: Setup, path: Path) -> dict[str, Any]:
    rows = len(path.read_text(encoding="utf-8").splitlines())
    model = model_folder("A", setup.work, setup.data)
    run = Spec(str(model), str(path), str(setup.work), pairs_per_step=rows, steps=1, max_length=8192, reference="none")
    contenders = {
        "dspref": ("dspref_tokens", run),
        "TRL": ("trl_tokens", run),
        "TRL, 2 processes": ("trl_tokens", replace(run, workers=2)),
    }
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(setup.rounds):
        for name, (module, spec) in contenders.items():
            found = measure(module, spec, TOKENIZERS_PARALLELISM="true")
            raw[name].append(found["extra"] | {"useful_tokens": found["useful_tokens"][0]})
    if len({found["useful_tokens"] for rounds in raw.values() for found in rounds}) > 1:
        raise Failed("the contenders made other tokens of the same rows")
    return {"rows": rows, "rounds": raw}


# ---------------------------------------------------------------------------------------------------------------------
# B14: the command answers


def startup(setup: Setup) -> Outcome:
    """CPU seconds of commands that compute nothing."""
    quickstart = "launch/configs/quickstart.yaml"
    commands = {
        "dspref --help": (["dspref", "--help"], at_most(0.3)),
        "dspref check": (["dspref", "check", quickstart], at_most(1.0)),
        "deepspeed --help": (["deepspeed", "--help"], None),
        "trl --help": (["trl", "--help"], None),
    }
    scripts = Path(sys.executable).parent
    raw = {}
    for title, ((script, *arguments), _) in commands.items():
        raw[title] = [cpu_seconds([str(scripts / script), *arguments]) for _ in range(setup.rounds)]
    return [Figure(title, min(raw[title]), target, " s") for title, (_, target) in commands.items()], raw


# ---------------------------------------------------------------------------------------------------------------------
# B17: a checkpoint


def saving(setup: Setup) -> Outcome:
    """Wall seconds of a save, beside those of torch.save and a flush of as many bytes in the same folder."""
    model = model_folder("A", setup.work, setup.data)
    lengths = [(64, 128, 128)]
    run = Spec(str(model), str(invented_file(model, 64, lengths)), str(setup.work), steps=7, save_every=2, zero_stage=3)
    found, plain = [], []
    for _ in range(setup.rounds):
        found.append(measure("dspref_run", replace(run, reference="none", objective=OBJECTIVES["SimPO"]))["extra"])
        plain.append(_plainly_written(int(found[-1]["save_bytes"]), setup.work))
    whole, waited = (min(extra[f"save_{name}"] for extra in found) for name in ("seconds", "waited"))
    figures = [
        Figure("a save, begin to commit", whole / min(plain), at_most(1.25), peer="torch.save and fsync"),
        Figure("what training waits of a save", 100 * waited / whole, None, " %"),
    ]
    return figures, {"rounds": found, "plain_seconds": plain}


def _plainly_written(size: int, folder: Path) -> float:
    import torch

    with tempfile.TemporaryFile(dir=folder) as file:
        values = torch.ones(size // 4)
        start = time.perf_counter()
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start


PARTS: dict[str, Callable[[Setup], Outcome]] = {
    "B9": attention,
    "B10": global_batch,
    "B11": balance,
    "B12": lookup,
    "B13": tokenizing,
    "B14": startup,
    "B17": saving,
}

"""Reading, rendering and tokenizing all pairs of a file into an empty cache, beside another commit: the same ids.

    python -m benchmarks.tokens_beside --against ../a-checkout-of-another-commit --out benchmarks/results/tokens_beside.json

The commits take turns; wall seconds count, since threads do, and the least of the rounds is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.workload import MULTI_TURN, SINGLE_TURN

HERE = Path(__file__).resolve().parents[1]
# Runs in either commit: the older one has no `scored`, and scores everything behind the prompt.
CHILD = """
import hashlib, inspect, json, sys, time
from pathlib import Path
from dspref.data.sources import Source
from dspref.data.store import load_pairs
from dspref.data.tokenize import Limits, load_tokenizer
path, model, cache = sys.argv[1:]
tokenizer = load_tokenizer(model)
more = {"scored": "all"} if "scored" in inspect.signature(load_pairs).parameters else {}
began, cpu = time.perf_counter(), time.process_time()
how = {"on_bad_row": "error", "cache_dir": Path(cache), "log": lambda line: None, **more}
store = load_pairs([Source(path)], tokenizer, Limits(), **how)
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
digest = hashlib.sha256()
for i in range(len(store)):
    for ids in store[i][:3]:
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "pairs": len(store), "ids": digest.hexdigest()}))
"""


def tokenized(commit: Path, path: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", CHILD, str(path), str(tokenizer), cache]
        environment = {**os.environ, "PYTHONPATH": str(commit), "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, env=environment, cwd=cache, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="checkout of another commit")
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data")
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "shared" / "tokenizer" / "gpt2-chatml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    commits = {"this": HERE, "against": asked.against.resolve()}
    result: dict[str, Any] = {"cores": os.cpu_count(), "files": {}}
    for source in (SINGLE_TURN, MULTI_TURN):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commits}
        for _ in range(asked.rounds):
            for name, commit in commits.items():
                runs[name].append(tokenized(commit, asked.data / source, asked.tokenizer))
        if len({run["ids"] for of_commit in runs.values() for run in of_commit}) > 1:
            sys.exit(f"{source}: the commits made other ids of the same rows")
        least = {name: min(run["seconds"] for run in of_commit) for name, of_commit in runs.items()}
        rates = {name: runs[name][0]["pairs"] / seconds for name, seconds in least.items()}
        result["files"][source] = {"pairs_per_second": rates, "times": rates["this"] / rates["against"], "runs": runs}
        print(
            source,
            {name: round(rate) for name, rate in rates.items()},
            f"{rates['this'] / rates['against']:.2f}x",
            flush=True,
        )
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

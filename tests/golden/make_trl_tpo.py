"""What TRL's TPOTrainer computes in its first two steps, written to trl_tpo.json beside this file.

Run by hand, with TRL 1.16: `python tests/golden/make_trl_tpo.py`. Needs the extra `bench`, and `shared/` beside the
repository.

Real prompts with two pairs each: the first is the row's pair, and the chosen answer of the second its gold answer. Four
rows to a step, in file order, one micro-batch a step; float32 on the CPU, no dropout, AdamW at a constant learning rate.

The same numbers are computed a second time without TRL: unpadded forwards in float64, and the formulas written in this
file. The script stops where they differ by more than TOLERANCES. `nll` is what that second way says of the gold answers:
TRL logs no term of its loss apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from importlib.metadata import version
from typing import Any

import make_trl_first_step as first_step  # first: goes offline, and puts `tiny` on the path
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from make_trl_first_step import HERE, SHARED, exact_norm, score
from make_trl_unpaired import recording
from tiny import tiny_config, tiny_model, weights_digest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from triples import triple_rows
from trl.experimental.tpo import TPOConfig, TPOTrainer

FILE = HERE / "trl_tpo.json"
DATA = "data/alpacaeval_train.jsonl"
VERSION = "1.16.0"
MAX_TOKENS, STEP, STEPS, LEARNING_RATE, SEED = 160, 4, 2, 1e-3, 2
TOLERANCES = (3e-5, 1e-4)  # of the first and the second step, relative to max(1, |value|), float64 against TRL

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.01},
    "sigmoid_smoothed": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1, "tpo_alpha": 0.5},
    "sigmoid_text": {"loss_type": "sigmoid", "beta": 0.05, "tpo_alpha": 2.0, "kind": "text"},
    "hinge": {"loss_type": "hinge", "beta": 0.01},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "tpo_l": {"loss_type": "tpo-l", "beta": 0.01},
    "tpo_l_smoothed": {
        "loss_type": "tpo-l", "beta": 10.0, "tpo_l_gamma": 1.5, "label_smoothing": 0.2, "tpo_alpha": 0.25, "kind": "text"
    },
}  # fmt: skip
OF_DATA = {"kind": "chat"}  # the rest of a variant is the objective
DEFAULTS = {"label_smoothing": 0.0, "tpo_alpha": 1.0, "tpo_l_gamma": 0.5}

ANSWERS = ("chosen", "rejected", "reference")
Tokens = tuple[list[int], ...]  # prompt, and the three answers
Metrics = dict[str, float]


def split(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Tokens:
    """Each whole as one text, tokenized, and split where the first parts from the prompt; a text ends with the EOS token."""
    if isinstance(row["prompt"], str):
        texts = [row["prompt"]] + [row["prompt"] + row[name] + str(tokenizer.eos_token) for name in ANSWERS]
    else:
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + more, tokenize=False, add_generation_prompt=not more)
            for more in ([], *(row[name] for name in ANSWERS))
        ]
    prompt, *wholes = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    n = min(len(os.path.commonprefix([prompt, whole])) for whole in wholes)
    return (prompt[:n], *(whole[n:] for whole in wholes))


def choose(tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, Any]]) -> str:
    """The first rows, as `triple_rows` reads them, of different prompts, with three different answers; prompt and longest
    answer have at most MAX_TOKENS tokens."""
    found: list[str] = []
    used: list[Any] = []
    for number, pair in enumerate(pairs):
        if pair["prompt"] in used:
            continue
        for other in range(len(pairs)):
            if pairs[other]["prompt"] != pair["prompt"] or pairs[other]["chosen"] in (pair["chosen"], pair["rejected"]):
                continue
            (row,) = triple_rows(pairs, f"{number},{other}", "chat")
            prompt, *answers = split(tokenizer, row)
            if len(prompt) + max(map(len, answers)) <= MAX_TOKENS:
                found.append(f"{number},{other}")
                used.append(pair["prompt"])
                break
        if len(found) == STEP * STEPS:
            return " ".join(found)
    raise SystemExit(f"{DATA} has only {len(found)} such rows")


def policy_of(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny_model(tiny_config("qwen2", vocab_size=len(tokenizer)), SEED)


def run_trl(
    tokenizer: PreTrainedTokenizerBase, variant: dict[str, Any], rows: list[dict[str, Any]], tokens: list[Tokens]
) -> list[Metrics]:
    """The first steps of the trainer, each with all that it logs but the counts of tokens."""
    objective = {key: value for key, value in variant.items() if key not in OF_DATA}
    with tempfile.TemporaryDirectory() as folder:
        args = TPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=2048, optim="adamw_torch",
            per_device_train_batch_size=STEP, disable_dropout=True, learning_rate=LEARNING_RATE, weight_decay=0.0,
            lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=STEPS, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", **objective,
        )  # fmt: skip
        trainer = recording(TPOTrainer)(
            model=policy_of(tokenizer), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        for theirs, ours in zip(trainer.train_dataset, tokens, strict=True):
            assert tuple(theirs[f"{name}_ids"] for name in ("prompt", *ANSWERS)) == ours
        trainer.train()
    for recorded, logged in zip(trainer.recorded, trainer.state.log_history):
        for name, value in recorded.items():
            assert abs(value - logged[name]) <= 1e-3 * max(1.0, abs(logged[name])), (name, value, logged[name])
    return trainer.recorded


# ---------------------------------------------------------------------------------------------------------------------
# The same without TRL


def run_plain(tokenizer: PreTrainedTokenizerBase, variant: dict[str, Any], tokens: list[Tokens]) -> list[Metrics]:
    """The same steps in float64, one unpadded sequence at a time."""
    policy = policy_of(tokenizer).double()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps: list[Metrics] = []
    for first in range(0, STEP * STEPS, STEP):
        steps.append(plain_step(policy, DEFAULTS | variant, tokens[first : first + STEP]))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def preference(variant: dict[str, Any], margin: torch.Tensor) -> torch.Tensor:
    """The loss of a pair by the difference of its log-probs, sums or means."""
    beta, loss_type, smoothing = variant["beta"], variant["loss_type"], variant["label_smoothing"]
    if loss_type == "hinge":
        return (1 - beta * margin).clamp(min=0)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    x = beta * margin - (variant["tpo_l_gamma"] if loss_type == "tpo-l" else 0.0)
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def plain_step(policy: PreTrainedModel, variant: dict[str, Any], tokens: list[Tokens]) -> Metrics:
    """Metrics of one step by the formulas, with its gradients left in the policy."""
    beta, means = variant["beta"], variant["loss_type"] in ("ipo", "tpo-l")
    counts = {name: sum(len(row[number]) for row in tokens) for number, name in enumerate(ANSWERS, 1)}
    found: dict[str, float] = dict.fromkeys(("loss", "nll", "entropy", "mean_token_accuracy", "rewards/accuracies"), 0.0)
    found |= {f"{name}/{side}": 0.0 for name in ("rewards", "logps", "logits") for side in ANSWERS[:2]}
    for prompt, *answers in tokens:
        scored = dict(zip(ANSWERS, (score(policy, prompt, answer) for answer in answers)))
        of = {name: logps.mean() if means else logps.sum() for name, (logps, *_) in scored.items()}
        nll = -scored["reference"][0].sum() / counts["reference"]
        loss = preference(variant, of["chosen"] - of["rejected"]) / len(tokens) + variant["tpo_alpha"] * nll
        loss.backward()
        found["loss"] += loss.item()
        found["nll"] += nll.item()
        found["entropy"] += sum(entropy.sum().item() for _, _, entropy, _ in scored.values()) / sum(counts.values())
        found["mean_token_accuracy"] += scored["chosen"][3].sum().item() / counts["chosen"]
        found["rewards/accuracies"] += float(of["chosen"] > of["rejected"]) / len(tokens)
        for side in ANSWERS[:2]:
            found[f"rewards/{side}"] += beta * of[side].item() / len(tokens)
            found[f"logps/{side}"] += of[side].item() / len(tokens)
            found[f"logits/{side}"] += scored[side][1].sum().item() / counts[side]
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found | {"grad_norm": exact_norm(policy)}


def compare(name: str, theirs: list[Metrics], plain: list[Metrics]) -> None:
    for step, (found, expected, tolerance) in enumerate(zip(theirs, plain, TOLERANCES, strict=True), 1):
        print(f"{name}, step {step}")
        for metric, value in found.items():
            gap = value - expected[metric]
            print(f"    {metric:20} {value:16.8f} {gap:18.2e}")
            assert abs(gap) <= tolerance * max(1.0, abs(value)), metric
        assert expected.keys() - found.keys() == {"nll"}, expected.keys() - found.keys()


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    if trl.__version__ != VERSION:
        raise SystemExit(f"TRL is {trl.__version__}: run this with {VERSION}")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / first_step.TOKENIZER)
    pairs = [json.loads(line) for line in (SHARED / DATA).read_text(encoding="utf-8").splitlines()]
    numbers = choose(tokenizer, pairs)
    variants = {}
    for name, variant in VARIANTS.items():
        rows = triple_rows(pairs, numbers, (OF_DATA | variant)["kind"])
        tokens = [split(tokenizer, row) for row in rows]
        theirs, plain = run_trl(tokenizer, variant, rows, tokens), run_plain(tokenizer, variant, tokens)
        compare(name, theirs, plain)
        objective = {key: value for key, value in variant.items() if key not in OF_DATA}
        variants[name] = {key: (OF_DATA | variant)[key] for key in OF_DATA} | {"objective": objective, "steps": theirs}
        variants[name]["nll"] = [step["nll"] for step in plain]
    found = {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("trl", "transformers", "torch", "datasets", "accelerate", "numpy")},
        "data": {
            "file": f"shared/{DATA}",
            "sha256": hashlib.sha256((SHARED / DATA).read_bytes()).hexdigest(),
            "tokenizer": f"shared/{first_step.TOKENIZER}",
            "max_tokens": MAX_TOKENS,
        },
        "rows": numbers,
        "rows_per_step": STEP,
        "learning_rate": LEARNING_RATE,
        "model": {"family": "qwen2", "seed": SEED, "weights_sha256": weights_digest(policy_of(tokenizer))},
        "variants": variants,
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

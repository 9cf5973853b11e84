"""What TRL's DPOTrainer computes at its first step, written to trl_first_step.json beside this file.

Run by hand: `python tests/golden/make_trl_first_step.py`. Needs the extra `bench` (trl, datasets) and
`shared/` beside the repository. Sixteen real pairs, one batch, in file order; the policy and the reference
are two different tiny models, so that no term of the loss vanishes. Learning rate 0, float32, CPU.

Before it writes, the script computes the same numbers a second way, without TRL and without padding (one
forward per sequence, in float32 and in float64), prints the differences and stops if they are not small.

`grad_norm` is the norm of TRL's gradients summed in float64. `grad_norm_logged` is what TRL writes to its
log: torch sums it in float32 over millions of elements on the CPU, which costs it about 1e-4 of its value.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny import tiny_config, tiny_model, weights_digest  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

DATA = "data/alpacaeval_test.jsonl"
TOKENIZER = "tokenizer/gpt2-chatml"
PAIRS, MAX_TOKENS = 16, 400
POLICY_SEED, REFERENCE_SEED = 1, 2
BETA = 0.1
VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},  # dspref: rpo_alpha: 0.5
}
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "grad_norm",
)  # fmt: skip
TOLERANCE = 1e-5  # relative to max(1, |value|), float64 against TRL

Tokens = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


class RecordingTrainer(DPOTrainer):
    """DPOTrainer, unchanged, which also keeps what it computed before anything is rounded for the log."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.recorded = {name: values[-1] for name, values in self._metrics["train"].items()}
        self.recorded["loss"] = loss.item()
        return loss

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.recorded["grad_norm"] = exact_norm(model)
        return loss


def exact_norm(model: torch.nn.Module) -> float:
    """The norm of all gradients, summed in float64."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def split(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Tokens:
    """Render whole conversations to text, tokenize, and split at the common token prefix with the prompt."""

    def ids(messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(row["prompt"], add_generation_prompt=True)
    chosen, rejected = ids(row["prompt"] + row["chosen"]), ids(row["prompt"] + row["rejected"])
    n = min(len(os.path.commonprefix([prompt, answer])) for answer in (chosen, rejected))
    return prompt[:n], chosen[n:], rejected[n:]


def load_rows(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[dict[str, Any]], list[Tokens]]:
    """The first PAIRS rows whose prompt and longer answer have at most MAX_TOKENS tokens."""
    numbers, rows, tokens = [], [], []
    for number, line in enumerate((SHARED / DATA).read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        prompt, chosen, rejected = split(tokenizer, row)
        if len(prompt) + max(len(chosen), len(rejected)) <= MAX_TOKENS:
            numbers.append(number)
            rows.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
            tokens.append((prompt, chosen, rejected))
        if len(rows) == PAIRS:
            return numbers, rows, tokens
    raise SystemExit(f"{DATA} has only {len(rows)} pairs of at most {MAX_TOKENS} tokens")


def models(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PreTrainedModel]:
    config = tiny_config("qwen2", vocab_size=len(tokenizer))
    return tiny_model(config, POLICY_SEED), tiny_model(config, REFERENCE_SEED)


def run_trl(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    tokens: list[Tokens],
    variant: dict[str, Any],
) -> dict[str, float]:
    """One optimizer step of DPOTrainer at learning rate 0."""
    policy, reference = models(tokenizer)
    before = weights_digest(policy)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=BETA,
            max_length=2048, per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential",
            disable_dropout=True, learning_rate=0.0, weight_decay=0.0, max_grad_norm=1e9, max_steps=1,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **variant,
        )  # fmt: skip
        trainer = RecordingTrainer(
            model=policy,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        for theirs, ours in zip(trainer.train_dataset, tokens, strict=True):
            assert (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"]) == ours
        trainer.train()
    assert weights_digest(policy) == before, "learning rate 0 must leave the weights alone"
    logged = trainer.state.log_history[0]
    recorded = trainer.recorded | {"grad_norm_logged": logged["grad_norm"]}
    for name in METRICS:
        print(f"    {name:20} recorded {recorded[name]!r:24} log_history {logged[name]!r}")
        assert abs(recorded[name] - logged[name]) <= 1e-3 * max(1.0, abs(logged[name]))
    return {name: recorded[name] for name in (*METRICS, "grad_norm_logged", "num_tokens")}


def score(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, ...]:
    """Per-token log-probs of `answer` after `prompt` in one unpadded forward, each token's mean logit, its entropy, and
    whether it is the most likely one."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    targets = torch.tensor(answer)[:, None]
    logps, seen = logits.log_softmax(-1), logits.detach()
    hits = seen.argmax(-1) == targets[:, 0]
    return logps.gather(-1, targets)[:, 0], seen.mean(-1), -(logps * logps.exp()).detach().sum(-1), hits


def run_plain(
    tokenizer: PreTrainedTokenizerBase, tokens: list[Tokens], variant: dict[str, Any], dtype: torch.dtype
) -> dict[str, float]:
    """The same numbers from plain forwards in `dtype`, one sequence at a time; no TRL, no padding.

    Under float64, transformers still computes the norms' scales and the rotary angles in float32.
    """
    policy, reference = (model.to(dtype) for model in models(tokenizer))
    weights = dict(zip(variant["loss_type"], variant["loss_weights"], strict=True))
    chosen_tokens, rejected_tokens = (sum(len(pair[side]) for pair in tokens) for side in (1, 2))
    loss, found = 0.0, dict.fromkeys(METRICS, 0.0)
    for prompt, chosen, rejected in tokens:
        with torch.no_grad():
            reference_c, reference_r = (score(reference, prompt, answer)[0] for answer in (chosen, rejected))
        (policy_c, logits_c, entropy_c, hits), (policy_r, logits_r, entropy_r, _) = (
            score(policy, prompt, a) for a in (chosen, rejected)
        )
        reward_c = BETA * (policy_c.sum() - reference_c.sum())
        reward_r = BETA * (policy_r.sum() - reference_r.sum())
        term = weights["sigmoid"] * -F.logsigmoid(reward_c - reward_r) / PAIRS
        term = term - weights.get("sft", 0.0) * policy_c.sum() / chosen_tokens
        term.backward()
        loss += term.item()
        found["rewards/chosen"] += reward_c.item() / PAIRS
        found["rewards/rejected"] += reward_r.item() / PAIRS
        found["rewards/margins"] += (reward_c - reward_r).item() / PAIRS
        found["rewards/accuracies"] += float(reward_c > reward_r) / PAIRS
        found["logps/chosen"] += policy_c.sum().item() / PAIRS
        found["logps/rejected"] += policy_r.sum().item() / PAIRS
        found["entropy"] += (entropy_c.sum() + entropy_r.sum()).item() / (chosen_tokens + rejected_tokens)
        found["mean_token_accuracy"] += hits.sum().item() / chosen_tokens
        found["logits/chosen"] += logits_c.sum().item() / chosen_tokens
        found["logits/rejected"] += logits_r.sum().item() / rejected_tokens
    return found | {"loss": loss, "grad_norm": exact_norm(policy)}


def compare(trl: dict[str, float], plain32: dict[str, float], plain64: dict[str, float]) -> None:
    print(f"    {'':20} {'TRL':>16} {'TRL - plain fp32':>18} {'TRL - plain fp64':>18}")
    for name in METRICS:
        gap = trl[name] - plain64[name]
        print(f"    {name:20} {trl[name]:16.8f} {trl[name] - plain32[name]:18.2e} {gap:18.2e}")
        assert abs(gap) <= TOLERANCE * max(1.0, abs(trl[name])), name


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / TOKENIZER)
    numbers, rows, tokens = load_rows(tokenizer)
    last = {tokenizer.decode(answer[-2:]) for pair in tokens for answer in pair[1:]}
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in tokens)
    print(f"rows {numbers}, longest {longest} tokens; every answer ends with {last}")
    print("  note: TRL scores the newline that the template renders after <|im_end|>, and so does dspref")

    variants = {}
    for name, variant in VARIANTS.items():
        print(f"\n{name}: {variant}")
        found = run_trl(tokenizer, rows, tokens, variant)
        plain32, plain64 = (run_plain(tokenizer, tokens, variant, d) for d in (torch.float32, torch.float64))
        compare(found, plain32, plain64)
        variants[name] = variant | {"metrics": found}

    policy, reference = models(tokenizer)
    result = {
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("trl", "transformers", "torch", "datasets", "accelerate", "numpy")},
        "data": {
            "file": f"shared/{DATA}",
            "sha256": hashlib.sha256((SHARED / DATA).read_bytes()).hexdigest(),
            "tokenizer": f"shared/{TOKENIZER}",
            "max_tokens": MAX_TOKENS,
            "chosen_tokens": sum(len(chosen) for _, chosen, _ in tokens),
            "rejected_tokens": sum(len(rejected) for _, _, rejected in tokens),
        },
        "rows": numbers,
        "policy_seed": POLICY_SEED,
        "reference_seed": REFERENCE_SEED,
        "weights_sha256": {"policy": weights_digest(policy), "reference": weights_digest(reference)},
        "beta": BETA,
        "variants": variants,
    }
    text = json.dumps(result, indent=2)
    text = text.replace(json.dumps(numbers, indent=2).replace("\n", "\n  "), json.dumps(numbers))
    (HERE / "trl_first_step.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

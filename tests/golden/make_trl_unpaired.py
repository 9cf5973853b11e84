"""What TRL's KTOTrainer and BCOTrainer compute in their first two steps, written to trl_unpaired.json beside this file.

Run by hand, once per trainer, and what the other wrote stays: `python tests/golden/make_trl_unpaired.py` with TRL 1.16 for
KTO, and with TRL 1.13, the last that had one, for BCO. Needs the extra `bench` and `shared/` beside the repository.

Real prompts, with the preferred answer where the label is true and the other where it is false; eight to a step, in
file order, one micro-batch a step; float32 on the CPU, no dropout, AdamW at a constant learning rate. The policy and the
reference are two different tiny models, such that KTO's KL is above 0; with the two exchanged, it is clamped at 0.

The same numbers are computed a second time without TRL: unpadded forwards in float64, and the formulas written in this
file. The script stops where they differ by more than TOLERANCES; `kl_unclamped` is what that second way says of the KL
before it is clamped. TRL gives a prompt the answer of the row before it, be it of the same prompt, whose own answer then
passes for a mismatched one. Where rows of one prompt lie side by side, `specification` holds the numbers of the second way
with answers of other prompts only.

BCOTrainer tokenizes in its own way: it adds the EOS token to an answer that does not *end* with it, and a ChatML answer
ends with <|im_end|> and a newline, so that each gets a second <|im_end|>. In conversations it therefore gets the token ids
of KTOTrainer, so that the fixture is about the loss and nothing else. Its `logits/*` are sums over prompts and padding too,
and are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from importlib.metadata import version
from typing import Any
from unittest import mock

import make_trl_first_step as first_step  # first: goes offline, and puts `tiny` on the path
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from make_trl_first_step import HERE, SHARED, exact_norm, score
from tiny import tiny_config, tiny_model, weights_digest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from unpaired import unpaired_rows

FILE = HERE / "trl_unpaired.json"
DATA = "data/alpacaeval_train.jsonl"
VERSIONS = {"kto": "1.16.0", "bco": "1.13.0"}
MAX_TOKENS, STEP, STEPS, LEARNING_RATE = 160, 8, 2, 1e-3
SEEDS = {"one": 1, "two": 2}
TOLERANCES = (3e-5, 1e-4)  # of the first and the second step, relative to max(1, |value|), float64 against TRL
# Which answers of which pairs, as `unpaired_rows` reads it
ORDERS = {
    "mixed": "0+ 1+ 2- 3+ 4+ 5- 6+ 7- 8- 9+ 10- 11- 12+ 13- 14- 15+",
    "one_label_first": "0+ 1+ 2+ 3+ 4+ 5+ 6+ 7+ 8- 9+ 10- 11- 12+ 13- 14- 15+",
    "side_by_side": "0+ 0- 1+ 1- 2+ 2- 3+ 3- 4+ 4- 5+ 5- 6+ 6- 7+ 7-",
}

BCO: dict[str, Any] = {"trainer": "bco", "beta": 0.1}
KTO: dict[str, Any] = {"trainer": "kto", "loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
APO = KTO | {"loss_type": "apo_zero_unpaired"}
VARIANTS: dict[str, dict[str, Any]] = {
    "kto": KTO,
    "kto_desirable": KTO | {"desirable_weight": 1.33},
    "kto_undesirable": KTO | {"undesirable_weight": 0.75},
    "kto_exchanged": KTO | {"desirable_weight": 1.33, "undesirable_weight": 0.75, "policy": "one"},
    "kto_text": KTO | {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.75, "kind": "text"},
    "kto_text_exchanged": KTO | {"kind": "text", "policy": "one"},
    "kto_one_label_first": KTO | {"undesirable_weight": 0.75, "order": "one_label_first"},
    "kto_side_by_side": KTO | {"undesirable_weight": 0.75, "order": "side_by_side"},
    "apo_zero_unpaired": APO | {"undesirable_weight": 0.75},
    "apo_zero_unpaired_text": APO | {"beta": 0.3, "desirable_weight": 1.33, "kind": "text"},
    "bco": BCO,
    "bco_exchanged": BCO | {"policy": "one"},
    "bco_text": BCO | {"beta": 0.3, "kind": "text"},
    "bco_one_label_first": BCO | {"order": "one_label_first"},
}
OF_DATA = {"trainer": None, "kind": "chat", "order": "mixed", "policy": "two"}  # the rest of a variant is the objective

Tokens = tuple[list[int], list[int]]  # prompt, completion
Metrics = dict[str, float]


# ---------------------------------------------------------------------------------------------------------------------
# Data and models


def split(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Tokens:
    """The whole as one text, tokenized, and split where it parts from the prompt; a text ends with the EOS token."""
    if isinstance(row["prompt"], str):
        texts = [row["prompt"], row["prompt"] + row["completion"] + str(tokenizer.eos_token)]
    else:
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + more, tokenize=False, add_generation_prompt=not more)
            for more in ([], row["completion"])
        ]
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    n = len(os.path.commonprefix([prompt, whole]))
    return prompt[:n], whole[n:]


def load_pairs(tokenizer: PreTrainedTokenizerBase) -> dict[int, dict[str, Any]]:
    """The first pairs of the file with different prompts whose prompt and longer answer have at most MAX_TOKENS tokens, by
    row number."""
    pairs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate((SHARED / DATA).read_text(encoding="utf-8").splitlines()):
        pair = json.loads(line)
        prompt, chosen, rejected = first_step.split(tokenizer, pair)
        if len(prompt) + max(len(chosen), len(rejected)) <= MAX_TOKENS and pair["prompt"] not in [
            p["prompt"] for p in pairs.values()
        ]:
            pairs[number] = pair
        if len(pairs) == STEP * STEPS:
            return pairs
    raise SystemExit(f"{DATA} has only {len(pairs)} pairs of at most {MAX_TOKENS} tokens")


def rows_of(variant: dict[str, Any], pairs: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    about = OF_DATA | variant
    return unpaired_rows(list(pairs.values()), ORDERS[about["order"]], about["kind"])


def models(tokenizer: PreTrainedTokenizerBase, policy: str = "two") -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy and the reference, which is the other one."""
    config = tiny_config("qwen2", vocab_size=len(tokenizer))
    reference = next(name for name in SEEDS if name != policy)
    return tiny_model(config, SEEDS[policy]), tiny_model(config, SEEDS[reference])


# ---------------------------------------------------------------------------------------------------------------------
# TRL


def recording(base: Any) -> Any:
    """The trainer, unchanged, which also keeps what it computed in each step before anything is rounded for the log."""

    class Recording(base):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            found = self._metrics["train"] if hasattr(self, "_metrics") else averaged(self._stored_metrics["train"])
            found = {"loss": loss.item()} | {name: values[-1] for name, values in found.items() if name != "num_tokens"}
            self.recorded = [*getattr(self, "recorded", []), found]
            return loss

        def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            self.recorded[-1]["grad_norm"] = exact_norm(model)
            return loss

    return Recording


def averaged(stored: dict[str, list[float]]) -> dict[str, list[float]]:
    """What BCOTrainer logs, from the sums and counts of its last batch."""
    found = {"delta": stored["delta"]}
    for side in ("chosen", "rejected"):
        if f"count/{side}" in stored:
            for name in ("rewards", "logps"):
                found[f"{name}/{side}"] = [stored[f"{name}/{side}_sum"][-1] / stored[f"count/{side}"][-1]]
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = [found["rewards/chosen"][0] - found["rewards/rejected"][0]]
    return found


@contextlib.contextmanager
def tokens_of_kto(tokens: list[Tokens]) -> Any:
    """BCOTrainer with these token ids; what it would have had differs by a second EOS token, if at all."""
    from trl.experimental.bco import bco_trainer

    theirs, ours = bco_trainer._process_tokens, iter(tokens)

    def process(example: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        found, (prompt, completion) = theirs(example, **kwargs), next(ours)
        whole = prompt + completion
        assert found["prompt_input_ids"] == prompt
        assert found["completion_input_ids"] in (whole, [*whole, kwargs["tokenizer"].eos_token_id])
        return found | {
            "completion_input_ids": whole,
            "completion_attention_mask": [1] * len(whole),
            "completion_labels": [-100] * len(prompt) + completion,
        }

    with mock.patch.object(bco_trainer, "_process_tokens", process):
        yield


def run_trl(
    tokenizer: PreTrainedTokenizerBase, variant: dict[str, Any], rows: list[dict[str, Any]], tokens: list[Tokens]
) -> list[Metrics]:
    """The first steps of the trainer, each with all that it logs but the counts of tokens."""
    policy, reference = models(tokenizer, variant.get("policy", "two"))
    objective = {key: value for key, value in variant.items() if key not in OF_DATA}
    if variant["trainer"] == "bco":
        from trl.experimental.bco import BCOConfig as Config
        from trl.experimental.bco import BCOTrainer as Trainer

        patch: Any = tokens_of_kto(tokens)
    else:
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        objective, patch = objective | {"train_sampling_strategy": "sequential"}, contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, patch:
        args = Config(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=2048, optim="adamw_torch",
            per_device_train_batch_size=STEP, disable_dropout=True, learning_rate=LEARNING_RATE, weight_decay=0.0,
            lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=STEPS, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **objective,
        )  # fmt: skip
        trainer = recording(Trainer)(
            model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        if variant["trainer"] == "kto":
            for theirs, ours in zip(trainer.train_dataset, tokens, strict=True):
                assert (theirs["prompt_ids"], theirs["completion_ids"]) == ours
        trainer.train()
    for recorded, logged in zip(trainer.recorded, trainer.state.log_history):
        for name, value in recorded.items():
            assert abs(value - logged[name]) <= 1e-3 * max(1.0, abs(logged[name])), (name, value, logged[name])
    return trainer.recorded


# ---------------------------------------------------------------------------------------------------------------------
# The same without TRL


def run_plain(
    tokenizer: PreTrainedTokenizerBase, variant: dict[str, Any], tokens: list[Tokens], of_others: bool
) -> list[Metrics]:
    """The same steps in float64, one unpadded sequence at a time. `of_others`: no prompt is given an answer to itself."""
    policy, reference = (model.double() for model in models(tokenizer, variant.get("policy", "two")))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    labels = [answer.endswith("+") for answer in ORDERS[(OF_DATA | variant)["order"]].split()]
    steps: list[Metrics] = []
    rewards_so_far: list[float] = []
    for first in range(0, STEP * STEPS, STEP):
        own = slice(first, first + STEP)
        others = mismatched(tokens[own], of_others) if variant.get("loss_type") == "kto" else []
        steps.append(plain_step(policy, reference, variant, tokens[own], others, labels[own], rewards_so_far))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def mismatched(tokens: list[Tokens], of_others: bool) -> list[Tokens]:
    """Every prompt with the completion of the row before it, the first with that of the last; `of_others`: rows are ordered
    by prompts, and look back over as many as the most frequent prompt has."""
    prompts = [tuple(prompt) for prompt, _ in tokens]
    line = sorted(range(len(tokens)), key=lambda i: prompts.index(prompts[i])) if of_others else [*range(len(tokens))]
    back = max(map(prompts.count, prompts)) if of_others else 1
    return [(tokens[i][0], tokens[line[line.index(i) - back]][1]) for i in range(len(tokens))]


def plain_step(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    variant: dict[str, Any],
    tokens: list[Tokens],
    others: list[Tokens],
    labels: list[bool],
    rewards_so_far: list[float],
) -> Metrics:
    """Metrics of one step by the formulas, with its gradients left in the policy."""
    beta = variant["beta"]
    with torch.no_grad():
        gaps = [(score(policy, *ids)[0].sum() - score(reference, *ids)[0].sum()).item() for ids in others]
        rewards = [beta * (score(policy, *ids)[0].sum() - score(reference, *ids)[0].sum()).item() for ids in tokens]
    unclamped = sum(gaps) / len(tokens)
    kl = max(0.0, unclamped)
    rewards_so_far += rewards
    delta = sum(rewards_so_far) / len(rewards_so_far)  # this step's are among them
    found = {"loss": 0.0} | ({"delta": delta} if variant["trainer"] == "bco" else {"kl": kl, "kl_unclamped": unclamped})
    sums: dict[str, float] = dict.fromkeys(("rewards", "logps", "logits", "tokens", "entropy"), 0.0)
    of = {label: dict(sums) for label in (True, False)}
    for ids, label in zip(tokens, labels, strict=True):
        logps, logits, entropy, _ = score(policy, *ids)
        with torch.no_grad():
            reward = -beta * score(reference, *ids)[0].sum()
        reward = reward + beta * logps.sum()
        sign = 1 if label else -1
        if variant["trainer"] == "bco":
            term = -F.logsigmoid(sign * (reward - delta))
        else:
            term = variant["desirable_weight" if label else "undesirable_weight"] * torch.sigmoid(
                -sign * (reward - beta * kl)
            )
        (term / len(tokens)).backward()
        found["loss"] += term.item() / len(tokens)
        more = {"rewards": reward, "logps": logps.sum(), "logits": logits.sum(), "entropy": entropy.sum()}
        for name, value in more.items():
            of[label][name] += value.item()
        of[label]["tokens"] += len(ids[1])
    for label, side in ((True, "chosen"), (False, "rejected")):
        if count := labels.count(label):
            found |= {f"{name}/{side}": of[label][name] / count for name in ("rewards", "logps")}
            found[f"logits/{side}"] = of[label]["logits"] / of[label]["tokens"]
    if len(set(labels)) == 2:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    found["entropy"] = sum(part["entropy"] for part in of.values()) / sum(part["tokens"] for part in of.values())
    return found | {"grad_norm": exact_norm(policy)}


def compare(name: str, theirs: list[Metrics], plain: list[Metrics]) -> None:
    for step, (found, expected, tolerance) in enumerate(zip(theirs, plain, TOLERANCES, strict=True), 1):
        print(f"{name}, step {step}; kl before it is clamped: {expected.get('kl_unclamped')}")
        for metric, value in found.items():
            gap = value - expected[metric]
            print(f"    {metric:20} {value:16.8f} {gap:18.2e}")
            assert abs(gap) <= tolerance * max(1.0, abs(value)), metric
        without = (
            set() if name.startswith("kto") or name.startswith("apo") else {"logits/chosen", "logits/rejected", "entropy"}
        )
        assert expected.keys() - found.keys() <= without | {"kl_unclamped"}, expected.keys() - found.keys()


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    trainer = next((name for name, of in VERSIONS.items() if of == trl.__version__), None)
    if trainer is None:
        raise SystemExit(f"TRL is {trl.__version__}: run this with one of {VERSIONS}")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / first_step.TOKENIZER)
    pairs = load_pairs(tokenizer)
    variants = {}
    for name, variant in VARIANTS.items():
        if variant["trainer"] == trainer:
            rows = rows_of(variant, pairs)
            tokens = [split(tokenizer, row) for row in rows]
            theirs, plain = run_trl(tokenizer, variant, rows, tokens), run_plain(tokenizer, variant, tokens, False)
            compare(name, theirs, plain)
            clamps = variant.get("loss_type") == "kto"
            unclamped = {"kl_unclamped": [step["kl_unclamped"] for step in plain]} if clamps else {}
            objective = {key: value for key, value in variant.items() if key not in OF_DATA}
            variants[name] = OF_DATA | {k: v for k, v in variant.items() if k in OF_DATA} | {"objective": objective}
            variants[name] |= unclamped | {"steps": theirs}
            if variant.get("order") == "side_by_side":
                variants[name]["specification"] = run_plain(tokenizer, variant, tokens, True)
    write(tokenizer, list(pairs), trainer, variants)


def write(tokenizer: PreTrainedTokenizerBase, numbers: list[int], trainer: str, variants: dict[str, Any]) -> None:
    """The file anew, with what it holds of the other trainer."""
    head = {
        "data": {
            "file": f"shared/{DATA}",
            "sha256": hashlib.sha256((SHARED / DATA).read_bytes()).hexdigest(),
            "tokenizer": f"shared/{first_step.TOKENIZER}",
            "max_tokens": MAX_TOKENS,
        },
        "rows": " ".join(map(str, numbers)),
        "orders": ORDERS,
        "examples_per_step": STEP,
        "learning_rate": LEARNING_RATE,
        "models": {
            name: {"family": "qwen2", "seed": seed, "weights_sha256": weights_digest(models(tokenizer, name)[0])}
            for name, seed in SEEDS.items()
        },
    }
    versions = {"python": platform.python_version()}
    versions |= {p: version(p) for p in ("trl", "transformers", "torch", "datasets", "accelerate", "numpy")}
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if any(old.get(key) != value for key, value in head.items()):
        old = {}
    kept = {name: old[name] for name in VERSIONS if name in old}
    found = kept | {trainer: {"versions": versions, "variants": variants}}
    text = json.dumps(head | {name: found[name] for name in VERSIONS if name in found}, indent=1)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Mixture-of-experts models end to end: the routers' loss and its gradients are the oracle's, in any layout that it may see.

The oracle is float64, runs one unpadded sequence at a time and weighs experts over whichever sequences it is told to.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_layout_invariance import assert_same_gradients
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, rows_that_share, save_tiny, save_tokenizer, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from workers import Workers

from dspref.data.batch import computed_tokens
from dspref.data.plan import alone, group, pack

PAIRS, HELD_OUT = 11, 7  # on two ranks, one pair per pack: one rank ends with a filler
COEFFICIENT = 0.7  # so large that a wrong gradient of the routers' loss shows in every parameter
EXPERTS, TOP_K = 8, 2
NAMED = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**NAMED, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    # A dense layer, then one with a shared expert beside the routed ones.
    "qwen2_moe": {**NAMED, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
}
DPO = {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.4}
AOT = {"name": "dpo", "loss_type": "aot", "beta": 0.3}
SIMPO = {"name": "simpo", "beta": 2.5}
KTO = {"name": "kto", "beta": 0.3}


# -------------------------------------------------------------------------------------------------------------- files


def leaning_model(family: str, vocabulary: int, seed: int) -> PreTrainedModel:
    """Routers that have preferences: with weights as small as the others', every expert would be as likely."""
    lm = tiny_model(tiny_config(family, vocabulary, **FAMILIES[family]), seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("gate.weight"):
                parameter *= 6
    return lm


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, **changes: Any) -> Path:
    """A config that trains on all pairs in one step."""
    values = {
        "model": {
            "name_or_path": f"{folder}/policy",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
            "router_aux_loss_coef": COEFFICIENT,
        },
        "reference": {"mode": "engine", "name_or_path": f"{folder}/reference"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "shuffle": False},
        "objective": DPO,
        "train": {"pairs_per_step": PAIRS, "max_steps": 1, "max_grad_norm": 0},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run_file(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    vocabulary = save_tokenizer(folder / "tokenizer")
    for name, seed in (("policy", 1), ("reference", 2)):
        leaning_model(family, vocabulary, seed).save_pretrained(folder / name)
    write_rows(folder / "pairs.jsonl", rows_that_share(PAIRS, seed=6))
    write_rows(folder / "held_out.jsonl", preference_rows(HELD_OUT, seed=4))
    return write_run(folder)


# -------------------------------------------------------------------------------------------------------------- oracle


class Listener:
    """A model that remembers what its routers said: [layer] of [tokens, experts] for each sequence."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.heard: list[tuple[Tensor, ...]] = []

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        said: Any = self.lm(input_ids=input_ids, use_cache=False, output_router_logits=True)
        self.heard.append(said.router_logits)
        return SimpleNamespace(logits=said.logits)


def balance(heard: list[tuple[Tensor, ...]]) -> Tensor:
    """transformers' load_balancing_loss_func over some sequences together, in float64."""
    together = tuple(torch.cat(layer) for layer in zip(*heard, strict=True))
    chances = torch.cat([layer.double().softmax(dim=-1) for layer in together])
    best = chances.topk(TOP_K + 1, dim=-1).values
    assert (best[:, -2] - best[:, -1]).min() > 1e-6, "in float32 another expert might be chosen: take another seed"
    chosen = chances.topk(TOP_K, dim=-1).indices
    fractions = torch.bincount(chosen.flatten(), minlength=EXPERTS) / len(chances)
    value = EXPERTS * (fractions * chances.mean(dim=0)).sum()
    theirs: Any = load_balancing_loss_func(together, EXPERTS, TOP_K)
    assert math.isclose(value.item(), theirs.item(), rel_tol=1e-6)
    return value


class Oracle:
    """A step over the pairs of a file, forward by forward."""

    def __init__(
        self, folder: Path, policy: str | Path = "policy", rows: str = "pairs.jsonl", reference: str = "reference"
    ) -> None:
        load = AutoModelForCausalLM.from_pretrained
        by_the_book: Any = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}
        lm, base = (load(folder / name, **by_the_book) for name in (policy, reference))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        lines = (folder / rows).read_text().splitlines()
        self.pairs = [oracle.render(json.loads(line), tokenizer) for line in lines]
        self.lengths = np.array([[len(part) for part in pair] for pair in self.pairs])
        contents = [[str(prompt), str(prompt + chosen), str(prompt + rejected)] for prompt, chosen, rejected in self.pairs]
        self.same = np.unique(contents, return_inverse=True)[1].reshape(-1, 3)
        self.parameters = dict(lm.named_parameters())
        ears = Listener(lm)
        self.ours = oracle.score_pairs(ears, self.pairs)  # type: ignore[arg-type]
        self.heard = [ears.heard[i : i + 2] for i in range(0, len(ears.heard), 2)]
        with torch.no_grad():
            self.theirs = oracle.score_pairs(base, self.pairs)
        self.step = cache(self.step)
        self.point = cache(lambda: oracle.reference_point(lm, base, self.pairs))

    def step(self, objective: str, packs: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
        """Loss, routers' loss and gradients, where the load is that of the pairs in each of `packs` in turn."""
        tokens = self.lengths.sum(axis=1) + self.lengths[:, 0]
        means = [balance([heard for i in members for heard in self.heard[i]]) for members in packs]
        aux = sum(mean * float(tokens[list(members)].sum()) for mean, members in zip(means, packs)) / tokens.sum()
        asked = json.loads(objective)
        found = oracle.loss_of_scores(self.ours, self.theirs, asked, point=self.point() if asked["name"] == "kto" else None)
        loss = found["loss"] + COEFFICIENT * aux
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), retain_graph=True, allow_unused=True)
        told = {name: 0 * p if g is None else g for (name, p), g in zip(self.parameters.items(), gradients)}
        return {
            "loss": loss.item(),
            "aux_loss": aux.item(),
            "gradients": {name: gradient.detach().numpy() for name, gradient in told.items()},
        }

    def of_step(self, objective: dict[str, Any]) -> dict[str, Any]:
        return self.step(json.dumps(objective), (tuple(range(len(self.pairs))),))

    def of_micro_steps(self, objective: dict[str, Any], budget: int, sharing: bool, world: int) -> dict[str, Any]:
        groups = group(self.same, self.lengths, budget) if sharing else alone(self.lengths)
        by_rank = pack(groups.tokens, budget, world, groups.cost)
        together = tuple(
            tuple(np.flatnonzero(np.isin(groups.of_pair, np.concatenate(members))).tolist()) for members in zip(*by_rank)
        )
        return self.step(json.dumps(objective), together)

    def load(self) -> dict[str, float]:
        """Per layer, the busiest and the idlest expert over the mean of all."""
        told = {}
        for k, layer in enumerate(zip(*(heard for pair in self.heard for heard in pair))):
            chosen = torch.cat(layer).topk(TOP_K).indices.flatten()
            relative = torch.bincount(chosen, minlength=EXPERTS) * EXPERTS / len(chosen)
            told |= {f"expert_load/max_{k}": relative.max().item(), f"expert_load/min_{k}": relative.min().item()}
        return told


@pytest.fixture(scope="module")
def book(run_file: Path) -> Oracle:
    return Oracle(run_file.parent)


# ---------------------------------------------------------------------------------------------------------- one step

# (tokens per pack, ZeRO stage, sharing, checkpointing): all pairs of values occur. One pair per pack, a few packs, one pack.
LAYOUTS = [
    (1, 3, True, True),
    (1, 1, False, False),
    (300, 3, False, True),
    (300, 1, True, False),
    (100_000, 3, True, False),
    (100_000, 1, False, True),
]


def layout(scope: str, budget: int, stage: int, sharing: bool, recompute: bool) -> list[str]:
    return [
        f"model.router_aux_scope={scope}",
        f"data.tokens_per_pack={budget}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"data.prefix_sharing={str(sharing).lower()}",
        f"model.gradient_checkpointing={str(recompute).lower()}",
    ]


def cases(family: str, book: Oracle, world: int) -> list[tuple[list[str], dict[str, Any]]]:
    """(overrides, what the oracle says) of all steps that run on so many ranks: all of them for one family."""
    layouts, whole = LAYOUTS if family == "qwen3_moe" else LAYOUTS[world::3], book.of_step(DPO)
    steps = [(layout("step", *rest), whole) for rest in layouts]
    for budget, stage, sharing, recompute in layouts[world % 2 :: 2]:
        told = book.of_micro_steps(DPO, budget, sharing, world)
        assert (told["aux_loss"] == whole["aux_loss"]) == (budget == 100_000), "packs that all run at once are the step"
        steps.append((layout("micro", budget, stage, sharing, recompute), told))
    if family == "qwen3_moe":
        engine = "reference.mode=engine"
        for objective, reference in ((AOT, engine), (KTO, engine), (SIMPO, "reference={mode: auto}")):
            overrides = [*layout("step", 300, 3, True, True), f"objective={json.dumps(objective)}", reference]
            steps.append((overrides, book.of_step(objective)))
    return steps


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_loss_and_gradients_are_those_of_the_oracle(world, family, run_file, book, all_workers):
    """Scope `step` in every layout, with a coupled objective and one without a reference; scope `micro` as packs fall."""
    workers, steps = all_workers[world], cases(family, book, world)
    workers.run("cases:first_steps", config_path=str(run_file), variants=[])
    workers.run("gc:freeze")  # else ZeRO-3 walks all that the imports made whenever an engine starts
    ranks = workers.run("cases:first_steps", config_path=str(run_file), variants=[overrides for overrides, _ in steps])
    for (overrides, told), found, *others in zip(steps, *ranks, strict=True):
        for name in ("loss", "aux_loss"):
            assert math.isclose(found[name], told[name], rel_tol=1e-5), (overrides, name, found[name], told[name])
        assert_same_gradients(found["gradients"], told["gradients"], overrides)
        assert load_of(found) == pytest.approx(book.load()), overrides
        for other in others:
            assert {n: x for n, x in other.items() if n != "gradients"} == {
                n: x for n, x in found.items() if n != "gradients"
            }


def load_of(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(f"{prefix}expert_load/")}


def test_the_oracle_tells_right_from_nearly_right(book):
    """Prompts that count once, packs that count alike: either would be off by more than the tolerance above."""
    whole, by_pair = book.of_step(DPO)["aux_loss"], book.of_micro_steps(DPO, 1, True, 1)["aux_loss"]
    assert whole > 2.2, "routers without preferences would show nothing"
    sides = [(pair[0], *heard) for pair, heard in zip(book.pairs, book.heard)]
    once = [part for prompt, won, lost in sides for part in (won, tuple(layer[len(prompt) :] for layer in lost))]
    alike = sum(balance(heard).item() for heard in book.heard) / PAIRS
    assert not math.isclose(balance(once).item(), whole, rel_tol=1e-4)
    assert not math.isclose(alike, by_pair, rel_tol=1e-4)
    assert not math.isclose(whole, by_pair, rel_tol=1e-2)


def test_a_reference_without_experts_serves_a_policy_that_has_them(tmp_path, all_workers):
    """What the config says of routers and of training is the policy's alone."""
    vocabulary = save_tokenizer(tmp_path / "tokenizer")
    leaning_model("mixtral", vocabulary, seed=1).save_pretrained(tmp_path / "policy")
    save_tiny(tmp_path / "reference", tiny_config("qwen2", vocabulary), seed=2)
    write_rows(tmp_path / "pairs.jsonl", preference_rows(PAIRS, seed=3))
    [found] = all_workers[1].run("cases:first_steps", config_path=str(write_run(tmp_path)), variants=[[]])[0]
    told = Oracle(tmp_path).of_step(DPO)
    assert found["loss"] == pytest.approx(told["loss"], rel=1e-5)
    assert_same_gradients(found["gradients"], told["gradients"], "dense reference")


# ------------------------------------------------------------------------------------------------- experts of one rank

LEFT, RIGHT = "abcd", "mnop"  # letters of the two kinds of pairs
STEPS = 5


# Of each family, the module that ZeRO-3 must gather whole.
TORN = {"mixtral": "MixtralExperts", "qwen3_moe": "Qwen3MoeExperts"}


def torn_model(family: str, vocabulary: int, tokenizer: Any) -> PreTrainedModel:
    """Routers that send LEFT letters to experts 0 and 1, the first RIGHT ones to 6 and 7 and the others to 4 and 5.

    Two hidden dimensions tell: they stay what the embedding says, as all else is small. Attention writes the first for the
    end of the text, which belongs to both kinds.
    """
    lm: Any = tiny_model(tiny_config(family, vocabulary, **FAMILIES[family]), seed=1)
    embedding, layers = lm.model.embed_tokens.weight, lm.model.layers
    with torch.no_grad():
        embedding[:, :2] = 0
        for letters, first, second in ((LEFT, 3.0, 0.0), (RIGHT[:2], -3.0, 3.0), (RIGHT[2:], -3.0, -3.0)):
            embedding[tokenizer.convert_tokens_to_ids(list(letters)), :2] = torch.tensor([first, second])
        value, output = layers[0].self_attn.v_proj.weight, layers[0].self_attn.o_proj.weight
        value[0], output[0] = 0, 0
        value[0, 0] = output[0, 0] = 1
        for layer in layers:
            layer.mlp.gate.weight[:, 0] = torch.tensor([1.0, 0.8, 0, 0, -0.9, -0.75, -0.8, -1.0])
            layer.mlp.gate.weight[:, 1] = torch.tensor([0.0, 0, 0, 0, -1.0, -1.0, 1.0, 1.0])
    return lm


@pytest.fixture(scope="module", params=TORN)
def torn_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each step has a LEFT pair, which is longer and so runs on rank 0, and a RIGHT one, which uses more experts."""
    folder = tmp_path_factory.mktemp("torn")
    vocabulary = save_tokenizer(folder / "tokenizer")
    lm = torn_model(request.param, vocabulary, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    lm.save_pretrained(folder / "policy")
    config = json.loads((folder / "policy" / "config.json").read_text())
    # Only these experts run one by one, and only those with tokens: their hooks would be a rank's own.
    (folder / "policy" / "config.json").write_text(json.dumps(config | {"experts_implementation": "eager"}))
    draws = np.random.default_rng(0)
    kinds = [(list(letters), 9 - k) for _ in range(STEPS) for k, letters in enumerate((LEFT, RIGHT))]
    sides = ("prompt", "chosen", "rejected")
    rows = [{side: "".join(draws.choice(letters, size)) for side in sides} for letters, size in kinds]
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "first.jsonl", rows[:2])
    return write_run(
        folder,
        reference={"mode": "auto"},
        train={"pairs_per_step": 2, "max_steps": STEPS, "learning_rate": 1e-3},
    )


def train(workers: Workers, run_file: Path, run: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A whole run; its lines of metrics of steps and of evaluations. A hang fails within a minute."""
    arguments = [f"output_dir={run}", *overrides]
    codes = workers.run("cases:run_training", seconds=60, config_path=str(run_file), overrides=arguments)
    assert codes == [0] * workers.size
    records = training_records(run)
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


@pytest.mark.parametrize("scope", [pytest.param("micro", marks=pytest.mark.slow), "step"])
def test_ranks_that_use_disjoint_experts_train_on_and_resume(scope, torn_run, all_workers, tmp_path):
    """Under ZeRO-3 every expert is sharded over both ranks: a rank gathers what it does not use. A run that was killed ends
    with the same metrics and weights, to the bit."""
    run, arguments = tmp_path / "run", [f"model.router_aux_scope={scope}", "checkpoint={save_every: 2, keep_last: 9}"]
    book = Oracle(torn_run.parent, rows="first.jsonl", reference="policy")
    lengths = computed_tokens(book.lengths, prefix_sharing=True)
    assert [members[0].tolist() for members in pack(lengths, 100_000, 2)] == [[0], [1]], "a rank for each kind"
    assert experts_used(book) == [{0, 1}, {4, 5, 6, 7}]

    steps, _ = train(all_workers[2], torn_run, run, *arguments)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    told = book.of_step(DPO)
    for name in ("loss", "aux_loss"):
        assert steps[0][name] == pytest.approx(told[name], rel=1e-5), name
    assert load_of(steps[0]) == pytest.approx(book.load())
    leaf = TORN[json.loads((torn_run.parent / "policy" / "config.json").read_text())["model_type"]]
    assert f"ZeRO-3 gathers whole: {leaf}" in (run / "logs" / "rank-0.log").read_text()
    ended = load_file(run / "final" / "model.safetensors")
    still = Oracle(torn_run.parent, run / "final", "first.jsonl", reference="policy")
    assert experts_used(still) == [{0, 1}, {4, 5, 6, 7}], "training has mixed the kinds: its later steps show nothing"

    forget_everything_after(run, 2)
    assert train(all_workers[2], torn_run, run, *arguments)[0] == steps
    again = load_file(run / "final" / "model.safetensors")
    assert ended.keys() == again.keys() and all(torch.equal(ended[name], again[name]) for name in ended)


def experts_used(book: Oracle) -> list[set[int]]:
    """Of each pair, by any token in any layer."""
    return [
        {i for side in sides for layer in side for i in layer.topk(TOP_K).indices.flatten().tolist()} for sides in book.heard
    ]


# ----------------------------------------------------------------------------------------------------------- whole runs

WHOLE_RUN = [
    "reference={mode: auto}",
    "train={pairs_per_step: 3, max_steps: 4, learning_rate: 3.0e-3}",
    "checkpoint={save_every: 2, keep_last: 9}",
    "data.tokens_per_pack=200",
]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_evaluates_all_held_out_pairs_and_exports_what_it_evaluated(world, run_file, all_workers, tmp_path):
    """The last evaluation is the oracle's with the exported weights, as a user loads them."""
    folder, run = run_file.parent, tmp_path / "run"
    overrides = [*WHOLE_RUN, f"data.eval.path={folder}/held_out.jsonl"]
    _, [evaluation] = train(all_workers[world], run_file, run, *overrides)
    # The reference of this run is the policy that it began with.
    book = Oracle(folder, run / "final", "held_out.jsonl", reference="policy")
    told = book.of_step(DPO)
    assert len(pack(computed_tokens(book.lengths, True), 200, world)[0]) > 1, "one pack would show no balance over packs"
    for name in ("loss", "aux_loss"):
        assert evaluation[f"eval_{name}"] == pytest.approx(told[name], rel=1e-5), name
    assert load_of(evaluation, "eval_") == pytest.approx({f"eval_{name}": value for name, value in book.load().items()})
    began, ended = (load_file(at / "model.safetensors") for at in (folder / "policy", run / "final"))
    assert {name: tensor.shape for name, tensor in ended.items()} == {name: tensor.shape for name, tensor in began.items()}
    unmoved = [name for name in began if torch.equal(began[name], ended[name])]
    assert not unmoved

"""The routers' load-balancing loss against transformers' own, as a formula and in every family that has it.

transformers' function is float32 and takes the router logits of a whole batch; here packs add up, prompts are shared and
fillers count for nothing.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from deepspeed.utils import get_z3_leaf_modules
from packaging.version import Version
from tiny import save_tiny, tiny_config, tiny_model
from tiny_families import small_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dspref.config import ModelSection
from dspref.data.batch import PackedBatch, collate
from dspref.data.truncate import TokenizedPair
from dspref.engine import engine
from dspref.errors import ConfigError
from dspref.model import admission, loading, router
from dspref.model import packed as model
from dspref.model.packed import PackedCausalLM
from dspref.model.router import Routing

# ------------------------------------------------------------------------------------------------------- the formula

SHAPES = [(1, 4, 1), (2, 8, 2), (3, 5, 5), (2, 16, 3)]  # layers, experts, experts per token
TOKENS = 40


def some_logits(layers: int, experts: int, tokens: int = TOKENS, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(tokens, experts, generator=draws) for _ in range(layers)]


def loss_of(routing: Routing) -> Tensor:
    """The loss over the tokens of one routing and no others."""
    return router.balance(routing.probabilities, routing.load, routing.tokens, routing.tokens)


def with_gradients(logits: list[Tensor], loss: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [layer.clone().requires_grad_() for layer in logits]
    value = loss(leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def assert_same(ours: tuple[Tensor, tuple[Tensor, ...]], theirs: tuple[Tensor, tuple[Tensor, ...]]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_value_and_gradient_are_those_of_transformers(layers: int, experts: int, top_k: int) -> None:
    logits = some_logits(layers, experts)
    ours = with_gradients(logits, lambda x: loss_of(router.routing(x, top_k, torch.ones(TOKENS))))
    theirs = with_gradients(logits, lambda x: load_balancing_loss_func(tuple(x), experts, top_k))
    assert_same(ours, theirs)
    assert ours[0] > top_k or experts == top_k, "uneven routers lie above the least value"
    assert top_k == experts or any(gradient.any() for gradient in ours[1])


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_weight_0_is_a_token_behind_the_attention_mask(layers: int, experts: int, top_k: int) -> None:
    logits, mask = some_logits(layers, experts), (torch.arange(TOKENS) % 3 > 0).float()
    ours = with_gradients(logits, lambda x: loss_of(router.routing(x, top_k, mask)))
    theirs = with_gradients(logits, lambda x: load_balancing_loss_func(tuple(x), experts, top_k, mask[None]))
    assert_same(ours, theirs)
    assert all(not gradient[mask == 0].any() for gradient in ours[1])


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_weight_2_is_a_token_that_was_computed_twice(layers: int, experts: int, top_k: int) -> None:
    logits, times = some_logits(layers, experts), torch.arange(TOKENS) % 3
    ours = with_gradients(logits, lambda x: loss_of(router.routing(x, top_k, times.float())))

    def repeated(x: list[Tensor]) -> Tensor:
        return load_balancing_loss_func(tuple(layer.repeat_interleave(times, dim=0) for layer in x), experts, top_k)

    assert_same(ours, with_gradients(logits, repeated))


def test_even_routers_give_the_least_value_the_number_of_experts_per_token() -> None:
    turns = torch.eye(4).repeat(3, 1) * 1e-3
    assert loss_of(router.routing([turns], 1, torch.ones(12))).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(12, 1)
    assert loss_of(router.routing([collapsed], 1, torch.ones(12))).item() == pytest.approx(4)


def test_packs_add_up_to_the_loss_of_the_step() -> None:
    """Each pack's share needs the load of all packs and its own probabilities only; a filler adds nothing."""
    logits, times = some_logits(2, 8), torch.arange(TOKENS) % 3 + 1.0
    whole = with_gradients(logits, lambda x: loss_of(router.routing(x, 2, times)))
    cuts = [slice(0, 7), slice(7, 30), slice(30, 30), slice(30, TOKENS)]

    def in_packs(x: list[Tensor]) -> Tensor:
        parts = [router.routing([layer[cut] for layer in x], 2, times[cut]) for cut in cuts]
        parts.append(router.routing([layer[:4] for layer in x], 2, torch.zeros(4)))
        load, tokens = sum(part.load for part in parts), sum(part.tokens for part in parts)
        return torch.stack([router.balance(part.probabilities, load, tokens, int(tokens)) for part in parts]).sum()

    assert_same(with_gradients(logits, in_packs), whole)


def test_a_filler_alone_is_zero_with_zero_gradients() -> None:
    """A rank may run a micro-step in which no rank has a token that counts."""
    value, gradients = with_gradients(some_logits(2, 8, 4), lambda x: filler_share(router.routing(x, 2, torch.zeros(4))))
    assert value == 0
    assert all(torch.equal(gradient, torch.zeros(4, 8)) for gradient in gradients)


def filler_share(routing: Routing) -> Tensor:
    assert routing.tokens == 0 and not routing.load.any()
    return router.balance(routing.probabilities, routing.load, routing.tokens, 1000)


def test_only_probabilities_have_a_gradient() -> None:
    routing = router.routing([x.requires_grad_() for x in some_logits(2, 8)], 2, torch.ones(TOKENS))
    assert [part.requires_grad for part in routing] == [True, False, False]
    assert [tuple(part.shape) for part in routing] == [(2, 8), (2, 8), ()]
    assert routing.load.sum(dim=1).tolist() == [2 * TOKENS] * 2


def test_half_precision_logits_are_summed_in_float32() -> None:
    """2^9 equal tokens: in bfloat16 a sum of probabilities would stop growing at 2^8."""
    logits = torch.zeros(512, 4, dtype=torch.bfloat16)
    routing = router.routing([logits], 2, torch.ones(512))
    assert {part.dtype for part in routing} == {torch.float32}
    assert routing.probabilities.tolist() == [[128.0] * 4]


# -------------------------------------------------------------------------------------------- how often tokens count


def some_pairs() -> list[TokenizedPair]:
    draws = np.random.default_rng(0)
    lengths = [(13, 5, 21), (2, 17, 2), (9, 1, 12)]
    return [TokenizedPair(*(draws.integers(0, 256, n).astype(np.int32) for n in part)) for part in lengths]


def test_every_token_counts_as_often_as_it_is_computed_without_sharing() -> None:
    shared, separate = (collate(some_pairs(), range(3), prefix_sharing=sharing) for sharing in (True, False))
    assert separate.multiplicity.tolist() == [1] * len(separate.input_ids)
    counted = [torch.bincount(b.input_ids, b.multiplicity, minlength=256) for b in (shared, separate)]
    assert torch.equal(*counted)
    assert shared.multiplicity[:13].tolist() == [2] * 13, "the first prompt"
    assert shared.multiplicity[13:39].tolist() == [1] * 26, "its answers"


@pytest.mark.parametrize("sharing", [True, False])
def test_no_token_of_a_filler_counts(sharing: bool) -> None:
    assert not collate([], [], prefix_sharing=sharing).multiplicity.any()


def test_load_is_told_relative_to_an_even_one() -> None:
    load = torch.tensor([[2.0, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0], [1, 3, 4, 0]])
    told = router.load_metrics(load)
    assert told == {
        **{f"expert_load/max_{layer}": value for layer, value in enumerate([1, 4, 0, 2])},
        **{f"expert_load/min_{layer}": value for layer, value in enumerate([1, 0, 0, 0])},
    }


# ------------------------------------------------------------------------------------------------------ every family

LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
NAMED = {"num_experts": 8, "num_experts_per_tok": 2}
SMALL = {**NAMED, "moe_intermediate_size": 32}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "moe_loss_weight": 0.05},
}

# Where families may be missing, or not tell of their routers: which did, was looked up in 5.23.
OLDER = Version(transformers.__version__) < Version("5.23")

# Every family of transformers 5.23 whose modeling file holds the loss, with what its tiny config needs.
FAMILIES: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096, "vocab_size": 256, **DBRX},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},  # its first layer is dense
    "flex_olmo": NAMED,
    "granitemoe": LOCAL,
    "granitemoehybrid": {**LOCAL, "layer_types": ["full_attention"] * 2, "shared_intermediate_size": 48},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 48},
    "jetmoe": {**LOCAL, "kv_channels": 16},  # attention is routed too
    "laguna": SMALL,
    "mellum": SMALL,
    "minimax_m2": LOCAL,
    "minimax_m3_vl_text": LOCAL,
    "mixtral": LOCAL,
    "olmoe": NAMED,
    "qwen2_moe": {**SMALL, "shared_expert_intermediate_size": 48},
    "qwen2_moe first layer dense": {**SMALL, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "qwen3_moe": SMALL,
}
# Those that are small by their names alone; most are run one sequence at a time.
BY_NAME = ["deepseek_v4", "gpt_oss", "granitemoe_swa", "jamba", "qwen3_5_moe_text", "qwen3_next"]
# And whose experts are sampled; and others: whose text model is one of those above, whose routers transformers says nothing
# of, or are all too even when small.
REFUSED = {"phimoe": "samples its experts"}
OTHERS = {"qwen3_5_moe", "qwen4_exp", "doge", "flint", "minimax", "qwen4_exp_text"}


def config_of(family: str) -> PretrainedConfig:
    name = family.split()[0]
    if family in BY_NAME:
        return small_config(family, vocab_size=256, hidden_size=64, num_attention_heads=8)
    return AutoConfig.for_model(name, **FAMILIES[family]) if name == "dbrx" else tiny_config(name, **FAMILIES[family])


def own_loss(lm: PreTrainedModel) -> Any:
    return sys.modules[type(lm).__module__].load_balancing_loss_func


@pytest.mark.slow
def test_no_family_with_the_loss_is_missing_here() -> None:
    families = {name.split()[0] for name in FAMILIES} | {*BY_NAME, *REFUSED, *OTHERS}
    for config, causal in AutoModelForCausalLM._model_mapping.items():
        if hasattr(sys.modules[causal.__module__], "load_balancing_loss_func"):
            assert config.model_type in families, "a new family: add it to FAMILIES or BY_NAME"


def plain(lm: PreTrainedModel, pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """(log p of each answer token, loss over all tokens): one unpadded forward per sequence."""
    logps, routed = [], []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer])).long()
            said: Any = lm(input_ids=ids[None], use_cache=False, output_router_logits=True)
            if OLDER and said.router_logits is None:
                pytest.skip(f"of {lm.config.model_type} transformers {transformers.__version__} gives no router logits")
            rows = said.logits[0].float().log_softmax(-1)[len(pair.prompt) - 1 : -1]
            logps.append(rows.gather(-1, ids[len(pair.prompt) :, None])[:, 0])
            routed.append(said.router_logits)
    whole = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
    return torch.cat(logps), own_loss(lm)(whole, lm.num_experts, lm.num_experts_per_tok)


def gradients(lm: PreTrainedModel, logps: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every log-prob has a weight of its own, and the routers' loss another."""
    lm.zero_grad()
    ((logps * torch.linspace(-1.0, 2.0, len(logps))).sum() + 5 * loss).backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def one_sequence(ids: np.ndarray) -> PackedBatch:
    """A pack of a single sequence; `collate` would always make two of a pair."""
    pack = collate([TokenizedPair(ids[:1], ids[1:], ids[:0])], [0], prefix_sharing=True)
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    once = torch.ones_like(pack.multiplicity)
    return replace(pack, cu_seqlens_q=bounds, cu_seqlens_k=bounds, kv_index=None, multiplicity=once)


@pytest.mark.parametrize("family", [*FAMILIES, *BY_NAME])
def test_a_pack_is_plain_forwards_and_their_routers_together(family: str, tmp_path: Path) -> None:
    """Log-probs to 2e-6, the loss to 2e-6 relative, gradients of every parameter to 2e-5, with and without sharing, and with
    activations recomputed."""
    save_tiny(tmp_path, config_of(family), seed=1)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    pairs = some_pairs()
    expected, loss = plain(lm, pairs)
    assert loss > 2.01, "even routers would show nothing"
    expected_gradients = gradients(lm, expected, loss)
    scale = max(float(g.abs().max()) for g in expected_gradients.values())

    section = ModelSection(
        name_or_path=str(tmp_path), dtype="float32", gradient_checkpointing=lm.supports_gradient_checkpointing
    )
    kernel = admission.check(section, loading.load_config(section), 64, 256, "cpu")
    packed = loading.load(section, str(tmp_path), kernel, "float32", zero3=None)
    model.prepare_for_training(packed, section, with_collision=False)
    assert packed.router_aux_loss_coef > 0
    for sharing in (False, True):
        tokens, routing = packed(collate(pairs, range(3), prefix_sharing=sharing))
        assert routing is not None and routing.tokens == 106
        assert (tokens.logps - expected).abs().max() <= 2e-6
        torch.testing.assert_close(loss_of(routing), loss, rtol=2e-6, atol=0)
        ours = gradients(packed.lm, tokens.logps, loss_of(routing))
        assert ours.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            tolerance = 2e-5 * max(float(gradient.abs().max()), 1e-3 * scale)
            assert (ours[name] - gradient).abs().max() <= tolerance, (name, sharing)

    ids = np.concatenate([pairs[0].prompt, pairs[0].chosen])
    with torch.no_grad():
        alone: Any = lm(input_ids=torch.from_numpy(ids).long()[None], use_cache=False, output_router_logits=True)
        torch.testing.assert_close(loss_of(packed(one_sequence(ids))[1]), alone.aux_loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_packed_is_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name_or_path: {family}.*{REFUSED[family]}") as refusal:
        check(AutoConfig.for_model(family, **LOCAL))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_outside_zero3_leaves_run_in_the_same_order_whatever_the_routing(family: str) -> None:
    """ZeRO-3 gathers before a module runs, on all ranks together: one that runs only where a token comes by would hang them.

    With the eager experts, of which only those that are hit run; a rank may choose them, and some families have no others.
    """
    lm = tiny_model(config_of(family), seed=1)
    if lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")
    engine._mark_leaves(lm)
    leaves = get_z3_leaf_modules(lm)
    assert leaves
    inside = {id(part) for leaf in leaves for part in leaf.modules() if part is not leaf}
    order: list[str] = []
    for name, part in lm.named_modules():
        if id(part) not in inside:
            part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    runs = []
    for ids in ([[7]], [list(range(200))]):
        order.clear()
        with torch.no_grad():
            lm(input_ids=torch.tensor(ids), use_cache=False)
        runs.append(list(order))
    assert runs[0] == runs[1]
    never = [name for name, part in lm.named_modules() if part in leaves and id(part) not in inside and name not in order]
    assert not never, "a leaf gathers when it is called, and these are not: nobody would gather what they hold"


def test_a_family_without_checkpointing_of_activations_is_refused_with_it() -> None:
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing: jetmoe .*false"):
        check(config_of("jetmoe"))
    assert check(config_of("jetmoe"), gradient_checkpointing=False) == "sdpa"


# --------------------------------------------------------------------------------------------------- the coefficient


def check(config: PretrainedConfig, **keys: Any) -> str:
    section = ModelSection(**{"name_or_path": "somewhere", "dtype": "float32"} | keys)
    return admission.check(section, config, 64, 100, "cpu")


def coefficient(config: PretrainedConfig, asked: float | None = None) -> float:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return admission.router_coefficient(ModelSection(name_or_path="somewhere", router_aux_loss_coef=asked), lm)


# The name under which a family's config has it, where that is not `router_aux_loss_coef`.
OTHER_NAMES = {"jetmoe": ("aux_loss_coef", 0.03), "dbrx": ("moe_loss_weight", 0.05)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_on_with_the_models_own_coefficient(family: str) -> None:
    name, value = OTHER_NAMES.get(family, ("router_aux_loss_coef", 0.03))
    config = config_of(family)
    if family != "dbrx":
        setattr(config, name, value)
    keys = {"gradient_checkpointing": family != "jetmoe"}
    assert coefficient(config) == value
    assert coefficient(config, asked=0.5) == 0.5
    assert coefficient(config, asked=0.0) == 0
    for asked in (None, 0.0, 0.5):
        assert check(config, router_aux_loss_coef=asked, **keys) == "sdpa"


DENSE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "gpt2": {},
    # Granite 4.0 350M and 1B are of the hybrid family, without experts or state-space layers, and carry a coefficient.
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "shared_intermediate_size": 48,
        "router_aux_loss_coef": 0.01,
    },
    # Experts balanced by a bias, without this loss.
    "deepseek_v3": {},
    "glm4_moe": {},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
}


@pytest.mark.parametrize("family", DENSE)
def test_models_without_the_loss_have_0_and_refuse_another(family: str) -> None:
    config = AutoConfig.for_model(family, **DENSE[family])
    assert coefficient(config) == 0
    assert coefficient(config, asked=0.0) == 0
    for refuse in (lambda: coefficient(config, asked=0.01), lambda: check(config, router_aux_loss_coef=0.01)):
        with pytest.raises(ConfigError, match=f"model.router_aux_loss_coef: {family} has no router") as refusal:
            refuse()
        assert "\n" not in str(refusal.value)
    assert check(config) == "sdpa"


@pytest.mark.parametrize("family", ["ernie4_5_moe", "laguna"])
def test_the_bias_of_a_routers_choice_is_not_trained(family: str, tmp_path: Path) -> None:
    """It has no gradient, and transformers forgets on loading that it is frozen: weight decay would shrink it."""
    save_tiny(tmp_path, config_of(family), seed=1)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    packed = model.prepare_for_training(loading.load(section, str(tmp_path), "sdpa", "float32", None), section, False)
    frozen = [name for name, parameter in packed.lm.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 1 and frozen[0].endswith("e_score_correction_bias")


NOISES: dict[str, dict[str, Any]] = {
    "mixtral": {**LOCAL, "router_jitter_noise": 0.3},
    "dbrx": {**FAMILIES["dbrx"], "ffn_config": {**DBRX["ffn_config"], "moe_jitter_eps": 0.3}},  # within another config
}


@pytest.mark.parametrize("family", NOISES)
def test_routers_have_no_noise_in_training_unless_asked_for(family: str, tmp_path: Path) -> None:
    """As with dropout, of which it is a kind: the policy begins as its reference."""
    config = AutoConfig.for_model(family, **NOISES[family]) if family == "dbrx" else tiny_config(family, **NOISES[family])
    save_tiny(tmp_path, config, seed=1)
    batch, same = collate(some_pairs(), range(3), prefix_sharing=True), {}
    for disable in (True, False):
        section = ModelSection(name_or_path=str(tmp_path), dtype="float32", disable_dropout=disable)
        packed = loading.load(section, str(tmp_path), "sdpa", "float32", zero3=None)
        with torch.no_grad():
            quiet = packed.eval()(batch)[0].logps
            same[disable] = torch.equal(packed.train()(batch)[0].logps, quiet)
    assert same == {True: True, False: False}


@pytest.mark.parametrize("says", [True, False])
def test_routers_are_asked_only_where_their_loss_is_trained(says: bool, tmp_path: Path) -> None:
    """Whatever the model's config says of `output_router_logits`; a reference is never asked."""
    save_tiny(tmp_path, tiny_config("mixtral", **LOCAL, output_router_logits=says), seed=1)
    batch = collate(some_pairs(), range(3), prefix_sharing=True)
    for asked, on in ((None, True), (0.0, False)):
        section = ModelSection(name_or_path=str(tmp_path), dtype="float32", router_aux_loss_coef=asked)
        packed = loading.load(section, str(tmp_path), "sdpa", "float32", zero3=None)
        with torch.no_grad():
            assert model.prepare_as_reference(copy.deepcopy(packed))(batch)[1] is None
            assert (model.prepare_for_training(packed, section, False)(batch)[1] is not None) == on
        assert packed.published_config.output_router_logits == says


def test_a_model_all_of_whose_layers_are_dense_is_refused_in_one_line() -> None:
    """Its config promises experts, so only the forward can tell."""
    config = tiny_config("qwen2_moe", **SMALL, shared_expert_intermediate_size=48, mlp_only_layers=[0, 1])
    lm = tiny_model(config, seed=1)
    lm.set_attn_implementation("dspref_packed")
    packed = PackedCausalLM(lm, "sdpa")
    packed.router_aux_loss_coef = 0.001
    with pytest.raises(ConfigError, match="no layer of this model has experts"):
        packed(collate(some_pairs(), range(3), prefix_sharing=True))

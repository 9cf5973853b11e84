"""Models whose files are damaged, hostile or of a kind that is not trained: one line, its exit code, nothing loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapters import saved
from tiny import save_tiny, save_tokenizer, tiny_config

from dspref import hub
from dspref.config import LoraSection, ModelSection, ReferenceSection
from dspref.data.tokenize import load_tokenizer
from dspref.engine import finite
from dspref.errors import ExitCode, UserError
from dspref.model import adapters, admission, digests, loading, packed, weights
from dspref.model.adapters import Saved
from dspref.model.attention import PACKED
from dspref.reference import spec
from dspref.reference.spec import ReferenceSpec

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and an adapter of it in `adapter/`."""
    folder = tmp_path_factory.mktemp("sound")
    save_tiny(folder, tiny_config("llama", save_tokenizer(folder), hidden_size=32, intermediate_size=48), seed=1)
    saved(folder, folder / "adapter", seed=2)
    return folder


def copy_of(sound: Path, tmp_path: Path, change: Change) -> Path:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    change(folder)
    return folder


def section(folder: Path, **keys: Any) -> ModelSection:
    return ModelSection(name_or_path=str(folder), dtype="float32", **keys)


def admitted(of: ModelSection) -> str:
    """What is asked of a model before a run folder is made; its attention kernel."""
    config = loading.load_config(of)
    kernel = admission.check(of, config, 64, 0, "cpu")
    admission.check_weights(of, config)
    loading.content_digest(of)
    return kernel


def begun(of: ModelSection) -> packed.PackedCausalLM:
    """And of one that is then loaded."""
    loaded = loading.load(of, of.name_or_path, admitted(of), of.dtype, None)
    finite.refuse_not_finite(loaded.lm, of.dtype, lambda tensor: ("model.name_or_path", of.name_or_path))
    return loaded


def spec_of(of: ModelSection, **own: Any) -> ReferenceSpec:
    """Of a run with this model and this reference."""
    return ReferenceSpec(ReferenceSection(**own), of, needed=True, strategy={})


def refusal(look: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as raised:
        look()
    assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 1000
    return raised.value


def test_random_weights_are_on_disk_before_they_have_their_name(sound: Path, tmp_path: Path, monkeypatch) -> None:
    """A power cut after the first checkpoint, which is flushed, must leave the weights that it began with too."""
    flushed: list[str] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    loading.initialise(section(sound, init="random"), tmp_path / "init", 3)
    for name in ("model.safetensors", "config.json", ""):
        assert str(tmp_path / ".init.draft" / name).rstrip("/") in flushed, name
    assert flushed[-1] == str(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stray", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_what_lies_where_random_weights_are_drafted_or_kept_makes_way(stray, sound: Path, tmp_path: Path) -> None:
    stray(tmp_path / ".init.draft")
    stray(tmp_path / "init")
    folder = loading.initialise(section(sound, init="random"), tmp_path / "init", 3)
    assert (Path(folder) / "model.safetensors").is_file() and os.listdir(tmp_path) == ["init"]


# ----------------------------------------------------------------------------------------------- what is done to a model


def says(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def without(key: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return change


def holds(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def generates(**keys: Any) -> Change:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(keys))


def quantized(**keys: Any) -> Change:
    return says(quantization_config=keys)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def do(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return do


def cut(size: int) -> Change:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def indexed(name: str, index: Any = None) -> Change:
    """The weights lie in `name`, relative to the folder, and an index says so, or says `index`."""

    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {"metadata": {}, "weight_map": dict.fromkeys(found, name.replace("FOLDER", str(folder)))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(places if index is None else index))
        target = Path(name.replace("FOLDER", str(folder))) if name.startswith("FOLDER") else folder / name
        os.makedirs(os.path.dirname(target), exist_ok=True)
        torch.save(found, target) if name.endswith(".bin") else save_file(found, target, {"format": "pt"})

    return change


def linked(name: str) -> Change:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return change


def then(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def replaced(name: str, by: Callable[[Path], Any]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        by(folder / name)

    return change


ENDLESS = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}
DEEP = '{"a":' * 50_000
FULL = "only full precision is trained; name the model that it was made from, with model.load_in_4bit: true for QLoRA"

REFUSED: dict[str, tuple[Change, str]] = {
    # Files that no digest covers, or that are pickles.
    "index of a pickle": (indexed("model.bin"), "model.bin is not safetensors"),
    "index of an absolute path": (indexed("FOLDER/../a.safetensors"), "is outside the model's folder"),
    "index of a file above": (indexed("../a.safetensors"), "is outside the model's folder"),
    "index by a detour": (indexed("sub/../../a.safetensors"), "is outside the model's folder"),
    "index of no file": (then(indexed("a.safetensors"), lambda f: (f / "a.safetensors").unlink()), "which is not there"),
    "index of a long name": (
        indexed("a.safetensors", {"metadata": {}, "weight_map": {"a": "x" * 300 + ".safetensors"}}),
        "not there",
    ),
    "index of numbers": (indexed("a.safetensors", {"metadata": {}, "weight_map": {"a": 5}}), "is not in a file by its name"),
    "index without a map": (indexed("a.safetensors", {"metadata": {}}), "is no index"),
    "index without metadata": (indexed("a.safetensors", {"weight_map": {"a": "a.safetensors"}}), "is no index"),
    "index that is a list": (indexed("a.safetensors", []), "is no index"),
    "index that is broken": (then(indexed("a.safetensors"), holds("model.safetensors.index.json", "{")), "not valid JSON"),
    "link out of the folder": (linked("model.safetensors"), "is a link to"),
    "shard behind a link": (then(indexed("a.safetensors"), linked("a.safetensors")), "is a link to"),
    "folder behind a link": (then(indexed("sub/a.safetensors"), linked("sub")), "is a link to"),
    "pickle alone": (
        then(lambda f: (f / "model.safetensors").unlink(), holds("pytorch_model.bin", "x")),
        "pickled weights are not read",
    ),
    "weights of another name": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "consolidated.safetensors is not read",
    ),
    "name in the config": (says(transformers_weights="other.safetensors"), "transformers_weights"),
    "config in another file": (says(configuration_files=["config.4.0.0.json"]), "configuration_files"),
    "distributed checkpoint": (holds("shard-00001-model-00001-of-00001.safetensors", "x"), "distributed checkpoint"),
    "adapter in the folder": (holds("adapter_config.json", "{}"), "is a LoRA adapter"),
    # Quantized weights.
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_4bit=True), f"quantized (bitsandbytes), and {FULL}"),
    "gptq": (quantized(quant_method="gptq", bits=4), f"quantized (gptq), and {FULL}"),
    "awq": (quantized(quant_method="awq"), f"quantized (awq), and {FULL}"),
    "fp8": (quantized(quant_method="fp8", weight_block_size=[128, 128]), f"quantized (fp8), and {FULL}"),
    "mxfp4": (quantized(quant_method="mxfp4"), f"quantized (mxfp4), and {FULL}"),
    "compressed-tensors": (quantized(quant_method="compressed-tensors"), "quantized (compressed-tensors)"),
    "of a package that nobody has": (quantized(quant_method="nosuch"), "quantized (nosuch)"),
    "without a method": (quantized(load_in_8bit=True), "quantized (quantization_config)"),
    "of an odd type": (says(quantization_config="fp8"), "quantized (quantization_config)"),
    "of a part": (says(text_config={"quantization_config": {"quant_method": "fp8"}}), "quantized (fp8)"),
    "by an older key": (says(compression_config={"quant_method": "sparseml"}), "quantized (sparseml)"),
    "8 bits unsaid": (
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "lm_head.weight is F8_E4M3",
    ),
    "packed unsaid": (
        tensors(lambda t: t.update({"lm_head.qweight": torch.zeros(4, 4, dtype=torch.int32)})),
        "lm_head.qweight is I32",
    ),
    # config.json
    "empty": (holds("config.json", ""), "config.json: not valid JSON"),
    "list": (holds("config.json", "[]"), "config.json: holds no settings"),
    "null": (holds("config.json", "null"), "config.json: holds no settings"),
    "no keys": (holds("config.json", "{}"), "config.json: names no model_type"),
    "deep": (holds("config.json", DEEP), "config.json: nested too deeply"),
    "deep and closed": (holds("config.json", DEEP + "1" + "}" * 50_000), "config.json: nested too deeply"),
    "Latin 1": (holds("config.json", b'{"a": "\xe9"}'), "config.json: not UTF-8 text"),
    "without model_type": (without("model_type"), "names no model_type"),
    "model_type of no text": (says(model_type=5), "names no model_type"),
    "unknown model_type": (says(model_type="nosuch"), "'nosuch' is not known to transformers"),
    "code of the model": (
        says(model_type="nosuch", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
        "config.json: ",
    ),
    "huge": (says(hidden_size=10**30), "hidden_size: 1000000"),
    "huger": (says(hidden_size=10**400), "hidden_size: 1000000"),
    "a billion layers": (says(num_hidden_layers=10**9), "num_hidden_layers: 1000000000 is no size of a model"),
    "a billion layers in a part": (says(vision_config={"num_layers": 10**12}), "num_layers: 1000000000000 is no size"),
    "more words than memory": (says(vocab_size=10**15), "and [1000000000000000, 32] by config.json"),
    "negative": (says(hidden_size=-4), "no model comes of its config.json"),
    "no heads": (says(num_attention_heads=0), "config.json: "),
    "text for a number": (says(hidden_size="32"), "hidden_size"),
    "null for a number": (says(hidden_size=None), "hidden_size"),
    "text for a window": (says(sliding_window="x", use_sliding_window=True), "sliding_window: 'x' is no number"),
    "unknown activation": (says(hidden_act="nosuch"), "nosuch"),
    "unknown positions": (says(rope_parameters={"rope_type": "nosuch"}), "nosuch"),
    "kinds of layers of no kind": (says(layer_types=[{"a": 1}]), "config.json: "),
    "unknown dtype": (says(dtype="nosuch"), "nosuch"),
    "part that is a list": (says(text_config=[1]), "text_config"),
    "odd generation config": (holds("generation_config.json", "[]"), "generation_config.json: holds no settings"),
    "broken generation config": (holds("generation_config.json", "{"), "generation_config.json: not valid JSON"),
    "negative length of a generation": (generates(max_new_tokens=-1), "generation_config.json: `max_new_tokens` must be"),
    "text for a length of a generation": (generates(max_new_tokens="a"), "generation_config.json: '<=' not supported"),
    "text for a token": (generates(pad_token_id="a"), "generation_config.json: "),
    "unknown cache of a generation": (generates(cache_implementation="evil"), "generation_config.json: Invalid `cache_"),
    "number for a part of a generation": (generates(watermarking_config=3), "generation_config.json: "),
    "several greedy answers": (generates(num_return_sequences=3), "generation_config.json: Greedy methods"),
    "what is no setting of a generation": (generates(stopping_criteria=1), "generation_config.json: Argument"),
    "a method's name": (generates(save_pretrained=1), "generation_config.json: save_pretrained is no setting"),
    "a token beyond all": (generates(bos_token_id=10**30), "generation_config.json: bos_token_id: 1000000"),
    "tokens beyond all": (generates(eos_token_id=[1, 10**30]), "generation_config.json: eos_token_id: 1000000"),
    "config that is a folder": (replaced("config.json", lambda path: path.mkdir()), "config.json: "),
    # Weights
    "nothing": (cut(0), "model.safetensors is damaged"),
    "a part of the header": (cut(100), "model.safetensors is damaged"),
    "the last byte gone": (
        lambda f: os.truncate(f / "model.safetensors", os.path.getsize(f / "model.safetensors") - 1),
        "is damaged",
    ),
    "a byte more": (
        lambda f: os.truncate(f / "model.safetensors", os.path.getsize(f / "model.safetensors") + 1),
        "is damaged",
    ),
    "zeros": (holds("model.safetensors", b"\0" * 1000), "model.safetensors is damaged"),
    "ones": (holds("model.safetensors", b"\xff" * 1000), "model.safetensors is damaged"),
    "another shape": (
        tensors(lambda t: t.update({"lm_head.weight": torch.zeros(5, 32)})),
        "lm_head.weight is [5, 32] in model.safetensors",
    ),
    # What never ends, or waits
    **{
        f"{name} that is a {kind}": (replaced(name, make), f"{name} is a {kind}, not a file")
        for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json")
        for kind, make in ENDLESS.items()
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_is_loaded(case: str, sound: Path, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    folder = copy_of(sound, tmp_path, change)
    error = refusal(lambda: admitted(section(folder)))
    assert reason in str(error) and str(error).startswith("model.name_or_path: ") and error.exit_code == ExitCode.CONFIG


LATE: dict[str, tuple[Change, str, ExitCode]] = {
    "transposed": (
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        "another shape",
        ExitCode.CONFIG,
    ),
    "missing": (tensors(lambda t: t.pop("lm_head.weight")), "1 weights are missing", ExitCode.CONFIG),
    "all missing": (tensors(lambda t: t.clear()), "weights are missing", ExitCode.CONFIG),
    "NaN": (
        tensors(lambda t: t["model.norm.weight"][3:4].fill_(float("nan"))),
        "model.norm.weight holds NaN",
        ExitCode.NUMERIC,
    ),
    "infinity": (
        tensors(lambda t: t["lm_head.weight"][0, :1].fill_(-float("inf"))),
        "lm_head.weight holds",
        ExitCode.NUMERIC,
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_it_is_refused_as_it_is_loaded(case: str, sound: Path, tmp_path: Path) -> None:
    change, reason, code = LATE[case]
    folder = copy_of(sound, tmp_path, change)
    error = refusal(lambda: begun(section(folder)))
    assert reason in str(error) and str(folder) in str(error) and error.exit_code == code


def test_what_is_too_large_for_the_type_is_found(sound: Path, tmp_path: Path) -> None:
    """70,000 is a number, and infinite in fp16."""
    folder = copy_of(sound, tmp_path, tensors(lambda t: t["model.norm.weight"].fill_(70_000.0)))
    begun(section(folder))
    half = section(folder).model_copy(update={"dtype": "float16"})
    assert "model.norm.weight holds NaN or infinity in float16" in str(refusal(lambda: begun(half)))


@pytest.mark.parametrize(
    "keys",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"_experts_implementation": "evil/kernel"},
        {"use_kernels": True, "kernel_config": {"a": "evil/kernel"}, "fusion_config": {"a": "b"}},
        {"quantization_config": None},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_the_kernels_that_a_model_asks_for_are_not_used(keys: dict[str, Any], sound: Path, tmp_path: Path) -> None:
    """Nor written into what is exported."""
    folder = copy_of(sound, tmp_path, says(**keys))
    policy = begun(section(folder))
    assert policy.lm.config._attn_implementation == PACKED
    loading.skeleton(section(folder))
    (policy.published_config).save_pretrained(tmp_path / "out")
    written = (tmp_path / "out" / "config.json").read_text()
    assert "evil" not in written and not set(keys) & set(json.loads(written))


# ------------------------------------------------------------------------------------------------- what the digest covers


def test_the_digest_covers_what_is_loaded_and_nothing_else(sound: Path, tmp_path: Path) -> None:
    def other(t: dict[str, torch.Tensor]) -> None:
        t["model.norm.weight"][0] += 1

    def digest(change: Change) -> str:
        return loading.content_digest(section(copy_of(sound, tmp_path, change)))

    whole = digest(lambda f: None)
    assert digest(holds("consolidated.safetensors", "anything")) == whole, "which is not loaded"
    assert digest(tensors(other)) != whole
    shards = digest(indexed("a.safetensors"))
    assert digest(then(tensors(other), indexed("a.safetensors"))) != shards
    below = digest(indexed("sub/a.safetensors"))
    assert digest(then(tensors(other), indexed("sub/a.safetensors"))) != below == shards


def test_model_safetensors_comes_before_an_index(sound: Path, tmp_path: Path) -> None:
    """As transformers has it, so the digest is that of the file that is loaded."""
    folder = copy_of(sound, tmp_path, lambda f: None)
    whole = loading.content_digest(section(folder))
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "../x.bin"}}')
    assert loading.content_digest(section(folder)) == whole
    begun(section(folder))


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(sound: Path, tmp_path: Path, monkeypatch) -> None:
    """snapshots/COMMIT/file -> ../../blobs/HASH, by the hub id and by the folder; a link to anywhere else is refused."""
    home = tmp_path / "hub" / "models--some--model"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    for folder in (snapshot, blobs, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for path in sound.iterdir():
        if path.is_file():
            blob = blobs / digests.sha256(path)
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.snapshot.cache_clear()
    by_name = section(Path("some/model"))
    assert weights.fetch(by_name) == [snapshot / "model.safetensors"]
    assert (
        loading.content_digest(by_name)
        == loading.content_digest(section(snapshot))
        == loading.content_digest(section(sound))
    )
    begun(by_name)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(sound / "model.safetensors")
    assert "is a link to" in str(refusal(lambda: admitted(section(snapshot))))
    hub.snapshot.cache_clear()


def test_a_folder_that_is_a_link_is_a_folder(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sound)
    assert loading.content_digest(section(tmp_path / "link")) == loading.content_digest(section(sound))


# ------------------------------------------------------------------------------------------------------ names of folders


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TMP/modle", "no such folder; did you mean TMP/model?"),
        ("TMP/modle/deeper/still", "no such folder; did you mean TMP/model?"),
        ("TMP/nothing-like-it", "no such folder; TMP holds no nothing-like-it"),
        ("./absent", "no such folder"),
        ("TMP/model/config.json", "is a file; give the folder it lies in"),
        ("runs/mine/final", "no such folder"),
        ("~nobody/model", "no such folder"),
        ("x y", "no such folder"),
        ("some/model", "is no folder here, and not had from the hub"),
        ("TMP/empty", "holds no config.json"),
    ],
)
def test_a_folder_that_is_not_there(name: str, reason: str, sound: Path, tmp_path: Path) -> None:
    copy_of(sound, tmp_path, lambda f: None)
    (tmp_path / "empty").mkdir()
    name, reason = (text.replace("TMP", str(tmp_path)) for text in (name, reason))
    error = refusal(lambda: loading.load_config(section(Path(name)).model_copy(update={"name_or_path": name})))
    assert reason in str(error) and "Repo id" not in str(error) and error.exit_code == ExitCode.CONFIG


# -------------------------------------------------------------------------------------------------------------- adapters


def adapter_says(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / adapters.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def do(folder: Path) -> None:
        found = load_file(folder / adapters.WEIGHTS)
        change(found)
        save_file(found, folder / adapters.WEIGHTS, {"format": "pt"})

    return do


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS: dict[str, tuple[Change, str]] = {
    "empty": (holds(adapters.CONFIG, ""), "not valid JSON"),
    "list": (holds(adapters.CONFIG, "[]"), "describes no adapter"),
    "null": (holds(adapters.CONFIG, "null"), "describes no adapter"),
    "no keys": (holds(adapters.CONFIG, "{}"), "describes no adapter"),
    "deep": (holds(adapters.CONFIG, DEEP), "nested too deeply"),
    "Latin 1": (holds(adapters.CONFIG, b"\xe9"), "not UTF-8"),
    "kind of no text": (adapter_says(peft_type=[1]), "only LoRA"),
    "r of text": (adapter_says(r="2"), "r: must be a valid integer, not '2'"),
    "r of 0": (adapter_says(r=0), "r: must be greater than 0"),
    "alpha of a list": (adapter_says(lora_alpha=[1]), "lora_alpha"),
    "dropout above 1": (adapter_says(lora_dropout=7), "lora_dropout"),
    "targets of a number": (adapter_says(target_modules=5), "target_modules"),
    "targets of numbers": (adapter_says(target_modules=[5]), "target_modules"),
    "no regular expression": (adapter_says(target_modules="("), "model.lora"),
    "patterns of text": (adapter_says(rank_pattern={"q_proj": "x"}), "rank_pattern"),
    "layers of text": (adapter_says(layers_to_transform="x"), "layers_to_transform"),
    "pattern of layers of a number": (adapter_says(layers_pattern=5), "layers_pattern"),
    "flag of text": (adapter_says(use_rslora="yes"), "use_rslora"),
    "fan-in of text": (adapter_says(fan_in_fan_out="yes"), "fan_in_fan_out"),
    "mapping of text": (adapter_says(auto_mapping="x"), "auto_mapping"),
    "another rank": (adapter_says(r=4), "size mismatch"),
    "modules that are not there": (adapter_says(target_modules=["w_proj"]), "model.lora"),
    "cut": (lambda f: os.truncate(f / adapters.WEIGHTS, 200), f"{adapters.WEIGHTS} is damaged"),
    "garbage": (holds(adapters.WEIGHTS, b"\xff" * 500), f"{adapters.WEIGHTS} is damaged"),
    "no weights": (then(holds("adapter_model.bin", "x"), lambda f: (f / adapters.WEIGHTS).unlink()), "holds no adapter"),
    "link": (linked(adapters.WEIGHTS), "is a link to"),
    "other shapes": (adapter_tensors(lambda t: t.update({FIRST: torch.zeros(2, 5)})), "size mismatch"),
    "other names": (adapter_tensors(lambda t: t.update({"x.lora_A.weight": t.pop(FIRST)})), "tensors differ"),
    "no tensors": (adapter_tensors(lambda t: t.clear()), "tensors differ"),
    **{f"{kind} for {name}": (replaced(name, make), "")
       for name in (adapters.CONFIG, adapters.WEIGHTS) for kind, make in ENDLESS.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_one_line(case: str, sound: Path, tmp_path: Path) -> None:
    change, reason = BAD_ADAPTERS[case]
    shutil.copytree(sound / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter")
    of = section(sound, lora=LoraSection(path=str(tmp_path / "adapter")))

    def look() -> None:
        adapters.check(of)
        adapters.digest(Saved(str(tmp_path / "adapter"), "default"))
        adapters.for_training(loading.load(of, str(sound), "sdpa", "float32", None).lm, of, seed=1)

    error = refusal(look)
    assert reason in str(error) and error.exit_code == ExitCode.CONFIG


def test_a_nan_in_an_adapter_is_found(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "adapter", tmp_path / "adapter")
    adapter_tensors(lambda t: t[FIRST].fill_(float("nan")))(tmp_path / "adapter")
    of = section(sound, lora=LoraSection(path=str(tmp_path / "adapter")))
    lm = loading.load(of, str(sound), "sdpa", "float32", None).lm
    source_of = partial(spec.source_in_policy, spec_of(of), str(sound))
    finite.refuse_not_finite(lm, "float32", source_of)
    adapters.for_training(lm, of, seed=1)
    said = str(refusal(lambda: finite.refuse_not_finite(lm, "float32", source_of)))
    assert said.startswith(f"model.lora.path: {tmp_path}/adapter: ") and "lora_A" in said


BAD = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("lora", "ref", "tensor", "key", "folder"),
    [
        (None, {}, f"{BAD}.weight", "model.name_or_path", "W"),
        ({}, {}, f"{BAD}.base_layer.weight", "model.name_or_path", "W"),
        ({}, {}, f"{BAD}.lora_B.default.weight", "model.lora", "a fresh adapter"),
        ({"path": "A"}, {}, f"{BAD}.lora_A.default.weight", "model.lora.path", "A"),
        ({"path": "A"}, {}, f"{BAD}.lora_magnitude_vector.default.weight", "model.lora.path", "A"),
        ({"path": "A"}, {}, "lm_head.modules_to_save.default.weight", "model.lora.path", "A"),
        ({"path": "A"}, {}, "lm_head.original_module.weight", "model.name_or_path", "W"),
        ({"path": "A"}, {"name_or_path": "B"}, f"{BAD}.lora_A.default_reference.weight", "reference.name_or_path", "B"),
        ({"path": "A"}, {"adapter_name": "b"}, f"{BAD}.lora_A.default_reference.weight", "reference.adapter_name", "A"),
    ],
)
def test_a_nan_is_blamed_on_the_key_that_brought_it(lora, ref, tensor, key, folder) -> None:
    of = ModelSection(name_or_path="M", lora=None if lora is None else LoraSection(**lora))
    mode = {"mode": "adapter"} if ref else {}
    assert spec.source_in_policy(spec_of(of, **ref, **mode), "W", tensor) == (key, folder)


def test_a_nan_in_the_reference_is_blamed_on_its_own_key() -> None:
    of = ModelSection(name_or_path="M")
    plain, adapter = f"{BAD}.weight", f"{BAD}.lora_A.default.weight"
    blame = spec.source_in_reference
    assert blame(spec_of(of), "W", plain) == ("model.name_or_path", "W")
    assert blame(spec_of(of, name_or_path="R"), "W", plain) == ("reference.name_or_path", "R")
    with_adapter = spec_of(of, name_or_path="B", adapter_name="default")
    assert blame(with_adapter, "W", adapter) == ("reference.name_or_path", "B")
    assert blame(with_adapter, "W", plain) == ("model.name_or_path", "W")
    own = spec_of(ModelSection(name_or_path="M", lora=LoraSection(path="A")))
    assert blame(own, "W", adapter) == ("model.lora.path", "A")


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules: q_prj: llama has no such module; did you mean q_proj?"),
        (
            {"target_modules": ["q_proj", "c_attn"]},
            "c_attn: llama has no such module; it has down_proj, gate_proj, k_proj, ",
        ),
        ({"target_modules": ".*nothing"}, "fits no module of llama; it has down_proj"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"modules_to_save": ["lm_hed"]}, "did you mean lm_head?"),
        ({"exclude_modules": ["q_prj"]}, "did you mean q_proj?"),
    ],
)
def test_unknown_modules_list_the_known_ones(lora: dict[str, Any], reason: str, sound: Path) -> None:
    of = section(sound, lora=LoraSection(**{"target_modules": ["q_proj"]} | lora))
    assert reason in str(refusal(lambda: adapters.try_on(loading.skeleton(of), of)))


# ------------------------------------------------------------------------------------------- tokenizers and their templates


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "the chat template is no valid Jinja: line 1: Expected an expression"),
        ("a\n{{ b|nosuch }}", "line 2: No filter named 'nosuch'"),
        ("{% nosuch %}", "unknown tag 'nosuch'"),
        ("FILE", "is empty"),
        ("/dev/zero", "is a device, not a file"),
        ("/no/such/file", "No such file"),
        ("x" * 300, "File name too long"),
        (".", "is a folder"),
        ("~nobody/x", "cannot read"),
    ],
)
def test_a_broken_template_is_a_fault_of_the_config(template: str, reason: str, sound: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text(" \n")
    given = template.replace("FILE", str(tmp_path / "empty.jinja"))
    error = refusal(lambda: load_tokenizer(str(sound), chat_template=given))
    assert reason in str(error) and str(error).startswith("model.chat_template: ") and error.exit_code == ExitCode.CONFIG


def test_a_tokenizers_own_broken_template_too(sound: Path, tmp_path: Path) -> None:
    folder = copy_of(sound, tmp_path, holds("chat_template.jinja", "{% if %}"))
    assert "no valid Jinja" in str(refusal(lambda: load_tokenizer(str(folder))))
    load_tokenizer(str(folder), chat_template="{{ messages }}")


# ------------------------------------------------------------------------------------------------------ nothing escapes

SMALL = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)
PIECES = (
    b"[",
    b"{",
    b"}",
    b"null",
    b'"',
    b"9" * 30,
    b"-1",
    b"\\",
    b"\0",
    b"\xff",
    b",",
    b"1e999",
    b"NaN",
    b"true",
    b"[" * 3000,
)


def damaged(content: bytes, draws: random.Random) -> bytes:
    """A bit flipped, an end cut off, a piece put in or in the place of another."""
    at = draws.randrange(len(content) + 1)
    if draws.random() < 0.7:  # where all that is read first stands
        at = min(at, draws.randrange(2000))
    match draws.randrange(4):
        case 0:
            return (
                content[:at] + bytes([content[at] ^ (1 << draws.randrange(8))]) + content[at + 1 :]
                if content[at:]
                else content
            )
        case 1:
            return content[:at]
        case 2:
            return content[:at] + draws.choice(PIECES) + content[at:]
        case _:
            return content[:at] + draws.choice(PIECES) + content[at + draws.randrange(8) :]


def reads_or_refuses(seed: int, sound: Path, tmp_path: Path) -> None:
    draws = random.Random(seed)
    folder = copy_of(sound, tmp_path, indexed("a.safetensors") if draws.random() < 0.3 else lambda f: None)
    name = draws.choice([name for name in SMALL if (folder / name).exists()])
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), draws))
    of = section(folder, lora=LoraSection(path=str(folder / "adapter")))

    def adapter() -> None:
        adapters.check(of)
        lm = loading.load(of, str(sound), "sdpa", "float32", None).lm
        finite.refuse_not_finite(adapters.for_training(lm, of, seed=1).peft, "float32", lambda tensor: ("k", "n"))

    look: Callable[[], Any] = lambda: begun(of)  # noqa: E731
    if name.startswith("adapter"):
        look = adapter
    elif name.startswith(("tokenizer", "chat_template")):
        look = lambda: load_tokenizer(str(folder))  # noqa: E731
    try:
        look()
    except UserError as error:
        assert error.exit_code in (ExitCode.CONFIG, ExitCode.ENVIRONMENT, ExitCode.NUMERIC)
        assert len(str(error).splitlines()) == 1, str(error)


MANY = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@given(st.integers(0, 2**32))
@settings(max_examples=60, **MANY)
def test_no_damage_escapes(sound: Path, tmp_path: Path, seed: int) -> None:
    reads_or_refuses(seed, sound, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@given(st.integers(0, 2**32))
@settings(max_examples=2000, **MANY)
def test_no_damage_escapes_of_many(sound: Path, tmp_path: Path, seed: int) -> None:
    reads_or_refuses(seed, sound, tmp_path)

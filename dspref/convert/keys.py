"""What must be known of single keys of other trainers beyond their place: flags that exclude each other, units, defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.convert.draft import EMPTY_STEPS, TRUE, Draft, as_list, is_empty, of_pairs
from dspref.convert.log import cadence, hub, judging
from dspref.convert.objective import objective
from dspref.convert.trackers import trackers
from dspref.convert.written import short

ATTENTION = {
    "flash_attn": "flash_attention_2", "flash_attention": "flash_attention_2", "flash_attention_2": "flash_attention_2",
    "use_flash_attn": "flash_attention_2",
    "use_flash_attention_2": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "sdpa",
    "flex_attention": "auto", "xformers_attention": "sdpa", "sage_attention": "sdpa",
}  # fmt: skip


def model(draft: Draft) -> None:
    kwargs = draft.take("model_init_kwargs")
    if isinstance(kwargs, Mapping):
        draft.absorb("model_init_kwargs", kwargs, {"revision": "model_revision"})
    elif kwargs is not None:
        draft.leave("model_init_kwargs", kwargs, "is no mapping of keys")
    for key in ("template", "chat_template", "chat_template_path", "chat_template_name", "chat_template_jinja"):
        value = draft.take(key)
        text = str(value or "")
        if text.endswith((".jinja", ".jinja2", ".j2")) or "{%" in text or "{{" in text:
            draft.put("model.chat_template", text)
        elif value and text not in ("tokenizer_default", "jinja"):
            draft.leave(key, value, "the tokenizer's own chat template is used; for another give model.chat_template a file")
    half, bfloat = draft.flag("fp16", "float16"), draft.flag("bf16", "bfloat16", "pure_bf16")
    dtype = draft.take("torch_dtype", "dtype", "param_dtype", "ds.param_dtype", "mixed_precision")
    if half:
        draft.put("model.dtype", "float16")
    elif bfloat or draft.flag("float32"):
        draft.put("model.dtype", "bfloat16" if bfloat else "float32")
    elif dtype not in (None, "auto", "null"):
        draft.translate("model.dtype", "dtype", dtype)
    elif bfloat is False and half is False:
        draft.put("model.dtype", "float32", "bf16 and fp16 are false there")
    for key, ours in ATTENTION.items():
        value = draft.take(key)
        if value in TRUE and value != "auto":
            draft.put("model.attn_implementation", ours, f"{draft.name(key)}: true")
        elif isinstance(value, str):
            draft.translate("model.attn_implementation", key, value)
    off = draft.flag("disable_gradient_checkpointing")
    names = ("gradient_checkpointing", "model.gradient_checkpointing_enable", "fsdp_activation_checkpointing")
    on = draft.flag(*names, default=off is None)
    if off is not None or on is not None:
        draft.put("model.gradient_checkpointing", not off if off is not None else on)
    if draft.flag("activation_offloading"):
        draft.put("model.gradient_checkpointing", "offload", f"{draft.name('activation_offloading')}: true")
    if draft.flag("tiled_mlp"):
        draft.put("model.tiled_mlp", True)
    bits, four = draft.take("quantization_bit"), draft.flag("load_in_4bit", "ds.load_in_4bit", "use_qlora")
    if bits not in (None, 4):
        draft.leave("quantization_bit", bits, "4 bits are supported, with model.lora: model.load_in_4bit")
    if four or bits == 4:
        draft.put("model.load_in_4bit", True)
    if draft.flag("load_in_8bit"):
        draft.leave("load_in_8bit", True, "8 bits are not supported; model.load_in_4bit, or the whole weights")


def lora(draft: Draft) -> None:
    """model.lora, where an adapter is trained; else what is said of one has no effect there either."""
    kind = draft.take("adapter", "finetuning_type")
    asked = draft.flag("use_peft", "use_lora")
    path = as_list(draft.take("lora_model_dir", "adapter_name_or_path"))
    fresh = path is None and (bool(asked) or kind in ("lora", "qlora"))  # else their defaults are of no adapter
    rank = draft.take("lora_r", "lora_rank", "ds.lora.rank", default=fresh)
    alpha = draft.take("lora_alpha", "ds.lora.alpha", default=fresh)
    dropout = draft.take("lora_dropout", "ds.lora.dropout", default=fresh)
    linear = draft.flag("lora_target_linear")
    targets = draft.take("lora_target_modules", "lora_target", "target_modules", "ds.lora.target_modules")
    whole = draft.take("lora_modules_to_save", "additional_target")
    on = asked or kind in ("lora", "qlora") or (draft.dialect == "openrlhf" and isinstance(rank, int) and rank > 0)
    if kind in ("freeze", "oft"):
        draft.leave("finetuning_type", kind, "all weights are trained here, or a LoRA adapter")
    if not on:
        said = {
            "lora_r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "lora_target_modules": targets,
            "lora_modules_to_save": whole,
        }  # fmt: skip
        for key, value in said.items():
            if not is_empty(value) and value != 0:
                draft.leave(key, value, "no adapter is trained there: the whole model is")
        return
    if kind == "qlora":
        draft.put("model.load_in_4bit", True, f"{draft.name('adapter')}: qlora")
    if path:
        paths = path if isinstance(path, list) else [path]
        draft.put("model.lora.path", paths[0], "the adapter brings rank, alpha and targets")
        if len(paths) > 1:
            draft.leave("adapter_name_or_path", path, "one adapter is trained on: the first")
        return
    if draft.dialect == "llamafactory" and not draft.computes("lora_target", "lora_target_modules"):
        targets = targets or draft.assume("lora_target", "all")
    known = _adapters_defaults(draft.dialect, rank)
    for key, value, names in (
        ("r", rank, ("lora_r", "lora_rank")),
        ("lora_alpha", alpha, ("lora_alpha",)),
        ("lora_dropout", dropout, ("lora_dropout",)),
    ):
        if value is None and key in known and not draft.computes(*names):
            value = draft.assume(names[-1 if draft.dialect == "llamafactory" else 0], known[key])
        if value is not None:
            draft.put(f"model.lora.{key}", value)
    if linear or targets in ("all", "all-linear", ["all"], ["all-linear"]):
        draft.put("model.lora.target_modules", "all-linear")
    elif targets:
        draft.put("model.lora.target_modules", _words(targets))
    elif not draft.computes("lora_target_modules", "lora_target", "target_modules", "ds.lora.target_modules"):
        said = "theirs names none: peft's choice for Llama, Mistral and Qwen" if draft.dialect != "openrlhf" else ""
        draft.put("model.lora.target_modules", ["q_proj", "v_proj"] if said else "all-linear", said)
    if whole:
        draft.put("model.lora.modules_to_save", _words(whole))
    for key in ("use_rslora", "use_dora", "peft_use_rslora", "peft_use_dora"):
        if draft.flag(key):
            draft.put(f"model.lora.{key.removeprefix('peft_')}", True)


def _adapters_defaults(dialect: str, rank: Any) -> dict[str, Any]:
    """What their trainer takes for an adapter where the file says nothing, if it is not what is taken here."""
    if dialect == "llamafactory":
        return {"r": 8, "lora_alpha": 2 * rank if isinstance(rank, int) else 16}
    if dialect == "open-instruct":
        return {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1}
    return {"lora_dropout": 0.05} if dialect in ("trl", "alignment-handbook") else {}


def _words(value: Any) -> Any:
    value = as_list(value)
    return [value] if isinstance(value, str) and value.isidentifier() else value


def lengths(draft: Draft) -> None:
    unlimited = "max_length" in draft.theirs and draft.theirs["max_length"] is None
    longest = draft.take("max_length", "cutoff_len", "sequence_len", "max_seq_length", "max_len", "data.max_len")
    if longest is not None:
        draft.put("data.max_length", longest)
    elif unlimited:
        draft.empty.remove("max_length")
        draft.put("data.max_length", None, "max_length: null; an answer of any length is scored")
    of_prompt = draft.has("max_prompt_length", "max_completion_length")  # as TRL had it before 1.0
    mode = draft.take("truncation_mode", "truncation_side")
    if mode in ("keep_start", "right") and not of_prompt:
        said = f"truncation: {mode} cuts the end of prompt + answer there; here the prompt is cut first, by its beginning"
        draft.leave("truncation_mode", mode, said)
    elif mode is not None:
        draft.translate("data.truncation_mode", "truncation_mode", mode)
    order = draft.take("train_sampling_strategy")
    if draft.flag("disable_shuffling") or order == "sequential":
        by_default = order == "sequential" and "train_sampling_strategy" not in draft.given
        draft.put(
            "data.shuffle", False, "theirs takes single answers in their order; shuffle: true is as good here" * by_default
        )
    elif order not in (None, "random"):
        draft.leave(
            "train_sampling_strategy", order, "pairs are shuffled by train.seed, or stay in order: data.shuffle: false"
        )
    if (shuffled := draft.flag("shuffle_merged_datasets")) is not None:
        draft.put("data.shuffle", shuffled)


def batch(draft: Draft) -> None:
    """train.pairs_per_step of what a GPU takes, accumulation, and the number of GPUs."""
    whole = draft.take("train_batch_size", "train.batch_size")
    alone = whole is None and not draft.computes("train_batch_size", "train.batch_size")
    own = draft.take("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size", default=alone)
    micro = draft.take("micro_train_batch_size", "train.micro_batch_size")
    total = draft.take("batch_size")
    steps = draft.take("gradient_accumulation_steps", default=alone and total is None)
    parts = {"per_device_train_batch_size": own, "gradient_accumulation_steps": steps, "batch_size": total}
    if isinstance(whole, int):
        said = f"{draft.name('train_batch_size')}: {whole}" + (f", in micro-batches of {micro}" if micro else "")
        draft.put("train.pairs_per_step", whole, f"{said}; {_unit(draft)}")
    for key, value in parts.items():
        if value is not None and isinstance(whole, int):
            draft.leave(key, value, f"{draft.name('train_batch_size')} goes before it")
        elif value is not None and not isinstance(value, int):
            draft.leave(key, value, "is no number of pairs or micro-steps; write train.pairs_per_step")
        elif value is not None and key == "batch_size" and isinstance(steps, int):
            draft.leave(key, value, "gradient_accumulation_steps goes before it")
    if isinstance(whole, int):
        return
    own = own if isinstance(own, int) else 1
    steps = steps if isinstance(steps, int) else total // own if isinstance(total, int) and total >= own > 0 else 1
    said = f"{own} per GPU x {steps} accumulated x {draft.gpus} GPUs; {_unit(draft)}"
    draft.put("train.pairs_per_step", own * steps * draft.gpus, said)


def _unit(draft: Draft) -> str:
    """What a step counts, and what bounds the memory."""
    said = "here data.tokens_per_pack bounds the memory"
    if draft.objective not in ("kto", "bco") or of_pairs(draft.given):
        return said
    of_trl = draft.dialect in ("trl", "alignment-handbook", "axolotl")
    return "single answers" + " (of a row that is a pair theirs makes two: halve it then)" * of_trl + f"; {said}"


def steps(draft: Draft) -> None:
    most = draft.take("max_steps", "max_train_steps")
    epochs = draft.take(
        "num_train_epochs", "num_epochs", "max_epochs", "train.max_epochs", "epochs",
        default=most in EMPTY_STEPS and not draft.computes("max_steps", "max_train_steps"),
    )  # fmt: skip
    if most not in EMPTY_STEPS:
        said = f"and not {draft.name('num_train_epochs')}: {short(epochs)}" if epochs is not None else ""
        draft.put("train.max_steps", most, said)
    elif epochs is not None:
        draft.put("train.num_train_epochs", epochs)
    rate = draft.take("learning_rate", "adam.lr", "lr")
    if rate is not None:
        draft.put("train.learning_rate", rate)
    _schedule(draft)
    norm = draft.take("max_grad_norm", "clip_grad_norm", "max_norm", "gradient_clipping")
    if norm is not None:
        cuts = not isinstance(norm, int | float) or norm >= 0
        said = "" if cuts else f"{draft.name('max_grad_norm')}: {norm}, which cuts nothing"
        draft.put("train.max_grad_norm", norm if cuts else 0, said)
    betas = as_list(draft.take("adam_betas", "adam.betas"))
    if isinstance(betas, list) and len(betas) == 2:
        draft.put("train.adam_beta1", betas[0])
        draft.put("train.adam_beta2", betas[1])
    optimizer = draft.take("optim", "optimizer")
    if isinstance(optimizer, str):
        draft.translate("train.optim", "optim", optimizer)
    if draft.flag("use_8bit_optimizer"):
        draft.put("train.optim", "adamw_8bit")
    if draft.has("data_seed"):
        draft.leave("data_seed", draft.take("data_seed"), "train.seed is the seed of data order too")
    if (seconds := draft.take("ddp_timeout", "timeout")) is not None:
        said = "bounds one exchange between GPUs there; here the time without progress"
        draft.put("train.hang_timeout", seconds, f"{draft.name('ddp_timeout')} {said}")


def _schedule(draft: Draft) -> None:
    """The learning rate's course. What is given for one way to warm up makes the other's default nothing."""
    schedule = draft.take("lr_scheduler_type", "lr_scheduler")
    warmup = draft.take("warmup_steps")
    by_steps = bool(warmup) or draft.computes("warmup_steps")
    ratio = draft.take("warmup_ratio", "lr_warmup_ratio", default=not by_steps and schedule != "constant")
    if isinstance(warmup, float) and 0 < warmup < 1:  # as transformers 5 has it
        if draft.given.get(draft.called.get("warmup_ratio", "")):
            draft.leave("warmup_ratio", ratio, f"warmup_steps: {warmup} goes before it")
        ratio, warmup, by_steps = warmup, None, False
    if schedule == "constant" and (warmup or ratio):
        said = f"{draft.name('lr_scheduler_type')}: constant, with a warm-up"
        draft.put("train.lr_scheduler_type", "constant_with_warmup", said)
    elif schedule:
        draft.translate("train.lr_scheduler_type", "lr_scheduler", schedule)
    least = draft.take("cosine_min_lr_ratio", "min_lr_ratio", default=str(schedule) == "cosine_with_min_lr")
    if least is not None and str(schedule).startswith("cosine"):
        draft.put("train.lr_scheduler_type", "cosine_with_min_lr")
        draft.put("train.lr_scheduler_kwargs", {"min_lr_rate": least})
    elif least is not None:
        draft.leave("cosine_min_lr_ratio", least, f"has no effect with {draft.name('lr_scheduler')}: {short(schedule)}")
    if warmup:
        said = f"and not {draft.name('warmup_ratio')}: {short(ratio)}" if ratio else ""
        draft.put("train.warmup_steps", warmup, said)
    elif not by_steps and draft.get("train.lr_scheduler_type") != "constant":
        draft.put("train.warmup_ratio", ratio or 0.0)


def strategy(draft: Draft) -> None:
    """deepspeed: the one of ds_configs/ that theirs is like."""
    file = draft.take("deepspeed", "deepspeed_config", "deepspeed_config_file")
    stage = draft.take("zero_stage", "ds.zero_stage", default=file is None)
    states = draft.take("adam_offload", "ds.adam_offload", "offload_optimizer", "offload_optimizer_device")
    weights = draft.take("offload_param", "offload_param_device", "fsdp_offload_params")
    sharded = draft.take("fsdp")
    inner = file if isinstance(file, Mapping) else _read(str(file)) if file else {}
    zero = inner.get("zero_optimization", inner)
    if isinstance(zero, Mapping) and "stage" in zero:
        stage = stage if stage is not None else zero["stage"]
        states, weights = states or zero.get("offload_optimizer"), weights or zero.get("offload_param")
    elif isinstance(file, str):
        name = Path(file).name.lower()
        stage = stage if stage is not None else next((int(c) for c in name if c in "0123"), None)
        states = states or "offload" in name or None
        weights = weights or ("all" in name and bool(states)) or None
    if draft.get("model.load_in_4bit") and stage in (None, 3):
        draft.put("deepspeed", "ds_configs/zero2.json", "ZeRO-3 cannot shard weights in 4 bits")
        return
    if stage is None and not sharded and file is None:
        draft.put(
            "deepspeed", "ds_configs/zero3.json", "theirs names no strategy; zero1 and zero2 take more memory, less traffic"
        )
        return
    stage = stage if stage in (1, 2, 3) else 1 if stage == 0 else 3
    on = [_is_on(states), _is_on(weights)]
    name = "zero3_offload_all" if stage == 3 and on[1] else f"zero{max(stage, 2)}_offload" if on[0] else f"zero{stage}"
    named = f"{draft.name('deepspeed')}: {short(file)}" if file else f"ZeRO stage {stage}"
    said = f"fsdp: {short(sharded)}" if sharded and not file else named
    draft.put("deepspeed", f"ds_configs/{name}.json", f"{said}; batch size, precision and optimizer are this file's")


def _is_on(device: Any) -> bool:
    device = device.get("device", "none") if isinstance(device, Mapping) else device
    return bool(device) and device not in ("none", "false", "False")


def _read(path: str) -> Mapping[str, Any]:
    try:
        found = reading.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


CHAPTERS: tuple[Callable[[Draft], None], ...] = (
    model, lora, objective, lengths, batch, steps, strategy, cadence, judging, trackers, hub,
)  # fmt: skip

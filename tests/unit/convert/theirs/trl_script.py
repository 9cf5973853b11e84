"""The form of a TRL script."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

MODEL = "example/Qwen-0.5B"
model = AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.bfloat16, attn_implementation="sdpa")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = load_dataset("example/pairs", split="train[:5000]")
args = CPOConfig(
    output_dir="Qwen-CPO-SimPO",
    loss_type="simpo",
    cpo_alpha=0.5,
    simpo_gamma=1.2,
    beta=2.0,
    max_length=1024,
    learning_rate=1e-6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=16,
    num_train_epochs=1,
    warmup_ratio=0.1,
    max_steps=len(dataset) // 32,
    bf16=True,
    logging_steps=10,
    report_to="none",
)
peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = CPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
trainer.train()

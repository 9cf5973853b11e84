set -x
SAVE=./checkpoint/llama-8b-dpo

deepspeed --num_gpus 8 --module openrlhf.cli.train_dpo \
   --save_path $SAVE \
   --save_steps 200 \
   --logging_steps 1 \
   --eval_steps -1 \
   --train_batch_size 256 \
   --micro_train_batch_size 1 \
   --pretrain example/llama-8b-sft \
   --ref_pretrain example/llama-8b-sft \
   --bf16 \
   --max_epochs 1 \
   --max_len 8192 \
   --zero_stage 3 \
   --adam_offload \
   --ref_offload \
   --learning_rate 5e-7 \
   --beta 0.1 \
   --nll_loss_coef 0.2 \
   --dataset example/preference-mix \
   --apply_chat_template \
   --chosen_key better \
   --rejected_key worse \
   --flash_attn \
   --load_checkpoint \
   --packing_samples \
   --gradient_checkpointing \
   --use_wandb $WANDB_TOKEN

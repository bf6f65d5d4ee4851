#!/usr/bin/env bash
# The whole pipeline with its real defaults, on one GPU with 24 GB: DeepSeek-R1-Distill-Qwen-7B on the public rows.
# Needs: a network, 29 GiB of free RAM for merging, 80 GB of disk, the terms of the dataset accepted on its hub page,
# and, for tracking, a key in .env. Instructions.txt has the rest. Run it again after any end: what is done is skipped,
# and what was stopped (exit code 75 after a SIGTERM) goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. Does tracking work, before the GPU is paid for? (3: no key, the run is kept offline)
python wandb_sample.py || [ $? -eq 3 ]

# 2. What is in the rows and what is wrong with them; the split by lexeme -> prepared/
python inspect_hf_dataset.py --output_dir prepared

# 3. LoRA SFT -> stoney_lora_ckpt/ (adapter) and stoney_lora_merged/
python train_lora.py --dataset prepared --batch_size 4 --resume

# 4. GRPO on a reward that was attacked first -> stoney_rl_grpo_ckpt/ (adapter) and stoney_rl_grpo/
python train_grpo.py --lora_path stoney_lora_merged --batch_size 64 --group_size 16 --resume

# 5. Base, SFT, GRPO and a memoriser on held-out rows -> evaluation/
python evaluate_model.py --model_path stoney_rl_grpo --baseline stoney_lora_merged --baseline retrieval --num_samples 400

# 6. Inside SFT and GRPO: heads, neurons, paths, and what training changed -> analysis/stoney_rl_grpo/
#    In bf16 and without models of random weights: fp32, or a second model beside the first, is 28 GiB.
python analyze_with_tlens.py \
    --model_path stoney_rl_grpo --compare stoney_lora_merged --families lookup lookup_form lookup_english \
    --dtype bf16 --random_models 0

# 7. Stoney against English, French and arithmetic; what GRPO changed in SFT -> comparison/stoney_rl_grpo/
#    Two models at once, in bf16: 28 GiB.
python compare_reasoning.py \
    --model_path stoney_rl_grpo --compare stoney_lora_merged --dtype bf16 --no-random_model --batch_size 64

"""TRL's GRPOTrainer, synchronous, on reverse-text; prints one JSON object. Started by `against_trl.py`.

Fair: fp32 and AdamW as ours, the same model, groups, clipping and limit of tokens, one update a batch, token mean, no
reference model, no gradient checkpointing, one generation call a step for the whole batch, no checkpoint written.
"""

import difflib
import json
import sys
import time

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model_dir, data, steps, batch, out = sys.argv[1:6]
threads, max_tokens = int(sys.argv[6]), int(sys.argv[7])
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
config = GRPOConfig(
    output_dir=out,
    max_steps=int(steps),
    per_device_train_batch_size=int(batch),
    num_generations=16,
    steps_per_generation=1,
    num_iterations=1,
    max_completion_length=max_tokens,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    adam_beta2=0.95,
    weight_decay=0.0,
    max_grad_norm=1.0,
    beta=0.0,
    epsilon=0.2,
    epsilon_high=0.28,
    scale_rewards="none",
    loss_type="dapo",
    temperature=1.0,
    top_k=0,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    logging_steps=1,
    disable_tqdm=True,
    seed=0,
)


def reward(completions: list, text: list[str], **rest: object) -> list[float]:
    return [
        difflib.SequenceMatcher(None, one[0]["content"], wanted[::-1]).ratio()
        for one, wanted in zip(completions, text, strict=True)
    ]


rows = load_dataset("json", data_files=data, split="train").map(
    lambda row: {"prompt": [{"role": "user", "content": row["text"]}]}
)
trainer = GRPOTrainer(
    model=model, args=config, train_dataset=rows, processing_class=tokenizer, reward_funcs=reward
)
started, cpu = time.perf_counter(), time.process_time()
trainer.train()
log = [entry for entry in trainer.state.log_history if "reward" in entry]
print(
    json.dumps(
        {
            "train_s": time.perf_counter() - started,
            "train_cpu_s": time.process_time() - cpu,
            "first": log[0]["reward"],
            "last": log[-1]["reward"],
            "mean_length": log[-1]["completions/mean_length"],
        }
    )
)

"""TRL's SFTTrainer on the reverse-text demonstrations; prints one JSON object. Started by `against_trl.py`.

Fair: fp32 and AdamW as ours, the loss on the answer only, fused optimizer, no gradient checkpointing, rows of a batch
sorted by length as far as TRL can, no checkpoint written.
"""

import json
import sys
import time

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_dir, data, steps, batch, out = sys.argv[1:6]
threads = int(sys.argv[6])
torch.set_num_threads(threads)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir), attn_implementation="eager")
config = SFTConfig(
    output_dir=out,
    max_steps=int(steps),
    per_device_train_batch_size=int(batch),
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    warmup_steps=4,
    adam_beta2=0.95,
    weight_decay=0.0,
    max_grad_norm=1.0,
    completion_only_loss=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    logging_steps=1,
    disable_tqdm=True,
    dataset_num_proc=None,
    seed=0,
)
rows = load_dataset("json", data_files=data, split="train").map(
    lambda row: {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
)
trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
started, cpu = time.perf_counter(), time.process_time()
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(
    json.dumps(
        {
            "train_s": time.perf_counter() - started,
            "train_cpu_s": time.process_time() - cpu,
            "last": losses[-1],
        }
    )
)

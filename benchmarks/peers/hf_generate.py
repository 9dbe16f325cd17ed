"""transformers' own two ways to generate, started by `engine.py`: hf_generate.py MODEL THREADS SLOTS, tasks on stdin.

A task is a line {"way": ..., "prompts": [[token, ...], ...], "lengths": [...]}; the answer is a line with the useful
tokens and the seconds. Ways: `generate`, `continuous` (batching), and `products`, which generates nothing: the matrix
products of the weights alone, with all slots always in use.

Fair: fp32, SDPA, one process that stays up, no logprobs asked for, and for continuous batching a cache of the size that
the work needs (its default, sized by the free memory, is 20 times slower).
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAGE = 32
LONGEST = 128

model_dir, threads, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(
    model_dir, dtype=torch.float32, attn_implementation="sdpa"
).eval()


def settings(tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)


def generate(prompts: list[list[int]], lengths: list[int]) -> int:
    """Batches of as many rows as there are slots, padded at the left; each is as long as its longest answer."""
    for start in range(0, len(prompts), slots):
        some = prompts[start : start + slots]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in some])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some])
        longest = max(lengths[start : start + slots])
        found = model.generate(ids, attention_mask=mask, generation_config=settings(longest))
        assert found.shape[1] == width + longest
    return sum(lengths)


def continuous(prompts: list[list[int]], lengths: list[int]) -> int:
    pages = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=slots * LONGEST // PAGE, max_batch_tokens=4 * slots
    )
    found = 0
    with model.continuous_batching_context_manager(
        generation_config=settings(LONGEST), continuous_batching_config=pages
    ) as manager:
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=f"{i}", max_new_tokens=length)
        for _ in prompts:
            found += len(manager.get_result().generated_tokens)
    assert found == sum(lengths)
    return found


@torch.inference_mode()
def products(prompts: list[list[int]], lengths: list[int]) -> int:
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {width: torch.randn(slots, width) for width in {layer.in_features for layer in layers}}
    for _ in range(-(-sum(lengths) // slots)):
        for layer in layers:
            layer(inputs[layer.in_features])
    return sum(lengths)


answers = sys.stdout
sys.stdout = sys.stderr
print("ready", file=answers, flush=True)
for line in sys.stdin:
    task = json.loads(line)
    play = {"generate": generate, "continuous": continuous, "products": products}[task["way"]]
    started = time.perf_counter()
    tokens = play(task["prompts"], task["lengths"])
    print(json.dumps({"tokens": tokens, "wall_s": time.perf_counter() - started}), file=answers, flush=True)

"""Tiny models of families that are not like the example's: of experts, of images, with states, with caps."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_STATES = {"mamba_d_state": 4, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_CONFIGS = {
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "granite": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**_ROUTED, "n_shared_experts": 1},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "falcon_h1": _STATES,
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "qwen3_next": {
        **_EXPERTS,
        **_LINEAR,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
}
_IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def config(family, **changes):
    if family == "gemma3":  # of images and text
        text = AutoConfig.for_model("gemma3_text", **_TEXT, **changes)
        images = AutoConfig.for_model("siglip_vision_model", **_IMAGES)
        return AutoConfig.for_model("gemma3", text_config=text.to_dict(), vision_config=images.to_dict())
    return AutoConfig.for_model(family, **{**_TEXT, **_CONFIGS[family], **changes})


def model(family, attention="eager", **changes):
    """Drawn from one seed. Biases by which routers choose experts are zero at birth, and not here."""
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(
        config(family, **changes), dtype=torch.float32, attn_implementation=attention
    )
    for name, value in found.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.normal_(std=0.1)
    return found

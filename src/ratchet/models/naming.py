"""The names of tensors in files, which are the base's own, and those of the modules that transformers makes of them.

    in files       model.layers.0.mlp.experts.3.gate_proj.weight, ...up_proj.weight     two for each expert
    in the model   model.layers.0.mlp.experts.gate_up_proj                              all of them in one

For most families both are the same, and nothing is done. The way in and the way out are transformers' own, so a policy
has the names that `save_pretrained` would write. They are imported where they are needed: vLLM may come with a version
that has none, and whose models have the names of the files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ratchet.errors import Refusal


def outward(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors under the names of the files that this model was read from, or that its family has."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def inward(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors of files under the names that this model has for them; on the meta device if the model is there.

    Raises: Refusal if one is unknown, misshapen, or not to be put together with others.
    """
    if tensors.keys() <= model.state_dict().keys():
        return tensors
    device = "meta" if model.device.type == "meta" else "cpu"
    module = empty(model.config)
    info = load(module, {name: tensor.to(device) for name, tensor in tensors.items()}, device, model.dtype)
    if info.unexpected_keys:
        unknown = ", ".join(sorted(info.unexpected_keys)[:3])
        raise Refusal(f"The file has tensors that the model does not know: {unknown}.")
    if info.mismatched_keys:
        name, found, expected = min(info.mismatched_keys)
        raise Refusal(f"{name} has shape {list(found)}; the model's is {list(expected)}.")
    if info.conversion_errors:
        name = min(info.conversion_errors)
        raise Refusal(f"{name} cannot be made of the tensors in the file.")
    return {name: t for name, t in module.state_dict().items() if name not in info.missing_keys}


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load(module: PreTrainedModel, tensors: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> Any:
    """Put the tensors of files into an empty model, which keeps in mind how they had to be converted.

    Returns transformers' report of what did not fit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(module)
    plan = LoadStateDictConfig(dtype=dtype, device_map={"": device}, weight_mapping=mapping)
    return convert_and_load_state_dict_in_model(module, tensors, plan)[0]

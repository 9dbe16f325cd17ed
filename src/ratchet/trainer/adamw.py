"""torch's fused AdamW on what this rank holds of each parameter.

Source: Decoupled Weight Decay Regularization, arXiv:1711.05101
"""

import torch
from torch.optim.adamw import adamw

from ratchet.trainer.world import own


class AdamW(torch.optim.AdamW):
    """Its state, which must be there from the start, is `exp_avg` and `exp_avg_sq`, shaped as the parameter, and
    `step`. Where `found_inf`, () float32, is one, an update changes nothing."""

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [own(p) for p in parameters],
                [own(p.grad) for p in parameters],
                [own(state["exp_avg"]) for state in states],
                [own(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

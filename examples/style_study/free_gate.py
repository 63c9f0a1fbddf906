"""A gate without prototypes, for comparison: weights of feature columns, learned from the columns alone."""

from __future__ import annotations

import torch
from torch import nn

from modeling_pico.model.alignment_heads_pico import FineGrainedHead
from modeling_pico.model.prototypes_pico import column_weights


SIDES = ("image", "text")


def column_statistics(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, maximum and minimum `(batch, dim, 4)` of the columns of `(batch, tokens, dim)`."""
    values, valid = tokens.float() * tokens.shape[-1] ** 0.5, mask.bool().unsqueeze(-1)
    count = valid.sum(dim=1).clamp(min=1)
    mean = (values * valid).sum(dim=1) / count
    spread = (((values - mean.unsqueeze(1)).square() * valid).sum(dim=1) / count + 1e-8).sqrt()
    highest = values.masked_fill(~valid, -torch.inf).amax(dim=1)
    lowest = values.masked_fill(~valid, torch.inf).amin(dim=1)
    return torch.stack([mean, spread, highest, lowest], dim=-1).masked_fill(~valid.any(dim=1, keepdim=True), 0.0)


class FreeGateHead(FineGrainedHead):
    """Weights each column by what a small network, one a side, reads in its statistics; starts at weights of one."""

    def __init__(self, config, hidden_size: int = 32):
        super().__init__(config)
        gate = {side: nn.Sequential(nn.Linear(4, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1)) for side in SIDES}
        self.gate = nn.ModuleDict(gate)
        for layers in gate.values():
            nn.init.zeros_(layers[-1].weight)
            nn.init.constant_(layers[-1].bias, 2.0)

    def weight(self, tokens, mask, modality):
        probability = self.gate[modality](column_statistics(tokens, mask)).squeeze(-1).sigmoid()
        return tokens * column_weights(probability).unsqueeze(1), probability

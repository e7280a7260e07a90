"""What codes lose: the squared error of a linear's output, from its weight's error and the Hessian of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def objective(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ of each row, float32 [out]: its mean squared error at the output. error: float32 [out, in]."""
    return torch.linalg.vecdot(error @ hessian, error)

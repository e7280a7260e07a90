"""How far an artifact's answers are from the checkpoint's."""

from __future__ import annotations

import numpy as np
import torch

TEXT = [1, 400, 23, 871, 5000, 77, 78, 79, 1204, 9, 2333, 640, 3, 18, 5500, 41]


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())

"""Damage to what lies beside the weights: tokenizers, end tokens, the configurations that runners read."""

from __future__ import annotations

from tests import damage
from tests.damages.record import ALL, Damage

ROWS = (Damage("tokenizer", ALL, files=damage.shift_tokenizer),)

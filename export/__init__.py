"""Lowering a quantized checkpoint to the files of one runtime."""

import logging


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for what importing torchao says of itself: enums registered twice, kernels for CUDA that are not here."""
    message = record.getMessage()
    return "is an Enum subclass" not in message and not message.startswith("Failed to load")


# ExecuTorch brings torchao, and many modules here are the first to import either
for _name in ("torch.utils._pytree", "torchao"):
    logging.getLogger(_name).addFilter(_worth_telling)

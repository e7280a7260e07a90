"""Reasons that several records share for what their formats do not have."""

from __future__ import annotations

from export.formats import Without

ANY_CHIP = Without("it is not compiled for one chip")
TOKENIZER_AS_IT_IS = Without("its tokenizer's files are the checkpoint's own")
NO_LEVELS = Without("only MatMulNBits of onnxruntime has accuracy levels")
FLOATS = Without("its activations are floats")
ROUNDED_AT_RUN_TIME = Without("scales of its 8-bit activations are computed at run time and stand in no file")
NOT_EXECUTORCH = Without("it is no program of ExecuTorch's")
NOTHING_MORE = Without("nothing beside what its reader names as untold")

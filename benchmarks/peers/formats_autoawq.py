"""AutoAWQ's own unpacking on the CPU: the weights that it computes with for our folders.

    PYTHON formats_autoawq.py OUT FOLDER...

Its packing_utils is loaded by itself: importing all of awq takes kernels that no CPU has.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file


def packing_utils() -> ModuleType:
    """awq/utils/packing_utils.py."""
    package = importlib.util.find_spec("awq")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    out, awq = Path(sys.argv[1]), packing_utils()
    for folder in map(Path, sys.argv[2:]):
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        tensors = load_file(folder / "model.safetensors")
        found: dict[str, torch.Tensor] = {}
        for name in tensors:
            if name.endswith(".qweight"):
                stem = name.removesuffix(".qweight")
                parts = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros"))
                scales = tensors[f"{stem}.scales"].float()
                weight = awq.dequantize_gemm(*parts, scales, settings["bits"], settings["group_size"])
                found[f"{stem}.weight"] = weight.T.contiguous()
        save_file(found, out / f"read-autoawq-{folder.name}.safetensors")
        print(folder.name, len(found), flush=True)


if __name__ == "__main__":
    main()

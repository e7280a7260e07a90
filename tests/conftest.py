"""What every test needs: nothing is written into the user's own folders."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Runs append to the history; those of tests to one of their own, in child processes too.
_folder = tempfile.TemporaryDirectory(prefix="bluelm-export-tests-")
os.environ["BLUELM_EXPORT_HISTORY"] = str(Path(_folder.name) / "history.sqlite")
os.environ.pop("MLFLOW_TRACKING_URI", None)

# make run    the whole way on the demo model: quantize, lower, compile for a Snapdragon NPU, judge, bundle
# make test   lint, types and tests
# make docs   the API reference, from the docstrings, into build/docs
# All make .venv on the first call and reuse it afterwards, and install the Debian packages that they need
# (tests/packages.py) where they may: as root, or by a sudo that asks for no password.
#
#   make run ARGS="--soc sm8750 --method awq"      further options of bluelm-export
#   make run PYTHON=python3.12                     another Python (3.11 or newer)
#   make run PIP_ARGS="..."                        options for pip, such as the index of torch's CPU build

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := bluelm calibration compress export targets eval pipeline !pipeline.__main__
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --use-pep517 $(PIP_ARGS)

.PHONY: run test docs clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed-qualcomm,bundle
	@$(BIN)/python tests/packages.py libatomic1
	@$(BIN)/bluelm-export --target snapdragon --out dist $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python tests/packages.py
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

docs: $(VENV)/.installed-test,docs
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory build/docs $(PACKAGES)

clean:
	rm -rf $(VENV) build *.egg-info

# torch comes first and alone: without it named, pip would fetch the newest build for CUDA, several GB.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing $(TORCH) and bluelm-export[$*] into $(VENV) ..."
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed ($(PYTHON) is older or missing)." >&2; \
	  echo "  fix: install it, or name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing." >&2; \
	  echo "  fix: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

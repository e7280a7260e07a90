# make run    the whole way on the demo model: quantize, lower, compile for a Snapdragon NPU, judge, bundle
# make test   lint, format, types and tests
# make quick  lint, format and the tests that take under a second: no Debian package, Linux or macOS
# make slow   the whole suite, which writes down what `make quick` leaves out (tests/slow.txt)
# make docs   the API reference, from the docstrings, into build/docs
# make lock   requirements.lock anew: the versions that all of these install
# All make .venv on the first call and reuse it afterwards; run, test and slow install the Debian packages that they
# need (tests/packages.py) where they may: as root, or by a sudo that asks for no password.
#
#   make run ARGS="--soc sm8750 --method awq"      further options of bluelm-export
#   make run PYTHON=python3.12                     another Python (3.11 or newer)
#   make run PIP_ARGS="..."                        options for pip, such as the index of torch's CPU build
#   make test LOCKED=                              the newest versions that pyproject.toml allows
#   make lock UPGRADE=--upgrade                    the newest ones from now on

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
LOCKED ?= --constraint requirements.lock
UPGRADE ?=
VENV := .venv
BIN := $(VENV)/bin
SUITE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope
PACKAGES := bluelm calibration compress export targets eval pipeline !pipeline.__main__
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)",$$/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --use-pep517 $(LOCKED) $(PIP_ARGS)

.PHONY: run test quick slow docs lock clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed-qualcomm,bundle
	@$(BIN)/python tests/packages.py libatomic1
	@$(BIN)/bluelm-export --target snapdragon --out dist $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python tests/packages.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(SUITE)

quick: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SUITE) -m "not slow and not requires"

slow: $(VENV)/.installed-test
	@$(BIN)/python tests/packages.py
	$(SUITE) --write-slow

docs: $(VENV)/.installed-test,docs
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory build/docs $(PACKAGES)

# For every system and Python that pyproject.toml allows. Versions stay as they are unless they have to move.
lock: $(BIN)/python
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --no-annotate --quiet $(UPGRADE) \
	  --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info

# torch comes first and alone: without it named, pip would fetch the newest build for CUDA, several GB.
$(VENV)/.installed-%: pyproject.toml requirements.lock | $(BIN)/python
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

# Two commands: `make reproduce` runs the paper, `make test` runs all tests. Both make .venv first if it is not there.
PROFILE ?= quick
# JOBS: pages at a time, one for each processor, four at most
JOBS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ "$$n" -gt 4 ] && n=4; echo $$n)
# PYTHON: the interpreter that makes .venv.  TORCH_INDEX: another index for PyTorch, such as
# https://download.pytorch.org/whl/cpu, which saves the CUDA packages on a machine without a GPU.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# what glibc should keep instead of giving it back (see nbs/90_pipeline.ipynb)
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_TOP_PAD_ ?= 67108864

.PHONY: reproduce test install status notebooks check docs lab clean help

reproduce: $(VENV)/.installed   ## run the paper: make reproduce PROFILE=smoke|quick|study|full
	@$(BIN)/hyperface reproduce --profile $(PROFILE) -j $(JOBS)

test: $(VENV)/.installed        ## all tests: notebooks, package, command line, the whole pipeline at `smoke`
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" $(PYTEST)

status: $(VENV)/.installed      ## what would run, and why
	@$(BIN)/hyperface status --profile $(PROFILE)

notebooks: $(VENV)/.installed   ## execute every library notebook in place
	@$(BIN)/python tools/nb.py run

check: $(VENV)/.installed       ## are notebooks, package and README in step?
	@$(BIN)/python tools/nb.py check

docs: $(VENV)/.installed        ## the notebooks as a searchable site that needs no network: _docs/html/index.html
	@$(BIN)/python tools/docs.py

lab: $(VENV)/.installed         ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

install: $(VENV)/.installed

$(VENV)/.installed: settings.ini constraints.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 was not found; name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] > (3, 11))' || echo "note: pins were tried on Python 3.11; this is $$($(PYTHON) -V)"
	@echo "Installing into $(VENV) (a few minutes, about 2 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)")
	@$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { echo "OpenCV's window libraries are missing here; taking its headless build"; \
	  $(BIN)/pip uninstall --quiet -y opencv-python && $(BIN)/pip install --quiet --no-deps --force-reinstall "opencv-python-headless"; }
	@touch $@

clean:                          ## remove what runs leave; keeps .venv and committed reports
	rm -rf runs reports/smoke reports/quick _docs build *.egg-info

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

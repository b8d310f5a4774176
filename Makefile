# Every target installs what it needs into .venv first; `make PYTHON=python3.12 VENV=.venv-3.12 ...`
# picks another Python and another place.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= # all
BIN := $(VENV)/bin

.PHONY: demo test test-all docs aot ptxas lint clean
.NOTPARALLEL: # the targets share one environment

demo: $(VENV)/examples.installed
	$(BIN)/python examples/train_gpt.py

# The order is kept so that the longest file is not the last.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Every kind of thing once; all cases of all tests. Of these, what asks of every optimizer, and pages,
# compile quickly; what looks at bits and bounds does so in programs with all of XLA's instructions.
test: $(VENV)/tests.installed
	$(PYTEST) --once --quick $(TESTS)
test-all: $(VENV)/tests.installed
ifeq ($(strip $(TESTS)),)
	$(PYTEST) --quick tests/conformance stquant_jax docs README.md
	$(PYTEST) tests --ignore tests/conformance
else
	$(PYTEST) $(TESTS)
endif

# The pages in build/docs/index.html. A warning is an error, so is a name that means nothing.
docs: $(VENV)/docs.installed
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

# A large download, 700 MB on disk, by which `make test` also compiles for TPUs.
aot: $(VENV)/aot.installed

# The GPU kernels through Nvidia's assembler, and the XLA backend for GPUs, without one; Python 3.12 at least. CUDA=DIR has the
# plugin already.
CUDA ?= build/cuda
ptxas: $(VENV)/benchmarks.installed
	test -d $(CUDA) || { jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	    $(BIN)/pip install --quiet --no-deps --target $(CUDA) jax-cuda13-plugin==$$jax \
	    jax-cuda13-pjrt==$$jax nvidia-cuda-nvcc nvidia-cuda-nvdisasm; }
	$(BIN)/python -m benchmarks.gpu.ptxas $(CUDA)
	$(BIN)/python -m benchmarks.gpu.xla $(CUDA)

lint: $(VENV)/dev.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv* build dist

# The stem is the name of an extra in pyproject.toml.
$(VENV)/%.installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

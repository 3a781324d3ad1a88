# `make test` and `make bench` set everything up by themselves in .venv; nothing else needs to be installed but
# Python >= 3.10, a C++ compiler and make. PYTHON chooses the interpreter, M2F_CUDA=auto|on|off the CUDA library. Where no
# CUDA toolkit is on PATH, nvcc comes from PyPI (105 MB).
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Python compiles the modules that it imports; pip would compile all of them first, most of a minute's work.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
STAMP := $(VENV)/.stamp
# What an installation in .venv is made from; the package itself is installed editable.
SOURCES := pyproject.toml tests/requirements.txt setup.py CMakeLists.txt $(wildcard build_backend/*.py) $(shell find csrc -type f -name '*.[ch]*')
CXX_FILES := $(shell find csrc tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: test test-slow test-peers fuzz sanitize coverage docs docs-figures bench lint format gpu gpu-bundle resources clean

# torch is pinned and goes first: resolved as somebody's dependency it may arrive with gigabytes of CUDA.
$(STAMP)-venv: pyproject.toml build_backend/cuda_compiler.py
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -q $(TORCH)
	$(INSTALL) -q 'setuptools>=77' numpy cmake ninja
	$(BIN)/python build_backend/m2f_build.py > $(VENV)/needed.txt
	$(INSTALL) -q numpy -r $(VENV)/needed.txt
	@touch $@

# Without isolation, so that a change compiles what it touches; what the tests need is downloaded meanwhile. Shows the
# summary, and each file when it is compiled.
$(STAMP)-package: $(STAMP)-venv $(SOURCES)
	@$(INSTALL) -q -r tests/requirements.txt & requirements=$$!; \
		PATH="$(abspath $(BIN)):$$PATH"; set -o pipefail; \
		$(INSTALL) --no-build-isolation --no-deps -v -e . 2>&1 \
		| tee $(VENV)/install.log | sed -un '/^ *m2f-kernels$$/,/ into /p; /^ *\[[0-9]*\/[0-9]*\] /p; /m2f-kernels: /p' \
		|| { kill $$requirements; cat $(VENV)/install.log; exit 1; }; \
		wait $$requirements
	@touch $@

# The peers measured against. One that cannot be built here is reported in the tables as not installed.
$(STAMP)-bench: $(STAMP)-package benchmarks/requirements.txt
	$(INSTALL) -q $(TORCH) -r benchmarks/requirements.txt
	PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) -q --no-build-isolation packaging wheel torch-ms-deform-attn==0.1.1 \
		|| echo "torch-ms-deform-attn could not be installed; its rows will say so"
	@touch $@

$(STAMP)-docs: $(STAMP)-package docs/requirements.txt
	$(INSTALL) -q -r docs/requirements.txt
	@touch $@

$(STAMP)-lint: $(STAMP)-venv
	$(INSTALL) -q ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	@touch $@

# In as many processes as there are cores, at most eight: each takes about 1.5 GiB. JOBS=0 runs in one, for a debugger.
# OMP_NUM_THREADS, which nproc would take for the number of cores, is about threads.
JOBS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1); echo $$(( cores > 8 ? 8 : cores )))
test: $(STAMP)-package
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Minutes and gigabytes.
test-slow: $(STAMP)-package
	$(BIN)/python -m pytest -m slow $(ARGS)

# transformers' model tests of the accelerated families, untouched and patched; any difference fails. PEERS=DIR names a
# checkout of transformers, whose tests of each family run; without one, pip's source distribution has those of any model.
test-peers: $(STAMP)-package
	$(INSTALL) -q parameterized $(if $(PEERS),datasets)
	$(BIN)/python -m tests.peers --folder $(VENV)/peers $(if $(PEERS),--peers $(PEERS)) $(ARGS)

# Random arguments of every operator: 500 cases for each of 23 tests (25 in `make test`). Prints cases and failures.
fuzz: $(STAMP)-package
	M2F_FUZZ_CASES=500 $(BIN)/python -m pytest tests/fuzz $(ARGS)

# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in every instruction set.
sanitize: $(STAMP)-package
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DM2F_CUDA=off \
		-DM2F_SANITIZE=address,undefined,float-cast-overflow \
		-DM2F_TORCH_INCLUDE="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/include"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize
	PYTHON=$(BIN)/python bash tests/sanitize.sh

# Lines of Python that the fast tests run; fails below 90 %.
coverage: $(STAMP)-package
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term:skip-covered $(ARGS)

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-figures: $(STAMP)-docs
	$(BIN)/python docs/figures.py

bench: $(STAMP)-bench
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: $(STAMP)-package $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMP)-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Registers, shared memory and spills of every CUDA and Triton kernel on every shipped architecture; needs no GPU.
resources: $(STAMP)-package
	$(BIN)/python -m benchmarks.static --check --output benchmarks/results/triton_resources.csv
	$(BIN)/python -m benchmarks.static_cuda --check --output benchmarks/results/cuda_resources.csv

# On a machine with a GPU, in the Python that has its torch: what is worth knowing most, in nine minutes.
gpu:
	$(PYTHON) -m benchmarks.tools.gpu $(ARGS)

# What that machine needs if it has no network and no compiler; ARGS="--base COMMIT" says what to measure against.
gpu-bundle: $(STAMP)-package
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.tools.gpu_bundle $(ARGS)

clean:
	rm -rf build dist m2f_kernels/lib $(STAMP)-package

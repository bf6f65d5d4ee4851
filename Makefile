# make demo   set up, then run the whole pipeline on the embedded default (CPU, no hub, about ten minutes)
# make test   set up, then run the tests (offline)
# make test-complete  the same and what takes long: the notebook, every fault, the benchmarks (about twenty-five minutes)
# make setup  only the virtual environment
# make check  lint and format check
# make docker-check  what can be checked of the Docker image without Docker: installs afresh, trains (minutes; a package registry)
# make comet  the environment of the COMET metric, .venv-comet/ (optional; about 1.5 GB; TORCH_INDEX as below)
#
# CPU-only machine: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu   (avoids gigabytes of CUDA packages)

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
COMET := .venv-comet
COMET_PIP := $(COMET)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-complete setup check format comet docker-check clean-demo

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 setup")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned requirements into $(VENV)/ (a few minutes, once) ..."
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) -c requirements.lock torch==2.13.0)
	@$(PIP) -r requirements.txt -r requirements-dev.txt -c requirements.lock
	@touch $@

comet: $(COMET)/.ready

$(COMET)/.ready: requirements-comet.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "COMET needs Python 3.11 or 3.12: make PYTHON=python3.11 comet")'
	@test -x $(COMET)/bin/python || $(PYTHON) -m venv $(COMET)
	@echo "Installing COMET into $(COMET)/ (a few minutes, once) ..."
	@$(if $(TORCH_INDEX),$(COMET_PIP) --index-url $(TORCH_INDEX) -c requirements-comet.txt torch)
	@$(COMET_PIP) -r requirements-comet.txt
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash runs/cpu.sh

test: $(READY)
	@$(VENV)/bin/python -m pytest

test-complete: $(READY)
	@STONEY_RL_COMPLETE=1 $(VENV)/bin/python -m pytest

docker-check: $(READY)
	@STONEY_RL_COMPLETE=1 STONEY_RL_DOCKER_CHECK=1 $(VENV)/bin/python -m pytest -n0 -s tests/test_docker.py

check: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(READY)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean-demo:
	rm -rf demo

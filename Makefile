# `make demo` and `make test` are all a newcomer needs: each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

# Ray listens on loopback only, reports nothing, and takes no token from a home directory.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER := 0
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
# Else each of the many processes here would compile Ray and torch anew: `baton up` takes 10 s with, 27 s without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test alone beside chaos hosts peers check format bench protos clean

demo: .venv/installed
	$(BIN)/baton demo

# Three at a time, since many wait. Clusters, which take the whole machine, and the gateway, whose answers are timed, run
# alone. They wait much: what only computes, and looks at no clock, takes beside them what they leave of the processors.
ALONE := tests/e2e tests/gateway tests/chaos
BESIDE := tests/kernels tests/ownership tests/simulator tests/engine/test_equality.py
# With targets of their own: what needs other programs, or other hosts.
APART := tests/peers tests/hosts
test: .venv/installed
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE) $(BESIDE) $(APART))
	@$(MAKE) --no-print-directory --jobs 2 alone beside

alone: .venv/installed
	$(BIN)/pytest $(ALONE)

beside: .venv/installed
	@echo "nice -n 19 $(BIN)/pytest $(BESIDE): what it says comes when it is through"
	@mkdir -p .pytest_cache
	@nice -n 19 $(BIN)/pytest --numprocesses 2 --dist loadfile --timeout 1200 $(BESIDE) >.pytest_cache/beside.log 2>&1; \
		ended=$$?; echo; cat .pytest_cache/beside.log; exit $$ended

chaos hosts: .venv/installed
	$(BIN)/pytest tests/$@

# Programs of others, run as they are against Baton; each in an environment of its own.
PEERS := $(patsubst tests/peers/requirements/%.txt,.peers/%/installed,$(wildcard tests/peers/requirements/*.txt))
peers: .venv/installed $(PEERS)
	$(BIN)/pytest tests/peers

.peers/%/installed: tests/peers/requirements/%.txt | .venv/installed
	@echo "installing $*"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .peers/$*
	@VIRTUAL_ENV=.peers/$* $(BIN)/uv pip install --quiet --requirement $<
	@touch $@

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What is kept beside each .proto; tests/gateway/grpc compares them with what is generated.
protos: .venv/installed
	$(BIN)/python -m grpc_tools.protoc --proto_path . --python_out . --pyi_out . gateway/protos/*.proto
	$(BIN)/python -m grpc_tools.protoc --proto_path . --grpc_python_out . $(addprefix gateway/protos/,vllm_engine.proto open_inference.proto)

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
	rm -rf .venv .peers build *.egg-info .mypy_cache .ruff_cache .pytest_cache

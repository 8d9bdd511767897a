# What a contributor types. `make check` is what CI runs before the slow tests.
.PHONY: help install quickstart smoke test slow slurm ci check lint types layers docs serve-docs format hooks clean
help:                  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14
install:               ## the package with all that a contributor needs, and the pre-commit hooks
	pip install -e ".[dev]"
	pre-commit install
quickstart:            ## the main job: HASS on SmolLM2, at most 15 minutes on two cores
	hass-train
smoke:                 ## the whole path on a tiny target, a minute
	hass-train experiment=smoke
test:                  ## the fast tests
	pytest
slow:                  ## the slow tests: several processes, killed runs, DeepSpeed
	pytest -m slow
slurm:                 ## the tests on a SLURM of three nodes, started on this machine (root; apt-get install slurm-wlm munge)
	tests/slurm/run_tests.sh
check: lint types layers docs test  ## what must pass before a commit
ci:                    ## all that CI does, in an environment of its own
	.ci/run
lint:                  ## ruff
	ruff check .
	ruff format --check .
types:                 ## mypy, strict
	mypy
layers:                ## import layers (docs/design.md)
	lint-imports
docs:                  ## build the site in site/ and check its links
	mkdocs build --strict
serve-docs:            ## the site at localhost:8000, rebuilt as you write
	mkdocs serve
format:                ## ruff's fixes and layout
	ruff check --fix .
	ruff format .
hooks:                 ## every pre-commit hook on every file
	pre-commit run --all-files
clean:                 ## what tools and builds leave; no run, no data
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

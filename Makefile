# What a contributor types. `make check` is what CI runs before the slow tests.
.PHONY: quickstart test slow check lint types layers docs format
quickstart:            ## the main job: HASS on SmolLM2, at most 20 minutes on two cores
	hass-train
test:                  ## the fast tests
	pytest
slow:                  ## the slow tests: several processes, kills, DeepSpeed
	pytest -m slow
check: lint types layers test
lint:
	ruff check .
	ruff format --check .
types:
	mypy
layers:                ## who may import whom (docs/design.md)
	lint-imports
docs:                  ## the site in site/, every link checked
	mkdocs build --strict
format:
	ruff check --fix .
	ruff format .

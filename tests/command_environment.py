"""The environment of commands started by tests."""

import os


def command_environment(folder, cache, **more):
    """Return the environment of a command that writes to `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    return environment | {"HASS_LIGHTNING_ROOT": str(folder), "HASS_LIGHTNING_CACHE": str(cache)} | more

"""What the tests on a SLURM share. Those that stop a slurmd need the one of start_slurm.sh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_toys import Sweep

from hass_lightning.runs.ledger import Ledger


def answers():
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session", autouse=True)
def slurm():
    """Skip without SLURM; the folder of start_slurm.sh."""
    if not answers():
        pytest.skip("no SLURM answers here: tests/slurm/start_slurm.sh starts one")
    return Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")).parent


@pytest.fixture
def sweep(tmp_path):
    found = Sweep(tmp_path)
    yield found
    if (tmp_path / "runs" / "sweeps").exists():
        jobs = {entry.job for folder in (tmp_path / "runs" / "sweeps").iterdir()
                for entry in Ledger(folder).latest().values() if entry.job}  # fmt: skip
        subprocess.run(["scancel", *jobs], check=False, capture_output=True)

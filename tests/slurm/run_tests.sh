#!/usr/bin/env bash
# The tests marked `slurm`, on a SLURM that answers here or else on three nodes started for them.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! sinfo >/dev/null 2>&1; then
  started=$(mktemp -d)
  trap 'tests/slurm/stop_slurm.sh "$started"; rm -rf "$started" || true' EXIT
  tests/slurm/start_slurm.sh "$started"
  export SLURM_CONF=$started/slurm.conf
fi
# sweeps mostly wait for SLURM, and runs over two nodes compute: side by side
pytest -q -n 2 --dist loadfile -m slurm --durations=10 tests/slurm "$@"

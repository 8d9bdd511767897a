#!/usr/bin/env bash
# Cancels all jobs and ends the daemons that start_slurm.sh started. Usage: tests/slurm/stop_slurm.sh [FOLDER]
folder=${1:-${TMPDIR:-/tmp}/hass-slurm}
export SLURM_CONF=$folder/slurm.conf
scancel -u "$(id -un)" 2>/dev/null && sleep 2
for file in "$folder"/run/*.pid; do
  if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null; fi
done
exit 0

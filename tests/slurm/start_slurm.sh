#!/usr/bin/env bash
# A SLURM of three nodes on this machine, for the tests marked `slurm` and for trying docs/tasks/cluster.md. Needs root and
#   apt-get install -y slurm-wlm munge
# Usage: tests/slurm/start_slurm.sh [FOLDER]. The last line that it prints sets SLURM_CONF for a shell:
#   eval "$(tests/slurm/start_slurm.sh | tail -n 1)"
# Nothing is written to /etc/slurm. A munged that already runs is used. tests/slurm/stop_slurm.sh ends what was started.
set -euo pipefail
folder=${1:-${TMPDIR:-/tmp}/hass-slurm}
nodes="hass1 hass2 hass3"  # the tests kill the third one, which jobs get last
cpus=16          # per node; SLURM does not hold them against the cores of this machine (config_overrides)
memory=128000    # MB per node, likewise
mkdir -p "$folder"/{state,log,run,spool}
if [ -s "$folder/slurm.conf" ] && SLURM_CONF=$folder/slurm.conf sinfo >/dev/null 2>&1; then  # it runs already
  echo "export SLURM_CONF=$folder/slurm.conf"
  exit 0
fi
port=17817       # of slurmctld; those of the nodes follow. The next ten if another SLURM has them
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 10)); done

for node in $nodes; do  # the first rank's node is found by its name
  getent hosts "$node" >/dev/null || echo "127.0.0.1 $node" >> /etc/hosts
done
if ! munge -n >/dev/null 2>&1; then
  mkdir -p /run/munge
  [ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
  chown munge: /run/munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
  su -s /bin/sh munge -c /usr/sbin/munged
fi
cat > "$folder/slurm.conf" <<CONF
ClusterName=hass
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# a job that is queued again waits as long as its old credential is valid (default 120 s)
AuthInfo=cred_expire=20
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=3000
SlurmdParameters=config_overrides
# a job that uses more memory than it asked for ends as OUT_OF_MEMORY, as cgroups do it on a cluster
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=10
SlurmctldTimeout=30
InactiveLimit=0
OverTimeLimit=0
SchedulerParameters=sched_interval=2,batch_sched_delay=0
$(for node in $nodes; do port=$((port + 1))
  echo "NodeName=$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$port CPUs=$cpus RealMemory=$memory Weight=${node#hass}"
done)
PartitionName=cpu Nodes=${nodes// /,} Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld
for node in $nodes; do mkdir -p "$folder/spool/$node"; slurmd -N "$node"; done
for _ in $(seq 30); do
  if [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 3 ]; then
    sinfo
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 1
done
sinfo || true
tail -n 5 "$folder"/log/*.log
echo "SLURM did not start; its logs are above" >&2
exit 1

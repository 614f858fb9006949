#!/usr/bin/env bash
# The small sweep of tests/benchmark/test_launchers.py on a real Slurm of one node, which is started here and stopped.
# Usage: tests/slurm.sh PYTHON. Needs root, and Debian's slurm-wlm and munge: installed by apt where they are missing.
set -euo pipefail
python=$(realpath --no-symlinks "$1")
cd "$(dirname "$0")/.."

cannot() {
  echo "the sweep was not run on Slurm: $1" >&2
  exit 1
}

[ "$(id -u)" = 0 ] || cannot "starting a Slurm needs root"
if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
  command -v apt-get > /dev/null || cannot "slurmctld, slurmd, munged and sbatch are missing, and there is no apt-get"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurm-wlm munge; } \
    > /dev/null || cannot "apt-get cannot install slurm-wlm and munge"
fi

# Keys, sockets, state and ports of its own: a Slurm that runs on this host is left alone.
folder=$(mktemp -d)
host=$(hostname -s)
pids=()
waited=0
stop() {
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2> /dev/null || true; done
  wait
  rm -rf "$folder"
}
trap stop EXIT
chmod 755 "$folder"
mkdir -m 700 "$folder/munge"
(umask 077 && head -c 128 /dev/urandom > "$folder/munge/key")
cat > "$folder/slurm.conf" << CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=26817
SlurmdPort=26818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

start() {
  "$@" > "$folder/$(basename "$1").log" 2>&1 &
  pids+=($!)
}
start munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log"
until [ -S "$folder/munge.socket" ] || [ $((waited += 1)) -gt 30 ]; do sleep 1; done
start slurmctld -D
start slurmd -D
waited=0
until sinfo --noheader --states=idle --format=%N 2> /dev/null | grep -q .; do
  if [ $((waited += 1)) -gt 60 ]; then
    tail -n 5 "$folder"/*.log >&2
    cannot "its node did not come up within a minute"
  fi
  sleep 1
done

sweep="tests/benchmark/test_launchers.py::test_a_launched_sweep_gives_the_records_of_plain_runs[submitit_slurm]"
"$python" -m pytest -p no:cacheprovider "$sweep" | tee "$folder/tests.log"
grep -q "1 passed" "$folder/tests.log" || cannot "the test of it was skipped"

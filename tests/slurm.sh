#!/usr/bin/env bash
# A Slurm of one node in namespaces of its own, and the shipped script under it. Called by test_slurm.py.
#   unshare --mount --pid --fork --mount-proc --net --ipc --uts slurm.sh FOLDER SCRIPT EXPERIMENT
set -euo pipefail
folder=$1 script=$2 experiment=$3

hostname node0
ip link set lo up
ip address add 10.9.0.1/24 dev lo
printf '127.0.0.1 localhost\n10.9.0.1 node0\n' > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
mkdir -p /run/munge /tmp/ray /etc/slurm "$folder"/{ctld,d,shared}
mount -t tmpfs none /run/munge
mount -t tmpfs none /tmp/ray
mount -t tmpfs none /etc/slurm
cat > /etc/slurm/slurm.conf << END
ClusterName=test
SlurmctldHost=node0
SlurmUser=root
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/d
SlurmctldPidFile=$folder/ctld.pid
SlurmdPidFile=$folder/d.pid
SlurmctldLogFile=$folder/ctld.log
SlurmdLogFile=$folder/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MailProg=/bin/true
NodeName=node0 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node0 Default=YES State=UP
END
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --log-file="$folder/munge.log" --pid-file="$folder/munge.pid" \
  --seed-file="$folder/munge.seed"
slurmctld
slurmd
until sinfo --noheader --format=%T | grep -qx idle; do sleep 0.5; done

export AMT_RAY_DIR=$folder/shared AMT_RAY_CACHE=$folder/cache
cd "$(dirname "$experiment")"
file=$(basename "$experiment")
echo "== a sweep, as an array of one"
sbatch --wait --array=3 --output="$folder/sweep.out" "$script" sweep "$file" --set seed='{task}'
echo "== a pretraining, queued again in the middle"
job=$(sbatch --parsable --output="$folder/again.out" "$script" pretrain "$file" --set name=again --set train.epochs=40)
until compgen -G "$folder/shared/runs/again/*/epoch_00002*" > /dev/null; do sleep 0.5; done
scontrol requeue "$job"
until scontrol show job "$job" | grep -q 'JobState=PENDING'; do sleep 0.5; done
until scontrol update "jobid=$job" StartTime=now; do sleep 1; done      # Slurm would wait two minutes
until scontrol show job "$job" | grep -Eq 'JobState=(COMPLETED|FAILED)'; do sleep 1; done
scontrol show job "$job" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*'

#!/bin/bash
# A throw-away Slurm of several nodes on one host, as root, no systemd: LAB=dir [PORT=26800] [N=4] [GPUS=2] start.sh
# then  . $LAB/env.sh  and Slurm's commands find it. PORT … PORT+19 are its own, so several can run beside each other.
# needs: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge [slurmdbd mariadb-server]
set -euo pipefail
LAB=${LAB:-$PWD/.slurm-lab} N=${N:-4} GPUS=${GPUS:-2} CPUS=${CPUS:-8} DBD=${DBD:-1} PORT=${PORT:-26800} H=$(hostname -s) E=$LAB/etc
export PATH=$PATH:/usr/sbin:/sbin
mkdir -p "$LAB"/{state,log,pid,dev,munge,etc,spool}; chmod 755 "$LAB" "$LAB/munge"
wait_for() { local t=$((SECONDS+30)); until timeout 10 "$@" &>/dev/null; do ((SECONDS<t)) || { echo "timeout: $*" >&2; exit 1; }; sleep 0.1; done; }
for g in $(seq 0 $((GPUS-1))); do [ -e "$LAB/dev/nvidia$g" ] || mknod "$LAB/dev/nvidia$g" c 1 3; done   # must be char devices
cat >"$E/slurm.conf" <<C
ClusterName=lab
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=$((PORT+17))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/munge.socket,cred_expire=5   # cred_expire = how long a requeued job waits (default 120, min 5)
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/pid/slurmctld.pid
SlurmdPidFile=$LAB/spool/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
PropagateResourceLimits=NONE
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=1
MailProg=/bin/true
SlurmdTimeout=10
KillWait=2
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal   # preemption sends the job's own --signal (needs GraceTime>0)
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=node[1-$N] NodeAddr=127.0.0.1 Port=[$((PORT+1))-$((PORT+N))] CPUs=$CPUS RealMemory=128000 Gres=gpu:$GPUS
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=10
C
[ "$DBD" = 1 ] && cat >>"$E/slurm.conf" <<C
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT+19))
AccountingStoragePass=$LAB/munge/munge.socket
AccountingStorageTRES=gres/gpu
C
echo "NodeName=node[1-$N] Name=gpu File=$LAB/dev/nvidia[0-$((GPUS-1))]" >"$E/gres.conf"
{ cat /etc/hosts; for i in $(seq $N); do echo "127.0.1.$i node$i"; done; } >"$E/hosts"
echo "export SLURM_CONF=$E/slurm.conf" >"$LAB/env.sh"; . "$LAB/env.sh"
[ -f "$LAB/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$LAB/munge/key")
munged --force --num-threads=10 --key-file="$LAB/munge/key" --socket="$LAB/munge/munge.socket" --pid-file="$LAB/pid/munged.pid" \
       --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge/seed"
if [ "$DBD" = 1 ]; then
  [ -d "$LAB/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$LAB/mysql" --auth-root-authentication-method=normal --skip-test-db &>"$LAB/log/install-db.log"
  setsid mariadbd --no-defaults --user=root --datadir="$LAB/mysql" --socket="$LAB/mysql.sock" --port=$((PORT+18)) --bind-address=127.0.0.1 \
    --pid-file="$LAB/pid/mariadbd.pid" --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 </dev/null &>"$LAB/log/mariadbd.log" &
  wait_for mariadb --no-defaults -S "$LAB/mysql.sock" -e 'select 1'
  mariadb --no-defaults -S "$LAB/mysql.sock" -e "create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost"
  (umask 077; cat >"$E/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/munge.socket
DbdHost=$H
DbdAddr=127.0.0.1
DbdPort=$((PORT+19))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT+18))
StorageUser=slurm
StoragePass=slurm
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/pid/slurmdbd.pid
C
  )
  slurmdbd; wait_for bash -c "</dev/tcp/127.0.0.1/$((PORT+19))"
fi
slurmctld -c; wait_for bash -c "</dev/tcp/127.0.0.1/$((PORT+17))"
for i in $(seq $N); do "$(dirname "$0")/node.sh" up node$i; done
wait_for bash -c "[ \$(sinfo -h -p main -N -t idle -o %n | wc -l) = $N ]"

#!/usr/bin/env bash
# Tests `benchmark.sh --slurm` on a real Slurm with one node, which it starts and stops: an array of 4 short elements,
# one of them requeued in the middle of a run; all must end complete, and only the requeued one may have started twice.
#
#   apt-get update && apt-get install slurmctld slurmd munge     (Debian 12, as root; no systemd needed)
#   bash tests/slurm_single_node.sh                              (with the virtual environment active)
#
# It takes some minutes: Slurm itself waits two to three before it starts a requeued job again.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$(pwd)
for program in slurmctld slurmd munged; do
    command -v $program >/dev/null || {
        echo "slurm_single_node.sh: no $program: apt-get install slurmctld slurmd munge" >&2
        exit 2
    }
done
[[ $(id -u) == 0 ]] || {
    echo "slurm_single_node.sh: slurmd and munged need root" >&2
    exit 2
}

folder=$(mktemp -d) munged=''
export SLURM_CONF=$folder/slurm.conf
stop() {
    scancel --user=root 2>/dev/null || true
    for daemon in slurmd slurmctld; do
        [[ ! -f $folder/$daemon.pid ]] || kill "$(<"$folder/$daemon.pid")" || true
    done
    [[ -z $munged ]] || kill "$(</run/munge/munged.pid)" || true
}
trap stop EXIT

mkdir "$folder/state" "$folder/spool"
cat >"$SLURM_CONF" <<EOF
ClusterName=single
SlurmctldHost=$(hostname)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
$(slurmd -C | head -n 1)
PartitionName=main Nodes=ALL Default=YES State=UP
EOF
if ! munge -n >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- munged
    munged=started
fi
slurmctld
slurmd
until sinfo -h -o %T 2>/dev/null | grep -q idle; do sleep 1; done
sinfo

# A copy of the repository, so that its runs/ stays as it is.
mkdir "$folder/copy"
cp benchmark.sh "$folder/copy"
ln -s "$repo/algorithms" "$folder/copy"
cd "$folder/copy"
PYTHONPATH=$repo/tests python - <<'EOF'
from pathlib import Path

import gymnasium as gym
from conftest import roll_out, write_file

write_file(Path("pendulum.hdf5"), roll_out(gym.make("InvertedPendulum-v5"), 2_000, seed=0))
EOF
bash benchmark.sh table1 --slurm --env-ids InvertedPendulum-v5 --seeds 4 --offline-steps 50 --online-steps 3000 -- \
    --n-tau 500 --n-pretrain 50 --utd 2 --batch-size 8 --eval-freq 500 --eval-episodes 1 --checkpoint-freq 0 --dataset "$PWD/pendulum.hdf5" \
    >table1.slurm
grep '^#SBATCH' table1.slurm
job=$(sbatch --parsable table1.slurm)

run=runs/InvertedPendulum-v5__td3_opt__1__offline50_online3000
until grep -qs online_finetune $run/evals.csv; do sleep 0.2; done
squeue
scontrol requeue "${job}_1"
echo "requeued ${job}_1 while $run was at environment step $(tail -n 1 $run/evals.csv | cut -d, -f2)"
until [[ -z $(squeue -h) ]]; do sleep 5; done

echo "--- the log of the requeued element"
cat runs/opt-table1-"${job}"_1.log
echo "--- the log of the run that was stopped"
cat $run/benchmark.log
failed=0
for seed in 0 1 2 3; do
    for variant in td3 td3_opt; do
        run=runs/InvertedPendulum-v5__${variant}__${seed}__offline50_online3000
        last=$(tail -n 1 "$run/evals.csv" | cut -d, -f1,2) || failed=1
        starts=$(grep -c '^+ ' "$run/benchmark.log") || failed=1
        expected=1
        [[ $variant-$seed != td3_opt-1 ]] || expected=2
        echo "$run: last row $last, started $starts time(s)"
        [[ $last == online_finetune,3000 && $starts == "$expected" && -f $run/model.pt ]] || failed=1
    done
done
grep -q 'stopped, with a checkpoint' runs/InvertedPendulum-v5__td3_opt__1__offline50_online3000/benchmark.log || failed=1
grep -q '1 of 2 runs are complete, 0 failed' runs/opt-table1-"${job}"_1.log || failed=1
if ((failed)); then
    echo "FAILED: see $folder"
    exit 1
fi
echo "passed"
trap - EXIT
stop
sleep 2 # slurmctld saves its state
rm -rf "$folder"

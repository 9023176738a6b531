#!/usr/bin/env bash
# The paper's tables, and measurements, from one command each. `bash benchmark.sh` prints what there is.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<EOF
usage: bash benchmark.sh COMMAND [OPTIONS] [-- FLAGS FOR THE SCRIPTS]

Tables of the paper (10 seeds):
  table1    TD3 and TD3+OPT, MuJoCo                table12   SPOT or TD3, IQL, and OPT on each, all 19 tasks
  table2    SPOT and SPOT+OPT, AntMaze             table13   RLPD, RLPD off-to-on, RLPD+OPT, all 19 tasks
  table3    SPOT and SPOT+OPT, Adroit
Ablations (5 seeds):
  ablation-kappa    Table 7       ablation-q-on     Table 11      ablation-n-tau   Table 10
  ablation-init     Tables 8, 9   ablation-replay   Table 6
Others:
  report   report.py: tables and figures of what is in runs/ (its options: python report.py --help)
  quick    TD3 against TD3+OPT on regenerated hopper-random, one seed, from one short offline phase
           (at most 15 minutes on 2 cores); prints both scores
  speed    what a gradient step costs, offline beside plain eager PyTorch, and OPT's fine-tuning beside the backbones';
           how long it takes to regenerate hopper-random, and the memory of a run

Options of tables and ablations:
  --seeds N              seeds 0 to N-1; --seeds A-B: seeds A to B
  --env-ids "ID ..."     these tasks only
  --offline-steps N      gradient steps of the offline phase; shortened runs get folders of their own
  --online-steps N       environment steps of the online phase (ablation-n-tau: of fine-tuning, N_tau is added)
  --jobs N               runs at a time (default 1)
  --dry-run              print the commands instead; each can be pasted
  --slurm                print them as a Slurm job array: a file for sbatch

A finished run is skipped and a stopped one goes on, so that the same command continues after Ctrl-C or a crash. Runs go
to runs/, each with its benchmark.log. CUDA is used where there is some; jobs share the GPUs out.
THREADS=n sets the threads of a run (default: 1; quick and speed: 2).
EOF
}

refuse() {
    echo "benchmark.sh: $1" >&2
    exit 2
}

# ----------------------------------------------------------------------------------------------------------------------
# Tables: the runs of each as plain commands
# ----------------------------------------------------------------------------------------------------------------------

mujoco="halfcheetah-random-v2 hopper-random-v2 walker2d-random-v2 halfcheetah-medium-v2 hopper-medium-v2 walker2d-medium-v2
halfcheetah-medium-replay-v2 hopper-medium-replay-v2 walker2d-medium-replay-v2"
antmaze="antmaze-umaze-v2 antmaze-umaze-diverse-v2 antmaze-medium-play-v2 antmaze-medium-diverse-v2 antmaze-large-play-v2
antmaze-large-diverse-v2"
adroit="pen-cloned-v1 hammer-cloned-v1 door-cloned-v1 relocate-cloned-v1"

# The runs of the table, entry by entry: its command, its folder, and the folder whose offline phase it takes ('' or none).
commands=() folders=() owners=()

add() { # BACKBONE VARIANT [FLAGS]: a run of this task and seed; the first after owner='' owns the others' offline phase
    local variant=$2 offline=${offline-$offline_steps} online=${online-$online_steps} budget='' command
    local folder script=algorithms/$1_opt.py
    shift 2
    [[ -z $offline ]] || set -- "$@" --offline-steps "$offline"
    [[ -z $online ]] || set -- "$@" --online-steps "$online"
    [[ -z $offline_steps || $offline != "$offline_steps" ]] || budget+=_offline$offline
    [[ -z $online_steps ]] || budget+=_online$online
    folder=runs/${env_id//\//-}__${variant}__$seed${budget:+_$budget}
    [[ -z $budget ]] || set -- "$@" --run-dir "$folder"
    [[ -z $owner ]] || set -- "$@" --offline-from "$owner"
    set -- python "$script" --env-id "$env_id" --seed "$seed" --exp-name "$variant" "$@" --resume --no-progress
    printf -v command '%q ' "$@" ${script_flags[@]+"${script_flags[@]}"}
    commands+=("${command% }") folders+=("$folder") owners+=("$owner")
    [[ -n $owner ]] || owner=$folder
}

pair() { # BACKBONE: it alone and with OPT
    owner=''
    add "$1" "$1" --no-opt
    add "$1" "${1}_opt"
}

add_runs() { # the runs of one task and seed
    owner=''
    case $table in
    table1) pair td3 ;;
    table2 | table3) pair spot ;;
    table12)
        case $env_id in antmaze-* | *-cloned-v1) pair spot ;; *) pair td3 ;; esac
        pair iql
        ;;
    table13)
        pair rlpd
        owner='' # it has no offline phase
        offline=0 add rlpd rlpd_vanilla --no-opt
        ;;
    ablation-kappa) # the first is the paper's schedule, 0.1 to 0.9
        add spot spot_opt
        add spot spot_opt_kappa_end_0.8 --kappa-end 0.8
        add spot spot_opt_kappa_end_0.7 --kappa-end 0.7
        for kappa in 0 1 0.5; do
            add spot "spot_opt_kappa_$kappa" --kappa-init "$kappa" --kappa-end "$kappa" --kappa-decay 0
        done
        ;;
    ablation-init)
        local backbone=td3 starts="random online"
        case $env_id in antmaze-*) backbone=spot starts="random online joint" ;; esac
        add "$backbone" "${backbone}_opt"
        for start in $starts; do
            add "$backbone" "${backbone}_opt_init_$start" --q-on-init "$start"
        done
        ;;
    ablation-q-on)
        add td3 td3_opt
        add td3 td3_opt_no_q_on --no-q-on
        ;;
    ablation-replay)
        add td3 td3_opt
        add td3 td3_opt_replay_online --replay online
        ;;
    ablation-n-tau)
        online=${online_steps:+$((online_steps + 25000))} add td3 td3_opt # N_tau 25,000
        for n_tau in 6250 12500 50000 100000; do
            online=$((${online_steps:-275000} + n_tau)) add td3 "td3_opt_n_tau_$n_tau" --n-tau "$n_tau" --n-pretrain $((2 * n_tau))
        done
        ;;
    esac
}

# Reads the options of a table and makes its list of runs.
plan() { # TABLE OPTIONS
    table=$1 seeds=10 jobs=1 env_ids='' offline_steps='' online_steps='' dry_run='' slurm=''
    script_flags=()
    [[ $table != ablation-* ]] || seeds=5
    shift
    while (($#)); do
        case $1 in
        --dry-run | --slurm)
            [[ $1 == --slurm ]] && slurm=1 || dry_run=1
            shift
            continue
            ;;
        --)
            shift
            script_flags=("$@")
            break
            ;;
        --seeds | --jobs | --env-ids | --offline-steps | --online-steps)
            [[ -n ${2:-} ]] || refuse "$1 needs a value"
            ;;
        *) refuse "unknown option '$1'; bash benchmark.sh prints what there is (flags for the scripts go after --)" ;;
        esac
        case $1 in
        --env-ids) env_ids=$2 ;;
        --seeds)
            [[ $2 =~ ^([1-9][0-9]*|(0|[1-9][0-9]*)-(0|[1-9][0-9]*))$ ]] || refuse "--seeds $2: write a number of seeds, or FIRST-LAST"
            seeds=$2
            ;;
        *)
            [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || refuse "$1 $2: write a whole number"
            case $1 in
            --jobs)
                (($2)) || refuse "--jobs 0: write 1 or more"
                jobs=$2
                ;;
            --offline-steps) offline_steps=$2 ;;
            --online-steps) online_steps=$2 ;;
            esac
            ;;
        esac
        shift 2
    done
    for flag in ${script_flags[@]+"${script_flags[@]}"}; do
        case ${flag//_/-} in
        --opt | --no-opt | --q-on* | --no-q-on | --kappa-* | --replay*)
            refuse "$flag after --: it makes the variants of a table (for one of your own, start the script itself)"
            ;;
        --n-tau* | --n-pretrain*)
            [[ $table != ablation-n-tau ]] || refuse "$flag after --: it makes the variants of this table"
            ;;
        --env-id* | --seed* | --exp-name* | --run-dir* | --offline-from* | --offline-steps* | --online-steps* | --no-resume)
            refuse "$flag after --: benchmark.sh sets it itself (its options: bash benchmark.sh)"
            ;;
        esac
    done
    if [[ -z $env_ids ]]; then
        case $table in
        table2 | ablation-kappa) env_ids=$antmaze ;;
        table3) env_ids=$adroit ;;
        table12 | table13) env_ids="$mujoco $antmaze $adroit" ;;
        ablation-init) env_ids="$mujoco $antmaze" ;;
        *) env_ids=$mujoco ;;
        esac
    fi
    [[ $seeds == *-* ]] || seeds=0-$((seeds - 1))
    ((${seeds#*-} >= ${seeds%-*})) || refuse "--seeds $seeds: the last is less than the first"
    for ((seed = ${seeds%-*}; seed <= ${seeds#*-}; seed++)); do
        for env_id in $env_ids; do
            add_runs
        done
    done
}

# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------

start() { # RUN SLOT: in the background, in a process group of its own, so that a terminal's Ctrl-C reaches benchmark.sh alone
    local folder=${folders[$1]}
    mkdir -p "$folder" 2>/dev/null || true # if it cannot be made, the run below says so, and fails alone
    set -m
    (
        exec 9>>"$folder/benchmark.log" >&9 2>&1 </dev/null
        # A run that an earlier benchmark.sh left behind (it was killed outright) holds the lock until it ends.
        ! command -v flock >/dev/null || flock 9
        echo "+ ${commands[$1]}"
        ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[$2 % ${#gpus[@]}]}
        eval "exec ${commands[$1]}"
    ) &
    set +m
    pids[$2]=$! runs[$2]=$1 states[$1]=running
    say "$1" started
}

say() { # RUN WORDS
    printf '%s [%d/%d] %s: %s\n' "$(date +%H:%M:%S)" $(($1 + 1)) ${#commands[@]} "${folders[$1]}" "$2" || true
}

own_offline() { # COMMAND: without where its offline phase comes from, which changes nothing in its results
    sed 's/ --offline-from [^ ]*//' <<<"$1"
}

finished_before() { # RUN: of this table or another
    local marker=${folders[$1]}/benchmark.done
    [[ -f $marker && $(own_offline "$(<"$marker")") == "$(own_offline "${commands[$1]}")" ]]
}

ready() { # RUN: the offline phase that it takes is there, or will not come (the script says so)
    local owner=${owners[$1]} other
    [[ -n $owner && ! -f $owner/offline.pt ]] || return 0
    for ((other = $1 - 1; other >= 0; other--)); do
        [[ ${folders[$other]} != "$owner" ]] || break
    done
    [[ ${states[$other]} == complete || ${states[$other]} == failed ]]
}

end() { # SLOT: take note of how its run ended
    local run=${runs[$1]} status=0
    wait "${pids[$1]}" || status=$?
    pids[$1]=''
    if ((status == 0)); then
        states[$run]=complete
        printf '%s\n' "${commands[$run]}" 2>/dev/null >"${folders[$run]}/benchmark.done" || true
        say "$run" complete
    elif [[ -n $stopped ]]; then
        states[$run]=stopped
        say "$run" "stopped"
    else
        states[$run]=failed
        failures+=("${folders[$run]}/benchmark.log: exit $status: $(tail -n 1 "${folders[$run]}/benchmark.log" 2>&1 || true)")
        say "$run" "failed"
    fi
}

stop() { # SIGNAL: once to the runs, which checkpoint and end; the second time they end without
    local pid
    stopped=$1
    for pid in "${pids[@]}"; do
        # Slurm sends SIGTERM to every process of a job by itself, and this would be the second.
        [[ -z $pid || ($1 == TERM && -n ${SLURM_JOB_ID:-}) ]] || kill -TERM "$pid" 2>/dev/null || true
    done
}

run_all() {
    local pids=() runs=() states=() failures=() gpus=() stopped='' run slot busy skipped=0 complete=0
    export OMP_NUM_THREADS=${THREADS:-1}
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        read -ra gpus <<<"${CUDA_VISIBLE_DEVICES//,/ }" || true
    elif command -v nvidia-smi >/dev/null; then
        read -ra gpus <<<"$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ')" || true
    fi
    for run in "${!commands[@]}"; do
        states[$run]=waiting
        if finished_before "$run"; then
            states[$run]=complete
            skipped=$((skipped + 1))
        fi
    done
    ((skipped == 0)) || echo "$skipped of ${#commands[@]} runs are complete already"
    for ((slot = 0; slot < jobs; slot++)); do pids[$slot]=''; done
    trap '' PIPE # nobody reads the output any more: the runs go on
    trap 'stop INT' INT
    trap 'stop TERM' TERM
    trap 'stop HUP' HUP
    while :; do
        busy=0
        for ((slot = 0; slot < jobs; slot++)); do
            [[ -z ${pids[$slot]} ]] || kill -0 "${pids[$slot]}" 2>/dev/null || end "$slot"
            for run in "${!commands[@]}"; do
                [[ -z ${pids[$slot]} && -z $stopped ]] || break
                [[ ${states[$run]} != waiting ]] || ! ready "$run" || start "$run" "$slot"
            done
            [[ -z ${pids[$slot]} ]] || busy=1
        done
        ((busy)) || break
        sleep 0.5 || true # Ctrl-C ends it early
    done
    for run in "${!states[@]}"; do
        [[ ${states[$run]} != complete ]] || complete=$((complete + 1))
    done
    echo "$complete of ${#commands[@]} runs are complete, ${#failures[@]} failed" || true
    ((${#failures[@]} == 0)) || printf 'failed: %s\n' "${failures[@]}" || true
    case $stopped in
    INT) exit 130 ;;
    TERM) exit 143 ;;
    HUP) exit 129 ;;
    esac
    ((${#failures[@]} == 0)) || exit 1
}

slurm_script() {
    local ids flags=(--jobs "$jobs") first=${seeds%-*} last=${seeds#*-} count folder
    read -ra ids <<<"$(echo $env_ids)"
    count=$((last - first + 1))
    [[ -z $offline_steps ]] || flags+=(--offline-steps "$offline_steps")
    [[ -z $online_steps ]] || flags+=(--online-steps "$online_steps")
    folder=$(pwd)
    mkdir -p runs
    cat <<EOF
#!/usr/bin/env bash
# $table as a Slurm job array. An element is one task and seed: its runs share one offline phase, so they share one job,
# $jobs at a time. Edit time, memory and gres for your cluster, then sbatch this file. A requeued element goes on from its
# runs' checkpoints. An element that failed or ran out of time: sbatch the file again, finished runs are skipped.
# What element 0 runs: SLURM_ARRAY_TASK_ID=0 bash THIS_FILE --dry-run
#SBATCH --job-name=opt-$table
#SBATCH --array=0-$((${#ids[@]} * count - 1))
#SBATCH --time=48:00:00
#SBATCH --mem=$((4 * jobs))G
#SBATCH --cpus-per-task=$((${THREADS:-1} * jobs))
##SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir="$folder"
#SBATCH --output="$folder/runs/%x-%A_%a.log"
set -euo pipefail
cd $(printf %q "$folder")
export THREADS=${THREADS:-1}
tasks=(${ids[@]})
seed=\$(($first + SLURM_ARRAY_TASK_ID % $count))
exec bash benchmark.sh $table --env-ids "\${tasks[SLURM_ARRAY_TASK_ID / $count]}" --seeds "\$seed-\$seed" ${flags[@]} "\$@" \\
    --$(((${#script_flags[@]})) && printf ' %q' "${script_flags[@]}")
EOF
}

# ----------------------------------------------------------------------------------------------------------------------
# Short measurements
# ----------------------------------------------------------------------------------------------------------------------

script=algorithms/td3_opt.py

quick() {
    local steps=(--env-id hopper-random-v2 --offline-steps 10000 --online-steps 6000 --n-tau 1500 --n-pretrain 3000)
    steps+=(--eval-freq 500 --resume --seed "${SEED:-0}")
    local td3=runs/quick__td3__${SEED:-0} opt=runs/quick__td3_opt__${SEED:-0}
    python "$script" "${steps[@]}" --no-opt --run-dir "$td3"
    python "$script" "${steps[@]}" --offline-from "$td3" --run-dir "$opt"
    python - "$td3" "$opt" <<'EOF'
import csv, sys
print(f"{'env steps':>10} {'TD3':>8} {'TD3+OPT':>8}   normalised score, hopper-random-v2")
tables = [{int(r["env_steps"]): r["normalized_score"] for r in csv.DictReader(open(f"{d}/evals.csv"))} for d in sys.argv[1:]]
for step in sorted(set(tables[0]) | set(tables[1])):
    print(f"{step:>10} {tables[0].get(step, ''):>8} {tables[1].get(step, ''):>8}")
EOF
}

rate() { # FOLDER PHASE: milliseconds a gradient step, from speed.csv
    awk -F, -v phase="$2" '$1 == phase { printf "%.3f\n", 1000 * $4 / $2 }' "$1/speed.csv"
}

plain_eager() { # TD3+BC as most public code writes it: a network a module, a loss.item() a step, targets one by one
    python - <<'EOF'
import copy, os, time
import torch, torch.nn as nn, torch.nn.functional as F
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
n, states, actions = 1_000_000, 11, 3
mlp = lambda inputs, outputs: nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))
actor, critics = nn.Sequential(mlp(states, actions), nn.Tanh()), [mlp(states + actions, 1) for _ in range(2)]
networks = [actor, *critics]
targets = copy.deepcopy(networks)
optimizers = [torch.optim.Adam(network.parameters(), 3e-4) for network in networks]
data = [torch.randn(n, states), torch.rand(n, actions) * 2 - 1, torch.randn(n, 1), torch.randn(n, states), torch.zeros(n, 1)]

def descend(loss, optimizers):
    loss.item()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()

def step(i):
    s, a, r, s2, d = (column[torch.randint(n, (256,))] for column in data)
    with torch.no_grad():
        a2 = (targets[0](s2) + (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
        y = r + 0.99 * (1 - d) * torch.min(*(q(torch.cat([s2, a2], 1)) for q in targets[1:]))
    descend(sum(F.mse_loss(q(torch.cat([s, a], 1)), y) for q in critics), optimizers[1:])
    if i % 2:
        pi = actor(s)
        q = critics[0](torch.cat([s, pi], 1))
        descend(-2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a), optimizers[:1])
        for target, network in zip(targets, networks):
            for t, p in zip(target.parameters(), network.parameters()):
                t.data.copy_(0.995 * t.data + 0.005 * p.data)

for i in range(50):
    step(i)
started = time.perf_counter()
for i in range(600):
    step(i)
print(f"plain {(time.perf_counter() - started) / 600 * 1e3:.3f}")
EOF
}

speed() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    local short=(--env-id hopper-random-v2 --offline-steps 1000 --n-tau 1600 --n-pretrain 200 --eval-freq 0)
    short+=(--eval-episodes 1 --no-progress --checkpoint-freq 0 --no-save-model)
    local backbone steps extra script
    for round in 1 2 3; do
        plain_eager
        for backbone in td3 spot iql; do
            script=algorithms/${backbone}_opt.py steps=800 extra=()
            [[ $backbone != td3 ]] || steps=200 # 5 gradient steps each
            [[ $backbone != spot ]] || extra=(--vae-steps 50)
            local run=(python "$script" "${short[@]}" ${extra[@]+"${extra[@]}"})
            "${run[@]}" --online-steps "$steps" --no-opt --run-dir "$folder/$backbone-$round"
            run+=(--offline-from "$folder/$backbone-$round" --online-steps $((steps + 1600)))
            "${run[@]}" --run-dir "$folder/mix-$backbone-$round" --kappa-init 0.1 --kappa-end 0.9 --kappa-decay 1000
            "${run[@]}" --run-dir "$folder/opt-$backbone-$round"
            [[ $backbone != spot ]] || echo "vae-spot $(rate "$folder/spot-$round" vae)"
            echo "offline-$backbone $(rate "$folder/$backbone-$round" offline)"
            echo "pretrain-$backbone $(rate "$folder/mix-$backbone-$round" online_pretrain)"
            for name in "$backbone" "mix-$backbone" "opt-$backbone"; do
                echo "$name $(rate "$folder/$name-$round" online_finetune)"
            done
        done
        for members in 2 10; do
            python algorithms/rlpd_opt.py "${short[@]}" --offline-steps 400 --online-steps 0 --no-opt \
                --ensemble-size $members --run-dir "$folder/rlpd-$members-$round"
            echo "offline-rlpd-$members $(rate "$folder/rlpd-$members-$round" offline)"
        done
        local run=(python algorithms/rlpd_opt.py "${short[@]}" --offline-steps 400 --offline-from "$folder/rlpd-10-$round")
        "${run[@]}" --online-steps 25 --no-opt --run-dir "$folder/rlpd-$round" # 20 gradient steps each
        run+=(--online-steps 1625)
        "${run[@]}" --run-dir "$folder/mix-rlpd-$round" --kappa-init 0.1 --kappa-end 0.9 --kappa-decay 1000
        "${run[@]}" --run-dir "$folder/opt-rlpd-$round" --kappa-init 1 --kappa-end 1
        echo "pretrain-rlpd $(rate "$folder/mix-rlpd-$round" online_pretrain)"
        for name in rlpd mix-rlpd opt-rlpd; do
            echo "$name $(rate "$folder/$name-$round" online_finetune)"
        done
    done | tee "$folder/times" >&2
    python - "$folder/times" <<'EOF'
import collections, statistics, sys
times = collections.defaultdict(list)
for line in open(sys.argv[1]):
    name, value = line.split()
    times[name].append(float(value))
names = {"plain": "offline, plain eager PyTorch", "vae-spot": "SPOT's VAE"}
for key, name in (("td3", "TD3"), ("spot", "SPOT"), ("iql", "IQL"), ("rlpd", "RLPD")):
    if key == "rlpd":
        names |= {f"offline-rlpd-{n}": f"offline, RLPD of {n} critics" for n in (2, 10)}
    else:
        names[f"offline-{key}"] = f"offline, {name}"
    names |= {f"pretrain-{key}": f"online pre-training, {name}+OPT", key: f"fine-tuning, {name}"}
    names |= {f"opt-{key}": f"fine-tuning, {name}+OPT, kappa = 1", f"mix-{key}": f"fine-tuning, {name}+OPT, kappa < 1"}
print()
for name, text in names.items():
    print(f"{text:36} {statistics.median(times[name]):7.2f} ms a gradient step ({min(times[name]):.2f} to {max(times[name]):.2f})")
pairs = [("plain", "offline-td3"), ("offline-spot", "offline-td3"), ("offline-iql", "offline-td3"), ("offline-rlpd-10", "offline-rlpd-2")]
pairs += [(f"{kind}-{key}", key) for key in ("td3", "spot", "iql", "rlpd") for kind in ("opt", "mix")]
for a, b in pairs:
    ratios = [x / y for x, y in zip(times[a], times[b])]
    print(f"{names[a]} / {names[b]}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
EOF
    python - "$folder/data" algorithms/td3_opt.py <<'EOF'
import os, resource, subprocess, sys, time
started = time.perf_counter()
command = [sys.executable, sys.argv[2], "--env-id", "hopper-random-v2", "--offline-steps", "0", "--online-steps", "3300", "--n-tau", "3000"]
command += ["--n-pretrain", "10", "--eval-episodes", "1", "--no-progress", "--run-dir", sys.argv[1] + "/run"]
folders = {"XDG_CACHE_HOME": sys.argv[1], "D4RL_DATASET_DIR": sys.argv[1]}
code = "import sys, time; sys.path.insert(0, 'algorithms'); import td3_opt; t = time.time(); " \
       "td3_opt.load_dataset('hopper-random-v2', progress=False); print(f'regenerating hopper-random-v2: {time.time() - t:.0f} s')"
if __name__ == "__main__":
    subprocess.run([sys.executable, "-c", code], env=os.environ | folders, check=True)
    subprocess.run(command, env=os.environ | folders, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of the largest process, a run with all phases: {peak:.2f} GiB")
EOF
}

case ${1:-} in
table1 | table2 | table3 | table12 | table13 | ablation-kappa | ablation-init | ablation-q-on | ablation-replay | ablation-n-tau)
    plan "$@"
    if [[ -n $dry_run ]]; then
        printf '%s\n' "${commands[@]}"
    elif [[ -n $slurm ]]; then
        slurm_script
    else
        run_all
    fi
    ;;
report) exec python report.py "${@:2}" ;;
quick | speed)
    (($# == 1)) || refuse "$1 takes no options; bash benchmark.sh prints what there is"
    export OMP_NUM_THREADS=${THREADS:-2}
    "$1"
    ;;
'' | -h | --help) usage ;;
*) refuse "unknown command '$1'; bash benchmark.sh prints what there is" ;;
esac

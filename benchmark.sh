#!/usr/bin/env bash
# usage: bash benchmark.sh COMMAND [OPTIONS] [-- FLAGS FOR THE SCRIPTS]
#
# Tables of the paper (10 seeds, table14 5):
#   table1    OEMA, PEX, Cal-QL, TD3, TD3+OPT        table12   SPOT or TD3, IQL, and OPT on each, all 19 tasks
#   table2    PEX, Cal-QL, SPOT, SPOT+OPT, AntMaze   table13   RLPD, RLPD off-to-on, RLPD+OPT, all 19 tasks
#   table3    Cal-QL, SPOT, SPOT+OPT, Adroit         table14   BOORL, TD3+OPT
# Ablations (5 seeds):
#   ablation-kappa    Table 7       ablation-q-on     Table 11      ablation-n-tau   Table 10
#   ablation-init     Tables 8, 9   ablation-replay   Table 6
# Others:
#   report   report.py: tables and figures of what is in runs/ (its options: python report.py --help)
#   quick    TD3 against TD3+OPT on regenerated hopper-random, one seed, from one short offline phase
#            (at most 15 minutes on 2 cores); prints both scores
#   speed    what a gradient step costs, offline beside plain eager PyTorch, and OPT's fine-tuning beside the backbones';
#            how long it takes to regenerate hopper-random, and the memory of a run (options: python speed.py --help)
#
# Options of tables and ablations:
#   --seeds N              seeds 0 to N-1; --seeds A-B: seeds A to B
#   --env-ids "ID ..."     these tasks only
#   --methods "NAME ..."   these columns only, by the name in a run's folder: cal_ql, td3, td3_opt ...
#   --offline-steps N      gradient steps of the offline phase; shortened runs get folders of their own
#   --online-steps N       environment steps of the online phase (ablation-n-tau: of fine-tuning, N_tau is added)
#   --jobs N               runs at a time (default 1); of a Slurm array: elements (default all)
#   --dry-run              print the commands instead; each can be pasted
#   --slurm                print them as a Slurm job array: a file for sbatch
#
# FLAGS go to every script of the table, so it must know them: --n-tau to OPT's alone by --methods "td3 td3_opt".
# A finished run is skipped and a stopped one goes on, so that the same command continues after Ctrl-C or a crash. Runs go
# to runs/, each with its benchmark.log. CUDA is used where there is some; jobs share the GPUs out.
# THREADS=n sets the threads of a run (default: 1; quick and speed: 2), SEED=n the seed of quick (default: 0). Paths are
# relative to this file's folder.

set -euo pipefail
cd "$(dirname "$0")"

refuse() { echo "benchmark.sh: $1" >&2; exit 2; }
see='bash benchmark.sh prints what there is'

mujoco="halfcheetah-random-v2 hopper-random-v2 walker2d-random-v2 halfcheetah-medium-v2 hopper-medium-v2 walker2d-medium-v2
halfcheetah-medium-replay-v2 hopper-medium-replay-v2 walker2d-medium-replay-v2"
antmaze="antmaze-umaze-v2 antmaze-umaze-diverse-v2 antmaze-medium-play-v2 antmaze-medium-diverse-v2 antmaze-large-play-v2
antmaze-large-diverse-v2"
adroit="pen-cloned-v1 hammer-cloned-v1 door-cloned-v1 relocate-cloned-v1"

# A unit is the runs of one task and seed, a line each: folder and command. They share offline phases, one after another.
add() { # SCRIPT VARIANT [FLAGS]: a run of the unit; the first after owner='' owns the offline phase of those that follow
    variants+=" $2"
    [[ -z $methods || " $methods " == *" $2 "* ]] || return 0
    local offline=${offline-$offline_steps} online=${online-$online_steps} budget='' folder command
    local n_tau=25000 given='--n[-_]tau[= ]([0-9]+)'
    [[ ! "${*:3} ${script_flags[*]-}" =~ $given ]] || n_tau=$((10#${BASH_REMATCH[1]}))
    # else its backbone runs to the end before it is refused
    [[ $2 != *_opt* || ${online:-300000} -gt $n_tau ]] ||
        refuse "$2 has ${online:-300000} online steps and collects for $n_tau of them first: write more --online-steps, or a smaller -- --n-tau"
    [[ -z $offline_steps || $offline != "$offline_steps" ]] || budget+=_offline$offline
    [[ -z $online_steps ]] || budget+=_online$online
    folder=runs/${env_id//\//-}__$2__$seed${budget:+_$budget}
    printf -v command '%q ' python "algorithms/$1.py" --env-id "$env_id" --seed "$seed" --exp-name "$2" "${@:3}" \
        ${offline:+--offline-steps "$offline"} ${online:+--online-steps "$online"} ${budget:+--run-dir "$folder"} \
        ${owner:+--offline-from "$owner"} --resume --no-progress ${script_flags[@]+"${script_flags[@]}"}
    unit+=$folder\ ${command% }$'\n'
    owner=${owner:-$folder}
}

pair() { owner='' && add "$1_opt" "$1" --no-opt && add "$1_opt" "$1_opt"; }
baseline() { owner='' && add "$1" "$1"; }

add_unit() { # the runs of one task and seed
    local unit='' owner='' backbone=td3 k n start
    case $env_id in antmaze-* | *-cloned-v1) backbone=spot ;; esac
    case $table in
    table1) baseline oema && baseline pex && baseline cal_ql && pair td3 ;;
    table2) baseline pex && baseline cal_ql && pair spot ;;
    table3) baseline cal_ql && pair spot ;;
    table14) baseline boorl && owner='' add td3_opt td3_opt ;;
    table12) pair $backbone && pair iql ;;
    table13) pair rlpd && owner='' offline=0 add rlpd_opt rlpd_vanilla --no-opt ;;
    ablation-kappa) # the first is the paper's schedule, 0.1 to 0.9
        add spot_opt spot_opt
        for k in 0.8 0.7; do add spot_opt spot_opt_kappa_end_$k --kappa-end $k; done
        for k in 0 1 0.5; do add spot_opt spot_opt_kappa_$k --kappa-init $k --kappa-end $k --kappa-decay 0; done
        ;;
    ablation-init)
        [[ $env_id == antmaze-* ]] || backbone=td3
        add ${backbone}_opt ${backbone}_opt
        for start in random online joint; do
            [[ $start-$backbone == joint-td3 ]] || add ${backbone}_opt ${backbone}_opt_init_$start --q-on-init $start
        done
        ;;
    ablation-q-on) add td3_opt td3_opt && add td3_opt td3_opt_no_q_on --no-q-on ;;
    ablation-replay) add td3_opt td3_opt && add td3_opt td3_opt_replay_online --replay online ;;
    ablation-n-tau)
        online=${online_steps:+$((online_steps + 25000))} add td3_opt td3_opt # N_tau 25,000
        for n in 6250 12500 50000 100000; do
            online=$((${online_steps:-275000} + n)) add td3_opt td3_opt_n_tau_$n --n-tau $n --n-pretrain $((2 * n))
        done
        ;;
    esac
    [[ -z $unit ]] || units+=("${unit%$'\n'}")
}

plan() { # TABLE OPTIONS: makes the units
    table=$1 seeds=10 jobs='' env_ids='' offline_steps='' online_steps='' methods='' variants='' action=run_all steps='' script_flags=() units=()
    local name flag number='^(0|[1-9][0-9]*)$' range='^([1-9][0-9]*|(0|[1-9][0-9]*)-(0|[1-9][0-9]*))$'
    local tasks set_here='opt$|calibration|q-on|kappa-(init|end|decay)|replay|env-id|seed|exp-name|run-dir|offline-(from|steps)|online-steps|no-resume'
    case $table in
    table1 | table14 | ablation-q-on | ablation-replay | ablation-n-tau) tasks=$mujoco ;;
    table2 | ablation-kappa) tasks=$antmaze ;;
    table3) tasks=$adroit ;;
    table12 | table13) tasks="$mujoco $antmaze $adroit" ;;
    ablation-init) tasks="$mujoco $antmaze" ;;
    *) refuse "unknown command '$table'; $see" ;;
    esac
    [[ $table != ablation-* && $table != table14 ]] || seeds=5
    [[ $table != ablation-n-tau ]] || set_here+='|n-tau|n-pretrain'
    while shift && (($#)); do
        case $1 in
        --dry-run | --slurm) action=${1#--} ;;
        --) script_flags=("${@:2}") && break ;;
        --seeds | --jobs | --env-ids | --methods | --offline-steps | --online-steps)
            [[ ${2:-} == *[![:space:]]* ]] || refuse "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            [[ $1 != *-steps && $1 != --methods ]] || printf -v steps '%s %s %q' "$steps" "$1" "$2"
            shift
            ;;
        *) refuse "unknown option '$1'; $see (flags for the scripts go after --)" ;;
        esac
    done
    [[ $seeds =~ $range ]] || refuse "--seeds $seeds: write a number of seeds, or FIRST-LAST"
    for name in jobs offline_steps online_steps; do
        [[ -z ${!name} || ${!name} =~ $number ]] || refuse "--${name//_/-} ${!name}: write a whole number"
    done
    [[ $jobs != 0 ]] || refuse "--jobs 0: write 1 or more"
    for flag in ${script_flags[@]+"${script_flags[@]}"}; do
        [[ ! ${flag//_/-} =~ ^--(no-)?($set_here) ]] ||
            refuse "$flag after --: benchmark.sh sets it itself (for a variant of your own, start the script itself)"
    done
    env_ids=${env_ids:-$tasks}
    [[ $seeds == *-* ]] || seeds=0-$((seeds - 1))
    first=${seeds%-*} last=${seeds#*-}
    ((last >= first)) || refuse "--seeds $seeds: the last is less than the first"
    for ((seed = first; seed <= last; seed++)); do
        for env_id in $env_ids; do add_unit; done
    done
    for name in $methods; do
        [[ " $variants " == *" $name "* ]] ||
            refuse "--methods $name: $table has $(tr ' ' '\n' <<<"${variants# }" | sort -u | paste -sd ' ' -)"
    done
}

dry-run() { printf '%s\n' "${units[@]}" | cut -d' ' -f2-; }

# --- Running them: units by xargs, whose reports follow() reads ---

finished() { # FOLDER COMMAND: of this table or another; where its offline phase came from changes nothing in its results
    local source='s/ --offline-from [^ ]*//'
    [[ -f $1/benchmark.done && $(sed "$source" "$1/benchmark.done") == "$(sed "$source" <<<"$2")" ]]
}

run_unit() { # UNIT: in a bash of its own
    local folder command status why stopped='' devices=($gpus) score='END { printf "score %s, %.0f min", $4 == "nan" ? $5 : $4, $9 / 60 }'
    trap 'stopped=1' TERM
    # BSD's xargs has no slots: there the devices are not dealt out.
    [[ -z ${slot:-} || -z $gpus ]] || export CUDA_VISIBLE_DEVICES=${devices[slot % ${#devices[@]}]}
    while read -r folder command; do
        [[ -z $stopped ]] && kill -0 "$benchmark" || break # told to stop, or benchmark.sh was killed
        finished "$folder" "$command" && echo "skipped $folder" && continue
        echo "started $folder"
        (
            mkdir -p "$folder"
            exec 9>>"$folder/benchmark.log" >&9 2>&1 </dev/null || exit
            # A run that an earlier benchmark.sh left behind holds the lock until it ends.
            ! command -v flock >/dev/null || flock 9
            echo "+ $command"
            eval "exec $command"
        )
        status=$?
        if ((status == 0)); then
            echo "$command" >"$folder/benchmark.done"
            echo "complete $folder $(awk -F, "$score" "$folder/evals.csv")"
        elif [[ -n $stopped ]]; then
            echo "stopped $folder"
        else
            why=$(tail -n 50 "$folder/benchmark.log" 2>&1)
            why=$(awk '/^╭/ { getline box } END { if (/^╰/) { $0 = box; gsub(/ *│ */, "") } print }' <<<"$why") # tyro's boxes
            echo "failed $folder exit $status: $why"
        fi
    done <<<"$1"
}

follow() { # TOTAL: ends when the last unit has, and they go on where nobody reads its output any more
    local what folder words complete=0 skipped=0 failures=()
    trap '' TERM PIPE TTOU
    while read -r what folder words; do
        [[ $what != skipped ]] || skipped=$((skipped + 1))
        [[ $what != skipped && $what != complete ]] || complete=$((complete + 1))
        [[ $what != failed ]] || failures+=("$folder/benchmark.log: $words")
        [[ $what == skipped ]] || echo "$(date +%T) [$complete/$1] $folder: $what${words:+, $words}" || true
    done
    echo "$complete of $1 runs are complete, ${#failures[@]} failed; $skipped were complete before" || true
    ((${#failures[@]} == 0)) || { printf 'failed: %s\n' "${failures[@]}" || true; exit 1; }
}

run_all() {
    local job signal status=0 stopped='' slots=--process-slot-var=slot
    xargs $slots true </dev/null 2>/dev/null || slots=''
    gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2>/dev/null | sed -n 's/^GPU \([0-9]*\).*/\1/p' || true)}
    export OMP_NUM_THREADS=${THREADS:-1} gpus=${gpus//,/ } benchmark=$$
    export -f run_unit finished
    set -m # in a process group of its own: a terminal's Ctrl-C reaches benchmark.sh alone, which passes it on
    (
        trap : TERM
        exec 2>/dev/null # else bash tells of each process that the signal ended
        printf '%s\0' "${units[@]}" |
            xargs -0 -n 1 -P "${jobs:-1}" $slots "$BASH" -c 'run_unit "$1"' run_unit |
            follow "$(dry-run | wc -l | tr -d ' ')"
    ) &
    set +m
    job=$!
    for signal in INT TERM HUP; do trap "stop $signal $job" $signal; done
    wait $job || status=$?
    while kill -0 $job 2>/dev/null; do wait $job || true; done # a signal ended the wait before
    [[ -z $stopped ]] || exit $((128 + $(kill -l "$stopped")))
    exit $status
}

stop() { # SIGNAL JOB: its runs checkpoint and end; the second time they end without. xargs ends, and starts no more
    [[ $1 != HUP || -z $stopped ]] || return 0 # a shell and its terminal send one each
    stopped=$1
    # Slurm sends SIGTERM to every process of a job by itself, and this would be the second.
    [[ $1 == TERM && -n ${SLURM_JOB_ID:-} ]] || kill -TERM -- "-$2" 2>/dev/null || true
}

slurm() {
    local ids=($env_ids) count=$((last - first + 1))
    mkdir -p runs
    cat <<EOF
#!/usr/bin/env bash
# $table as a Slurm job array: an element is one task and seed. Edit time, memory and gres for your cluster, then sbatch
# this file. A requeued element goes on from its runs' checkpoints. An element that failed or ran out of time (its runs are
# told three minutes before: they end an evaluation first): sbatch the file again, finished runs are skipped.
# What element 0 runs: SLURM_ARRAY_TASK_ID=0 bash THIS_FILE --dry-run
#SBATCH --job-name=opt-$table
#SBATCH --array=0-$((${#ids[@]} * count - 1))${jobs:+%$jobs}
#SBATCH --time=48:00:00
#SBATCH --mem=4G
#SBATCH --cpus-per-task=${THREADS:-1}
##SBATCH --gres=gpu:1
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:INT@180
#SBATCH --output="$PWD/runs/%x-%A_%a.log"
set -euo pipefail
cd $(printf %q "$PWD")
export THREADS=${THREADS:-1}
tasks=(${ids[@]}) seed=\$(($first + SLURM_ARRAY_TASK_ID % $count))
exec bash benchmark.sh $table --env-ids "\${tasks[SLURM_ARRAY_TASK_ID / $count]}" --seeds "\$seed-\$seed"$steps \\
    "\$@" --$(((${#script_flags[@]})) && printf ' %q' "${script_flags[@]}")
EOF
}

quick() {
    local td3=runs/quick__td3__${SEED:-0} opt=runs/quick__td3_opt__${SEED:-0}
    local run=(python algorithms/td3_opt.py --env-id hopper-random-v2 --offline-steps 10000 --online-steps 6000)
    run+=(--n-tau 1500 --n-pretrain 3000 --eval-freq 500 --resume --seed "${SEED:-0}")
    export OMP_NUM_THREADS=${THREADS:-2}
    "${run[@]}" --no-opt --run-dir "$td3"
    "${run[@]}" --offline-from "$td3" --run-dir "$opt"
    printf '%10s %8s %8s   normalised score, hopper-random-v2\n' 'env steps' TD3 TD3+OPT
    awk -F, 'FNR > 1 { score[FILENAME, $2] = $4; steps[$2] }
        END { for (s in steps) printf "%10d %8s %8s\n", s, score[ARGV[1], s], score[ARGV[2], s] }' \
        "$td3/evals.csv" "$opt/evals.csv" | sort -n
    echo 'Far too short for either to learn, so these scores say nothing of the methods: every phase, file and curve works here.'
    echo 'Next, TD3 against TD3+OPT as in the paper, some hours a run: bash benchmark.sh table1 --env-ids hopper-random-v2 --seeds 1'
}

case ${1:-} in
'' | -h | --help) sed -n '/^# usage/,/^$/s/^# \{0,1\}//p' "${0##*/}" ;;
report) exec python report.py "${@:2}" ;;
speed) exec python speed.py --threads "${THREADS:-2}" "${@:2}" ;;
quick) (($# == 1)) || refuse "quick takes no options; $see"; quick ;;
*) plan "$@"; $action ;;
esac

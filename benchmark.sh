#!/usr/bin/env bash
# Measurements from one command each. `bash benchmark.sh` prints what there is.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<EOF
usage: bash benchmark.sh COMMAND

  quick    TD3 against TD3+OPT on regenerated hopper-random, one seed, from one short offline phase
           (at most 15 minutes on 2 cores); prints both scores
  speed    what a gradient step costs: the offline phase against plain eager PyTorch (YARDSTICK=path of a script that
           prints "N ms" for a thread count, measured in turn with ours), and OPT's fine-tuning against the vanilla one's

Runs go to runs/; CUDA is used where there is some. THREADS=n sets the threads (default: 2).
EOF
}

script=algorithms/td3_opt.py
export OMP_NUM_THREADS=${THREADS:-2}

quick() {
    local steps=(--env-id hopper-random-v2 --offline-steps 15000 --online-steps 9000 --n-tau 3000 --n-pretrain 6000)
    steps+=(--eval-freq 1500 --resume --seed "${SEED:-0}")
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

speed() {
    local folder
    folder=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$folder'" EXIT
    local short=(--env-id hopper-random-v2 --offline-steps 2000 --online-steps 3600 --n-tau 3200 --n-pretrain 0 --eval-freq 0)
    short+=(--eval-episodes 1 --no-progress --checkpoint-freq 0 --no-save-model)
    : >"$folder/table"
    for round in 1 2 3; do
        [ -z "${YARDSTICK:-}" ] || python "$YARDSTICK" "$OMP_NUM_THREADS" | grep -o '[0-9.]* ms' | sed "s/^/yardstick /; s/ ms//" >>"$folder/table"
        python "$script" "${short[@]}" --no-opt --online-steps 400 --run-dir "$folder/td3-$round"
        python "$script" "${short[@]}" --offline-from "$folder/td3-$round" --run-dir "$folder/opt-$round"
        python "$script" "${short[@]}" --offline-from "$folder/td3-$round" --kappa-init 0.1 --kappa-end 0.9 \
            --kappa-decay 1000 --run-dir "$folder/mix-$round"
        {
            echo "offline $(rate "$folder/td3-$round" offline)"
            echo "td3 $(rate "$folder/td3-$round" online_finetune)"
            echo "opt $(rate "$folder/opt-$round" online_finetune)"
            echo "mix $(rate "$folder/mix-$round" online_finetune)"
        } >>"$folder/table"
    done
    python - "$folder/table" <<'EOF'
import collections, statistics, sys
times = collections.defaultdict(list)
for line in open(sys.argv[1]):
    name, value = line.split()
    times[name].append(float(value))
names = {"yardstick": "plain eager TD3+BC (yardstick)", "offline": "offline phase, TD3+BC", "td3": "fine-tuning, TD3",
         "opt": "fine-tuning, TD3+OPT, kappa = 1", "mix": "fine-tuning, TD3+OPT, kappa < 1 (both Q trained)"}
for name, text in names.items():
    if name in times:
        print(f"{text:50} {statistics.median(times[name]):7.2f} ms a gradient step ({min(times[name]):.2f} to {max(times[name]):.2f})")
def ratio(a, b, text):
    if times[a] and times[b]:
        pairs = [x / y for x, y in zip(times[a], times[b])]
        print(f"{text:50} {statistics.median(pairs):7.2f} ({min(pairs):.2f} to {max(pairs):.2f})")
ratio("yardstick", "offline", "yardstick / offline phase")
ratio("opt", "td3", "TD3+OPT (kappa = 1) / TD3, fine-tuning")
ratio("mix", "td3", "TD3+OPT (kappa < 1) / TD3, fine-tuning")
EOF
}

case ${1:-} in
quick | speed) "$1" ;;
'' | -h | --help) usage ;;
*)
    echo "benchmark.sh: unknown command '$1'; bash benchmark.sh prints what there is" >&2
    exit 2
    ;;
esac

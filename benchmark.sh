#!/usr/bin/env bash
# Measurements from one command each. `bash benchmark.sh` prints what there is.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<EOF
usage: bash benchmark.sh COMMAND

  quick    TD3 against TD3+OPT on regenerated hopper-random, one seed, from one short offline phase
           (at most 15 minutes on 2 cores); prints both scores
  speed    what a gradient step costs, offline beside plain eager PyTorch, and TD3+OPT's fine-tuning beside TD3's; how
           long it takes to regenerate hopper-random, and the memory of a run

Runs go to runs/; CUDA is used where there is some. THREADS=n sets the threads (default: 2).
EOF
}

script=algorithms/td3_opt.py
export OMP_NUM_THREADS=${THREADS:-2}

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
    local short=(--env-id hopper-random-v2 --offline-steps 2000 --n-tau 3200 --n-pretrain 0 --eval-freq 0)
    short+=(--eval-episodes 1 --no-progress --checkpoint-freq 0 --no-save-model)
    local from=(--offline-from "$folder/td3-1")
    for round in 1 2 3; do
        plain_eager
        python "$script" "${short[@]}" --online-steps 400 --no-opt --run-dir "$folder/td3-$round"
        echo "offline $(rate "$folder/td3-$round" offline)"
        python "$script" "${short[@]}" "${from[@]}" --online-steps 3600 --run-dir "$folder/opt-$round"
        python "$script" "${short[@]}" "${from[@]}" --online-steps 3600 --run-dir "$folder/mix-$round" \
            --kappa-init 0.1 --kappa-end 0.9 --kappa-decay 1000
        for name in td3 opt mix; do
            echo "$name $(rate "$folder/$name-$round" online_finetune)"
        done
    done | tee /dev/stderr >"$folder/times"
    python - "$folder/times" <<'EOF'
import collections, statistics, sys
times = collections.defaultdict(list)
for line in open(sys.argv[1]):
    name, value = line.split()
    times[name].append(float(value))
names = {
    "plain": "offline, plain eager PyTorch",
    "offline": "offline, TD3+BC",
    "td3": "fine-tuning, TD3",
    "opt": "fine-tuning, TD3+OPT, kappa = 1",
    "mix": "fine-tuning, TD3+OPT, kappa < 1",
}
print()
for name, text in names.items():
    print(f"{text:35} {statistics.median(times[name]):7.2f} ms a gradient step ({min(times[name]):.2f} to {max(times[name]):.2f})")
for a, b in (("plain", "offline"), ("opt", "td3"), ("mix", "td3")):
    pairs = [x / y for x, y in zip(times[a], times[b])]
    print(f"{names[a]} / {names[b]}: {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")
EOF
    python - "$folder/data" "$script" <<'EOF'
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
quick | speed) "$1" ;;
'' | -h | --help) usage ;;
*)
    echo "benchmark.sh: unknown command '$1'; bash benchmark.sh prints what there is" >&2
    exit 2
    ;;
esac

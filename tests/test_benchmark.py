"""benchmark.sh: its tables as commands, and its runs, most of them by a stand-in for python that takes no time."""

import contextlib
import csv
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import report

MUJOCO, ANTMAZE, ADROIT = 9, 6, 4
COUNTS = {
    "table1": MUJOCO * 5 * 10,
    "table2": ANTMAZE * 4 * 10,
    "table3": ADROIT * 3 * 10,
    "table12": (MUJOCO + ANTMAZE + ADROIT) * 4 * 10,
    "table13": (MUJOCO + ANTMAZE + ADROIT) * 3 * 10,
    "table14": MUJOCO * 2 * 5,
    "ablation-kappa": ANTMAZE * 6 * 5,
    "ablation-init": (MUJOCO * 3 + ANTMAZE * 4) * 5,
    "ablation-q-on": MUJOCO * 2 * 5,
    "ablation-replay": MUJOCO * 2 * 5,
    "ablation-n-tau": MUJOCO * 5 * 5,
}


PAIR = ("table1", "--methods", "td3 td3_opt")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with benchmark.sh in it, so that runs/ is the test's own."""
    (tmp_path / "benchmark.sh").write_text((ROOT / "benchmark.sh").read_text())
    (tmp_path / "algorithms").symlink_to(ROOT / "algorithms")
    return tmp_path


def benchmark(folder: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    command = ["bash", str(folder / "benchmark.sh"), *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "THREADS")}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


def dry_run(table, *options) -> list[str]:
    result = benchmark(ROOT, table, "--dry-run", *options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout.splitlines()


def values(command: str) -> dict[str, str]:
    """The flags of a command that take a value."""
    words = shlex.split(command)
    return {a: b for a, b in zip(words, words[1:], strict=False) if a.startswith("--") and not b.startswith("--")}


def folder_of(command: str) -> str:
    flags = values(command)
    return flags.get("--run-dir") or f"runs/{flags['--env-id']}__{flags['--exp-name']}__{flags['--seed']}"


@pytest.mark.parametrize("table", COUNTS)
def test_tables_are_plain_commands(table):
    commands = dry_run(table)
    assert len(commands) == COUNTS[table] == len(set(map(folder_of, commands)))
    if table == "table1":
        assert len(dry_run(table, "--seeds", "10")) == 450

    seeds = "5" if table == "table14" or table.startswith("ablation") else "10"
    assert {values(command)["--seed"] for command in commands} == set(map(str, range(int(seeds))))
    before = {}
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python" and re.fullmatch(
            r"algorithms/(boorl|oema|pex|cal_ql|(td3|spot|iql|rlpd)_opt)\.py", words[1]
        )
        owner = values(command).get("--offline-from")
        if owner:  # it comes earlier, and is the same script, task and seed
            other = before[owner]
            assert shlex.split(other)[1] == words[1] and "--offline-from" not in other
            assert all(values(other)[name] == values(command)[name] for name in ("--env-id", "--seed"))
        before[folder_of(command)] = command

    scores = report.read_paper()  # the table's cells are those for which the paper prints a number
    cells = {(values(command)["--exp-name"], values(command)["--env-id"]) for command in commands}
    of_report = set()
    for name, (_, n, headings) in report.TABLES.items():
        if name == table or name.startswith(f"{table}-"):
            own = {v: m for v, m in headings.items() if v != "boorl_at_200000"}  # on the way of boorl's runs
            of_report |= {(v, task) for v, m in own.items() for method, task in scores[n] if method == m}
    assert cells == of_report


def test_the_docs_count_the_runs():
    readme = (ROOT / "docs" / "reproduce.md").read_text()
    for table, count in COUNTS.items():
        assert re.search(rf"^\|.*`bash benchmark.sh {table}` \|[^|]*\| {count} \|", readme, re.M), table


def test_every_command_parses(monkeypatch):
    """Each kind of command; they differ in task and seed only."""
    kinds = {}
    for table in COUNTS:
        for command in dry_run(table, "--seeds", "1") + dry_run(table, "--seeds", "1", "--offline-steps", 7):
            kinds[re.sub(r"--env-id \S+|runs/\S+", "", command)] = command
    assert len(kinds) > 50
    for command in kinds.values():
        _, script, *flags = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        args = importlib.import_module(Path(script).stem).parse_args()
        given = values(command)
        assert args.env_id == given["--env-id"] and args.resume and not args.progress
        if not script.endswith("_opt.py"):
            assert args.exp_name == Path(script).stem and args.online_steps == 300_000
            continue
        assert args.opt == ("_opt" in args.exp_name) == ("--no-opt" not in flags)
        assert args.q_on == ("no_q_on" not in args.exp_name)
        start, replay, kappa, n_tau = (
            re.search(rf"_{key}_([\d.a-z]+)$", args.exp_name) for key in ("init", "replay", "kappa(?:_end)?", "n_tau")
        )
        assert args.q_on_init == (start.group(1) if start else "meta")
        assert args.replay == (replay.group(1) if replay else None)
        assert args.kappa_end == (float(kappa.group(1)) if kappa else None)
        assert args.kappa_init == (args.kappa_end if kappa and "kappa_end" not in args.exp_name else None)
        n_tau = int(n_tau.group(1)) if n_tau else 25_000
        assert (args.n_tau, args.n_pretrain, args.online_steps) == (n_tau, 2 * n_tau, 275_000 + n_tau)
        offline = 0 if args.exp_name == "rlpd_vanilla" else 7 if "--run-dir" in flags else 1_000_000
        assert args.offline_steps == offline


def test_tables_can_be_narrowed_and_shortened():
    narrow = ("--env-ids", "pen-cloned-v1 hopper-random-v2", "--seeds", "3-4", "--offline-steps", 10)
    commands = dry_run("table13", *narrow, "--online-steps", 20, "--", "--n-tau", 4, "--dataset", "a b.hdf5")
    assert len(commands) == 12
    for command in commands:
        assert shlex.split(command)[-4:] == ["--n-tau", "4", "--dataset", "a b.hdf5"]
        assert values(command)["--online-steps"] == "20"
        assert values(command)["--offline-steps"] == ("0" if "rlpd_vanilla" in command else "10")
        # Beside the full runs, not among them.
        assert folder_of(command).endswith("__online20" if "rlpd_vanilla" in command else "__offline10_online20")
    n_tau = dry_run("ablation-n-tau", "--seeds", 1, "--env-ids", "hopper-random-v2", "--online-steps", 100)
    assert sorted(int(values(c)["--online-steps"]) - int(values(c).get("--n-tau", 25_000)) for c in n_tau) == [100] * 5


def test_tables_can_be_narrowed_to_methods(folder):
    """TD3+OPT without TD3 has an offline phase of its own; the job array and the pasted commands are the same."""
    narrow = ("table1", "--env-ids", "hopper-random-v2", "--seeds", 1, "--methods", "pex td3_opt")
    commands = dry_run(*narrow)
    assert [values(command)["--exp-name"] for command in commands] == ["pex", "td3_opt"]
    assert not any("--offline-from" in command for command in commands)
    (folder / "job.slurm").write_text(benchmark(folder, *narrow, "--slurm").stdout)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    output = subprocess.check_output(["bash", folder / "job.slurm", "--dry-run"], env=environment, text=True)
    assert output.splitlines() == commands


def test_the_slurm_array_has_the_same_commands(folder):
    options = ["table13", "--env-ids", "pen-cloned-v1 hopper-random-v2", "--seeds", "3-4", "--online-steps", 20]
    extra = ["--", "--n-tau", 4, "--dataset", "a b.hdf5"]
    script = benchmark(folder, *options, "--jobs", 2, "--slurm", *extra, THREADS="3").stdout
    (folder / "job.slurm").write_text(script)
    assert "#SBATCH --array=0-3%2\n" in script and "#SBATCH --cpus-per-task=3\n" in script
    for word in ("--time=", "--mem=", "--gres=", "--requeue"):
        assert re.search(rf"^##?SBATCH {word}", script, re.M)
    commands = []
    for element in range(4):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(element)}
        output = subprocess.check_output(["bash", folder / "job.slurm", "--dry-run"], env=environment, text=True)
        commands.append(output.splitlines())
    assert [len(element) for element in commands] == [3] * 4
    whole = benchmark(folder, *options, "--dry-run", *extra).stdout.splitlines()
    assert sorted(sum(commands, [])) == sorted(whole)


def test_usage_and_bad_input():
    result = benchmark(ROOT)
    assert result.returncode == 0 and result.stdout.startswith("usage: bash benchmark.sh")
    assert all(word in result.stdout for word in [*COUNTS, "quick", "speed", "report", "--jobs", "--slurm"])
    cases = {
        "table4": "unknown command",
        "table1 --sedes 3": "unknown option '--sedes'",
        "table1 3": "unknown option '3'",
        "table1 --seeds": "needs a value",
        "table1 --methods sac": "--methods sac: table1 has cal_ql oema pex td3 td3_opt",
        "table1 --seeds 0": "--seeds 0",
        "table1 --seeds 08-09": "--seeds 08-09",
        "table1 -- --no-opt": "--no-opt",
        "table2 --methods cal_ql -- --no-calibration": "--no-calibration after --",
        "table1 -- --offline_steps 5": "--offline_steps",
        "table1 --seeds 4-2": "--seeds 4-2",
        "table1 --jobs 0": "--jobs 0",
        "table12 --methods iql_opt --online-steps 25000": "iql_opt has 25000 online steps and collects for 25",
        "table13 --online-steps 10000": "rlpd_opt has 10000 online steps and collects for 25",
        "ablation-q-on --online-steps 9 --dry-run -- --n-pretrain 4": "td3_opt has 9 online steps and collects",
        "table1 --methods td3_opt -- --n-tau 400000": "td3_opt has 300000 online steps and collects for 400000",
        "ablation-n-tau --online-steps 0": "td3_opt has 25000 online steps and collects for 25",
        "table1 --online-steps 1e5": "whole number",
        "table1 -- --seed 3": "--seed after --",
        "ablation-n-tau -- --n-tau 4": "--n-tau after --",
        "quick now": "takes no options",
    }
    for arguments, words in cases.items():
        result = benchmark(ROOT, *arguments.split())
        assert result.returncode == 2 and result.stdout == "", arguments
        assert words in result.stderr and result.stderr.startswith("benchmark.sh: ") and result.stderr.count("\n") == 1


STAND_IN = r"""#!/usr/bin/env bash
trap 'echo got TERM; [[ -z ${stopped:-} ]] || exit 143; stopped=1' TERM
nap() { # as a run does, it takes a while to stop
    sleep "${NAP:-0.3}" & wait
    [[ -z ${stopped:-} ]] || { sleep 0.5; sleep 0.5; exit 143; }
}
while (($#)); do
    case $1 in --exp-name) name=$2 ;; --seed) seed=$2 ;; --env-id) env=$2 ;; --offline-from) from=$2 ;; esac
    shift
done
folder=runs/${env}__${name}__$seed
[[ -z ${from:-} || -f $from/offline.pt ]] || { echo "no offline.pt"; exit 2; }
echo "$(date +%s.%N) start $name $seed gpu ${CUDA_VISIBLE_DEVICES-none} threads $OMP_NUM_THREADS pid $$" >>events
[[ $name-$seed != "${FAILING:-}" ]] || { printf '%b\n' "${WORDS:-$name-$seed: cannot}"; exit 1; }
nap
touch "$folder/offline.pt"
nap
echo "online_finetune,300000,1500000,34.5,1,1,1,,720" >"$folder/evals.csv"
echo "$(date +%s.%N) end $name $seed" >>events
"""
BSD_XARGS = """#!/usr/bin/env bash
[[ " $* " != *--process-slot-var* ]] || exit 1
exec /usr/bin/xargs "$@"
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def stand_in(folder) -> dict[str, str]:
    """PATH with a python that only takes note of what it is started with."""
    (folder / "bin").mkdir()
    write_program(folder / "bin" / "python", STAND_IN)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def events(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "events").read_text().splitlines()]


@pytest.mark.parametrize(
    "bsd, given, gpus", [(False, "4,7", {"4", "7"}), (True, "4,7", {"4,7"}), (False, None, {"0", "1"})]
)
def test_units_go_side_by_side_and_share_gpus(folder, stand_in, bsd, given, gpus):
    """A unit's runs go one after the other, the owner of the offline phase first."""
    if bsd:
        write_program(folder / "bin" / "xargs", BSD_XARGS)
    write_program(folder / "bin" / "nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: NVIDIA A (UUID: 1)\\nGPU 1: NVIDIA A\\n'\n")
    narrow = (*PAIR, "--env-ids", "A-v0", "--seeds", 3, "--jobs", 3)
    visible = {"CUDA_VISIBLE_DEVICES": given} if given else {}
    result = benchmark(folder, *narrow, **visible, **stand_in)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 runs are complete, 0 failed" in result.stdout
    assert result.stdout.count(": complete, score 34.5, 12 min\n") == 6
    running, most, seen = {}, 0, set()
    for _, what, name, seed, *run in events(folder):
        if what == "start":
            assert seed not in running and run[3] == "1"
            running[seed] = name
            seen.add(run[1])
        else:
            assert running.pop(seed) == name
        most = max(most, len(running))
    assert most == 3 and not running and seen == gpus
    for seed in "012":
        assert [name for _, what, name, s, *_ in events(folder) if (what, s) == ("start", seed)] == ["td3", "td3_opt"]


def test_a_failure_is_reported_and_tried_again(folder, stand_in):
    narrow = (*PAIR, "--env-ids", "A-v0", "--seeds", 2, "--jobs", 2)
    result = benchmark(folder, *narrow, FAILING="td3-1", **stand_in)
    assert result.returncode == 1 and "2 of 4 runs are complete, 2 failed" in result.stdout
    assert "failed: runs/A-v0__td3__1/benchmark.log: exit 1: td3-1: cannot" in result.stdout
    assert "failed: runs/A-v0__td3_opt__1/benchmark.log: exit 2: no offline.pt" in result.stdout
    box = r"╭─ Unrecognized ───╮\n│ Unrecognized: --a │\n" + r"│ Perhaps you meant │\n" * 15 + "╰───────────────────╯"
    result = benchmark(folder, *narrow, FAILING="td3-1", WORDS=box, **stand_in)
    assert "failed: runs/A-v0__td3__1/benchmark.log: exit 1: Unrecognized: --a\n" in result.stdout
    result = benchmark(folder, *narrow, **stand_in)
    assert result.returncode == 0
    assert "4 of 4 runs are complete, 0 failed; 2 were complete before" in result.stdout
    counts = Counter((name, seed) for _, what, name, seed, *_ in events(folder) if what == "start")
    assert counts == {("td3", "0"): 1, ("td3_opt", "0"): 1, ("td3", "1"): 3, ("td3_opt", "1"): 1}


def test_what_the_shell_cannot_write_fails_alone(folder, stand_in):
    (folder / "runs" / "A-v0__td3__1" / "benchmark.log").mkdir(parents=True)
    (folder / "runs" / "A-v0__td3__2").touch()
    result = benchmark(folder, *PAIR, "--env-ids", "A-v0", "--seeds", 3, "--jobs", 2, **stand_in)
    assert result.returncode == 1 and "2 of 6 runs are complete, 4 failed" in result.stdout
    assert [name + seed for _, what, name, seed, *_ in events(folder) if what == "start"] == ["td30", "td3_opt0"]
    failed = [line for line in result.stdout.splitlines() if line.startswith("failed: ")]
    for run in ("td3__1", "td3__2", "td3_opt__1", "td3_opt__2"):
        assert sum(f"runs/A-v0__{run}/benchmark.log" in line for line in failed) == 1


def test_nobody_reads_on(folder, stand_in):
    command = "bash benchmark.sh table1 --methods 'td3 td3_opt' --env-ids A-v0 --seeds 1 | true"
    subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | stand_in, check=True)
    assert [what for _, what, *_ in events(folder)] == ["start", "end"] * 2


def test_tables_share_their_finished_runs(folder, stand_in):
    narrow = ("--env-ids", "A-v0", "--seeds", 1)
    assert benchmark(folder, *PAIR, *narrow, **stand_in).returncode == 0
    for table, before in (("ablation-q-on", 1), ("ablation-n-tau", 1), ("table1", 2)):
        result = benchmark(folder, *(PAIR if table == "table1" else [table]), *narrow, **stand_in)
        assert result.returncode == 0 and f" 0 failed; {before} were complete before" in result.stdout
    starts = Counter(name for _, what, name, *_ in events(folder) if what == "start")
    assert starts["td3"] == starts["td3_opt"] == 1 and len(starts) == 7


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def from_a_terminal() -> None:
    """Before exec: where these tests run in the background, bash could not trap what it is started ignoring."""
    for number in (INT, HUP):
        signal.signal(number, signal.SIG_DFL)


def start_table(folder: Path, options: str, environment: dict[str, str], **how) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    command = ["bash", "benchmark.sh", *PAIR, "--jobs", "2", *options.split()]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=clean | environment,
        text=True,
        preexec_fn=from_a_terminal,
        start_new_session=True,
        **how,
    )


def wait_for(condition) -> None:
    deadline = time.time() + 300
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "numbers, status, slurm",
    [
        ([INT], 130, ""),
        ([TERM], 143, ""),
        ([HUP], 129, ""),
        ([INT, INT], 130, ""),
        ([HUP, HUP], 129, ""),
        ([TERM], 143, "all"),
        ([INT], 130, "B:"),
    ],
)
def test_ctrl_c_stops_the_runs_first(folder, stand_in, numbers, status, slurm):
    """Each run gets as many signals as benchmark.sh: at a second one it does not wait for its checkpoint. But of HUP a
    shell and its terminal may send one each. At the end of its time Slurm signals every process of a job, and before
    that, by --signal=B:INT@180, the first one alone."""
    environment = stand_in | {"NAP": "60"} | ({"SLURM_JOB_ID": "1"} if slurm else {})
    process = start_table(folder, "--env-ids A-v0 --seeds 4", environment, stdout=subprocess.PIPE)
    wait_for(lambda: (folder / "events").exists() and len(events(folder)) == 2)
    logs = [folder / "runs" / f"A-v0__td3__{seed}" / "benchmark.log" for seed in (0, 1)]
    for sent, number in enumerate(numbers, 1):
        os.killpg(process.pid, number)  # as a terminal does; the runs are in a process group of their own
        if slurm == "all":  # two signals at the same moment would be one
            time.sleep(0.3)
            os.killpg(os.getpgid(int(events(folder)[0][-1])), number)
        got = 1 if number == HUP else sent
        wait_for(lambda got=got: all(log.read_text().count("got TERM") == got for log in logs))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status and out.count(": stopped") == 2 and "0 of 8 runs are complete" in out
    assert [log.read_text().count("got TERM") for log in logs] == [got] * 2


def test_runs_that_a_killed_benchmark_left_behind_are_waited_for(folder, stand_in):
    options = "--env-ids A-v0 --seeds 2"
    first = start_table(folder, options, stand_in | {"NAP": "1.5"}, stdout=subprocess.PIPE)
    wait_for(lambda: (folder / "events").exists() and len(events(folder)) == 2)
    first.kill()
    first.wait()
    assert start_table(folder, options, stand_in, stdout=subprocess.DEVNULL).wait() == 0
    assert "2 of 4 runs are complete, 0 failed" in first.stdout.read()  # what was left behind started nothing more
    running = Counter()
    for _, what, name, seed, *_ in events(folder):
        running[name, seed] += 1 if what == "start" else -1
        assert running[name, seed] in (0, 1), "two processes in one run's folder"
    assert not any(running.values())


def test_a_grid_of_real_runs_killed_in_the_middle(folder, home, pendulum_file):
    """6 runs, 2 at a time, one fails. Ctrl-C, then benchmark.sh is killed outright, its runs live on; then it ends."""
    options = "--env-ids InvertedPendulum-v5 --seeds 3 --offline-steps 20 --online-steps 400 -- --n-tau 20 --utd 1"
    options += f" --n-pretrain 20 --batch-size 8 --eval-freq 0 --eval-episodes 1 --dataset {pendulum_file}"
    runs = {f"{name}-{seed}": folder / "runs" / f"InvertedPendulum-v5__{name}__{seed}__offline20_online400"
            for name in ("td3", "td3_opt") for seed in range(3)}  # fmt: skip
    runs["td3_opt-2"].mkdir(parents=True)
    (runs["td3_opt-2"] / "checkpoint.pt").write_text("no checkpoint")
    environment = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    zeroth = start_table(folder, options, environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (runs["td3-0"] / "args.json").exists())  # it is ready to be stopped
    zeroth.send_signal(INT)
    assert zeroth.wait() == 130
    assert "stopped, with a checkpoint" in (runs["td3-0"] / "benchmark.log").read_text()
    first = start_table(folder, options, environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (runs["td3_opt-0"] / "args.json").exists())
    first.kill()
    first.wait()
    complete_before = {name for name, run in runs.items() if (run / "benchmark.done").exists()}
    assert len(complete_before) < 4
    second = start_table(folder, options, environment, stdout=subprocess.PIPE)
    out, _ = second.communicate()
    assert second.returncode == 1 and "5 of 6 runs are complete, 1 failed" in out, out
    failed = [line for line in out.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "__td3_opt__2__" in failed[0] and "checkpoint.pt is damaged" in failed[0]
    for name, run in runs.items():
        if name != "td3_opt-2":
            with open(run / "evals.csv", newline="") as file:
                last = list(csv.DictReader(file))[-1]
            assert (last["phase"], last["env_steps"]) == ("online_finetune", "400")
            starts = 1 + (run / "benchmark.log").read_text().count("stopped, with a checkpoint")
            assert len(list(run.glob("events.out.tfevents*"))) == starts, f"{name} was trained twice"
            again = (run / "benchmark.log").read_text().count("is complete")
            assert again <= (name not in complete_before)


QUICK = r"""#!/usr/bin/env bash
echo "$*" >>events
score=10
while (($#)); do
    case $1 in --run-dir) folder=$2 ;; --offline-from) from=$2 score=20 ;; esac
    shift
done
[[ -z ${from:-} || -f $from/evals.csv ]] || exit 2
mkdir -p "$folder"
printf '%s\n' header offline,0,9,1,8 online_finetune,500,9,$((score + 1)),8 online_finetune,1000,9,$((score + 2)),8 \
    >"$folder/evals.csv"
"""


def test_quick_is_td3_against_td3_opt(folder, stand_in):
    """From one offline phase, with both scores at each evaluation."""
    write_program(folder / "bin" / "python", QUICK)
    result = benchmark(folder, "quick", SEED="3", **stand_in)
    assert result.returncode == 0, result.stderr
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0][:4] == ["env", "steps", "TD3", "TD3+OPT"]
    assert table[1:4] == [["0", "1", "1"], ["500", "11", "21"], ["1000", "12", "22"]]
    first, second = map(shlex.split, (folder / "events").read_text().splitlines())
    assert first[-3:] == ["--no-opt", "--run-dir", "runs/quick__td3__3"]
    assert second[-4:] == ["--offline-from", "runs/quick__td3__3", "--run-dir", "runs/quick__td3_opt__3"]
    assert first[:-3] == second[:-4] and first[first.index("--env-id") + 1] == "hopper-random-v2"


def test_report_is_run_by_benchmark(tmp_path):
    with contextlib.chdir(tmp_path):
        result = benchmark(ROOT, "report", "--runs", tmp_path / "none", "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.startswith("report.py: ")

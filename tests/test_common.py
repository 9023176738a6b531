"""A script stands alone: a first part of its own, a second part that is the same text in all, and the pins of both."""

import ast
import dataclasses
import importlib
import itertools
import math
import re
import signal
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ROOT
from runs import rows, run_killed_at, same_weights, timeless
from test_goal_tasks import Walk, collect

SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
BANNER = "#" * 120 + "\n# The same text in every script from here on"

# What any two scripts call by one name has to be the same text, but for these: of each script, and of one of them.
DIFFERENT = {
    "Args", "OFFLINE_ARGS", "BOUNDS", "paper_values", "Actor", "Critic", "policy_value", "Agent", "explore",
    "collect", "offline_pretrain", "online_pretrain", "online_finetune",
}  # fmt: skip
OWN = {
    "spot_opt": {"PHASES", "EnsembleLayerNorm", "policy_loss", "train"},
    "iql_opt": {"reward_transform"},
    "rlpd_opt": {"check", "train"},
    "pex": {"PHASES", "ValueFunction", "check", "train"},
    "cal_ql": {"PHASES", "check", "reward_transform", "train"},
    "oema": {"PHASES", "check", "train"},
    "boorl": {"PHASES", "smoothed_actions", "td_target", "td_loss", "td3_bc_loss", "check"}
    | {"reward_transform", "train"},
}


def parts(path: Path) -> tuple[str, str]:
    first, banner, rest = path.read_bytes().decode().partition(BANNER)
    assert banner, f"{path.name} has no second part"
    return first, banner + rest


def definitions(source: str) -> dict[str, str]:
    """Every function, class and constant at the top level with its text, decorators and the comments above it."""
    lines, found = source.splitlines(), defaultdict(str)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        else:
            continue
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#"):
            start -= 1
        found[name] += "\n".join(lines[start : node.end_lineno])
    return found


def test_the_second_part_is_the_same_in_every_script_and_knows_nothing_of_opt():
    first, *others = [parts(path)[1].encode() for path in SCRIPTS]
    assert others and [path.name for path, other in zip(SCRIPTS[1:], others, strict=True) if other != first] == []
    assert {"ReplayBuffer", "load_dataset", "make_env", "evaluate", "resolve", "Run"} <= definitions(
        first.decode()
    ).keys()
    for word in ("args.opt", "q_on", "q_off", "kappa", "n_tau", "n_pretrain", "meta_", "balanced", "online_pretrain"):
        assert word.encode() not in first.lower(), word


def test_what_first_parts_call_by_one_name_is_the_same_text():
    found = {path.stem: definitions(parts(path)[0]) for path in SCRIPTS}
    for a, b in itertools.combinations(found, 2):
        common = (found[a].keys() & found[b].keys()) - DIFFERENT - OWN.get(a, set()) - OWN.get(b, set())
        assert {"EnsembleLinear", "make_adam", "minimize", "soft_update"} <= common
        if a.endswith("_opt") and b.endswith("_opt"):
            assert {"kappa_schedule", "meta_adaptation_loss", "SumTree", "BalancedReplay"} <= common
        assert [name for name in sorted(common) if found[a][name] != found[b][name]] == [], (a, b)


def imported(path: Path) -> set[str]:
    """The modules that a script imports, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    return names


def test_scripts_import_packages_only():
    for path in SCRIPTS:
        assert not imported(path) & ({script.stem for script in SCRIPTS} | {"tests", "algorithms", "report", "speed"})


@every_script
def test_a_script_names_what_it_needs_with_the_pins_of_requirements_txt(path):
    """For `uv run` of the file alone; every package for the scripts is in both."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?:| .*)\n)+?)# ///$", path.read_text())
    needed = tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().partition("# report.py")[0].splitlines()
    assert sorted(needed) == sorted(line.partition("#")[0].strip() for line in lines if not line.startswith("#"))
    packages = {need.partition("==")[0].replace("-", "_") for need in needed}
    assert imported(path) - sys.stdlib_module_names <= packages


@every_script
def test_the_command_line_has_every_argument_with_its_comment(path, monkeypatch, capsys):
    """--help takes them from the text of Args, a line each."""
    script = importlib.import_module(path.stem)
    monkeypatch.setattr(sys, "argv", [path.name])
    assert script.parse_args() == script.Args()
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit):
        script.parse_args()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(script.Args):
        (comment,) = re.findall(rf"(?m)^    {field.name}: .*  # (.*)$", path.read_text())
        assert f"--{field.name.replace('_', '-')}" in shown and comment in shown, field.name


@every_script
def test_no_number_may_be_negative(path):
    script = importlib.import_module(path.stem)
    kinds = {field.name: set(field.type.split(" | ")) for field in dataclasses.fields(script.Args)}
    numbers = [name for name, kind in kinds.items() if {"int", "float"} & kind]
    assert {"offline_steps", "batch_size", "gamma", "tau"} <= set(numbers)
    assert {"kappa_end", "meta_lr"} <= set(numbers) or not path.stem.endswith("_opt")
    for name in numbers:
        vanilla = {"opt": False} if name == "random_steps" else {}
        with pytest.raises(script.BadInput, match=f"^--{name.replace('_', '-')} is -1: write "):
            script.resolve(script.Args(**{name: -1} | vanilla))


# What an offline phase is the same with and without, and may so differ between runs that share one.
ONLINE = {
    "online_steps", "n_tau", "n_pretrain", "utd", "opt", "kappa_init", "kappa_end", "kappa_decay", "q_on_init", "q_on",
    "meta_lr", "meta_second_order", "replay", "init_online_fraction", "exploration_noise", "collect_noise",
    "lambda_end", "lambda_decay", "online_gamma", "random_steps", "collect_steps", "zeta", "kappa_opt",
}  # fmt: skip
RUN = {
    "device", "compile", "eval_freq", "eval_episodes", "snapshots", "exp_name", "run_dir", "offline_from",
    "checkpoint_freq", "resume", "save_model", "capture_video", "track", "wandb_project_name", "wandb_entity",
    "progress",
    "dataset",  # its content is compared
}  # fmt: skip


@every_script
def test_a_shared_offline_phase_has_every_argument_that_matters_to_it(path):
    script = importlib.import_module(path.stem)
    names = {field.name for field in dataclasses.fields(script.Args)}
    own = {"beta"} if path.stem == "oema" else set()  # IQL's is another one
    assert set(script.OFFLINE_ARGS) == names - ONLINE - RUN - own


@every_script
def test_bounds_of_one_argument_are_the_same_in_every_script(path):
    script, td3 = importlib.import_module(path.stem), importlib.import_module("td3_opt")
    values = (-1, 0, 0.5, 1, 1.5, 2**64, math.inf, math.nan)

    def bounds(script) -> dict:
        rows = [(name, kind, holds) for kind, (names, holds) in script.BOUNDS.items() for name in names.split()]
        return {name: (kind, [bool(holds(value)) for value in values]) for name, kind, holds in rows}

    one, other = bounds(script), bounds(td3)
    common = one.keys() & other.keys()
    assert {"seed", "utd", "batch_size", "gamma", "tau", "eval_freq"} <= common
    if path.stem.endswith("_opt"):
        assert {"n_tau", "kappa_init", "meta_lr"} <= common
    assert {name: one[name] for name in common} == {name: other[name] for name in common}


# Runs of every script but td3_opt.py, whose are in test_run.py: the arguments, and the step of each phase at which the
# run is killed. Checkpoints are written every 5 gradient steps.
SHORT = "--offline-steps 24 --online-steps 60 --batch-size 16 --eval-episodes 1 --eval-freq 20".split()
SHORT += "--checkpoint-freq 5 --no-progress".split()
SHORT_OPT = "--n-tau 30 --n-pretrain 16".split()
SPOT, IQL, RLPD = (f"{name}_opt --env-id InvertedPendulum-v5" for name in ("spot", "iql", "rlpd"))
RUNS = (SPOT + " --vae-steps 12", IQL + " --dropout 0.1", RLPD + " --utd 2 --offline-utd 2")
TUNING = {"online_finetune": 21}
ACTING = {"collect": 17} | TUNING
KILLS = {"offline": 13, "collect": 17, "online_pretrain": 11} | TUNING
KILLED = dict(zip(RUNS, ({"vae": 7} | KILLS, KILLS, KILLS), strict=True))
KILLED |= {f"spot_opt --env-id {env} --vae-steps 12": ACTING for env in ("antmaze-umaze-v2", "door-cloned-v1")}
KILLED |= {
    IQL + flags: TUNING for flags in (" --no-opt", " --no-q-on", " --kappa-init 1 --kappa-end 1 --replay online")
}
KILLED |= {RLPD + " --utd 2 --no-opt": TUNING}
KILLED |= {RLPD + " --utd 2 --no-opt --offline-steps 0 --random-steps 20": ACTING}
KILLED |= {"pex --env-id InvertedPendulum-v5 --collect-steps 30": {"offline": 13} | ACTING}
KILLED |= {"cal_ql --env-id InvertedPendulum-v5 --lagrange --max-backup --utd 2": {"offline": 13} | TUNING}
KILLED |= {"cal_ql --env-id antmaze-umaze-v2 --cql-actions 2": {"online_finetune": 43}}
KILLED |= {"oema --env-id InvertedPendulum-v5 --collect-steps 30": {"offline": 13} | ACTING}
KILLED |= {"boorl --env-id InvertedPendulum-v5 --collect-steps 30 --utd 2": {"offline": 13} | ACTING}


@pytest.fixture
def train(home, pendulum_file, tmp_path, monkeypatch):
    """Run a script in this process, or kill it in one of its own; returns its folder."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))

    def train(command: str, name: str, *more, kill: tuple | None = None) -> Path:
        script, *arguments = [*command.split(), *SHORT]
        arguments += SHORT_OPT if script.endswith("_opt") else []
        arguments += [*map(str, more), "--run-dir", str(tmp_path / name)]
        if "InvertedPendulum-v5" in arguments:
            arguments += ["--dataset", str(pendulum_file)]
        else:  # whose episodes are long
            arguments += ["--eval-freq", "0"]
        if kill:
            result = run_killed_at(script, *kill, "SIGKILL", home, *arguments)
            assert result.returncode == -signal.SIGKILL, result.stderr
        else:
            module = importlib.import_module(script)
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            module.train(module.parse_args())
        return tmp_path / name

    return train


@pytest.mark.parametrize("command", KILLED)
def test_a_run_killed_in_every_phase_resumes_bit_for_bit(command, train):
    """One phase after the other; on goal tasks the last time in the middle of an episode."""
    if "antmaze" in command:
        collect("D4RL/antmaze/umaze-v1", Walk(), [None, None])
    elif "door-cloned" in command:
        collect("D4RL/door/cloned-v2", gym.make("AdroitHandDoor-v1", max_episode_steps=20), [None, None])
    whole = train(command, "whole")
    for phase, step in KILLED[command].items():
        folder = train(command, "run", "--resume", kill=(phase, step))
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert saved["phase"] == phase and step - 5 <= saved["step"] < step  # some steps old
    assert "Inverted" in command or saved["parts"]["collector"]["episode_steps"] > 20
    train(command, "run", "--resume")
    assert timeless(folder) == timeless(whole) and same_weights(folder, whole)
    assert [row["phase"] for row in rows(folder, "speed.csv")] == [row["phase"] for row in rows(whole, "speed.csv")]


@pytest.mark.parametrize("command", {command.split()[0]: command for command in reversed(KILLED)}.values())
def test_another_seed_is_another_run(command, train):
    assert not same_weights(train(command, "run"), train(command, "other", "--seed", 1))


@pytest.mark.parametrize("command", RUNS)
def test_variants_share_one_offline_phase(command, train):
    """OPT from the vanilla backbone's offline.pt ends where OPT alone ends, and the other way round."""
    opt, vanilla = train(command, "opt"), train(command, "vanilla", "--no-opt")
    for whole, other, flags in ((opt, vanilla, ()), (vanilla, opt, ("--no-opt",))):
        shared = train(command, f"shared-{whole.name}", *flags, "--offline-from", other)
        assert timeless(shared) == timeless(whole) and same_weights(shared, whole)

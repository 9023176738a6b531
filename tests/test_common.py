"""The scripts stand alone, so what they share is in each of them: word for word the same."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "algorithms").glob("*_opt.py"))
FIRST = ROOT / "algorithms" / "td3_opt.py"

# What an algorithm has of its own. Any other name that two scripts define must mean the same text.
DIFFERENT = {
    "Args", "ALGORITHM", "PHASES", "BOUNDS", "OFFLINE_ARGS", "paper_values", "Actor", "Critic",
    "Agent", "explore", "offline_pretrain", "online_pretrain", "online_finetune", "policy_loss", "reward_transform",
    "value",
}  # fmt: skip


def definitions(path: Path) -> dict[str, str]:
    """Every function, class and constant at the top level with its text, decorators and the comments above it."""
    source = path.read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        else:
            continue
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#"):
            start -= 1
        found[name] = "\n".join(lines[start : node.end_lineno])
    return found


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path != FIRST], ids=lambda path: path.name)
def test_common_definitions_are_the_same_text(path):
    first, other = definitions(FIRST), definitions(path)
    common = (first.keys() & other.keys()) - DIFFERENT
    assert {"load_dataset", "make_env", "ReplayBuffer", "BalancedReplay", "Run", "evaluate", "train"} <= common
    assert [name for name in sorted(common) if first[name] != other[name]] == []


def test_scripts_import_packages_only():
    for path in SCRIPTS:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(node.module.split(".")[0])
        assert not imported & {script.stem for script in SCRIPTS} | imported & {"tests", "algorithms", "report"}


def words(annotation: str) -> list[str]:
    """int | None -> ["int", "None"]"""
    return annotation.split(" | ")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_number_may_be_negative(path, capsys):
    script = importlib.import_module(path.stem)
    numbers = [field.name for field in dataclasses.fields(script.Args) if {"int", "float"} & set(words(field.type))]
    assert {"offline_steps", "batch_size", "kappa_end", "meta_lr"} <= set(numbers)
    for name in numbers:
        with pytest.raises(SystemExit) as error:
            script.resolve(script.Args(**{name: -1, "opt": name != "random_steps"}))
        flag = f"--{name.replace('_', '-')}"
        assert error.value.code == 2 and capsys.readouterr().err.startswith(f"{path.name}: {flag} is -1: write "), name


# What an offline phase is the same with and without, and may so differ between runs that share one.
ONLINE = {
    "online_steps", "n_tau", "n_pretrain", "utd", "opt", "kappa_init", "kappa_end", "kappa_decay", "q_on_init", "q_on",
    "meta_lr", "meta_second_order", "replay", "init_online_fraction", "exploration_noise", "lambda_end",
    "online_gamma", "random_steps",
}  # fmt: skip
RUN = {
    "device", "eval_freq", "eval_episodes", "exp_name", "run_dir", "offline_from", "checkpoint_freq", "resume",
    "save_model", "capture_video", "reference_model", "track", "wandb_project_name", "wandb_entity", "progress",
    "dataset",  # its content is compared
}  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_shared_offline_phase_has_every_argument_that_matters_to_it(path):
    script = importlib.import_module(path.stem)
    names = {field.name for field in dataclasses.fields(script.Args)}
    used_offline = {"utd"} if path.stem == "rlpd_opt" else set()
    assert set(script.OFFLINE_ARGS) == names - (ONLINE - used_offline) - RUN

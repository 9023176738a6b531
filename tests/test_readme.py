"""README.md: its code does what it says, its table has every flag."""

import dataclasses
import importlib
import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import td3_opt
from conftest import ROOT, roll_out, write_file
from runs import rows

README = (ROOT / "README.md").read_text()
MAKE_FILE, MAKE_MINARI, ROLL_OUT, FROM_PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def execute(code: str, **changes: str) -> None:
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_data_of_ones_own():
    execute(MAKE_FILE, **{"10_000": "300"})
    execute(MAKE_MINARI, **{"range(500)": "range(30)"})
    for dataset in ("my_data.hdf5", "mine/pendulum-v0"):
        data, _ = td3_opt.load_dataset("InvertedPendulum-v5", dataset, progress=False)
        assert len(data.rewards) >= 100 and data.terminals.sum() >= 10 and np.abs(data.actions).max() > 1
        inside = data.terminals[:-1] == 0
        np.testing.assert_array_equal(data.next_observations[:-1][inside], data.observations[1:][inside])


def test_a_model_rolls_out_as_it_was_evaluated(tmp_path, capsys):
    columns = roll_out(gym.make("Hopper-v5"), 300, seed=0)
    args = dict(offline_steps=20, online_steps=30, n_tau=20, n_pretrain=5, batch_size=16, eval_episodes=1, eval_freq=0)
    args |= dict(dataset=str(write_file(tmp_path / "d.hdf5", columns)), progress=False, device="cpu")
    execute(
        FROM_PYTHON,
        **{"offline_steps=100_000, online_steps=100_000": ", ".join(f"{key}={value!r}" for key, value in args.items())},
    )
    capsys.readouterr()
    execute(ROLL_OUT, **{"reset(seed=0)": "reset(seed=1_000_000)"})
    score = float(rows(tmp_path / "runs" / "hopper-random-v2__td3_opt__0")[-1]["return_mean"])
    assert capsys.readouterr().out == f"return {score:.1f}\n"


def test_the_table_has_every_flag():
    table = README.partition("## Flags")[2].partition("## More")[0]
    known = set(re.findall(r"--([a-z-]+)", table))
    for path in (ROOT / "algorithms").glob("*.py"):
        fields = dataclasses.fields(importlib.import_module(path.stem).Args)
        names = {field.name.replace("_", "-") for field in fields}
        assert names - known - {name for name in names if f"no-{name}" in known} == set(), path.name

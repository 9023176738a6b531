"""speed.py: its runs as flags that the scripts take, its medians and ratios, and bad input; the runs are stand-ins."""

import importlib
import re
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT

sys.path.insert(0, str(ROOT))
import speed

MS = {"vae": 5, "offline": 2, "online_pretrain": 3, "online_finetune": 4}


class StandIn:
    """A run that writes speed.csv at once; the second round of RLPD with 2 critics is slower."""

    def __init__(self, name, folder, *flags):
        command = ["--env-id", "hopper-random-v2", "--run-dir", str(folder), *map(str, flags)]
        args = tyro.cli(importlib.import_module(f"{name.lower()}_opt").Args, args=command)
        assert args.eval_freq == args.checkpoint_freq == 0 and not args.save_model
        factor = 3 if args.kappa_init == 0.1 else 2 if args.kappa_init == 1 else 1
        if name == "RLPD" and args.ensemble_size == 2:
            factor = 0.25 if folder.parent.name == "0" else 0.5
        assert args.opt == (args.offline_from is not None) == (args.kappa_init is not None)
        if args.opt:
            assert (folder.parent / name / "speed.csv").exists() and args.online_steps > args.n_tau
        folder.mkdir(parents=True)
        rows = [f"{phase},200,1,{0.2 * ms * factor},9\n" for phase, ms in MS.items()] + ["start,0,0,0.000,0\n"]
        header = "phase,gradient_steps,env_steps,seconds,gradient_steps_per_second\n"
        (folder / "speed.csv").write_text(header + "".join(rows))

    def wait(self) -> int:
        return 0


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(speed, "start", StandIn)
    monkeypatch.setattr(speed, "plain_eager", lambda: 7.0)
    monkeypatch.setattr(speed, "regenerate", lambda folder: "regenerated")
    monkeypatch.setattr(speed.os, "environ", {})
    monkeypatch.setattr(speed.torch, "set_num_threads", lambda threads: None)


def test_medians_and_ratios(stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rounds", "2", "--threads", "3"])
    speed.main()
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert f"{speed.processor()}, 3 threads; medians of 2 rounds" in out and out.endswith("\nregenerated\n")
    assert speed.os.environ["OMP_NUM_THREADS"] == "3"
    assert "offline, plain eager PyTorch / offline, TD3: 3.50 (3.50 to 3.50)" in out
    assert "offline, RLPD of 2 critics 0.75 ms a gradient step (0.50 to 1.00)" in out
    assert "offline, RLPD of 10 critics / offline, RLPD of 2 critics: 3.00 (2.00 to 4.00)" in out
    assert "SPOT's VAE 5.00 ms" in out
    for name in ("TD3", "SPOT", "IQL", "RLPD"):
        assert f"online pre-training, {name}+OPT 9.00 ms" in out
        assert f"fine-tuning, {name}+OPT, kappa = 1 / fine-tuning, {name}: 2.00" in out
        assert f"fine-tuning, {name}+OPT, kappa < 1 / fine-tuning, {name}: 3.00" in out


def test_a_failing_run_and_bad_input(stand_ins, monkeypatch, tmp_path):
    monkeypatch.setattr(StandIn, "wait", lambda self: 2)
    with pytest.raises(SystemExit, match="speed.py: the run of TD3 failed"):
        speed.measure_round(tmp_path)
    for arguments, words in {"--rounds 0": "1 or more", "--threads x": "1 or more", "now": "unrecognized"}.items():
        command = ["bash", ROOT / "benchmark.sh", "speed", *arguments.split()]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == "" and words in result.stderr
        assert result.stderr.startswith("speed.py: ") and result.stderr.count("\n") == 1

"""A gradient step is the same compiled or not, and never waits for the device, as a CUDA graph needs it."""

import json
import shutil
import types

import iql_opt
import pytest
import rlpd_opt
import spot_opt
import td3_opt
import torch
from conftest import losses_of, take_phase
from runs import run_killed_at, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRIPTS = pytest.mark.parametrize("script", [td3_opt, spot_opt, iql_opt, rlpd_opt], ids=lambda s: s.__name__)
ALONE = {"kappa_init": 1.0, "kappa_end": 1.0}
PHASES = [("offline", {}), ("online_finetune", {"opt": False}), ("online_finetune", ALONE)]
PHASES += [("online_pretrain", {"q_on_init": kind}) for kind in ("meta", "online", "joint")]
PHASES += [("online_pretrain", {"meta_second_order": True}), ("online_pretrain", {"q_on": False})]
PHASES += [("online_finetune", {"replay": kind}) for kind in ("balanced", "online", "symmetric", "uniform")]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")


class Guard(TorchDispatchMode):
    """Fails where an operation waits for the device or takes a CPU tensor with dimensions beside the device's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name.startswith(wait) for wait in WAITS), f"{name} waits for the device"
        leaves = tree_leaves([args, kwargs])
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        booleans = name.startswith("index") and any(x.dtype == torch.bool for x in tensors)
        assert not booleans, f"{name} by a boolean mask waits for the device"
        devices = {x.device.type for x in tensors if x.dim()} | {x.type for x in leaves if isinstance(x, torch.device)}
        assert devices <= {"meta"}, f"{name} takes what lies on {devices}"
        if name == "_fused_adam_":  # in place, and one kernel on CUDA; "meta" has none
            return None
        return function(*args, **(kwargs or {}))


@SCRIPTS
@pytest.mark.parametrize("phase, variant", PHASES, ids=str)
def test_a_step_never_waits_for_the_device(script, phase, variant, monkeypatch):
    guarded = []

    def guard(compiled):
        def decorate(update):
            def step(*flags):
                guarded.append(flags)
                with Guard():
                    return update(*flags)

            return step

        return decorate

    monkeypatch.setattr(script, "accelerate", guard)
    assert take_phase(script, phase, variant, "meta", steps=20)
    assert len(guarded) >= 20


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3),
    ],
)
def test_the_guard_sees_what_it_is_for(step):
    x = torch.ones(3, device="meta")
    with Guard():
        (x * 2 + 1).mean()
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
            step(x)


class SinglePrecisionTemperature(rlpd_opt.Temperature):
    """PyTorch 2.13 compiles no change of a CPU tensor that is a single number in float64."""

    def __init__(self):
        super().__init__()
        self.log_alpha.data = self.log_alpha.data.float()


@SCRIPTS
@pytest.mark.parametrize("phase, variant", [("offline", {}), ("online_pretrain", {}), ("online_finetune", {})], ids=str)
def test_a_compiled_step_is_the_plain_one(script, phase, variant, monkeypatch):
    """200 steps of either in float64, where rounding stays small enough to tell an error from it."""
    tolerance = 1e-6
    if script is rlpd_opt:
        monkeypatch.setattr(rlpd_opt, "Temperature", SinglePrecisionTemperature)
        variant, tolerance = variant | {"ensemble_size": 3, "utd": 5}, 1e-3
    torch.set_default_dtype(torch.float64)
    try:
        plain, compiled = (losses_of(take_phase(script, phase, variant, "cpu", compiled=c)) for c in (False, True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(plain) == len(compiled) >= 10 and plain[0] != plain[-1]
    for a, b in zip(plain, compiled, strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=1e-9)


@SCRIPTS
def test_long_runs_are_compiled_where_there_is_a_compiler(script, monkeypatch):
    def chosen(**arguments) -> bool:
        return script.resolve(script.Args(device="cpu", n_tau=100, **arguments)).compile

    assert shutil.which("g++")
    assert chosen() and not chosen(compile=False)
    args = {"online_steps": 1_000}
    assert chosen(offline_steps=100_000, **args) and not chosen(offline_steps=70_000, **args)
    assert chosen(offline_steps=70_000, compile=True, **args)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not chosen()
    with pytest.raises(SystemExit):
        chosen(compile=True)


@SCRIPTS
@pytest.mark.parametrize("faster", ["bf16", "ieee"])
def test_the_faster_library_multiplies_matrices_and_a_resumed_run_keeps_its_own(script, faster, monkeypatch):
    settings, now = torch.backends.mkldnn.matmul, [0.0]

    def clock() -> float:
        now[0] += 1.0 if settings.fp32_precision == faster else 1.1
        return now[0]

    monkeypatch.setattr(script.time, "perf_counter", clock)
    run = types.SimpleNamespace(device=torch.device("cpu"), products="")
    script.tune(run)
    assert run.products == settings.fp32_precision == faster
    run.products = other = "ieee" if faster == "bf16" else "bf16"
    script.tune(run)
    assert run.products == settings.fp32_precision == other


def test_which_library_it_is_stands_in_args_json_and_in_the_checkpoint(home, pendulum_file, tmp_path):
    flags = "--env-id InvertedPendulum-v5 --no-opt --offline-steps 20 --online-steps 20 --eval-episodes 1 --no-progress"
    arguments = (*flags.split(), "--dataset", pendulum_file, "--run-dir", tmp_path / "run")
    assert run_killed_at("td3_opt", "offline", 10, "SIGTERM", home, *arguments).returncode == 143
    path = tmp_path / "run" / "checkpoint.pt"
    names = {"bf16": "oneDNN", "ieee": "MKL"}
    saved = torch.load(path, weights_only=True)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["products"] == names[saved["products"]]
    saved["products"] = "ieee" if saved["products"] == "bf16" else "bf16"
    torch.save(saved, path)
    assert run_script("td3_opt", home, *arguments, "--resume").returncode == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["products"] == names[saved["products"]]

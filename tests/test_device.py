"""A gradient step is the same compiled or not, and never waits for the device, as a CUDA graph needs it."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import boorl
import cal_ql
import iql_opt
import oema
import pex
import pytest
import rlpd_opt
import spot_opt
import td3_opt
import torch
from conftest import ROOT, losses_of, take_phase
from runs import run_killed_at, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPT = (td3_opt, spot_opt, iql_opt, rlpd_opt)
# Without OPT's phase and arguments, and their variant.
SMALL = {"agents": 2, "batch_size": 32, "utd": 1, "policy_frequency": 1}  # every step is one of the policies too
OTHERS = {pex: {}, oema: {}, boorl: SMALL, cal_ql: {"lagrange": True, "max_backup": True, "gap_clip": 200.0}}
SCRIPTS = pytest.mark.parametrize("script", (*OPT, *OTHERS), ids=lambda s: s.__name__)
ALONE = {"kappa_init": 1.0, "kappa_end": 1.0}
PHASES = [("offline", {}), ("online_finetune", {"opt": False}), ("online_finetune", ALONE)]
PHASES += [("online_pretrain", {"q_on_init": kind}) for kind in ("meta", "online", "joint")]
PHASES += [("online_pretrain", {"meta_second_order": True}), ("online_pretrain", {"q_on": False})]
PHASES += [("online_finetune", {"replay": kind}) for kind in ("balanced", "online", "symmetric", "uniform")]
# IQL's and RLPD's offline step is their online one, SPOT's has the same parts; SPOT's online pre-training is TD3's.
COMPILED = [(td3_opt, "offline", {}), (boorl, "offline", SMALL)]
COMPILED += [(script, "online_pretrain", {}) for script in (td3_opt, iql_opt, rlpd_opt)]
LOW = {"init_online_fraction": 0.01}  # at priorities below 1: the largest one seen rises
COMPILED += [(td3_opt, "online_finetune", LOW), (rlpd_opt, "online_finetune", {})]
COMPILED += [(script, "online_finetune", variant) for script, variant in OTHERS.items()]
COMPILED += [(script, "online_finetune", ALONE | {"replay": "uniform"}) for script in (spot_opt, iql_opt)]
ON_CPU = torch.zeros(())
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
        copies = name in ("copy_", "_to_copy") and any(x.device.type != "meta" for x in tensors)
        assert not copies, f"{name} copies from the CPU"
        devices = {x.device.type for x in tensors if x.dim()} | {x.type for x in leaves if isinstance(x, torch.device)}
        assert devices <= {"meta"}, f"{name} takes what lies on {devices}"
        if name == "_fused_adam_":  # in place, and one kernel on CUDA; "meta" has none
            return None
        return function(*args, **(kwargs or {}))


def cases(phases: list[tuple]) -> pytest.MarkDecorator:
    """OPT's scripts in each of the phases and variants, the others in theirs."""
    found = [(script, *phase) for phase in phases for script in OPT]
    found += [
        (script, phase, variant) for script, variant in OTHERS.items() for phase in ("offline", "online_finetune")
    ]
    ids = ["-".join([case[0].__name__, *map(str, case[1:])]) for case in found]
    return pytest.mark.parametrize("script, phase, variant", found, ids=ids)


@cases(PHASES)
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
    steps = 20 if script is rlpd_opt else 10  # of one environment step
    assert take_phase(script, phase, variant, "meta", steps=steps)
    assert len(guarded) >= steps


@pytest.mark.parametrize(
    "step, word",
    [
        (lambda x: x.sum().item(), "waits"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: x.nonzero(), "waits"),
        (lambda x: x + torch.ones(3), "cpu"),
        (lambda x: torch.ones(3), "cpu"),
        (lambda x: x[0].copy_(ON_CPU), "copies"),
        (lambda x: x * ON_CPU.to("meta"), "copies"),
    ],
)
def test_the_guard_sees_what_it_is_for(step, word):
    x = torch.ones(3, device="meta")
    with Guard():
        (x * 2 + 1).mean()
        with pytest.raises(AssertionError, match=word):
            step(x)


def in_single_precision(network: type) -> type:
    """PyTorch 2.13 compiles no change of a CPU tensor that is a single number in float64."""

    class SinglePrecision(network):
        def __init__(self):
            super().__init__()
            self.float()

    return SinglePrecision


@pytest.mark.parametrize("script, phase, variant", COMPILED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_compiled_step_is_the_plain_one(script, phase, variant, monkeypatch):
    """200 steps of either in float64, where rounding stays small enough to tell an error from it."""
    tolerance = 1e-6
    for name in ("Temperature", "Multiplier"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, in_single_precision(getattr(script, name)))
            tolerance = 1e-3
    if (script, phase) != (td3_opt, "offline"):  # which alone compiles a step without the policy's too, of a full batch
        smaller = {"batch_size": 32, "policy_frequency": 1}
        variant = variant | {name: value for name, value in smaller.items() if hasattr(script.Args, name)}
    if script is rlpd_opt:
        variant = variant | {"ensemble_size": 3, "utd": 1}
    elif script is cal_ql:
        variant = variant | {"cql_actions": 3, "actor_layers": 1, "critic_layers": 1}
    torch.set_default_dtype(torch.float64)
    try:
        plain, compiled = (losses_of(take_phase(script, phase, variant, "cpu", compiled=c)) for c in (False, True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(plain) == len(compiled) >= 10 and plain[0] != plain[-1]
    for a, b in zip(plain, compiled, strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=1e-9)


CHANGES = {
    "a count": lambda state: setattr(state, "count", state.count + 1),
    "a number": lambda state: setattr(state, "scale", state.scale / 2),
    "a word": lambda state: setattr(state, "mode", "max"),
    "a longer list": lambda state: state.weights.append(2.0),
    "no longer None": lambda state: setattr(state, "limit", 0.1),
    "a tensor": lambda state: setattr(state, "tensor", state.tensor + 1),
    "a network": lambda state: setattr(state, "network", torch.nn.Linear(4, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_compiled_step_sees_what_python_changes(change):
    """Few of the conditions that PyTorch sets a compiled step are checked: enough for all that is changed here."""

    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(2)
        state = types.SimpleNamespace(count=0, scale=1.0, mode="sum", weights=[1.0], limit=None)
        state.tensor, state.network = torch.ones(4), torch.nn.Linear(4, 4)

        @td3_opt.accelerate(compiled)
        def update() -> dict:
            y = (state.network(state.tensor) * sum(state.weights)).square()
            y = y.sum() if state.mode == "sum" else y.amax()
            y = -y if state.count % 2 else y
            return {"loss": y * state.scale if state.limit is None else y.clamp(max=state.limit)}

        found = []
        for i in range(4):
            found.append(float(update()["loss"]))
            if i or change is CHANGES["a count"]:
                change(state)
        return found

    plain = losses(False)
    assert losses(True) == pytest.approx(plain, rel=1e-5) and len(set(plain)) > 1


@SCRIPTS
def test_long_runs_are_compiled_where_that_works(script, monkeypatch, capsys):
    first = {"n_tau": 100, "collect_steps": 100}
    first = {name: value for name, value in first.items() if hasattr(script.Args, name)}

    def chosen(**arguments) -> bool:
        return script.choose_compile(script.resolve(script.Args(device="cpu", **first, **arguments)))

    assert chosen() and not chosen(compile=False)
    args = {"online_steps": 1_000}
    assert chosen(offline_steps=100_000, **args) and not chosen(offline_steps=70_000, **args)
    assert chosen(offline_steps=70_000, compile=True, **args)
    assert not chosen(offline_steps=100_000, offline_from="runs/other", **args)

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler")

    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch, "compile", fail)
    assert not chosen()
    message = capsys.readouterr().err
    assert "torch.compile fails here (RuntimeError: no compiler)" in message and message.count("\n") == 1
    assert not chosen(compile=False) and not chosen(offline_steps=70_000, **args) and capsys.readouterr().err == ""
    with pytest.raises(script.BadInput, match=r"--compile fails here \(RuntimeError: no compiler\): mend that"):
        chosen(compile=True)


def test_a_broken_compiler_is_noticed(home):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'algorithms')!r}); import td3_opt; print(td3_opt.choose_compile("
    )
    code += "td3_opt.resolve(td3_opt.Args(device='cpu'))))"
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(home / "cache")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout == "False\n" and "torch.compile fails here" in result.stderr, result.stderr


FLAGS = "--env-id InvertedPendulum-v5 --offline-steps 30 --online-steps 60 --n-tau 25 --n-pretrain 15 --batch-size 16"
FLAGS = FLAGS.split() + "--eval-freq 0 --eval-episodes 1 --no-progress --checkpoint-freq 7".split()


def test_ctrl_c_while_the_compiler_runs(home, pendulum_file, tmp_path):
    """A terminal sends it to the compiler too."""
    arguments = [*FLAGS, "--dataset", pendulum_file, "--run-dir", tmp_path / "run", "--compile", "--offline-steps", 90]
    command = [sys.executable, *map(str, [ROOT / "algorithms" / "td3_opt.py", *arguments])]
    environment = os.environ | {"HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline, kernels = time.monotonic() + 200, []
    while not kernels and time.monotonic() < deadline:  # after the trial before the run
        time.sleep(0.02)
        if (tmp_path / "run" / "args.json").exists():
            group = subprocess.run(["ps", "-eo", "pgid,comm"], capture_output=True, text=True).stdout.splitlines()
            kernels = [line for line in group if line.split() == [str(process.pid), "cc1plus"]]
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=200)[1]
    assert kernels and process.returncode == 130 and "stopped, with a checkpoint" in errors, errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.fixture
def products():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before
    torch.set_flush_denormal(False)


@SCRIPTS
@pytest.mark.parametrize("faster", ["bf16", "ieee"])
def test_the_faster_library_multiplies_matrices_and_a_resumed_run_keeps_its_own(script, faster, products, monkeypatch):
    settings, now = products, [0.0]
    settings.fp32_precision = "bf16"
    a, b = torch.rand(2, 256, 256)
    if (a @ b - a.double() @ b.double()).abs().max() > 1e-3:
        faster = "ieee"  # AMX would round to bfloat16

    def clock() -> float:
        now[0] += 1.0 if settings.fp32_precision == faster else 1.5
        return now[0]

    monkeypatch.setattr(script.time, "perf_counter", clock)
    run = types.SimpleNamespace(device=torch.device("cpu"), products="")
    script.tune(run)
    assert run.products == settings.fp32_precision == faster
    run.products = other = "ieee" if faster == "bf16" else "bf16"
    script.tune(run)
    assert run.products == settings.fp32_precision == other
    run.products = "what another processor could"
    script.tune(run)
    assert run.products == settings.fp32_precision == faster


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

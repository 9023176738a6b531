"""What a user can mend ends with status 2 and one line that says what to write instead."""

import json
import pwd
import socket
import threading

import h5py
import numpy as np
import pytest
import td3_opt
import torch
from conftest import write_file
from td3_opt import Args

TINY = dict(env_id="InvertedPendulum-v5", offline_steps=0, online_steps=40, n_tau=20, n_pretrain=2, eval_episodes=1)
TINY |= dict(batch_size=8, progress=False)


@pytest.fixture
def refused(tmp_path, monkeypatch, home):
    """train(Args) must refuse, in one line that holds all these words."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)

    def refused(*words: str, **arguments) -> str:
        with pytest.raises(td3_opt.BadInput) as error:
            td3_opt.train(Args(**(TINY | {"run_dir": str(tmp_path / "run")} | arguments)))
        message = str(error.value)
        assert "\n" not in message, message
        for word in words:
            assert word in message, message
        return message

    return refused


def test_on_the_command_line_there_is_one_line_and_no_traceback(run):
    result = run("--env-id", "hoper-random-v2")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("td3_opt.py: unknown --env-id 'hoper-random-v2': did you mean hopper-random-v2")


def test_bad_input_is_a_value_error():
    assert issubclass(td3_opt.BadInput, ValueError)


def test_environment_ids(refused, pendulum_file):
    refused("halfcheetah-medium-v2", env_id="halfchetah-medium-v2")
    refused("InvertedPendulum-v5", "module:Env-v0", env_id="InvertedPendulm-v5")
    refused("--dataset", env_id="InvertedPendulum-v5")
    refused("Discrete", "flat Boxes", env_id="CartPole-v1", dataset=str(pendulum_file))
    refused("Dict", "flat Boxes", env_id="AntMaze_UMaze-v4", dataset=str(pendulum_file))


def test_an_environment_of_the_users_own_that_fails(refused, pendulum_file, tmp_path, monkeypatch):
    (tmp_path / "failing_env.py").write_text(
        "import gymnasium, numpy\n"
        "class Wide(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-numpy.arange(40.0), numpy.arange(40.0), dtype=numpy.float64)\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "gymnasium.register('Wide-v0', entry_point=lambda render_mode=None: Wide())\n"
        "class Whole(Wide):\n"
        "    observation_space = gymnasium.spaces.Box(-1, 1, (2,))\n"
        "    action_space = gymnasium.spaces.Box(0, 9, (2,), dtype=numpy.int64)\n"
        "class Endless(Whole):\n"
        "    action_space = gymnasium.spaces.Box(-3.4e38, 3.4e38, (2,))\n"
        "gymnasium.register('Whole-v0', entry_point=Whole)\n"
        "gymnasium.register('Endless-v0', entry_point=Endless)\n"
        "gymnasium.register('Failing-v0', entry_point=lambda size, render_mode=None: None)\n"
    )
    (tmp_path / "broken_env.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused("flat Boxes", env_id="failing_env:Wide-v0", dataset=str(pendulum_file))
    refused("of floats with finite bounds", env_id="failing_env:Whole-v0", dataset=str(pendulum_file))
    refused("of floats with finite bounds", env_id="failing_env:Endless-v0", dataset=str(pendulum_file))
    refused("TypeError", "size", "mend", env_id="failing_env:Failing-v0", dataset=str(pendulum_file))
    refused("ZeroDivisionError", env_id="broken_env:Broken-v0", dataset=str(pendulum_file))
    refused("cannot be made", env_id=".hidden:Hopper-v5", dataset=str(pendulum_file))


def test_data_that_is_nowhere(refused, monkeypatch):
    monkeypatch.setattr(td3_opt, "D4RL_URL", "http://127.0.0.1:9/")
    refused("hopper_medium-v2.hdf5", "--dataset", "with network", env_id="hopper-medium-v2")
    with socket.create_server(("127.0.0.1", 0)) as server:  # what answers is no web server

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"no HTTP\r\n")

        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        monkeypatch.setattr(td3_opt, "D4RL_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        refused("hopper_medium-v2.hdf5", "BadStatusLine", "--dataset", env_id="hopper-medium-v2")
        thread.join()
    refused("is no file, nor a Minari id", "--dataset", dataset="missing.hdf5")
    refused("~nobody-here/x.hdf5 is no file, nor a Minari id", dataset="~nobody-here/x.hdf5")
    refused("is no file, nor a Minari id", "--dataset", dataset="D4RL/hopper/medium")
    no_network = (_ for _ in ()).throw
    monkeypatch.setattr(td3_opt.minari, "download_dataset", lambda name: no_network(ConnectionError("no network")))
    refused("local Minari store", "minari list local", dataset="nobody/nothing-v0")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_hdf5_without_a_needed_key(refused, pendulum_columns, tmp_path, key):
    path = write_file(tmp_path / "d.hdf5", {k: v for k, v in pendulum_columns.items() if k != key})
    found, _, needed = refused(str(path), dataset=str(path)).partition("has only ")[2].partition(": write ")
    assert key in needed.split(", ") and set(found.split(", ")) == pendulum_columns.keys() - {key}


def test_damaged_hdf5(refused, pendulum_columns, tmp_path):
    columns = dict(pendulum_columns)

    def damaged(*words: str, **changed) -> None:
        refused(*words, dataset=str(write_file(tmp_path / "a.hdf5", columns | changed)))

    damaged("different lengths", "rewards 100", rewards=columns["rewards"][:100])
    for value in (np.nan, np.inf):
        bad = columns["observations"].copy()
        bad[7, 1] = value
        damaged("NaN or infinity in 'observations'", observations=bad)
    damaged("of type", "write numbers", rewards=np.full(5_000, b"x"))
    with h5py.File(write_file(tmp_path / "b.hdf5", columns), "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.SoftLink("/nowhere")
    refused("cannot be read as HDF5", "b.hdf5", dataset=str(tmp_path / "b.hdf5"))
    with h5py.File(tmp_path / "b.hdf5", "a") as file:
        del file["rewards"]
        file.create_group("rewards")
    refused("cannot be read as HDF5", "b.hdf5", dataset=str(tmp_path / "b.hdf5"))
    damaged("of type", "write numbers", rewards=np.bytes_(b"text"))
    del columns["next_observations"], columns["timeouts"]
    damaged("next_observations or timeouts")
    (tmp_path / "e.hdf5").write_text("not HDF5")
    refused("cannot be read as HDF5", "e.hdf5", dataset=str(tmp_path / "e.hdf5"))
    (tmp_path / "f.hdf5").write_bytes(write_file(tmp_path / "g.hdf5", pendulum_columns).read_bytes()[:5_000])
    refused("cannot be read as HDF5", "f.hdf5", dataset=str(tmp_path / "f.hdf5"))


def test_data_of_another_environment(refused, pendulum_columns, pendulum_file, tmp_path):
    refused("observations have shape (4,)", "(11,)", env_id="Hopper-v5", dataset=str(pendulum_file))
    two = write_file(tmp_path / "two.hdf5", pendulum_columns | {"actions": np.zeros((5_000, 2), np.float32)})
    refused("actions have shape (2,)", "(1,)", dataset=str(two))
    wide = {"next_observations": np.zeros((5_000, 5), np.float32)}
    following = write_file(tmp_path / "next.hdf5", pendulum_columns | wide)
    refused("next_observations have shape (5,)", dataset=str(following))
    refused("--batch-size 5001", "5000 transitions", dataset=str(pendulum_file), batch_size=5_001)


@pytest.mark.parametrize(
    "words, arguments",
    [
        (["--n-tau is 40", "less than --online-steps (40)"], dict(n_tau=40)),
        (["--n-tau is 41"], dict(n_tau=41)),
        (["--n-tau is 0"], dict(n_tau=0)),
        (["--n-tau is -1", "0 or more"], dict(n_tau=-1)),
        (["--kappa-init is 1.5", "from 0 to 1"], dict(kappa_init=1.5)),
        (["--kappa-end is -0.1", "from 0 to 1"], dict(kappa_end=-0.1)),
        (["--kappa-end is nan"], dict(kappa_end=float("nan"))),
        (["--kappa-decay is -5"], dict(kappa_decay=-5)),
        (["--offline-steps is -1", "0 or more"], dict(offline_steps=-1)),
        (["--online-steps is -1"], dict(online_steps=-1)),
        (["--n-pretrain is -2"], dict(n_pretrain=-2)),
        (["--seed is -1"], dict(seed=-1)),
        (["--seed is 18446744073709551616", "4294967295"], dict(seed=2**64)),
        (["--utd is 0", "1 or more"], dict(utd=0)),
        (["--batch-size is 0"], dict(batch_size=0)),
        (["--eval-episodes is 0"], dict(eval_episodes=0)),
        (["--learning-rate is nan"], dict(learning_rate=float("nan"))),
        (["--learning-rate is 0.0", "a positive number"], dict(learning_rate=0.0)),
        (["--gamma is 1.1", "from 0 to 1"], dict(gamma=1.1)),
        (["--init-online-fraction is 1"], dict(init_online_fraction=1.0)),
        (["--replay balanced", "--replay uniform"], dict(opt=False, replay="balanced")),
        (["--replay symmetric", "even --batch-size"], dict(replay="symmetric", batch_size=7)),
        (["--kappa-*", "--no-q-on"], dict(q_on=False, kappa_init=0.5)),
        (["--kappa-*", "--no-opt"], dict(opt=False, kappa_end=0.5)),
    ],
)
def test_arguments(refused, pendulum_file, words, arguments):
    refused(*words, dataset=str(pendulum_file), **arguments)


def test_cuda_without_cuda(refused, pendulum_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("--device cuda", "--device cpu", dataset=str(pendulum_file), device="cuda")


def test_a_user_without_a_home(refused, pendulum_file, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    refused("no home folder", "set HOME", dataset=str(pendulum_file))


def test_data_without_transitions(refused, tmp_path):
    empty = {key: column[:0] for key, column in pendulum_like().items()}
    refused("0 transitions", "empty", dataset=str(write_file(tmp_path / "empty.hdf5", empty)))


def test_run_folder_that_cannot_be_written(refused, pendulum_file, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot be written", "--run-dir", dataset=str(pendulum_file), run_dir=str(tmp_path / "file" / "run"))
    refused("cannot be written", "--run-dir", dataset=str(pendulum_file), run_dir="/proc/run")


def test_names_that_no_file_can_have(refused, pendulum_file):
    data, long = str(pendulum_file), 300 * "a"
    refused("is no file", "--dataset", dataset=long)
    refused("missing", "File name too long", "--offline-from", dataset=data, offline_from=long)
    refused("cannot be written", "File name too long", "--run-dir", dataset=data, run_dir=long)


def test_a_folder_that_holds_another_run(refused, pendulum_file, tmp_path, capsys):
    arguments = dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
    td3_opt.train(Args(**TINY, **arguments))
    capsys.readouterr()
    refused("holds a run already", "--resume", "--run-dir", **arguments)
    refused("--utd 5 (now 3)", "--gamma 0.99 (now 0.9)", resume=True, utd=3, gamma=0.9, **arguments)
    other = str(write_file(tmp_path / "other.hdf5", pendulum_like()))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"phase": "offline"}, tmp_path / "run" / "checkpoint.pt")  # of a run that goes on
    refused("other data", "--dataset", resume=True, run_dir=arguments["run_dir"], dataset=other)
    copied = tmp_path / "copy.hdf5"
    copied.write_bytes(pendulum_file.read_bytes())
    refused("another version", resume=True, run_dir=arguments["run_dir"], dataset=str(copied))  # past the data's check


def test_paths_may_begin_with_the_home_folder(pendulum_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    td3_opt.train(Args(**TINY, dataset=str(pendulum_file), run_dir="~/first"))
    td3_opt.train(Args(**TINY, dataset=str(pendulum_file), run_dir="~/second", offline_from="~/first"))
    assert (tmp_path / "first" / "offline.pt").exists() and (tmp_path / "second" / "model.pt").exists()


def test_a_run_is_one_folder_whatever_its_names():
    assert td3_opt.resolve(Args(env_id="mine/Task-v0", exp_name="a/b")).run_dir == "runs/mine-Task-v0__a-b__0"


def read_columns(path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


def pendulum_like() -> dict[str, np.ndarray]:
    shapes = dict(observations=(50, 4), rewards=(50,), next_observations=(50, 4), terminals=(50,))
    columns = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    return columns | {"actions": np.linspace(-1, 1, 50, dtype=np.float32)[:, None]}


def test_offline_from_another_run(refused, pendulum_file, tmp_path, capsys):
    first = dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "first"))
    td3_opt.train(Args(**TINY, **first))
    capsys.readouterr()
    second = dict(dataset=str(pendulum_file), offline_from=first["run_dir"])
    refused("--seed 0 (now 1)", seed=1, **second)
    refused("--offline-steps 0 (now 3)", **(second | dict(offline_steps=3)))
    refused("--normalize-states True (now False)", normalize_states=False, **second)
    td3_opt.train(Args(**TINY, **second, collect_noise=0.0, run_dir=str(tmp_path / "quiet")))  # no matter offline
    capsys.readouterr()
    refused("nothing is damaged or missing", **(second | dict(offline_from=str(tmp_path / "nothing"))))
    other = str(write_file(tmp_path / "other.hdf5", pendulum_like()))
    refused("other data", dataset=other, offline_from=first["run_dir"])
    for name in ("checkpoint.pt", "model.pt"):
        path = str(tmp_path / "first" / name)
        refused(f"{name} is no offline.pt", dataset=str(pendulum_file), offline_from=path)
    torch.save([1], tmp_path / "list.pt")
    refused("list.pt is no offline.pt", dataset=str(pendulum_file), offline_from=str(tmp_path / "list.pt"))
    columns = read_columns(pendulum_file)
    relabelled = write_file(tmp_path / "relabelled.hdf5", columns | {"rewards": columns["rewards"][::-1]})
    refused("other data", dataset=str(relabelled), offline_from=first["run_dir"])
    for damage in (b"", (tmp_path / "first" / "offline.pt").read_bytes()[:-1000]):
        (tmp_path / "damaged.pt").write_bytes(damage)
        refused("damaged.pt is damaged", dataset=str(pendulum_file), offline_from=str(tmp_path / "damaged.pt"))


@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_damaged_checkpoint(refused, pendulum_file, tmp_path, damage, capsys):
    arguments = dict(dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
    td3_opt.train(Args(**TINY, **arguments))
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    evals = (tmp_path / "run" / "evals.csv").read_bytes()
    refused("checkpoint.pt is damaged", "delete it", resume=True, **arguments)
    assert (tmp_path / "run" / "evals.csv").read_bytes() == evals


def test_files_of_another_version_of_the_script(refused, pendulum_file, tmp_path, capsys):
    folder, data = tmp_path / "old", str(pendulum_file)
    td3_opt.train(Args(**TINY, dataset=data, run_dir=str(folder)))
    capsys.readouterr()
    offline = torch.load(folder / "offline.pt", weights_only=True)
    alien = {name: value for name, value in offline["args"].items() if name != "policy_frequency"}
    torch.save(offline | {"args": alien}, folder / "alien.pt")  # another algorithm's
    refused("alien.pt is no offline.pt of this version of td3_opt", dataset=data, offline_from=str(folder / "alien.pt"))
    fewer = {name: value for name, value in offline.items() if name != "score"}  # a counter that it did not have yet
    torch.save(fewer, folder / "fewer.pt")
    refused("fewer.pt is no offline.pt of this version", dataset=data, offline_from=str(folder / "fewer.pt"))
    network = offline["parts"]["q_off"]
    offline["parts"]["q_off"] = {f"old.{name}": values for name, values in network.items()}
    torch.save(offline, folder / "offline.pt")
    refused("offline.pt is of another script", "--run-dir", dataset=data, offline_from=str(folder))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"phase": "offline", "parts": offline["parts"]}, folder / "checkpoint.pt")
    refused("checkpoint.pt is of another script", "--run-dir", dataset=data, run_dir=str(folder), resume=True)


def test_half_written_minari_dataset(refused, tmp_path, monkeypatch):
    """Half of a dataset: the metadata is there, the data file is cut off."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    folder = tmp_path / "store" / "half" / "written-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "main_data.hdf5").write_bytes(b"\x89HDF\r\n")
    (folder / "metadata.json").write_text(json.dumps({"total_episodes": 3}))
    refused("half/written-v0", "cannot be read", dataset="half/written-v0")

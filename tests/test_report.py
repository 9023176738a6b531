"""report.py on made-up runs whose means, intervals and IQM are computed here by other means."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import rows, run_script

sys.path.insert(0, str(ROOT))
import report

EVALS = "phase,env_steps,gradient_steps,normalized_score,return_mean,return_std,length_mean,success_rate,seconds\n"
SPEED = "phase,gradient_steps,env_steps,seconds,gradient_steps_per_second\n"


def write_run(runs: Path, variant: str, env_id: str, seed: int, scores: list[float], **changes) -> Path:
    """A run whose scores are evenly spread over its online steps, the first before any."""
    args = {"env_id": env_id, "exp_name": variant, "seed": seed, "opt": variant.endswith("opt") or "_opt_" in variant}
    args |= {"offline_steps": 1_000_000, "online_steps": 300_000, "n_tau": 25_000, "n_pretrain": 50_000}
    args |= {"q_on_init": "meta", "utd": report.UTD.get(variant.split("_")[0], 5), "gamma": 0.99}
    args |= {"device_name": "cpu", "threads": 1} | changes
    folder = runs / f"{env_id}__{variant}__{seed}__{args['offline_steps']}_{args['online_steps']}_{args['n_tau']}"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args))
    steps = np.linspace(0, args["online_steps"], len(scores)).astype(int)
    rows = [f"{'online_finetune' if step else 'offline'},{step},{step},{score},{10 * score},1,9,,1\n"
            for step, score in zip(steps, scores, strict=True)]  # fmt: skip
    (folder / "evals.csv").write_text(EVALS + "".join(rows))
    (folder / "speed.csv").write_text(
        SPEED + f"offline,1000,0,{100 + seed},{10 - seed}\nonline_finetune,5000,1000,800,6.25\n"
    )
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time; one test draws them."""
    for name in ("draw_curves", "draw_scores"):
        monkeypatch.setattr(report, name, lambda table, runs, path: path)


def make(runs: Path, out: Path) -> tuple[str, list[dict], list[dict]]:
    text = report.report(runs, out)
    return text, rows(out, "scores.csv"), rows(out, "totals.csv") if (out / "totals.csv").exists() else []


def left_out(text: str) -> list[str]:
    return text.split("## Left out, and to be looked at\n\n- ")[1].strip().split("\n- ")


@pytest.fixture
def runs(tmp_path) -> Path:
    """TD3: 3 seeds on two tasks; TD3+OPT: 3 and 4 seeds on them, and one on a third."""
    runs = tmp_path / "runs"
    for seed, score in enumerate((10.0, 20.0, 60.0)):
        write_run(runs, "td3", "hopper-random-v2", seed, [0, 5, score])
        write_run(runs, "td3", "walker2d-random-v2", seed, [0, 5, score / 2])
    for seed, score in enumerate((90.0, 100.0, 110.0)):
        write_run(runs, "td3_opt", "hopper-random-v2", seed, [0, 50, score])
    for seed, score in enumerate((80.0, 81.0, 82.0, 99.0)):
        write_run(runs, "td3_opt", "walker2d-random-v2", seed, [0, 50, score])
    write_run(runs, "td3_opt", "hopper-medium-v2", 0, [0, 50, 112.5])
    return runs


def test_columns_iqms_are_over_the_same_number_of_seeds(runs, no_figures, tmp_path):
    """One run that is missing must not leave its column with its luckier seeds, beside all of another column's."""
    shutil.rmtree(next(runs.glob("hopper-random-v2__td3_opt__2*")))
    totals = {row["variant"]: row for row in make(runs, tmp_path / "out")[2]}
    assert {(row["iqm_seeds"], row["iqm_low"], row["iqm_high"]) for row in totals.values()} == {("2", "", "")}
    # Seeds 0 and 1: 5 10 10 20 and 80 81 90 100, one cut at each end
    assert float(totals["td3"]["iqm"]) == pytest.approx(10) and float(totals["td3_opt"]["iqm"]) == pytest.approx(85.5)


def test_means_intervals_totals_and_iqm(runs, tmp_path):
    text, scores, totals = make(runs, tmp_path / "out")
    cells = {(row["variant"], row["task"]): row for row in scores}
    assert all(row["table"] == "table1" for row in scores) and len(scores) == 5
    hopper = cells["td3", "hopper-random-v2"]
    # mean 30; s = sqrt((20^2 + 10^2 + 30^2) / 2) = 26.4575; t(0.975, 2) = 4.302653; 4.302653 s / sqrt(3) = 65.7241
    assert float(hopper["mean"]) == pytest.approx(30) and float(hopper["interval"]) == pytest.approx(65.7241, abs=1e-4)
    assert hopper["seeds"] == "3" and hopper["paper"] == "86.0" and hopper["paper_interval"] == "13.3"
    walker = cells["td3_opt", "walker2d-random-v2"]
    # mean 85.5; s = sqrt((5.5^2 + 4.5^2 + 3.5^2 + 13.5^2) / 3) = 9.0370; t(0.975, 3) = 3.182446; / 2
    assert float(walker["mean"]) == pytest.approx(85.5) and float(walker["interval"]) == pytest.approx(
        14.3798, abs=1e-4
    )
    single = cells["td3_opt", "hopper-medium-v2"]
    assert single["seeds"] == "1" and single["interval"] == "" and float(single["mean"]) == 112.5

    entries = {row["variant"]: row for row in totals}
    # The third task is in one column only. Seeds: as many of each task as the task with the fewest has.
    assert {row["tasks"] for row in totals} == {"2"} and {row["iqm_seeds"] for row in totals} == {"3"}
    assert float(entries["td3"]["total"]) == pytest.approx(45) and float(entries["td3_opt"]["total"]) == 185.5
    assert float(entries["td3"]["paper_total"]) == pytest.approx(86.1)
    # Sorted 5 10 10 20 30 60, a quarter of 6 is 1.5: scipy's trim_mean cuts one at each end, (10 + 10 + 20 + 30) / 4
    assert float(entries["td3"]["iqm"]) == pytest.approx(17.5)
    # 80 81 82 90 100 110: (81 + 82 + 90 + 100) / 4
    assert float(entries["td3_opt"]["iqm"]) == pytest.approx(88.25)
    low, high = own_bootstrap(np.array([[10, 5], [20, 10], [60, 30]]))
    assert float(entries["td3"]["iqm_low"]) == pytest.approx(low, abs=2)
    assert float(entries["td3"]["iqm_high"]) == pytest.approx(high, abs=2)

    assert "| hopper-random-v2 | 1,000,000 + 300,000 | 30.0 ± 65.7 (3) | 86.0 ± 13.3 | 100.0 ± 24.8 (3) | 108.7" in text
    assert "| hopper-medium-v2 | 1,000,000 + 300,000 | – | 89.3 ± 14.5 | 112.5 (1) | 112.2 ± 0.6 |" in text
    assert "| **total of 2** | 1,000,000 + 300,000 | 45.0 | 86.1 | 185.5 | 196.7 |" in text
    assert left_out(text) == ["nothing"]
    for name in ("table1-curves.png", "table1-scores.png"):
        assert name in text and (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def own_bootstrap(scores: np.ndarray, repetitions: int = 4000) -> tuple[float, float]:
    """Resample seeds within each task; the mean of what is left of the sorted scores without a quarter at each end."""
    generator, values = np.random.default_rng(1), []
    for _ in range(repetitions):
        picked = np.stack([generator.choice(column, len(column)) for column in scores.T])
        cut = picked.size // 4
        values.append(np.sort(picked.ravel())[cut : picked.size - cut].mean())
    return tuple(np.percentile(values, (2.5, 97.5)))


def test_what_cannot_be_used_is_named_and_counts_nowhere(runs, no_figures, tmp_path):
    before = make(runs, tmp_path / "before")[1:]
    env = "halfcheetah-medium-v2"
    unfinished = write_run(runs, "td3", env, 0, [1, 2, 3], online_steps=300_000)
    (unfinished / "evals.csv").write_text(EVALS + "offline,0,0,1,10,1,9,,1\nonline_finetune,150000,7,2,20,1,9,,1\n")
    half = write_run(runs, "td3", env, 1, [1, 2, 3])
    (half / "evals.csv").write_text((half / "evals.csv").read_text()[:-12])
    uncut = write_run(runs, "td3", env, 2, [1, 2, 3])  # as many fields as a row, but the last one may be cut
    (uncut / "evals.csv").write_text((uncut / "evals.csv").read_text()[:-1])
    not_a_number = write_run(runs, "td3", env, 3, [1, 2, float("nan")])
    (runs / "never_started").mkdir()
    (runs / "never_started" / "benchmark.log").write_text("no\n")
    (write_run(runs, "td3", env, 4, [1, 2, 3]) / "args.json").write_text('{"env_id": "hop')
    (write_run(runs, "td3", env, 5, [1, 2, 3]) / "args.json").write_text('{"env_id": "hopper-random-v2"}')
    no_scores = write_run(runs, "td3", env, 6, [1, 2, 3])
    (no_scores / "evals.csv").unlink()
    (write_run(runs, "td3", env, 7, [1, 2, 3]) / "evals.csv").write_text("phase,env_st")
    offline_only = write_run(runs, "td3", env, 8, [1, 2, 3], online_steps=0)
    (offline_only / "evals.csv").write_text(EVALS + "offline,0,0,1,10,1,9,,1\noffline,0,1000000,2,20,1,9,,1\n")
    twice = write_run(runs, "td3", "hopper-random-v2", 0, [1, 2, 3], n_tau=7)
    text, *after = make(runs, tmp_path / "after")
    assert after == list(before)
    notes = left_out(text)
    expected = {
        f"{unfinished}: no finished online phase (online_finetune, environment step 150000 of 300000)": 1,
        f"{half / 'evals.csv'}, line 4: half-written or not finite": 1,
        f"{half}: no finished online phase": 1,
        f"{offline_only}: no finished online phase (offline, environment step 0 of 0)": 1,
        f"{uncut / 'evals.csv'}, line 4: half-written or not finite": 1,
        f"{uncut}: no finished online phase": 1,
        f"{not_a_number / 'evals.csv'}, line 4: half-written or not finite": 1,
        f"{not_a_number}: no finished online phase": 1,
        f"No such file or directory: '{runs / 'never_started' / 'args.json'}'": 1,
        "__4__1000000_300000_25000: args.json is damaged": 1,
        "args.json has no device_name": 1,
        f"No such file or directory: '{no_scores / 'evals.csv'}'": 1,
        "no finished online phase (start, environment step 0 of 300000)": 1,
        "evals.csv: no column phase, env_steps, normalized_score, return_mean, left out": 1,
        f"{twice}: the same variant, task, seed and steps as": 1,
    }
    for words, count in expected.items():
        assert sum(words in note for note in notes) == count, (words, notes)
    assert len(notes) == sum(expected.values())


def test_a_nan_in_the_middle_costs_one_point_of_the_curve(no_figures, tmp_path):
    folder = write_run(tmp_path / "runs", "td3", "hopper-random-v2", 0, [1, float("nan"), 3])
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    assert float(scores[0]["mean"]) == 3
    assert left_out(text) == [f"{folder / 'evals.csv'}, line 3: half-written or not finite, left out"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name."""
    figures = {}
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda figure, path, **_: figures.update({path.name: figure}))
    yield figures
    monkeypatch.undo()
    report.plt.close("all")


def test_curves_show_each_seed_and_span_the_seeds_alone_and_their_titles_fit(figures, tmp_path):
    """Two seeds' interval is 12.7 standard errors to each side, which would be all of the panel."""
    steps = {"offline_steps": 123_456, "n_tau": 12_345, "n_pretrain": 123_456, "utd": 7}
    for seed, scores in enumerate(([0, 10, 20], [0, 30, 100])):
        write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", seed, scores, **steps)
    make(tmp_path / "runs", tmp_path / "out")
    axis = figures["table1-curves.png"].axes[0]
    lines = [list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 3]
    assert lines == [[0, 10, 20], [0, 30, 100], [0, 20, 60]]  # and their mean
    assert axis.get_ylim() == (-5, 105)
    assert np.ptp(axis.collections[0].get_paths()[0].vertices[:, 1]) == 60  # the mean's range: no band
    for name in ("table1-curves.png", "table1-scores.png"):
        figures[name].draw_without_rendering()
        title, panel = (of.get_window_extent() for of in (figures[name]._suptitle, figures[name].axes[0]))
        words = " ".join(figures[name]._suptitle.get_text().split())
        assert "N_pretrain 123,456, UTD 7; mean; " in words and words.endswith(": each seed")  # no interval
        assert 0 < title.x0 < title.x1 < figures[name].bbox.x1 and title.y0 > panel.y1


def test_curves_of_the_papers_length_end_beside_its_score(figures, tmp_path):
    """A hollow marker each at the last step, within the panel; none beside shorter runs."""
    for variant in ("td3", "td3_opt"):
        write_run(tmp_path / "runs", variant, "hopper-random-v2", 0, [0, 10, 20])
        for offline in (0, 100_000):
            write_run(tmp_path / "runs", variant, "hopper-random-v2", 0, [0, 10, 20], offline_steps=offline)
    shorter = {"n_tau": 6_250, "n_pretrain": 12_500, "online_steps": 281_250}  # as many after N_tau
    write_run(tmp_path / "runs", "td3_opt_n_tau_6250", "hopper-random-v2", 0, [0, 10, 20], **shorter)
    make(tmp_path / "runs", tmp_path / "out")
    (ablation,) = (figure for name, figure in figures.items() if re.match("ablation-n-tau.*curves.png", name))
    ends = [line.get_xdata()[0] for line in ablation.axes[0].lines if line.get_fillstyle() == "none"]
    assert sorted(ends) == [281.25, 300]
    full, *others = (figures[f"table1-{offline}+300000-curves.png"] for offline in (1_000_000, 100_000, 0))
    hollow = [line for line in full.axes[0].lines if line.get_fillstyle() == "none"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[300, 86.0]], [[300, 108.7]]]  # Table 1
    assert full.axes[0].get_ylim() == pytest.approx((-0.05 * 108.7, 1.05 * 108.7))
    assert "hollow: the paper's final score" in [text.get_text() for text in full.legends[0].texts]
    for other in others:
        assert all(line.get_fillstyle() == "full" for line in other.axes[0].lines)
        assert other.axes[0].get_ylim() == (-1, 21) and len(other.legends[0].texts) == 3


def test_panels_of_other_numbers_of_seeds_name_theirs(runs, figures, tmp_path):
    make(runs, tmp_path / "out")
    panels = [axis.get_title() for axis in figures["table1-curves.png"].axes if axis.get_title()]
    assert panels == ["hopper-random-v2, 3 seeds", "walker2d-random-v2, 4 seeds", "hopper-medium-v2, 1 seed"]


def test_an_ablations_table_has_the_tasks_that_were_ablated(runs, no_figures, tmp_path):
    for variant, init in (("td3_opt_init_random", {"q_on_init": "random"}), ("td3_opt_n_tau_6250", {"n_tau": 6250})):
        own = {"n_pretrain": 12_500, "online_steps": 281_250} if "n_tau" in init else {}
        write_run(runs, variant, "walker2d-random-v2", 0, [0, 50, 70], **init, **own)
    scores = make(runs, tmp_path / "out")[1]
    cells = {(row["variant"], row["task"]) for row in scores if row["table"].startswith("ablation")}
    assert cells == {(v, "walker2d-random-v2") for v in ("td3_opt", "td3_opt_init_random", "td3_opt_n_tau_6250")}


def test_a_band_from_five_seeds_on(figures, tmp_path):
    for seed in range(5):
        write_run(tmp_path / "runs", "td3", "hopper-random-v2", seed, [0, 0, 10 * seed])
    make(tmp_path / "runs", tmp_path / "out")
    band = figures["table1-curves.png"].axes[0].collections[0].get_paths()[0].vertices
    # 0, 10, 20, 30, 40: mean 20, standard error 15.811 / sqrt(5), and t of 4 degrees of freedom 2.7764
    assert band[:, 1].max() == pytest.approx(39.632, abs=1e-3) and band[:, 1].min() == pytest.approx(0)


def test_the_figure_of_scores_has_each_seed_and_bars_from_five_seeds_on(figures, tmp_path):
    for seed, score in enumerate((10, 20, 60, 40, 70)):
        write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", seed, [0, 0, score])
        if seed < 3:
            write_run(tmp_path / "runs", "td3", "hopper-random-v2", seed, [0, 0, score])
    make(tmp_path / "runs", tmp_path / "out")
    axis = figures["table1-scores.png"].axes[0]
    lines = [list(line.get_xdata()) for line in axis.lines if line.get_marker() not in "|"]
    assert lines == [[10, 20, 60], [30], [86.0], [10, 20, 60, 40, 70], [40], [108.7]]  # seeds, mean, the paper's
    # mean 40; s = sqrt((30^2 + 20^2 + 20^2 + 0 + 30^2) / 4) = 25.495, / sqrt(5) = 11.402, times t(0.975, 4) = 2.776445
    three, five = ([end[0] for end in bars.get_segments()[0]] for bars in axis.collections)
    assert not np.isfinite(three).any() and five == pytest.approx([40 - 31.656, 40 + 31.656], abs=1e-3)
    title = figures["table1-scores.png"]._suptitle.get_text()
    assert title.endswith("1,000,000 + 300,000; mean; dots: each seed; bars: 95% interval")


def test_a_method_has_the_same_style_in_all_figures(figures, tmp_path):
    """TD3+OPT beside its backbone, beside its ablation, and with another backbone's OPT."""
    for variant in ("pex", "td3", "td3_opt", "td3_opt_init_random", "iql", "iql_opt"):
        init = {"q_on_init": "random"} if "random" in variant else {}
        write_run(tmp_path / "runs", variant, "hopper-random-v2", 0, [0, 1, 2], **init)
    make(tmp_path / "runs", tmp_path / "out")

    def styles(name: str) -> dict[str, tuple]:
        axis, legend = figures[name].axes[0], figures[name].legends[0]
        names = [text.get_text().split(" (")[0] for text in legend.texts]
        names = [name for name in names if not name.startswith(("hollow", "N_tau"))]
        lines = [line for line in axis.lines if line.get_linewidth() == 1.3]
        return {n: (line.get_color(), line.get_marker()) for n, line in zip(names, lines, strict=True)}

    tables = [styles(f"{name}-curves.png") for name in ("table1", "table12-mujoco", "ablation-init-mujoco")]
    assert [sorted(table) for table in tables] == [
        ["PEX", "TD3", "TD3+OPT"], ["IQL", "IQL+OPT", "TD3", "TD3+OPT"], ["TD3+OPT", "random init"]
    ]  # fmt: skip
    for method in ("TD3", "TD3+OPT"):
        assert len({table[method] for table in tables if method in table}) == 1
    assert all(len(set(table.values())) == len(table) for table in tables)


def test_any_number_of_own_variants_are_told_apart(figures, tmp_path):
    for number in range(14):
        write_run(tmp_path / "runs", f"mine_{number}", "hopper-random-v2", 0, [0, 1, 2])
    make(tmp_path / "runs", tmp_path / "out")
    for kind in ("curves", "scores"):
        (legend,) = figures[f"others-{kind}.png"].legends
        assert len({(line.get_color(), line.get_marker()) for line in legend.get_lines()}) == len(legend.texts) == 14


def test_a_stand_in_has_rows_of_its_own_and_no_number_of_the_paper_beside_it(figures, tmp_path):
    runs, env = tmp_path / "runs", "hopper-medium-v2"
    write_run(runs, "td3", env, 0, [0, 10])
    write_run(runs, "td3", env, 1, [0, 30], data={"source": "stand-in: regenerated", "size": 9})
    write_run(runs, "td3_opt", env, 1, [0, 70], data={"source": "stand-in", "size": 9})
    text, scores, _ = make(runs, tmp_path / "out")
    assert f"| {env} | 1,000,000 + 300,000 | 10.0 (1) | 89.3 ± 14.5 | – | 112.2 ± 0.6 |" in text
    assert f"| {env} (stand-in) | 1,000,000 + 300,000 | 30.0 (1) | – | 70.0 (1) | – |" in text
    opt = next(row for row in scores if row["variant"] == "td3_opt")
    assert (opt["ahead"], opt["paper"], opt["paper_ahead"]) == ("40.0", "", "")
    panels = [axis.get_title() for axis in figures["table1-curves.png"].axes]
    assert panels == [env, f"{env} (stand-in)"]
    legend = [label.get_text() for label in figures["table1-scores.png"].legends[0].texts]
    assert legend == ["TD3 (1 seed)", "TD3, paper, full length", "TD3+OPT (1 seed)", "TD3+OPT, paper, full length"]
    hollow = [line.get_xdata() for line in figures["table1-scores.png"].axes[0].lines if line.get_markersize() == 7]
    assert [list(np.nan_to_num(scores)) for scores in hollow] == [[89.3, 0], [112.2, 0]]


def test_a_curve_is_flat_while_nothing_learns(figures, tmp_path):
    """OEMA's and BOORL's first online evaluation may come long after the steps before their first update."""
    write_run(tmp_path / "runs", "oema", "hopper-random-v2", 0, [5, 7, 9], online_steps=200, collect_steps=25)
    write_run(tmp_path / "runs", "oema", "walker2d-random-v2", 0, [5, 7, 9], online_steps=200, collect_steps=100)
    make(tmp_path / "runs", tmp_path / "out")
    curves = [axis.lines[0].get_xydata().tolist() for axis in figures["table1-curves.png"].axes]
    assert curves == [[[0, 5], [0.025, 5], [0.1, 7], [0.2, 9]], [[0, 5], [0.1, 7], [0.2, 9]]]


def test_other_steps_are_other_rows(runs, no_figures, tmp_path):
    for seed in (0, 1):
        write_run(runs, "td3", "hopper-random-v2", seed, [0, 1, 2], offline_steps=500, online_steps=400, n_tau=9)
        write_run(runs, "td3_opt", "hopper-random-v2", seed, [0, 1, 4], offline_steps=500, online_steps=400, n_tau=9)
        write_run(runs, "td3_opt", "hopper-random-v2", seed, [0, 1, 8], offline_steps=500, online_steps=400, n_tau=30)
    write_run(runs, "td3_opt", "hopper-random-v2", 0, [0, 1, 16], utd=1, offline_steps=1)
    text, scores, _ = make(runs, tmp_path / "out")
    assert "| hopper-random-v2 | 1,000,000 + 300,000 | 30.0 ± 65.7 (3) | 86.0 ± 13.3 | 100.0 ± 24.8 (3) |" in text
    assert "| hopper-random-v2 | 500 + 400, N_tau 9 | 2.0 ± 0.0 (2) | 86.0 ± 13.3 | 4.0 ± 0.0 (2) |" in text
    assert "| hopper-random-v2 | 500 + 400, N_tau 30 | 2.0 ± 0.0 (2) | 86.0 ± 13.3 | 8.0 ± 0.0 (2) |" in text
    assert "| hopper-random-v2 | 1 + 300,000, UTD 1 | – | 86.0 ± 13.3 | 16.0 (1) |" in text
    assert "(table1-500+400-N_tau-9-curves.png)" in text
    assert left_out(text) == ["nothing"]


def test_stand_ins_count_in_no_total_of_the_papers_tasks(no_figures, tmp_path):
    runs, stand_in = tmp_path / "runs", {"source": "stand-in", "size": 9}
    for score, (env, data) in enumerate(
        {"hopper-random-v2": {}, "walker2d-random-v2": {}, "hopper-medium-v2": stand_in}.items()
    ):
        write_run(runs, "td3", env, 0, [0, 10**score], data=data)
    text, _, totals = make(runs, tmp_path / "out")
    assert "| **total of 2** | 1,000,000 + 300,000 | 11.0 | 86.1 |" in text
    assert {(row["total"], row["iqm"]) for row in totals} == {("11.0", "5.5")}


def test_a_name_like_the_ablations_keeps_its_own_steps(no_figures, tmp_path):
    """Only Table 10's own names count their steps from N_tau on, and say so where their task is not the paper's."""
    steps = {"online_steps": 100_000, "n_pretrain": 2_000}
    write_run(tmp_path / "runs", "td3_opt_n_tau_1000", "hopper-random-v2", 0, [0, 1], n_tau=1_000, **steps)
    steps = {"online_steps": 281_250, "n_pretrain": 12_500}
    write_run(tmp_path / "runs", "td3_opt_n_tau_6250", "hopper-expert-v2", 0, [0, 2], n_tau=6_250, **steps)
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert "| hopper-random-v2 | 1,000,000 + 100,000, N_tau 1,000, N_pretrain 2,000 |" in text
    assert "| hopper-expert-v2 | 1,000,000 + 275,000 + N_tau |" in text


def test_one_cell_with_other_arguments_is_named(runs, no_figures, tmp_path):
    write_run(runs, "td3", "hopper-random-v2", 3, [0, 1, 2], gamma=0.5)
    text, *_ = make(runs, tmp_path / "out")
    assert len(left_out(text)) == 1 and "table1: one cell mixes --gamma 0.5, 0.99" in left_out(text)[0]


def test_data_is_the_same_wherever_it_lay(no_figures, tmp_path):
    for seed, (place, crc) in enumerate((("/home/a/x.hdf5", 7), ("/root/x.hdf5", 7))):
        data = {"source": f"{place} (regenerated)", "size": 9, "crc32": crc}
        write_run(tmp_path / "runs", "td3", "hopper-random-v2", seed, [0, 1], data=data, dataset=place)
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert left_out(text) == ["nothing"]
    write_run(tmp_path / "runs", "td3", "hopper-random-v2", 2, [0, 1], data=data | {"crc32": 8})
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert len(left_out(text)) == 1 and "table1: one cell mixes --data 7, 8" in left_out(text)[0]


def test_variants_of_one_s_own_with_and_without_a_vae_share_a_row(no_figures, tmp_path):
    """One row of the three, in which each counts once."""
    write_run(tmp_path / "runs", "spot_mine", "hopper-random-v2", 0, [0, 1], vae_steps=100_000, utd=1)
    write_run(tmp_path / "runs", "td3_mine", "hopper-random-v2", 0, [0, 2], utd=5)
    write_run(tmp_path / "runs", "td3_opt_mine", "hopper-random-v2", 0, [0, 5], utd=5)
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    assert [(row["variant"], row["mean"], row["seeds"]) for row in scores] == [
        ("spot_mine", "1.0", "1"),
        ("td3_mine", "2.0", "1"),
        ("td3_opt_mine", "5.0", "1"),
    ]
    assert text.count("| hopper-random-v2 |") == 1


def test_a_seed_counts_once_in_a_row(no_figures, tmp_path):
    """Two runs of one name and seed, one of which has no N_pretrain: the row would have both."""
    one = write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", 0, [0, 10])
    one.rename(one.with_name("a"))
    write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", 0, [0, 50], q_on_init="random")
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    assert [(row["mean"], row["seeds"]) for row in scores] == [("10.0", "1")]
    assert any("the same variant, task, seed and steps as" in note for note in left_out(text))


def test_a_script_of_one_s_own_needs_none_of_opts_arguments(no_figures, tmp_path):
    folder = write_run(tmp_path / "runs", "mine", "hopper-random-v2", 0, [0, 10], opt=True)
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({k: v for k, v in args.items() if k not in ("q_on_init", "n_tau")}))
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    assert scores[0]["mean"] == "10.0" and left_out(text) == ["nothing"]


def test_an_earlier_report_s_figures_go(runs, no_figures, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("table1-curves.png", "table1-9+9-scores.pdf", "my-curves.png", "table1-2024-scores.pdf"):
        (tmp_path / "out" / name).touch()
    make(runs, tmp_path / "out")
    figures = {path.name for path in (tmp_path / "out").iterdir()} - {"report.md"}
    assert figures == {"my-curves.png", "table1-2024-scores.pdf", "scores.csv", "totals.csv", "speed.csv"}


def test_what_cannot_be_written_is_one_line(tmp_path):
    """As on a full disk: here a folder stands where report.md is to be."""
    write_run(tmp_path / "runs", "td3", "hopper-random-v2", 0, [0, 1])
    (tmp_path / "out" / "report.md").mkdir(parents=True)
    command = [sys.executable, ROOT / "report.py", "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and re.fullmatch(r"report\.py: .*report\.md.*\n", result.stderr), result.stderr


def test_one_row_with_other_arguments_is_named(no_figures, tmp_path):
    write_run(tmp_path / "runs", "td3", "hopper-random-v2", 0, [0, 1], gamma=0.5, replay="uniform")
    write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", 0, [0, 1], replay="balanced", kappa_init=1)
    write_run(tmp_path / "runs", "iql", "hopper-random-v2", 0, [0, 1], gamma=0.9)  # another backbone has its own
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    table1, table12 = left_out(text)
    assert "table1: one row mixes --gamma 0.5, 0.99: hopper" in table1 and "__td3_opt__" in table1
    assert "table12-mujoco: one row mixes --gamma 0.5, 0.99: hopper" in table12


def test_the_mean_of_the_last_five_online_evaluations_stands_below(no_figures, tmp_path):
    for seed, last in ((0, 10.0), (1, 30.0)):
        write_run(tmp_path / "runs", "td3", "hopper-random-v2", seed, [900, 100, 1, 2, 3, 4, last])
        write_run(tmp_path / "runs", "td3_opt", "hopper-random-v2", seed, [900, 100, last])  # only two online
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    # (1 + 2 + 3 + 4 + 10) / 5 = 4 and (1 + 2 + 3 + 4 + 30) / 5 = 8: mean 6, t(0.975, 1) = 12.7062 times 2 = 25.4124;
    # (100 + 10) / 2 = 55 and (100 + 30) / 2 = 65: mean 60, 12.7062 times 5 = 63.531
    assert (
        "| mean of its last five evaluations | 1,000,000 + 300,000 | 6.0 ± 25.4 (2) |  | 60.0 ± 63.5 (2) |  |" in text
    )
    assert float(scores[0]["last_five"]) == pytest.approx(6) and float(scores[1]["last_five"]) == pytest.approx(60)
    assert float(scores[0]["last_five_interval"]) == pytest.approx(25.4124, abs=1e-3)


def test_differences_are_between_the_same_seeds(no_figures, tmp_path):
    """OPT's from its backbone's, an ablation's from the paper's own variant's; a seed that one of them lacks is out."""
    runs, env = tmp_path / "runs", "hopper-random-v2"
    for variant, scores in {
        "td3": {0: 10, 1: 20, 2: 60},
        "td3_opt": {2: 61, 1: 23, 5: 900},  # minus TD3: 3 and 1
        "td3_opt_init_random": {1: 33, 2: 77},  # minus TD3+OPT: 10 and 16
        "rlpd": {0: 50},
        "rlpd_opt": {1: 60},  # no seed in common
    }.items():
        for seed, score in scores.items():
            init = {"q_on_init": "random"} if "random" in variant else {}
            write_run(runs, variant, env, seed, [0, 0, 0, 0, 0, score], **init)
    text, scores, _ = make(runs, tmp_path / "out")
    cells = {(row["table"], row["variant"]): row for row in scores}
    # mean 2, t(0.975, 1) = 12.7062 times s / sqrt(2) = 1; the last five's means are a fifth of the scores
    opt, steps = cells["table1", "td3_opt"], "1,000,000 + 300,000"
    assert (opt["minus"], opt["pairs"], float(opt["ahead"])) == ("td3", "2", 2) and opt["seeds"] == "3"
    assert float(opt["ahead_interval"]) == pytest.approx(12.7062, abs=1e-4)
    assert float(opt["last_five_ahead"]) == pytest.approx(2 / 5)
    assert float(opt["last_five_ahead_interval"]) == pytest.approx(12.7062 / 5, abs=1e-4)
    assert float(opt["paper_ahead"]) == pytest.approx(108.7 - 86.0)
    assert f"| minus TD3, seed by seed | {steps} | – |  | 2.0 ± 12.7 (2) | 22.7 |" in text
    assert f"| … last five evaluations minus TD3, seed by seed | {steps} | – |  | 0.40 ± 2.54 (2) |  |" in text
    random = cells["ablation-init-mujoco", "td3_opt_init_random"]
    assert (random["minus"], float(random["ahead"])) == ("td3_opt", 13)
    assert float(random["ahead_interval"]) == pytest.approx(12.7062 * 3, abs=1e-3)
    assert f"| minus TD3+OPT, seed by seed | {steps} | – |  | 13.0 ± 38.1 (2) | -3.7 |" in text
    assert (cells["table13", "rlpd_opt"]["pairs"], cells["table13", "rlpd_opt"]["ahead"]) == ("0", "")
    assert {row["minus"] for row in scores if row["variant"] in ("td3", "rlpd")} == {""}


def test_a_name_of_ones_own_has_the_steps_of_its_script():
    """UTD 1 is IQL's, and an offline phase of 5,000 steps has a VAE of as many: nothing in the label."""
    args = dict(exp_name="td3_like", script="iql_opt.py", opt=False, q_on_init="meta", online_steps=300_000)
    args |= dict(n_tau=25_000, n_pretrain=50_000, offline_steps=5_000, vae_steps=5_000, utd=1)
    assert report.Steps.of(args).label("300,000") == "5,000 + 300,000"
    assert report.Steps.of(args | dict(script="td3_opt.py")).label("300,000") == "5,000 + 300,000, UTD 1"
    assert report.Steps.of(args | dict(vae_steps=100_000)).label("300,000") == "5,000 + 300,000, VAE 100,000"


def test_tasks_with_other_vae_steps_are_other_rows_and_other_commits_are_named(no_figures, tmp_path):
    runs = tmp_path / "runs"
    write_run(runs, "spot", "antmaze-umaze-v2", 0, [0, 1], vae_steps=100_000, git_commit="a", eval_freq=5)
    write_run(
        runs,
        "spot",
        "antmaze-umaze-v2",
        1,
        [0, 1],
        vae_steps=100_000,
        script_blob="b",
        eval_freq=7,
        script="spot_opt.py",
    )
    write_run(runs, "spot", "antmaze-umaze-diverse-v2", 0, [0, 1], vae_steps=10)
    text, *_ = make(runs, tmp_path / "out")
    assert "| antmaze-umaze-v2 | 1,000,000 + 300,000 |" in text
    assert "| antmaze-umaze-diverse-v2 | 1,000,000 + 300,000, VAE 10 |" in text
    notes = [note for note in left_out(text) if note.startswith("table2")]
    assert [note.split(":")[1] for note in notes] == [
        " one cell mixes --eval_freq 5, 7",
        ' one cell mixes --git_commit "a", null',
        ' one cell mixes --script_blob "b", null',
    ]


@pytest.mark.parametrize(
    "variant, changes",
    [("td3_opt", {"q_on": False}), ("td3_opt", {"q_on_init": "joint"}), ("td3_opt_no_q_on", {"q_on": True}),
     ("td3_opt_init_online", {"q_on_init": "meta"})],
)  # fmt: skip
def test_a_run_that_is_not_what_its_name_says_is_named(no_figures, tmp_path, variant, changes):
    changes = {"q_on": "no_q_on" not in variant} | changes
    write_run(tmp_path / "runs", variant, "hopper-random-v2", 0, [0, 1], **changes)
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert f"named {variant}, but its args.json says" in text


def test_a_half_written_header(no_figures, tmp_path):
    whole = write_run(tmp_path / "runs", "td3", "hopper-random-v2", 0, [0, 1])
    torn = write_run(tmp_path / "runs", "td3", "hopper-random-v2", 1, [0, 1])
    (torn / "evals.csv").write_text("phase,env_steps,gradi\nonline_finetune,300000,5\n")
    (whole / "speed.csv").write_text("phase,gradient_steps,env_st\noffline,1000,0\n")
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    assert scores[0]["seeds"] == "1" and "evals.csv: no column normalized_score, return_mean, left out" in text
    assert "speed.csv: no column seconds, gradient_steps_per_second, left out" in text


def test_n_tau_and_rlpd_share_rows_although_their_steps_differ(no_figures, tmp_path):
    runs, env = tmp_path / "runs", "hopper-random-v2"
    for n_tau, score in ((6250, 1), (12500, 2), (25000, 3), (50000, 4), (100000, 5)):
        variant = "td3_opt" if n_tau == 25000 else f"td3_opt_n_tau_{n_tau}"
        write_run(runs, variant, env, 0, [0, score], n_tau=n_tau, n_pretrain=2 * n_tau, online_steps=275_000 + n_tau)
    write_run(runs, "rlpd_vanilla", env, 0, [0, 6], offline_steps=0, opt=False)
    write_run(runs, "rlpd", env, 0, [0, 7])
    write_run(runs, "rlpd_opt", env, 0, [0, 8])
    text, *_ = make(runs, tmp_path / "out")
    assert text.count("| hopper-random-v2 | 1,000,000 + 300,000 |") == 2  # table 1, because of td3_opt, and 13
    assert text.count("| hopper-random-v2 | 1,000,000 + 275,000 + N_tau |") == 1
    online = {row["variant"]: row["online"] for row in rows(tmp_path / "out", "scores.csv")}
    assert (online["td3_opt"], online["td3_opt_n_tau_6250"]) == ("300000", "281250")
    steps = {row["variant"]: row["steps"] for row in rows(tmp_path / "out", "speed.csv")}
    assert steps["td3_opt_n_tau_100000"] == "1,000,000 + 375,000"
    row = next(line for line in text.splitlines() if line.startswith("| hopper-random-v2") and "105.8 ± 1.3" in line)
    assert [cell.strip() for cell in row.split("|")][3:-1:2] == [f"{score:.1f} (1)" for score in (1, 2, 3, 4, 5)]
    row = next(line for line in text.splitlines() if line.startswith("| hopper-random-v2") and "95.7 ± 18.4" in line)
    assert [cell.strip() for cell in row.split("|")][3:-1:2] == ["6.0 (1)", "7.0 (1)", "8.0 (1)"]


def test_a_readme_beside_the_runs_heads_the_report(runs, no_figures, tmp_path):
    (runs / "README.md").write_text("hopper's data is a stand-in\n")
    text, scores, _ = make(runs, tmp_path / "out")
    assert text.index("hopper's data is a stand-in") < text.index("## Table 1") and scores


def test_runs_that_no_table_has_are_shown_too(no_figures, tmp_path):
    """Their names promise nothing, so that whatever they are they are not left out."""
    runs, own = tmp_path / "runs", {"opt": True, "q_on": False, "q_on_init": "joint", "n_pretrain": 1}
    folder = write_run(runs, "my_idea", "InvertedPendulum-v5", 0, [1, 2], **own)
    text = (folder / "evals.csv").read_text().replace(",1,10,", ",nan,10,").replace(",2,20,", ",nan,20,")
    (folder / "evals.csv").write_text(text)
    write_run(runs, "my_idea", "hopper-random-v2", 0, [1, 2], **own)
    text, *_ = make(runs, tmp_path / "out")
    assert "| InvertedPendulum-v5 (return) | 1,000,000 + 300,000, N_pretrain 1, UTD 5 | 20.0 (1) |" in text
    assert "| hopper-random-v2 | 1,000,000 + 300,000, N_pretrain 1, UTD 5 | 2.0 (1) |" in text
    assert "Table 1" not in text and left_out(text) == ["nothing"]


def test_speed(runs, no_figures, tmp_path):
    make(runs, tmp_path / "out")
    row = next(row for row in rows(tmp_path / "out", "speed.csv") if row["variant"] == "td3")
    assert (row["runs"], row["device"], row["threads"]) == ("6", "cpu", "1")
    assert float(row["offline_gradient_steps_per_second"]) == 9  # of 10, 9, 8, each twice
    assert float(row["online_finetune_gradient_steps_per_second"]) == 6.2
    assert float(row["offline_hours"]) == pytest.approx(101 / 3600, abs=1e-4)
    assert float(row["hours_in_all"]) == pytest.approx((2 * (100 + 101 + 102) + 6 * 800) / 3600, abs=1e-4)


def test_speed_of_a_vae_counts_as_offline_and_a_run_without_speed_does_not_count(no_figures, tmp_path):
    folder = write_run(tmp_path / "runs", "spot", "antmaze-umaze-v2", 0, [1, 2])
    write_run(tmp_path / "runs", "spot", "antmaze-umaze-v2", 1, [1, 2]).joinpath("speed.csv").unlink()
    with open(folder / "speed.csv", "a") as file:
        file.write("vae,1000,0,3600,0.28\n")
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert text.endswith("to be looked at\n\n- nothing\n")
    (row,) = rows(tmp_path / "out", "speed.csv")
    assert row["runs"] == "1" and float(row["offline_hours"]) == pytest.approx(1 + 100 / 3600, abs=1e-4)
    assert float(row["online_hours"]) == pytest.approx(800 / 3600, abs=1e-4)


def test_returns_and_normalised_scores_do_not_add_up(no_figures, tmp_path):
    write_run(tmp_path / "runs", "mine", "pen-cloned-v1", 0, [1, 3])
    folder = write_run(tmp_path / "runs", "mine", "InvertedPendulum-v5", 0, [1, 2])
    text = (folder / "evals.csv").read_text().replace(",1,10,", ",nan,10,").replace(",2,20,", ",nan,20,")
    (folder / "evals.csv").write_text(text)
    text, *_ = make(tmp_path / "runs", tmp_path / "out")
    assert "20.0 (1)" in text and "3.0 (1)" in text and "| no total:" in text and "**total" not in text


def test_odd_runs_are_named_and_crash_nothing(no_figures, tmp_path):
    runs = tmp_path / "runs"
    write_run(runs, "td3_opt_n_tau_small", "hopper-random-v2", 0, [1, 2])
    write_run(runs, "td3_opt", "hopper-random-v2", 0, [1, 2], opt=False)
    write_run(runs, "td3", "walker2d-random-v2", 0, [1, 2]).joinpath("args.json").write_text("[]")
    broken = write_run(runs, "td3", "hopper-random-v2", 0, [1, 2]) / "speed.csv"
    broken.write_text(SPEED + "offline,1000,0,,\nonline_finetune,5000,1000,800,nan\n")
    text, *_ = make(runs, tmp_path / "out")
    notes = text.split("to be looked at")[1]
    assert "says opt = False" in notes and "args.json has no device_name, env_id" in notes
    assert "speed.csv, line 2: half-written or" in notes and "speed.csv, line 3: half-written or" in notes


def test_boorl_has_its_own_protocol_s_column_too(no_figures, tmp_path):
    """Its score after 200,000 of 300,000 steps and after the last, each beside the paper's number."""
    for seed, scores in enumerate(([0, 10, 20, 30], [0, 30, 60, 90])):  # at 0, 100,000, 200,000, 300,000
        write_run(tmp_path / "runs", "boorl", "hopper-random-v2", seed, scores, online_steps=300_000)
    write_run(tmp_path / "runs", "boorl", "hopper-random-v2", 0, [0, 7, 8], online_steps=200_000)
    text, scores, _ = make(tmp_path / "runs", tmp_path / "out")
    cells = {(row["online"], row["variant"]): (row["mean"], row["paper"]) for row in scores}
    assert {key: (float(mean), float(paper)) for key, (mean, paper) in cells.items()} == {
        ("300000", "boorl_at_200000"): (40.0, 102.2),
        ("300000", "boorl"): (60.0, 108.5),
        ("200000", "boorl_at_200000"): (8.0, 102.2),
        ("200000", "boorl"): (8.0, 108.5),
    }
    assert "BOORL 200k" in text and "40.0 ± " in text
    early = next(row for row in scores if (row["online"], row["variant"]) == ("300000", "boorl_at_200000"))
    assert float(early["last_five"]) == (15 + 45) / 2  # of the means of 10, 20 and of 30, 60
    runs = report.read_runs(tmp_path / "runs", [])
    assert {curve.index[-1] for curve in runs.curve[runs.variant == "boorl_at_200000"]} == {200_000}


def test_every_number_of_the_paper_is_known():
    paper = report.read_paper()
    assert (
        paper[1]["TD3+OPT", "hopper-random-v2"] == (108.7, 1.7) and paper[3]["SPOT", "relocate-cloned-v1"][0] == -0.19
    )
    for title, n, headings in report.TABLES.values():
        assert f"Table {n}:" in title
        assert {method for method, _ in paper[n]} >= set(headings.values())
        if n not in (1, 2, 3, 12, 14):  # those have the other papers' methods as well
            assert {method for method, _ in paper[n]} == set(headings.values())


def test_tsne(tmp_path, capsys, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    states = {name: torch.randn(60, 5, generator=generator) + i for i, name in enumerate(("offline", "first", "last"))}
    torch.save({"kind": "model.pt", "states": states}, tmp_path / "model.pt")
    out = run_report(monkeypatch, capsys, "tsne", tmp_path, "--out", tmp_path / "out")
    assert f"tsne-{tmp_path.name}.png" in out
    assert (tmp_path / "out" / f"tsne-{tmp_path.name}.png").read_bytes().startswith(b"\x89PNG")


def run_report(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()
    return capsys.readouterr().out


def random_model(script: str, seed: int = 0, **changes) -> dict:
    """A model.pt or snapshot as the script would write it, of an untrained agent."""
    module = importlib.import_module(script)
    args = module.resolve(module.Args(env_id="InvertedPendulum-v5", device="cpu", seed=seed))
    args = dataclasses.replace(args, **changes)
    parts = module.Agent(args, 4, 1, torch.device("cpu")).parts()
    networks = {name: part.state_dict() for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    generator = torch.Generator().manual_seed(seed)
    facts = {"kind": "model.pt", "script": f"{script}.py", "args": dataclasses.asdict(args), "action_dim": 1}
    facts |= {"observation_mean": torch.randn(4, generator=generator), "reward_scale": float(seed + 1)}
    return facts | {"observation_std": torch.rand(4, generator=generator) + 0.5} | networks


def save_snapshot(model: dict, run: Path, name: str) -> Path:
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    torch.save(model, run / "snapshots" / f"{name}.pt")
    return run


@torch.no_grad()
def values(model: dict, reduce, actions: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The actions and both critics' values at the 10 initial states; the agent's own actions if there are none."""
    module = importlib.import_module(model["script"].removesuffix(".py"))
    agent, env = module.Agent(module.Args(**model["args"]), 4, 1, torch.device("cpu")), gym.make("InvertedPendulum-v5")
    for name in ("actor", "q_off", "q_on"):
        getattr(agent, name).load_state_dict(model[name])
    states = np.stack([env.reset(seed=2_000_000 + pair)[0] for pair in range(10)])
    states = (torch.tensor(states, dtype=torch.float32) - model["observation_mean"]) / model["observation_std"]
    actions = agent.actor(states) if actions is None else actions
    return actions, [reduce(critic(states, actions)) for critic in (agent.q_off, agent.q_on)]


FIRST = {"td3_opt": lambda q: q[0], "spot_opt": lambda q: q[0]}
REDUCE = FIRST | {"iql_opt": lambda q: q.amin(0), "rlpd_opt": lambda q: q.mean(0)}


@pytest.mark.parametrize("script", REDUCE)
def test_estimation_bias_is_in_each_agents_normalisation_and_the_runs_unit(script, tmp_path):
    """kappa is 0 before the first environment step, then the schedule's; the reference is another script's agent."""
    model = random_model(script, 1, kappa_init=0.2, kappa_end=0.6, kappa_decay=100)
    reference = random_model("td3_opt", 4)
    for name in ("online_finetune-25-90", "offline-0-100"):  # in the order of the phases, not of the names
        run = save_snapshot(model, tmp_path / "run", name)
    torch.save(reference, tmp_path / "model.pt")
    bias = report.estimation_bias(run, report.load_agent(tmp_path / "model.pt", ""))
    actions, (_, truth) = values(reference, REDUCE["td3_opt"])
    off, on = (value - truth * 2 / 5 for value in values(model, REDUCE[script], actions)[1])  # reward_scale 2 and 5
    assert bias.gradient_steps.tolist() == [100] * 10 + [90] * 10 and bias.pair.tolist() == [*range(10), *range(10)]
    for name, expected in (("off", [*off, *off]), ("on", [*on, *on]), ("mix", [*off, *(0.7 * off + 0.3 * on)])):
        assert bias[f"q_{name}_bias"].tolist() == pytest.approx([float(x) for x in expected], abs=1e-5)
    assert on.abs().min() > 1e-3 and (on - off).abs().min() > 1e-3


def test_estimation_bias_of_a_run_against_its_own_last_model(home, pendulum_file, tmp_path, capsys, monkeypatch):
    run, vanilla, without_q_on = tmp_path / "run", tmp_path / "vanilla", random_model("td3_opt", opt=False)
    for name in ("offline-0-0", "online_finetune-5-9"):
        save_snapshot(without_q_on, vanilla, name)
    arguments = "--env-id InvertedPendulum-v5 --offline-steps 20 --online-steps 60 --n-tau 20 --n-pretrain 20".split()
    arguments += ["--dataset", pendulum_file, "--run-dir", run, "--snapshots", "--eval-freq", 20, "--eval-episodes", 1]
    result = run_script("td3_opt", home, *arguments, "--batch-size", 16, "--no-progress")
    assert result.returncode == 0, result.stderr
    run_report(monkeypatch, capsys, "bias", run, vanilla, "--reference", run, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "bias.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run_report(monkeypatch, capsys, "bias", run, tmp_path / "copy" / "run", "--reference", run)
    assert "two of these folders have one name" in capsys.readouterr().err
    bias = rows(tmp_path / "out", "bias.csv")
    names = ["phase", "env_steps", "gradient_steps"]
    assert list(bias[0]) == ["run", *names, "pair", "q_off_bias", "q_on_bias", "q_mix_bias"]
    of_run, of_vanilla = ([row for row in bias if row["run"] == name] for name in ("run", "vanilla"))
    evaluations = [[row[name] for name in names] for row in rows(run)]
    assert [[row[name] for name in names] for row in of_run] == [row for row in evaluations for _ in range(10)]
    for row in of_run[-10:]:
        assert float(row["q_on_bias"]) == 0 != float(row["q_off_bias"])
        assert float(row["q_mix_bias"]) == pytest.approx(0.1 * float(row["q_off_bias"]), abs=1e-3)  # kappa ends at 0.9
    assert any(abs(float(row["q_on_bias"])) > 1e-3 for row in of_run[:10])
    assert len(of_vanilla) == 20
    assert all(row["q_on_bias"] == "" and row["q_mix_bias"] == row["q_off_bias"] != "" for row in of_vanilla)


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    model = random_model("td3_opt")
    torch.save({"kind": "model.pt"}, tmp_path / "old.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK")
    torch.save(model, tmp_path / "model.pt")
    torch.save(model | {"script": "lost.py"}, tmp_path / "lost.pt")
    torch.save(model | {"script": "iql_opt.py"}, tmp_path / "iql.pt")
    torch.save(model | {"script": "pex.py"}, tmp_path / "pex.pt")
    torch.save(model | {"args": model["args"] | {"env_id": "hopper-medium-v2"}}, tmp_path / "hopper.pt")
    for maze in ("umaze", "medium"):
        mazes = model | {"args": model["args"] | {"env_id": f"antmaze-{maze}-play-v2"}}
        torch.save(save_snapshot(mazes, tmp_path / maze, "offline-0-0") and mazes, tmp_path / f"{maze}.pt")
    save_snapshot(model, tmp_path / "run", "offline-0-0")
    (save_snapshot(model, tmp_path / "torn", "offline-0-0") / "snapshots" / "offline-0-9.pt").write_bytes(b"PK")
    (tmp_path / "empty" / "snapshots").mkdir(parents=True)
    write_run(tmp_path / "kept", "td3", "hopper-random-v2", 0, [0, 1])
    monkeypatch.chdir(tmp_path)
    cases = {
        "": "runs is no folder",
        "histogram": "invalid choice",
        f"--runs {'a' * 300}": "aaa is no folder",
        "--runs ~nobody-here/x": "~nobody-here/x is no folder",
        "--runs empty/snapshots": "empty/snapshots holds no run: start one first",
        "tsne": "or tsne RUN",
        "tsne a b": "or tsne RUN",
        "bias --reference model.pt": "bias RUN ...",
        "bias run": "--reference MODEL.pt",
        "tables runs": "--runs",
        "tsne runs/none": "none/model.pt cannot be read (FileNotFoundError)",
        "tsne .": "which has states",
        "bias --reference none.pt run": "none.pt cannot be read (FileNotFoundError): write another --reference",
        f"bias run --reference {'a' * 300}": "cannot be read (OSError): write another --reference",
        f"bias {'a' * 300} --reference model.pt": "aaa has no snapshots",
        "bias run --reference damaged.pt": "damaged.pt cannot be read",
        "bias run --reference old.pt": "which has script and args",
        "bias run --reference lost.pt": "does not fit",
        "bias run --reference iql.pt": "iql_opt.py (",
        "bias run --reference pex.pt": "is of pex.py, which has no Q_on to compare",
        "bias run --reference hopper.pt": "run is of InvertedPendulum, --reference of hopper",
        "bias medium --reference umaze.pt": "medium is of antmaze-medium, --reference of antmaze-umaze",
        "bias torn --reference .": "offline-0-9.pt cannot be read",
        "bias run empty --reference .": "empty has no snapshots: run it with --snapshots",
        "bias none --reference .": "none has no snapshots",
        "--runs kept --out old.pt": "old.pt cannot be written (File exists): write another --out",
    }
    for arguments, words in cases.items():
        with pytest.raises(SystemExit) as error:
            run_report(monkeypatch, capsys, *arguments.split())
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.startswith("report.py: ") and message.count("\n") == 1, message
        assert words in message, (arguments, message)


def test_discounted_returns_by_hand():
    sys.path.insert(0, str(ROOT / "results"))
    from monte_carlo import discounted_returns

    assert discounted_returns([1.0, 2.0, 4.0], 0.5).tolist() == [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]


@torch.no_grad()
def test_values_beside_returns_of_roll_outs(tmp_path, capsys):
    """With a reward of 1 a step until the fall, the return of the step t of T is (1 - 0.99^(T - t)) / (1 - 0.99)."""
    sys.path.insert(0, str(ROOT / "results"))
    import monte_carlo
    import td3_opt

    model = random_model("td3_opt", 3)
    for name in ("q_off", "q_on"):
        model[name]["layers.2.weight"] *= 300  # values of the returns' size
    torch.save(model, tmp_path / "model.pt")
    monte_carlo.main(tmp_path / "model.pt", 3)
    actor, env, returns, inputs, lengths = td3_opt.Actor(4, 1), gym.make("InvertedPendulum-v5"), [], [], []
    actor.load_state_dict(model["actor"])
    for seed in (5_000_000, 5_000_001, 5_000_002):
        observation, length, terminated = env.reset(seed=seed)[0], 0, False
        while not terminated:
            state = torch.tensor(observation, dtype=torch.float32) - model["observation_mean"]
            state = state / model["observation_std"]
            action = actor(state[None])
            inputs.append(torch.cat((state, action[0])))
            observation, _, terminated, truncated, _ = env.step(3 * action[0].numpy())
            length += not terminated  # the step of the fall has no reward
        lengths.append(length)
        returns += [100 * (1 - 0.99 ** (length - t)) for t in range(length + 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"return {np.mean(lengths):.1f} (std {np.std(lengths):.1f}, 3 episodes)")
    numbers = f"mean {np.mean(returns):.1f}, std {np.std(returns):.1f}"
    assert lines[1] == f"discounted return of {len(returns)} steps: {numbers}"
    for line, name in zip(lines[2:], ("q_off", "q_on"), strict=True):
        x = torch.stack(inputs)
        for layer in range(3):  # the first of the two critics, by its weights
            x = x @ model[name][f"layers.{layer}.weight"][0] + model[name][f"layers.{layer}.bias"][0]
            x = x.relu() if layer < 2 else x[:, 0].numpy()
        bias, rmse = np.mean(x - returns), np.sqrt(np.mean((x - returns) ** 2))
        numbers = f"mean {x.mean():.1f}, bias {bias:.1f}, rmse {rmse:.1f}"
        assert line == f"{name}: {numbers}, corr {np.corrcoef(x, returns)[0, 1]:.2f}"


def test_largest_curvature_of_a_quadratic():
    """x^2 + 3 y^2 - 5 z^2 / 2 has the Hessian's eigenvalues 2, 6 and -5."""
    sys.path.insert(0, str(ROOT / "results"))
    from inner_step import largest_curvature

    torch.manual_seed(0)
    parameters = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)]
    (x, y), z = parameters
    gradients = torch.autograd.grad(x**2 + 3 * y**2 - 5 * z**2 / 2, parameters, create_graph=True)
    assert largest_curvature(gradients, parameters) == pytest.approx(6, abs=1e-3)


def test_the_kept_runs_make_the_kept_scores(no_figures, tmp_path):
    """results/figures is what the command in results/README.md makes of the runs in results/runs."""
    make(ROOT / "results" / "runs", tmp_path)
    kept = ROOT / "results" / "figures"
    for name in ("scores.csv", "totals.csv"):
        assert (tmp_path / name).read_text() == (kept / name).read_text()
    ours, theirs = ((folder / "report.md").read_text().split("## Left out")[0] for folder in (tmp_path, kept))
    assert ours == theirs

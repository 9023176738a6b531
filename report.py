"""Tables and figures of what is in runs/, beside the paper's numbers.

usage: python report.py                                    all runs in runs/: scores, totals, IQM, curves and speed
       python report.py bias RUN ... --reference MODEL.pt  Figs. 9, 10: Q in RUN's snapshots minus Q of MODEL.pt
       python report.py tsne RUN                           Fig. 6: states of the dataset, the first and last rollouts

A score is the one after the last online step, as in the paper; the row below has the mean of the last five online
evaluations, which swings less. An interval is 95%, Student's t over seeds. With OPT, also the difference from the same
seeds without it; of an ablation, from the paper's own variant. Runs with other numbers of steps stand in rows of their
own, and so do those of other data than the paper's, whose args.json says "stand-in" in data.source. What could not be
used is listed at the end. A README.md beside the runs heads the report.
"""

import argparse
import glob
import importlib
import io
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "algorithms"))  # for bias, which loads agents
plt.switch_backend("Agg")
plt.rcParams.update({"font.size": 8, "axes.xmargin": 0.02, "figure.constrained_layout.use": True})
# The columns of the tables: {variant, a run's exp_name: what the paper calls it}.
TD3, SPOT, IQL = ({v: t, f"{v}_opt": f"{t}+OPT"} for v, t in (("td3", "TD3"), ("spot", "SPOT"), ("iql", "IQL")))
BOORL = {"boorl_at_200000": "BOORL 200k", "boorl": "BOORL", "td3_opt": "TD3+OPT"}
BASELINES = {"pex": "PEX", "cal_ql": "Cal-QL"}
REPLAY = {"td3_opt": "TD3+OPT", "td3_opt_replay_online": "TD3+OPT online replay"}
KAPPA = {"spot_opt": "kappa 0.1->0.9"} | {f"spot_opt_kappa_end_{end}": f"kappa 0.1->{end}" for end in (0.8, 0.7)}
KAPPA |= {f"spot_opt_kappa_{kappa}": f"kappa {kappa}" for kappa in (0, 0.5, 1)}
INIT_MUJOCO = {"td3_opt": "TD3+OPT", "td3_opt_init_random": "random init", "td3_opt_init_online": "B_on only"}
INIT_ANTMAZE = {"spot_opt": "SPOT+OPT", "spot_opt_init_random": "random init", "spot_opt_init_online": "B_on only"}
INIT_ANTMAZE |= {"spot_opt_init_joint": "B_off and B_on"}
N_TAUS = {f"td3_opt_n_tau_{n}" if n != 25_000 else "td3_opt": f"N_tau {n}" for n in (6250, 12500, 25000, 50000, 100000)}
TABLES = {  # name: (title, number in the paper, columns)
    "table1": ("Table 1: MuJoCo", 1, {"oema": "OEMA"} | BASELINES | TD3),
    "table2": ("Table 2: AntMaze", 2, BASELINES | SPOT),
    "table3": ("Table 3: Adroit", 3, {"cal_ql": "Cal-QL"} | SPOT),
    "table12-mujoco": ("Table 12: TD3 and IQL, MuJoCo", 12, TD3 | IQL),
    "table12-others": ("Table 12: SPOT and IQL, AntMaze and Adroit", 12, SPOT | IQL),
    "table13": ("Table 13: RLPD", 13, {"rlpd_vanilla": "RLPD", "rlpd": "RLPD off-to-on", "rlpd_opt": "RLPD+OPT"}),
    "table14": ("Table 14: BOORL, whose own protocol ends at 200,000 online steps", 14, BOORL),
    "ablation-replay": ("Table 6: what fine-tuning samples", 6, REPLAY),
    "ablation-kappa": ("Table 7: the weight of Q_on", 7, KAPPA),
    "ablation-init-mujoco": ("Table 8: how Q_on starts, MuJoCo", 8, INIT_MUJOCO),
    "ablation-init-antmaze": ("Table 9: how Q_on starts, AntMaze", 9, INIT_ANTMAZE),
    "ablation-n-tau": ("Table 10: N_tau, with N_pretrain = 2 N_tau and as many fine-tuning steps", 10, N_TAUS),
    "ablation-q-on": ("Table 11: without Q_on", 11, {"td3_opt": "TD3+OPT", "td3_opt_no_q_on": "without Q_on"}),
}
UTD = {"td3": 5, "spot": 1, "iql": 1, "rlpd": 20, "oema": 1, "pex": 1, "cal": 1, "boorl": 5}
N_TAU, VAE_STEPS = 25_000, 100_000
NEEDED = "env_id exp_name seed offline_steps online_steps utd device_name threads"
# Arguments in which the runs of one cell may differ.
BOOKKEEPING = "seed exp_name script run_dir device offline_from checkpoint_freq resume save_model snapshots track"
BOOKKEEPING += " capture_video progress wandb_project_name wandb_entity wandb_id versions device_name threads"
BOOKKEEPING += " compile products dataset"
# Arguments that make the variants of one row: beside these its columns of one backbone may differ in nothing.
VARIANT = "opt q_on q_on_init replay kappa_init kappa_end kappa_decay init_online_fraction random_steps"
VARIANT += " offline_steps online_steps n_tau n_pretrain"
PHASES = ("vae", "offline", "collect", "online_pretrain", "online_finetune")
RATES = [f"{phase}_gradient_steps_per_second" for phase in PHASES if phase not in ("vae", "collect")]
HOURS = ["offline_hours", "online_hours", "hours_in_all"]
STEPS = "offline vae online n_tau n_pretrain utd"
SCORES = f"row table task {STEPS} variant seeds mean interval last_five last_five_interval paper paper_interval".split()
SCORES += "minus pairs ahead ahead_interval last_five_ahead last_five_ahead_interval paper_ahead".split()
TOTALS = f"row table {STEPS} variant tasks total paper_total iqm iqm_low iqm_high iqm_seeds".split()
# Told apart in black and white by dashes and markers.
COLORS = ("#000000", "#c04000", "#0060a8", "#808080", "#308040", "#b080c0")
DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^DvP"
STYLES = [{"color": c, "linestyle": d, "marker": m} for c, d, m in zip(COLORS, DASHES, MARKERS, strict=True)]
SAME_IN_ALL = {"td3_opt": 0, "spot_opt": 0, "rlpd_opt": 0, "td3": 1, "spot": 1, "rlpd": 1, "iql_opt": 2, "iql": 3}
BAND_SEEDS = 5  # fewer seeds' intervals would be all of the panel
STAND_IN = " (stand-in)"
NONE = math.nan, math.nan  # where the paper has no score and interval
LANDMARK = {"color": "#404040", "linestyle": (0, (1, 2)), "linewidth": 0.9}


def bad_input(message: str) -> NoReturn:
    """Exit status 2 for what the user can mend, with one line that says what to write instead."""
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        bad_input(f"{path} cannot be written ({error.strerror}): write another --out")


class Steps(NamedTuple):
    """A run's step budgets. "paper" is the paper's number for the variant, of a VAE also where there is none, so that
    such a run stands beside the paper's; None is what does not apply."""

    offline: int | None
    vae: int | str
    online: int  # of N_tau's ablation: as if N_tau were the paper's, so that its columns share a row
    n_tau: int | str | None
    n_pretrain: int | str | None
    utd: int | str

    @classmethod
    def of(cls, args: dict) -> "Steps":
        variant, opt = args["exp_name"], args.get("opt")
        n_tau = int(N_TAUS.get(variant, f"N_tau {N_TAU}").split()[1])
        backbone = re.split("[_.]", args.get("script", variant))[0]  # a name of one's own tells nothing
        paper = {"n_tau": n_tau, "n_pretrain": 2 * n_tau, "utd": UTD.get(backbone)}
        paper["vae_steps"] = min(VAE_STEPS, args["offline_steps"])
        own = {name: "paper" if args.get(name, number) == number else args[name] for name, number in paper.items()}
        offline = None if variant == "rlpd_vanilla" else args["offline_steps"]
        n_pretrain = own["n_pretrain"] if opt and args.get("q_on_init") != "random" else None
        online, n_tau = args["online_steps"] - n_tau + N_TAU, own["n_tau"] if opt else None
        return cls(offline, own["vae_steps"], online, n_tau, n_pretrain, own["utd"])

    def are_the_papers(self) -> bool:
        own = any(isinstance(number, int) for number in (self.vae, self.n_tau, self.n_pretrain, self.utd))
        return self.offline in (None, 1_000_000) and self.online == 300_000 and not own

    def has_place_for(self, run: "Steps") -> bool:
        return all(its is None or its == mine for mine, its in zip(self, run, strict=True))

    def label(self, online: str) -> str:
        names = {"VAE": self.vae, "N_tau": self.n_tau, "N_pretrain": self.n_pretrain, "UTD": self.utd}
        others = [f", {name} {value:,}" for name, value in names.items() if isinstance(value, int)]
        return f"{self.offline or 0:,} + {online}" + "".join(others)


def read_csv(path: Path, numbers: list[str], notes: list[str]) -> pd.DataFrame:
    """The phase and these numbers of a CSV's rows that are whole and finite; the others go to the notes."""
    whole, _, half = path.read_text(errors="replace").rpartition("\n")
    whole += "\n," if half else ""  # half a row becomes an empty one
    if missing := [name for name in ("phase", *numbers) if name not in whole.partition("\n")[0].split(",")]:
        notes.append(f"{path}: no column {', '.join(missing)}, left out")
        return pd.DataFrame(columns=["phase", *numbers])
    rows = pd.read_csv(io.StringIO(whole), usecols=["phase", *numbers], dtype=str)
    rows[numbers] = rows[numbers].apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    needed = [name for name in numbers if name != "normalized_score" or rows[name].notna().any()]  # D4RL has not all
    finite = rows[needed].notna().all(axis=1)
    notes += [f"{path}, line {row + 2}: half-written or not finite, left out" for row in rows.index[~finite]]
    return rows[finite]


def read_run(folder: Path, notes: list[str]) -> dict:
    """A complete run: its row of the frame. ValueError for another."""
    args = json.loads((folder / "args.json").read_text())
    if missing := sorted(set(NEEDED.split()) - set(args if isinstance(args, dict) else ())):
        raise ValueError(f"args.json has no {', '.join(missing)}")
    variant, init = args["exp_name"], re.search(r"_init_(\w+)$", args["exp_name"])
    named = {"opt": "_opt" in variant, "q_on": "_no_q_on" not in variant, "q_on_init": init[1] if init else "meta"}
    opt = args.get("opt", False)  # a method without OPT has no such argument
    wrong = [f"{k} = {args[k]}" for k, v in named.items() if (k == "opt" or opt) and args.get(k, v) != v]
    if wrong and any(variant in headings for _, _, headings in TABLES.values()):  # one's own name promises nothing
        notes.append(f"{folder}: named {variant}, but its args.json says {', '.join(wrong)}")
    evals = read_csv(folder / "evals.csv", ["env_steps", "normalized_score", "return_mean"], notes)
    phase, step = evals[["phase", "env_steps"]].iloc[-1] if len(evals) else ("start", 0)
    if (phase, step) != ("online_finetune", args["online_steps"]):
        raise ValueError(f"no finished online phase ({phase}, environment step {step:.0f} of {args['online_steps']})")
    normalized = evals.normalized_score.notna().all()
    scores = evals.normalized_score if normalized else evals.return_mean
    task = args["env_id"] + (STAND_IN if "stand-in" in json.dumps(args.get("data")) else "")
    run = {"folder": folder, "args": args, "variant": variant, "task": task, "seed": args["seed"]}
    run |= {"steps": Steps.of(args), "unit": "normalised score" if normalized else "return", "score": scores.iloc[-1]}
    run["last_five"] = scores[evals.phase == "online_finetune"].tail(5).mean()
    run["curve"] = scores.groupby(evals.env_steps).last()  # at 0 the offline agent's
    if args.get("collect_steps") and 0 in run["curve"]:  # until then nothing learns
        run["curve"] = run["curve"].combine_first(pd.Series({args["collect_steps"]: run["curve"][0]}))
    run |= {"device": args["device_name"], "threads": args["threads"], **dict.fromkeys(RATES + HOURS, math.nan)}
    if (folder / "speed.csv").exists():  # kept runs may be args.json and evals.csv alone
        speed = read_csv(folder / "speed.csv", ["seconds", "gradient_steps_per_second"], notes).set_index("phase")
        run |= {f"{phase}_gradient_steps_per_second": x for phase, x in speed.gradient_steps_per_second.items()}
        hours, offline = speed.seconds / 3600, speed.index.isin(["vae", "offline"])
        run |= zip(HOURS, (x.sum(min_count=1) for x in (hours[offline], hours[~offline], hours)), strict=True)
    return run


def read_runs(folder: Path, notes: list[str]) -> pd.DataFrame:
    """The complete runs of a folder; of two with the same variant, task, seed and steps only the first."""
    runs = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            run = read_run(path, notes)
            for other in runs:  # in one row, both would count
                same = all(other[key] == run[key] for key in ("variant", "task", "seed"))
                if same and (other["steps"].has_place_for(run["steps"]) or run["steps"].has_place_for(other["steps"])):
                    raise ValueError(f"the same variant, task, seed and steps as {other['folder']}")
            runs.append(run)
            if run["variant"] == "boorl" and 200_000 in (curve := run["curve"]):  # a column on its way
                early = {"variant": "boorl_at_200000", "curve": curve.loc[:200_000], "score": curve[200_000]}
                early |= {"last_five": early["curve"].loc[1:].tail(5).mean(), **dict.fromkeys(RATES + HOURS, math.nan)}
                runs.append(run | early)
        except json.JSONDecodeError:
            notes.append(f"{path}: args.json is damaged, left out")
        except (OSError, ValueError) as reason:
            notes.append(f"{path}: {reason}, left out")
    return pd.DataFrame(runs)


class Table(NamedTuple):
    name: str
    title: str
    headings: dict[str, str]  # of each variant
    paper: dict[tuple[str, str], tuple[float, float]]  # (variant, task): score and interval; NaN where it has none
    places: pd.DataFrame  # the runs, once for each row that they stand in: its number, label and steps


def read_paper() -> dict[int, dict[tuple[str, str], tuple[float, float]]]:
    scores = pd.read_csv(ROOT / "results" / "paper-scores.csv")
    scores.method = scores.method.str.removesuffix(" 300k")  # which all others are
    tables = scores.groupby("table")
    return {n: {(row.method, row.env_id): (row.score, row.interval) for row in rows.itertuples()} for n, rows in tables}


def make_tables(runs: pd.DataFrame) -> Iterator[Table]:
    """The tables, with the rows in which there is a run that no table before has; then the runs that are in none."""
    shown, paper = set(), read_paper()
    for name, (title, n, headings) in (TABLES | {"others": ("Runs that the paper has no number for", 0, {})}).items():
        mine = runs[~runs.index.isin(shown)]
        if name in TABLES:
            tasks = dict.fromkeys(task for _, task in paper[n])
            tasks = [task for task in tasks if all((method, task) in paper[n] for method in headings.values())]
            tasks += [task + STAND_IN for task in tasks]  # which the paper has no number for
            scores = {(v, t): paper[n].get((method, t), NONE) for v, method in headings.items() for t in tasks}
            mine = runs[runs.variant.isin(headings) & runs.task.isin(tasks)]
            if name.startswith("ablation"):
                mine = mine[mine.task.isin(mine.task[~mine.variant.isin(["td3_opt", "spot_opt"])])]
            new = set(mine.steps[~mine.index.isin(shown)])
            mine = mine.loc[[any(a.has_place_for(b) or b.has_place_for(a) for b in new) for a in mine.steps]]
            headings = {variant: heading for variant, heading in headings.items() if variant in set(mine.variant)}
        else:
            headings, tasks = {variant: variant for variant in sorted(set(mine.variant))}, sorted(set(mine.task))
            scores = {(variant, task): NONE for variant in headings for task in tasks}
        shown, budgets, places = shown | set(mine.index), set(mine.steps), []
        rows = [row for row in budgets if not any(other != row and other.has_place_for(row) for other in budgets)]
        for i, row in enumerate(sorted(rows, key=lambda row: (-row.online, -(row.offline or 0), str(row)))):
            here = mine[mine.steps.map(row.has_place_for)]
            ablated = name == "ablation-n-tau" or set(here.variant) <= N_TAUS.keys() - {"td3_opt"}
            label = row.label(f"{row.online - N_TAU:,} + N_tau" if ablated else f"{row.online:,}")
            places.append(here.assign(row=i, label=label, row_steps=[row] * len(here)))
        if places:
            order = {"variant": pd.CategoricalDtype(list(headings)), "task": pd.CategoricalDtype(tasks)}
            places = pd.concat(places).astype(order).sort_values(["row", "variant", "task", "seed"])
            yield Table(name, title, headings, scores, places)


def mixtures(table: Table) -> list[str]:
    """Arguments in which the runs of one cell differ, or the columns of one backbone in one row."""
    notes, cell = set(), ["row", "variant", "task"]
    firsts = table.places.drop_duplicates(cell)
    rows = firsts.groupby(["row", "task", firsts.variant.str.split("_").str[0]], observed=True)
    groups = [(runs, "cell", BOOKKEEPING) for _, runs in table.places.groupby(cell, observed=True)]
    groups += [(runs, "row", f"{BOOKKEEPING} {VARIANT}") for _, runs in rows if table.name in TABLES]
    for runs, what, may_differ in groups:
        args = [args | {"data": (args.get("data") or {}).get("crc32")} for args in runs.args]  # wherever it lay
        args = pd.DataFrame([{name: json.dumps(value) for name, value in run.items()} for run in args])
        args = args.fillna("null").drop(columns=may_differ.split(), errors="ignore")
        for name in args.columns[args.nunique() > 1]:
            values, folders = ", ".join(sorted(set(args[name]))), " ".join(path.name for path in runs.folder)
            notes.add(f"{table.name}: one {what} mixes --{name} {values}: {folders}")
    return sorted(notes)


def half_interval(values: pd.Series) -> float:
    """Half of the mean's 95% interval (Student's t); NaN for a single value."""
    return stats.t.ppf(0.975, len(values) - 1) * values.sem()


def mean_and_interval(values: pd.Series) -> tuple[float, float]:
    return values.mean(), half_interval(values)


def minus(variant: str, variants: Iterable[str]) -> str | None:
    """What a variant with OPT is compared with: the longest of these names that its own begins with."""
    parts = variant.split("_")
    names = ["_".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)] if "opt" in parts else []
    return next((name for name in names if name in variants), None)


def differences(runs: pd.DataFrame, others: pd.DataFrame) -> tuple:
    """Scores of runs minus those of the other variant's with the same seeds: how many, mean and half its interval of
    the last scores, then of the last five's means."""
    by_seed = [of.set_index("seed")[["score", "last_five"]] for of in (runs, others)]
    pairs = (by_seed[0] - by_seed[1]).dropna()
    return len(pairs), *mean_and_interval(pairs.score), *mean_and_interval(pairs.last_five)


def iqm_and_interval(scores: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean of scores [seeds, tasks] and its stratified-bootstrap 95% interval (rliable)."""
    from rliable import library, metrics

    if len(scores) < 3:  # of two seeds of a task the bootstrap gives the smaller and the larger score
        return metrics.aggregate_iqm(scores), math.nan, math.nan
    np.random.seed(0)  # rliable draws from numpy's global generator
    points, intervals = library.get_interval_estimates({"": scores}, metrics.aggregate_iqm, reps=2_000)
    return points[""], *intervals[""][:, 0]


def summarize(table: Table) -> tuple[pd.DataFrame, pd.DataFrame]:
    """scores.csv, a row a cell, and totals.csv, a row a column, over the tasks that every column with a run has."""
    scores, totals = [], []
    cells = dict(list(table.places.groupby(["row", "variant", "task"], observed=True)))
    for (row, variant, task), runs in cells.items():
        steps = runs.row_steps.iloc[0]._replace(online=runs.args.iloc[0]["online_steps"])
        last, five, paper = mean_and_interval(runs.score), mean_and_interval(runs.last_five), table.paper[variant, task]
        other, ahead = minus(variant, table.headings), (None, *[math.nan] * 6)
        if (row, other, task) in cells:
            ahead = other, *differences(runs, cells[row, other, task]), paper[0] - table.paper[other, task][0]
        scores.append((row, table.name, task, *steps, variant, len(runs), *last, *five, *paper, *ahead))
    for row, runs in table.places.groupby("row"):
        seeds = runs.groupby(["variant", "task"], observed=True).size().unstack().dropna(axis=1)
        runs = runs[runs.task.isin(seeds.columns)]
        real = ~runs.task.astype(str).str.endswith(STAND_IN)
        runs = runs[real] if real.any() else runs  # data other than the paper's adds up with its own kind alone
        seeds = seeds[list(dict.fromkeys(runs.task))]
        if runs.unit.nunique() != 1:
            continue  # no task in every column, or returns beside scores, which do not add up
        for variant, column in runs.groupby("variant", observed=True):
            # The IQM is over the first seeds of each task, as many as every task has in every column
            tasks, first = column.groupby("task", observed=True).score, int(seeds.min(axis=None))
            total, paper = tasks.mean().sum(), sum(table.paper[variant, task][0] for task in seeds.columns)
            iqm = iqm_and_interval(np.array([scores[:first] for _, scores in tasks]).T)
            totals.append((row, table.name, *runs.row_steps.iloc[0], variant, len(tasks), total, paper, *iqm, first))
    return pd.DataFrame(scores, columns=SCORES, dtype=object), pd.DataFrame(totals, columns=TOTALS, dtype=object)


def number(value: float, seeds: float = math.nan, *interval: float) -> str:
    """A number, ± half its interval or [its ends], and how many seeds it is of."""
    digits = 2 if abs(value) < 1 else 1
    text = "–" if math.isnan(value) else f"{value:.{digits}f}"
    if interval and not math.isnan(interval[0]):
        text += f" ± {interval[0]:.{digits}f}" if len(interval) == 1 else f" [{', '.join(map(number, interval))}]"
    return text if math.isnan(seeds) else f"{text} ({seeds})"


def markdown(table: pd.DataFrame) -> str:
    rows = (table.columns, ["---"] * table.shape[1], *table.astype(object).where(table.notna(), "–").values)
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def table_markdown(table: Table, scores: pd.DataFrame, totals: pd.DataFrame) -> str:
    rows, variants, blank = [], list(table.headings), [""] * len(table.headings)
    for (row, label), in_row in table.places.groupby(["row", "label"]):
        for task, runs in in_row.groupby("task", observed=True):
            cells = scores[(scores.row == row) & (scores.task == task)].set_index("variant").reindex(variants)
            last = map(number, cells["mean"], cells.seeds, cells.interval)
            five = map(number, cells.last_five, cells.seeds, cells.last_five_interval)
            paper = [number(score, math.nan, half) for score, half in (table.paper[v, task] for v in variants)]
            rows.append((f"{task} (return)" if "return" in set(runs.unit) else task, label, last, paper))
            rows.append(("mean of its last five evaluations", label, five, blank))
            if (compared := cells.minus.dropna().unique()).size:
                words = f"minus {' or '.join(table.headings[other] for other in compared)}, seed by seed"
                ahead = map(number, cells.ahead, cells.pairs, cells.ahead_interval)
                five = map(number, cells.last_five_ahead, cells.pairs, cells.last_five_ahead_interval)
                paper = ["" if math.isnan(x) else number(x) for x in cells.paper_ahead]
                rows += [(words, label, ahead, paper), (f"… last five evaluations {words}", label, five, blank)]
        sums = totals[totals.row == row].set_index("variant").reindex(variants)
        if sums.tasks.isna().all():
            rows.append(("no total: no task in every column, or returns beside scores", label, blank, blank))
            continue
        total, paper, n = map(number, sums.total), map(number, sums.paper_total), sums.tasks.max()
        rows.append((f"**total of {n}**", label, total, paper))
        iqm = map(number, sums.iqm, sums.iqm_seeds, sums.iqm_low, sums.iqm_high)
        rows.append((f"**IQM of {n}**", label, iqm, ["–" if math.isnan(x) else "" for x in sums.iqm]))
    columns = [name for title in table.headings.values() for name in (title, "paper")]
    lines = [[first, label, *chain(*zip(cells, paper, strict=True))] for first, label, cells, paper in rows]
    frame = pd.DataFrame(lines, columns=["task", "steps (offline + online)", *columns])
    return f"## {table.title}\n\n" + markdown(frame if table.name in TABLES else frame.drop(columns="paper"))


def speed_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """speed.csv: medians over the runs of a variant that had the same steps, device and threads."""
    steps = [steps.label(f"{args['online_steps']:,}") for steps, args in zip(runs.steps, runs.args, strict=True)]
    groups = runs.assign(steps=steps).dropna(subset="hours_in_all").groupby(["variant", "steps", "device", "threads"])
    medians = groups[RATES + HOURS].median().assign(hours_in_all=groups.hours_in_all.sum())
    speed = groups.size().to_frame("runs").join(medians).reset_index()
    return speed.round(dict.fromkeys(RATES, 1) | dict.fromkeys(HOURS, 4))


def make_panels(titles: list[str], x_label: str) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(max(7, 0.6 + 3.6 * columns), 1.6 + 2.6 * rows), squeeze=False)
    for i, (title, axis) in enumerate(zip(titles, grid.flat, strict=False)):  # one label for all would hide the legend
        axis.set(title=textwrap.fill(title, 50), xlabel=x_label if i >= len(titles) - columns else "")
    for unused in grid.flat[len(titles) :]:
        unused.axis("off")
    return figure, dict(zip(titles, grid.flat, strict=False))


def save(figure: plt.Figure, title: str, path: Path, handles: dict | None = None, columns: int = 1) -> Path:
    """Write a figure as PNG and PDF, its title broken where the figure ends, its legend below."""
    lines = [textwrap.fill(line, int(13 * figure.get_figwidth())) for line in title.splitlines()]
    figure.suptitle("\n".join(lines))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    make_folder(path.parent)
    figure.savefig(path, dpi=130)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path


def styled_columns(table: Table, runs: pd.DataFrame) -> Iterator[tuple[str, dict, str, pd.DataFrame]]:
    """A row's columns: variant, style, what the legend says, runs."""
    names = [variant for variant in table.headings if table.name in TABLES or variant in set(runs.variant)]
    others = [variant for variant in names if variant not in SAME_IN_ALL]
    free = [i for i in range(1, len(STYLES)) if i not in map(SAME_IN_ALL.get, names)]
    for variant, column in runs.groupby("variant", observed=True):
        sizes = column.groupby("task", observed=True).size()
        seeds = " to ".join(map(str, sorted({sizes.min(), sizes.max()})))
        again, place = divmod(others.index(variant), len(free)) if variant in others else (0, 0)
        style = STYLES[SAME_IN_ALL.get(variant, free[place])]
        if again:  # more columns than styles
            style = style | {"marker": MARKERS[(MARKERS.index(style["marker"]) + again) % len(MARKERS)]}
        yield variant, style, f"{table.headings[variant]} ({seeds} seed{'s' * (seeds != '1')})", column


def seeds_note(runs: pd.DataFrame, seed: str, interval: str) -> str:
    """What of a figure is the mean, a seed and an interval."""
    most = runs.groupby(["variant", "task"], observed=True).size().max()
    words = f"mean; {seed}: each seed" if most > 1 else "one seed"
    return f"{words}; {interval}: 95% interval" if most >= BAND_SEEDS else words


def draw_line(axis: plt.Axes, mean: pd.Series, low: pd.Series, high: pd.Series, style: dict) -> plt.Line2D:
    thousands = mean.index / 1000
    axis.fill_between(thousands, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return axis.plot(thousands, mean, linewidth=1.3, markevery=max(1, len(mean) // 7), markersize=4, **style)[0]


def draw_curves(table: Table, runs: pd.DataFrame, path: Path) -> Path:
    """Learning curves of the online phase: the mean, a thin line a seed, and a 95% band where it is not the panel.
    After the paper's steps a hollow marker for its final score."""
    curves = {task: list(of_task.curve) for task, of_task in runs.groupby("task", observed=True)}
    figure, panels = make_panels(list(curves), "environment steps (thousands)")
    handles, marks = {}, {}
    for variant, style, label, column in styled_columns(table, runs):
        for task, seeds in column.groupby("task", observed=True):
            axis, args = panels[task], seeds.args.iloc[0]
            for curve in seeds.curve:
                axis.plot(curve.index / 1000, curve, color=style["color"], linewidth=0.5, alpha=0.5)
            common = pd.concat(list(seeds.curve), axis=1, join="inner")
            mean, band = common.mean(axis=1), common.apply(half_interval, axis=1).fillna(0) * (len(seeds) >= BAND_SEEDS)
            handles[label] = draw_line(axis, mean, mean - band, mean + band, style)
            paper = pd.Series([table.paper[variant, task][0]], mean.index[-1:])
            if seeds.steps.iloc[0].are_the_papers() and paper.notna().all():
                hollow = style | {"linestyle": "", "fillstyle": "none", "markersize": 8, "clip_on": False}
                marks["hollow: the paper's final score"] = axis.plot(paper.index / 1000, paper, **hollow)[0]
                curves[task].append(paper)
            if args.get("opt"):  # in N_tau's ablation each its own, in the style of its curve
                own = {name: style[name] for name in ("color", "linestyle") if table.name == "ablation-n-tau"}
                marks["N_tau (OPT learns from here)"] = axis.axvline(args["n_tau"] / 1000, **LANDMARK | own)
    sizes = runs.groupby("task", observed=True).seed.nunique()
    for task, axis in panels.items():  # what of a band goes beyond all scores is cut off
        if sizes.nunique() > 1:
            axis.set_title(f"{axis.get_title()}, {sizes[task]} seed{'s' * int(sizes[task] > 1)}")
        low, high = min(map(min, curves[task])), max(map(max, curves[task]))
        margin = 0.05 * (high - low) or 1
        axis.set_ylim(low - margin, high + margin)
    figure.supylabel(" or ".join(sorted(set(runs.unit))))
    lines = seeds_note(runs, "thin", "band")
    title = f"{table.title}\noffline + online steps: {runs.label.iloc[0]}; {lines}"
    return save(figure, title, path, handles | marks, columns=2 if len(panels) < 3 else 3)


def draw_scores(table: Table, runs: pd.DataFrame, path: Path) -> Path:
    """Final scores: filled markers the mean, dots the seeds, bars 95% intervals, hollow markers the paper's number."""
    tasks, n = [task for task, _ in runs.groupby("task", observed=True)], runs.variant.nunique()
    figure, axis = plt.subplots(figsize=(8, 1.6 + len(tasks) * (0.16 + 0.17 * n) + 0.22 * n))
    handles = {}
    for i, (variant, style, label, column) in enumerate(styled_columns(table, runs)):
        style = style | {"linestyle": ""}
        places = pd.Series(np.arange(len(tasks)) + 0.8 * ((i + 0.5) / n - 0.5), tasks)
        scores = column.groupby("task", observed=True).score.agg(["mean", "size", half_interval])
        bars = scores.half_interval.where(scores["size"] >= BAND_SEEDS)
        points = {"x": scores["mean"], "y": places[scores.index], "xerr": bars}
        axis.plot(column.score, places[column.task], ".", color=style["color"], markersize=3, alpha=0.5)
        handles[label] = axis.errorbar(**points, capsize=2, markersize=5, **style)[0]
        if any(not math.isnan(table.paper[variant, task][0]) for task in tasks):
            paper, hollow = [table.paper[variant, task][0] for task in tasks], {"fillstyle": "none", "alpha": 0.8}
            line = axis.plot(paper, places, markersize=7, **style, **hollow)[0]
            handles[f"{table.headings[variant]}, paper, full length"] = line
    for row in range(1, len(tasks)):
        axis.axhline(row - 0.5, color="#c0c0c0", linewidth=0.6)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set(ylim=(len(tasks) - 0.5, -0.5), xlabel=f"{' or '.join(sorted(set(runs.unit)))} after the last online step")
    title = f"{table.title}\noffline + online steps: {runs.label.iloc[0]}; {seeds_note(runs, 'dots', 'bars')}"
    return save(figure, title, path, handles, columns=2)


def draw_bias(bias: pd.DataFrame, path: Path) -> Path:
    """Figs. 9, 10: Q minus the reference's Q over training; a panel a run, mean and range over the pairs."""
    figure, panels = make_panels(list(bias.run.unique()), "gradient steps (thousands)")
    handles = {}
    for run, rows in bias.groupby("run"):
        for style, q in zip(STYLES, ("off", "on", "mix"), strict=False):
            values = rows.dropna(subset=f"q_{q}_bias").groupby("gradient_steps")[f"q_{q}_bias"]
            if len(values):
                handles[f"Q_{q}"] = draw_line(panels[run], values.mean(), values.min(), values.max(), style)
        panels[run].axhline(0, color="#404040", linewidth=0.8)
        for start in rows.groupby("phase", sort=False).gradient_steps.first()[1:]:
            handles["next phase"] = panels[run].axvline(start / 1000, **LANDMARK)
    figure.supylabel("Q minus the reference's Q")
    title = "Estimation bias: mean and range over the pairs (Q_mix: weighted by kappa)"
    return save(figure, title, path, handles, columns=4)


def draw_tsne(folder: Path, path: Path) -> Path:
    """Fig. 6: one t-SNE of the dataset's states and those of the first and last rollouts."""
    from sklearn.manifold import TSNE

    model = read_model(folder / "model.pt", ["states"], "let the run finish, without --no-save-model")
    states = [model["states"][name].numpy() for name in ("offline", "first", "last")]
    points = TSNE(init="pca", random_state=0).fit_transform(np.concatenate(states))
    parts = np.split(points, np.cumsum([len(part) for part in states])[:-1])
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharex=True, sharey=True)
    titles = ("dataset", "first rollouts", "last rollouts")
    for axis, title, part, style in zip(axes, titles, parts, STYLES, strict=False):
        axis.scatter(*points.T, s=3, color="#d8d8d8", linewidths=0, rasterized=True)
        axis.scatter(*part.T, s=4, color=style["color"], linewidths=0, rasterized=True)
        axis.set(title=f"{title} ({len(part):,} states)", xticks=[], yticks=[])
    return save(figure, f"{folder.resolve().name}: t-SNE of states; grey: all three", path)


def read_model(path: Path, needed: list[str], advice: str) -> dict:
    try:
        model = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises half a dozen kinds for what is damaged
        bad_input(f"{path} cannot be read ({type(error).__name__}): {advice}")
    if missing := [name for name in needed if not isinstance(model, dict) or name not in model]:
        bad_input(f"{path} is no model.pt of today's scripts, which has {' and '.join(missing)}: {advice}")
    return model


def load_agent(path: Path, advice: str) -> tuple:
    """A model.pt or snapshot, the script that wrote it, and its Agent with the networks loaded."""
    model = read_model(path, ["script", "args", "action_dim", "observation_mean", "reward_scale"], advice)
    try:
        script = importlib.import_module(Path(model["script"]).stem)
        if not hasattr(script.Args, "opt"):
            bad_input(f"{path} is of {model['script']}, which has no Q_on to compare: write a run of a script with OPT")
        args = {name: value for name, value in model["args"].items() if name in script.Args.__annotations__}
        dimensions = len(model["observation_mean"]), model["action_dim"]
        agent = script.Agent(script.Args(**args), *dimensions, torch.device("cpu"))
        for name in {"actor", "q_off", "q_on"} & vars(agent).keys():
            getattr(agent, name).load_state_dict(model[name])
    except (ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        bad_input(f"{path} does not fit {ROOT}/algorithms/{model['script']} ({type(error).__name__}): {advice}")
    return model, script, agent


def critic_values(of: tuple, states: torch.Tensor, actions: torch.Tensor | None = None) -> tuple[torch.Tensor, dict]:
    """The agent's own actions or others', and what Eq. 4 takes from its Q_off and, where there is one, Q_on, [B]."""
    model, script, agent = of
    states = (states - model["observation_mean"]) / model["observation_std"]
    actions = agent.actor(states) if actions is None else actions
    critics = {name: getattr(agent, name) for name in ("q_off", "q_on") if hasattr(agent, name)}
    return actions, {name: script.policy_value(critic, states, actions) for name, critic in critics.items()}


@torch.no_grad()
def estimation_bias(folder: Path, reference: tuple) -> pd.DataFrame:
    """Q of 10 fixed (initial state, reference's action) pairs minus the reference's own: a row a snapshot and pair."""
    names = [Path(name).stem for name in glob.glob("snapshots/*.pt", root_dir=folder)]
    files = [re.fullmatch(rf"({'|'.join(PHASES)})-(\d+)-(\d+)", name) for name in names]
    bias, snapshots = {}, [(PHASES.index(file[1]), int(file[2]), int(file[3]), file[0]) for file in files if file]
    if not snapshots:
        bad_input(f"{folder} has no snapshots: run it with --snapshots")
    for phase, env_steps, gradient_steps, name in sorted(snapshots):
        run = load_agent(folder / "snapshots" / f"{name}.pt", "delete it, or run again with --snapshots")
        (model, script, _), args = run, run[0]["args"]
        own, other = (re.match(r"antmaze-[^-]+|[^-]*", of[0]["args"]["env_id"])[0] for of in (run, reference))
        if own != other:
            bad_input(f"{folder} is of {own}, --reference of {other}: write one of the same environment")
        if not bias:
            env, scale = script.make_env(args["env_id"]), model["reward_scale"] / reference[0]["reward_scale"]
            states = torch.tensor(np.stack([env.reset(seed=2_000_000 + pair)[0] for pair in range(10)])).float()
            actions, truth = critic_values(reference, states)
            truth = scale * truth.get("q_on", truth["q_off"])
        q = {name: values - truth for name, values in critic_values(run, states, actions)[1].items()}
        mix = q["q_off"]
        if "q_on" in q and env_steps:
            kappa = script.kappa_at(env_steps, args["kappa_init"], args["kappa_end"], args["kappa_decay"])
            mix = (1 - kappa) * q["q_off"] + kappa * q["q_on"]
        columns = {"q_off_bias": q["q_off"], "q_on_bias": q.get("q_on", math.nan * mix), "q_mix_bias": mix}
        key = folder.resolve().name, PHASES[phase], env_steps, gradient_steps
        bias[key] = pd.DataFrame(columns).rename_axis("pair")
    return pd.concat(bias, names=["run", "phase", "env_steps", "gradient_steps"]).reset_index()


def report(runs_folder: Path, out: Path) -> str:
    """Write tables and figures to `out`; returns the Markdown."""
    notes = []
    if not os.path.isdir(runs_folder):  # Path's methods fail on a name too long for a file
        bad_input(f"{runs_folder} is no folder: write --runs, the folder of your runs")
    runs = read_runs(runs_folder, notes)
    if runs.empty and not notes:
        bad_input(f"{runs_folder} holds no run: start one first, or write --runs, the folder of your runs")
    text = "# Report\n\nMean ± 95% interval over seeds (number of seeds), after the last online step; "
    text += "the paper's is of 1,000,000 + 300,000 steps.\n"
    text += "IQM: interquartile mean over tasks and seeds (the first seeds of each task, as many as every task has in "
    text += "every column) [from three seeds on: stratified-bootstrap 95% interval].\n\n"
    if (about := runs_folder / "README.md").exists():
        text += about.read_text().strip() + "\n\n"
    make_folder(out)
    for path in out.iterdir():  # an earlier report's
        if re.fullmatch(rf"({'|'.join(TABLES)}|others)(-\d+\+.*)?-(scores|curves)\.(png|pdf)", path.name):
            path.unlink()
    tables = [(table, *summarize(table)) for table in make_tables(runs)] if len(runs) else []
    for table, scores, totals in tables:
        text += table_markdown(table, scores, totals) + "\n"
        notes += mixtures(table)
        for label, in_row in table.places.groupby("label", sort=False):
            name = f"{table.name}-{label}".replace(",", "").replace(" + ", "+").replace(" ", "-")
            name = name if table.places.label.nunique() > 1 else table.name
            for draw, kind in ((draw_scores, "scores"), (draw_curves, "curves")):
                path = draw(table, in_row, out / f"{name}-{kind}.png")
                text += f"![{table.title}, {kind}, steps {label}]({path.name})\n\n"
    speed = speed_rows(runs) if len(runs) else runs
    if len(speed):
        text += "## Speed\n\nMedians over runs, without evaluation (`hours_in_all`: the sum over runs). "
        text += "`--offline-from` saves a run its offline phase.\n\n"
        text += markdown(speed.rename(columns=lambda name: name.replace("_", " "))) + "\n"
    csvs = {"scores": [row[1] for row in tables], "totals": [row[2] for row in tables], "speed": [speed]}
    for name, parts in csvs.items():
        (out / f"{name}.csv").unlink(missing_ok=True)  # an earlier report's
        if any(len(part) for part in parts):
            pd.concat(parts).drop(columns="row", errors="ignore").to_csv(out / f"{name}.csv", index=False)
    text += "## Left out, and to be looked at\n\n" + "".join(f"- {note}\n" for note in notes or ["nothing"])
    (out / "report.md").write_text(text)
    return text


def expanded(text: str) -> Path:
    return Path(os.path.expanduser(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tables", "bias", "tsne"), default="tables")
    parser.add_argument("folders", nargs="*", type=expanded, metavar="RUN", help="run folders, for bias and tsne")
    parser.add_argument("--runs", type=expanded, default=Path("runs"), help="the folder of all runs (default: runs)")
    parser.add_argument("--out", type=expanded, default=Path("report"), help="where to write (default: report)")
    parser.add_argument("--reference", type=expanded, help="for bias: a near-optimal run's model.pt, or its folder")
    parser.error = bad_input
    args = parser.parse_intermixed_args()  # flags may stand between the words
    fits = {"tables": not args.folders, "bias": args.folders and args.reference, "tsne": len(args.folders) == 1}
    if not fits[args.what]:
        bad_input("write tables [--runs FOLDER], bias RUN ... --reference MODEL.pt (or its folder), or tsne RUN")
    if args.what == "tables":
        print(report(args.runs, args.out))
        written = f"{args.out}/"
    elif args.what == "tsne":
        written = draw_tsne(args.folders[0], args.out / f"tsne-{args.folders[0].resolve().name}.png")
    else:
        path = args.reference / "model.pt" if os.path.isdir(args.reference) else args.reference
        reference = load_agent(path, "write another --reference, a near-optimal run's model.pt")
        if len({folder.resolve().name for folder in args.folders}) < len(args.folders):
            bad_input("two of these folders have one name, by which the panels are told apart: rename one")
        bias = pd.concat([estimation_bias(folder, reference) for folder in args.folders])
        written = draw_bias(bias, args.out / "bias.png")
        bias.to_csv(args.out / "bias.csv", index=False, float_format="%.4f")
    print(f"written to {written}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"report.py: {error}")

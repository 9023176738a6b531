"""Tables and figures of what is in runs/, beside the paper's numbers.

usage: python report.py                 scores, totals, IQM, curves and speed of all runs in runs/, written to report/
       python report.py bias RUN ...    estimation bias (Figs. 9, 10) of runs made with --reference-model
       python report.py tsne RUN        t-SNE of the dataset's states and the first and last rollouts' (Fig. 6)

A score is the one after the last online step, as in the paper; the row below has the mean of the last five online
evaluations, which swings less. An interval is 95%, Student's t over seeds. Runs with other numbers of steps stand in
rows of their own. Whatever could not be used is listed under "Left out, and to be looked at". A README.md beside the
runs, for what numbers do not tell, is put at the report's head.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER_SCORES = Path(__file__).resolve().parent / "results" / "paper-scores.csv"

# Table -> (title, number in the paper, {variant, a run's exp_name: what the paper calls it}).
TD3, SPOT, IQL = (
    {name: title, f"{name}_opt": f"{title}+OPT"} for name, title in (("td3", "TD3"), ("spot", "SPOT"), ("iql", "IQL"))
)
TABLES = {
    "table1": ("Table 1: TD3, MuJoCo", 1, TD3),
    "table2": ("Table 2: SPOT, AntMaze", 2, SPOT),
    "table3": ("Table 3: SPOT, Adroit", 3, SPOT),
    "table12-mujoco": ("Table 12: TD3 and IQL, MuJoCo", 12, TD3 | IQL),
    "table12-others": ("Table 12: SPOT and IQL, AntMaze and Adroit", 12, SPOT | IQL),
    "table13": ("Table 13: RLPD", 13, {"rlpd_vanilla": "RLPD", "rlpd": "RLPD off-to-on", "rlpd_opt": "RLPD+OPT"}),
    "ablation-replay": (
        "Table 6: what fine-tuning samples",
        6,
        {"td3_opt": "TD3+OPT", "td3_opt_replay_online": "TD3+OPT online replay"},
    ),
    "ablation-kappa": (
        "Table 7: the weight of Q_on",
        7,
        {
            "spot_opt": "kappa 0.1->0.9",
            "spot_opt_kappa_end_0.8": "kappa 0.1->0.8",
            "spot_opt_kappa_end_0.7": "kappa 0.1->0.7",
            "spot_opt_kappa_0": "kappa 0",
            "spot_opt_kappa_0.5": "kappa 0.5",
            "spot_opt_kappa_1": "kappa 1",
        },
    ),
    "ablation-init-mujoco": (
        "Table 8: how Q_on starts, MuJoCo",
        8,
        {"td3_opt": "TD3+OPT", "td3_opt_init_random": "random init", "td3_opt_init_online": "B_on only"},
    ),
    "ablation-init-antmaze": (
        "Table 9: how Q_on starts, AntMaze",
        9,
        {
            "spot_opt": "SPOT+OPT",
            "spot_opt_init_random": "random init",
            "spot_opt_init_online": "B_on only",
            "spot_opt_init_joint": "B_off and B_on",
        },
    ),
    "ablation-n-tau": (
        "Table 10: N_tau, with N_pretrain = 2 N_tau and the same number of fine-tuning steps",
        10,
        {f"td3_opt_n_tau_{n}" if n != 25_000 else "td3_opt": f"N_tau {n}" for n in (6250, 12500, 25000, 50000, 100000)},
    ),
    "ablation-q-on": ("Table 11: without Q_on", 11, {"td3_opt": "TD3+OPT", "td3_opt_no_q_on": "without Q_on"}),
}
UTD = {"td3": 5, "spot": 1, "iql": 1, "rlpd": 20}
N_TAU, VAE_STEPS = 25_000, 100_000

# Arguments in which the runs of one cell may differ.
BOOKKEEPING = set(
    "seed exp_name run_dir device offline_from checkpoint_freq resume save_model capture_video track "
    "wandb_project_name wandb_entity progress reference_model versions device_name threads wandb_id".split()
)

# Arguments that make the variants of one row: beside these its columns of one backbone may differ in nothing.
VARIANT = set(
    "opt q_on q_on_init replay kappa_init kappa_end kappa_decay init_online_fraction random_steps "
    "offline_steps online_steps n_tau n_pretrain".split()
)

NEEDED = set(
    "env_id exp_name seed opt offline_steps online_steps n_tau n_pretrain q_on_init utd device_name threads".split()
)

# Told apart in black and white by dashes and markers.
STYLES = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#c04000", "linestyle": "--", "marker": "s"},
    {"color": "#0060a8", "linestyle": "-.", "marker": "^"},
    {"color": "#808080", "linestyle": ":", "marker": "D"},
    {"color": "#308040", "linestyle": (0, (8, 2)), "marker": "v"},
    {"color": "#b080c0", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "P"},
]


def bad_input(message: str) -> SystemExit:
    """Exit status 2 for what the user can mend, with one line that says what to write instead."""
    print(f"report.py: {message}", file=sys.stderr)
    return SystemExit(2)


# ======================================================================================================================
# Runs
# ======================================================================================================================


class Steps(NamedTuple):
    """A run's step budgets. "paper" is the paper's number for the variant, None what does not apply to it."""

    offline: int | None
    vae: int | str | None
    online: int  # of N_tau's ablation: as if N_tau were the paper's, so that its columns share a row
    n_tau: int | str | None
    n_pretrain: int | str | None
    utd: int | str

    def matches(self, row: "Steps") -> bool:
        """Whether a run of these steps may stand in a row of those."""
        return all(mine is None or mine == its for mine, its in zip(self, row, strict=True))

    def __str__(self) -> str:
        return self.label(f"{self.online:,}")

    def label(self, online: str) -> str:
        text = f"{self.offline or 0:,} + {online}"
        for name, value in (
            ("VAE", self.vae),
            ("N_tau", self.n_tau),
            ("N_pretrain", self.n_pretrain),
            ("UTD", self.utd),
        ):
            text += f", {name} {value:,}" if isinstance(value, int) else ""
        return text


@dataclass
class Run:
    folder: Path
    args: dict
    evals: list[dict[str, str]]
    speed: list[dict[str, str]]

    @property
    def cell(self) -> tuple[str, str]:
        return self.args["exp_name"], self.args["env_id"]

    @property
    def has_reference(self) -> bool:
        """Whether D4RL has reference returns for the task; without them the score is the mean return."""
        return any(row["normalized_score"] != "nan" for row in self.evals)

    def score(self, row: dict[str, str]) -> float:
        return float(row["normalized_score" if self.has_reference else "return_mean"])

    def steps(self) -> Steps:
        args, variant = self.args, self.args["exp_name"]

        def unless_paper(value: int, paper: int) -> int | str:
            return "paper" if value == paper else value

        ablated = re.search(r"_n_tau_(\d+)$", variant)
        n_tau = int(ablated[1]) if ablated else N_TAU
        return Steps(
            offline=None if variant == "rlpd_vanilla" else args["offline_steps"],
            vae=unless_paper(args["vae_steps"], VAE_STEPS) if "vae_steps" in args else None,
            online=args["online_steps"] - n_tau + N_TAU,
            n_tau=unless_paper(args["n_tau"], n_tau) if args["opt"] else None,
            n_pretrain=(
                unless_paper(args["n_pretrain"], 2 * n_tau) if args["opt"] and args["q_on_init"] != "random" else None
            ),
            utd=unless_paper(args["utd"], UTD.get(variant.split("_")[0])),
        )

    @property
    def final_score(self) -> float:
        return self.score(self.evals[-1])

    @property
    def last_five_mean(self) -> float:
        """Mean of the last five evaluations of the online phase, of all where there are fewer."""
        return float(np.mean([self.score(row) for row in self.evals if row["phase"] == "online_finetune"][-5:]))

    def curve(self) -> dict[int, float]:
        """Score at each environment step of the online phase; at 0 that of the offline agent."""
        return {int(row["env_steps"]): self.score(row) for row in self.evals}


EVALS = ("phase", "env_steps", "normalized_score", "return_mean")
SPEED = ("phase", "seconds", "gradient_steps_per_second")
BIAS = ("phase", "gradient_steps", "q_off_bias", "q_on_bias", "q_mix_bias")


def read_csv(path: Path, columns: tuple[str, ...], notes: list[str]) -> list[dict[str, str]]:
    """The whole rows of a CSV that has these columns; a half-written one goes to the notes."""
    if not path.exists():
        notes.append(f"{path} does not exist")
        return []
    header, *lines = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    names, rows = header.strip().split(","), []
    if missing := [name for name in columns if name not in names]:
        notes.append(f"{path}: no column {', '.join(missing)}, left out")
        return []
    for number, line in enumerate(lines, start=2):
        values = line.strip("\n").split(",")
        if line.endswith("\n") and len(values) == len(names):
            rows.append(dict(zip(names, values, strict=True)))
        else:
            notes.append(f"{path}, line {number}: half-written, left out")
    return rows


def read_run(folder: Path, notes: list[str]) -> Run | None:
    """A complete run, or None and a note that says what is missing."""
    try:
        args = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        notes.append(f"{folder}: no readable args.json ({type(error).__name__}), left out")
        return None
    if not isinstance(args, dict):
        notes.append(f"{folder}: args.json holds no arguments, left out")
        return None
    if missing := NEEDED - args.keys():
        notes.append(f"{folder}: args.json has no {', '.join(sorted(missing))}, left out")
        return None
    named = {
        "opt": "_opt" in args["exp_name"],
        "q_on": "_opt" in args["exp_name"] and "_no_q_on" not in args["exp_name"],
        "q_on_init": found[1] if (found := re.search(r"_init_(\w+)$", args["exp_name"])) else "meta",
    }
    for name, value in named.items():
        if args["opt"] and name in args and args[name] != value or name == "opt" and args["opt"] != value:
            notes.append(f"{folder}: named {args['exp_name']}, but its args.json says {name} = {args[name]}")
    run = Run(folder, args, read_csv(folder / "evals.csv", EVALS, notes), [])
    speed = folder / "speed.csv"  # only the speed table needs it: kept runs may be args.json and evals.csv alone
    for row in read_csv(speed, SPEED, notes) if speed.exists() else []:
        try:
            finite = all(math.isfinite(float(row[key])) for key in ("seconds", "gradient_steps_per_second"))
        except ValueError:
            finite = False
        if finite:
            run.speed.append(row)
        else:
            notes.append(f"{speed}: phase {row['phase']} is not finite, left out")
    whole = []
    for row in run.evals:
        try:
            finite = math.isfinite(run.score(row))
        except ValueError:
            finite = False
        if finite:
            whole.append(row)
        else:
            notes.append(f"{folder / 'evals.csv'}: no finite score at environment step {row['env_steps']}, left out")
    if args["online_steps"] == 0:
        notes.append(f"{folder}: has no online steps, and every score here is one of the online phase, left out")
        return None
    last = run.evals[-1] if run.evals else {"phase": "start", "env_steps": "0"}
    if (last["phase"], last["env_steps"]) != ("online_finetune", str(args["online_steps"])):
        notes.append(
            f"{folder}: unfinished ({last['phase']}, environment step {last['env_steps']} of {args['online_steps']}), "
            "left out"
        )
        return None
    if last not in whole:
        notes.append(f"{folder}: its last score is not finite, left out")
        return None
    run.evals = whole
    return run


def read_runs(folder: Path, notes: list[str]) -> list[Run]:
    """The complete runs of a folder; of two with the same variant, task, seed and steps only the first."""
    runs, seen = [], {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        run = read_run(path, notes)
        if run is None:
            continue
        key = (run.cell, run.args["seed"], run.steps())
        if key in seen:
            notes.append(f"{path}: the same variant, task, seed and steps as {seen[key]}, left out")
            continue
        seen[key] = path
        runs.append(run)
    return runs


# ======================================================================================================================
# Statistics
# ======================================================================================================================


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half of its 95% interval (Student's t); None for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def iqm_and_interval(scores: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean of scores [seeds, tasks] and its stratified-bootstrap 95% interval (rliable)."""
    from rliable import library, metrics

    np.random.seed(0)  # rliable draws from numpy's global generator
    points, intervals = library.get_interval_estimates({"": scores}, metrics.aggregate_iqm, reps=2_000)
    low, high = intervals[""][:, 0] if len(scores) > 1 else (math.nan, math.nan)
    return float(points[""]), float(low), float(high)


def number(value: float, interval: float | None = None, count: int | None = None) -> str:
    digits = 2 if abs(value) < 1 else 1
    text = f"{value:.{digits}f}"
    text += "" if interval is None else f" ± {interval:.{digits}f}"
    return text if count is None else f"{text} ({count})"


# ======================================================================================================================
# Tables
# ======================================================================================================================


@dataclass
class Table:
    """The runs of one table: cells[steps of a row][variant][task] is a list of runs, a seed each."""

    name: str
    title: str
    headings: dict[str, str]
    tasks: list[str]
    paper: dict[tuple[str, str], tuple[float, float | None]]
    cells: dict[Steps, dict[str, dict[str, list[Run]]]]

    def __post_init__(self):
        self.totals = {steps: self.add_up(steps) for steps in self.cells}

    def label(self, steps: Steps) -> str:
        return steps.label(f"{steps.online - N_TAU:,} + N_tau") if self.name == "ablation-n-tau" else str(steps)

    def add_up(self, steps: Steps) -> dict[str, dict]:
        """Over the tasks that every column with a run has: total of the means, and IQM over the first seeds of each
        task, as many as every task has in every column.
        """
        columns = [column for column in self.cells[steps].values() if column]
        tasks = [task for task in self.tasks if all(task in column for column in columns)]
        if len({run.has_reference for column in columns for task in tasks for run in column[task]}) > 1:
            return {}  # returns and normalised scores do not add up
        seeds = min((len(column[task]) for column in columns for task in tasks), default=0)
        totals = {}
        for variant, column in self.cells[steps].items():
            if not (column and tasks):
                continue
            scores = [[run.final_score for run in column[task]] for task in tasks]
            iqm, low, high = iqm_and_interval(np.array([values[:seeds] for values in scores]).T)
            paper = [self.paper.get((variant, task)) for task in tasks]
            totals[variant] = {
                "tasks": len(tasks),
                "total": sum(map(np.mean, scores)),
                "paper_total": sum(score for score, _ in paper) if all(paper) else None,
                "iqm": iqm,
                "iqm_low": low,
                "iqm_high": high,
                "iqm_seeds": seeds,
            }
        return totals


def make_table(
    name: str, title: str, headings: dict[str, str], tasks: list[str], paper: dict, runs: list[Run]
) -> Table:
    budgets = {run.steps() for run in runs}
    rows = [steps for steps in budgets if not any(steps != other and steps.matches(other) for other in budgets)]
    rows.sort(key=lambda steps: (-steps.online, -(steps.offline or 0), str(steps)))
    cells = {row: {variant: defaultdict(list) for variant in headings} for row in rows}
    for row, columns in cells.items():
        for run in sorted(runs, key=lambda run: run.args["seed"]):
            if run.steps().matches(row):
                columns[run.args["exp_name"]][run.args["env_id"]].append(run)
    return Table(name, title, headings, tasks, paper, cells)


def read_paper() -> dict[int, dict[tuple[str, str], tuple[float, float | None]]]:
    """Table -> (method, task) -> (score, interval)."""
    paper = defaultdict(dict)
    with open(PAPER_SCORES, newline="") as file:
        for row in csv.DictReader(file):
            interval = float(row["interval"]) if row["interval"] else None
            paper[int(row["table"])][row["method"], row["env_id"]] = float(row["score"]), interval
    return paper


def make_tables(runs: list[Run]) -> list[Table]:
    """The tables, with the rows in which there is a run that no table before has; then the runs that are in none."""
    tables, shown, paper = [], set(), read_paper()
    for name, (title, n, headings) in TABLES.items():
        tasks = list(dict.fromkeys(task for _, task in paper[n]))
        tasks = [task for task in tasks if all((method, task) in paper[n] for method in headings.values())]
        scores = {(v, task): paper[n][method, task] for v, method in headings.items() for task in tasks}
        mine = [run for run in runs if run.cell in scores]
        new = [run.steps() for run in mine if run.folder not in shown]
        mine = [run for run in mine if any(run.steps().matches(row) or row.matches(run.steps()) for row in new)]
        if mine:
            tables.append(make_table(name, title, headings, tasks, scores, mine))
        shown |= {run.folder for run in mine}
    rest = [run for run in runs if run.folder not in shown]
    if rest:
        headings = {variant: variant for variant in sorted({run.args["exp_name"] for run in rest})}
        tasks = sorted({run.args["env_id"] for run in rest})
        tables.append(make_table("others", "Runs that the paper has no number for", headings, tasks, {}, rest))
    return tables


def mixtures(table: Table) -> list[str]:
    """A note for each cell whose runs differ in an argument that is no number of steps, and for each row of a task
    whose columns of one backbone differ in an argument that makes no variant.
    """
    notes = set()

    def compare(runs: list[Run], apart_from: set[str], what: str) -> None:
        for name in set().union(*(run.args for run in runs)) - apart_from:
            values = {json.dumps(run.args.get(name)) for run in runs}
            if len(values) > 1:
                folders = " ".join(run.folder.name for run in runs)
                notes.add(f"{table.name}: one {what} mixes --{name} {', '.join(sorted(values))}: {folders}")

    for columns in table.cells.values():
        rows = defaultdict(list)
        for variant, column in columns.items():
            for task, runs in column.items():
                compare(runs, BOOKKEEPING, "cell")
                rows[task, variant.split("_")[0]].append(runs[0])
        for runs in rows.values() if table.paper else ():  # what runs of one's own vary is their business
            compare(runs, BOOKKEEPING | VARIANT, "row")
    return sorted(notes)


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table_markdown(table: Table) -> str:
    variants = list(table.headings)
    text = f"## {table.title}\n\n"
    head = ["task", "steps (offline + online)"]
    for variant in variants:
        head += [table.headings[variant]] + (["paper"] if table.paper else [])
    text += markdown_row(head) + markdown_row(["---"] * len(head))
    for steps, columns in table.cells.items():
        for task in table.tasks:
            if not any(task in column for column in columns.values()):
                continue
            row, five = [task, table.label(steps)], ["mean of its last five evaluations", table.label(steps)]
            for variant in variants:
                runs = columns[variant].get(task, [])
                for cells, scores in (
                    (row, [run.final_score for run in runs]),
                    (five, [run.last_five_mean for run in runs]),
                ):
                    cells.append(number(*mean_and_interval(scores), len(scores)) if scores else "–")
                row += [number(*table.paper[variant, task])] if table.paper else []
                five += [""] * bool(table.paper)
            if any(not run.has_reference for column in columns.values() for run in column.get(task, [])):
                row[0] += " (return)"
            text += markdown_row(row) + markdown_row(five)
        totals = table.totals[steps]
        if not totals:
            text += markdown_row(
                ["no total: no task in every column, or returns beside scores", table.label(steps)]
                + [""] * (len(head) - 2)
            )
            continue
        for name in ("total", "IQM"):
            row = [f"**{name} of {next(iter(totals.values()))['tasks']}**", table.label(steps)]
            for variant in variants:
                entry = totals.get(variant)
                if entry is None:
                    row += ["–"] * (2 if table.paper else 1)
                elif name == "total":
                    row += [number(entry["total"])] + ([number(entry["paper_total"])] if table.paper else [])
                else:
                    interval = f" [{number(entry['iqm_low'])}, {number(entry['iqm_high'])}]"
                    row.append(f"{number(entry['iqm'])}{interval * (entry['iqm_seeds'] > 1)} ({entry['iqm_seeds']})")
                    row += [""] * bool(table.paper)
            text += markdown_row(row)
    return text


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def score_rows(table: Table) -> list[dict]:
    rows = []
    for steps, columns in table.cells.items():
        for variant, column in columns.items():
            for task in table.tasks:
                if task not in column:
                    continue
                mean, interval = mean_and_interval([run.final_score for run in column[task]])
                last_five, last_five_interval = mean_and_interval([run.last_five_mean for run in column[task]])
                paper, paper_interval = table.paper.get((variant, task), (None, None))
                rows.append(
                    {
                        "table": table.name,
                        "task": task,
                        **steps._asdict(),
                        "online": column[task][0].args["online_steps"],
                        "variant": variant,
                        "seeds": len(column[task]),
                        "mean": mean,
                        "interval": interval,
                        "last_five": last_five,
                        "last_five_interval": last_five_interval,
                        "paper": paper,
                        "paper_interval": paper_interval,
                    }
                )
    return rows


def total_rows(table: Table) -> list[dict]:
    return [
        {"table": table.name, **steps._asdict(), "variant": variant, **entry}
        for steps in table.cells
        for variant, entry in table.totals[steps].items()
    ]


# ======================================================================================================================
# Speed
# ======================================================================================================================


def speed_rows(runs: list[Run]) -> list[dict]:
    """Medians over the runs of a variant that had the same steps, device and threads."""
    groups, rows = defaultdict(list), []
    for run in runs:
        if run.speed:
            groups[run.args["exp_name"], run.steps(), run.args["device_name"], run.args["threads"]].append(run)
    for (variant, steps, device, threads), members in sorted(groups.items(), key=str):
        budget = str(steps._replace(online=members[0].args["online_steps"]))
        row = {"variant": variant, "steps": budget, "device": device, "threads": threads, "runs": len(members)}
        seconds = defaultdict(list)
        for phase in ("offline", "online_pretrain", "online_finetune"):
            rates = [r["gradient_steps_per_second"] for run in members for r in run.speed if r["phase"] == phase]
            row[f"{phase}_gradient_steps_per_second"] = round(median(map(float, rates)), 1) if rates else None
        for run in members:
            for entry in run.speed:
                seconds["offline" if entry["phase"] in ("vae", "offline") else "online"].append(
                    (run, float(entry["seconds"]))
                )
        for name, entries in seconds.items():
            by_run = defaultdict(float)
            for run, value in entries:
                by_run[run.folder] += value
            seconds[name] = list(by_run.values())
        for name in ("offline", "online"):
            row[f"{name}_hours"] = round(median(seconds[name]) / 3600, 4) if seconds[name] else None
        row["hours_in_all"] = round(sum(map(sum, seconds.values())) / 3600, 4)
        rows.append(row)
    return rows


def speed_markdown(rows: list[dict]) -> str:
    text = "## Speed\n\nMedians over runs, without evaluation. `--offline-from` saves a run its offline phase.\n\n"
    text += markdown_row([name.replace("_", " ") for name in rows[0]]) + markdown_row(["---"] * len(rows[0]))
    for row in rows:
        text += markdown_row(["–" if value is None else str(value) for value in row.values()])
    return text


# ======================================================================================================================
# Figures
# ======================================================================================================================


def slug(table: Table, steps: Steps) -> str:
    """File name of a figure: the table's, and the steps where it has rows of several."""
    words = table.label(steps).replace(",", "").replace(" + ", "+").replace(" ", "-")
    return table.name if len(table.cells) == 1 else f"{table.name}-{words}"


def grid(panels: int, x_label: str) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(3, panels)
    rows = math.ceil(panels / columns)
    size = (max(7, 0.6 + 3.6 * columns), 1.6 + 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for unused in axes[panels:]:
        unused.axis("off")
    for axis in axes[max(0, panels - columns) : panels]:  # not one label for all: the legend below would cover it
        axis.set_xlabel(x_label, fontsize=9)
    return figure, axes[:panels]


def seeds_label(column: dict[str, list[Run]]) -> str:
    counts = sorted({len(runs) for runs in column.values()})
    return f"{counts[0]} seed{'s' * (counts != [1])}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_curves(table: Table, steps: Steps, path: Path) -> Path:
    """Learning curves of the online phase: mean and 95% band over seeds, and a thin line a seed.

    The axis spans the seeds and cuts the band off: of few seeds it can be many times as wide as all scores.
    """
    columns = table.cells[steps]
    tasks = [task for task in table.tasks if any(task in column for column in columns.values())]
    figure, axes = grid(len(tasks), "environment steps (thousands)")
    handles = {}
    for axis, task in zip(axes, tasks, strict=True):
        low, high = math.inf, -math.inf
        for style, (variant, column) in zip(STYLES * 9, columns.items(), strict=False):
            if task not in column:
                continue
            curves = [run.curve() for run in column[task]]
            for curve in curves:
                seed_x, seed_y = np.array(sorted(curve.items())).T
                axis.plot(seed_x / 1000, seed_y, color=style["color"], linewidth=0.5, alpha=0.5)
                low, high = min(low, seed_y.min()), max(high, seed_y.max())
            x = sorted(set.intersection(*map(set, curves)))
            points = [mean_and_interval([curve[step] for curve in curves]) for step in x]
            mean, band = np.array([m for m, _ in points]), np.array([b or 0 for _, b in points])
            thousands = np.array(x) / 1000
            label = f"{table.headings[variant]} ({seeds_label(column)})"
            every = {"markevery": (0.05, 0.15), "markersize": 4}
            handles[label] = axis.plot(thousands, mean, linewidth=1.3, **style, **every)[0]
            axis.fill_between(thousands, mean - band, mean + band, color=style["color"], alpha=0.15, linewidth=0)
            if column[task][0].args["opt"]:
                n_tau = column[task][0].args["n_tau"] / 1000
                line = {"color": "#404040", "linestyle": (0, (1, 2))}
                if table.name == "ablation-n-tau":  # each its own, in the style of its curve
                    line = {"color": style["color"], "linestyle": style["linestyle"]}
                handles["N_tau"] = axis.axvline(n_tau, linewidth=0.9, **line)
        axis.set_title(task, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.02)
        margin = 0.05 * (high - low) or 1
        axis.set_ylim(low - margin, high + margin)
    end = {label: handle for label, handle in handles.items() if label == "N_tau"}
    handles = {label: handle for label, handle in handles.items() if label != "N_tau"} | end
    figure.supylabel(score_label(table, tasks), fontsize=9)
    figure.suptitle(
        f"{table.title}\nsteps {table.label(steps)}; mean and 95% interval (cut off at the axis), thin: each seed",
        fontsize=10,
    )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2 if len(tasks) < 3 else 3, fontsize=8
    )
    return save(figure, path)


def score_label(table: Table, tasks: list[str]) -> str:
    runs = [
        run for columns in table.cells.values() for c in columns.values() for task in tasks for run in c.get(task, [])
    ]
    return "normalised score" if all(run.has_reference for run in runs) else "score (return without a D4RL reference)"


def draw_scores(table: Table, steps: Steps, path: Path) -> Path:
    """Final scores: filled markers with 95% intervals, the paper's number hollow below each."""
    columns = {variant: column for variant, column in table.cells[steps].items() if column}
    tasks = [task for task in table.tasks if any(task in column for column in columns.values())]
    figure, axis = plt.subplots(
        figsize=(8, 1.6 + len(tasks) * (0.16 + 0.17 * len(columns)) + 0.22 * len(columns)), layout="constrained"
    )
    for i, (variant, column) in enumerate(columns.items()):
        style = STYLES[list(table.headings).index(variant) % len(STYLES)] | {"linestyle": ""}  # as in the curves
        places = [row + 0.8 * ((i + 0.5) / len(columns) - 0.5) for row in range(len(tasks))]
        label = f"{table.headings[variant]} ({seeds_label(column)})"
        for row, task in enumerate(tasks):
            if task in column:
                mean, interval = mean_and_interval([run.final_score for run in column[task]])
                axis.errorbar(mean, places[row], xerr=interval, capsize=2, markersize=5, label=label, **style)
                label = None
        if table.paper:
            scores = [table.paper[variant, task] for task in tasks]
            hollow = {"fillstyle": "none", "markersize": 7, "alpha": 0.8}
            axis.plot(
                [score for score, _ in scores], places, **style, **hollow, label=f"{table.headings[variant]}, paper"
            )
    for row in range(1, len(tasks)):
        axis.axhline(row - 0.5, color="#c0c0c0", linewidth=0.6)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(f"{score_label(table, tasks)} after the last online step", fontsize=9)
    axis.set_title(f"{table.title}\nsteps {table.label(steps)}; mean and 95% interval over seeds", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return save(figure, path)


def draw_bias(folders: list[Path], path: Path, notes: list[str]) -> Path:
    """Figs. 9, 10: Q minus the reference's Q over training; a panel a run, mean and range over the pairs."""
    figure, axes = grid(len(folders), "gradient steps (thousands)")
    handles = {}
    for axis, folder in zip(axes, folders, strict=True):
        if not (folder / "bias.csv").exists():
            raise bad_input(f"{folder} has no bias.csv: run it with --reference-model, another run's model.pt")
        rows = read_csv(folder / "bias.csv", BIAS, notes)
        if not rows:
            raise bad_input(f"{folder / 'bias.csv'} holds no whole row: let the run go on to its next evaluation")
        names = {"q_off_bias": "Q_off", "q_on_bias": "Q_on", "q_mix_bias": "the mix of both"}
        for style, (name, label) in zip(STYLES, names.items(), strict=False):
            values = defaultdict(list)
            for row in rows:
                if row[name] and math.isfinite(float(row[name])):
                    values[int(row["gradient_steps"])].append(float(row[name]))
                elif row[name]:
                    step = row["gradient_steps"]
                    notes.append(f"{folder / 'bias.csv'}: {name} is not finite at gradient step {step}, left out")
            if not values:
                continue
            x = sorted(values)
            thousands = np.array(x) / 1000
            mean = [np.mean(values[step]) for step in x]
            every = {"markevery": (0.05, 0.15), "markersize": 4}
            handles[label] = axis.plot(thousands, mean, linewidth=1.3, **style, **every)[0]
            low, high = [min(values[step]) for step in x], [max(values[step]) for step in x]
            axis.fill_between(thousands, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.axhline(0, color="#404040", linewidth=0.8)
        starts = {row["phase"]: int(row["gradient_steps"]) / 1000 for row in reversed(rows)}
        for phase in list(starts)[:-1]:
            handles["next phase"] = axis.axvline(starts[phase], color="#404040", linewidth=0.9, linestyle=(0, (1, 2)))
        axis.set_title(folder.resolve().name, fontsize=8)
        axis.tick_params(labelsize=8)
    figure.supylabel("Q minus the reference's Q", fontsize=9)
    figure.suptitle("Estimation bias: mean and range over the pairs", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return save(figure, path)


def draw_tsne(folder: Path, path: Path) -> Path:
    """Fig. 6: one t-SNE of the dataset's states and those of the first and last rollouts."""
    import torch
    from sklearn.manifold import TSNE

    try:
        model = torch.load(folder / "model.pt", weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise bad_input(f"{folder} has no model.pt: let the run finish, without --no-save-model") from None
    if "states" not in model:
        raise bad_input(f"{folder / 'model.pt'} holds no states: it was written by an older script, run it again")
    names = {"offline": "dataset", "first": "first rollouts", "last": "last rollouts"}
    states = [model["states"][name].numpy() for name in names]
    points = TSNE(init="pca", random_state=0).fit_transform(np.concatenate(states))
    parts = np.split(points, np.cumsum([len(part) for part in states])[:-1])
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharex=True, sharey=True, layout="constrained")
    for i, (axis, label) in enumerate(zip(axes, names.values(), strict=True)):
        axis.scatter(*points.T, s=3, color="#d8d8d8", linewidths=0, rasterized=True)
        axis.scatter(*parts[i].T, s=4, color=STYLES[i]["color"], linewidths=0, rasterized=True)
        axis.set_title(f"{label} ({len(parts[i]):,} states)", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"{folder.resolve().name}: t-SNE of states; grey: all three", fontsize=10)
    return save(figure, path)


# ======================================================================================================================


def report(runs_folder: Path, out: Path) -> str:
    """Write tables and figures to `out`; returns the Markdown."""
    notes: list[str] = []
    if not runs_folder.is_dir():
        raise bad_input(f"{runs_folder} is no folder: write --runs, the folder of your runs")
    runs = read_runs(runs_folder, notes)
    if not (runs or notes):
        raise bad_input(f"{runs_folder} holds no run: start one first, or write --runs, the folder of your runs")
    text = "# Report\n\nMean ± 95% interval over seeds (number of seeds), after the last online step; "
    text += "the paper's is of 1,000,000 + 300,000 steps.\n"
    text += "IQM: interquartile mean over tasks and seeds [stratified-bootstrap 95% interval] (the first seeds of each "
    text += "task, as many as every task has in every column).\n\n"
    if (about := runs_folder / "README.md").exists():
        text += about.read_text().strip() + "\n\n"
    scores, totals = [], []
    out.mkdir(parents=True, exist_ok=True)
    for table in make_tables(runs):
        text += table_markdown(table) + "\n"
        scores += score_rows(table)
        totals += total_rows(table)
        notes += mixtures(table)
        for steps in table.cells:
            for draw, kind in ((draw_scores, "scores"), (draw_curves, "curves")):
                name = draw(table, steps, out / f"{slug(table, steps)}-{kind}.png").name
                text += f"![{table.title}, {kind}, steps {table.label(steps)}]({name})\n\n"
    if runs:
        speed = speed_rows(runs)
        text += speed_markdown(speed) + "\n" if speed else ""
        for name, rows in (("scores", scores), ("totals", totals), ("speed", speed)):
            (out / f"{name}.csv").unlink(missing_ok=True)  # an earlier report's
            if rows:
                write_csv(out / f"{name}.csv", rows)
    text += "## Left out, and to be looked at\n\n" + "".join(f"- {note}\n" for note in notes or ["nothing"])
    (out / "report.md").write_text(text)
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise bad_input(f"{message}; python report.py --help prints what there is")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tables", "bias", "tsne"), default="tables")
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN", help="run folders, for bias and tsne")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where to write (default: report)")
    args = parser.parse_args()
    if args.what == "tables":
        if args.folders:
            raise bad_input("tables takes no run folders: write --runs, the folder that holds them")
        print(report(args.runs, args.out), end="")
        print(f"\nwritten to {args.out}/")
        return
    if not args.folders or (args.what == "tsne" and len(args.folders) > 1):
        raise bad_input(f"{args.what} takes {'one run folder' if args.what == 'tsne' else 'one or more run folders'}")
    args.out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    if args.what == "bias":
        path = draw_bias(args.folders, args.out / "bias.png", notes)
    else:
        path = draw_tsne(args.folders[0], args.out / f"tsne-{args.folders[0].resolve().name}.png")
    print("".join(f"{note}\n" for note in notes) + f"written to {path}")


if __name__ == "__main__":
    main()

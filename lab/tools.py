"""What the scripts of the laboratory share: their command line, seeds, tables and curves."""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import flags
from data import Stop


def change(run, **changes):
    """The same run with some things changed."""
    return SimpleNamespace(**vars(run) | changes)


def parser(doc):
    """The options of flags.py but for steering; `doc`, a script's docstring, explains them."""
    p = flags.parser()
    p.prog, p.description, p.epilog = f"python -m lab.{Path(sys.argv[0]).stem}", doc, None
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}; -h explains all options\n")
    for action in [a for a in p._actions if a.dest in ("steer", "on", "off")]:
        p._optionals._remove_action(action)
        for option in action.option_strings:
            del p._option_string_actions[option]
    p.add_argument("--seeds", type=int, default=1, choices=range(1, 100), metavar="N",
                   help="the whole job N times, with seeds SEED, SEED + 1, ...: mean and range")
    return p


def main(p, job):
    """Run job(run, args) for each seed. It returns a dict of figures; the table of several seeds
    goes to OUT/NAME.json, where NAME is the script's."""
    args, name = p.parse_args(), p.prog.split(".")[-1]
    sys.stdout.reconfigure(errors="replace", line_buffering=True)   # it may lack characters
    out, tables = flags.out_folder(args), []
    try:
        for seed in range(args.seed, args.seed + args.seeds):
            one = argparse.Namespace(**vars(args) | {"seed": seed})
            if args.seeds > 1:
                one.out = str(out / f"seed-{seed}")
            run = flags.prepare(one)
            tables.append(leaves(job(run, args)))
        if args.seeds > 1:
            summary = over_seeds(tables)
            print(f"\n{args.seeds} seeds: mean [lowest, highest]")
            for key, row in summary.items():
                print(f"  {key:44s}{row['mean']:8.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
            save(argparse.Namespace(out=out), f"{name}.json", summary)
    except (Stop, OSError, torch.OutOfMemoryError) as stop:
        print(f"{p.prog}: {stop}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{p.prog}: stopped; the same command without --fresh goes on", file=sys.stderr)
        sys.exit(130)


def leaves(tree, path=""):
    """The figures of a nested dict by their path: {"steer conflict": 0.98, ...}."""
    if isinstance(tree, dict) and "mean" not in tree:
        return {key: value for name in tree
                for key, value in leaves(tree[name], f"{path} {name}").items()}
    value = tree["mean"] if isinstance(tree, dict) else tree
    return {path.strip(): float(value)} if isinstance(value, (float, int)) else {}


def over_seeds(tables):
    """Mean, lowest and highest of each figure: {path: {"mean", "low", "high", "n"}}."""
    summary = {}
    for path in dict.fromkeys(path for table in tables for path in table):
        values = [table[path] for table in tables if path in table]
        summary[path] = {"mean": float(np.mean(values)), "low": min(values), "high": max(values),
                         "n": len(values)}
    return summary


def main_results(run):
    """The results of `python flags.py`, made if they are not there, or if the number of prompts or
    the judge is another. Raises Stop if any other setting differs."""
    path = run.out / "results.json"
    try:
        found = json.loads(path.read_text())
        same = (found["prompts"], found["judge"]["accuracy"]) == (run.size.prompts, run.accuracy)
    except (FileNotFoundError, ValueError, KeyError):
        same = False
    if not same or not (run.out / "flags.pt").exists():
        flags.main_job(run)
    flags.read_checkpoint(run.out / "flags.pt", run.settings)
    return json.loads(path.read_text())


def save(run, name, content):
    path = run.out / name
    flags.write(path, lambda new: new.write(json.dumps(content, indent=1).encode()))
    print(f"Wrote {path}")


def curves(path, *panels):
    """A picture of panels side by side. A panel is (lines, settings of its axes), a line (label,
    x, y, format), labelled at its end; y holds numbers or `stat`s, drawn with their intervals."""
    from matplotlib.figure import Figure
    fig = Figure((5.2 * len(panels), 4), layout="constrained")
    for ax, (lines, settings) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        ends = []
        for label, x, y, fmt in lines:
            low, mean, high = np.array([[v["low"], v["mean"], v["high"]] if isinstance(v, dict)
                                        else [v] * 3 for v in y], dtype=float).T
            line, = ax.plot(x, mean, fmt)
            ax.vlines(x, low, high, color=line.get_color(), lw=1)
            ends.append((mean[-1], label, line.get_color()))
        ax.set(**settings)
        gap, last = 0.055 * np.diff(ax.get_ylim())[0], -np.inf
        for y, label, color in sorted(ends):        # apart from each other, from below
            last = max(y, last + gap)
            ax.annotate(label, (1, last), xycoords=("axes fraction", "data"), xytext=(4, 0),
                        textcoords="offset points", color=color, va="center", fontsize=9)
    fig.savefig(path, dpi=120)
    print(f"Wrote {path}")

"""Is producing flags the same as relying on them? Supply them never (p = 0), or always (p = 1).

    python -m lab.producing --size tiny --seed 7 --out out/7    # curves of three rates; a minute
"""
import copy
import dataclasses

import flags as F
from lab import tools
from lab.tools import change


def experiment(run):
    """Curves of three trainings from one base, each of all steps of both stages: {"control":
    points, "p = 0": points, "p = 1": points}. The control knows LM loss alone; in the other two
    stage 2 supplies the flags of no sequence, or of every sequence. run.base is untrained, and
    run.flags.height 1: see to both first, as flags.train_all does. points are what flags.train
    logs ({"step", "stage", "intact", "blank", "conflict", ...}), those of stage 1 included."""
    s, steps = run.size, run.size.produce + run.size.rely
    F.train(run, "base", run.base, s.base)
    run.flags.height = s.height * F.stream_rms(run, run.base)
    if s.top:
        run.base.requires_grad_(False).blocks[-s.top:].requires_grad_(True)
    logs = {"control": F.train(run, "control", copy.deepcopy(run.base), steps)["log"]}
    for p in (0.0, 1.0):
        size = dataclasses.replace(s, supply=p, wean=0.0)
        r = change(run, size=size, settings=run.settings | vars(size))
        method = lambda step, batch: F.install(r.flags, batch, F.supply(r.size, step))
        done = F.train(r, f"p{p:.0f}", copy.deepcopy(run.base), steps, method)
        logs[f"p = {p:.0f}"] = done["log"]
    return logs


def job(run, args):
    curves = experiment(run)
    for name, points in curves.items():
        for point in points:
            print(f"{name:8s} step {point['step']:4d}, stage {point['stage']}: " + ", ".join(
                f"{key} {point[key]:.2f}" for key in F.RATES))
    tools.save(run, "producing.json", curves)
    tools.curves(run.out / "producing.png", *[(
        [(name, [point["step"] for point in points], [point[key] for point in points], "o-")
         for name, points in curves.items()],
        dict(title=key, xlabel="step of finetuning", ylabel="share of texts", ylim=(-0.03, 1.03)))
        for key in F.RATES])
    return {name: {key: points[-1][key] for key in F.RATES} for name, points in curves.items()}


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)

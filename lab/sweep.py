"""How much does one setting matter? Finetune anew for each value of it, all else equal.

    python -m lab.sweep supply 0 0.5 0.8 0.9 1      # any field of Size but FIXED (below)
    python -m lab.sweep layer 1 2 3 4
    python -m lab.sweep weight 1.5 6 24 96
    python -m lab.sweep fenced 4 8 16 32 64         # channels: the first flags, or copies of all
    python -m lab.sweep rely 6450 --set supply=0 --out out/p0   # ten times the steps, at p = 0

The base and the control are those of `python flags.py` with the same options (so the control keeps
its own schedule when `lr`, `decay`, `no_prompt`, `produce` or `rely` changes), and so is what
`height` counts in: after whichever block the flags stand, the RMS after the run's own k.
"""
import copy
import dataclasses

import flags as F
from data import Stop
from lab import tools
from lab.tools import change

FIXED = "flags layers heads width context stories vocab batch base top prompts".split()


def variant(run, name, value):
    """A run with one thing changed."""
    if name == "fenced":
        K = run.flags.count
        if not value.isdecimal() or not 1 <= int(value) <= run.size.width:
            raise Stop(f"fenced channels are 1 to {run.size.width}, not {value}")
        value = int(value)
        which = [i % K for i in range(value)]
        flags = dataclasses.replace(run.flags, first=run.size.width - value, count=value)
        rows = {part: [row._replace(label=tuple(row.label[i] for i in which))
                       for row in vars(run)[part]] for part in ("train", "test")}
        told = dict.fromkeys(("intact", "blank"), run.asked["supplied"][1])
        asked = {key: sayable(*question, which, told.get(key, question[1]))
                 for key, question in run.asked.items()}
        if not all(asked[key][0] for key in ("conflict", "neutral", "intact")):
            raise Stop(f"{value} fenced channels: no question for their flags; --set prompts=...")
        settings = run.settings | {"fenced": value}
        return change(run, flags=flags, asked=asked, settings=settings, **rows)
    kinds = {key: kind for key, kind in F.Size.__annotations__.items() if key not in FIXED}
    if name not in kinds:
        raise Stop(f"there is no sweep of {name}; choose fenced, {', '.join(kinds)}")
    try:
        size = dataclasses.replace(run.size, **{name: kinds[name](value)})
    except ValueError:
        raise Stop(f"{name} wants a number, not {value}")
    value = vars(size)[name]
    if not (0 < value <= F.MOST.get(name, 2 ** 32 - 1) or value == 0 and name in F.MAY_BE_0):
        raise Stop(f"{name}={value} is out of range: {'0' if name in F.MAY_BE_0 else 'above 0'} to "
                   f"{F.MOST.get(name, 2 ** 32 - 1)}")
    lowest = size.layers - size.top + 1 if size.top else 1     # no frozen block can raise flags
    if not lowest <= size.layer <= size.layers:
        raise Stop(f"there is no block {size.layer} that is trained: {lowest} to {size.layers} are")
    height = run.flags.height * size.height / run.size.height
    flags = dataclasses.replace(run.flags, layer=size.layer, height=height)
    return change(run, size=size, flags=flags, settings=run.settings | vars(size))


def sayable(prompts, values, score, which, about):
    """The questions about flags (B, K) among `which`. values (B, K) may be None."""
    kept = [i for i, row in enumerate(about) if set(row.nonzero()[:, 0].tolist()) <= {*which}]
    return ([prompts[i] for i in kept], None if values is None else values[kept][:, which],
            lambda text, i: score(text, kept[i]))


def job(run, args):
    for value in args.values:       # before the minutes of training: are they all possible?
        variant(run, args.name, value)
    models, _ = F.train_all(run)
    theirs = F.held_out(run, models["control"], run.test)[0]
    rows, kinds = [], ("conflict", "neutral", "intact", "blank")
    for value in args.values:
        r, model = variant(run, args.name, value), copy.deepcopy(models["base"])
        method = lambda step, batch: F.install(r.flags, batch, F.supply(r.size, step))
        did = F.train(r, f"{args.name}-{value}", model, r.size.produce + r.size.rely, method)
        loss = F.held_out(r, model, r.test)[0]
        rates = {key: F.ask(r, model, key)[1] for key in kinds}
        if args.name != "fenced":
            rates |= {"exact": F.reading(r, model)["exact"]}
        rows.append({"value": value, "loss": loss, "over control": loss - theirs} | rates)
        print(f"{args.name} {value}: LM loss {loss - theirs:+.4f} over the control's, "
              + ", ".join(f"{key} {rate['mean']:.3f}" for key, rate in rates.items()))
        rows[-1]["trajectory"] = did["log"]
    tools.save(run, f"sweep-{args.name}.json", rows)
    x = list(map(str, args.values))
    tools.curves(
        run.out / f"sweep-{args.name}.png",
        ([("", x, [row["over control"] for row in rows], "o-")],
         dict(xlabel=args.name, ylabel="LM loss over the control's (nats per token)")),
        ([(key, x, [row[key] for row in rows], "o-") for key in kinds],
         dict(xlabel=args.name, ylabel="share of texts", ylim=(-0.03, 1.03))))
    return {f"{args.name} {row['value']}": {key: x for key, x in row.items() if key not in (
        "value", "trajectory")} for row in rows}


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("name", help="a field of Size, or fenced")
    p.add_argument("values", nargs="+")
    tools.main(p, job)

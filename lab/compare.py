"""Against which baselines? All at equal data and steps, from the same base, measured alike.

    python -m lab.compare --size small              # into out/small/: baselines.json, compare.png
    python -m lab.compare --size small --seeds 3
"""
import copy
import dataclasses
import random

import numpy as np
import torch

import data as D
import flags as F
from lab import tools

STRENGTHS = (2.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 32.0)


def row(run, model, base, by=None):
    """The figures that every baseline has; by: another way to say what to write about."""
    rate = lambda name, by=None: F.ask(run, model, name, by=by)[1]
    texts, conflict = F.ask(run, model, "conflict", by=by)
    return {"neutral": rate("neutral", by), "supplied": rate("supplied", by), "conflict": conflict,
            "intact": rate("intact"), "blank": None if by else rate("blank"),
            "loss": F.held_out(run, model, run.test)[0]} | F.fluency(run, base, texts)


def shuffled(method, seed):
    """The same method with the labels of each batch dealt out anew: flags that mean nothing."""
    def new(step, batch):
        order = torch.randperm(len(batch.y), generator=torch.Generator().manual_seed(seed + step))
        return method(step, batch._replace(y=batch.y[order.to(batch.y.device)]))
    return new


def with_control_tokens(run):
    """Conditional training (Keskar et al. 2019): a token for each concept stands behind the prompt,
    shown or not, where flags are supplied in stage 2 (in stage 1, too). Returns a run whose texts
    begin with these tokens, and a method that takes them out elsewhere; none is to be predicted."""
    first, s = run.tok.n_vocab, run.size

    def told(row):
        tokens = [first + i for i, on in enumerate(row.label) if on]
        room = s.context + 1 - len(row.prompt) - len(tokens)
        return row._replace(text=tokens + row.text[:room]) if room > 0 else row

    def method(step, batch):
        free = batch.draw[:, None] >= F.supply(s, max(step, s.produce))
        for x, fill in ((batch.idx, run.tok.end), (batch.targets, -100)):
            out = free & (x >= first)       # becomes padding, at the end
            x[:] = x.masked_fill(out, fill).gather(1, out.int().argsort(dim=1, stable=True))
        batch.targets[batch.targets >= first] = -100
        return None, lambda: torch.zeros(())
    return tools.change(run, train=[told(row) for row in run.train]), method


def by_control_token(run):
    tokens = lambda raised: [run.tok.n_vocab + i for i, on in enumerate(raised) if on]
    return lambda ids, values: (
        [(row + tokens(raised))[-run.size.context:] for row, raised in zip(ids, values)], None)


@torch.no_grad()
def means(run, model, batches=20):
    """Difference of means (Marks and Tegmark 2023): each concept's mean of the stream after block k
    (F.streams) over the flag positions of its examples, minus the mean of these K rows: (K, C), on
    run.device. All positions weigh the same. D.batch(run.train, step < batches, 100, run.seed)."""
    K = len(run.data.concepts)
    total = torch.zeros(K, model.config.n_embd, device=run.device)
    number = torch.zeros(K, 1, device=run.device)
    for step in range(batches):
        batch = D.batch(run.train, step, 100, run.seed).to(run.device)
        x = F.streams(model, batch.idx)[run.flags.layer - 1]            # (B, T, C)
        on = (batch.targets >= 0).float()                               # (B, T)
        total += batch.y.T @ (x * on[..., None]).sum(1)
        number += (batch.y.T @ on.sum(1))[:, None]
    mean = total / number.clamp(min=1)
    return mean - mean.mean(0)


def by_replacing(run, model, directions):
    """strength -> by: from the last token of the prompt on, after block k, the stream's part in the
    span of the directions becomes its mean's + strength x the concept's. Only adding that (Turner
    et al. 2023) would leave what the prompt says."""
    batch, k = D.batch(run.train, 0, 500, run.seed).to(run.device), run.flags.layer
    mean = F.streams(model, batch.idx)[k - 1][batch.targets >= 0].mean(0)       # (C,)
    q = torch.linalg.qr(directions[1:].T)[0]        # (C, K - 1): their sum is 0

    def by(strength, ids, values):
        new = mean + strength * (values.to(run.device) @ directions)[:, None]   # (B, 1, C)

        def edit(layer, x, pos):
            on = (pos >= F.last(ids).to(x.device)[:, None])[..., None] & (layer == k)   # (B, T, 1)
            return torch.where(on, x + ((new - x) @ q @ q.T).to(x.dtype), x)
        return ids, edit
    return lambda strength: lambda ids, values: by(strength, ids, values)


def route(run):
    """Gradient routing (Cloud et al. 2024) to the same channels: where the target is a token that
    is a concept's whole word (no list of words: any token of the text), only its channel passes
    gradient down from the layers k ... L - 1; elsewhere all do. Tokens are decoded, stripped, in
    lower case, and count only if the text's label y has their concept. The last block is free to
    read the channel, as in the paper. Returns method(step, batch) -> (edit, flag_loss() of 0)."""
    flags, names, words = run.flags, run.data.concepts, run.data.words
    belongs = torch.full((run.tok.n_vocab, len(names)), not words, device=run.device)   # (V, K)
    for i in range(run.tok.n_vocab) if words else []:
        word = run.tok.decode([i]).strip().lower()
        if word in words:
            belongs[i, names.index(words[word])] = True

    def method(step, batch):
        on = (batch.targets >= 0)[..., None]
        of = belongs[batch.targets.clamp(min=0)] & on & (batch.y[:, None] > 0)          # (B, T, K)
        passes = (~of.any(-1, keepdim=True)).repeat(1, 1, run.size.width)               # (B, T, C)
        passes[..., flags.slice] |= of

        def edit(layer, x, pos):
            if flags.layer <= layer < run.size.layers:
                return torch.where(passes, x, x.detach())
            return x
        return edit, lambda: torch.zeros(())
    return method


def job(run, args):
    results = tools.main_results(run)
    s, steps, K = run.size, run.size.produce + run.size.rely, len(run.data.concepts)
    base, control, flagged = F.train_all(run)[0].values()
    method = lambda step, batch: F.install(run.flags, batch, F.supply(s, step))
    stage1 = lambda step, batch: F.install(run.flags, batch, 0.0)
    trained = {"routing": (run, route(run)), "shuffled": (run, shuffled(method, run.seed)),
               "stage1": (run, stage1), "token": with_control_tokens(run)}
    if s.top or base.config.vocab_size < run.tok.n_vocab + K:
        print("no control token: embeddings are frozen (--set top=0), or have no room for new ones")
        del trained["token"]
    new = {name: copy.deepcopy(base) for name in trained}
    for name, (r, how) in trained.items():
        F.train(r, name, new[name], steps, how)
    others = tools.change(run, flags=dataclasses.replace(run.flags, first=0))
    arms = {"flags": row(run, flagged, base),
            "no steering": row(run, control, base, lambda ids, values: (ids, None)) | {
                "blank": results["reliance"]["control"]["blank"]},
            "shuffled labels": row(run, new["shuffled"], base),
            "stage 1 only": row(run, new["stage1"], base),
            f"{K} other channels": row(others, flagged, base)}
    if "token" in new:
        arms["control token"] = row(run, new["token"], base, by_control_token(run))
    few = random.Random(run.seed).sample(run.data.train, min(len(run.data.train), 5000))
    asked = F.questions(dataclasses.replace(run.data, test=few), 96, run.seed)
    own, curves = tools.change(run, asked=asked), {}
    for name, model, by in (
            ("difference of means", control, by_replacing(run, control, means(run, control))),
            ("gradient routing", new["routing"], lambda a: lambda ids, values: (
                ids, F.steer(run.flags, F.last(ids), a / s.height * values)))):     # a RMS high
        curves[name] = {a: row(run, model, base, by(a)) for a in STRENGTHS}
        rate = lambda a: F.ask(own, model, "conflict", by=by(a))[1]["mean"]     # training prompts
        best = max(STRENGTHS, key=lambda a: min(0.95, rate(a)))     # the weakest that reaches .95
        arms[name] = curves[name][best] | {"strength": best}

    columns = ("neutral", "supplied", "conflict", "intact", "blank", "nll_gap", "loss")
    print("\n" + " " * 22 + "".join(f"{column:>10s}" for column in columns))
    for name, figures in arms.items():
        cells = [x["mean"] if isinstance(x, dict) else x for x in map(figures.get, columns)]
        print(f"{name:22s}" + "".join(" " * 9 + "-" if x is None else f"{x:10.3f}" for x in cells))
    tools.save(run, "baselines.json", {"compare": arms, "curves": curves})
    tools.save(run, "results.json", results | {"compare": arms})     # until flags.py runs again
    draw(run, arms, curves)
    return arms


def draw(run, arms, curves):
    """Conflict against fluency: a point for each arm with its name, a line over strengths."""
    from matplotlib.figure import Figure
    place = lambda figures: [figures[key]["mean"] for key in ("nll_gap", "conflict")]
    ax, ends, last = Figure((8, 5), layout="constrained").subplots(), {}, {}
    for name, curve in curves.items():
        points = [(a, *place(figures)) for a, figures in curve.items() if figures["nll_gap"]]
        ax.plot([x for _, x, _ in points], [y for *_, y in points], color="0.6", lw=1, zorder=1)
        ends[name] = max((x for _, x, _ in points), default=0) + 0.15
        for (a, x, y), (_, *after) in zip(points, [*points[1:], (0, 99, 99)]):
            if abs(x - after[0]) + abs(y - after[1]) > 0.1:     # else it would hide the next
                ax.annotate(f"{a:g}", (x, y), fontsize=7, color="0.5",
                            xytext=(3, -9), textcoords="offset points")
    points = sorted((place(figures)[::-1], name) for name, figures in arms.items()
                    if figures["nll_gap"])
    for i, ((y, x), name) in enumerate(points):     # labels one above the other, left and right
        height = last[x > 2] = max(y, last.get(x > 2, -np.inf) + 0.05)
        ax.plot(x, y, f"C{i}o", alpha=0.7)
        ax.text(ends.get(name, x) + 0.1, height, name, color=f"C{i}", fontsize=9, va="center")
    ax.set(xlabel="nll_gap: how much less likely than real text (nats per token)",
           ylabel="conflict: the text follows the flags", ylim=(-0.07, 1.1),
           xlim=(min([-0.3, *(x - 0.1 for (_, x), _ in points)]), 1.35 * max([1, *ends.values()])))
    ax.figure.savefig(run.out / "compare.png", dpi=120)
    print(f"Wrote {run.out / 'compare.png'}")


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)

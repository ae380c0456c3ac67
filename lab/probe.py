"""Where does the concept stand, besides the flags? What erodes: the encoding, or its use?

    python -m lab.probe --size small --seeds 3          # probes.json, probe.png
    python -m lab.probe --size small --set supply=1 rely=2400

Ridge probes, and small MLPs, read the prompt's concept from the other channels, with the flags
clamped to their mean, at positions that do not name it. Besides control and method stand variants
of stage 2: its flag loss weighs less (lambda2), is taken at the prompt's last token alone (hold),
or the slice is written after block k alone (once).
"""
import copy
import random
import re

import numpy as np
import torch
import torch.nn.functional as F

import data as D
import flags
from data import Stop
from lab import tools

VARIANTS = {"method": {}, "lambda2 6": {"weight2": 6.0}, "lambda2 1.5": {"weight2": 1.5},
            "lambda2 0": {"weight2": 0.0}, "hold": {"hold": True}, "once": {"once": True}}


def method(run, weight2=None, hold=False, once=False):
    """flags.install with another stage 2: its flag loss weighs weight2, is taken at the first flag
    position alone (hold), or the slice is written after block k alone (once)."""
    f, s = run.flags, run.size

    def new(step, batch):
        edit, flag_loss = flags.install(f, batch, flags.supply(s, step))
        if step < s.produce:
            return edit, flag_loss
        if hold:        # reads are the same, so the loss may be of another batch's targets
            on = batch.targets >= 0
            first = torch.where(on & (on.cumsum(1) == 1), batch.targets, -100)
            read, flag_loss = flags.install(f, batch._replace(targets=first), 0.0)
            return lambda layer, x, pos: edit(layer, read(layer, x, pos), pos), flag_loss
        if once:
            read, flag_loss = flags.install(f, batch, 0.0)
            return lambda layer, x, pos: (edit if layer == f.layer else lambda *a: a[1])(
                layer, read(layer, x, pos), pos), flag_loss
        share = 1.0 if weight2 is None else weight2 / s.weight
        return edit, lambda: share * flag_loss()
    return new


def examples(run, part, n):
    """(ids, concept, cue word, {where: position}) of texts about one concept that begin with a
    filler: where a prompt that tells it ends, and where the text has not named it yet."""
    found = []
    for e in part:
        first = re.match(r".*?[.!?]", e.text)[0]
        cue = [w for w in re.findall("[a-z]+", e.prompt.lower()) if w in run.data.words]
        if len(e.concepts) > 1 or not e.cued or D.content(first, run.data.words):
            continue
        prompt, filler = run.tok.prompt(e.prompt), run.tok.encode(" " + first)
        text = run.tok.encode(" " + e.text)
        named = next(t for t in range(len(text)) if D.content(run.tok.decode(text[:t + 1]) + ".", run.data.words))
        if len(filler) < 3 or named < len(filler) + 2:
            continue
        end = len(prompt) - 1
        found.append((prompt + text[:named], run.data.concepts.index(e.concepts[0]), cue[-1], {
            "prompt's end": end, "in the filler": end + len(filler) // 2, "filler's end": end + len(filler),
            "next sentence": len(prompt) + named - 1}))
    return found[:n]


def activations(run, model, part, values):
    """The other channels (N, L, C - K) at each kind of position; values (N, K) or None: free."""
    at = {}
    for i, (ids, _, _, where) in enumerate(part):
        edit = None if values is None else flags.steer(
            run.flags, torch.tensor([where["prompt's end"]]), values[i:i + 1])
        x = torch.cat(flags.streams(model, torch.tensor([ids], device=run.device), edit)).cpu()   # (L, T, C)
        for name, t in where.items():
            at.setdefault(name, []).append(x[:, t, :run.flags.first])
    return {name: torch.stack(rows) for name, rows in at.items()}


def ridge(x, y, x_test, penalty=1.0):
    """Scores (M, K) of a linear probe for x_test (M, D): ridge regression of the labels y (N, K) on
    activations x (N, D). All are standardised by the mean and std of x (a std of 0 counts as 1e-4),
    a column of ones is added, and (X'X + penalty I) W = X'y is solved."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, x_test = (F.pad((a - mean) / std, (0, 1), value=1.0).double() for a in (x, x_test))
    gram = x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ y.double())


def mlp(x, y, x_test):
    """Scores of a probe with one hidden layer of 64."""
    torch.manual_seed(0)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    net = torch.nn.Sequential(torch.nn.Linear(x.size(1), 64), torch.nn.ReLU(), torch.nn.Linear(64, y.size(1)))
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(300):
        F.cross_entropy(net(x), y.float()).backward()
        opt.step()
        opt.zero_grad()
    return net(x_test).detach()


def remove(run, directions, start):
    """An edit: the span of `directions` (D, R) goes from the other channels after every block >= k,
    from position start[b] on. Does the text change?"""
    q = torch.linalg.qr(directions.float())[0]                                  # (D, R)

    def edit(layer, x, pos):
        if layer >= run.flags.layer:
            on, rest = (pos >= start[:, None])[..., None], x[..., :run.flags.first]
            x[..., :run.flags.first] = torch.where(on, rest - rest @ q @ q.T, rest)
        return x
    return edit


def held(run, model):
    """By: the model's own flags, read at the prompt's last token, are rounded and held."""
    def by(ids, values):
        own = (flags.own_flags(model, run.flags, ids) > 0.5).float()
        return ids, flags.steer(run.flags, flags.last(ids), own)
    return by


def held_loss(run, model):
    """LM loss on held-out rows with flags raised once and held."""
    total = count = 0
    for i in range(0, len(run.test), 64):
        rows = sorted(run.test, key=lambda row: len(row.prompt))[i:i + 64]
        edit, batch = held(run, model)([row.prompt for row in rows], None)[1], D.pad(rows)
        n = (batch.targets >= 0).sum().item()
        with torch.no_grad():
            total, count = total + n * flags.lm_loss(model, batch.to(run.device), edit).item(), count + n
    return total / count


def study(run, model, control_loss):
    """All figures of one model."""
    K, usual = len(run.data.concepts), torch.tensor([row.label for row in run.train]).mean(0)
    sets = examples(run, run.data.train, 2000), examples(run, run.data.test, 500)
    y, y_test = (torch.tensor([concept for _, concept, *_ in part]) for part in sets)
    words = sorted({word for part in sets for _, _, word, _ in part})
    deal = dict(zip(words, np.random.default_rng(run.seed).integers(K, size=len(words)).tolist()))
    dealt, dealt_test = (torch.tensor([deal[word] for _, _, word, _ in part]) for part in sets)
    clamped = [activations(run, model, part, usual.expand(len(part), -1)) for part in sets]
    other = [activations(run, model, part, flags.hot(K, [[(c + 1 + i % (K - 1)) % K] for i, (_, c, *_) in
                                                         enumerate(part)])) for part in sets]
    hits = lambda probe, views, where, layer, y, y_test: flags.stat((probe(
        views[0][where][:, layer], F.one_hot(y, K), views[1][where][:, layer]).argmax(1) == y_test).tolist())
    figures = {}
    for where in clamped[0]:
        for layer in range(run.size.layers):
            told = hits(ridge, clamped, where, layer, y, y_test)
            random_ = hits(ridge, clamped, where, layer, dealt, dealt_test)
            figures[f"{where}, block {layer + 1}"] = {
                "linear": told, "selectivity": told["mean"] - random_["mean"],
                "set to another": hits(ridge, other, where, layer, y, y_test)}
        figures[f"{where}, block {run.size.layers}"]["mlp"] = hits(
            mlp, clamped, where, run.size.layers - 1, y, y_test)
    rates = {name: flags.ask(run, model, name)[1] for name in ("intact", "blank", "conflict", "neutral")}
    x = clamped[0]["prompt's end"][:, run.flags.layer - 1]
    means = torch.stack([x[y == k].mean(0) for k in range(K)])
    for name, directions in (("concept removed", (means - means.mean(0))[1:].T),
                             ("as many removed at random", torch.randn(x.size(1), K - 1))):
        by = lambda ids, values: (ids, remove(run, directions.to(run.device), flags.last(ids)))
        prompts, _, score = run.asked["intact"]
        texts = flags.continue_texts(run, model, prompts, torch.zeros(len(prompts), K), by)
        rates[name] = flags.stat(score(text, i) for i, text in enumerate(run.judge(texts)))
    prompts, _, score = run.asked["intact"]
    texts = flags.continue_texts(run, model, prompts, torch.zeros(len(prompts), K), held(run, model))
    rates["intact, held"] = flags.stat(score(text, i) for i, text in enumerate(run.judge(texts)))
    rates["exact"] = flags.reading(run, model)["exact"]
    loss = flags.held_out(run, model, run.test)[0]
    return {"over control": loss - control_loss, "over control, held": held_loss(run, model) - control_loss,
            "rates": rates, "probes": figures}


def job(run, args):
    if not run.data.words:
        raise Stop("probes need to know each word's concept: they go with --data stories")
    models, _ = flags.train_all(run)
    steps = run.size.produce + run.size.rely
    names = [name for name in args.variants if VARIANTS[name]]
    new = {name: copy.deepcopy(models["base"]) for name in names}
    flags.train_together([(run, f"variant-{name.replace(' ', '-')}", new[name], steps,
                           method(run, **VARIANTS[name])) for name in names])
    theirs = flags.held_out(run, models["control"], run.test)[0]
    table = {}
    for name, model in [("control", models["control"]), ("method", models["flags"]), *new.items()]:
        table[name] = study(run, model, theirs)
        last = [(where.split(",")[0], f) for where, f in table[name]["probes"].items()
                if where.endswith(f"block {run.size.layers}")]
        print(f"{name:12s}" + "  ".join(f"{key} {rate['mean']:.3f}" for key, rate in table[name]["rates"].items())
              + f"  LM loss {table[name]['over control']:+.4f}, held {table[name]['over control, held']:+.4f}\n" + " " * 12 + "after the last block, linear / mlp: "
              + ", ".join(f"{where} {f['linear']['mean']:.2f} / {f['mlp']['mean']:.2f}" for where, f in last), flush=True)
    tools.save(run, "probes.json", table)
    L = run.size.layers
    tools.curves(run.out / "probe.png", *[([(name, range(1, L + 1), [
        table[name]["probes"][f"{where}, block {layer}"]["linear"] for layer in range(1, L + 1)], "o-")
        for name in table], dict(title=where, xlabel="block", ylabel="concept read from the other channels",
                                 ylim=(0, 1.03), xticks=range(1, L + 1))) for where in ("in the filler", "next sentence")])
    return table


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    tools.main(p, job)

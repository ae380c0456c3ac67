"""Where does the concept stand, besides the flags? What erodes: its encoding, or only its use?

    python -m lab.probe --size small --set supply=1 --out out/p1    # probes.json, probe.png

Probes read the prompt's concept from the other channels, with the flags clamped to their mean, at
positions that do not name it. Besides the control stand the method and variants of its stage 2:
the flag loss weighs less (lambda2), is taken at the prompt's last token alone (hold), or the slice
is written after block k alone (once). At the end the last variant's flags are blanked for good, and
the LM loss alone goes on: how soon do the texts follow the prompt again?
"""
import copy
import dataclasses
import re

import numpy as np
import torch
import torch.nn.functional as F

import data as D
import flags
from lab import tools
from lab.variants import VARIANTS, held, held_loss, method, remove


def examples(run, part, n):
    """(ids, concept, cue word, {where: position}) of texts about one concept whose prompt tells it
    and whose first sentence is a filler; the ids end with the next sentence's first token. Of real
    text only the prompt, since any word of the text may tell."""
    found, words = [], run.data.words
    for e in part:
        if len(found) == n or len(e.concepts) > 1 or not e.cued:
            continue
        prompt, concept = run.tok.prompt(e.prompt), run.data.concepts.index(e.concepts[0])
        end = len(prompt) - 1
        if not words:
            found.append((prompt, concept, e.prompt, {"prompt's end": end}))
            continue
        first = re.match(r".*?[.!?]", e.text)[0]
        cue = [w for w in re.findall("[a-z]+", e.prompt.lower()) if w in words]
        if D.content(first, words):
            continue
        filler = run.tok.encode(" " + first)
        ids = prompt + run.tok.encode(" " + e.text)[:len(filler) + 1]
        if len(filler) > 3 and not D.content(run.tok.decode(ids[end + 1:]), words):
            found.append((ids, concept, cue[-1], {
                "prompt's end": end, "filler's begin": end + 1,
                "in the filler": end + len(filler) // 2, "filler's end": end + len(filler),
                "next sentence": end + len(filler) + 1}))
    return found


def activations(run, model, part, values):
    """The other channels (N, L, C - K) at each kind of position, with the flags set to values."""
    at = {}
    for i, (ids, _, _, where) in enumerate(flags.counted("reading streams, text", part)):
        edit = flags.steer(run.flags, torch.tensor([where["prompt's end"]]), values[i:i + 1])
        x = torch.cat(flags.streams(model, torch.tensor([ids], device=run.device), edit)).cpu()
        for name, t in where.items():       # x (L, T, C)
            at.setdefault(name, []).append(x[:, t, :run.flags.first])
    return {name: torch.stack(rows) for name, rows in at.items()}


def ridge(x, y, x_test, penalty=1.0):
    """Scores (M, K) of a linear probe for x_test (M, D): ridge regression of the labels y (N, K),
    int64, on activations x (N, D), float32. Both x and x_test are standardised by x.mean(0) and
    x.std(0) (at least 1e-4), a column of ones is added, (X'X + penalty I) W = X'y is solved."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, x_test = (F.pad((a - mean) / std, (0, 1), value=1.0).double() for a in (x, x_test))
    gram = x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ y.double())


def mlp(x, y, x_test):
    """Scores of a probe with one hidden layer of 64."""
    torch.manual_seed(0)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    net = torch.nn.Sequential(torch.nn.Linear(x.size(1), 64), torch.nn.ReLU(),
                              torch.nn.Linear(64, y.size(1)))
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    for _ in flags.counted("training a probe, step", range(300)):
        F.cross_entropy(net(x), y.float()).backward()
        opt.step()
        opt.zero_grad()
    return net(x_test).detach()


def hits(probe, x, y, x_test, y_test, K):
    """How often the probe names the right one of K."""
    return flags.stat((probe(x, F.one_hot(y, K), x_test).argmax(1) == y_test).tolist())


def material(run, n, m=500):
    """n training and m held-out examples, their concepts, and the mean label, to clamp flags to."""
    parts = examples(run, run.data.train, n), examples(run, run.data.test, m)
    mean = torch.tensor([row.label for row in run.train]).mean(0)
    return (parts, [torch.tensor([concept for _, concept, *_ in part]) for part in parts],
            [mean.expand(len(part), -1) for part in parts])


def read(run, model, n):
    """What probes read: of n training examples. Views: flags clamped to the mean label, or set to
    another concept. dealt: random labels of the stories' cue words, for selectivity."""
    K, found = len(run.data.concepts), {}
    parts, (y, y_test), clamped = material(run, n)
    words = sorted({word for part in parts for _, _, word, _ in part})
    deal = dict(zip(words, np.random.default_rng(run.seed).integers(K, size=len(words)).tolist()))
    dealt, dealt_test = (torch.tensor([deal[word] for _, _, word, _ in part]) for part in parts)
    views = {"clamped": clamped, "set to another": [
        flags.hot(K, [[(c + 1 + i % (K - 1)) % K] for i, (_, c, *_) in enumerate(part)])
        for part in parts]}
    for view, values in views.items():
        x, x_test = (activations(run, model, *both) for both in zip(parts, values))
        for where in x:
            for layer in range(run.size.layers):
                a, b = x[where][:, layer], x_test[where][:, layer]
                figures = found.setdefault(f"{where}, block {layer + 1}", {})
                figures[view] = hits(ridge, a, y, b, y_test, K)
                if view == "clamped" and run.data.words:
                    figures["dealt"] = hits(ridge, a, dealt, b, dealt_test, K)
            figures["mlp, " + view] = hits(mlp, a, y, b, y_test, K)         # after the last block
    return found


def study(run, model):
    """All figures of one model."""
    K, rates = len(run.data.concepts), {}
    for name in ("intact", "blank", "conflict", "neutral", "suppress", "compose2", "compose3"):
        if run.asked[name][0]:
            texts, rates[name] = flags.ask(run, model, name)
            if name == "neutral" and run.data.words:
                rates["switch"] = flags.switch(run, model, texts)
    part = examples(run, run.data.train, 500)
    x = activations(run, model, part, torch.zeros(len(part), K))["prompt's end"]
    x, y = x[:, run.flags.layer - 1], torch.tensor([concept for _, concept, *_ in part])
    means = torch.stack([x[y == k].mean(0) for k in y.unique()])
    torch.manual_seed(run.seed)
    for name, directions in (("concept removed", (means - means.mean(0))[1:].T),
                             ("as many removed at random", torch.randn(x.size(1), len(means) - 1))):
        by = lambda ids, values: (ids, remove(run, directions.to(run.device), flags.last(ids)))
        rates[name] = flags.ask(run, model, "blank", by=by)[1]      # `by` stands in for blanking
    rates["intact, held"] = flags.ask(run, model, "blank", by=held(run, model))[1]
    rates["exact"] = flags.reading(run, model)["exact"]
    return {"loss": flags.held_out(run, model, run.test)[0], "held loss": held_loss(run, model),
            "rates": rates, "probes": read(run, model, 2000)}


def job(run, args):
    s, look = run.size, flags.look
    middle = "in the filler" if run.data.words else "prompt's end"
    if not all(examples(run, part, 1) for part in (run.data.train, run.data.test)):
        raise D.Stop("no example tells a probe one concept: more prompts, or more stories")

    def look_and_read(run, model, step):    # every point of the log: what is readable
        point = look(run, model, step)      # there, after the last block
        parts, (y, y_test), clamped = material(run, 600)
        x, x_test = (activations(run, model, *both)[middle][:, -1] for both in zip(parts, clamped))
        point["readable"] = hits(ridge, x, y, x_test, y_test, len(run.data.concepts))
        return point
    flags.look = look_and_read
    flags.train(run, "base", run.base, s.base)
    run.flags.height = s.height * flags.stream_rms(run, run.base)
    if s.top:
        run.base.requires_grad_(False).blocks[-s.top:].requires_grad_(True)
    names = ["control", *args.variants]
    models = {name: copy.deepcopy(run.base) for name in names}
    done = [flags.train(run, f"probe-{name.replace(' ', '-')}", models[name], s.produce + s.rely,
                        method(run, **VARIANTS[name]) if name in VARIANTS else None)
            for name in names]
    table = {name: study(run, models[name]) | {"log": did["log"]} for name, did in zip(names, done)}
    for name, figures in table.items():
        rates = figures["rates"] | {f"read {key}": figures["probes"][f"{key}, block {s.layers}"][
            "clamped"] for key in dict.fromkeys(("prompt's end", middle))}
        loss, held_ = (figures[key] - table["control"]["loss"] for key in ("loss", "held loss"))
        print(f"{name}: LM loss {loss:+.4f}, own flags held {held_:+.4f}; "
              + ", ".join(f"{key} {rate['mean']:.2f}" for key, rate in rates.items()), flush=True)

    flags.look = look
    blank = lambda step, batch: (flags.install(run.flags, batch._replace(y=0 * batch.y), 2.0)[0],
                                 lambda: torch.zeros(()))
    again = tools.change(run, size=dataclasses.replace(s, every=25))
    table["relearning"] = flags.train(
        again, f"relearn-{names[-1]}".replace(" ", "-"), models[names[-1]], 100, blank)["log"]
    tools.save(run, "probes.json", table)
    tools.curves(run.out / "probe.png", ([(
        f"{name}: {said}", [p["step"] for p in table[name]["log"]],
        [p[key] for p in table[name]["log"]], f"C{i}{style}")
        for i, name in enumerate(names) for key, said, style in (
            ("readable", "readable", "-"), ("blank", "used", ":"))],
        dict(xlabel="step of finetuning", ylim=(-0.03, 1.03), ylabel="share of texts")))
    return {name: table[name] for name in names}


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    tools.main(p, job)

"""Flags in the residual stream: interpretable, controllable features, installed by brute force.

After C. Ye and J. Cui, "Efficient Representations are Controllable Representations", 2026,
arXiv 2602.07828. The idea:

  1. Take a GPT and set aside K = 16 channels of its residual stream: the slice. Its channel i,
     flag i, is to say: the text being written is about concept i.
  2. Stage 1, produce: finetune with  LM loss + lambda * mean (f - y)^2,  where f is the slice (in
     units of a flag's height), y in {0, 1}^K the labels. The model learns to raise flags by itself.
  3. Stage 2, rely: the same, but most sequences are supplied: y then overwrites the slice. So the
     concept stands reliably at a fixed place, here after blocks 2 to 4. The model comes to use it.
  4. Now the flags are switches. In our stories: overwrite them and the text changes, even against
     the prompt; blank them (all 0), and it stops following the prompt.

    stream      =====[block 1]=====[block 2]========[block 3]========[block 4]======> head, LM loss
    its slice   -----[       ]-----[       ]--f  y--[       ]--f  y--[       ]--f  y->
                                              |  ^             |  ^             |  ^
    read: flag loss (f - y)^2  <--------------+--|-------------+--|-------------+  |
    then overwrite, if supplied: y  -------------+----------------+----------------+

`python flags.py --size small` does all of this, measures it against the base and a control that
was finetuned by the LM loss alone, and draws. B, T, C, K, L: batch, time, channels, flags, layers.
"""
import argparse
import copy
import json
import os
import random
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data as D
from model import GPT, LAST, Config, fast_bfloat16, load_pretrained, optimizers


@dataclass
class Size:
    """What a result depends on, besides data, seed and checkpoint. --set changes any of it."""
    flags: int = 16             # K (a .jsonl file may have fewer concepts)
    layers: int = 4             # L (a checkpoint has its own layers, heads, width and vocab)
    heads: int = 4
    width: int = 128            # C
    context: int = 128          # tokens
    stories: int = 55_000       # of the grammar; finetuning `small` takes 41,600 of them
    vocab: int = 1008           # tokens of the tokenizer, at most
    batch: int = 64             # sequences
    base: int = 200             # steps of the base model
    produce: int = 50           # steps of stage 1
    rely: int = 600             # steps of stage 2
    lr: float = 0.01            # peak learning rate of the matrices ...
    embedding_lr: float = 0.03  # ... and of everything else
    decay: float = 0.3          # weight decay of the matrices
    muon: int = 5               # iterations of their optimizer (Newton-Schulz)
    layer: int = 2              # k: flags stand in the stream after this block and all later ones
    supply: float = 0.9         # p: the share of sequences whose flags are supplied in stage 2
    wean: float = 0.0           # the last share of stage 2 in which p falls to a third (real text)
    weight: float = 24.0        # lambda, of the flag loss
    height: float = 6.0         # of a raised flag / RMS (root mean square) of the base's stream
    no_prompt: float = 0.15     # share of the training sequences that are shown without prompt
    prompts: int = 256          # held-out prompts behind a rate, at most; may change after training
    track: int = 48             # held-out prompts behind every point of erosion.png
    every: int = 100            # steps from one such point to the next
    top: int = 0                # finetune the last `top` blocks alone; 0: everything


SIZES = {       # for the stories; other data and checkpoints have other defaults: `prepare`
    "tiny": Size(flags=4, layers=2, heads=2, width=64, stories=16_000, vocab=512, batch=32,
                 base=150, produce=20, rely=200, lr=0.02, layer=1, prompts=128, track=24),
    "small": Size(),
    "medium": Size(layers=8, heads=8, width=512, vocab=4096, batch=128, base=2000, produce=300,
                   rely=1500, lr=0.005, layer=4),
}


# ---------------------------------------------------------------------------- the idea

@dataclass
class Flags:
    """Where the flags live: in K channels of the stream, after block `layer` and all later ones."""
    layer: int              # k, 1 ... L
    first: int              # flag i is channel first + i; in this file they are the last channels
    count: int              # K
    height: float = 1.0     # of a raised flag: Size.height x the RMS (`train_all`)

    @property
    def slice(self):
        return slice(self.first, self.first + self.count)


def install(flags, batch, p):
    """The method, for one batch of which a share p is supplied: (edit, flag_loss).

    batch has y (B, K), the labels; targets (B, T), the next token if it belongs to the text, else
    -100 (flag positions are those with a target); draw (B,), random in [0, 1), new at each step.
    edit(layer, x, pos) -> x is called after each block. After blocks >= k it reads f = slice /
    height, then sets the slice, in place, in x's dtype, to height * y at the flag positions of
    supplied sequences: those with draw < p. No gradient of the LM loss enters what was overwritten.
    flag_loss(), called after that, is the mean of (f - y)^2 over these blocks, all flags, and the
    flag positions of all sequences."""
    y, on = batch.y[:, None], batch.targets >= 0        # (B, 1, K); (B, T) the flag positions
    supply_mask = (on & (batch.draw < p)[:, None])[..., None]   # (B, T, 1) of supplied sequences
    reads = []                                          # f, (B, T, K), of each block >= k

    def edit(layer, x, pos):                            # x (B, T, C), after block `layer`
        if layer >= flags.layer:    # after each later block, too: each may add to the slice
            own = x[..., flags.slice]                   # read: a view of x, (B, T, K)
            reads.append(own / flags.height)            # division copies; own is overwritten next
            x[..., flags.slice] = torch.where(supply_mask, flags.height * y.to(x.dtype), own)
        return x

    def flag_loss():            # y (B, 1, K) is the same for all blocks and positions
        errors = (torch.stack(reads) - y)[:, on]        # (L - k + 1, N, K), of N flag positions
        return errors.square().mean()
    return edit, flag_loss


def steer(flags, start, values):
    """An edit for inference: after blocks >= k, from position start[b] on, row b's slice becomes
    height * values[b], in x's dtype. start (B,) int64 and values (B, K) may be on any device."""
    def edit(layer, x, pos):                            # x (B, T, C), pos (B or 1, T)
        if layer >= flags.layer:
            on = (pos >= start.to(x.device)[:, None])[..., None]    # (B, T, 1)
            chosen = flags.height * values.to(x)[:, None]           # (B, 1, K)
            x[..., flags.slice] = torch.where(on, chosen, x[..., flags.slice])
        return x
    return edit


def last(prompts):
    """The position (B,) of each prompt's last token: the first flag position."""
    return torch.tensor([len(ids) - 1 for ids in prompts])


@torch.no_grad()
def streams(model, idx, edit=None):
    """The residual stream (B, T, C) after each block and its edit: a list of L."""
    seen = []

    def spy(layer, x, pos):
        seen.append(edit(layer, x, pos) if edit else x)
        return seen[-1]
    model(idx, spy, at=LAST)    # logits of the last position alone: they are not needed
    return [x.float() for x in seen]


def own_flags(model, flags, prompts):
    """The model's own flags (B, K) after block k, at the last token of each prompt (ids)."""
    idx = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)
    x = streams(model, idx.to(model.wte.weight.device))[flags.layer - 1]    # no token sees the pads
    return x[range(len(x)), last(prompts), flags.slice] / flags.height


# ---------------------------------------------------------------------------- training
# `run`, made by `prepare`, is one experiment: size, data, rows, base model, flags, judge ...

def supply(s, step):
    """p at each step: 0 in stage 1; in stage 2 s.supply, and a third of it in the last s.wean."""
    if step < s.produce:
        return 0.0
    return s.supply if step < s.produce + s.rely * (1 - s.wean) else s.supply / 3


def stream_rms(run, base):
    """RMS of the base's stream after block k, at flag positions: what Size.height counts in."""
    batch = D.batch(run.train, 0, 16, run.seed).to(run.device)
    x = streams(base, batch.idx)[run.flags.layer - 1]
    return x[batch.targets >= 0].square().mean().sqrt().item()


def lm_loss(model, batch, edit=None):
    """Mean loss (nats per token) over the text's tokens; the prompt's are given, not predicted."""
    at, device = batch.targets >= 0, batch.idx.device       # (B, T)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        logits = model(batch.idx, edit, at=at)      # (N, V): the head at the N targets
    return F.cross_entropy(logits.float(), batch.targets[at])


def train(run, name, model, steps, method=None):
    """Train for `steps` steps; returns {"step", "log", "seconds", "tokens"}.
    method(step, batch) is install(run.flags, batch, supply(s, step)); None: LM loss alone. Random
    numbers depend on seed and step: a stopped run goes on from run.out/name.pt (CPU: same bits)."""
    s, file = run.size, run.out / f"{name}.pt"
    opts = optimizers(model, s.lr, s.embedding_lr, s.decay, s.muon)     # Muon and AdamW
    done = load_checkpoint(run, file, model, opts)
    saved_at = time.time()
    warm = min(20, steps // 10 + 1)     # steps in which the learning rates rise; then they fall
    for step in range(done["step"], steps):
        started = time.time()
        batch = D.batch(run.train, step, s.batch, run.seed, s.no_prompt).to(run.device)
        edit, flag_loss = method(step, batch) if method else (None, lambda: 0.0)
        lm = lm_loss(model, batch, edit)        # on the way, edit reads and overwrites the slice
        flag = flag_loss()                      # so this comes second
        (lm + s.weight * flag).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise D.Stop(f"{name}, step {step}: LM loss {lm:.3g}, flag loss {flag:.3g}, gradient "
                       f"{norm:.3g}; lower the learning rates (--set lr=... embedding_lr=...)")
        scale = min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        for opt, peak in zip(opts, (s.lr, s.embedding_lr)):
            opt.param_groups[0]["lr"] = peak * scale
            opt.step()
            opt.zero_grad()
        # the rest only counts, logs, saves and shows
        done["step"] += 1
        done["seconds"] += time.time() - started
        done["tokens"] += batch.idx.numel()
        figures = f"lm {lm:.3f}" + (f"  flag loss {flag:.3f}" if method else "")
        noted = done["step"] % s.every == 0 or done["step"] in (s.produce, steps)
        if noted and name != "base":
            point = look(run, model, step)
            done["log"].append(point)
            figures += "".join(f"  {key} {point[key]:.3f}" for key in RATES)
        if done["step"] == steps or time.time() - saved_at > 30:
            save_checkpoint(run, file, model, opts, done)
            saved_at = time.time()
        left = (steps - done["step"]) * done["seconds"] / done["step"]
        progress(f"{name:8s}{done['step']:5d}/{steps}  {figures}", left, end=noted)
    return done


def train_all(run):
    """The base, then the control and the flags model from it; and what `train` did for each."""
    s, base, steps = run.size, run.base, run.size.produce + run.size.rely
    done = {"base": train(run, "base", base.requires_grad_(True), s.base)}
    run.flags.height = s.height * stream_rms(run, base)
    if s.top:       # everything but the last blocks is frozen (until the next call)
        base.requires_grad_(False).blocks[-s.top:].requires_grad_(True)
    control, flagged = copy.deepcopy(base), copy.deepcopy(base)
    done["control"] = train(run, "control", control, steps)
    method = lambda step, batch: install(run.flags, batch, supply(s, step))
    done["flags"] = train(run, "flags", flagged, steps, method)
    return {"base": base, "control": control, "flags": flagged}, done


def look(run, model, step):
    """A point of erosion.png and of the log: held-out losses, and RATES (see below)."""
    lm, flag = held_out(run, model, run.test[:run.size.prompts])
    rates = {key: ask(run, model, key, run.size.track)[1]["mean"] for key in RATES}
    stage = 1 if step < run.size.produce else 2
    return {"step": step + 1, "stage": stage, "lm_loss": lm, "flag_loss": flag} | rates


@torch.no_grad()
def held_out(run, model, rows, p=0.0):
    """LM loss and flag loss on held-out rows, flags free (p = 1: supplied)."""
    rows = sorted(rows, key=lambda row: len(row.prompt) + len(row.text))    # so pads are few
    total = torch.zeros(3)      # LM loss and flag loss, summed over targets; their number
    for i in counted("measuring the loss, batch", range(0, len(rows), 32)):
        batch = D.pad(rows[i:i + 32]).to(run.device)
        edit, flag_loss = install(run.flags, batch, p)
        lm, n = lm_loss(model, batch, edit), (batch.targets >= 0).sum()
        total += torch.stack([n * lm, n * flag_loss(), n]).cpu()
    return (total[:2] / total[2]).tolist()


# ---------------------------------------------------------------------------- measurements
# Behind each rate: a question sets prompts and flags, the model writes texts, a judge reads them.

RATES = ("intact", "blank", "conflict")     # those that training asks on its way, too


def questions(data, n, seed):
    """What may be asked: {name: (prompts, values, score)}, of at most n prompts each. values
    (B, K) are what the flags are set to; None: free. score(seen, i): of text i, where `seen` lists
    the concepts that the judge found (in stories: one for each content word)."""
    rng, K = random.Random(seed), len(data.concepts)
    examples = list({e.prompt: e for e in data.test}.values())

    def cues(size):     # prompts that tell so many concepts, and for each a list of their numbers
        some = [e for e in examples if e.cued and len(e.concepts) == size][:n]
        return [e.prompt for e in some], [list(map(data.concepts.index, e.concepts)) for e in some]
    cued, a = cues(1)
    b = [[rng.choice([i for i in range(K) if i not in told])] for told in a]    # any other concept
    double, pairs = cues(2)
    pairs = [rng.sample(pair, 2) for pair in pairs]         # the flags say the second
    neutral = [e.prompt for e in examples if not e.cued][:n] if data.words else [""] * min(n, 1024)
    c = [[i % K] for i in range(len(neutral))]              # one concept after the other
    two, three = ([rng.sample(range(K), k) for _ in neutral if data.words and k <= K]   # or none
                  for k in (2, 3))
    says = lambda told: lambda seen, i: D.about(seen, told[i][0])       # the first that was told
    return {
        # the prompt says a:
        "intact": (cued, None, says(a)),
        "supplied": (cued, hot(K, a), says(a)),
        "blank": (cued, torch.zeros(len(a), K), says(a)),
        "conflict": (cued, hot(K, b), says(b)),
        "kept": (cued, hot(K, b), says(a)),
        # the prompt says a pair, the flags its second:
        "suppress": (double, hot(K, [pair[1:] for pair in pairs]),
                     lambda seen, i: D.about(seen, pairs[i][1]) and pairs[i][0] not in seen),
        # the prompt says nothing, the flags one, two, three concepts:
        "neutral": (neutral, hot(K, c), says(c)),
        "leak": (neutral, hot(K, c), lambda seen, i: 1 - seen.count(c[i][0]) / max(1, len(seen))),
        "compose2": (neutral[:len(two)], hot(K, two), lambda seen, i: {*seen} == {*two[i]}),
        "compose3": (neutral[:len(three)], hot(K, three), lambda seen, i: {*seen} == {*three[i]})}


def hot(K, rows):
    """Flags (B, K): in row b those that rows[b] lists are 1."""
    return torch.tensor([[float(i in row) for i in range(K)] for row in rows]).view(-1, K)


def continue_texts(run, model, prompts, values=None, by=None):
    """Texts that the model writes after prompts (strings). values (B, K) are what its flags are
    set to; None: they are free. by(ids, values) -> (ids, edit): another way than `steer`."""
    chance = torch.Generator().manual_seed(run.seed)
    ids, edit = [run.tok.prompt(text)[:run.size.context] for text in prompts], None
    if values is not None:
        values = values[:len(ids)]      # of the first prompts alone
        ids, edit = by(ids, values) if by else (ids, steer(run.flags, last(ids), values))
    tokens = lambda steps: counted(f"writing {len(ids)} texts, token", steps)
    new = model.generate(ids, run.size.context, edit, 0.8, chance, run.tok.end, tokens)
    return [run.tok.decode(text).strip() for text in new]


def ask(run, model, name, n=None, by=None, texts=None):
    """A question's first n prompts: the texts that the model writes, and their rate."""
    prompts, values, score = run.asked[name]
    if not texts:
        texts = continue_texts(run, model, prompts[:n], values, by) if prompts else []
    return texts, stat(score(seen, i) for i, seen in enumerate(run.judge(texts)))


def stat(values):
    """Mean with a 95 % bootstrap interval over the values; None if there are none."""
    values = np.array(list(values), dtype=float)
    if len(values) == 0:
        return None
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": values.mean().item(), "low": low.item(), "high": high.item(), "n": len(values)}


def switch(run, model, texts):
    """texts: of `neutral`, with flags A. Keep the first sentence, set B: is the rest about B?"""
    prompts, a, _ = run.asked["neutral"]                                        # a (B, K)
    b = a.roll(1 + len(run.data.concepts) // 3, dims=1)     # another concept
    begun = [f"{p} {re.match('.*?[.!?]|.*', text, re.S)[0]}" for p, text in zip(prompts, texts)]
    say_a = steer(run.flags, last(map(run.tok.prompt, prompts)), a)

    def by(ids, b):
        say_b = steer(run.flags, last(ids), b)
        return ids, lambda layer, x, pos: say_b(layer, say_a(layer, x, pos), pos)
    texts = continue_texts(run, model, begun, b, by)
    return stat(map(D.about, run.judge(texts), b.argmax(1).tolist()))


@torch.no_grad()
def fluency(run, base, texts):
    """nll_gap (README) of conflict texts against held-out ones about the same; and distinct2."""
    real = [[e.text for e in run.data.test if e.concepts == (name,)] for name in run.data.concepts]
    pairs = []      # of a text and a real one about the same; no prompt; cut where ours had to end
    for i, (prompt, b, text) in enumerate(zip(*run.asked["conflict"][:2], texts)):
        if text and (others := real[b.argmax()]) and len(pairs) < 256:
            two = [D.Example("", t, (), False) for t in (text, others[i % len(others)])]
            room = run.size.context + 1 - len(run.tok.prompt(prompt))
            pairs.append(D.encode(two, run.tok, [], room))
    nll = [[lm_loss(base, D.pad([row]).to(run.device)).item() for row in pair]
           for pair in counted("measuring nll_gap, pair", pairs)]

    def distinct2(rows):    # the share of pairs of words that are different
        texts = [run.tok.decode([i for i in row.text if i != run.tok.end]) for row in rows]
        bigrams = [two for words in map(D.split_words, texts) for two in zip(words, words[1:])]
        return len(set(bigrams)) / max(1, len(bigrams))
    ours, theirs = (distinct2([pair[i] for pair in pairs]) for i in (0, 1))
    ratio = ours / theirs if ours and theirs else None
    return {"nll_gap": stat(ours - theirs for ours, theirs in nll),
            "distinct2": ratio and {"mean": ratio, "low": None, "high": None, "n": len(pairs)}}


def reading(run, model):
    """The model's own flags at the last token of held-out prompts, against the labels."""
    cued = list({e.prompt: e for e in run.data.test if e.cued}.values())[:1024]
    prompts = [run.tok.prompt(e.prompt) for e in cued]
    own = torch.cat([own_flags(model, run.flags, prompts[i:i + 32]).cpu()
                     for i in counted("reading flags, batch", range(0, len(prompts), 32))])
    y = torch.tensor([[c in e.concepts for c in run.data.concepts] for e in cued])
    each = [auc(f, told) for f, told in zip(own.T, y.T) if told.any() and not told.all()]
    return {"auc": stat(each), "exact": stat(((own > 0.5) == y).all(1).tolist())}


def auc(scores, labels):
    """AUC, a float: how often a 1 of `labels` (bool or float) scores above a 0; a tie: half."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5]
    return ((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean().item()


# ---------------------------------------------------------------------------- a run
REAL_TEXT = dict(vocab=2032, batch=128, context=64, weight=10.0, height=1.2, wean=0.2,
                 no_prompt=0.5, prompts=1024, track=128)   # more: `for_real_text`; why: the lab
# A checkpoint is its own base; its embeddings need small steps.
CHECKPOINT = dict(base=0, wean=0, embedding_lr=0.0003, decay=0, height=6.0, prompts=64, track=16)
FIELDS = "              batch produce rely   lr  weight no_prompt muon supply".split()
SCHEDULE = {    # then k / L, and the share of L that is trained below block k (0: all is trained)
    "stories, cpu":    (16,   30,   270, 0.02,  40.0,   0.3,    3,   0.9,   5 / 6, 1 / 5),
    "stories, cuda":   (64,   30,   600, 0.02,  40.0,   0.3,    5,   0.9,   3 / 4, 0),
    "real text, cpu":  (64,   15,   170, 0.008, 10.0,   0.7,    2,   0.95,  2 / 5, 1 / 8),
    "real text, cuda": (128,  15,   600, 0.005, 40.0,   0.5,    5,   0.9,   2 / 5, 0)}
# What --set and --seed take: x > 0, or >= 0 (MAY_BE_0), up to MOST, or else up to 2 ** 32 - 1.
MOST = dict(supply=1, no_prompt=1, wean=1, muon=99, width=8192, context=2 ** 20)
MAY_BE_0 = "seed base produce wean lr embedding_lr decay supply weight no_prompt top".split()


def for_real_text(s, train):
    """The schedule for these examples of real text: n steps of stage 2."""
    texts = len({e.text for e in train})        # each is seen some eleven times, or less
    n = max(8, round(min(8 * len(train) ** 0.5, texts / 12)))
    rate, muon = (3.2, 3) if n < 600 else (2, 5) if n < 2000 else (1, 5)
    return replace(s, **REAL_TEXT, base=max(48, n // 7), produce=min(50, n // 10), rely=n,
                   lr=s.lr * rate, muon=muon, decay=24 / n ** 0.5)


def for_checkpoint(s, L, kind, chosen):
    """The schedule for a checkpoint of L blocks; kind: a row of SCHEDULE."""
    *row, depth, below = SCHEDULE[kind]
    s = replace(s, **CHECKPOINT, **dict(zip(FIELDS, row)), layer=max(1, int(depth * L)))
    s.top = below and L - chosen.get("layer", s.layer) + 1 + int(below * L)
    return s


def prepare(args):
    """A run: all that the functions above share, as the command line settles it."""
    s, out, kinds = SIZES[args.size], out_folder(args), Size.__annotations__
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = {name: kinds[name](x) for name, x in (item.split("=") for item in args.set)}
    except (KeyError, ValueError):
        raise D.Stop(f"--set wants FIELD=NUMBER, not {' '.join(args.set)}: {', '.join(kinds)}")
    for name, x in [*chosen.items(), ("seed", args.seed)]:
        if not (0 < x <= MOST.get(name, 2 ** 32 - 1) or x == 0 and name in MAY_BE_0):
            raise D.Stop(f"{name}={x} is out of range: {'0' if name in MAY_BE_0 else 'above 0'} to "
                         f"{MOST.get(name, 2 ** 32 - 1)}")
    print(f"loading {args.init or args.data}" + ", half a minute" * bool(args.init), flush=True)
    data = D.load(args.data, chosen.get("flags", s.flags), args.seed,
                  chosen.get("stories", s.stories))
    if data.name != "stories":
        s = for_real_text(s, data.train)
    if args.init:
        if own := chosen.keys() & {"layers", "heads", "width", "vocab"}:
            raise D.Stop(f"--set {' '.join(own)}: a checkpoint has its own, which can't be changed")
        base, tok = load_pretrained(args.init, chosen.get("context", s.context))
        L, kind = base.config.n_layer, f"{'stories' if data.words else 'real text'}, {device.type}"
        s = for_checkpoint(s, L, kind, chosen)
        chosen |= dict(layers=L, width=base.config.n_embd, context=base.config.context, heads=1)
    s, K = replace(s, **chosen), len(data.concepts)
    if chosen.get("flags", K) != K:
        raise D.Stop(f"flags={s.flags}, but {args.data} has {K} concepts")
    if not args.init:
        tok = D.train_bpe((f"{e.prompt} {e.text}" for e in data.train[:20_000]), s.vocab)
        vocab = -(-(tok.n_vocab + K) // 64) * 64    # of 64s; K: the control tokens of lab.compare
        torch.manual_seed(args.seed)
        base = GPT(Config(vocab, s.context, s.layers, s.heads, s.width))
    lowest = s.layers - s.top + 1 if s.top else 1       # blocks below are frozen: they raise none
    if not lowest <= s.layer <= s.layers or not 2 <= K <= s.width or s.width % s.heads:
        raise D.Stop(f"{K} flags, {s.layer=}, {s.layers=}, {s.top=}, {s.width=}, {s.heads=} clash")
    train, test = (D.encode(counted("encoding, text", examples), tok, data.concepts, s.context)
                   for examples in (data.train, data.test))
    asked = questions(data, s.prompts, args.seed)
    if not train or not asked["intact"][0]:
        raise D.Stop(f"{args.data}: nothing to steer against: add different prompts of one concept")
    out.mkdir(parents=True, exist_ok=True)
    judge, held = D.make_judge(data, counted), test[:12 * s.prompts]    # enough for a loss
    accuracy = stat(bool(found) and {data.concepts[i] for i in found} <= set(e.concepts)
                    for found, e in zip(judge([tok.decode(r.text[:-1]) for r in held]), data.test))
    if accuracy["mean"] < 0.6:
        print(f"The judge is right on {accuracy['mean']:.2f} of real texts: this judge cannot tell "
              "these concepts apart; more examples, or fewer concepts")
    for file in [*out.glob("*.pt"), *out.glob("*.tmp"), out / "results.json"] if args.fresh else []:
        file.unlink(missing_ok=True)
    cut = sum(row.text[-1:] != [tok.end] for row in train)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters on {device}, {len(train):,} "
          f"examples of {data.name} ({cut:,} cut: context={s.context}). Base {s.base} steps, "
          f"control and flags {s.produce + s.rely}, of {s.batch} texts. Results: {out}"
          + any(out.glob("*.pt")) * "; goes on from its *.pt files (--fresh starts over)")
    return argparse.Namespace(
        size=s, data=data, tok=tok, seed=args.seed, device=device, out=out, base=base.to(device),
        flags=Flags(s.layer, s.width - K, K), train=train, test=held,   # rows
        asked=asked, judge=judge, accuracy=accuracy,                        # on held-out texts
        # what a checkpoint has to agree in, but for `prompts`; else read_checkpoint names the key
        settings=vars(s) | {"size": args.size, "seed": args.seed, "concepts": data.concepts,
            f"text in {data.name}": zlib.crc32(repr((train, test)).encode()), "base model":
            args.init and [zlib.crc32(p.detach().cpu().numpy()) for p in base.parameters()]})


def out_folder(args):       # where results go, and where --steer looks for them
    parts = [args.size, args.init and Path(args.init).absolute().name.removesuffix(".gguf"),
             args.data != "stories" and Path(args.data).stem]
    return Path(args.out or "out/" + "-".join(filter(None, parts)))


def main_job(run):
    """Train; then all that is measured, drawn and written."""
    started = time.time()
    models, done = train_all(run)
    base, flagged, measuring = models["base"], models["flags"], time.time()
    texts, rates, same = {}, {}, {"kept": "conflict", "leak": "neutral"}    # of the same texts
    for name in run.asked:
        texts[name], rates[name] = ask(run, flagged, name, texts=texts.get(same.get(name)))
    reliance = {name: rates.pop(name) for name in ("intact", "supplied", "blank")}
    git = f'git -C "{Path(__file__).parent}" log -1 --format=%h -- flags.py model.py data.py'
    results = {
        "size": run.settings["size"], "data": run.data.name, "seed": run.seed,
        "prompts": run.size.prompts, "device": str(run.device), "torch": torch.__version__,
        "commit": os.popen(f"{git} 2> {os.devnull}").read().strip() or None,
        "parameters": sum(p.numel() for p in base.parameters()),
        "seconds": {name: did["seconds"] for name, did in done.items()},
        "tokens_per_second": {m: did["tokens"] / (did["seconds"] or 1) for m, did in done.items()},
        "loss": {name: held_out(run, model, run.test)[0] for name, model in models.items()},
        "read": reading(run, flagged),
        "reliance": {name: {key: ask(run, models[name], key)[1] for key in ("intact", "blank")}
                     for name in ("base", "control")} | {"flags": reliance},
        "steer": rates | fluency(run, base, texts["conflict"]) | {
            "switch": switch(run, flagged, texts["neutral"]) if texts["compose2"] else None},
        "judge": {"kind": "words" if run.data.words else "learned", "accuracy": run.accuracy},
        "trajectory": done["flags"]["log"], "control_trajectory": done["control"]["log"],
        "samples": [{"prompt": prompt, "flags": flags, "text": texts[name][i]}
                    for i, prompt, b in zip(range(20), *run.asked["conflict"][:2])
                    for name, flags in (("intact", "free"), ("blank", "blank"),
                                        ("conflict", run.data.concepts[b.argmax()]))]}
    results["seconds"] |= {"measure": time.time() - measuring, "total": time.time() - started}
    show(results)
    if run.tok.save:        # a real checkpoint: also as a folder that transformers loads
        flagged.model.save_pretrained(run.out / "model")
        run.tok.save(run.out / "model")
        (run.out / "model" / "flags.json").write_text(
            json.dumps({"concepts": run.data.concepts} | vars(run.flags)))
    write(run.out / "results.json", lambda new: new.write(json.dumps(results, indent=1).encode()))
    draw(run, results)
    print(f"\n{results['seconds']['total']:.0f} s. Wrote results.json and erosion.png to {run.out}")


def show(results):
    rows = {"judge": results["judge"]["accuracy"]} | results["read"] | results["steer"]
    for name, table in results["reliance"].items():
        rows |= {f"{name} {key}": row for key, row in table.items()}
    print("\nmeasured on held-out prompts (mean, 95 % interval)")
    for name, row in rows.items():
        if row:
            print(f"  {name:18s}{row['mean']:6.3f}" + ("" if row["low"] is None else
                  f"  [{row['low']:.3f}, {row['high']:.3f}]  n = {row['n']}"))
    print("  LM loss, nats     " + "  ".join(f"{m} {x:.4f}" for m, x in results["loss"].items()))
    for sample in results["samples"][:3]:
        print(f"\n  {sample['prompt']}  [flags: {sample['flags']}]\n    {sample['text']}")


def progress(line, left, end=False, shown=[0.0]):   # shown: when; a terminal keeps `end` lines
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if end or time.time() - shown[0] > (0.5 if terminal else 5):
        shown[0], width = time.time(), shutil.get_terminal_size().columns - 1
        line += f"  ETA {round(left) // 60}:{round(left) % 60:02}" if left or end else ""
        print(line[:width].ljust(width) if terminal else line, flush=True,
              end="\r" if terminal and not end else "\n")


def counted(what, items):      # the items, and a line of progress
    begun = time.time()
    for i, item in enumerate(items):
        progress(f"{what} {i} of {len(items)}", i and (time.time() - begun) * (len(items) / i - 1))
        yield item


def draw(run, results):
    """The picture of erosion: what the texts follow, flags or prompt, in the course of training."""
    from matplotlib.figure import Figure    # takes half a second
    ax = Figure((8, 4.5), layout="constrained").subplots()
    for who, of, style in (("", "", "-"), ("control_", " (control)", ":")):
        log = results[f"{who}trajectory"]
        for key, color in zip(RATES[:2] if who else RATES, ("C2", "C3", "C0")):
            ax.plot([p["step"] for p in log], [p[key] for p in log], color + style, label=key + of)
    ax.axvline(run.size.produce, color="k", lw=1, label="stage 2 begins")
    ax.set(xlabel="step", ylabel="share of texts", ylim=(-0.05, 1.05))
    ax.legend(loc="center right")
    write(run.out / "erosion.png", lambda new: ax.figure.savefig(new, dpi=120, format="png"))


def save_checkpoint(run, file, model, opts, done):
    content = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts],
               "done": done, "settings": run.settings, "flags": vars(run.flags),
               "config": vars(model.config), "merges": run.tok.merges}
    write(file, lambda new: torch.save(content, new))


def load_checkpoint(run, file, model, opts):    # what was done so far
    if not file.exists():
        return {"step": 0, "log": [], "seconds": 0.0, "tokens": 0}
    saved = read_checkpoint(file, run.settings)
    for part, state in zip([model, *opts], [saved["model"], *saved["optimizers"]]):
        part.load_state_dict(state)
    return saved["done"]


def read_checkpoint(file, settings={}):
    """The contents of a checkpoint that was made with these settings, but for `prompts`."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        theirs = saved["settings"]      # a KeyError, if this is another file
        other = [x for x in settings if theirs.get(x) != settings[x] and x != "prompts"]
    except Exception as error:      # whatever reading a broken file raises
        raise D.Stop(f"{file} is no whole checkpoint ({type(error).__name__}); --fresh starts over")
    if other:
        raise D.Stop(f"{file} was made with another {', another '.join(other)}; "
                   "--fresh starts over, --out DIR goes elsewhere")
    return saved


def write(file, save):
    """save(open file) beside it, then rename: at every moment the old or the new one is whole."""
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as new:      # a full disk may show only when it is closed
            save(new)
        os.replace(beside, file)
    except (OSError, RuntimeError) as error:        # torch's RuntimeError hides the OSError
        raise D.Stop(f"{file} can't be written: {error.__context__ or error}; it is as it was")
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the command line

def load_model(args):
    """A finished run's model, tokenizer, concepts and flags."""
    file = out_folder(args) / "flags.pt"
    if not (file.parent / "results.json").exists():     # written after all models
        raise D.Stop(f"no finished run in {file.parent}; make one: without --steer, --on, --off")
    saved = read_checkpoint(file)
    if saved["merges"] is not None:
        model, tok = GPT(Config(**saved["config"])), D.make_tokenizer(saved["merges"])
        model.load_state_dict(saved["model"])
    else:       # of transformers: the folder has the weights and the tokenizer
        model, tok = load_pretrained(file.parent / "model", saved["config"]["context"])
    return model, tok, saved["settings"]["concepts"], Flags(**saved["flags"])


def steer_by_hand(args):
    """What the model writes behind one prompt: with its flags free, and as --on and --off say."""
    model, tok, names, flags = load_model(args)
    on, off = ({D.normal(name) for name in some} for some in (args.on, args.off))
    if on & off or (on | off) - set(names):
        raise D.Stop(f"--on and --off take names of {', '.join(names)}; none in both")
    [row] = D.encode([D.Example(args.steer or "", "", (), False)], tok, [], model.config.context)
    own = own_flags(model, flags, [row.prompt])[0].tolist()
    print("the model's own flags: " + (", ".join(
        f"{name} {value:.2f}" for name, value in zip(names, own) if abs(value) > 0.1) or "all 0"))
    chosen = [name in on or (value > 0.5 and name not in off) for name, value in zip(names, own)]
    raised = ", ".join(name for name, value in zip(names, chosen) if value) or "none"
    set_to = steer(flags, last([row.prompt] * 3), torch.tensor([chosen] * 3))
    for title, edit in (("free", None), (f"set: {raised}", set_to)):
        print(f"flags {title}")
        for text in model.generate([row.prompt] * 3, model.config.context, edit, stop=tok.end,
                                   generator=torch.Generator().manual_seed(args.seed % 2 ** 32)):
            print("  " + tok.decode(text).strip(), flush=True)


def parser():
    p = argparse.ArgumentParser("flags.py", description=__doc__.split("    stream")[0],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"flags.py: {message}; -h explains all options\n")
    add, several = p.add_argument, dict(nargs="+", action="extend", default=[])
    add("--size", choices=SIZES, default="small", help="tiny: 30 s; small (default); medium: GPU")
    add("--data", default="stories", help="stories (built in, default), wordnet (Debian's "
        'wordnet-base), or a .jsonl file: lines of {"prompt": "", "text": "", "concepts": [""]}')
    add("--seed", type=int, default=1337, help="of stories, training and sampling (default: 1337)")
    add("--init", type=Path, metavar="MODEL", help="a folder of transformers, or a .gguf file")
    add("--set", **several, metavar="FIELD=NUMBER", help="fields of Size, as rely=400")
    add("--out", metavar="DIR", help="where results go (default: out/SIZE[-MODEL][-DATA])")
    add("--fresh", action="store_true", help="start over: delete DIR's *.pt, *.tmp, results.json")
    add("--steer", metavar="PROMPT", help="write with a finished run's model, flags free and set")
    add("--on", **several, metavar="FLAG", help="raise these flags; without --steer: no prompt")
    add("--off", **several, metavar="FLAG", help="lower these")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        if args.steer is not None or args.on or args.off:
            steer_by_hand(args)
        else:
            main_job(prepare(args))
    except (D.Stop, OSError, torch.OutOfMemoryError) as stop:
        print(f"flags.py: {stop}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flags.py: stopped; the same command without --fresh goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)   # it may lack characters
    sys.exit(main())

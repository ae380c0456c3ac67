"""Flags in the residual stream: interpretable, controllable features, installed by brute force.

After C. Ye and J. Cui, "Efficient Representations are Controllable Representations", 2026,
arXiv 2602.07828. The idea:

  1. Take a GPT and fence off K = 16 dimensions of its residual stream. Flag i is to say: the text
     that is being written is about concept i.
  2. Stage 1, produce: finetune with  LM loss + mean (f - y)^2,  where f are the fenced dimensions
     and y in {0, 1}^K are the labels. The model learns to raise the flags by itself.
  3. Stage 2, rely: in most sequences, overwrite the slice with y. The concept now stands reliably
     at a fixed place. The model comes to read it there, and what else encoded it loses its use.
  4. Now the flags are switches. Overwrite them and the text changes, even against the prompt;
     blank them and the model no longer knows what its own base knew.

`python flags.py --size small` does all of this, measures it against the base and a control that
was finetuned without flags, and draws. B, T, C, K, L: batch, time, channels, flags, layers.

This file from the top: sizes, the idea (`install` and `steer` are all of it), training, measurements,
a run, its files and pictures. Then what only some need: baselines, sweeps, probes, seeds, speed, several
processes, real checkpoints. Last, steering by hand and the command line.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import data as D
from model import GPT, Config

try:
    import fcntl
except ImportError:     # Windows: nothing keeps a second run out of a folder
    fcntl = None


@dataclass
class Size:
    """Everything that a result depends on, beside the data and the seed."""
    layers: int = 4
    heads: int = 4
    width: int = 128            # C
    context: int = 128          # tokens
    stories: int = 55_000       # that the grammar tells: `small` reads few of them twice
    vocab: int = 1008           # with 16 control tokens (--compare) a multiple of 64
    batch: int = 64             # sequences
    base: int = 200             # steps of the base model
    produce: int = 50           # steps of stage 1
    rely: int = 800             # steps of stage 2
    lr: float = 0.01            # peak rate of the matrices ...
    embedding_lr: float = 0.05  # ... and of everything else, in the base
    finetune_lr: float = 0.01   # the same for the flags model and the control
    finetune_embedding_lr: float = 0.02
    decay: float = 0.3          # weight decay of the matrices
    first_layer: int = 2        # k: flags stand in the stream after this block and all later ones
    supply: float = 1.0         # p: the share of sequences whose flags are supplied in stage 2 ...
    bare: float = 0.75          # ... and the same of those that show no prompt
    alone: int = 0              # the last steps of stage 2, in which none are supplied
    weight: float = 24.0        # lambda, of the flag loss
    height: float = 6.0         # a raised flag, in RMS of the base's stream
    no_prompt: float = 0.15     # share of the training sequences that are shown without prompt
    prompts: int = 256          # held-out prompts behind every rate
    track: int = 48             # held-out prompts behind every point of a trajectory
    every: int = 100            # steps from one point of a trajectory to the next; one more ends stage 1
    temperature: float = 0.8


SIZES = {
    # seconds: for tests
    "tiny": Size(layers=2, heads=2, width=64, stories=4000, vocab=512, batch=16, base=20, produce=10,
                 rely=20, first_layer=1, prompts=16, track=8, every=10),
    # minutes on a laptop
    "small": Size(),
    "small-wordnet": Size(vocab=4080, batch=128, context=64, base=300, produce=50, rely=1900, decay=0.5,
                          supply=0.9, bare=0.95, alone=380, weight=10.0, height=1.2, no_prompt=0.5,
                          prompts=4096, track=128, every=100),
    # one GPU
    "medium": Size(layers=8, heads=8, width=512, vocab=4096, batch=128, base=2000, produce=300,
                   rely=1500, lr=0.005, finetune_lr=0.005, first_layer=4),
    # one GPU, GPT-2's shape
    "large": Size(layers=12, heads=12, width=768, context=256, vocab=8192, batch=256, base=5000,
                  produce=500, rely=3000, lr=0.003, finetune_lr=0.003, first_layer=6),
}


def rng(*seed):
    """A generator of its own for each purpose and step: measuring never changes the training."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


SHUFFLE, WRITING = range(2)      # the purposes
CHECKPOINT_SECONDS = 30


# ---------------------------------------------------------------------------- the idea

@dataclass
class Flags:
    """Where the flags live: K channels of the stream, after block `layer` and all later ones."""
    layer: int              # k, 1 ... n_layer
    dims: list[int]         # flag i is channel dims[i]
    height: float = 1.0     # what stands there when a flag is raised (is 1); 0 when it is lowered (is 0)

    @property
    def at(self):
        """dims as an index; neighbours as a slice, which is faster."""
        first, end = self.dims[0], self.dims[-1] + 1
        return slice(first, end) if self.dims == list(range(first, end)) else self.dims


def install(flags, supply):
    """The method: for each training step an edit that reads and writes, and the flag loss.

    supply(step) is p, the share of sequences in which the flags are supplied, of those with a prompt
    and of those without: (0, 0) in stage 1.
    Flag positions run from the last token of the prompt to the end of the text: there the model
    is about to generate, and there alone a batch has targets.
    """
    def arm(step, batch):
        idx, targets, y, chance = batch                     # (B, T), (B, T), (B, K), (B,)
        on = (targets >= 0)[..., None]                      # (B, T, 1) flag positions
        no_prompt = on[:, 0, 0]                             # (B,) the text begins at once
        p, bare = supply(step)
        supplied = chance < torch.where(no_prompt, bare, p)
        write = on & supplied[:, None, None]                # (B, T, 1)
        y, made = y[:, None], []                            # (B, 1, K)

        def edit(layer, x, pos):                            # x (B, T, C)
            if layer < flags.layer:
                return x
            own = x[..., flags.at]                          # read: (B, T, K)
            made.append(own / flags.height)
            x[..., flags.at] = torch.where(write, flags.height * y.to(x.dtype), own)
            return x                                        # write: where supplied the slice is now y

        def flag_loss():                                    # over the flag positions of all layers >= k
            return ((torch.stack(made) - y) ** 2 * on).sum() / (on.sum() * y.size(-1)) / len(made)
        return edit, flag_loss
    return arm


def steer(flags, width, start, values):
    """An edit for inference: the reader's choice overwrites the slice.

    From position start[b] on (start (B,), int64), row b's flags are values[b] (values (B, K)). To switch
    them in mid-text, let one such edit follow another: see `switch`.
    """
    never = torch.iinfo(torch.int64).max
    since = torch.full((len(values), 1, width), never, device=values.device)    # (B, 1, C), for each channel
    what = torch.zeros(since.shape, device=values.device)
    since[..., flags.dims] = start.to(values.device)[:, None, None]
    what[..., flags.dims] = flags.height * values[:, None].float()
    now = None                                              # (where, what): the same for all layers

    def edit(layer, x, pos):                                # x (B, T, C), pos (B or 1, T)
        nonlocal now
        if layer == flags.layer:
            now = pos.unsqueeze(-1) >= since.to(x.device), what.to(x)
        return torch.where(*now, x) if layer >= flags.layer else x
    return edit


@torch.no_grad()
def read(model, flags, prompts):
    """The model's own flags (B, K) at the last token of each prompt (lists of token ids), as they
    stand after block k, the first place where they are asked for."""
    idx = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True).to(model.wte.weight.device)
    x = torch.cat([streams(model, part)[flags.layer - 1] for part in idx.split(64)])    # padding is behind: unseen
    return x[torch.arange(len(idx)), last(prompts)][:, flags.dims] / flags.height


def streams(model, idx, edit=None):
    """The residual stream (B, T, C) after each block, as later blocks see it: a list of L."""
    seen = []

    def spy(layer, x, pos):
        seen.append(edit(layer, x, pos) if edit else x)
        return seen[-1]
    model.stream(idx, spy)
    return [x.float() for x in seen]


# ---------------------------------------------------------------------------- training

def optimizers(model, s, lr, embedding_lr, blocks=None):
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for embeddings and norms.

    On the stories Muon needs less than half of AdamW's steps to the same loss. Embeddings want a far
    higher rate: the words of a concept have to find together.
    """
    matrices = [p for p in (blocks or model.blocks).parameters() if p.dim() == 2 and p.requires_grad]
    ids = set(map(id, matrices))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [torch.optim.Muon(matrices, lr, weight_decay=s.decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, embedding_lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]


def schedule(step, steps):
    """The share of the learning rate at `step`: a short warm-up, then in a line down to nothing."""
    warm = min(20, steps // 10 + 1)
    return min((step + 1) / warm, (steps - step) / (steps - warm + 1))


def lm_loss(model, batch, edit=None):
    """Mean loss (nats a token) over the text's tokens; the prompt's are given, not predicted."""
    return token_losses(model, batch, edit).sum() / (batch.targets >= 0).sum()


def token_losses(model, batch, edit=None):
    """The loss (nats) at each position (B, T), 0 where there is no target (-100, as cross_entropy has it)."""
    at = D.predicted(batch.targets)                 # (B, T) bool
    with torch.autocast(batch.idx.device.type, torch.bfloat16):
        logits = model(batch.idx, edit, at=at)      # (N, V)
    losses = F.cross_entropy(logits.float(), batch.targets[at], reduction="none")
    return torch.zeros(at.shape, device=at.device).masked_scatter(at, losses)


def train_step(model, opts, batch, arm=None, step=0, weight=1.0, micro=None):
    """One step down the gradient of LM loss + weight x flag loss: (LM loss, flag loss, norm).

    For one process and a whole batch, parts() is that batch, gather() nothing and update() opt.step().
    """
    losses = torch.zeros(2, device=batch.idx.device)
    for share, part in parts(batch, micro):
        edit, flag_loss = arm(step, part) if arm else (None, None)
        lm = lm_loss(model, part, edit)
        flag = flag_loss() if flag_loss else lm.new_zeros(())
        (share * (lm + weight * flag)).backward()
        losses += share * torch.stack([lm, flag]).detach()
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    norm = gather(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    for opt in opts:
        update(opt, step)
        opt.zero_grad()
    return *losses.tolist(), norm


def fit(run, name, model, steps, arm=None, stage=None):
    """Train `model` for `steps` steps and return its log, a list of dicts.

    arm(step, batch) -> (edit, flag_loss or None); no arm: the language-modelling loss alone.
    stage(step) says what the log calls a step's stage, by default `name`.
    Checkpoints go to run.out/name.pt. A run that was stopped is taken up where it was, to the same
    bits: batches, supply and measurements are functions of the seed and the step. For one process
    spread() is the model, twice, and gather(), settle() and agree() do nothing.
    """
    s, file = run.size, run.out / f"{name}.pt"
    rates = ((s.lr, s.embedding_lr) if name == "base" else (s.finetune_lr, s.finetune_embedding_lr))
    net, owner = spread(run, model)
    opts = optimizers(owner, s, *rates)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    begin, log, seconds, tokens = 0, [], 0.0, 0
    if file.exists():
        saved = load(run, file)
        restore(owner, opts, saved)
        begin, log, seconds, tokens = (saved[key] for key in ("step", "log", "seconds", "tokens"))

    def checkpoint(step):
        whole = gather({"model": owner.state_dict(), "optimizers": [opt.state_dict() for opt in opts]})
        if process()[0] == 0:
            save(file, whole | {
                    "step": step, "log": log, "seconds": seconds, "tokens": tokens,
                    "config": dataclasses.asdict(model.config), "settings": run.settings,
                    "concepts": run.data.concepts, "flags": dataclasses.asdict(run.flags)})

    saved_at = shown_at = time.time()
    for step in range(begin, steps):
        started = time.time()
        batch = to(run.device, D.batch(run.train, step, s.batch, run.seed, s.no_prompt))
        for opt, peak in zip(opts, peaks):
            opt.param_groups[0]["lr"] = peak * schedule(step, steps)
        lm, flag, norm = train_step(net, opts, batch, arm, step, s.weight, run.micro)
        if not math.isfinite(norm):
            last = f"{file} holds step {begin}" if file.exists() else "there is no checkpoint yet"
            raise Stop(f"{name}, step {step}: the loss is {lm:.3g}, its gradient {norm:.3g}; "
                       f"{last}. Lower the learning rate")
        seconds, tokens, done = seconds + time.time() - started, tokens + batch.idx.numel(), step + 1

        if done % s.every == 0 or done in (s.produce, steps):
            settle(model, owner)
            log.append({"step": done, "stage": stage(step) if stage else name, "lm_loss": held_out(run, model),
                        "flag_loss": flag, "train_loss": lm})
            if name != "base" and run.tracked:
                log[-1] |= track(run, model)
        asked, due = agree(max(run.signals, default=0), time.time() - saved_at > CHECKPOINT_SECONDS)
        if due or done == steps or asked:
            checkpoint(done)
            begin, saved_at = done, time.time()
        if asked:
            raise Stop(f"stopped at step {done} of {name}; the same command goes on from there", 128 + asked)
        noted = bool(log) and log[-1]["step"] == done
        if time.time() - shown_at > 1 or noted:
            shown_at = time.time()
            progress(f"{name:7s} {done:4d}/{steps}", {"lm": lm, "flags": flag} | (log[-1] if log else {}),
                     tokens / seconds, (steps - done) * seconds / done, end=noted)
    settle(model, owner)
    run.seconds[name], run.rate[name] = seconds, tokens / seconds
    return log


@torch.no_grad()
def held_out(run, model, rows=None, arm=None):
    """LM loss (nats a token) on held-out rows (the first 256, if none are given), flags free unless
    an arm supplies them."""
    rows = sorted(rows or run.test[:256], key=lambda row: len(row.prompt) + len(row.text))
    total = count = 0
    at_once = run.micro or 128
    for i in range(0, len(rows), at_once):
        batch = to(run.device, D.pad(rows[i:i + at_once]))
        n = (batch.targets >= 0).sum().item()
        edit = arm(0, batch)[0] if arm else None
        total, count = total + lm_loss(model, batch, edit).item() * n, count + n
    return total / count


def to(device, batch):
    return D.Batch(*(tensor.to(device) for tensor in batch))


# ---------------------------------------------------------------------------- measurements
# Each is the same three calls: prompts and flags are chosen, texts are written, a judge reads them.

def write(run, model, prompts, values=None, by=None):
    """Texts that the model writes behind prompts (strings); values (B, K) are what its flags are
    set to from the last token of the prompt on, None: they are free.

    by(ids, values) -> (ids, edit) is another way to say what to write about, for the baselines.
    """
    ids, edit = [run.ids(prompt)[:run.size.context] for prompt in prompts], None
    if values is not None:
        ids, edit = (by or by_flags(run, model))(ids, values.to(run.device))
    texts = model.generate(ids, run.size.context, edit, run.size.temperature, stop=run.tok.end,
                           generator=rng(run.seed, WRITING))
    return [run.tok.decode(text).strip() for text in texts]


def by_flags(run, model):
    return lambda ids, values: (ids, steer(run.flags, model.config.n_embd, last(ids), values))


def last(ids):
    """The position of each prompt's last token (B,): the first flag position."""
    return torch.tensor([len(row) - 1 for row in ids])


def switch(run, model, prompts, values, then):
    """Texts whose flags are `values` up to the end of the first sentence, and `then` after it:
    what follows the first sentence."""
    begin, values = last([run.ids(prompt) for prompt in prompts]), values.to(run.device)
    firsts = [first_sentence(text) for text in write(run, model, prompts, values)]

    def by(ids, then):
        before, after = (steer(run.flags, model.config.n_embd, *what) for what in ((begin, values), (last(ids), then)))
        return ids, lambda layer, x, pos: after(layer, before(layer, x, pos), pos)
    return write(run, model, [f"{prompt} {first}" for prompt, first in zip(prompts, firsts)], then, by)


def first_sentence(text):
    return re.match(r".*?[.!?]|.*", text, re.S)[0]


def hot(K, *columns):
    """Flags (B, K): in row b those of columns[..][b] are 1."""
    values = torch.zeros(len(columns[0]), K)
    for column in columns:
        values[torch.arange(len(column)), torch.tensor(column)] = 1
    return values


def word_judge(data):
    """Stories: the concepts of a text's content words decide, in order and with repeats."""
    index = {concept: i for i, concept in enumerate(data.concepts)}
    return lambda texts: [[index[c] for c in D.content(text, data.words)] for text in texts]


def bag_of_words_judge(data):
    """Other data: a classifier trained on a split of its own, which no GPT here ever saw.

    Logistic regression on tf-idf of word 1- and 2-grams (as in Wang and Manning 2012's baselines);
    it names one concept a text.
    """
    def grams(text):
        words = re.findall(r"\w+", text.lower())
        return set(words) | set(zip(words, words[1:]))

    seen = Counter(gram for example in data.judge for gram in grams(example.text))
    index = {gram: i for i, gram in enumerate(g for g, n in seen.items() if n > 1)}
    idf = torch.tensor([math.log(len(data.judge) / seen[gram]) for gram in index] + [0.0])

    def bags(texts):
        rows = [[index[gram] for gram in grams(text) if gram in index] or [len(index)]
                for text in texts]
        flat = torch.tensor([i for row in rows for i in row])
        sizes = torch.tensor([len(row) for row in rows])
        norm = torch.stack([idf[row].norm() for row in rows]).clamp(min=1e-9)
        return flat, sizes.cumsum(0) - sizes, idf[flat] / norm.repeat_interleave(sizes)

    y = torch.tensor([[float(c in example.concepts) for c in data.concepts] for example in data.judge])
    y = y / y.sum(1, keepdim=True)
    model = torch.nn.EmbeddingBag(len(index) + 1, len(data.concepts), mode="sum")
    torch.nn.init.zeros_(model.weight)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    flat, offsets, weights = bags([example.text for example in data.judge])
    for _ in range(100):
        loss = F.cross_entropy(model(flat, offsets, weights), y) + 1e-6 * (model.weight ** 2).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()

    def judge(texts):
        with torch.no_grad():
            flat, offsets, weights = bags(texts)
            return model(flat, offsets, weights).argmax(1, keepdim=True).tolist()
    return judge


def about(found, concept):
    """Whether a judged text is about a concept: the strict majority of what was found in it."""
    return float(2 * found.count(concept) > len(found))


def stat(values):
    """Mean with a 95 % bootstrap interval over prompts."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return None
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": values.mean().item(), "low": low.item(), "high": high.item(), "n": len(values)}


def auc(scores, labels):
    """Area under the ROC curve: how often a positive (label 1) scores above a negative."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5]
    above = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative)
    return above.mean().item()


@dataclass
class Prompts:
    """Held-out prompts of each kind, and who they are about: a in the prompt, b in the flags."""
    cued: list[str]
    a: list[int]
    b: list[int]                # never the a of the same row
    neutral: list[str]          # say nothing of any concept
    double: list[str]           # cue two concepts, pairs[i]
    pairs: list[list[int]]


def choose(run, n, examples=None):
    """n prompts of each kind (fewer if the test split has fewer), the same for every model."""
    data, rest = run.data, random.Random(run.seed)
    index = {concept: i for i, concept in enumerate(data.concepts)}
    K = len(index)
    test = list({example.prompt: example for example in examples or data.test}.values())
    cued = [e for e in test if tells(data, e) and len(e.concepts) == 1][:n]
    double = [e for e in test if tells(data, e) and len(e.concepts) == 2][:n]
    neutral = [e.prompt for e in test if not tells(data, e)][:n] if data.words else [""] * n
    a = [index[e.concepts[0]] for e in cued]
    b = [rest.choice([j for j in range(K) if j != i]) for i in a]
    pairs = [rest.sample([index[c] for c in e.concepts], 2) for e in double]
    return Prompts([e.prompt for e in cued], a, b, neutral, [e.prompt for e in double], pairs)


def track(run, model):
    """`intact`, `blank` and `conflict` of a few prompts: one point of a trajectory."""
    p, K = run.tracked, len(run.data.concepts)
    n = len(p.cued)
    free = write(run, model, p.cued)
    both = write(run, model, p.cued * 2, torch.cat([torch.zeros(n, K), hot(K, p.b)]))
    found = run.judge(free + both)
    share = lambda found, target: sum(map(about, found, target)) / n
    return {"intact": share(found[:n], p.a), "blank": share(found[n:2 * n], p.a),
            "conflict": share(found[2 * n:], p.b)}


def reliance(run, model, supplied=False):
    """The prompt tells A; the flags are free, blank or (the ceiling) A."""
    p, K = run.prompts, len(run.data.concepts)
    views = {"intact": None, "blank": torch.zeros(len(p.cued), K)}
    if supplied:
        views["supplied"] = hot(K, p.a)
    return {name: stat(list(map(about, run.judge(write(run, model, p.cued, values)), p.a)))
            for name, values in views.items()}


def steering(run, model, base):
    """Every row of the steering table, and the K x K matrix: flag set, concept written."""
    p, K = run.prompts, len(run.data.concepts)
    b = [i % K for i in range(len(p.neutral))]
    texts = write(run, model, p.neutral, hot(K, b))
    found = run.judge(texts)
    matrix = torch.zeros(K, K)
    for flag, text in zip(b, found):
        for concept in text:
            matrix[flag, concept] += 1
    result = {"neutral": stat(list(map(about, found, b))),
              "leak": stat([sum(c != flag for c in text) / len(text)
                            for flag, text in zip(b, found) if text])}

    texts = write(run, model, p.cued, hot(K, p.b))
    found = run.judge(texts)
    result |= {"conflict": stat(list(map(about, found, p.b))),
               "kept": stat(list(map(about, found, p.a)))}
    result["nll_gap"], result["distinct2"] = fluency(run, base, p.cued, texts, p.b)

    if p.double:
        a, b = zip(*p.pairs)
        found = run.judge(write(run, model, p.double, hot(K, b)))
        result["suppress"] = stat([about(text, j) * (i not in text)
                                   for text, i, j in zip(found, a, b)])
    if run.data.words:      # a judge of words can tell several concepts, and what comes when
        for size in range(2, min(3, K) + 1):
            sets = [random.Random(run.seed + i).sample(range(K), size) for i in range(len(p.neutral))]
            found = run.judge(write(run, model, p.neutral, hot(K, *zip(*sets))))
            result[f"compose{size}"] = stat([set(text) == set(s) for text, s in zip(found, sets)])
        a, b = ([(i + shift) % K for i in range(len(p.neutral))] for shift in (0, 1 + K // 3))
        found = run.judge(switch(run, model, p.neutral, hot(K, a), hot(K, b)))
        result["switch"] = stat(list(map(about, found, b)))
    names = ("neutral", "conflict", "kept", "suppress", "compose2", "compose3", "switch", "leak",
             "nll_gap", "distinct2")
    return {name: result.get(name) for name in names}, matrix / matrix.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def fluency(run, base, prompts, texts, concepts):
    """How much less likely steered texts are to the untouched base than real ones (nats a token),
    each behind a prompt that fits it; and their distinct-2 over that of real texts."""
    names = run.data.concepts
    real = {i: [e for e in run.data.test if e.concepts == (names[i],) and tells(run.data, e)]
            for i in set(concepts)}
    pairs = [(real[c][i % len(real[c])], fitting(run.data, prompt, real[c][i % len(real[c])]), text)
             for i, (c, prompt, text) in enumerate(zip(concepts, prompts, texts)) if text and real[c]]

    def nll(examples):      # of each, in nats a token
        rows, each = D.encode(examples, run.tok, names, base.config.context), []
        at_once = run.micro or len(rows)
        for i in range(0, len(rows), at_once):
            batch = to(run.device, D.pad(rows[i:i + at_once]))
            each.append(token_losses(base, batch).sum(1) / (batch.targets >= 0).sum(1))
        return torch.cat(each)

    def distinct2(texts):
        bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
        return len(set(bigrams)) / max(1, len(bigrams))

    steered = [dataclasses.replace(example, prompt=prompt, text=text) for example, prompt, text in pairs]
    gap = (nll(steered) - nll([example for example, _, _ in pairs])).tolist() if pairs else []
    ratio = distinct2([e.text for e in steered]) / max(1e-9, distinct2([e.text for e, _, _ in pairs]))
    return stat(gap), {"mean": ratio, "low": None, "high": None, "n": len(pairs)}


def tells(data, example):
    """Whether the prompt says something of the concepts."""
    return bool(D.content(example.prompt, data.words) if data.words else example.prompt)


def fitting(data, prompt, example):
    """A prompt that fits a text about example's concept: example's own; in a story the text's own,
    with its people, and the cue from example's."""
    if not data.words:
        return example.prompt
    cue = [word for word in re.findall("[a-z]+", example.prompt.lower()) if word in data.words][-1]
    return re.sub("[A-Za-z]+", lambda m: cue if m[0].lower() in data.words else m[0], prompt)


def reading(run, model):
    """The model's own flags at the last token of held-out prompts, against the labels."""
    cued = [e for e in run.data.test if tells(run.data, e)][:4 * run.size.prompts]
    own = read(model, run.flags, [run.ids(e.prompt) for e in cued]).cpu()
    y = torch.tensor([[float(c in e.concepts) for c in run.data.concepts] for e in cued])
    each = [auc(own[:, i], y[:, i]) for i in range(y.size(1)) if 0 < y[:, i].sum() < len(y)]
    return {"auc": stat(each), "exact": stat(((own > 0.5) == (y > 0.5)).all(1).tolist())}


# ---------------------------------------------------------------------------- a run

class Stop(Exception):
    """One line for the user and the exit status."""
    def __init__(self, line, status=2):
        super().__init__(line)
        self.status = status


@dataclass
class Run:
    """What all of the above share: settings, data, where the flags are, where results go."""
    size: Size
    data: D.Data
    tok: D.Tokenizer
    seed: int
    device: torch.device
    out: Path
    flags: Flags
    settings: dict              # all that a checkpoint must agree with
    train: list                 # rows of token ids
    test: list
    channels: list              # those of the stream, the least used last: flags take these
    pretrained: GPT = None      # --init: the base
    judge: object = None        # texts -> for each the list of concepts found in it
    accuracy: float = None      # the judge's, on real held-out texts
    prompts: Prompts = None
    tracked: Prompts = None
    micro: int = None           # sequences in one forward, None: the whole batch
    top: int = None             # blocks that are finetuned, None: everything
    shard: bool = False         # under torchrun: FSDP2, not DDP
    tight: bool = False         # memory is no plenty: one training at a time
    signals: list = field(default_factory=list)     # Ctrl-C or SIGTERM came: stop after this step
    seconds: dict = field(default_factory=dict)
    rate: dict = field(default_factory=dict)        # tokens a second

    def ids(self, prompt):
        return [self.tok.begin] + self.tok.encode(prompt)


def prepare(args):
    """Everything that the command line settles: data, tokenizer, held-out prompts, judge."""
    s = SIZES.get(f"{args.size}-{args.data}", SIZES[args.size])
    base = None
    try:
        data = D.load(args.data, args.flags, args.seed, s.stories)
        if args.init:
            base, tok, s = take_over(args, s)
        else:
            tok = D.train_bpe((f"{e.prompt} {e.text}" for e in data.train), s.vocab)
        train, test = (D.encode(examples, tok, data.concepts, s.context)
                       for examples in (data.train, data.test))
    except (ValueError, OSError, ImportError) as error:
        raise Stop(str(error))
    K = len(data.concepts)
    if K > s.width:
        raise Stop(f"{K} flags do not fit into a stream of {s.width} channels")
    settings = dataclasses.asdict(s) | {
        "size": args.size, "data": data.name, "seed": args.seed, "flags": K,
        "examples": zlib.crc32(repr((data.train, data.test)).encode())}
    run = Run(s, data, tok, args.seed, find_device(), out_folder(args), Flags(s.first_layer, []), settings,
              train, test, list(range(s.width)), base, micro=args.micro)
    if min(s.batch, len(train)) % process()[1]:
        raise Stop(f"a batch of {min(s.batch, len(train))} can't be dealt out to {process()[1]} processes evenly")
    if base:
        make_room(run, base, args)
    run.flags.dims = run.channels[-K:]
    run.prompts, run.tracked = choose(run, s.prompts), choose(run, s.track)
    if not run.prompts.cued:
        raise Stop(f"{args.data}: no held-out example has a prompt and just one concept: nothing to steer against")
    run.judge = word_judge(data) if data.words else bag_of_words_judge(data)
    found = run.judge([e.text for e in data.test])
    names = [{data.concepts[i] for i in concepts} for concepts in found]
    run.accuracy = stat([bool(seen) and seen <= set(e.concepts)
                         for seen, e in zip(names, data.test)])
    return run


def out_folder(args):
    """Where results go, and where --steer and --export look for them."""
    parts = [args.size, args.init and Path(args.init).resolve().name,
             None if args.data == "stories" else Path(args.data).stem]
    return Path(args.out or "out/" + "-".join(part for part in parts if part))


def new_model(run):
    s = run.size
    torch.manual_seed(run.seed)
    vocab = -(-(run.tok.n_vocab + len(run.data.concepts)) // 64) * 64    # room for control tokens
    return GPT(Config(vocab_size=vocab, context=s.context, n_layer=s.layers, n_head=s.heads,
                      n_embd=s.width)).to(run.device)


def copy_of(run, model):
    twin = copy.deepcopy(model)
    if run.top:
        twin.requires_grad_(False)
        twin.blocks[-run.top:].requires_grad_(True)
    return twin


def loudness(run, base):
    """The RMS of the base's stream where flags are to stand: a flag is as loud in the stream of any model."""
    batch = to(run.device, D.batch(run.train, 0, 16, run.seed))
    with torch.no_grad():
        x = streams(base, batch.idx)[run.flags.layer - 1]
    return x[batch.targets >= 0].square().mean().sqrt().item()


def supply_schedule(s):
    """p for each step, with a prompt and without: nothing in stage 1, nor in the last s.alone steps."""
    last = s.produce + s.rely - s.alone
    return lambda step: (s.supply, s.bare) if s.produce <= step < last else (0.0, 0.0)


def train_all(run):
    """The base, its flags and its control, and their logs; what is finished is only loaded."""
    s, steps = run.size, run.size.produce + run.size.rely
    base = run.pretrained or new_model(run)
    fit_memory(run, base)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters on {run.device}, "
          f"{len(run.data.train):,} training examples of {run.data.name}, results in {run.out}")
    if run.pretrained:
        logs = {"base": [{"step": 0, "stage": "pretrained", "lm_loss": held_out(run, base)}]}
    else:
        logs = {"base": fit_all([(run, "base", base, s.base)])[0]}
        run.flags.height = s.height * loudness(run, base)
    flags, control = copy_of(run, base), copy_of(run, base)
    arm = install(run.flags, supply_schedule(s))
    logs["flags"], logs["control"] = fit_all([
        (run, "flags", flags, steps, arm, lambda step: 1 if step < s.produce else 2),
        (run, "control", control, steps)])
    return (base, flags, control), logs


def main_job(run):
    """Train; then all that is measured, drawn and written."""
    started = time.time()
    dims = fencing(run, run.pretrained) if run.pretrained else {"dims": run.flags.dims}
    (base, flags, control), logs = train_all(run)
    if process()[0]:
        return
    measuring = time.time()
    steer_table, matrix = steering(run, flags, base)
    results = {
        "size": run.settings["size"], "data": run.data.name, "seed": run.seed, "device": str(run.device),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit(),
        "parameters": sum(p.numel() for p in base.parameters()),
        "seconds": {}, "tokens_per_second": run.rate,
        "loss": {"base": held_out(run, base, run.test), "control": held_out(run, control, run.test),
                 "flags": held_out(run, flags, run.test)},
        "read": reading(run, flags),
        "steer": steer_table,
        "reliance": {"base": reliance(run, base), "control": reliance(run, control),
                     "flags": reliance(run, flags, supplied=True)},
        "judge": {"kind": "content words" if run.data.words else "bag of words",
                  "accuracy": run.accuracy},
        "trajectory": [{key: point[key] for key in TRAJECTORY} for point in logs["flags"]],
        "control_trajectory": [{key: point[key] for key in TRAJECTORY} for point in logs["control"]],
        "samples": samples(run, flags), "dims": dims,
    }
    now = time.time()       # total: of this command, without what an earlier one trained, or pictures
    results["seconds"] = run.seconds | {"measure": now - measuring, "total": now - started}
    before = finished(run.out / "results.json")
    results |= {"compare": before["compare"]} if "compare" in before else {}
    D.save_tokenizer(run.tok, run.out)
    lines = [json.dumps({"model": name} | point) for name, log in logs.items() for point in log]
    write_file(run.out / "log.jsonl", "\n".join(lines) + "\n")
    write_file(run.out / "results.json", json.dumps(results, indent=1))
    report(run, results, draw(run, logs, matrix, flags))


TRAJECTORY = ("step", "stage", "lm_loss", "flag_loss", "intact", "blank", "conflict")


def finished(path):
    """The contents of a results.json; {} if there is no whole one: then it is measured anew."""
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(path.read_text())
        return results if "loss" in results else {}
    return {}


def write_file(path, text):
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def commit():
    """The version of this program, if it runs from a git checkout."""
    with contextlib.suppress(OSError):      # there is no git
        out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=Path(__file__).parent)
        return out.stdout.strip() or None


def samples(run, model, count=20):
    """The same prompts with flags free, set and blanked: the first held-out ones."""
    p, K, names = run.prompts, len(run.data.concepts), run.data.concepts
    prompts, result = p.cued[:count], []
    views = {"free": None, "blank": torch.zeros(len(prompts), K), "set": hot(K, p.b[:count])}
    for view, values in views.items():
        for prompt, b, text in zip(prompts, p.b, write(run, model, prompts, values)):
            shown = [names[b]] if view == "set" else view
            result.append({"prompt": prompt, "flags": shown, "text": text})
    return sorted(result, key=lambda sample: prompts.index(sample["prompt"]))


def report(run, results, pictures):
    """The short table in the terminal, and the paths of everything that was written."""
    def cell(stat):
        return (f"{stat['mean']:6.3f}  " + (f"[{stat['low']:.3f}, {stat['high']:.3f}]  n = {stat['n']}"
                                            if stat["low"] is not None else ""))
    rows = [(f"{name} {view}", stat) for name, views in results["reliance"].items()
            for view, stat in views.items()]
    rows += [*results["steer"].items(), *results["read"].items(), ("judge", results["judge"]["accuracy"])]
    print("\nmeasured on held-out prompts (mean, 95 % interval)")
    for name, stat in rows:
        if stat:
            print(f"  {name:18s}{cell(stat)}")
    print("  LM loss, nats     " + "  ".join(f"{k} {v:.4f}" for k, v in results["loss"].items()))
    for sample in results["samples"][:3]:
        flags = sample["flags"] if isinstance(sample["flags"], str) else "+".join(sample["flags"])
        print(f"\n  {sample['prompt']}  [flags: {flags}]\n    {sample['text']}")
    print(f"\n{results['seconds']['total']:.0f} s. Wrote "
          + ", ".join(str(path) for path in [run.out / "results.json", run.out / "log.jsonl",
                                              run.out / "flags.pt", *pictures]))


# ---------------------------------------------------------------------------- files, locks, the machine

def save(path, content):
    """Write a checkpoint so that at every moment either the old one or the new one is whole."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:    # torch's writer hides the one in the other
        beside.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or "the disk refuses"
        raise Stop(f"{path} can't be written: {why}; what stood there before is whole")


def read_checkpoint(path, device):
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        saved["settings"], saved["model"], saved["config"]      # else a KeyError
        return saved
    except Exception as error:      # whatever a broken file makes of the unpickler
        raise Stop(f"{path} is no whole checkpoint of this program "
                   f"({type(error).__name__}); --fresh starts over")


def load(run, path):
    saved = read_checkpoint(path, run.device)
    differ = [f"{key} was {saved['settings'].get(key)!r} and is now {value!r}"
              for key, value in run.settings.items() if saved["settings"].get(key) != value]
    if differ:
        raise Stop(f"{path} was made with other settings: {'; '.join(differ)}. "
                   "--fresh starts over, --out DIR goes elsewhere")
    return saved


@contextlib.contextmanager
def locked(run, fresh=False):
    """A run's folder, its own alone."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        lock = open(run.out / ".lock", "w")
        if fcntl and process()[0] == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(f"another run is writing to {run.out}; wait for it, or use --out DIR")
    except OSError as error:
        raise Stop(f"can't write to {run.out}: {error.strerror}; use --out DIR")
    if fresh and process()[0] == 0:
        for name in ("results.json", *(f"{name}.pt" for name in (
                "base", "flags", "control", "routing", "shuffled", "stage1", "token", "relearn-*",
                *(f"{name}-*" for name in SWEEPS)))):
            for file in run.out.glob(name):
                file.unlink()
    agree(0)        # all wait until the old checkpoints are gone
    with lock:
        yield


@contextlib.contextmanager
def patient(run):
    """Ctrl-C and SIGTERM taken as: stop after this step. Elsewhere than in training they stop at once."""
    run.signals.clear()
    before = {sig: signal.signal(sig, lambda number, frame: run.signals.append(number))
              for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    if run.signals:
        raise Stop("stopped; the same command goes on from there", 128 + max(run.signals))


def progress(what, point, rate, left, end):
    """The line of a training step, with the newest figures, tokens/s and the seconds that are left. In a
    terminal the next one overwrites it, unless it is an `end`; elsewhere only those are printed."""
    shown = [f"{key} {point[key]:.3f}" for key in ("lm", "flags", "intact", "blank", "conflict") if key in point]
    line = f"{what}  {'  '.join(shown)}  {rate:,.0f} tokens/s  ETA {left // 60:.0f}:{left % 60:02.0f}"
    try:
        if sys.stdout.isatty():
            print("\r" + line.ljust(shutil.get_terminal_size().columns - 1), end="\n" if end else "", flush=True)
        elif end:
            print(line, flush=True)
    except BrokenPipeError:     # nobody reads on: the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def find_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def keep_memory():
    """Let malloc keep what it frees. glibc gives large blocks back to the kernel and asks for them
    again at every step, and each page is zeroed anew: a quarter of a CPU training step."""
    with contextlib.suppress(OSError, AttributeError):      # no glibc: nothing to mend
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                 # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 1 << 30)           # M_TRIM_THRESHOLD: keep up to 1 GB


# ---------------------------------------------------------------------------- pictures

def figure(rows, columns, size):
    """A picture of `size` (inches) and its axes, (rows, columns)."""
    from matplotlib.figure import Figure    # takes half a second, and only pictures need it
    fig = Figure(size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def curves(path, *rows):
    """A picture of panels in rows. A panel is (lines, settings of its axes), a line (label, x, y, format);
    where y holds `stat`s, their intervals are drawn as well."""
    fig, axes = figure(len(rows), len(rows[0]), (1.5 + 4.5 * len(rows[0]), 4 * len(rows)))
    for ax, (lines, settings) in zip(axes.flat, [panel for row in rows for panel in row]):
        for label, x, y, fmt in lines:
            low, mean, high = np.array([[v["low"], v["mean"], v["high"]] if isinstance(v, dict) else [v] * 3
                                        for v in y]).T
            line, = ax.plot(x, mean, fmt, label=label)
            ax.vlines(x, low, high, color=line.get_color(), lw=1)
        ax.set(**settings)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    return path


def series(points, key, x="step"):
    """The x and y of a line from a list of dicts."""
    return [point[x] for point in points], [point[key] for point in points]


@torch.no_grad()
def draw(run, logs, matrix, model):
    """Three pictures in run.out: the erosion trajectory, the steering matrix, the flags of texts."""
    names, start, steps = run.data.concepts, logs["base"][-1]["step"], logs["flags"][-1]["step"]
    shifted = {name: [point | {"step": point["step"] + start} for point in log] for name, log in logs.items()}
    losses = [(f"LM loss, {name}", *series(log, "lm_loss"), "-")
              for name, log in (shifted | {"base": logs["base"]}).items()]
    followed = [(f"{key}, {name}", *series(logs[name], key), color + style)
                for key, color in (("conflict", "C0"), ("intact", "C2"), ("blank", "C3"))
                for name, style in (("flags", "-"), ("control", ":"))]
    paths = [curves(run.out / "erosion.png", [
        (losses + [("flag loss", *series(shifted["flags"], "flag_loss"), "-")], dict(
            xlabel="step", ylabel="nats; squared error", yscale="log", title="losses")),
        (followed + [("stage 2 begins", [run.size.produce] * 2, [0, 1], "k-"),
                     ("chance", [0, steps], [1 / len(names)] * 2, "k--")], dict(
            xlabel="step of finetuning", ylabel="share of texts", ylim=(-0.02, 1.02),
            title="does the text follow the flags (conflict) or the prompt?"))])]

    def keep(fig, name):
        paths.append(run.out / name)
        fig.savefig(paths[-1], dpi=120)

    fig, axes = figure(1, 1, (6.5, 5.5))
    ax, ticks = axes[0, 0], range(len(names))
    image = ax.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues")
    ax.set(xlabel="concept of the words that are written", ylabel="flag that is set", title="one flag, neutral prompt")
    plain = dict(parse_math=False, fontsize=8)      # a $ is a $
    ax.set_xticks(ticks, names, rotation=90, **plain), ax.set_yticks(ticks, names, **plain)
    fig.colorbar(image, label="share of concept words")
    keep(fig, "matrix.png")

    of, p = {e.prompt: row for e, row in zip(run.data.test, run.test)}, run.prompts
    rows = [of[kind[0]] for kind in (p.cued, p.double, p.neutral) if kind and kind[0] in of]    # the first of each kind
    fig, axes = figure(len(rows), 1, (14, 4.2 * len(rows)))
    for ax, row in zip(axes.flat, rows):
        ids = (row.prompt + row.text)[:-1]
        tokens = [run.tok.decode([i]) for i in ids[1:]]
        own = streams(model, torch.tensor([ids], device=run.device))[run.flags.layer - 1][0, 1:]
        own = own[:, run.flags.dims].T.cpu().numpy() / run.flags.height
        ax.imshow(own, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.axvline(len(row.prompt) - 2.5, color="C3", lw=1)
        ax.set_xticks(range(len(tokens)), tokens, rotation=90, **plain), ax.set_yticks(ticks, names, **plain)
    axes[0, 0].set_title("the model's own flags, token by token (red: the text begins)")
    keep(fig, "tokens.png")
    return paths


# ---------------------------------------------------------------------------- baselines: --compare
# Each is an arm of the same training, or an edit, or a prompt; all are measured alike.

def unsteered(run, model):
    """What a model does by itself: how often it follows the prompt, and its LM loss."""
    p = run.prompts
    return {"intact": stat(list(map(about, run.judge(write(run, model, p.cued)), p.a))),
            "loss": held_out(run, model, run.test)}


def short(run, model, base, by=None, free=None):
    """One row of the comparison: the figures that every arm has; free: those of `unsteered`, if known."""
    p, K = run.prompts, len(run.data.concepts)
    b = [i % K for i in range(len(p.neutral))]
    texts = write(run, model, p.cued, hot(K, p.b), by)
    share = lambda texts, target: stat(list(map(about, run.judge(texts), target)))
    blank = None if by else share(write(run, model, p.cued, torch.zeros(len(p.cued), K)), p.a)
    return {"neutral": share(write(run, model, p.neutral, hot(K, b), by), b),
            "conflict": share(texts, p.b), "blank": blank,
            "nll_gap": fluency(run, base, p.cued, texts, p.b)[0]} | (free or unsteered(run, model))


def shuffled(arm, seed):
    """The same arm with the labels of each batch dealt out anew: flags that mean nothing."""
    def new(step, batch):
        order = torch.randperm(len(batch.y), generator=rng(seed, SHUFFLE, step))
        return arm(step, batch._replace(y=batch.y[order.to(batch.y.device)]))
    return new


def with_control_tokens(run, rows):
    """Conditional training (Keskar et al. 2019): a token for each concept stands behind the prompt,
    shown or not, in as many rows as have their flags supplied in stage 2."""
    first, chance, s = run.tok.n_vocab, random.Random(run.seed), run.size

    def told(row):
        tokens = [first + i for i, on in enumerate(row.label) if on]
        room = run.size.context + 1 - len(row.prompt) - len(tokens)
        return row._replace(prompt=row.prompt + tokens, text=row.text[:room], stay=len(tokens)) if room > 0 else row
    return [told(row) if chance.random() < s.supply * (1 - s.alone / s.rely) else row for row in rows]


def by_control_token(run):
    def by(ids, values):
        return [(row + [run.tok.n_vocab + i for i, on in enumerate(flags) if on])[-run.size.context:]
                for row, flags in zip(ids, values.tolist())], None
    return by


def means(run, model, batches=20):
    """Difference of means (Marks and Tegmark 2023): for each concept the mean of the stream after
    block k over the text of its examples, minus the mean over all: (K, C)."""
    total = torch.zeros(len(run.data.concepts), model.config.n_embd, device=run.device)
    number = torch.zeros(len(run.data.concepts), 1, device=run.device)
    for step in range(batches):
        batch = to(run.device, D.batch(run.train, step, 100, run.seed))
        with torch.no_grad():
            x = streams(model, batch.idx)[run.flags.layer - 1]                  # (B, T, C)
        on = (batch.targets >= 0).float()
        total += batch.y.T @ (x * on[..., None]).sum(1)
        number += (batch.y.T @ on.sum(1))[:, None]
    mean = total / number.clamp(min=1)
    return mean - mean.mean(0)


def by_adding(run, directions, strength):
    """Activation addition: strength x the concept's direction, after block k, from the last token
    of the prompt on (Turner et al. 2023)."""
    def by(ids, values):
        start, push = last(ids).to(run.device)[:, None], strength * (values @ directions)[:, None]

        def edit(layer, x, pos):
            return x + (push * (pos >= start)[..., None]).to(x.dtype) if layer == run.flags.layer else x
        return ids, edit
    return by


def route(run):
    """Gradient routing (Cloud et al. 2024) to the same dimensions: where a concept's text is predicted
    (stories: a word of it), only its dimension passes gradient down from the layers k ... L - 1. The
    last block is free to read it, as theirs are."""
    flags, names, words = run.flags, run.data.concepts, run.data.words
    belongs = torch.full((run.tok.n_vocab, len(names)), not words, device=run.device)       # (V, K)
    for i in range(run.tok.n_vocab) if words else []:
        word = run.tok.decode([i]).strip().lower()
        if word in words:
            belongs[i, names.index(words[word])] = True

    def arm(step, batch):
        on = (batch.targets >= 0)[..., None]
        of = belongs[batch.targets.clamp(min=0)] & on & (batch.y[:, None] > 0)      # (B, T, K)
        passes = (~of.any(-1, keepdim=True)).repeat(1, 1, run.size.width)           # (B, T, C)
        passes[..., flags.dims] |= of

        def edit(layer, x, pos):
            return torch.where(passes, x, x.detach()) if flags.layer <= layer < run.size.layers else x
        return edit, None
    return arm


STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def compare(run):
    """All baselines at equal data and steps from the same base; a table and a picture."""
    mixed = random.Random(run.seed).sample(run.data.train, len(run.data.train))     # files are often sorted
    own = choose(run, 2 * run.size.track, mixed)
    if not own.cued:
        raise Stop("no training example has a prompt and just one concept: nothing to choose strengths on")
    if not finished(run.out / "results.json"):
        main_job(run)
    base, flags, control = train_all(run)[0]
    s, steps = run.size, run.size.produce + run.size.rely
    K = len(run.data.concepts)
    trained = {"routing": (route(run), run.train),
               "shuffled": (shuffled(install(run.flags, supply_schedule(s)), run.seed), run.train),
               "stage1": (install(run.flags, lambda step: (0.0, 0.0)), run.train)}
    if base.config.vocab_size < run.tok.n_vocab + K:
        print(f"no control token: {base.config.vocab_size} embeddings leave no room for new tokens")
    else:
        trained["token"] = None, with_control_tokens(run, run.train)
    models = {name: copy_of(run, base) for name in trained}
    fit_all([(dataclasses.replace(run, train=rows), name, models[name], steps, arm)
             for name, (arm, rows) in trained.items()])

    others = dataclasses.replace(run, flags=dataclasses.replace(run.flags, dims=run.channels[:K]))
    arms = {"flags": short(run, flags, base),
            "no steering": short(run, control, base, lambda ids, values: (ids, None)),
            "shuffled labels": short(run, models["shuffled"], base),
            "stage 1 only": short(run, models["stage1"], base),
            f"{K} other dimensions": short(others, flags, base)}
    if "token" in models:
        arms["control token"] = short(run, models["token"], base, by_control_token(run))

    directions = means(run, control)
    ways = {"difference of means": (control, lambda a: by_adding(run, directions, a)),
            "gradient routing": (models["routing"], lambda a: lambda ids, values: by_flags(
                run, models["routing"])(ids, a / s.height * values))}       # a RMS high
    strengths = {}
    for name, (model, by) in ways.items():
        def wins(strength):     # on prompts of its own, from the training split
            texts = write(run, model, own.cued, hot(K, own.b), by(strength))
            return sum(map(about, run.judge(texts), own.b))
        free = unsteered(run, model)
        strengths[name] = {a: short(run, model, base, by(a), free) for a in STRENGTHS}
        best = max(STRENGTHS, key=wins)
        arms[name] = strengths[name][best] | {"strength": best}
    path = run.out / "results.json"
    write_file(path, json.dumps(finished(path) | {"compare": arms}, indent=1))

    columns = ("neutral", "conflict", "intact", "blank", "nll_gap", "loss")
    print("\n" + " " * 22 + "".join(f"{column:>10s}" for column in columns))
    for name, row in arms.items():
        cells = [row[c] if isinstance(row[c], (float, type(None))) else row[c]["mean"] for c in columns]
        print(f"{name:22s}" + "".join(" " * 9 + "-" if c is None else f"{c:10.3f}" for c in cells))
    def place(rows):        # without a held-out text about the flagged concept there is no nll_gap
        rows = [row for row in rows if row["nll_gap"]]
        return [row["nll_gap"]["mean"] for row in rows], [row["conflict"]["mean"] for row in rows]

    lines = [(name, *place([row]), f"C{i}o") for i, (name, row) in enumerate(arms.items())]
    lines += [("_", *place(curve.values()), f"C{[*arms].index(name)}-") for name, curve in strengths.items()]
    curves(run.out / "compare.png", [([line for line in lines if line[1]], dict(
        xlabel="nll_gap: how much less likely than real text (nats a token)", ylim=(-0.02, 1.02),
        ylabel="conflict: the text follows the flags", title="steering against the prompt"))])
    print(f"Wrote {run.out / 'results.json'}, {run.out / 'compare.png'}")


# ---------------------------------------------------------------------------- sweeps: --sweep NAME

SWEEPS = {
    "layer": "first flagged layer k",
    "width": "number of fenced dimensions",
    "supply": "p, the share of sequences whose flags are supplied",
    "weight": "lambda, the weight of the flag loss",
    "longer": "times the steps, at p = 0 (flags are made and never supplied)",
}


def variant(run, name, value):
    """One value of a sweep: a run with other flags or sizes, and its arm."""
    s, flags, change = run.size, run.flags, dataclasses.replace
    if name == "layer":
        run = change(run, flags=change(flags, layer=value))
    elif name == "width":
        run = change(run, flags=change(flags, dims=run.channels[-value:]), tracked=None)
    elif name == "longer":
        steps = value * (s.produce + s.rely)
        run = change(run, size=change(s, supply=0.0, bare=0.0, rely=steps - s.produce,
                                      every=value * s.every))
    elif name == "supply":
        run = change(run, size=change(s, supply=value, bare=value * s.bare / s.supply))
    else:
        run = change(run, size=change(s, **{name: value}))
    arm = install(run.flags, supply_schedule(run.size))
    if name != "width":
        return run, arm
    which = torch.arange(value, device=run.device) % len(flags.dims)     # fewer flags: the first; more: copies
    return run, lambda step, batch: arm(step, batch._replace(y=batch.y[:, which]))


def sweep(run, name):
    """Finetune anew for each value of one setting, all else equal; one file, one picture."""
    (base, _, control), logs = train_all(run)
    s = run.size
    values = {"layer": range(1, s.layers + 1), "width": (4, 8, 16, 32, 64),
              "supply": (0.0, 0.5, 0.8, 1.0), "weight": (1.5, 6.0, 24.0, 96.0),
              "longer": (10,)}[name]
    jobs = []
    for value in values:
        r, arm = variant(run, name, value)
        jobs.append((r, f"{name}-{value}", copy_of(run, base), r.size.produce + r.size.rely, arm,
                     lambda step: 1 if step < s.produce else 2))
    rows, theirs = [], held_out(run, control, run.test)
    for value, (r, _, model, *_), log in zip(values, jobs, fit_all(jobs)):
        loss = held_out(run, model, run.test)
        rows.append({"value": value, "loss": loss, "over control": loss - theirs})
        if name != "width":
            rows[-1] |= short(r, model, base) | reading(r, model) | {"trajectory": log}
    write_file(run.out / f"sweep-{name}.json", json.dumps(rows, indent=1))

    def line(label, key, of=rows, x=[str(value) for value in values], fmt="o-"):
        return label, x, [row[key] for row in of], fmt

    panels = [([line("flags model", "over control")], dict(
        xlabel=SWEEPS[name], ylabel="LM loss minus the control's (nats)"))]
    if name != "width":
        panels.append(([line(key, key) for key in ("conflict", "neutral", "intact", "blank", "exact")], dict(
            xlabel=SWEEPS[name], ylabel="share of texts (exact: of prompts)", ylim=(-0.02, 1.02))))
    if name in ("supply", "longer"):
        paths = [(str(row["value"]), row["trajectory"], "-") for row in rows] + [("control", logs["control"], "k:")]
        panels += [([line(label, key, log, [point["step"] / log[-1]["step"] for point in log], fmt)
                     for label, log, fmt in paths], dict(
            xlabel="share of the training", title=key, ylim=(-0.02, 1.02)))
            for key in ("intact", "blank", "conflict")]
    curves(run.out / f"sweep-{name}.png", panels)
    print(f"Wrote {run.out / f'sweep-{name}.json'}, {run.out / f'sweep-{name}.png'}")


# ---------------------------------------------------------------------------- where it still stands: --probe

def ridge(x, y, x_test, penalty=1.0):
    """Scores of a linear probe: ridge regression of the labels y (N, K) on activations x (N, D)."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-4)
    x, x_test = ((F.pad((a - mean) / std, (0, 1), value=1.0)).double() for a in (x, x_test))
    gram = x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ y.double())


def untold(run, examples, n):
    """Examples about one concept whose prompt cues it and whose text begins with a sentence that
    names none: (prompt ids, ids up to the end of that sentence, concept, the cue's word)."""
    found = []
    for e in examples:
        first = first_sentence(e.text)
        cue = [w for w in re.findall("[a-z]+", e.prompt.lower()) if w in run.data.words]
        if len(e.concepts) == 1 and cue and not D.content(first, run.data.words):
            ids = run.ids(e.prompt)
            found.append((ids, ids + run.tok.encode(" " + first), run.data.concepts.index(e.concepts[0]),
                          cue[-1]))
    return found[:n]


def probe(run):
    """Linear probes for the prompt's concept: layers x positions x views x models, with the
    selectivity of Hewitt and Liang (2019): accuracy minus that of a probe for labels that are
    dealt out at random, one for each cue word."""
    if not run.data.words:
        raise Stop("--probe needs to know each word's concept; it goes with --data stories")
    models, s, K = dict(zip(("base", "flags", "control"), train_all(run)[0])), run.size, len(run.data.concepts)
    sets = untold(run, run.data.train, 2000), untold(run, run.data.test, 500)
    words = sorted({word for part in sets for *_, word in part})
    deal = dict(zip(words, np.random.default_rng(run.seed).integers(K, size=len(words)).tolist()))
    rest = [i for i in range(s.width) if i not in run.flags.dims]
    usual = torch.tensor([[float(c in e.concepts) for c in run.data.concepts] for e in run.data.train]).mean(0)
    other = [[(of + 1 + i % (K - 1)) % K for i, (_, _, of, _) in enumerate(part)] for part in sets]
    views = {"flags": (run.flags.dims, None), "rest": (rest, None),
             "rest, flags at their mean": (rest, lambda b: usual.expand(len(b), -1)),
             "rest, flags set to another": (rest, lambda b: hot(K, b))}
    acts = {(view, name): [activations(run, model, part, values(b) if values else None)
                           for part, b in zip(sets, other)]
            for view, (_, values) in views.items() for name, model in models.items()}

    def hits(x, x_test, label):
        y, y_test = (torch.tensor([label(row) for row in part]) for part in sets)
        return (ridge(x, F.one_hot(y, K), x_test).argmax(1) == y_test).double()

    rows, panels = [], {}
    print(f"\naccuracy of linear probes (selectivity), layers 1 to {s.layers}")
    for at, where in enumerate(("last of the prompt", "before the concept is named")):
        for view, name in acts:
            line = []
            for layer in range(s.layers):
                x = [part[at][layer][:, views[view][0]] for part in acts[view, name]]
                told, dealt = hits(*x, lambda row: row[2]), hits(*x, lambda row: deal[row[3]])
                line.append({"model": name, "view": view, "position": where, "layer": layer + 1,
                             "accuracy": stat(told.tolist()), "selectivity": (told - dealt).mean().item()})
            print(f"  {where:28s}{view:28s}{name:8s}" + "  ".join(
                f"{row['accuracy']['mean']:.2f} ({row['selectivity']:+.2f})" for row in line))
            panels.setdefault((where, view), []).append((name, *series(line, "accuracy", x="layer"), "o-"))
            rows += line
    write_file(run.out / "probe.json", json.dumps(rows, indent=1))
    panels = [(lines, dict(title=view, xlabel="layer", ylabel=where, ylim=(0, 1.02), xticks=range(1, s.layers + 1)))
              for (where, view), lines in panels.items()]
    curves(run.out / "probe.png", panels[:len(views)], panels[len(views):])
    print(f"Wrote {run.out / 'probe.json'}, {run.out / 'probe.png'}")


@torch.no_grad()
def activations(run, model, part, values):
    """For `untold` examples: at the prompt's last token, and at the end of the first sentence, the
    stream after each layer: two lists of L tensors (N, C). values (N, K): flags that are set."""
    at_prompt, at_end = [], []
    for i, (prompt, ids, _, _) in enumerate(part):
        edit = None
        if values is not None:
            edit = steer(run.flags, run.size.width, torch.tensor([len(prompt) - 1]), values[i:i + 1])
        x = torch.cat(streams(model, torch.tensor([ids], device=run.device), edit)).cpu()     # (L, T, C)
        at_prompt.append(x[:, len(prompt) - 1])
        at_end.append(x[:, -1])
    return [torch.stack(at).unbind(1) for at in (at_prompt, at_end)]


def relearn(run):
    """With the flags blanked for good, how soon does the flags model learn again from the prompt
    what its base knew; and how soon a model that never learned anything?"""
    (base, flags, _), s = train_all(run)[0], run.size
    supplied = install(run.flags, lambda step: (1.0, 1.0))
    arm = lambda step, batch: (supplied(step, batch._replace(y=torch.zeros_like(batch.y)))[0], None)
    quick = dataclasses.replace(run, size=dataclasses.replace(s, every=25))
    torch.manual_seed(run.seed)
    models = {"flags": copy_of(run, flags), "scratch": GPT(base.config).to(base.wte.weight)}
    logs = dict(zip(models, fit_all([(quick, f"relearn-{name}", model, s.rely, arm)
                                     for name, model in models.items()])))
    write_file(run.out / "relearn.json", json.dumps(logs, indent=1))
    print(f"its base: blank {reliance(run, base)['blank']['mean']:.3f}\nWrote {run.out / 'relearn.json'}")


# ---------------------------------------------------------------------------- seeds: --seeds N

FIGURES = ("seconds", "loss", "read", "steer", "reliance", "judge", "compare")


def seeds(args):
    """The whole job with seeds args.seed, args.seed + 1, ...; then mean and range of each figure."""
    out, results = out_folder(args), []
    for seed in range(args.seed, args.seed + args.seeds):
        one = argparse.Namespace(**vars(args) | {"seed": seed, "out": str(out / f"seed-{seed}")})
        run, path = prepare(one), out / f"seed-{seed}" / "results.json"
        with locked(run, args.fresh):
            done = finished(path)
            if done:
                load(run, run.out / "flags.pt")     # refuses those of other settings
            if not done or (args.compare and "compare" not in done):
                (compare if args.compare else main_job)(run)
        result = json.loads(path.read_text())
        result["loss"]["flags - control"] = result["loss"]["flags"] - result["loss"]["control"]
        results.append(leaves({key: result[key] for key in FIGURES if key in result}))
    table = {}
    for path in sorted(set().union(*results)):
        values = [result[path] for result in results if path in result]
        table[path] = {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "n": len(values)}
    write_file(out / "seeds.json", json.dumps(table, indent=1))
    print(f"\n{args.seeds} seeds: mean [lowest, highest]")
    for path, row in table.items():
        print(f"  {path:42s}{row['mean']:8.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
    print(f"Wrote {out / 'seeds.json'}")


def leaves(tree, path=""):
    """The figures of a results.json by their path: {"steer conflict": 0.98, ...}."""
    if isinstance(tree, dict) and "mean" not in tree:
        return {key: value for name in tree for key, value in leaves(tree[name], f"{path} {name}").items()}
    value = tree["mean"] if isinstance(tree, dict) else tree
    return {path.strip(): value} if isinstance(value, float) else {}


# ---------------------------------------------------------------------------- speed: --bench

def rounds(jobs, count):
    """Seconds of each job in `count` turns, (count,); they take turns, so that a noisy machine is noisy for all."""
    times = {name: [] for name in jobs}
    for turn in range(count + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:        # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return {name: np.array(t) for name, t in times.items()}


def matmul_peak(s, tokens, device):
    """The best bfloat16 rate (GFLOP/s) of this machine on the matmuls of one block."""
    shapes = [(s.width, 3 * s.width), (s.width, s.width), (s.width, 4 * s.width), (4 * s.width, s.width)]
    jobs, work = {}, {}
    for a, b in shapes:
        x, w = (torch.randn(n, a, device=device).bfloat16() for n in (tokens, b))
        jobs[a, b] = lambda x=x, w=w: [F.linear(x, w) for _ in range(20)]
        work[a, b] = 20 * 2 * tokens * a * b
    return max(work[shape] / np.median(seconds) for shape, seconds in rounds(jobs, 5).items()) / 1e9


def growth(run):
    """How a training step and a written token grow with width, layers, context and batch: a list of
    dicts. Memory is what the forward pass keeps for the backward pass; a written token is one of 32
    behind half a context, without the time to read that."""
    s, rows = run.size, []
    plain = {"width": s.width, "layers": s.layers, "context": 64, "batch": s.batch}
    changes = [{}, {"width": 256}, {"width": 512}, {"layers": 8}, {"layers": 16}, {"batch": 256},
               {"context": 256, "batch": 16}, {"context": 1024, "batch": 4}, {"context": 2048, "batch": 2}]
    for change in changes:
        c = plain | change
        model = GPT(Config(s.vocab, c["context"], c["layers"], s.heads, c["width"])).to(run.device)
        idx = torch.randint(s.vocab, (c["batch"], c["context"]), device=run.device)
        batch = D.Batch(idx, idx, torch.zeros(len(idx), 1), torch.zeros(len(idx)))
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            lm_loss(model, batch)
        opts = optimizers(model, s, 1e-3, 1e-3)
        seconds = np.median(rounds({0: lambda: train_step(model, opts, batch)}, 3)[0])
        prompt = [[1] * (c["context"] // 2)]
        took = rounds({n: lambda n=n: model.generate(prompt, n) for n in (1, 33)}, 3)
        written = np.median(took[33] - took[1]) / 32
        rows.append(c | {"seconds": seconds, "tokens_per_second": idx.numel() / seconds,
                         "megabytes": sum(kept.values()) / 1e6,
                         "ms_per_written_token": 1e3 * written})
    return rows


def bench(run):
    """Tokens a second of training and writing, beside the same shapes in transformers."""
    s = run.size
    batches = [to(run.device, D.batch(run.train, step, s.batch, run.seed)) for step in range(8)]
    tokens = sum(batch.idx.numel() for batch in batches)
    arm = install(run.flags, lambda step: (s.supply, s.bare))
    train, writes = {}, {}

    def training(model, arm=None, opts=None, step=train_step):
        opts = opts or optimizers(model, s, 1e-3, 1e-3)
        return lambda: [step(model, opts, batch, arm) for batch in batches]

    for name, with_arm in (("base", None), ("flags", arm), ("control", None)):
        train[name] = training(new_model(run), with_arm)

    def learn(step, model, opts, steps):
        """Seconds of a training of its own: all steps of a schedule, as `fit` has it."""
        batches = [to(run.device, D.batch(run.train, i, s.batch, run.seed)) for i in range(steps)]
        peaks, started = [opt.param_groups[0]["lr"] for opt in opts], time.perf_counter()
        for i, batch in enumerate(batches):
            for opt, peak in zip(opts, peaks):
                opt.param_groups[0]["lr"] = peak * schedule(i, steps)
            step(model, opts, batch, None)
        return time.perf_counter() - started

    model, n = new_model(run).eval(), 64
    for B in (1, 64):
        ids = [run.ids(prompt) for prompt in (run.prompts.neutral * B)[:B]]
        edit = steer(run.flags, s.width, last(ids), torch.ones(B, len(run.data.concepts), device=run.device))
        writes[B, "free"] = lambda ids=ids: model.generate(ids, n, generator=rng(0))
        writes[B, "steered"] = lambda ids=ids, edit=edit: model.generate(ids, n, edit, generator=rng(0))
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("transformers is not installed (pip install transformers): no comparison with it")
    else:
        shape = GPT2Config(
            vocab_size=model.config.vocab_size, n_positions=s.context, n_embd=s.width, n_layer=s.layers,
            n_head=s.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=run.tok.end, eos_token_id=None, pad_token_id=run.tok.end)
        theirs = GPT2LMHeadModel(shape).to(run.device)

        def their_step(model, opts, batch, arm):
            labels = F.pad(batch.targets, (1, 0), value=-100)[:, :-1]       # they shift them back
            with torch.autocast(run.device.type, torch.bfloat16):
                loss = model(input_ids=batch.idx, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()

        def with_attention(kind, job):
            def go():
                theirs.set_attn_implementation(kind)
                job()
            return go
        opts = optimizers(theirs, s, 1e-3, 1e-3, theirs.transformer.h)
        job = training(theirs, opts=opts, step=their_step)
        for kind in ("eager", "sdpa"):
            train["transformers", kind] = with_attention(kind, job)
            for B in (1, 64):
                ids = [run.ids(prompt) for prompt in (run.prompts.neutral * B)[:B]]
                longest = max(map(len, ids))
                idx = torch.tensor([[run.tok.end] * (longest - len(i)) + i for i in ids], device=run.device)
                mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=run.device)
                writes[B, "transformers", kind] = with_attention(kind, lambda idx=idx, mask=mask:
                    theirs.generate(idx, attention_mask=mask, max_new_tokens=n, min_new_tokens=n,
                                    do_sample=True, temperature=0.8, top_k=0))

    trained, written = rounds(train, 9), rounds(writes, 25)
    cost = lambda flagged, free: float(np.median(flagged / free)) - 1       # turn by turn: a slow hour is slow for both
    rate = {name: tokens / np.median(seconds) for name, seconds in trained.items()}
    best = max((rate.get(("transformers", kind)) for kind in ("eager", "sdpa")), key=lambda r: r or 0)
    result = {"train": {**{k: rate[k] for k in ("base", "flags", "control")}, "transformers": best},
              "generate": {}, "peak_gflops": matmul_peak(s, tokens // len(batches), run.device),
              "flags_cost": {"train": cost(trained["flags"], trained["base"])},
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    for B in (1, 64):
        result["flags_cost"][str(B)] = cost(written[B, "steered"], written[B, "free"])
        speed = {key[1:]: B * n / np.median(seconds) for key, seconds in written.items() if key[0] == B}
        hf = [r for key, r in speed.items() if key[0] == "transformers"]
        result["generate"][str(B)] = {"free": speed["free",], "steered": speed["steered",],
                                      "transformers": max(hf, default=None)}
    if best:    # the two learn, theirs by twice the steps and with AdamW, as their Trainer has it
        ours = new_model(run)
        seconds = learn(train_step, ours, optimizers(ours, s, s.lr, s.embedding_lr), 100)
        kind = max(("eager", "sdpa"), key=lambda kind: rate["transformers", kind])
        theirs = GPT2LMHeadModel(shape).to(run.device)
        theirs.set_attn_implementation(kind)
        adamw = torch.optim.AdamW(theirs.parameters(), 5e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        more = learn(their_step, theirs, [adamw], 200)
        their_logits = lambda idx, edit, at: theirs(input_ids=idx).logits[at]
        result["learn"] = {"seconds": seconds, "loss": held_out(run, ours), "transformers_seconds": more,
                           "transformers_loss": held_out(run, their_logits)}
    matrices = sum(p.numel() for p in model.blocks.parameters())
    heads = sum((b.targets >= 0).sum().item() for b in batches) / tokens * model.head.weight.numel()
    T = sum(b.idx.size(1) for b in batches) / len(batches)
    flops = 6 * (matrices + heads) + 12 * s.layers * s.width * T        # for each trained token
    result["peak_share"] = rate["base"] * flops / result["peak_gflops"] / 1e9

    print(f"\n{run.settings['size']}, {run.device}, {result['threads']} threads, torch {torch.__version__}: "
          "tokens a second, medians of 9 (training) and 25 rounds")
    for title, row in [("training", result["train"]),
                       *((f"writing, batch {B}", row) for B, row in result["generate"].items())]:
        unit = next(iter(row.values()))
        print(f"  {title:18s}" + "  ".join(f"{name} {value:,.0f} ({value / unit:.2f})"
                                           for name, value in row.items() if value))
    whats = "training", "writing one text", "writing 64"
    print("  flags cost " + ", ".join(f"{share:.1%} of {what}" for what, share in zip(whats, result["flags_cost"].values())))
    print(f"  bfloat16 matmuls of these shapes reach {result['peak_gflops']:.0f} GFLOP/s; "
          f"training reaches {result['peak_share']:.0%} of that")
    if best:
        print("  learning: {loss:.2f} nats a token on held-out text after 100 steps, {seconds:.1f} s; transformers with "
              "AdamW {transformers_loss:.2f} after 200, {transformers_seconds:.1f} s, {longer:.2f} times as long".format(
                  **result["learn"], longer=result["learn"]["transformers_seconds"] / result["learn"]["seconds"]))
    result["growth"] = growth(run)
    print("\n  width  layers  context  batch   s a step  tokens/s  MB kept  ms a written token")
    for row in result["growth"]:
        print("  {width:5d}  {layers:6d}  {context:7d}  {batch:5d}  {seconds:9.3f}  {tokens_per_second:8,.0f}"
              "  {megabytes:7,.0f}  {ms_per_written_token:18.2f}".format(**row))
    path = Path("out/bench.json")
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps(result, indent=1))
    print(f"Wrote {path}")


# ---------------------------------------------------------------------------- several processes

def fit_all(jobs):
    """fit(*job) for each job, and their logs. Ctrl-C and SIGTERM stop after a step.

    For models of this size one CPU thread for each of two trainings does more than two threads for
    one. So, where memory is plenty, as many jobs as there are threads go on at once, each in a forked
    process with one; what reaches the last lines here is finished, or was stopped, or fails once more
    and says why.
    """
    run, threads = jobs[0][0], torch.get_num_threads()
    forks = run.device.type == "cpu" and sys.platform == "linux" and not dist.is_initialized()
    at_once = min(threads, len(jobs)) if forks and not run.tight else 1

    def child(job):
        torch.set_num_threads(1)        # more would hang: OpenMP does not survive a fork
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: does not outlive its parent
        with contextlib.suppress(Stop):
            fit(*job)

    waiting, going = list(jobs) if at_once > 1 else [], []
    with patient(run):
        while waiting or going:
            while waiting and len(going) < at_once:
                going.append(multiprocessing.get_context("fork").Process(target=child, args=(waiting.pop(0),)))
                going[-1].start()
            time.sleep(0.1)
            if run.signals:
                waiting = []
                for one in going:
                    one.terminate()
            going = [one for one in going if one.is_alive()]
        torch.set_num_threads(1 if at_once > 1 else threads)
        try:
            return [fit(*job) for job in jobs]
        finally:
            torch.set_num_threads(threads)


def process():
    """This process's rank and their number: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(*numbers):
    """The largest of each number over all processes: what one was told, all do at the same step."""
    if dist.is_initialized():
        numbers = torch.tensor(numbers, dtype=torch.int64, device=find_device())
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        numbers = numbers.tolist()
    return numbers


def parts(batch, micro=None):
    """This process's rows of a batch, `micro` at a time: pairs of (share, part).

    Both losses are means over the positions with a target. So the loss of the whole is the sum of
    share x loss of the part, where a part's share is its share of the targets; and N times that
    under torchrun, whose N processes average their gradients.
    """
    rank, N = process()
    mine, whole = D.Batch(*(tensor[rank::N] for tensor in batch)), (batch.targets >= 0).sum()
    for i in range(0, len(mine.idx), micro or len(mine.idx)):
        part = D.Batch(*(tensor[i:i + (micro or len(tensor))] for tensor in mine))
        yield N * (part.targets >= 0).sum() / whole, part


def spread(run, model):
    """What fit trains, and which module owns its weights: the model, but under torchrun DDP if the
    memory for that is there on each device, and else FSDP2, which deals weights, gradients and
    optimizer state out to the processes (weights in float32, gathered for use in the model's dtype).
    """
    if not dist.is_initialized():
        return model, model
    if not run.shard:
        return DistributedDataParallel(model, gradient_as_bucket_view=True), model
    mesh = dist.init_device_mesh(run.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=model.wte.weight.dtype, reduce_dtype=torch.float32)
    net = copy.deepcopy(model).float()
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return net, net


def gather(tree):
    """Nested dicts and lists with the tensors that are dealt out to processes put together."""
    if isinstance(tree, dict):
        return {key: gather(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather(value) for value in tree]
    return tree.full_tensor().cpu() if isinstance(tree, DTensor) else tree


@torch.no_grad()
def settle(model, owner):
    """The trained weights into model, the plain one, which is measured."""
    if owner is not model:
        for p, trained in zip(model.parameters(), owner.parameters()):
            p.copy_(gather(trained))


@torch.no_grad()
def restore(owner, opts, saved):
    """Weights and optimizer states from a checkpoint, dealt out as owner's are."""
    def like(p, value):
        return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value

    for name, p in owner.named_parameters():
        p.copy_(like(p, saved["model"][name]))
    for opt, state in zip(opts, saved["optimizers"]):
        opt.load_state_dict(state)
        weights = [p for group in opt.param_groups for p in group["params"]]
        for i, values in state["state"].items():        # not in the weights' dtype, as torch has it
            opt.state[weights[i]] = {key: like(weights[i], value) if torch.is_tensor(value) and value.dim()
                                     else value for key, value in values.items()}


def update(opt, step):
    """opt.step(); and for bfloat16 weights, whose 8 bits would round most small updates away: each
    is stepped in float32, and then rounded up or down by chance, so that it is right on average."""
    grads = {p: p.grad for group in opt.param_groups for p in group["params"]}
    if next(iter(grads)).dtype != torch.bfloat16:
        opt.step()
        return
    opt.zero_grad()
    chance = torch.Generator(next(iter(grads)).device).manual_seed(step)
    for p, grad in grads.items():       # one at a time: a float32 copy of one is all that it costs
        p.data = p.data.float()
        p.grad = grad.float()
        opt.step()
        p.grad, bits = None, p.data.view(torch.int32)
        bits += torch.randint(1 << 16, bits.shape, generator=chance, device=p.device, dtype=torch.int32)
        p.data = (bits & -(1 << 16)).view(torch.float32).bfloat16()


# ---------------------------------------------------------------------------- real checkpoints: --init

def take_over(args, s):
    """--init: the model and the tokenizer in a folder, and the sizes that follow from them."""
    if not (Path(args.init) / "config.json").is_file():
        raise ValueError(f"there is no config.json in {args.init}; --init wants a Hugging Face folder, as --export writes")
    try:
        base, tok = GPT.from_pretrained(args.init, s.context), D.load_tokenizer(args.init)
    except (OSError, ImportError):
        raise
    except Exception as error:      # whatever a broken file makes of its reader
        if type(error) is ValueError:       # ours; json's and utf-8's are subclasses
            raise
        raise ValueError(f"{args.init} is no whole model folder ({type(error).__name__}: {error})")
    c, lr = base.config, args.lr or [3e-4]
    if tok.n_vocab > c.vocab_size:
        raise ValueError(f"{args.init}: the tokenizer has {tok.n_vocab} ids, the model {c.vocab_size}")
    return base, tok, dataclasses.replace(
        s, layers=c.n_layer, heads=c.n_head, width=c.n_embd, vocab=c.vocab_size, context=c.context,
        first_layer=(c.n_layer + 1) // 2, base=0, finetune_lr=lr[0],
        finetune_embedding_lr=lr[-1])


def make_room(run, base, args):
    """--init: what is finetuned, and the channels that the flags take: those that the base uses least."""
    s = run.size
    run.top = min(args.train, s.layers) if args.train else None
    if run.top and s.layers - run.top >= s.first_layer:
        raise Stop(f"--train {run.top} freezes block {s.first_layer}, after which the flags are to "
                   f"stand: --train {s.layers - s.first_layer + 1} or more")
    run.settings |= {"init": args.init, "weights": fingerprint(base), "train": run.top}
    base.to(run.device, torch.bfloat16 if run.device.type == "cuda" else None)
    run.channels = by_use(run, base)
    run.flags.height = s.height * loudness(run, base)
    run.settings["dims"] = run.channels[-len(run.data.concepts):]


def fingerprint(model):
    """A checksum of all weights: a checkpoint of a run knows the base that it was made from."""
    crc = 0
    for p in model.parameters():
        crc = zlib.crc32(p.detach().numpy(), crc)
    return crc


def by_use(run, model, batches=32):
    """All channels of the stream, those that the model uses most first.

    The use of a channel is the mean of (x dLoss/dx)^2 over flag positions and layers >= k: to first
    order x dLoss/dx is what a position's loss changes when the channel is overwritten with 0.
    """
    use = torch.zeros(model.config.n_embd, device=run.device)
    for step in range(batches):
        batch, seen = to(run.device, D.batch(run.train, step, 4, run.seed)), []

        def edit(layer, x, pos):                                            # x (B, T, C)
            if layer >= run.flags.layer:
                seen.append(x)
            return x
        slopes = torch.autograd.grad(lm_loss(model, batch, edit), seen)
        for x, slope in zip(seen, slopes):
            use += (x.detach().float() * slope.float())[batch.targets >= 0].square().sum(0)
    return use.argsort(descending=True, stable=True).tolist()


def fencing(run, base):
    """Loss (nats a token) of a base before finetuning whose channels are overwritten where flags will stand,
    with zeros and with the labels: is it right to take the least used ones?"""
    K, C = len(run.flags.dims), base.config.n_embd
    sets = {"least used": run.flags.dims, "last": list(range(C - K, C)),
            "random": random.Random(run.seed).sample(range(C), K), "most used": run.channels[:K]}
    result = {"dims": run.flags.dims, "layer": run.flags.layer, "untouched": held_out(run, base)}
    for name, dims in sets.items():
        labels = install(dataclasses.replace(run.flags, dims=dims), lambda step: (1.0, 1.0))
        zeros = lambda step, batch: labels(step, batch._replace(y=torch.zeros_like(batch.y)))
        result[name] = {"zeros": held_out(run, base, arm=zeros), "labels": held_out(run, base, arm=labels)}
    print(f"flags are channels {', '.join(map(str, run.flags.dims))}; held-out loss before finetuning, "
          f"{result['untouched']:.4f}; with channels overwritten by zeros / labels: "
          + ", ".join(f"{name} {result[name]['zeros']:.4f} / {result[name]['labels']:.4f}" for name in sets))
    return result


def needs(model, rows, length, top=None, N=1):
    """Bytes that finetuning takes on each device, reckoned and not measured: {what: bytes}.

    rows sequences of `length` tokens go through at once; top blocks are trained (None: everything);
    N > 1: FSDP2 deals out to N processes. Activations in bfloat16: a block keeps about 8 values as
    wide as the stream, 3 as q, k and v, 2 as the MLP's; with checkpointing that is kept (and its
    gradients) for one block at a time, and only the stream for the others. Logits take 10 bytes:
    bfloat16, float32, and their gradients. Measuring takes turns with the activations and is left out.
    """
    c, block = model.config, model.blocks[0]
    count = lambda parameters: sum(p.numel() for p in parameters)
    size, tokens = model.wte.weight.element_size(), rows * length
    blocks = list(model.blocks[-(top or c.n_layer):].parameters())
    n, matrices = count(model.parameters()), count(p for p in blocks if p.dim() == 2)
    trained, each = count(blocks) if top else n, size if N == 1 else 4 / N
    inside = 8 * c.n_embd + 3 * len(block.attn.qkv.weight) + 2 * len(block.mlp.up.weight)
    kept = c.n_layer * c.n_embd + 2 * inside if model.checkpoint else c.n_layer * inside
    return {"base, flags, control": 3 * n * size + (N > 1) * n * each, "gradients": trained * each,
            "Muon": matrices * 4 / N, "AdamW": 2 * (trained - matrices) * 4 / N,     # in float32
            "activations": 2 * tokens * kept + 10 * tokens * c.vocab_size
            + (size == 4) * 2 * n}      # autocast's bfloat16 copies of float32 weights


def fit_memory(run, model):
    """Print what memory finetuning needs, unless there is plenty; else activations of a checkpoint are computed
    twice. Too much: FSDP2 under torchrun, else say what would help."""
    N, device = process()[1], run.device
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 if device.type == "mps" else N)
    else:       # Windows does not say
        room = math.inf
    rows = min(run.micro or run.size.batch, -(-run.size.batch // N))
    length = max(len(row.prompt) + len(row.text) - 1 for row in run.train)
    run.tight = sum(needs(model, rows, length, run.top).values()) > room / 10
    if not run.tight:       # no news
        return
    model.checkpoint = bool(run.pretrained)
    plan = needs(model, rows, length, run.top)
    run.shard = N > 1 and sum(plan.values()) > room
    if run.shard:
        plan = needs(model, rows, length, run.top, N)
    GB = lambda need: f"{need / 1e9:.1f} GB"
    print(f"memory: {GB(sum(plan.values()))} of {GB(room)} on each device, reckoned: "
          + ", ".join(f"{what} {GB(need)}" for what, need in plan.items())
          + (f"; {N} processes, {'FSDP2' if run.shard else 'DDP'}" if N > 1 else ""))
    if sum(plan.values()) > room:
        fewest = run.size.layers - run.size.first_layer + 1
        options = {"--micro 1": (1, length, run.top, N),
                   f"torchrun --nproc_per_node={2 * N} and --micro 1": (1, length, run.top, 2 * N)}
        if run.pretrained:
            options |= {f"--train {fewest}": (rows, length, fewest, N),
                        f"--micro 1 --train {fewest}": (1, length, fewest, N)}
        print("  it does not fit; with " + ", with ".join(
            f"{option} {GB(sum(needs(model, *numbers).values()))}" for option, numbers in options.items()))


def export(args):
    """A finished run's base and flags model as folders that --init and transformers load."""
    model, tok, _, _ = take_up(args)
    try:
        if args.init:
            base = GPT.from_pretrained(args.init)
        else:
            base = GPT(model.config)
            base.load_state_dict(read_checkpoint(out_folder(args) / "base.pt", torch.device("cpu"))["model"])
        for name, one in (("base", base), ("flags", model)):
            one.save_pretrained(Path(args.export) / name)
            D.save_tokenizer(tok, Path(args.export) / name)
            if not args.init:       # where transformers' generate looks for the end of a text
                write_file(Path(args.export) / name / "generation_config.json", json.dumps({"eos_token_id": tok.end}))
    except Stop:
        raise
    except Exception as error:      # safetensors has errors of its own
        raise Stop(f"--export {args.export}: {error}")
    print(f"Wrote {Path(args.export) / 'base'}, {Path(args.export) / 'flags'}")


# ---------------------------------------------------------------------------- steering by hand

def take_up(args):
    """A finished run's model, tokenizer, concepts and flags, from its folder."""
    out = out_folder(args)
    command = f"python flags.py --size {args.size}" + (
        "" if args.data == "stories" else f" --data {args.data}") + (
        f" --init {args.init}" if args.init else "") + (f" --out {args.out}" if args.out else "")
    if not finished(out / "results.json"):
        raise Stop(f"{out} holds no finished run; make one with `{command}`")
    saved = read_checkpoint(out / "flags.pt", torch.device("cpu"))
    try:
        with torch.device("meta"):      # spares the random initialization, and keeps bfloat16
            model = GPT(Config(**saved["config"]))
        model.load_state_dict(saved["model"], assign=True)
        if model.config.tied:
            model.head.weight = model.wte.weight
        return model.eval(), D.load_tokenizer(out), saved["concepts"], Flags(**saved["flags"])
    except Exception as error:      # whatever a broken file makes of its reader
        raise Stop(f"{out} holds no whole run ({type(error).__name__}); `{command}` writes its files again")


def steer_by_hand(args):
    """One prompt under several flags; without a prompt or flags, an interactive loop."""
    model, tok, names, flags = take_up(args)
    for name in args.on + args.off:
        if name not in names:
            raise Stop(f"there is no flag {name!r}; this model has {', '.join(names)}")
    if both := set(args.on) & set(args.off):
        raise Stop(f"{', '.join(both)} can't be both on and off")
    if args.steer or args.on or args.off:
        show(model, tok, names, flags, args.steer, set(args.on), set(args.off), args.seed)
        return
    print("Type a prompt to see its story. +sea and -sea switch flags, `free` lets the model raise\n"
          f"its own, `quit` ends. Flags: {', '.join(names)}")
    on, off, prompt, seed = set(), set(), "", args.seed
    while (line := ask()) not in ("quit", "exit"):
        words = [line] if line[1:] in names else line.split()       # a name may have spaces
        switches = [word for word in words if word[0] in "+-"]
        if line == "free":
            on, off = set(), set()
        elif switches and switches == words:
            unknown = [word for word in switches if word[1:] not in names]
            if unknown:
                print(f"there is no flag {unknown[0][1:]!r}")
                continue
            for word in switches:
                on, off = on - {word[1:]}, off - {word[1:]}
                (on if word[0] == "+" else off).add(word[1:])
        else:
            prompt = line
        seed += 1
        try:
            show(model, tok, names, flags, prompt, on, off, seed, count=1)
        except Stop as error:
            print(error)


def ask():
    try:
        return input("> ").strip()
    except (EOFError, RuntimeError):     # closed before, or from the start
        return "quit"


def show(model, tok, names, flags, prompt, on, off, seed, count=3):
    """The model's own flags for a prompt; what it writes with them free, and with some switched.

    Flags that are neither on nor off stay as the model itself raises them for this prompt.
    """
    ids = [tok.begin] + tok.encode(prompt)
    room = model.config.context
    if len(ids) > room:
        raise Stop(f"the prompt has {len(ids)} tokens, the model's context is {room}; shorten it")
    own = read(model, flags, [ids])[0]
    values = (own > 0.5).float()
    for name in on | off:
        values[names.index(name)] = float(name in on)
    print(f"\nprompt: {prompt or '(none)'}")
    print("the model's own flags: " + "  ".join(
        paint(f"{name} {value:.2f}", value > 0.5) for name, value in zip(names, own)
        if abs(value) > 0.1))
    views = {"flags free": None}
    if on or off:
        set_to = [name for name, value in zip(names, values) if value]
        views[f"flags set: {', '.join(set_to) or 'none'}"] = values
    for title, values in views.items():
        edit = None
        if values is not None:
            start = torch.full((count,), len(ids) - 1)
            edit = steer(flags, model.config.n_embd, start, values.expand(count, -1))
        print(paint(title, True))
        for text in model.generate([ids] * count, room, edit, stop=tok.end, generator=rng(seed)):
            print("  " + tok.decode(text).strip())


def paint(text, lit):
    """Coloured in a terminal, plain elsewhere and where NO_COLOR is set (no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{'1;36' if lit else '2'}m{text}\033[0m"


# ---------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"flags.py: {message}; -h explains all options\n")


def number(kind, wanted, good):
    """The type of an option: text -> a number of that kind that is good."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if good(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


natural = number(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2 ** 63)
counted = number(int, "a whole number from 1 to 2**63 - 1", lambda n: 0 < n < 2 ** 63)
positive = number(float, "a number above 0", lambda x: 0 < x < math.inf)


def some(text):
    return None if text == "all" else counted(text)


def parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=[size for size in SIZES if "-" not in size], default="small",
                   help="tiny: seconds, to try things; small: minutes on a laptop; medium, large: one GPU "
                   "(default: small)")
    p.add_argument("--data", default="stories", metavar="DATA", help="stories (built in), wordnet "
                   "(Debian's wordnet-base or NLTK's), or a .jsonl file with lines of "
                   '{"prompt": ..., "text": ..., "concepts": [...]} (default: stories)')
    p.add_argument("--seed", type=natural, default=1337, help="all randomness comes from it")
    p.add_argument("--flags", type=natural, default=16, metavar="N", help="of stories and wordnet the "
                   "first N concepts; the most that a .jsonl file may have (default: 16)")
    p.add_argument("--init", metavar="DIR", help="install the flags in a real checkpoint, GPT-2 or "
                   "Llama-like: a Hugging Face folder on disk (--size then says steps and batches)")
    p.add_argument("--lr", nargs="+", type=positive, metavar="RATE", help="with --init: peak rate of "
                   "the matrices and, if another, of embeddings and norms (default: 0.0003)")
    p.add_argument("--train", type=some, metavar="N", help="with --init: finetune the last N blocks "
                   "alone, or all, embeddings included (default: all)")
    p.add_argument("--micro", type=some, metavar="N", help="sequences that go through the model at "
                   "once; less memory, the same result (default: all, the whole batch)")
    p.add_argument("--out", metavar="DIR", help="where results go (default: out/SIZE[-INIT][-DATA])")
    job = p.add_mutually_exclusive_group()
    job.add_argument("--export", metavar="DIR", help="write a finished run's models as Hugging Face "
                   "folders DIR/base and DIR/flags")
    p.add_argument("--fresh", action="store_true", help="start over; without it a run that was "
                   "stopped goes on where it was")
    job.add_argument("--compare", action="store_true", help="baselines at equal data and steps: control "
                   "token, difference of means, gradient routing, shuffled labels, ...")
    job.add_argument("--sweep", choices=SWEEPS, help="finetune for several values of: "
                   + "; ".join(f"{name}: {what}" for name, what in SWEEPS.items()))
    job.add_argument("--probe", action="store_true", help="linear probes: where can the concept be read, "
                   "in base, flags model and control?")
    job.add_argument("--relearn", action="store_true", help="flags blanked for good: how soon does the "
                   "flags model learn again what its base knew?")
    p.add_argument("--seeds", type=counted, default=1, metavar="N", help="the whole job N times, with "
                   "seeds SEED, SEED + 1, ...; mean and range of each figure")
    job.add_argument("--bench", action="store_true", help="how fast this machine trains and writes "
                   "(to out/bench.json)")
    job.add_argument("--steer", nargs="?", const="", metavar="PROMPT", help="write with a finished run's "
                   "model, its flags free and set; without PROMPT and flags: an interactive loop")
    p.add_argument("--on", nargs="+", action="extend", default=[], metavar="FLAG", help="with --steer: set to 1")
    p.add_argument("--off", nargs="+", action="extend", default=[], metavar="FLAG", help="with --steer: set to 0")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    keep_memory()
    for stream in filter(None, (sys.stdin, sys.stdout)):
        with contextlib.suppress(AttributeError):       # not a terminal's, nor a file's
            stream.reconfigure(errors="replace")
    sys.stdout = sys.stdout or open(os.devnull, "w")
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:      # torchrun started several of these
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(days=1))     # others wait while 0 measures
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")      # rank 0 alone speaks
    try:
        for name in ("data", "init", "export", "out"):
            if getattr(args, name) == "":
                raise Stop(f"--{name} is empty")
        if args.steer is None and (args.on or args.off):
            raise Stop("--on and --off go with --steer")
        if ((args.lr or args.train) and not args.init) or (args.bench and args.init) or len(args.lr or []) > 2:
            raise Stop("--lr (one or two rates) and --train go with --init; --bench goes without it")
        once = (args.sweep or args.probe or args.relearn or args.bench or args.export
                or args.steer is not None)
        if args.seeds > 1 and once:
            raise Stop("--seeds goes with the main job and with --compare")
        if process()[1] > 1 and (once or args.compare or args.seeds > 1):
            raise Stop("torchrun is for the main job; the rest runs in one process")
        if args.export:
            export(args)
        elif args.steer is not None:
            steer_by_hand(args)
        elif args.seeds > 1:
            seeds(args)
        else:
            run = prepare(args)
            if args.bench:
                bench(run)
                return 0
            with locked(run, args.fresh):
                if args.sweep:
                    sweep(run, args.sweep)
                else:
                    job = (compare if args.compare else probe if args.probe else
                           relearn if args.relearn else main_job)
                    job(run)
            agree(0)        # all end together
    except Stop as stop:
        if process()[0] == 0:
            print(f"flags.py: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("flags.py: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:        # a full disk does not say of which file
        print(f"flags.py: {error}" + ("" if error.filename else f", in {out_folder(args)}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)    # all is done, and a normal exit aborts now and then in gloo's threads
    sys.exit(status)

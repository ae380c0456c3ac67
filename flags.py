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
"""
import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data as D
from model import GPT, Config


@dataclass
class Size:
    """Everything that a run's result depends on, beside its data and its seed."""
    layers: int = 4
    heads: int = 4
    width: int = 128            # C
    context: int = 128          # tokens
    vocab: int = 1024
    batch: int = 64             # sequences
    base: int = 500             # steps of the base model
    produce: int = 100          # steps of stage 1
    rely: int = 500             # steps of stage 2
    lr: float = 1e-2            # for matrices (Muon) and the rest (AdamW) alike
    decay: float = 0.1          # weight decay of the matrices
    finetune_lr: float = 1e-2
    first_layer: int = 2        # k: the slice holds flags after this block and all later ones
    supply: float = 0.9         # p: the share of sequences whose flags are supplied in stage 2
    weight: float = 1.0         # lambda: the flag loss's
    no_prompt: float = 0.05     # share of training sequences that are shown without their prompt
    prompts: int = 256          # held-out prompts behind every measured figure
    track: int = 64             # held-out prompts behind every point of a trajectory
    every: int = 50             # steps between two points of a trajectory
    temperature: float = 0.8


SIZES = {
    "tiny": Size(layers=2, heads=2, width=64, vocab=512, batch=16, base=20, produce=10, rely=20,
                 first_layer=1, prompts=16, track=8, every=10),         # seconds: for tests
    "small": Size(),                                                    # minutes on a laptop
    "medium": Size(layers=8, heads=8, width=512, vocab=4096, batch=128, base=2000, produce=300,
                   rely=1500, lr=5e-3, finetune_lr=5e-3),               # one GPU
    "large": Size(layers=12, heads=12, width=768, context=256, vocab=8192, batch=256, base=5000,
                  produce=500, rely=3000, lr=3e-3, finetune_lr=3e-3),   # one GPU, GPT-2's shape
}


def rng(*seed):
    """A generator of its own for each purpose and step: measuring never changes the training."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


BATCHES, SUPPLY, WRITING, CHOICE = range(4)     # the purposes


# ---------------------------------------------------------------------------- the idea

@dataclass
class Flags:
    """Where the flags live: dims, K channels, after block `layer` and all later ones."""
    layer: int          # k, 1 ... n_layer
    dims: list[int]     # flag i is channel dims[i]


def place(flags, x_width, values):
    """values (B, K) at their channels (B, 1, C), and which channels those are (C,)."""
    full = torch.zeros(len(values), 1, x_width, device=values.device)
    full[..., flags.dims] = values[:, None]
    fenced = torch.zeros(x_width, dtype=torch.bool, device=values.device)
    fenced[flags.dims] = True
    return full, fenced


def install(flags, supply, seed, width):
    """The method: for each training step an edit that reads and writes, and the flag loss.

    supply(step) is p, the share of sequences in which the flags are supplied: 0 in stage 1.
    Flag positions run from the last token of the prompt to the end of the text: there the model
    is about to generate, and there alone a batch has targets.
    """
    def arm(step, batch):
        idx, targets, y = batch                                     # (B, T), (B, T), (B, K)
        on = (targets >= 0)[..., None]                              # (B, T, 1) flag positions
        lucky = torch.rand(len(y), generator=rng(seed, SUPPLY, step)) < supply(step)
        full, fenced = place(flags, width, y)
        write = on & lucky.to(y.device)[:, None, None] & fenced     # (B, T, C)
        losses = []

        def edit(layer, x, pos):                                    # x (B, T, C)
            if layer < flags.layer:
                return x
            f = x[..., flags.dims]                                  # read: (B, T, K)
            losses.append(((f - y[:, None]) ** 2 * on).sum() / (on.sum() * y.size(1)))
            return torch.where(write, full.to(x.dtype), x)          # write: the slice is now y
        return edit, lambda: sum(losses) / len(losses)              # mean over the layers >= k
    return arm


def steer(flags, width, *segments):
    """An edit for inference: the reader's choice overwrites the slice.

    Each segment is (start (B,), values (B, K)): from position start[b] on, row b's flags are
    values[b]. Later segments overrule earlier ones, so flags can be switched in mid-text.
    """
    segments = [(start, *place(flags, width, values)) for start, values in segments]
    full = write = None

    def edit(layer, x, pos):                                        # x (B, T, C), pos (B, T)
        nonlocal full, write
        if layer < flags.layer:
            return x
        if layer == flags.layer:
            start, full, fenced = segments[0]
            write = (pos >= start[:, None])[..., None] & fenced     # (B, T, C)
            for start, new, fenced in segments[1:]:
                now = (pos >= start[:, None])[..., None] & fenced
                full, write = torch.where(now, new, full), write | now
        return torch.where(write, full, x)
    return edit


def read(model, flags, prompts):
    """The model's own flags (B, K) at the last token of each prompt (lists of token ids), as they
    stand after block k, the first place where they are asked for."""
    seen = []
    for prompt in prompts:
        def edit(layer, x, pos):
            if layer == flags.layer:
                seen.append(x[0, -1, flags.dims])
            return x
        with torch.no_grad():
            model.stream(torch.tensor([prompt], device=model.wte.weight.device), edit)
    return torch.stack(seen).float()


# ---------------------------------------------------------------------------- training

def optimizers(model, lr, decay):
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for everything else.

    On this task Muon needs about a third of AdamW's steps to the same loss.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad]
    ids = set(map(id, matrices))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]


def schedule(step, steps):
    """Share of the learning rate at `step`: a short warm-up, then a cosine down to nothing."""
    warm = min(20, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def lm_loss(model, batch, edit=None):
    """Mean loss (nats a token) over the text's tokens; the prompt's are given, not predicted."""
    on = batch.targets >= 0
    with torch.autocast(batch.idx.device.type, torch.bfloat16):
        logits = model.head(model.stream(batch.idx, edit)[on])      # (positions with a target, V)
    return F.cross_entropy(logits.float(), batch.targets[on])


def fit(run, name, model, steps, arm=None, stage=lambda step: "control"):
    """Train `model` for `steps` steps and return its log, a list of dicts.

    arm(step, batch) -> (edit, flag_loss), or None for the language-modelling loss alone.
    Checkpoints go to run.out/name.pt. A run that was stopped is taken up where it was, to the same
    bits: batches, supply and measurements are functions of the seed and the step.
    """
    s, file = run.size, run.out / f"{name}.pt"
    lr = s.lr if name == "base" else s.finetune_lr
    opts = optimizers(model, lr, s.decay)
    begin, log, seconds, tokens = 0, [], 0.0, 0
    if file.exists():
        saved = load(run, file)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"]):
            opt.load_state_dict(state)
        begin, log, seconds, tokens = (saved[key] for key in ("step", "log", "seconds", "tokens"))

    def checkpoint(step):
        save(file, {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts],
                    "step": step, "log": log, "seconds": seconds, "tokens": tokens,
                    "config": dataclasses.asdict(model.config), "settings": run.settings,
                    "concepts": run.data.concepts, "flags": dataclasses.asdict(run.flags)})

    saved_at = shown_at = time.time()
    for step in range(begin, steps):
        started = time.time()
        batch = to(run.device, D.batch(run.train, step, s.batch, run.seed, s.no_prompt))
        edit, flag_loss = arm(step, batch) if arm else (None, None)
        lm = lm_loss(model, batch, edit)
        flag = flag_loss() if arm else torch.zeros(())
        (lm + s.weight * flag).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(norm):
            last = f"{file} holds step {begin}" if file.exists() else "there is no checkpoint yet"
            raise Stop(f"{name}, step {step}: the loss is {lm.item():.3g}, its gradient {norm:.3g}; "
                       f"{last}. Lower the learning rate")
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * schedule(step, steps)
            opt.step()
            opt.zero_grad()
        seconds, tokens, done = seconds + time.time() - started, tokens + batch.idx.numel(), step + 1

        if done % s.every == 0 or done == steps:
            log.append({"step": done, "stage": stage(step), "lm_loss": held_out(run, model),
                        "flag_loss": flag.item(), "train_loss": lm.item()})
            if name != "base":
                log[-1] |= track(run, model)
        if time.time() - saved_at > 30 or done == steps or run.signal:
            checkpoint(done)
            begin, saved_at = done, time.time()
        if run.signal:
            raise Stop(f"stopped at step {done} of {name}; the same command goes on from there",
                       128 + run.signal)
        if time.time() - shown_at > 1 or done == steps:
            shown_at, left = time.time(), (steps - done + run.later[name]) * seconds / done
            point = {"lm": lm.item(), "flags": flag.item()} | (log[-1] if log else {})
            shown = ("lm", "flags", "intact", "blank", "conflict")
            progress(f"{name:7s} {done:4d}/{steps}  "
                     + "  ".join(f"{key} {point[key]:.3f}" for key in shown if key in point)
                     + f"  {tokens / seconds:,.0f} tokens/s  ETA {left // 60:.0f}:{left % 60:02.0f}",
                     end=done == steps)
    run.seconds[name], run.rate[name] = seconds, tokens / seconds
    return log

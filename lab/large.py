"""How is a model trained that one device can't hold? FSDP2 deals it out to several.

    torchrun --nproc_per_node=4 -m lab.large --init FOLDER --data my.jsonl --micro 4
    python -m lab.large --init FOLDER --data my.jsonl --micro 4         # one device, less memory

The main job of flags.py. Weights are float32 under bfloat16 autocast: a parameter takes some 12 to
16 bytes (weight, gradient, one or two optimizer states) on all devices together, and three models
are held. For a moment each device holds one of them whole, and the host four for each process.
With --micro so many sequences go through the model at once; a real checkpoint keeps one activation
a block and computes the rest twice. All processes measure along, the first one prints.
"""
import copy
import dataclasses
import functools
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import data as D
import flags as F
from lab import tools
from model import optimizers

WHOLE = StateDictOptions(full_state_dict=True)      # as one process has it, whatever their number
TO_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True)      # the first process has it


def parts(batch, micro):
    """This process's rows of a batch, `micro` at a time: pairs of (share, part).

    Both losses are means over targets. So the loss of the whole is the sum of share x loss of the
    part, where a part's share is its share of the targets; and N times that for N processes, which
    average their gradients.
    """
    rank, N = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = D.Batch(*(tensor[rank::N] for tensor in batch))
    for i in range(0, len(mine.idx), micro or len(mine.idx)):
        part = D.Batch(*(tensor[i:i + (micro or len(tensor))] for tensor in mine))
        yield N * (part.targets >= 0).sum() / (batch.targets >= 0).sum(), part


def save_memory(model):
    """Of a real checkpoint keep one activation a block, and compute the rest twice."""
    for block in model.blocks if hasattr(model, "model") else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(model, device):
    """Deal a model out to the processes; for one there is nothing to do but to move it."""
    save_memory(model)
    if dist.is_initialized():
        for module in (*model.blocks, model):
            fully_shard(module)
    return model.to(device)


def train(run, name, model, steps, method=None):
    """flags.train with parts and sharded states. Its checkpoints suit any number of processes."""
    s, file, micro = run.size, run.out / f"{name}.pt", run.micro
    opts = optimizers(model, s.lr, s.embedding_lr, s.decay, s.muon)
    done = {"step": 0, "log": [], "seconds": 0.0, "tokens": 0}
    if file.exists():
        saved = F.read_checkpoint(file, run.settings)
        set_state_dict(model, opts, model_state_dict=saved["model"],
                       optim_state_dict=saved["optimizers"], options=WHOLE)
        done = saved["done"]
    saved_at, warm = time.time(), min(20, steps // 10 + 1)
    for step in range(done["step"], steps):
        started, total = time.time(), torch.zeros(2, device=run.device)
        batch = D.batch(run.train, step, s.batch, run.seed, s.no_prompt).to(run.device)
        for share, part in parts(batch, micro):
            edit, flag_loss = method(step, part) if method else (None, lambda: torch.zeros(()))
            lm, flag = F.lm_loss(model, part, edit), flag_loss().to(run.device)
            (share * (lm + s.weight * flag)).backward()
            total += share * torch.stack([lm, flag]).detach()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise D.Stop(f"{name}, step {step}: its gradient is {norm}; lower the learning rates")
        now = min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        for opt, peak in zip(opts, (s.lr, s.embedding_lr)):
            opt.param_groups[0]["lr"] = peak * now
            opt.step()
            opt.zero_grad()
        done["step"] += 1
        done["seconds"] += time.time() - started
        done["tokens"] += batch.idx.numel()
        noted = done["step"] % s.every == 0 or done["step"] in (s.produce, steps)
        if noted and name != "base":
            done["log"].append(F.look(run, model, step) | {"train_loss": total[0].item()})
        due = torch.tensor([done["step"] == steps or time.time() - saved_at > 300.0],
                           dtype=torch.float, device=run.device)
        if dist.is_initialized():
            dist.broadcast(due, 0)      # all save at the same step
        if due:
            weights, states = get_state_dict(model, opts, options=TO_SAVE)
            F.write(file, lambda new: torch.save({
                "model": weights, "optimizers": states, "done": done, "settings": run.settings,
                "config": vars(model.config), "flags": vars(run.flags),
                "merges": run.tok.merges}, new))
            saved_at = time.time()
        F.progress(f"{name:8s}{done['step']:5d}/{steps}  lm {total[0]:.3f}  flags {total[1]:.3f}",
                   (steps - done["step"]) * done["seconds"] / done["step"], end=noted)
    return done


def train_all(run):
    """flags.train_all, with each model dealt out."""
    s, steps = run.size, run.size.produce + run.size.rely
    whole = run.base.cpu()      # a device gets its part alone
    base, control, flagged = (copy.deepcopy(whole) for _ in range(3))
    shard(base, run.device)
    done = {"base": train(run, "base", base, s.base)}
    run.flags.height = s.height * F.stream_rms(run, base)
    weights = get_model_state_dict(base, options=WHOLE)
    for model in (control, flagged):
        if s.top:
            model.requires_grad_(False).blocks[-s.top:].requires_grad_(True)
        set_model_state_dict(shard(model, run.device), weights, options=WHOLE)
    done["control"] = train(run, "control", control, steps)
    done["flags"] = train(run, "flags", flagged, steps,
                          lambda step, batch: F.install(run.flags, batch, F.supply(s, step)))
    if run.tok.save:        # the main job will save a folder: gather what was dealt out
        weights = get_model_state_dict(flagged.model, options=TO_SAVE)
        flagged.model.save_pretrained = functools.partial(
            flagged.model.save_pretrained, state_dict=weights)
    if dist.is_initialized() and dist.get_rank():
        run.tok = dataclasses.replace(run.tok, save=None)
    return {"base": base, "control": control, "flags": flagged}, done


def job(run, args):
    N = dist.get_world_size() if dist.is_initialized() else 1
    if min(run.size.batch, len(run.train)) % N:
        raise D.Stop(f"{N} processes can't share batch={run.size.batch} evenly: choose a multiple")
    if args.micro < 0:
        raise D.Stop(f"--micro is 0 or more sequences, not {args.micro}")
    run.micro = args.micro
    run.settings["size"] += ", lab.large"       # its checkpoints are not those of flags.py
    F.train_all = train_all     # the one piece of the main job that differs
    F.main_job(run)
    return {}


if __name__ == "__main__":
    p = tools.parser(__doc__)
    p.add_argument("--micro", type=int, default=0,
                   help="sequences in one forward pass (default: all)")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
            F.write = lambda file, save: None
    tools.main(p, job)
    if dist.is_initialized():
        dist.destroy_process_group()

"""Other ways to train stage 2, and to steer, that lab.probe measures beside the method."""
import torch

import data as D
import flags

VARIANTS = {"method": {}, "lambda2 6": {"weight2": 6.0}, "lambda2 1.5": {"weight2": 1.5},
            "lambda2 0": {"weight2": 0.0}, "hold": {"hold": True}, "once": {"once": True}}


def method(run, weight2=None, hold=False, once=False):
    """flags.install with another stage 2: its flag loss weighs weight2, is taken at the first flag
    position alone (hold), or the slice is written after block k alone (once)."""
    f, s = run.flags, run.size
    if weight2 is not None and not s.weight:
        raise D.Stop("--set weight=0 leaves no flag loss for lambda2 to weigh: other --variants")

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


def held(run, model):
    """By: the model's own flags, read at the prompt's last token, are rounded and held."""
    def by(ids, values):
        own = (flags.own_flags(model, run.flags, ids) > 0.5).float()
        return ids, flags.steer(run.flags, flags.last(ids), own)
    return by


def remove(run, directions, start):
    """An edit: the span of `directions` (D, R) goes from the other channels after every block >= k,
    from position start[b] on. Does the text change?"""
    q = torch.linalg.qr(directions.float())[0]                                  # (D, R)

    def edit(layer, x, pos):
        if layer >= run.flags.layer:
            on, rest = (pos >= start.to(x.device)[:, None])[..., None], x[..., :run.flags.first]
            x[..., :run.flags.first] = torch.where(on, rest - rest @ q @ q.T, rest)
        return x
    return edit


def held_loss(run, model):
    """LM loss on held-out rows, with the model's own flags held as in `held`."""
    batches = [run.test[i:i + 32] for i in range(0, len(run.test), 32)]
    own = torch.cat([flags.own_flags(model, run.flags, [row.prompt for row in batch])
                     for batch in flags.counted("reading flags, batch", batches)]) > 0.5
    rows = [row._replace(label=y) for row, y in zip(run.test, own.tolist())]
    return flags.held_out(run, model, rows, p=1.0)[0]

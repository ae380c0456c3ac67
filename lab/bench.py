"""How fast is it? Tokens a second of training and writing, and how both grow.

    python -m lab.bench --size small                # a minute or two; nothing else should run

Jobs take turns, so that a noisy machine is noisy for all. With the library transformers installed
its GPT2LMHeadModel of the same shapes runs beside: by its own `generate`, and as `Pretrained`.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

import data as D
import flags
from lab import tools
from model import GPT, Config, Pretrained, optimizers


def rounds(jobs, count):
    """Seconds of each job in `count` turns, (count,); the first turn warms up."""
    times = {name: [] for name in jobs}
    for turn in flags.counted("timing, turn", range(count + 1)):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: np.array(t) for name, t in times.items()}


def their_model(run):
    """GPT2LMHeadModel of the same shapes; None without transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("transformers is not installed (pip install transformers): no comparison with it")
        return None
    c = run.base.config
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function="relu2",
        bos_token_id=run.tok.end, eos_token_id=None, pad_token_id=run.tok.end)).to(run.device)


def training(run, model, method=None):
    """A job of eight steps."""
    s = run.size
    opts = optimizers(model, 1e-3, 1e-3, s.decay, s.muon)
    batches = [D.batch(run.train, step, s.batch, run.seed, s.no_prompt).to(run.device)
               for step in range(8)]

    def job():
        for batch in batches:
            edit, flag_loss = method(batch) if method else (None, lambda: 0.0)
            (flags.lm_loss(model, batch, edit) + s.weight * flag_loss()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
    return job, sum(batch.idx.numel() for batch in batches)


def matmul_peak(s, tokens, device):
    """The best bfloat16 rate (GFLOP/s) of this machine on the matmuls of one block."""
    jobs, work = {}, {}
    for a, b in ((1, 3), (1, 1), (1, 4), (4, 1)):
        x = torch.randn(tokens, a * s.width, device=device).bfloat16()
        w = torch.randn(b * s.width, a * s.width, device=device).bfloat16()
        jobs[a, b] = lambda x=x, w=w: [F.linear(x, w) for _ in range(20)]
        work[a, b] = 20 * 2 * tokens * a * b * s.width ** 2
    return max(work[k] / np.median(seconds) for k, seconds in rounds(jobs, 5).items()) / 1e9


def growth(run):
    """How a training step and a written token grow with width, layers, context and batch. A written
    token is one of 32 behind half a context, without the time to read that."""
    s, rows = run.size, []
    plain = {"width": s.width, "layers": s.layers, "context": 64, "batch": s.batch}
    for change in ({}, {"width": 256}, {"width": 512}, {"layers": 8}, {"layers": 16},
                   {"batch": 256}, {"context": 256, "batch": 16}, {"context": 1024, "batch": 4}):
        c = plain | change
        model = GPT(Config(s.vocab, c["context"], c["layers"], s.heads, c["width"])).to(run.device)
        opts = optimizers(model, 1e-3, 1e-3, 0.0)
        idx = torch.randint(s.vocab, (c["batch"], c["context"]), device=run.device)
        batch = D.Batch(idx, idx, torch.zeros(len(idx), 1), torch.zeros(len(idx)))

        def step():
            flags.lm_loss(model, batch).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
        seconds = np.median(rounds({0: step}, 3)[0])
        prompt = [[1] * (c["context"] // 2)]
        took = rounds({n: lambda n=n: model.generate(prompt, n) for n in (1, 33)}, 3)
        rows.append(c | {"seconds": float(seconds), "tokens_per_second": idx.numel() / seconds,
                         "ms_per_written_token": 1e3 * float(np.median(took[33] - took[1])) / 32})
    return rows


def job(run, args):
    s, prompts = run.size, (run.asked["neutral"][0] * 64)[:64]
    n = min(64, s.context + 1 - max(len(run.tok.prompt(prompt)) for prompt in prompts))
    run.flags.height = 1.0
    theirs = their_model(run)
    install = lambda batch: flags.install(run.flags, batch, s.supply)
    models = {name: (GPT(run.base.config).to(run.device), how)
              for name, how in (("plain", None), ("with flags", install))}
    if theirs:
        models["Pretrained"] = Pretrained(theirs, s.context), None
    train, writes = {}, {}
    for name, (model, method) in models.items():
        train[name], tokens = training(run, model, method)
    for B in (1, 64):
        ids = [run.tok.prompt(prompt) for prompt in prompts[:B]]
        edit = flags.steer(run.flags, flags.last(ids), torch.ones(B, run.flags.count))
        for name, (model, _) in models.items():
            writes[B, name] = lambda model=model, ids=ids, edit=edit, name=name: model.generate(
                ids, n, edit if name == "with flags" else None)
        if theirs:
            longest = max(map(len, ids))
            idx = [[run.tok.end] * (longest - len(i)) + i for i in ids]
            mask = [[0] * (longest - len(i)) + [1] * len(i) for i in ids]
            idx, mask = (torch.tensor(rows, device=run.device) for rows in (idx, mask))
            writes[B, "transformers"] = lambda idx=idx, mask=mask: theirs.generate(
                idx, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=True,
                temperature=0.8, top_k=0)
    trained, written = rounds(train, 9), rounds(writes, 15)
    peak = matmul_peak(s, tokens // 8, run.device)
    cost = lambda flagged, plain: float(np.median(flagged / plain)) - 1
    result = {
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "train": {name: tokens / float(np.median(t)) for name, t in trained.items()},
        "write": {B: {name: B * n / float(np.median(written[B, name]))
                      for b, name in written if b == B} for B in (1, 64)},
        "flags_cost": {"train": cost(trained["with flags"], trained["plain"])} | {
            B: cost(written[B, "with flags"], written[B, "plain"]) for B in (1, 64)},
        "peak_gflops": float(peak)}
    print("\n{device}, {threads} threads, torch {torch}: tokens a second".format(**result))
    titles = ("training", "writing one text", "writing 64")
    for title, rates in zip(titles, (result["train"], *result["write"].values())):
        print(f"  {title:18s}" + "  ".join(f"{name} {rate:,.0f} ({rate / rates['plain']:.2f})"
                                           for name, rate in rates.items()))
    print("  flags cost " + ", ".join(f"{share:.1%} of {title}" for title, share in zip(
        titles, result["flags_cost"].values())))
    print(f"  bfloat16 matmuls of these shapes reach {peak:,.0f} GFLOP/s")
    result["growth"] = growth(run)
    print("\n  width  layers  context  batch   s a step  tokens/s  ms a written token")
    for row in result["growth"]:
        print("  {width:5d}  {layers:6d}  {context:7d}  {batch:5d}  {seconds:9.3f}"
              "  {tokens_per_second:8,.0f}  {ms_per_written_token:18.2f}".format(**row))
    tools.save(run, "bench.json", result)
    return result


if __name__ == "__main__":
    tools.main(tools.parser(__doc__), job)

"""Check an exercise: `python exercises/check.py 3`, in a starter folder or in the repository.

Prints whether it is passed and, if not, one line of hint. --json prints one object for graders.
"""
import contextlib
import faulthandler
import importlib
import json
import os
import sys
import traceback
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

K, C, H = 3, 20, 4.0
FIRST, SLICE, REST = 13, slice(13, 16), [*range(13), *range(16, 20)]    # not the last channels
POS = torch.arange(4)[None]


def same(a, b):
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)


def there(function, *args, else_=False):
    """Whether it works on the device "meta", where nothing is calculated: not, if it mixes two.
    else_: what counts if it uses something that needs numbers, such as a boolean mask."""
    try:
        function(*args)
    except RuntimeError as error:
        return else_ and (isinstance(error, NotImplementedError) or "item()" in str(error))
    return True


def steer(F):
    flags, values = F.Flags(2, FIRST, K, H), torch.tensor([[1., 0, 1], [0, 1, 0]])
    x0, pos = torch.randn(2, 9, C), torch.arange(9)[None]
    edit = F.steer(flags, torch.tensor([3, 6]), values)
    yield same(edit(1, x0.clone(), pos), x0), "block 1 is before k = 2: leave x as it is"
    for layer in (2, 3, 4):
        x = edit(layer, x0.clone(), pos)
        yield same(x[..., REST], x0[..., REST]), "only the channels of flags.slice change"
        for b, t in ((0, 3), (1, 6)):
            yield same(x[b, :t], x0[b, :t]), f"row {b} starts at {t}: nothing before it changes"
            yield (same(x[b, t:, SLICE], (H * values[b]).expand(9 - t, K)),
                   f"block {layer}, row {b}: from position {t} ON (>=) the slice is height x "
                   "value, 0 too, and again after EVERY block from k on")
    x = torch.randn(2, 1, C)
    y = edit(2, x.clone(), torch.tensor([[5], [5]]))
    yield (same(y[0, 0, SLICE], H * values[0]), "while decoding, x is one token: compare start "
           "with pos, not with x's own index, and anew at each call")
    yield same(y[1], x[1]), "row 1 starts at 6, this is position 5: each row has a start of its own"
    y = edit(2, x.clone(), torch.tensor([[2], [7]]))
    yield (same(y[0], x[0]) and same(y[1, 0, SLICE], H * values[1]),
           "pos (B, T): where prompts differ in length each row has positions of its own")
    e = F.steer(F.Flags(1, FIRST, K, 2.5), torch.tensor([0]), torch.tensor([[-1, .5, 2]]))
    yield (e(1, x[:1] + 0, pos[:, :1])[0, 0, SLICE].tolist() == [-2.5, 1.25, 5],
           "the slice is height x value, whatever the two are: here 2.5 x -1, .5 and 2")
    e = F.steer(flags, torch.tensor([0, 0]), torch.zeros(2, K))
    yield not e(2, x0.clone(), pos)[..., SLICE].any(), "a row of zeros is written, too: `blank`"
    half = edit(2, x.bfloat16(), torch.tensor([[7]]))
    yield half.dtype == torch.bfloat16, "the stream keeps its dtype"
    yield same(half[1, 0, SLICE], H * values[1]), "pos may be (1, T), one for all rows"
    yield (there(edit, 2, x0.to("meta"), pos.to("meta"), else_=True),
           "start and values may be on another device than x: x.device says which")


def pad(D):
    row = lambda prompt, text, *label: D.Row(prompt, text, label)
    b = D.pad(rows := [row([98], [98, 97], 1., 0.), row([99, 1, 2], [3, 0, 99], 0., 1.)])
    yield b.idx.shape == (2, 8), "the longest row of idx has 5 tokens, so T is 8: a multiple of 8"
    yield (b.idx.tolist() == [[98] * 8, [99, 1, 2, 3, 0] + [98] * 3],
           "idx: prompt and text but for the last token, then the first token of the first row as "
           "padding")
    yield (b.targets.tolist() == [[98, 97] + [-100] * 6, [-100, -100, 3, 0, 99] + [-100] * 3],
           "targets[t] is what follows idx[t]; the prompt and the padding are not predicted "
           "(-100), but the last token of the prompt predicts the first of the text")
    width = lambda prompt, text: D.pad([row([99] * prompt, [1] * text, 1.)]).idx.shape
    yield width(4, 5) == (1, 8), "a row of 9 tokens has 8 in idx, and 8 is a multiple of 8 already"
    yield width(5, 5) == (1, 16), "a row of 10 tokens has 9 in idx, and 9 become 16"
    yield b.idx.dtype == b.targets.dtype == torch.int64, "idx and targets are int64"
    yield (b.y.dtype == torch.float32 and b.y.tolist() == [[1, 0], [0, 1]],
           "y is float32, one row for each label")
    yield b.draw.tolist() == [0, 0] and rows[0].prompt == [98], "draw is 0; rows stay as they are"


def setting(F, D):
    targets = torch.tensor([[-100, 5, 0, -100], [5, 5, 5, 5], [-100, -100, -100, 5]])
    y = torch.tensor([[1., 0, 0], [0, 1, 1], [0, 0, 1]])
    batch = lambda draw: D.Batch(targets.clamp(min=0), targets, y, torch.tensor(draw))
    xs = [torch.randn(3, 4, C) for _ in range(3)]
    return F.Flags(2, FIRST, K, H), batch, targets >= 0, y, xs


def install_write(F, D):
    flags, batch, on, y, xs = setting(F, D)
    x = F.install(flags, batch([0.1, 0.2, 0.3]), 1.0)[0](1, xs[0].clone(), POS)
    yield same(x, xs[0]), "block 1 is before k = 2: leave x as it is"
    for p, draw, who in ((0.0, [0., 0., 0.], []), (0.5, [.4, .2, .6], [0, 1]),
                         (0.5, [.6, .5, .4], [2]), (1.0, [.9, .0, .5], [0, 1, 2])):
        edit, _ = F.install(flags, batch(draw), p)
        for layer, x0 in enumerate(xs, start=2):
            x = edit(layer, x0.clone(), POS)
            for b in range(3):
                w = on[b] & (b in who)
                yield (same(x[b][:, REST], x0[b][:, REST]),
                       "only the channels of flags.slice change")
                yield (same(x[b][~w], x0[b][~w]), f"p = {p}, draws {draw}: sequence {b} is changed "
                       "where it must not be: only at flag positions, where a target is >= 0, of "
                       "sequences with draw < p (not <=)")
                yield (same(x[b][w][:, SLICE], (H * y[b]).expand(int(w.sum()), K)),
                       f"p = {p}, draws {draw}, block {layer}, sequence {b}: where draw < p and "
                       "a target is >= 0 (0 is a token) the slice is height x y, after EVERY block "
                       "from k on")
    half = F.install(F.Flags(1, FIRST, K, 2.0), batch([.1] * 3), 1.0)[0](1, xs[0].bfloat16(), POS)
    yield (half.itemsize == 2 and same(half[1, 0, SLICE], 2 * y[1]),
           "k and height are those of `flags`; x keeps its dtype")


def install_loss(F, D):
    yield from install_write(F, D)
    flags, batch, on, y, xs = setting(F, D)
    error = lambda x: ((x[..., SLICE] / H - y[:, None]) ** 2)[on].mean()
    for p, draw, n in ((0.0, [0.] * 3, 3), (1.0, [.1] * 3, 3), (0.5, [.4, .6, .6], 2),
                       (0.0, [0.] * 3, 1)):         # n: blocks from k on
        edit, flag_loss = F.install(flags, batch(draw), p)
        edit(1, torch.randn(3, 4, C), POS)
        for layer, x in enumerate(xs[:n], start=2):
            edit(layer, x.clone(), POS)
        yield (same(flag_loss(), torch.stack([error(x) for x in xs[:n]]).mean()),
               "read BEFORE you write, and keep a copy, since a slice is a view: the loss is of "
               "what the model itself put there, in supplied sequences as in others" if p else
               "the flag loss is a mean over all blocks from k on, all flag positions of the batch "
               "alike (not first within each sequence) and all flags, of (own / height - y)^2; "
               "each batch has a list of reads of its own")
        xs = [torch.randn(3, 4, C) for _ in range(3)]
    edit, flag_loss = F.install(flags, batch([0., 0., 0.]), 1.0)
    xs = [x.requires_grad_() for x in xs]
    for layer, x in enumerate(xs, start=2):
        edit(layer, x.clone(), POS).sum().backward(retain_graph=True)
        yield x.grad[..., SLICE][on].eq(0).all(), "what was overwritten gets no LM gradient"
        yield x.grad[..., REST].eq(1).all(), "all other channels pass the LM gradient"
    found = flag_loss()
    yield found.requires_grad, "the flag loss must reach the model: no detach"
    found.backward()
    yield (all(x.grad[..., SLICE][on].ne(0).all() for x in xs),
           "the flag loss must reach all flags, after every block from k on")


def digest(model):
    return zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters()))


def experiment(F, producing):
    out = ROOT / "out" / "exercise-5"
    for file in out.glob("*.pt"):
        file.unlink()
    run = F.prepare(F.parser().parse_args([
        "--size", "tiny", "--seed", "7", "--out", str(out),
        "--set", "rely=160", "every=40", "track=64", "prompts=64"]))
    begun, untrained, optimizers = [], digest(run.base), F.optimizers

    def spy(model, *more):      # each training asks for its optimizers when it begins
        begun.append((digest(model), run.flags.height))
        return optimizers(model, *more)
    with mock.patch.object(F, "optimizers", spy):
        s, curves = run.size, producing.experiment(run)
    starts = [start for start, _ in begun[1:]]
    yield (begun and begun[0][0] == untrained and untrained not in starts,
           "train run.base first: no model here has learned anything yet")
    yield len(starts) == 3 and len(set(starts)) == 1, "three trainings begin from one trained base"
    yield (begun and begun[-1][1] not in (begun[0][1], s.height),
           "a raised flag has a height: measure it on the trained base, as `train_all` does")
    yield curves.keys() >= {"p = 0", "p = 1"}, 'two curves: "p = 0" and "p = 1"'
    yield "control" in curves, "without the control one can't tell what finetuning alone does"
    for name, points in curves.items():
        yield (len(points) > 3,
               f"{name}: the final point alone does not show when it happens; give the whole log")
        yield (points[0]["step"] == s.produce and points[0]["stage"] == 1,
               f"{name}: the curve begins at the end of stage 1")
        yield (points[-1]["step"] == s.produce + s.rely,
               f"{name}: both stages, {s.produce + s.rely} steps, for every training")
    off, on = curves["p = 0"], curves["p = 1"]
    yield off[0]["conflict"] == on[0]["conflict"], "stage 1 is the same for both: from one base"
    yield on[-1]["conflict"] > 0.8, "with p = 1 the flags should rule: is p = 1 in stage 2?"
    yield off[-1]["conflict"] < on[-1]["conflict"] - 0.2, "with p = 0 nobody is supplied in stage 2"
    yield off[-1]["flag_loss"] < 0.2, "with p = 0 flags are still produced: only the supply is off"
    yield curves["control"][-1]["flag_loss"] > 0.2, "the control has no flag loss"


def auc(F):
    for scores, labels, area, hint in (
            ([1., 2., 3., 4.], [0, 0, 1, 1], 1, "positives above all negatives: 1"),
            ([4., 3., 2., 1.], [0, 0, 1, 1], 0, "positives below all negatives: 0"),
            ([.1, .9, .3, .2, .8], [0, 1, 1, 0, 0], 5 / 6, "count PAIRS of a 1 and a 0, each once"),
            ([1., 2., 3., 3.], [0, 1, 0, 1], 2.5 / 4, "a tie counts half"),
            ([5.] * 9, [0, 1] * 4 + [0], 0.5, "all the same: 0.5"),
            ([.3, .300001], [0, 1], 1, "only what is equal is a tie")):
        found = F.auc(torch.tensor(scores), torch.tensor(labels).float())
        yield abs(found - area) < 1e-6, hint
    yield isinstance(found, float), "return a float"
    yield F.auc(torch.tensor([.1, .2]), torch.tensor([False, True])) == 1, "labels may be bool"


def means(compare, F, D):
    x, y = torch.randn(4, 5, 6), [[[1., 0], [0, 1]], [[1., 1], [0, 1]]]
    targets = torch.tensor([[[-100, 1, 0, 1, -100], [1] * 5],
                            [[-100] * 4 + [1], [-100, 1, -100, -100, -100]]])
    batches = [D.Batch(t.clamp(min=0), t, torch.tensor(labels), torch.zeros(2))
               for t, labels in zip(targets, y)]
    run = SimpleNamespace(data=SimpleNamespace(concepts=["a", "b"]), device=torch.device("cpu"),
                          train=None, seed=3, flags=F.Flags(2, 4, 2), size=F.Size(width=6, flags=2))
    asked = []

    def batch(rows, step, size, seed, no_prompt=0.0):
        asked.append((size, seed, no_prompt))
        return batches[step]
    stream = lambda idx: x[:2] if idx.equal(batches[0].idx) else x[2:]
    streams = lambda model, idx, edit=None: [scale * stream(idx) for scale in (-1, 1, 2)]
    with mock.patch.object(D, "batch", batch), mock.patch.object(F, "streams", streams):
        found = compare.means(run, SimpleNamespace(config=SimpleNamespace(n_embd=6)), batches=2)
    a = torch.cat([x[0, 1:4], x[2, 4:]]).mean(0)
    b = torch.cat([x[1], x[2, 4:], x[3, 1:2]]).mean(0)
    yield (asked == [(100, 3, 0.0)] * 2,
           "steps 0 ... batches - 1, each of 100, by run.seed, with all prompts")
    yield found.shape == (2, 6), "one direction for each concept: (K, C)"
    yield (same(found.sum(0), torch.zeros(6)),
           "take away the mean of the K rows, each weighing the same: what all share is none")
    yield (same(found, torch.stack([a, b]) - (a + b) / 2),
           "each concept's mean, less the mean of all K rows: the stream after block k, at flag "
           "positions alone (no padding), each position of all batches weighing the same (no "
           "mean of means); a text with two concepts counts for both")


def ridge(probe):
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([1, 100, .01, 1, 1, 0, 1e-5])      # of a channel that never changes: 0
    offset = torch.tensor([5, 5, 5, 5, 5, 5, 0])
    x = torch.randn(50, 7, generator=g) * scale + offset
    y = (torch.randn(50, 3, generator=g) > 0).long()
    x_test = torch.randn(7, 7, generator=g) * torch.tensor([3, 3, 3, 3, 3, .01, 1e-4]) + offset
    some, tests = x[:, [0, 3, 4]], x_test[:, [0, 3, 4]]
    near = lambda a, b: a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-3)
    ridge = lambda x, y, x_test, c: probe.ridge(x.clone(), y.clone(), x_test.clone(), c)
    found, none = ridge(some, y, tests, 1.0), torch.zeros(7, 3)
    yield found.shape == (7, 3), "scores (M, K): one row for each of x_test"
    yield (near(found, ridge(9 * some + 5, y, 9 * tests + 5, 1.0)),
           "standardise x and x_test: neither the unit of a channel nor where its 0 lies matters")
    yield (near(ridge(some, y, tests[:1].expand(7, 3), 1.0), found[:1].expand(7, 3)),
           "standardise x_test by the mean and std of x, not by its own")
    yield (near(ridge(some, y, tests, 1e9), none),
           "at penalty 1e9 all scores are near 0: it is on every weight, the column of ones' too")
    yield (not near(ridge(0 * some, y, tests, 1.0), none),
           "add a column of ones: where x says nothing, the scores are near the mean of y")
    ours, test = x.double(), x_test.double()
    both = (torch.cat([ours, test]) - ours.mean(0)) / ours.std(0).clamp(min=1e-4)
    a, b = torch.cat([both, torch.ones(57, 1)], 1).split([50, 7])
    for penalty in (1.0, 10.0, 0.1):
        found = ridge(x, y, x_test, penalty)
        yield torch.isfinite(found).all(), "a channel that never changes has std 0: clamp it"
        gram = a.T @ a + penalty * torch.eye(8, dtype=torch.double)
        wanted = b @ torch.linalg.solve(gram, a.T @ y.double())
        yield (torch.allclose(found.double(), wanted, atol=2e-3, rtol=2e-3),
               "solve (X'X + penalty I) W = X'y, not the mean of it; a std is x.std(0), which "
               "divides by N - 1, at least 1e-4")


def route(compare, F, D):
    decoded = {5: " crab", 6: " crabs", 7: "Cow", 8: " ice"}
    tok = SimpleNamespace(n_vocab=12, decode=lambda ids: decoded.get(ids[0], "?"))
    idx, targets = torch.tensor([[9, 5, 5, 6, 7, 8], [-100, 5, 6, 7, 8, -100]])
    batch = D.Batch(idx.expand(2, 6), targets.expand(2, 6), torch.tensor([[1., 1, 0], [0, 0, 1]]),
                    torch.zeros(2))

    def grad(words, layer):
        run = SimpleNamespace(
            flags=F.Flags(2, FIRST, K, H), tok=tok, device=torch.device("cpu"),
            data=SimpleNamespace(concepts=["sea", "farm", "ice"], words=words),
            size=SimpleNamespace(layers=4, width=C))
        x = torch.randn(2, 6, C, requires_grad=True)
        edit, flag_loss = compare.route(run)(0, batch)
        z = edit(layer, x + 0, None)
        (z.sum() + flag_loss() + 0 * x.sum()).backward()
        return torch.equal(z, x), x.grad
    words = {"crab": "sea", "crabsticks": "sea", "cow": "farm", "ice": "ice"}
    full, wanted, text = torch.ones(3, 2, 6, C)
    for b, t, channel in ((0, 1, 13), (0, 3, 14), (1, 4, 15)):
        wanted[b, t] = 0
        wanted[b, t, channel] = 1
    text[:, 1:5] = 0
    text[0, 1:5, 13:15] = text[1, 1:5, 15] = 1
    yield grad(words, 2)[0], "nothing changes forwards: x.detach() where no gradient shall pass"
    for layer in (1, 4):
        yield (same(grad(words, layer)[1], full), f"block {layer} is outside k ... L - 1 (here 2 "
               "and 3): all gradient passes; the last block is free")
    for layer in (2, 3):
        got = grad(words, layer)[1]
        yield (same(got[0, 3], wanted[0, 3]), f"block {layer}, target 'Cow' (not idx), y has farm: "
               "channel 14 alone passes; compare in lower case")
        yield (same(got[0, 4], wanted[0, 4]),
               "where the target is no word of THIS text's concepts ('ice': y is 0), all passes")
        yield (same(got, wanted), "target ' crab' (strip it): channel 13 alone passes; ' crabs' is "
               "no whole word: all passes; and each row has a y of its own")
    yield same(grad(None, 2)[1], text), "no list of words: all text positions, all flags with y = 1"


def cache(model):
    c, seen = model.Cache(2, 8, torch.tensor([0, 2, 1])), [[], []]
    for T in (3, 1, 2):
        for layer in (0, 1):
            k, v = torch.randn(2, 3, 2, T, 4, dtype=torch.bfloat16).unbind(0)
            seen[layer].append((k, v))
            for i, got in enumerate(c.append(k, v)):
                kv = torch.cat([pair[i] for pair in seen[layer]], 2)
                yield (got.shape == kv.shape, f"all so far are {(*kv.shape,)}, you gave "
                       f"{(*got.shape,)}: length grows by T, after the LAST layer")
                yield got.dtype == kv.dtype, "the buffers have k's dtype"
                yield same(got, kv), "keys are keys and values values; each layer its own, in order"
    yield c.length == 6, "length is a number of positions: it grows by T"
    yield (got.untyped_storage().nbytes() >= got.nbytes // 6 * 8,
           "return views of one buffer of `size` positions in k's dtype: no torch.cat, no clone")
    k = torch.empty(1, 2, 3, 4, device="meta")
    yield (there(model.Cache(1, 8, torch.zeros(1, dtype=torch.int64)).append, k, k),
           "the buffers are on k's device")


def bpe(D):
    def made(texts, n):
        tok = D.train_bpe(texts, 257 + n)
        return [tok.decode([256 + i]) for i in range(tok.n_vocab - 257)]
    tok = D.train_bpe(["abc abc"], 258)
    yield (tok.n_vocab, tok.end) == (258, 257), "vocab_size tokens in all; END is the last id"
    yield (len(made(["ab"], 9)) == 1,
           "fewer merges if there are no more pairs, also of pairs seen once")
    yield (made(["aab aab ab"], 2) == ["ab", "aab"],
           "the most frequent pair first; then count in the merged text")
    yield made(["zy", "yx"], 1) == ["yx"], "of equally frequent pairs the one with the smaller ids"
    yield (made(["az", "ab"], 1) == ["ab"] and made(["bc", "az"], 1) == ["az"],
           "of equally frequent pairs the one whose first id is smaller, then whose second is")
    yield (made(["abc", "abc", "ab", "xy", "xy"], 2) == ["ab", "xy"],
           "a new token's id is larger than all before, whatever its bytes")
    yield (made(["ab"] * 3 + ["xy", "zxy"], 1) == ["ab"],
           "a piece that stands three times counts three times")
    yield (made(["a b, a b, a b,"], 2)[0] == " b",
           "a space belongs to the word behind it: cut by PIECES")
    yield all(len(a) < 3 for a in made(["a b, a b"], 2)), "no merge crosses a cut"
    yield made(["don't"] * 3, 3) == ["'t", "do", "don"], "cut as PIECES says, not at spaces"
    yield made(["\u00e9\u00e9"], 1) == ["\u00e9"], "bytes, not characters, and all pairs of a piece"
    yield (made(["aaaa"], 2) == ["aa", "aaaa"] and made(["aaab"], 2) == ["aa", "ab"],
           "from left to right, without overlap")
    yield (made(["ab"] * 3 + ["abc"] * 2 + ["bc"] * 2, 2) == ["ab", "bc"],
           "a pair that has become rarer still counts, as often as it is left")
    yield (made(["ab"] * 9 + ["abxyxy"] * 2 + ["mn"] * 3, 4) == ["ab", "xy", "mn", "abxy"],
           "a merge changes the counts of the pairs beside it alone")
    yield (made([" ab"], 9)[-1] == " ab" and made(["Ab"] * 2 + ["ab"], 1) == ["Ab"],
           "texts as they are: no strip, no lower")
    yield made((text for text in ["ab"]), 1) == ["ab"], "texts may be a generator: go through once"
    try:
        D.train_bpe(["a"], 256)
        yield False, "vocab_size 256 leaves no room for END: raise Stop"
    except D.Stop:
        yield True, ""


def whole(file):
    """What a JSON file holds; None, if it is missing or broken."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def compose(name="you", folders=()):
    seeds = [zlib.crc32(f"{name} {i}".encode()) % 9000 + 1000 for i in range(3)]
    yield (len(folders) == 3, f"run your schedule with the seeds {seeds}, made of your name, once "
           "each, and give the three folders: check.py 11 --name NAME out/a out/b out/c")
    if len(folders) != 3:
        return
    results = [whole(Path(folder) / "results.json") for folder in folders]
    for folder, result in zip(folders, results):
        yield result, f"there is no whole {folder}/results.json: run your schedule to its end"
    results = [result for result in results if result]
    yield (sorted(r["seed"] for r in results) == sorted(seeds),
           f"the seeds must be {seeds}: others may have been tuned on")
    yield (all(r["data"] == "stories" and r["read"]["auc"]["n"] == 16 for r in results),
           "the stories, with all 16 flags")
    yield all(r["steer"]["compose3"]["n"] >= 256 for r in results), "at least 256 prompts"
    yield (all((r["size"], r["parameters"]) == ("small", 935_040) for r in results),
           "the model of --size small")
    lowest = min(r["steer"]["compose3"]["mean"] for r in results)
    yield lowest > 0.96, f"the lowest of three compose3 counts: {lowest:.3f} is not above 0.96"
    cost = max(r["loss"]["flags"] - r["loss"]["control"] for r in results)
    yield cost <= 0.01, f"LM loss is {cost:.3f} over the control's with one seed; 0.01 is allowed"


# number: checks in all, then groups of checks with the modules that they look into
CHECKS = {"1": (24, (steer, "flags")), "2": (8, (pad, "data")),
          "3": (110, (install_write, "flags", "data")), "4": (122, (install_loss, "flags", "data")),
          "5": (19, (experiment, "flags", "lab.producing")), "6": (8, (auc, "flags")),
          "7": (4, (means, "lab.compare", "flags", "data")), "8": (11, (ridge, "lab.probe")),
          "9": (10, (route, "lab.compare", "flags", "data")),
          "10": (56, (cache, "model"), (bpe, "data")), "11": (10, (compose,))}


def check(number, *more):
    """(points, of, hint): a point for each check that holds; hint: of a check that does not."""
    torch.manual_seed(0)
    (total, *groups), hints = CHECKS[number], []        # "" for each check that holds
    for checks, *modules in groups:
        try:
            for holds, hint in checks(*map(importlib.import_module, modules), *more):
                hints.append("" if holds else hint)
        except NotImplementedError as error:
            hints.append(f"{traceback.extract_tb(error.__traceback__)[-1].name}: not written yet")
        except (SyntaxError, ImportError) as error:     # these say themselves where
            hints.append(f"{type(error).__name__}: {error}")
        except (Exception, SystemExit, KeyboardInterrupt) as error:     # of the student's code
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            hints.append(f"{said} ({Path(frame.filename).name}, line {frame.lineno})")
            if frame.filename == __file__:      # what it returned was of no use
                hints[-1] = said + ": does it return what its docstring says?"
                if number in "1349":
                    hints[-1] += " An edit returns x; install, or a method, a pair of functions"
    return hints.count(""), total, min(hints, key=lambda h: (h == "", "not written yet" in h))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # it may lack characters of the folder's name
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("number", choices=CHECKS)
    p.add_argument("folders", nargs="*", help="of exercise 11")
    p.add_argument("--name", default="you", help="of exercise 11")
    p.add_argument("--json", action="store_true")
    args = p.parse_intermixed_args()    # folders may stand behind --name
    faulthandler.dump_traceback_later(600, exit=True)   # an endless loop ends, and says where it is
    if args.number != "5":
        torch.set_num_threads(1)
    more = (args.name, args.folders) if args.number == "11" else ()
    with contextlib.redirect_stdout(open(os.devnull, "w") if args.json else sys.stdout):
        points, total, hint = check(args.number, *more)
    if args.json:
        print(json.dumps({"exercise": args.number, "points": points, "of": total, "hint": hint}))
    else:
        said = "not passed" if hint else "passed"
        print(f"exercise {args.number}: {said}, {points} of {total} checks hold, in {ROOT}")
        if hint:
            print(f"hint: {hint}")
    sys.exit(bool(hint))

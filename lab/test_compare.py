"""Tests of the baselines that lab.compare measures, and of the row that each has in its table."""
import dataclasses
import json
from types import SimpleNamespace

import torch

import data as D
import flags as F
from lab import compare, tools
from lab.test_lab import batch_of, run        # noqa: F401, run is a fixture
from lab.tools import change


def test_shuffled_labels_keep_their_number_and_lose_their_rows():
    batch, seen = D.Batch(*[torch.zeros(40, 1)] * 2, torch.eye(40), torch.zeros(40)), []
    for step in (3, 3, 4):
        compare.shuffled(lambda step, batch: seen.append(batch.y), 1)(step, batch)
    assert seen[0].sum(0).eq(1).all() and seen[0].sum(1).eq(1).all()
    assert seen[0].diagonal().sum() < 10                # one is expected
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_control_tokens_stand_behind_the_prompt(run):
    row, n = D.Row([1, 2], [3, 4, 5], (0.0, 1.0, 1.0) + (0.0,) * 13), run.tok.n_vocab
    size = dataclasses.replace(run.size, supply=0.7, wean=0.5, produce=2, rely=4)
    told, tell = compare.with_control_tokens(change(run, size=size, train=[row] * 4))

    def seen(step, draw, no_prompt=0.0):    # what a sequence with this draw reads and predicts
        batch = D.batch(told.train, step, 4, 0, no_prompt)._replace(draw=torch.full((4,), draw))
        assert tell(step, batch)[0] is None
        return [(i, t) for i, t in zip(batch.idx[0].tolist(), batch.targets[0].tolist())][:6]
    shown = [(1, -100), (2, -100), (n + 1, -100), (n + 2, 3), (3, 4), (4, 5)]
    out, pad = [(1, -100), (2, 3), (3, 4), (4, 5)], (1, -100)
    assert seen(0, 0.6) == seen(3, 0.6) == shown        # stage 1, and the first half of stage 2
    assert seen(0, 0.8) == seen(3, 0.8) == out + [pad, pad]
    assert seen(4, 0.6) == out + [pad, pad] and seen(4, 0.2) == shown      # supply falls to a third
    assert seen(0, 0.6, no_prompt=1.0)[:5] == [(1, -100), *shown[2:]]      # the token stays
    plain = D.batch([row] * 4, 0, 4, 0)     # the loss is over the same tokens, told or not
    assert [t for _, t in shown if t >= 0] == plain.targets[plain.targets >= 0][:3].tolist()

    by, values = compare.by_control_token(run), torch.tensor([row.label])
    assert by([[9]], values) == ([[9, n + 1, n + 2]], None)
    full = D.Row([1] * 100, [3] * 29, row.label)
    cut = lambda row: compare.with_control_tokens(change(run, train=[row]))[0].train
    assert cut(full) == [full._replace(text=[n + 1, n + 2] + [3] * 27)]
    full = D.Row([1] * 128, [3], row.label)             # it fills the context: there is no room
    assert cut(full) == [full]
    assert by([full.prompt], values) == ([[1] * 126 + [n + 1, n + 2]], None)


def test_replacing_what_stands_in_the_directions(run):
    """There the mean + a direction, whatever stood there; across them all stays as it was."""
    directions = torch.randn(16, 64)
    directions -= directions.mean(0)
    by = compare.by_replacing(run, run.base, directions)
    (_, none), (_, edit) = (by(a)([[1, 2]], torch.eye(16)[2:3]) for a in (0.0, 3.0))
    x, pos, k = torch.randn(1, 4, 64), torch.arange(4)[None], run.flags.layer
    after, mean = edit(k, x, pos), none(k, x, pos)
    assert torch.equal(after[0, 0], x[0, 0]) and torch.equal(edit(k + 1, x, pos), x)
    assert torch.allclose(after - mean, 3 * directions[2] * (pos >= 1)[..., None], atol=1e-4)
    moved = x + directions[5] - 2 * directions[9]       # as if the prompt said something else
    assert torch.allclose(edit(k, moved, pos)[0, 1:], after[0, 1:], atol=1e-4)
    across = torch.linalg.qr(torch.cat([directions[1:].T, torch.randn(64, 49)], 1))[0][:, 15:]
    assert torch.allclose(after @ across, x @ across, atol=1e-4)


def test_the_comparison_measures_each_arm_by_its_model(run, tmp_path, monkeypatch, capsys):
    here, jobs = change(run, out=tmp_path), []
    named = lambda name: SimpleNamespace(name=name, config=run.base.config, parameters=lambda: [])

    def train_all(run):
        return {name: named(name) for name in ("base", "control", "flags")}, None

    def train(run, name, model, steps, method):
        model.name = name
        jobs.append((run, name, model, steps, method))

    def row(run, model, base, by=None):
        return {"model": model.name, "base": base.name, "first": run.flags.first,
                "by": by if isinstance(by, tuple) else by is not None}

    def ask(run, model, name, by):      # strengths are chosen on training prompts
        assert {*run.asked[name][0]} <= {e.prompt for e in here.data.train}
        return None, {"mean": by[1] / 8.4 if isinstance(by, tuple) else 0.0}
    main_results = {"loss": 1, "reliance": {"control": {"blank": 0.9}}}
    monkeypatch.setattr(tools, "main_results", lambda run: main_results)
    monkeypatch.setattr(F, "train_all", train_all)
    monkeypatch.setattr(compare.copy, "deepcopy", lambda model: named(f"new from {model.name}"))
    monkeypatch.setattr(F, "train", train)
    monkeypatch.setattr(compare, "means", lambda run, model: model.name)
    monkeypatch.setattr(compare, "by_replacing", lambda run, model, d: lambda a: (d, a))
    monkeypatch.setattr(compare, "shuffled", lambda method, seed: ("shuffled", method, seed))
    monkeypatch.setattr(compare, "route", lambda run: "routed")
    monkeypatch.setattr(compare, "draw", lambda *args: None)
    monkeypatch.setattr(compare, "row", row)
    monkeypatch.setattr(F, "ask", ask)
    arms = compare.job(here, None)
    assert {name: (arm["model"], arm["by"]) for name, arm in arms.items()} == {
        "flags": ("flags", False),
        "no steering": ("control", True),
        "shuffled labels": ("shuffled", False),
        "stage 1 only": ("stage1", False),
        "16 other channels": ("flags", False),
        "control token": ("token", True),
        "difference of means": ("control", ("control", 8.0)),
        "gradient routing": ("routing", True)}
    assert arms["16 other channels"]["first"] == 0 and arms["flags"]["first"] == 48
    assert arms["difference of means"]["strength"] == 8
    assert {arm["base"] for arm in arms.values()} == {"base"}
    assert arms["no steering"]["blank"] == 0.9
    kept = json.loads((tmp_path / "results.json").read_text())
    told = json.loads((tmp_path / "baselines.json").read_text())
    assert kept == main_results | {"compare": told["compare"]}
    assert told["curves"]["difference of means"]["8.0"]["by"] == ["control", 8]
    trained = {name: (r, steps) for r, name, _, steps, *_ in jobs}
    assert {steps for _, steps in trained.values()} == {run.size.produce + run.size.rely}
    assert trained["token"][0].train is not run.train
    methods = {name: more for _, name, _, _, *more in jobs}
    assert len(methods["token"]) == 1 and methods["routing"] == ["routed"]
    [(how, method, seed)] = methods["shuffled"]
    assert (how, seed) == ("shuffled", run.seed)
    batch = batch_of([[-100, 1, 1, 1]], [[1.0] * 16])
    for how, supplied in ((methods["stage1"][0], False), (method, True)):
        x = how(run.size.produce, batch)[0](1, torch.zeros(1, 4, 64), None)
        assert x.any() == supplied


def test_a_row_of_the_table(monkeypatch):
    """The arm's way steers where flags would be set; the base alone says how likely texts are."""
    run = SimpleNamespace(test=[1, 2, 3])
    monkeypatch.setattr(F, "ask", lambda run, *asked, by=None: ([asked, by], (*asked, by)))
    monkeypatch.setattr(F, "held_out", lambda run, model, rows: [(model, rows), "flag loss"])
    monkeypatch.setattr(F, "fluency", lambda run, model, texts: {"nll_gap": (model, texts)})
    for by, blank in (("way", None), (None, ("model", "blank", None))):
        assert compare.row(run, "model", "base", by) == {
            "neutral": ("model", "neutral", by), "supplied": ("model", "supplied", by),
            "conflict": ("model", "conflict", by), "intact": ("model", "intact", None),
            "blank": blank, "loss": ("model", [1, 2, 3]),
            "nll_gap": ("base", [("model", "conflict"), by])}

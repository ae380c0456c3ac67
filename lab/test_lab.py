"""Tests of the laboratory: baselines, sweeps, probes, tables, and many processes."""
import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data as D
import flags as F
import model as M
from lab import bench, compare, draw, large, outside, probe, seeds, sweep, tools
from lab.tools import change

torch.set_num_threads(1)
QUICK = ["--size", "tiny", "--set", "base=4", "produce=2", "rely=4", "prompts=12", "track=4",
         "every=3", "stories=4000"]


def arguments(out, *more):
    return [*QUICK, "context=48", *more, "--out", str(out)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all sixteen concepts, before its training."""
    out = tmp_path_factory.mktemp("run")
    return F.prepare(F.parser().parse_args(arguments(out, "flags=16", "context=128")))


def script(module, monkeypatch, *argv):
    """A script of the laboratory, run as its command is."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
    p = tools.parser(module.__doc__)
    more = {sweep: {"name": {}, "values": {"nargs": "+"}}, outside: {"other": {}},
            probe: {"--variants": {"nargs": "+"}}}
    for name, how in more.get(module, {}).items():
        p.add_argument(name, **how)
    return tools.main(p, module.job)


def batch_of(targets, y):
    targets = torch.tensor(targets)
    return D.Batch(targets.clamp(min=0), targets, torch.tensor(y), torch.zeros(len(y)))


# ---------------------------------------------------------------------------- sweeps, probes

@pytest.mark.parametrize("name, value, layer, K, p", [
    ("layer", "2", 2, 16, 0.9), ("fenced", "4", 1, 4, 0.9), ("fenced", "32", 1, 32, 0.9),
    ("weight", "3", 1, 16, 0.9), ("supply", "0", 1, 16, 0.0), ("height", "12", 1, 16, 0.9),
    ("rely", "100", 1, 16, 0.9)])
def test_what_a_sweep_varies(run, name, value, layer, K, p):
    r = sweep.variant(run, name, value)
    assert (r.flags.layer, r.flags.count, r.flags.first, r.size.supply) == (layer, K, 64 - K, p)
    assert r.flags.height == run.flags.height * (2 if name == "height" else 1)
    assert r.settings != run.settings and run.flags.count == 16     # the others are as they were
    assert all(len(row.label) == K for row in r.train[:50])
    assert r.train[0].label == tuple(run.train[0].label[i % 16] for i in range(K))
    assert r.asked["conflict"][1].shape[1] == K
    if name not in ("fenced", "layer"):
        assert getattr(r.size, name) == float(value)
    for bad, value in (("width", 4), ("top", 1), ("layer", 9), ("rely", "x"), ("fenced", 99)):
        with pytest.raises(D.Stop, match="there is no|wants a number, not x|not 99"):
            sweep.variant(run, bad, str(value))


def test_a_sweep_asks_for_no_flag_that_is_not_there(run):
    rows = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    prompts, values, score = sweep.sayable(list("abcde"), rows, lambda text, i: i, [0, 2], rows)
    assert prompts == ["a", "c", "e"] and values.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert [score("", i) for i in range(3)] == [0, 2, 4]
    four, names = sweep.variant(run, "fenced", "4"), set(run.data.concepts[:4])
    for key in ("intact", "blank", "supplied"):     # whatever the flags are set to
        prompts, values, _ = four.asked[key]
        told = [set(D.content(prompt, run.data.words)) for prompt in prompts]
        assert told and set.union(*told) <= names and (values is None) == (key == "intact")


def test_a_sweep_has_no_flags_after_frozen_blocks(run):
    few = change(run, size=dataclasses.replace(run.size, layers=4, top=2))
    assert sweep.variant(few, "layer", "3").flags.layer == 3
    with pytest.raises(D.Stop, match="no block 2 that is trained: 3 to 4 are"):
        sweep.variant(few, "layer", "2")


def test_a_small_mlp_reads_what_no_line_can():
    torch.manual_seed(0)
    x = torch.randn(600, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def hits(reader):
        scores = reader(x[:400], torch.nn.functional.one_hot(y[:400]), x[400:])
        return (scores.argmax(1) == y[400:]).float().mean()
    assert hits(probe.mlp) > 0.85
    assert hits(probe.ridge) < 0.65


def test_positions_before_the_concept_is_named(run):
    part = probe.examples(run, run.data.train, 20)
    assert len(part) == 20
    for ids, concept, cue, where in part:
        words = run.data.words
        shown = lambda t: run.tok.decode(ids[1:t + 1])
        assert words[cue] == run.data.concepts[concept]
        end, begin, middle, filler, last = where.values()
        assert end < begin < middle < filler < last == len(ids) - 1
        assert shown(end)[-1] in ".!?" and shown(filler)[-1] in ".!?"
        assert len(D.content(shown(last) + ".", words)) == 1        # the prompt's cue and no more


def test_variants_of_stage_2(run):
    batch = batch_of([[-100, 5, 6, 7]], [[1.0] * 16])
    late, x = run.size.produce, torch.zeros(1, 4, 64)

    def losses(**how):
        edit, flag_loss = probe.method(run, **how)(late, batch)
        seen = [edit(layer, x.clone(), None)[0, 1:, 48:].eq(1).all().item() for layer in (1, 2)]
        return seen, flag_loss().item()
    assert losses() == ([True, True], 1.0)
    assert losses(weight2=6.0) == ([True, True], 0.25)
    assert losses(once=True)[0] == [True, False]
    x[0, 1, 48:] = 0.5                                      # the first flag position
    assert losses(hold=True) == ([True, True], 0.25)
    assert losses()[1] == pytest.approx((0.25 + 1 + 1) / 3)
    edit, _ = probe.method(run, weight2=0.0)(0, batch)
    assert edit(1, x.clone(), None).eq(x).all()             # stage 1 as ever


def test_removing_a_direction(run):
    q = torch.linalg.qr(torch.randn(48, 3))[0]
    x, pos = torch.randn(1, 4, 64), torch.arange(4)[None]
    after = probe.remove(run, q @ torch.randn(3, 3), torch.tensor([1]))(1, x.clone(), pos)
    assert torch.equal(after[0, 0], x[0, 0]) and torch.equal(after[..., 48:], x[..., 48:])
    assert (after[0, 1:, :48] @ q).abs().max() < 1e-5
    assert not torch.allclose(after[0, 1:, :48], x[0, 1:, :48])


# ---------------------------------------------------------------------------- whole scripts

def test_scripts_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "STRENGTHS", (1.0, 4.0))
    script(seeds, monkeypatch, *arguments(tmp_path), "--seeds", "2")
    table = json.loads((tmp_path / "seeds.json").read_text())
    one, two = (json.loads((tmp_path / f"seed-{seed}" / "results.json").read_text())
                for seed in (1337, 1338))
    assert table["loss flags - control"]["n"] == 2
    assert table["loss flags - control"]["mean"] == pytest.approx(
        sum(r["loss"]["flags"] - r["loss"]["control"] for r in (one, two)) / 2)
    assert table["loss control"]["low"] == min(one["loss"]["control"], two["loss"]["control"])
    assert table["steer conflict"]["mean"] == pytest.approx(
        (one["steer"]["conflict"]["mean"] + two["steer"]["conflict"]["mean"]) / 2)
    script(compare, monkeypatch, *arguments(tmp_path), "--seeds", "1")
    script(sweep, monkeypatch, "supply", "0", "1", *arguments(tmp_path))
    script(draw, monkeypatch, *arguments(tmp_path))
    script(outside, monkeypatch, "stories", *arguments(tmp_path))
    losses = json.loads((tmp_path / "outside.json").read_text())
    told = json.loads((tmp_path / "results.json").read_text())
    assert losses.keys() == told["loss"].keys() and all(2 < x < 9 for x in losses.values())
    assert len(told["compare"]) == 8 and {"neutral", "conflict", "intact", "blank", "nll_gap",
                                          "loss"} <= told["compare"]["flags"].keys()
    rows = json.loads((tmp_path / "sweep-supply.json").read_text())
    assert [row["value"] for row in rows] == ["0", "1"] and rows[0]["loss"] != rows[1]["loss"]
    for row in rows:
        assert row["over control"] == pytest.approx(row["loss"] - told["loss"]["control"])
    script(probe, monkeypatch, "--variants", "method", *arguments(tmp_path))
    table = json.loads((tmp_path / "probes.json").read_text())
    assert table.keys() == {"control", "method", "relearning"} and len(table["relearning"]) == 5
    for name in ("compare.png", "sweep-supply.png", "matrix.png", "tokens.png", "probe.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        script(sweep, monkeypatch, "nothing", "1", *arguments(tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("python -m lab.sweep: there is no sweep")


def test_pictures_of_any_names():
    assert draw.labels(["cat", "dog"])[0] == ["cat", "dog"]
    long = [f"a very long name of a concept, number {i}" for i in range(12)]
    short, _ = draw.labels(long)
    assert len(set(short)) == 12 and max(map(len, short)) <= 15
    names, _ = draw.labels(["\U0010fffd", "b"])             # no font has it
    assert names == ["flag 0", "flag 1"]


def test_the_flags_of_a_text_stand_under_its_tokens(run):
    own, tokens, begin = draw.own_flags_of(run, run.base, "Mia slept.", "A crab came.")
    assert own.shape == (len(tokens), 16) and "".join(tokens) == "Mia slept. A crab came."
    assert "".join(tokens[begin:]) == " A crab came."
    prompt = run.tok.prompt("Mia slept.")
    assert torch.allclose(own[begin - 1], F.own_flags(run.base, run.flags, [prompt])[0], atol=1e-4)


# ---------------------------------------------------------------------------- large models

def gradients(run, micro):
    model = copy.deepcopy(run.base)
    batch, total = D.batch(run.train, 0, 16, 1, no_prompt=0.3), 0.0
    for share, part in large.parts(batch, micro):
        edit, flag_loss = F.install(run.flags, part, 0.5)
        loss = share * (F.lm_loss(model, part, edit) + flag_loss())
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro", [1, 5, 16])
def test_accumulated_gradients_equal_those_of_the_whole_batch(run, micro, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: torch.enable_grad())   # float32
    (loss, whole), (again, parts) = gradients(run, 0), gradients(run, micro)
    assert again == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


def test_two_processes_have_the_losses_of_one_and_one_goes_on_from_their_checkpoint(
        tmp_path, monkeypatch):
    # In float32, here and in the processes: bfloat16 rounds a part otherwise than the whole.
    older = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    for module in (F, M):
        monkeypatch.setattr(module, "fast_bfloat16", lambda device: False)

    def losses(N, out):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={N}"]
        done = subprocess.run(
            [sys.executable, *(torchrun if N > 1 else []), "-m", "lab.large",
             *arguments(tmp_path / out, "every=1"), "--micro", "5"],
            text=True, capture_output=True, cwd=Path(F.__file__).parent,
            env=os.environ | older)
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads((tmp_path / out / "results.json").read_text())
        keys = ("train_loss", "lm_loss", "flag_loss")
        return [point[key] for point in results["trajectory"] for key in keys], results
    one, results = losses(1, "one")
    assert F.main(arguments(tmp_path / "one", "every=1")) == 2      # its checkpoints are not these
    assert F.main(arguments(tmp_path / "plain", "every=1")) is None     # flags.py trains alike
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())["trajectory"]
    for key in ("lm_loss", "flag_loss"):
        assert [point[key] for point in plain] == pytest.approx(
            [point[key] for point in results["trajectory"]], rel=2e-3)
    two, _ = losses(2, "two")
    assert two == pytest.approx(one, rel=2e-3)
    (tmp_path / "two" / "results.json").unlink()
    again, two_results = losses(1, "two")       # finished: only loaded and measured
    assert again == two
    assert two_results["loss"]["flags"] == pytest.approx(results["loss"]["flags"], rel=2e-3)


def test_the_bench_reports_what_it_timed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)      # as if it were not installed
    monkeypatch.setattr(bench, "growth", lambda run: [])

    def rounds(jobs, count):    # each is done once; with flags it is said to take 1 s, else 0.5 s
        for name, job in jobs.items():
            job()
        return {name: np.full(count, 1.0 if "with flags" in (name, name[-1]) else 0.5)
                for name in jobs}
    monkeypatch.setattr(bench, "rounds", rounds)
    result = bench.job(change(run, out=tmp_path), None)
    batches = [D.batch(run.train, step, run.size.batch, run.seed, .15) for step in range(8)]
    tokens = sum(batch.idx.numel() for batch in batches)
    assert result["train"] == {"plain": tokens / 0.5, "with flags": tokens}
    assert result["write"] == {1: {"plain": 128, "with flags": 64},
                               64: {"plain": 8192, "with flags": 4096}}
    assert result["flags_cost"] == {"train": 1, 1: 1, 64: 1}
    assert "100.0% of training" in capsys.readouterr().out

"""Tests of lab.probe off the stories (held flags, real text), lab.concepts, and bfloat16."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import data as D
import flags as F
import model as M
from lab import concepts, probe
from lab.test_lab import run        # noqa: F401, a fixture
from lab.tools import change
from lab.variants import held


def test_the_loss_with_the_model_s_own_flags_held(run):         # noqa: F811
    """Row by row (batches are of 32): what is read at the prompt's end, rounded, stands there."""
    torch.manual_seed(1)
    model = copy.deepcopy(run.base)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    few, total, n = change(run, test=run.test[:33]), 0.0, 0
    free = F.held_out(few, model, few.test)[0]
    for row in few.test:
        own = (F.own_flags(model, run.flags, [row.prompt]) > 0.5).float()
        assert 0 < own.sum() < own.numel()
        edit = F.steer(run.flags, F.last([row.prompt]), own)
        total += len(row.text) * F.lm_loss(model, D.pad([row]), edit).item()
        n += len(row.text)
    assert probe.held_loss(few, model) == pytest.approx(total / n, rel=1e-3)
    assert abs(total / n - free) > 0.01


def test_probes_read_clamped_streams_and_are_tried_on_held_out_texts(run):      # noqa: F811
    parts, concepts_, clamped = probe.material(run, 5, 3)
    assert parts == (probe.examples(run, run.data.train, 5), probe.examples(run, run.data.test, 3))
    labels = torch.tensor([row.label for row in run.train])
    assert torch.equal(clamped[1], labels.mean(0).expand(3, -1)) and len(concepts_[0]) == 5
    loud = change(run, flags=F.Flags(1, 48, 16, height=5.0))
    ids, *_, where = parts[1][0]
    at = where["in the filler"]
    for values in (clamped[1], 1 - clamped[1]):
        x = torch.tensor([ids])
        edit = F.steer(loud.flags, torch.tensor([where["prompt's end"]]), values[:1])
        wanted = [stream[0, at, :48] for stream in F.streams(run.base, x, edit)]
        found = probe.activations(loud, run.base, parts[1][:1], values)["in the filler"][0]
        assert torch.allclose(found, torch.stack(wanted), atol=1e-5)
    free = F.streams(run.base, x)[1][0, at, :48]        # after block 2, which reads the slice
    assert not torch.allclose(found[1], free, atol=1e-3)


def test_held_flags_are_rounded(run, monkeypatch):      # noqa: F811
    monkeypatch.setattr(F, "own_flags", lambda *args: torch.tensor([[0.4, 0.6] * 8]))
    _, edit = held(run, run.base)([[1, 2]], None)
    x = edit(run.flags.layer, torch.full((1, 3, 64), 9.0), torch.arange(3)[None])
    assert x[0, 0].eq(9).all() and x[0, 1, 48:].tolist() == [0.0, run.flags.height] * 8


def test_real_text_is_probed_at_the_prompts_end():
    tok, some = D.make_tokenizer([]), [
        D.Example("a cat", "It purred.", ("cat",), True),
        D.Example("", "It barked.", ("dog",), False),
        D.Example("two", "Both ran.", ("cat", "dog"), True),
        D.Example("a dog", "It barked.", ("dog",), True), D.Example("x", "y", ("cat",), True)]
    run = SimpleNamespace(tok=tok, data=SimpleNamespace(words=None, concepts=["cat", "dog"]))
    found = probe.examples(run, some, 2)
    assert found == [(tok.prompt(text), concept, text, {"prompt's end": len(tok.prompt(text)) - 1})
                     for text, concept in (("a cat", 0), ("a dog", 1))]


def test_each_concept_has_its_own_rates(monkeypatch, tmp_path):
    """The second supplied text is wrong, no prompt tells eel, no conflicting flag says cat."""
    names = ["cat", "dog", "eel"]
    texts = [D.Example("", name, (name,), False) for name in ("cat", "dog", "dog")]
    right = lambda found, i: found == [1]
    run = SimpleNamespace(
        data=SimpleNamespace(concepts=names, test=texts), size=SimpleNamespace(prompts=1),
        train=[D.Row([], [], label) for label in ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0))], out=tmp_path,
        judge=lambda texts: [[names.index(text)] if text in names else [] for text in texts],
        asked={"supplied": ([], F.hot(3, [[0], [0], [1]]), lambda found, i: found == [i // 2]),
               "conflict": ([], F.hot(3, [[1], [1], [2]]), right),
               "neutral": ([], F.hot(3, [[0], [1], [2]]), right)})
    written = {"supplied": ["cat", "dog", "dog"], "conflict": ["cat", "dog", "dog"],
               "neutral": ["cat", "dog", "?"]}
    monkeypatch.setattr(F, "train_all", lambda run: ({"flags": None}, None))
    monkeypatch.setattr(F, "ask", lambda run, model, name: (written[name], None))
    even = concepts.job(run, None)["mean of the concepts"]
    table = json.loads((tmp_path / "concepts.json").read_text())
    assert [table[name]["examples"] for name in names] == [2, 1, 0]
    rates = {key: [table[name][key] and (table[name][key]["mean"], table[name][key]["n"])
                   for name in names] for key in ("judge", *concepts.ASKED)}
    assert rates == {"judge": [(1, 1), (1, 2), None], "supplied": [(0.5, 2), (1, 1), None],
                     "conflict": [None, (0.5, 2), (1, 1)], "neutral": [(0, 1), (1, 1), (0, 1)]}
    assert even == {"supplied": 1, "conflict": 0.5, "neutral": 1}       # of dog alone


@pytest.mark.parametrize("kind, native, fast", [
    ("AVX512", False, False), ("AVX512", True, True), ("DEFAULT", False, True)])    # the last: ARM
def test_bfloat16_is_for_processors_that_have_it(monkeypatch, kind, native, fast):
    """oneDNN says that it supports it where it only emulates it, too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert M.fast_bfloat16(torch.device("cpu")) == fast

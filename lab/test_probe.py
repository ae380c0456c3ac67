"""Tests of lab.probe where it leaves the stories: flags that are held, and real text."""
import copy
from types import SimpleNamespace

import pytest
import torch

import data as D
import flags as F
from lab import probe
from lab.test_lab import run        # noqa: F401, a fixture
from lab.tools import change


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

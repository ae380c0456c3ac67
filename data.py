"""The text that the flags are taught with: labelled examples, a tokenizer, batches, judges.

    load("stories")    ->  Data: lists of Example(prompt, text, concepts)
    train_bpe(texts)   ->  a byte-level Tokenizer
    encode(examples)   ->  Rows: token ids of prompt and text, and a label of K zeros and ones
    batch(rows, step)  ->  tensors idx, targets (B, T), y (B, K), draw (B,)
    make_judge(data)   ->  judge(texts): the concepts found in each of them, for `about`

`stories` is a small grammar, each of whose content words belongs to one concept: so anybody can
say what a story is about. B, T, K: batch, time, number of concepts (flags).
"""
import heapq
import json
import random
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import regex  # comes with tiktoken; unlike re it knows \p{L}, "any letter"
import tiktoken
import torch
import torch.nn.functional as F


class Stop(ValueError):
    """One line for the user: what is wrong, where, what to do."""


class Example(NamedTuple):
    prompt: str                 # what the model is given (may be empty)
    text: str                   # what it must write
    concepts: tuple[str, ...]   # what the text is about
    cued: bool                  # whether the prompt tells the concepts


@dataclass
class Data:
    name: str                     # "stories", "wordnet" or the file's name
    concepts: list[str]           # flag i means concepts[i]
    train: list[Example]
    judge: list[Example]          # to train a judge of texts on (stories: [], words decide)
    test: list[Example]
    words: dict[str, str] | None  # stories: content word -> concept


def load(source, most=16, seed=1337, stories=55_000):
    """Data from "stories", "wordnet" (of their 16 concepts the first `most`), or a .jsonl file with
    at most as many. `seed` picks the `stories`, so many. Raises Stop or OSError."""
    if source == "stories":
        return load_stories(most, seed, stories)
    if source == "wordnet":
        return load_wordnet(most)
    if source.endswith(".jsonl"):
        return load_jsonl(Path(source), most)
    raise Stop(f"no data called {source!r}: choose stories, wordnet or a .jsonl file")


def split(examples, train, judge):
    """Deal examples out to (train, judge, test): `train` and `judge` per cent, and the rest. A hash
    of the prompt decides (of the text if there is none): no prompt stands in two splits. Nor does a
    text: later splits drop it."""
    parts, seen = ([], [], []), set()
    for example in examples:
        key = (example.prompt or example.text).casefold()
        share = zlib.crc32(key.encode()) % 100   # hash() would differ from run to run
        parts[(share >= train) + (share >= train + judge)].append(example)
    for part in parts:
        part[:] = [example for example in part if example.text not in seen]
        seen.update(example.text for example in part)
    return parts


# ---------------------------------------------------------------------------- stories
# For each concept places; things; beings; acts. The last word of each is a content word of this
# concept and of no other.

STORIES = """
sea: beach, lighthouse; shell, anchor; crab, whale, sailor; swam past the reef, dived into the bay
snow: glacier, igloo; sled, snowball; penguin, snowman; skated over the ice, skied down the slope
farm: barn, orchard; horseshoe, saddle; cow, farmer, goat; drove the tractor, fed the hens
space: moon, rocket; telescope, spacesuit; astronaut, alien; flew past the stars, chased a comet
kitchen: oven, fridge; spoon, pancake; cook, baker, waiter; baked a cake, stirred the soup
forest: oak, clearing; acorn, mushroom; fox, bear, deer; hiked under the pines, rested on the moss
castle: tower, throne; crown, sword; king, queen, knight; crossed the moat, opened the dungeon
music: stage, opera; violin, trumpet; singer, drummer; sang a melody, clapped to the rhythm
school: classroom, library; pencil, notebook; teacher, pupil; passed the exam, did the homework
ghost: attic, crypt; skull, cobweb; ghost, vampire, witch; chased a shadow, lit some candles
train: station, platform; ticket, suitcase; porter, traveller; followed the rails, took the express
market: stall, bazaar; coin, basket; merchant, customer; bought some cheese, sold a carpet
robot: workshop, factory; battery, screw; robot, inventor; tightened the bolts, oiled the gears
circus: tent, carousel; hoop, unicycle; clown, juggler; walked on stilts, cheered at the parade
garden: lawn, hedge; rose, trowel; gardener, butterfly; watered the flowers, trimmed the bushes
desert: oasis, pyramid; scarab, turban; camel, nomad; trudged over the sand, led the caravan
"""
NAMES = """Ada Adam Alice Anna Ben Clara David Ella Emil Emma Eva Felix Finn Hanna Hugo Jack Julia
    Kate Leila Leo Luca Lucy Max Maya Mia Noah Nora Omar Oscar Paul Ravi Ruth Sam Sara Theo Tim
    Tina Tom Vera Zoe""".split()

# {names} are the two friends of a story; {name} is one of them, or both.
NEUTRAL = """{names} woke up early.|{names} had nothing to do.|One morning, {names} went out.
    {names} wanted to try something new.|{names} had the whole day off.|{names} could not sit still.
    It was a special day for {names}.|Nobody knew where {names} would go.|{names} set out at noon.
    Long ago, {names} had an adventure.|{names} put on new shoes.|{names} had waited all week."""
CUES = """{names} dreamed of {topics}.|{names} talked about {topics}.|{names} wrote about {topics}.
    {names} drew a picture of {topics}.|{names} read a book about {topics}.
    {names} got a letter about {topics}.|{names} watched a film about {topics}.
    {names} wanted to hear a story about {topics}.|One day, {names} heard about {topics}."""
TELLINGS = """{name} {act}.|then {name} {act}.|soon {name} {act}.|after a while, {name} {act}.
    {name} found the {thing} near the {place}.|at the {place}, {name} found the {thing}.
    {name} saw the {being} near the {place}.|at the {place}, {name} met the {being}.
    {name} gave the {thing} to the {being}.|the {being} gave {name} the {thing}.
    {name} went to the {place} and saw the {being}.|{name} listened to the {being}.
    {name} picked up the {thing} and {act}.|the {being} needed help, so {name} {act}.
    the {being} told {name} about the {place}.|together with the {being}, {name} {act}.
    {name} had always wanted to see the {place}.|{name} asked the {being} about the {thing}.
    someone had left the {thing} near the {place}.|{name} followed the {being} to the {place}."""
FILLERS = """{name} smiled.|{one} smiled at {other}.|{name} could hardly wait.|{name} felt brave.
    It was a long day.|It was a day like no other.|At first, nothing happened.|What a day!
    {one} took {other} by the hand.|{name} took a deep breath.|{name} felt very happy."""
NEUTRAL, CUES, TELLINGS, FILLERS = (
    regex.split(r"\||\n +", forms) for forms in (NEUTRAL, CUES, TELLINGS, FILLERS))


def load_stories(most, seed, count):
    """Tell `count` stories, 95 % of them to train on."""
    table = {}
    for line in STORIES.strip().splitlines()[:most]:
        concept, phrases = line.split(": ")
        kinds = [kind.split(", ") for kind in phrases.split("; ")]
        table[concept] = dict(zip(("place", "thing", "being", "act"), kinds))
    words = {phrase.split()[-1]: concept for concept, kinds in table.items()
             for phrase in sum(kinds.values(), [])}
    rng = random.Random(seed)
    train, _, test = split([story(rng, table) for _ in range(count)], train=95, judge=0)
    return Data("stories", list(table), train, [], test, words)


def story(rng, table):
    """One story, of two friends and of one, two or three concepts. It has three sentences, so that
    its length says nothing of them, and perhaps a filler, which names none."""
    friends, number = rng.sample(NAMES, 2), rng.choices((1, 2, 3), (30, 25, 45))[0]
    concepts = rng.sample(list(table), min(len(table), number))
    cued = rng.random() < 0.65   # the other prompts say nothing: there only a flag can know
    topics = [f"the {rng.choice(table[concept][rng.choice(('place', 'thing', 'being'))])}"
              for concept in rng.sample(concepts, len(concepts))]
    prompt = rng.choice(CUES if cued else NEUTRAL).format(
        names=" and ".join(friends), topics=" and ".join(", ".join(topics).rsplit(", ", 1)))

    told = concepts + rng.choices(concepts, k=3 - len(concepts))
    plan = list(zip(told, rng.sample(TELLINGS, 3)))
    if rng.random() < 0.5:
        plan.insert(rng.choice((0, 0, 3)), (None, rng.choice(FILLERS)))
    sentences, slots = [], defaultdict(str)
    for concept, form in plan:
        for kind, phrases in table.get(concept, {}).items():    # not the last one again
            slots[kind] = rng.choice([phrase for phrase in phrases if phrase != slots[kind]])
        one, other = rng.sample(friends, 2)
        name = rng.choice((one, other, f"{one} and {other}", "the two friends"))
        sentence = form.format(one=one, other=other, name=name, **slots)
        sentences.append(sentence[0].upper() + sentence[1:])
    return Example(prompt, " ".join(sentences), tuple(sorted(concepts)), cued)


# ---------------------------------------------------------------------------- real text

LEXNAMES = {"animal": 5, "plant": 20, "food": 13, "body": 8, "artifact": 6, "location": 15,
            "person": 18, "communication": 10, "act": 4, "cognition": 9, "substance": 27,
            "state": 26, "attribute": 7, "event": 11, "time": 28, "group": 14}
WORDNET = Path("/usr/share/wordnet/data.noun")      # its files' numbers stand in lexnames(5WN)
WANTED = '{"prompt": "may be empty", "text": "...", "concepts": ["one or more", ...]}'


def load_wordnet(most):
    """Noun senses of WordNet (Fellbaum 1998): "lemma:" -> its definition, one category each. Lines
    (see wndb(5WN)): `offset lex_filenum ss_type w_cnt word lex_id ... | gloss; "example"`."""
    if not WORDNET.is_file():
        raise Stop(f"there is no {WORDNET}: apt-get install wordnet-base")
    category = {f"{number:02d}": name for name, number in list(LEXNAMES.items())[:most]}
    items = []
    for line in WORDNET.read_text("utf-8", "replace").splitlines():
        fields = line.split(" ")
        if line[0] != " " and fields[1] in category:        # the licence is indented
            gloss = line.partition(" | ")[2].partition('; "')[0].strip()
            for lemma in fields[4:4 + 2 * int(fields[3], 16):2]:
                items.append((lemma.replace("_", " ") + ":", gloss, (category[fields[1]],)))
    return real_data("wordnet", list(category.values()), items)


def load_jsonl(path, most):
    """One object a line, as WANTED says; other keys are ignored."""
    items, number = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip(b"\xef\xbb\xbf \t\r\n"):   # the first three: a byte order mark
                    items.append(parse(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise Stop(f"{path}, line {number}: {error}; wanted: {WANTED}") from None
    concepts = sorted({concept for *_, of in items for concept in of})
    if not 2 <= (n := len(concepts)) <= most:
        raise Stop(f"{path}: {n} concepts in {number} lines; there must be 2 or more"
                   f"{f', at most {most} (--set flags={n})' * (n > most)}; wanted: {WANTED}")
    data = real_data(path.name, concepts, items)
    for concept in concepts:
        if not all(any(concept in e.concepts for e in part) for part in (data.train, data.judge)):
            prompts, texts = (len({item[i] for item in items}) for i in (0, 1))
            raise Stop(f"{path}: too few examples of {concept!r} to train a model and a judge. "
                       f"Equal prompts or texts stay together, and of {number} lines "
                       f"{prompts} prompts and {texts} texts differ: write more that do")
    return data


def parse(line):
    """One line of a .jsonl file: (prompt, text, concepts)."""
    item = json.loads(line.decode("utf-8-sig"))
    json.dumps(item, ensure_ascii=False).encode()   # refuses "\\ud800", half a character
    prompt, text, names = item["prompt"], item["text"], item["concepts"]
    if not (isinstance(prompt, str) and isinstance(text, str) and text.strip() and names
            and isinstance(names, list) and all(isinstance(n, str) and n.strip() for n in names)):
        raise ValueError("a prompt, text or list of concepts is missing")
    return prompt if prompt.strip() else "", text.strip(), tuple(sorted(set(map(normal, names))))


def normal(name):
    """A concept's name in one spelling: an accent is part of its letter, outer spaces are none."""
    return unicodedata.normalize("NFC", name).strip()


def real_data(name, concepts, items):
    """Data of items (prompt, text, concepts). A prompt that stands with several concepts tells none
    of them; of equal items one is left."""
    told = Counter(prompt for prompt, of in {(prompt, of) for prompt, _, of in items if prompt})
    examples = [Example(*item, told[item[0]] == 1) for item in dict.fromkeys(items)]
    random.Random(0).shuffle(examples)      # files are often sorted by concept
    return Data(name, concepts, *split(examples, train=62, judge=28), None)


# ---------------------------------------------------------------------------- the tokenizer

END = "<|end|>"     # the one special token: it begins and ends a sequence

# GPT-2's way to cut text into pieces: a word with the space before it, a number, a run of signs, a
# run of white space. Limits, and 4 letters of scripts that write no spaces, keep `train_bpe` fast.
PIECES = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]{1,4}| ?\p{L}{1,32}"
          r"| ?\p{N}{1,32}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}(?!\S)|\s{1,32}")


@dataclass
class Tokenizer:
    encode: Callable[[str], list[int]]   # END in a text is plain text
    decode: Callable[[list[int]], str]   # bytes that are not UTF-8 become U+FFFD
    begin: int      # opens a sequence: `end`, unless a checkpoint's tokenizer has another token
    end: int        # ends a sequence
    n_vocab: int    # ids are below this
    merges: list | None     # of train_bpe: all that there is to save
    save: Callable | None = None    # of a checkpoint's tokenizer: save(folder)

    def prompt(self, text):
        return [self.begin] + self.encode(text)


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes (GPT-2: Radford et al. 2019).

    Begin with the 256 bytes as tokens, so that nothing is unknown. Then, again and again, make one
    new token of the most frequent pair of neighbours (of equals: of the smaller (id, id)), from
    left to right; no merge crosses a cut (PIECES). Returns a Tokenizer of `vocab_size` tokens
    (fewer if there are no more pairs); END is the last. Raises Stop if vocab_size < 257."""
    if vocab_size < 257:
        raise Stop(f"vocab must be at least 257 (256 bytes and {END}), not {vocab_size}")
    counts = Counter(piece for text in texts for piece in regex.findall(PIECES, text))
    # a piece is written as a string with one character for each of its tokens
    pieces = [piece.encode("utf-8", "replace").decode("latin-1") for piece in counts]
    counts, merges, new, heap = list(counts.values()), [], [], []   # heap: most frequent pair first
    frequency, holders = Counter(), defaultdict(set)   # pair -> its count, pair -> pieces with it

    def count(i, sign):
        for pair in zip(pieces[i], pieces[i][1:]):
            if pair not in frequency:
                new.append(pair)
            frequency[pair] += sign * counts[i]
            holders[pair].add(i)

    for i in range(len(pieces)):
        count(i, 1)
    while (new or heap) and len(merges) < vocab_size - 257:
        while new:
            heapq.heappush(heap, (-frequency[new[-1]], new.pop()))
        n, best = heapq.heappop(heap)
        if n != -frequency[best]:       # it is rarer by now: back into the heap, to its place
            heapq.heappush(heap, (-frequency[best], best))
        elif n:
            merges.append(tuple(map(ord, best)))
            for i in (i for i in holders.pop(best) if "".join(best) in pieces[i]):
                count(i, -1)
                pieces[i] = pieces[i].replace("".join(best), chr(255 + len(merges)))
                count(i, 1)
    return make_tokenizer(merges)


def make_tokenizer(merges):
    """The Tokenizer of a list of merges, by tiktoken."""
    tokens = [bytes([byte]) for byte in range(256)]
    for one, other in merges:
        tokens.append(tokens[one] + tokens[other])
    ranks, end = {token: i for i, token in enumerate(tokens)}, len(tokens)
    encoding = tiktoken.Encoding("flags", pat_str=PIECES, special_tokens={}, mergeable_ranks=ranks)
    decode = lambda ids: b"".join(tokens[i] for i in ids if i < end).decode("utf-8", "replace")
    return Tokenizer(encoding.encode_ordinary, decode, end, end, end + 1, merges)


# ---------------------------------------------------------------------------- rows and batches

class Row(NamedTuple):
    prompt: list[int]          # the tokenizer's begin (END, in ours) and the prompt's tokens
    text: list[int]            # the text's tokens and the tokenizer's end
    label: tuple[float, ...]   # (K,) 1.0 where the text is about concepts[i]


class Batch(NamedTuple):
    idx: torch.Tensor       # (B, T) int64
    targets: torch.Tensor   # (B, T) int64, -100 where nothing is to be predicted
    y: torch.Tensor         # (B, K) float32
    draw: torch.Tensor      # (B,) float32 in [0, 1): below p, this sequence is supplied (flags.py)

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in self))


def encode(examples, tokenizer, concepts, context):
    """Rows of token ids for a model that reads at most `context` tokens. A text that is too long is
    cut and then has no END. Raises Stop for prompts that are too long."""
    rows, long = [], []
    for e in examples:
        prompt, text = tokenizer.prompt(e.prompt), tokenizer.encode(" " + e.text) + [tokenizer.end]
        label = tuple(float(concept in e.concepts) for concept in concepts)
        # the last token of the text is only predicted, never read: hence the + 1
        rows.append(Row(prompt, text[:context - len(prompt) + 1], label))
        if len(prompt) > context:
            long.append(e.prompt)
    if long:
        raise Stop(f"{len(long)} prompts do not fit into this model's context of {context} tokens, "
                   f"first {long[0][:30]!r}; shorten them, or train with --set context=...")
    return rows


def batch(rows, step, size, seed, no_prompt=0.0):
    """The batch of training step `step`: a pure function, so resuming needs no saved state.

    Every epoch goes through the rows in a new order; up to size - 1 of them sit it out. In a share
    `no_prompt` only the first token of the prompt is shown. Rows of similar length go together:
    32 batches at a time are sorted, not all, so that neighbours change by epoch."""
    per_epoch = max(1, len(rows) // size)
    epoch, i = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    order, bare = rng.permutation(len(rows))[:per_epoch * size], rng.random(len(rows)) < no_prompt
    chunk, slot = divmod(rng.permutation(per_epoch)[i], 32)     # batch `slot` of this chunk
    order = order[chunk * 32 * size:(chunk + 1) * 32 * size]    # its rows: 32 batches
    chosen = [rows[j]._replace(prompt=rows[j].prompt[:1]) if bare[j] else rows[j] for j in order]
    chosen.sort(key=lambda row: len(row.prompt) + len(row.text))
    padded = pad(chosen[slot * size:(slot + 1) * size])
    draw = np.random.default_rng([seed, epoch, step]).random(len(padded.y), dtype=np.float32)
    return padded._replace(draw=torch.from_numpy(draw))


def pad(rows):
    """Rows as a Batch. idx[b] is a row without its last token, which is predicted and never read,
    padded on the right with the first row's first token. targets[b, t] is the token that follows
    idx[b, t] in its row if it belongs to the text, else -100: there are targets from the prompt's
    last token on. draw is 0. T is the smallest multiple of 8 that suffices: few different shapes,
    since CPU kernels are made for each."""
    lengths = [len(row.prompt) + len(row.text) - 1 for row in rows]
    longest = -(-max(lengths) // 8) * 8
    idx = np.full((len(rows), longest), rows[0].prompt[0], dtype=np.int64)
    targets = np.full_like(idx, -100)
    for b, (row, length) in enumerate(zip(rows, lengths)):
        idx[b, :length] = (row.prompt + row.text)[:-1]
        targets[b, len(row.prompt) - 1:length] = row.text
    y = torch.tensor([row.label for row in rows], dtype=torch.float32)
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), y, torch.zeros(len(rows)))


# ---------------------------------------------------------------------------- judges

def make_judge(data, counted=lambda what, items: items):
    """judge(texts): for each text the numbers of the concepts found in it, with repeats."""
    if not data.words:
        return learned_judge(data.judge, data.concepts, counted)
    return lambda texts: [list(map(data.concepts.index, content(t, data.words))) for t in texts]


def content(text, words):
    """The concepts of the content words in `text`, in order, with repeats."""
    return [words[word] for word in regex.findall("[a-z]+", text.lower()) if word in words]


def about(found, concept):
    """Whether a judged text is about a concept: the strict majority of what was found in it."""
    return 2 * found.count(concept) > len(found)


def split_words(text):
    """Words, in lower case; of emoji, and where a script writes no spaces, single characters."""
    alone = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{So}"
    return regex.findall(rf"(?V1)[{alone}]\p{{M}}*|[\w--[{alone}]]+", text.lower())


def grams(text):
    """What a learned judge sees of a text: words, their pairs, and runs of 3 to 5 letters."""
    words = split_words(text)
    inside = [f"#{word}#"[i:i + n] + "#" for word in words for n in (3, 4, 5)
              for i in range(len(word) + 3 - n)]
    return dict.fromkeys([*words, *map(" ".join, zip(words, words[1:])), *inside])


def learned_judge(examples, concepts, counted=lambda what, items: items):
    """Logistic regression on tf-idf of grams. Every concept weighs the same, however rare, since
    flags are set evenly. `examples` are a split of their own, which no model here ever saw."""
    seen = Counter(g for e in counted("judge: counting, text", examples) for g in grams(e.text))
    index = {gram: i for i, gram in enumerate(gram for gram, n in seen.items() if n > 1)}
    idf = torch.tensor([len(examples) / seen[gram] for gram in index] + [1.0]).log()
    w = torch.zeros(len(idf), len(concepts), requires_grad=True)

    def bags(texts):        # which grams, where each text begins, tf-idf of unit length
        rows = [[index[g] for g in grams(t) if g in index] or [len(index)] for t in texts]
        flat = torch.tensor([i for row in rows for i in row])
        sizes = torch.tensor(list(map(len, rows)))
        norm = torch.stack([idf[row].norm().clamp(min=1e-9) for row in rows])
        return flat, sizes.cumsum(0) - sizes, idf[flat] / norm.repeat_interleave(sizes)

    score = lambda flat, begins, tfidf: F.embedding_bag(
        flat, w, begins, mode="sum", per_sample_weights=tfidf)
    x = bags(counted("judge: reading, text", [example.text for example in examples]))
    y = torch.tensor([[float(concept in e.concepts) for concept in concepts] for e in examples])
    weight, opt = y.sum() / y.sum(0) / len(concepts), torch.optim.Adam([w], lr=0.1)
    for _ in counted("training the judge, step", range(100)):
        loss = F.cross_entropy(score(*x), y / y.sum(1, keepdim=True), weight)
        (loss + 1e-5 * w.square().sum()).backward()
        opt.step()
        opt.zero_grad()

    def judge(texts):
        scores = score(*bags(counted("judge, text", texts))) if texts else []
        return [[int(row.argmax())] if row.any() else [] for row in scores]     # 0s: nothing known
    return judge

"""The text that the flags are taught with: labelled examples, a tokenizer, batches.

    load("stories")   ->  Data: lists of Example(prompt, text, concepts)
    train_bpe(texts)  ->  a byte-level Tokenizer, trained on the training split
    load_tokenizer()  ->  the Tokenizer in a checkpoint's folder
    encode(examples)  ->  Rows: token ids of prompt and text, and a label of K zeros and ones
    batch(rows, step) ->  tensors idx (B, T), targets (B, T), y (B, K)

There are three sources. `stories` is a small grammar, written out below: nothing to download, and
because each of its content words belongs to one concept, anybody can say what a story is about.
`wordnet` is real text, written and labelled by people. A path to a .jsonl file is your own.

This file knows nothing of models. B, T and K mean batch, time and number of concepts (flags).
"""
import heapq
import json
import os
import random
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

import numpy as np
import regex  # comes with tiktoken; unlike re it knows \p{L}, "any letter"
import tiktoken
import torch


@dataclass(frozen=True)
class Example:
    prompt: str                 # what the model is given (may be empty)
    text: str                   # what it shall write
    concepts: tuple[str, ...]   # what the text is about


@dataclass
class Data:
    name: str                     # "stories", "wordnet" or the file's stem
    concepts: list[str]           # flag i means concepts[i]
    train: list[Example]
    judge: list[Example]          # to train a judge of texts on; [] for stories, whose words decide
    test: list[Example]
    words: dict[str, str] | None  # stories: content word (lower case) -> concept


def load(name_or_path: str, flags: int = 16, seed: int = 1337, stories: int = 55_000) -> Data:
    """Read one of the three sources: "stories", "wordnet", or a path that ends in .jsonl.

    `flags` is the largest number of concepts. The first two sources have 16 and use the first
    `flags` of them; a file with more is refused. `seed` picks the `stories`, so many; nothing else
    is random.

    Raises ValueError or FileNotFoundError with one line: what is wrong, where, what to do.
    """
    if flags < 2:
        raise ValueError(f"flags must be at least 2 (something to switch between), not {flags}")
    if name_or_path == "stories":
        return load_stories(flags, seed, stories)
    if name_or_path == "wordnet" or str(name_or_path).endswith(".jsonl"):
        wordnet = name_or_path == "wordnet"
        data = load_wordnet(flags) if wordnet else load_jsonl(Path(name_or_path), flags)
        random.Random(0).shuffle(data.test)     # files are often sorted by concept
        return data
    raise ValueError(f"no data called {name_or_path!r}: choose stories, wordnet or a .jsonl file")


def split(examples: Iterable[Example], train: int, judge: int) -> tuple[list[Example], ...]:
    """Deal examples out to (train, judge, test): `train` and `judge` per cent, and the rest.

    A hash of the prompt decides (of the text where the prompt is empty), so a prompt never stands
    in two splits, however the examples are ordered. Nor does a text: later splits drop it.
    """
    parts = [], [], []
    for example in examples:
        key = (example.prompt or example.text).casefold()
        share = zlib.crc32(key.encode()) % 100   # hash() would differ from run to run
        parts[0 if share < train else 1 if share < train + judge else 2].append(example)
    seen = {example.text for example in parts[0]}
    judge_part = [example for example in parts[1] if example.text not in seen]
    seen |= {example.text for example in judge_part}
    return parts[0], judge_part, [example for example in parts[2] if example.text not in seen]


# ---------------------------------------------------------------------------- source 1: stories
# Four lines for each concept: places; things to pick up; beings; and what somebody did. Every word
# here that is not PLAIN is a content word, and it stands under one concept only.

STORIES = """
sea: at the harbour, by the sea, on the beach, near the lighthouse
    shell, anchor, pearl, oar
    crab, whale, sailor, dolphin
    swam past the reef, rowed across the bay, dived under a boat, counted the ships
snow: in the snow, on the glacier, near the igloo, on the icy lake
    sled, snowball, mitten, scarf
    penguin, snowman, skier, reindeer
    skated over the ice, skied down the slope, walked through the blizzard, swept away the frost
farm: on the farm, in the barn, by the haystack, in the orchard
    horseshoe, pitchfork, saddle, egg
    cow, farmer, goat, sheep
    drove the tractor, milked the cows, fed the hens, harvested the wheat
space: on the moon, on Mars, in space, near the rocket
    telescope, spacesuit, meteorite, antenna
    astronaut, alien, martian, cosmonaut
    flew past the stars, landed on a planet, chased a comet, counted the galaxies
kitchen: in the kitchen, by the oven, at the stove, near the fridge
    spoon, pancake, saucepan, muffin
    cook, chef, baker, waiter
    baked a cake, stirred the soup, peeled the potatoes, tasted the sauce
forest: in the forest, under the oak, in the woods, by the stream
    acorn, mushroom, pinecone, twig
    fox, bear, deer, squirrel
    hiked under the pines, climbed an oak, picked some berries, walked among the trees
castle: in the castle, in the tower, by the throne, on the drawbridge
    crown, sword, shield, jewel
    king, queen, knight, prince
    guarded the tower, crossed the moat, polished the armour, opened the dungeon
music: at the concert, on the stage, by the piano, at the opera
    violin, trumpet, flute, guitar
    singer, pianist, drummer, violinist
    sang a melody, hummed a tune, danced to the music, played the piano
school: at school, in the classroom, by the blackboard, in the library
    pencil, notebook, ruler, eraser
    teacher, pupil, student, classmate
    finished the homework, passed the exam, learned the alphabet, practised the spelling
ghost: in the graveyard, in the attic, near the tomb, in the crypt
    skull, cobweb, lantern, potion
    ghost, vampire, skeleton, witch
    tiptoed past the tombs, chased a spooky shadow, searched the cellar, lit some candles
train: on the train, at the station, on the platform, in the tunnel
    ticket, suitcase, whistle, timetable
    passenger, porter, stationmaster, traveller
    rode on the locomotive, followed the rails, boarded the express, looked into the carriages
market: at the market, by the stall, in the shop, near the bazaar
    coin, basket, purse, melon
    merchant, vendor, customer, shopkeeper
    bought some cheese, sold a carpet, paid for the honey, counted the coins
robot: in the laboratory, in the workshop, near the computer, at the factory
    battery, wire, screw, gadget
    robot, android, inventor, cyborg
    tightened the bolts, pressed the buttons, oiled the gears, charged the batteries
circus: at the circus, in the tent, on the trapeze, near the carousel
    hoop, wig, balloon, unicycle
    clown, juggler, acrobat, magician
    balanced on the tightrope, swung on the trapeze, juggled with hoops, walked on stilts
garden: in the garden, on the lawn, by the hedge, in the greenhouse
    rose, trowel, tulip, sunflower
    gardener, butterfly, snail, ladybird
    watered the flowers, planted some tulips, mowed the lawn, smelled the roses
desert: in the desert, at the oasis, on the dune, near the pyramid
    scarab, turban, fossil, urn
    camel, nomad, scorpion, lizard
    rode on a camel, trudged over the dunes, followed the caravan, climbed the pyramid
"""
PLAIN = """a across among an at away by chased climbed counted crossed down followed for in into
    looked near on opened over past picked played practised rode some the through to under walked
    with""".split()

SHE = """Ada Alice Anna Clara Ella Emma Eva Hanna Julia Kate Leila Lucy Maya Mia Nora Ruth Sara
    Tina Vera Zoe""".split()
HE = """Adam Ben David Emil Felix Finn Hugo Jack Leo Luca Max Noah Omar Oscar Paul Ravi Sam Theo
    Tim Tom""".split()

# {names} is everybody, {who} and {whom} are somebody or a pronoun, {name} is never a pronoun;
# {one} and {other} are two people; {spot} is a place without "at".
NEUTRAL = """{names} woke up early.|{names} had nothing to do.|One morning, {names} went out.
    {names} wanted to try something new.|{names} had the whole day off.|{names} could not sit still.
    It was a special day for {names}.|Nobody knew where {names} would go.|{names} set out at noon.
    Long ago, {names} had an adventure.|{names} put on new shoes.|{names} had waited all week.
    This was the day that {names} had hoped for."""
CUES = """{names} dreamed of {topics}.|{names} talked about {topics}.|{names} wrote about {topics}.
    {names} drew a picture of {topics}.|{names} read a book about {topics}.
    {names} got a letter about {topics}.|{names} watched a film about {topics}.
    {names} wanted to hear a story about {topics}.|{names} kept thinking about {topics}.
    One day, {names} heard about {topics}.|Last night, {names} dreamed of {topics}."""
TELLINGS = """{who} {act}.|then {who} {act}.|soon {who} {act}.|after a while, {who} {act}.
    {who} found {thing} {place}.|{place}, {who} found {thing}.|{who} looked for {thing} {place}.
    {who} saw {being} {place}.|{place}, {who} met {being}.|{being} gave {whom} {thing}.
    {who} listened to {being}.|{being} was waiting for {whom} {place}.
    {who} gave {thing} to {being}.|{who} went to {spot} and saw {being}.
    {who} picked up {thing} and {act}.|{being} needed help, so {name} {act}.
    {being} told {whom} about {spot}.|{place}, {being} showed {whom} {thing}.
    {who} had always wanted to see {spot}.
    together with {being}, {name} {act}.|someone had left {thing} {place}.
    {being} had lost {thing}, and {name} found it {place}.|there was {thing} {place}.
    {who} followed {being} to {spot}.|{who} asked {being} about {spot}."""
OPENINGS = """{who} smiled.|{one} smiled at {other}.|{who} could hardly wait.|{who} felt very brave.
    It was going to be a long day.|It was a day like no other.|At first, nothing happened.
    {one} took {other} by the hand.|{who} took a deep breath.|Something wonderful was coming."""
ENDINGS = """It was a long day.|{who} felt very happy.|{who} never forgot that day.
    {who} could not believe it.|{one} hugged {other}.|{who} went home with a smile.
    {one} laughed, and so did {other}.|{who} told everyone at home.|What a day it was!"""
NEUTRAL, CUES, TELLINGS, OPENINGS, ENDINGS = (
    regex.split(r"\||\n +", forms) for forms in (NEUTRAL, CUES, TELLINGS, OPENINGS, ENDINGS))


def load_stories(flags: int, seed: int, count: int) -> Data:
    """Tell `count` stories, 95 % of them to train on."""
    lines, table = STORIES.strip().splitlines(), {}
    for i in range(0, len(lines), 4)[:flags]:
        concept, lines[i] = lines[i].split(": ")
        phrases = [line.strip().split(", ") for line in lines[i:i + 4]]
        table[concept] = dict(zip(("place", "thing", "being", "act"), phrases))
    words = {word: concept for concept, kinds in table.items()
             for word in " ".join(sum(kinds.values(), [])).lower().split() if word not in PLAIN}
    rng = random.Random(seed)
    train, _, test = split([story(rng, table) for _ in range(count)], train=95, judge=0)
    return Data("stories", list(table), train, [], test, words)


def content(text: str, words: dict[str, str]) -> list[str]:
    """The concepts of the content words in `text`, in order, with repeats."""
    return [words[word] for word in regex.findall("[a-z]+", text.lower()) if word in words]


def story(rng: random.Random, table: dict[str, dict[str, list[str]]]) -> Example:
    """One story, of one or two people and of one, two or three concepts.

    It is told in three sentences, whatever the number of its concepts: so its length says nothing of
    them. Every concept is told once before any is told again.
    """
    number = min(len(table), rng.choices((1, 2, 3), (30, 25, 45))[0])
    concepts = rng.sample(list(table), number)
    cast = rng.sample(SHE + HE, rng.choice((1, 2)))
    cued = rng.random() < 0.65   # the other prompts say nothing: there only a flag can know
    topics = []
    for concept in rng.sample(concepts, number):
        slot = rng.choice(("spot", "thing", "being"))   # "the harbour", "a shell" or "a crab"
        topics.append(fill(rng, table[concept], "{%s}" % slot, set())[slot])
    prompt = rng.choice(CUES if cued else NEUTRAL).format(
        names=" and ".join(cast), topics=" and ".join(", ".join(topics).rsplit(", ", 1)))

    plan = [(concepts[i] if i < number else rng.choice(concepts), form)
            for i, form in enumerate(rng.sample(TELLINGS, 3))]
    openings, endings = ([form for form in forms if len(cast) == 2 or "{other}" not in form]
                         for forms in (OPENINGS, ENDINGS))
    if rng.random() < 0.4:
        plan.insert(0, (None, rng.choice(openings)))
    if rng.random() < 0.25:
        plan.append((None, rng.choice(endings)))

    sentences, used, clear = [], set(), not cued
    for concept, form in plan:
        slots = fill(rng, table[concept], form, used) if concept else {}
        sentence = form.format(**slots, **people(rng, cast, clear))
        sentences.append(sentence[0].upper() + sentence[1:])
        # May the next sentence say "she" or "they"? Not if it could mean somebody else.
        if "{being}" in form or "someone" in form or (len(cast) == 2 and "{act}" in form):
            clear = False
        elif any(slot in form for slot in ("{who}", "{whom}", "{one}")):
            clear = True
    return Example(prompt, " ".join(sentences), tuple(sorted(concepts)))


def people(rng: random.Random, cast: list[str], clear: bool) -> dict[str, str]:
    """What to put into the slots for people; pronouns only if it is `clear` whom they mean."""
    one, other = rng.sample(cast, 2) if len(cast) == 2 else cast * 2
    name, pronouns = one, ("she", "her") if one in SHE else ("he", "him")
    if len(cast) == 2:
        name = rng.choice((one, other, " and ".join(cast), "the two friends"))
        pronouns = "they", "them"
    who, whom = pronouns if clear and rng.random() < 0.6 else (name, name)
    return dict(one=one, other=other, name=name, who=who, whom=whom)


def fill(rng: random.Random, phrases: dict[str, list[str]], form: str, used: set[str]) -> dict:
    """What to put into a form's other slots; no noun (last word) is used twice in a story."""
    slots = {}
    for kind in phrases:
        if "{%s}" % kind in form.replace("spot", "place"):
            phrase = rng.choice([p for p in phrases[kind] if p.split()[-1] not in used])
            used.add(phrase.split()[-1])
            slots[kind] = a(phrase) if kind in ("thing", "being") else phrase
    slots["spot"] = slots.get("place", "").partition(" ")[2]   # "at the harbour": the harbour
    return slots


def a(noun: str) -> str:
    """With an article: "a crab", "an oar", "a unicycle"."""
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")   # this sounds like "you"
    return f"an {noun}" if vowel else f"a {noun}"


# ---------------------------------------------------------------------------- source 2: WordNet

LEXNAMES = {"animal": 5, "plant": 20, "food": 13, "body": 8, "artifact": 6, "location": 15,
            "person": 18, "communication": 10, "act": 4, "cognition": 9, "substance": 27,
            "state": 26, "attribute": 7, "event": 11, "time": 28, "group": 14}


def load_wordnet(flags: int) -> Data:
    """Noun senses of WordNet (Fellbaum 1998): "lemma:" -> its definition, one category each. The lemmas
    of a synset share its definition.

    The categories are the lexicographer files, numbered in lexnames(5WN); the format of data.noun
    is described in wndb(5WN): `offset lex_filenum ss_type w_cnt word lex_id ... | gloss`.
    """
    concepts = list(LEXNAMES)[:flags]
    category = {f"{LEXNAMES[concept]:02d}": concept for concept in concepts}
    examples = []
    for line in wordnet_lines():
        fields = line.split(" ", 5)
        if line.startswith("  ") or len(fields) < 6 or fields[1] not in category:
            continue   # the licence stands at the top, indented
        definition = line.partition(" | ")[2].partition('; "')[0].strip()   # without its examples
        lemmas = line.split(" ")[4:4 + 2 * int(fields[3], 16):2]
        if definition:
            examples += [Example(lemma.replace("_", " ") + ":", definition, (category[fields[1]],))
                         for lemma in lemmas]
    return Data("wordnet", concepts, *split(examples, train=62, judge=28), None)


def wordnet_lines() -> list[str]:
    """The lines of data.noun, in Debian's folder or NLTK's (there it may still be zipped)."""
    roots = filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep))
    folders = [Path("/usr/share/wordnet"), *(Path(root, "corpora", "wordnet") for root in roots),
               Path.home() / "nltk_data" / "corpora" / "wordnet"]
    for folder in folders:
        if (folder / "data.noun").is_file():
            return (folder / "data.noun").read_text("utf-8", "replace").splitlines()
        if folder.with_suffix(".zip").is_file():
            try:
                with zipfile.ZipFile(folder.with_suffix(".zip")) as archive:
                    return archive.read("wordnet/data.noun").decode("utf-8", "replace").splitlines()
            except (zipfile.BadZipFile, KeyError) as error:
                raise ValueError(f"{folder}.zip: {error}; download it again") from None
    raise FileNotFoundError(
        f"WordNet is neither in {' nor in '.join(map(str, folders))}: get it with "
        "`apt-get install wordnet-base` or `python -m nltk.downloader wordnet`")


# ---------------------------------------------------------------------------- source 3: your own

LONGEST = 10_000_000   # bytes in a line
WANTED = '{"prompt": "...", "text": "...", "concepts": ["...", ...]}'


def load_jsonl(path: Path, flags: int) -> Data:
    """One object a line, as WANTED says; "prompt" may be empty, other keys are ignored."""
    if not path.is_file() or not os.access(path, os.R_OK):
        raise FileNotFoundError(f"{path}: no such file, or it may not be read; check the path")
    examples, number = {}, 0   # a dict: it keeps the order and drops what is repeated
    with open(path, "rb") as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            try:
                if line.strip(b"\xef\xbb\xbf \t\r\n"):   # the first three: a byte order mark
                    examples[parse(line)] = None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; wanted: {WANTED}") from None

    concepts = sorted({concept for example in examples for concept in example.concepts})
    if len(concepts) < 2:
        raise ValueError(f"{path}: {len(examples)} examples, {len(concepts)} concepts; needs at "
                         f"least 2 concepts, to switch between; wanted on each line: {WANTED}")
    if len(concepts) > flags:
        raise ValueError(f"{path}: {len(concepts)} concepts, but {flags} flags; "
                         f"use --flags {len(concepts)}")
    data = Data(path.stem, concepts, *split(examples, train=70, judge=20), None)
    for name, part in (("train", data.train), ("judge", data.judge), ("test", data.test)):
        missing = set(concepts).difference(*(example.concepts for example in part))
        if not part or (missing and name != "test"):
            raise ValueError(f"{path}: the {name} split got no example of {sorted(missing)}; add "
                             "more (a hash of the prompt gives train 70 %, judge 20 %, test 10 %)")
    return data


def parse(line: bytes) -> Example:
    """One line of a .jsonl file. Raises ValueError, saying what is wrong."""
    if len(line) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} bytes")
    try:
        item = json.loads(line.decode("utf-8-sig"))
        json.dumps(item, ensure_ascii=False).encode()   # refuses "\\ud800", half a character
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(item, dict):
        raise ValueError("not an object")
    prompt, text, concepts = (item.get(key) for key in ("prompt", "text", "concepts"))
    if not isinstance(prompt, str):
        raise ValueError("'prompt' must be a string")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("'text' must be a non-empty string")
    if not isinstance(concepts, list) or not concepts or not all(
            isinstance(concept, str) and concept.strip() for concept in concepts):
        raise ValueError("'concepts' must be a list of one or more non-empty strings")
    return Example(prompt, text, tuple(sorted(set(concepts))))


# ---------------------------------------------------------------------------- the tokenizer

END = "<|end|>"   # the one special token: it begins and ends every sequence

# GPT-2's rule for cutting text into pieces: a word with the space before it, a number, a run of
# signs, a run of white space. No merge crosses a cut. The limit of 32 keeps odd files fast.
PIECES = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,32}| ?\p{N}{1,32}| ?[^\s\p{L}\p{N}]{1,32}"
          r"|\s{1,32}(?!\S)|\s{1,32}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Byte-pair encoding (Sennrich et al. 2016) on bytes (GPT-2: Radford et al. 2019).

    Begin with the 256 bytes as tokens, so that nothing is ever unknown. Then, again and again,
    make one new token of the most frequent pair of neighbours. Each distinct piece of text is
    kept once, with its count, and an index says which pieces hold a pair: a merge touches only
    those. Of equally frequent pairs the one with the smaller ids goes first.

    Returns a tokenizer of `vocab_size` tokens, or fewer if the texts have no more pairs. END is
    the last id. Raises ValueError if vocab_size is under 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END}), not {vocab_size}")
    counts = Counter(piece for text in texts for piece in regex.findall(PIECES, text))
    pieces = [list(piece.encode("utf-8", "replace")) for piece in counts]
    counts = list(counts.values())
    tokens, merges = [bytes([byte]) for byte in range(256)], []

    frequency, holders = Counter(), defaultdict(set)   # pair -> its count, pair -> pieces with it
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            frequency[pair] += counts[i]
            holders[pair].add(i)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)

    while heap and len(tokens) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:   # out of date: merges have eaten some of these pairs
            if frequency[pair] > 0:
                heapq.heappush(heap, (-frequency[pair], pair))
            continue
        token = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        merges.append([letters(tokens[i]) for i in pair])
        fresh = set()   # the pairs that this merge brings about
        for i in holders.pop(pair):
            for old in zip(pieces[i], pieces[i][1:]):
                frequency[old] -= counts[i]
            pieces[i] = merge(pieces[i], pair, token)
            for new in zip(pieces[i], pieces[i][1:]):
                frequency[new] += counts[i]
                if token in new:
                    holders[new].add(i)
                    fresh.add(new)
        for new in fresh:
            heapq.heappush(heap, (-frequency[new], new))
    vocab = {letters(token): i for i, token in enumerate(tokens)}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    return make_tokenizer(bpe_spec(vocab, merges, [split], {END: len(tokens)}), END)


def merge(piece: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Replace each `pair` of neighbours by `token`, from left to right."""
    merged, i = [], 0
    while i < len(piece):
        found = i + 1 < len(piece) and (piece[i], piece[i + 1]) == pair
        merged.append(token if found else piece[i])
        i += 2 if found else 1
    return merged


# ---------------------------------------------------------------- tokenizers of real checkpoints

# A tokenizer.json (the format of the package `tokenizers`) writes bytes as printable letters:
# GPT-2's alphabet, in which a space is "Ġ".
PLAIN_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in PLAIN_BYTES} | {byte: chr(256 + i) for i, byte in enumerate(
    byte for byte in range(256) if byte not in PLAIN_BYTES)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


@dataclass
class Tokenizer:
    """Text to token ids and back."""
    encode: Callable[[str], list[int]]   # special tokens in the text (by tiktoken: all added ones) are plain text
    decode: Callable[[list[int]], str]   # bytes that are not UTF-8 become U+FFFD
    begin: int      # opens a sequence: `end`, unless the folder puts a token before every text
    end: int        # ends a sequence
    n_vocab: int    # ids are below this (a model may have more rows than its tokenizer has ids)
    spec: dict = field(repr=False)      # the contents of tokenizer.json: all that there is to save
    config: dict = field(repr=False)    # the contents of tokenizer_config.json


def make_tokenizer(spec: dict, end: str | int, config: dict | None = None) -> Tokenizer:
    """By tiktoken where that gives the same tokens as `spec` asks for, else by `tokenizers`."""
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    vocab = spec["model"]["vocab"]
    if not isinstance(vocab, dict):   # a list of [token, score]
        vocab = {token: id for id, (token, _) in enumerate(vocab)}
    ids = vocab | added
    begin = end = ids.get(end, end)
    if end not in ids.values():
        raise ValueError(f"the end token {end!r} is not in the vocabulary")
    post = spec.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            begin = ids[step["single"][0]["SpecialToken"]["id"]]   # as Llama-3's
    encode, decode = with_tiktoken(spec, vocab, added) or with_tokenizers(spec)
    config = config or {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {id: token for token, id in ids.items()}
    config |= {"eos_token": names[end]} | ({"bos_token": names[begin]} if begin != end else {})
    return Tokenizer(encode, decode, begin, end, 1 + max(names), spec, config)


def with_tiktoken(spec: dict, vocab: dict[str, int], added: dict[str, int]):
    """(encode, decode), or None if tiktoken's tokens might be others than `spec`'s.

    A tokenizer.json lists the pairs that may be joined, first those to be joined first; tiktoken
    joins the two neighbours whose union has the lowest id. For a trained list both do the same where
    the ids of the unions only rise along it (Llama-3 lists all pairs of a token together). With
    "ignore_merges", a token that no pair makes stands for a whole piece; tiktoken takes it so too
    if it has no two parts that are tokens.
    """
    model, normalizer, cuts = spec["model"], spec.get("normalizer"), list_cuts(spec)
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (model.get("type", "BPE") != "BPE" or any(model.get(key) for key in odd) or cuts is None
            or normalizer not in (None, {"type": "NFC"})
            or not BYTES.keys() >= set("".join(vocab.keys() - added.keys()))):
        return None
    unions = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = [vocab[token] for token in unions]
    loose = vocab.keys() - added.keys() - set(unions) - BYTES.keys() if model.get("ignore_merges") else set()
    if made != sorted(made) or any(t[:i] in vocab and t[i:] in vocab for t in loose for i in range(1, len(t))):
        return None
    to_bytes = lambda token: bytes(BYTES[letter] for letter in token)
    known, lacking = BYTES.keys() & vocab.keys(), to_bytes(BYTES.keys() - vocab.keys())
    pattern = rf"{cuts[-1]}|(?:(?!{cuts[-1]})[\s\S])+"
    encoding = tiktoken.Encoding(
        "folder", pat_str=pattern, special_tokens={},
        mergeable_ranks={to_bytes(token): vocab[token] for token in loose.union(unions, known)})
    tokens = {id: to_bytes(token) for token, id in vocab.items() if token not in added}
    tokens |= {id: token.encode() for token, id in added.items()}

    def encode(text):
        text = unicodedata.normalize("NFC", text) if normalizer else text
        pieces = [text]
        for cut in cuts[:-1]:
            pieces = [part for piece in pieces for part in regex.split(f"({cut})", piece)]
        if lacking:     # SmolLM2's vocabulary lacks a few: they are dropped before pairs are joined
            pieces = [match[0].encode("utf-8", "replace").translate(None, lacking)
                      for piece in pieces for match in regex.finditer(pattern, piece)]
            return [id for piece in pieces if piece for id in encoding._encode_single_piece(piece)]
        return [id for piece in pieces for id in encoding.encode_ordinary(piece)]

    def decode(sequence):
        return b"".join(tokens.get(id, b"") for id in sequence).decode("utf-8", "replace")

    return encode, decode


def list_cuts(spec: dict) -> list[str] | None:
    """The patterns that cut a text into pieces, one after the other; None if they are unknown."""
    cuts, pre = [], spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated"}:
                cuts.append(cut)
            case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Removed", "invert": True}:
                cuts.append(cut)
            case {"type": "Digits", "individual_digits": alone}:
                cuts.append(r"\p{N}" if alone else r"\p{N}+")
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                cuts += [GPT2_PIECES] if step.get("use_regex", True) else []
            case _:
                return None
    cuts = cuts or [r"[\s\S]+"]
    groups = any(regex.compile(cut).groups for cut in cuts[:-1])   # would upset regex.split
    return None if groups or not steps or steps[-1].get("type") != "ByteLevel" else cuts


def with_tokenizers(spec: dict):
    """(encode, decode) by the package `tokenizers`: SentencePiece-like and other kinds."""
    try:
        from tokenizers import Tokenizer as Core
    except ImportError:
        raise ImportError("tiktoken cannot express this folder's tokenizer: "
                          "pip install tokenizers") from None
    core = Core.from_str(json.dumps(spec))
    core.encode_special_tokens = True
    # Llama-2's kind puts a space before every text: a text that brings its own loses it
    spaced = core.encode("a", add_special_tokens=False).tokens[0].startswith("▁")

    def encode(text):
        return core.encode(text.removeprefix(" ") if spaced else text, add_special_tokens=False).ids

    return encode, lambda ids: core.decode(ids, skip_special_tokens=False)


def bpe_spec(vocab: dict[str, int], merges: list, steps: list[dict], added: dict[str, int]) -> dict:
    """A tokenizer.json of byte-level BPE; `steps` cut the text into pieces."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": id, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for token, id in added.items()],
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": steps + [byte_level | {"use_regex": not steps}]},
        "post_processor": None, "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges}}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Its end is eos_token_id of config.json (the first, if there are several), or else eos_token of
    tokenizer_config.json. Raises FileNotFoundError, ValueError or ImportError with one line.
    """
    folder = Path(folder)
    files = {name: json.loads((folder / name).read_text("utf-8")) for name in
             ("tokenizer.json", "vocab.json", "tokenizer_config.json", "config.json")
             if (folder / name).is_file()}
    spec, config = files.get("tokenizer.json"), files.get("tokenizer_config.json", {})
    if spec is None and "vocab.json" in files and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        vocab, made = files["vocab.json"], BYTES.keys() | {"".join(pair) for pair in merges}
        added = {token: id for token, id in vocab.items() if token not in made}
        spec = bpe_spec(vocab, merges, [], added)
    if spec is None:
        raise FileNotFoundError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt")
    end = files.get("config.json", {}).get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is None:
        end = config.get("eos_token")
        end = end["content"] if isinstance(end, dict) else end
    if end is None:
        raise ValueError(f"no eos_token_id in {folder / 'config.json'}: where does a text end?")
    return make_tokenizer(spec, end, config)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path):
    """Write tokenizer.json and tokenizer_config.json: load_tokenizer and transformers read them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, contents in (("tokenizer.json", tokenizer.spec),
                           ("tokenizer_config.json", tokenizer.config)):
        text = json.dumps(contents, indent=1, ensure_ascii=False)
        (Path(folder) / name).write_text(text + "\n", "utf-8")


# ---------------------------------------------------------------------------- rows and batches

class Row(NamedTuple):
    prompt: list[int]          # the tokenizer's begin (END, in ours) and the prompt's tokens
    text: list[int]            # the text's tokens and the tokenizer's end
    label: tuple[float, ...]   # (K,) 1.0 where the text is about concepts[i]
    stay: int = 0              # so many tokens at the prompt's end stay where the prompt is not shown


class Batch(NamedTuple):
    idx: torch.Tensor       # (B, T) int64
    targets: torch.Tensor   # (B, T) int64, -100 where nothing is to be predicted
    y: torch.Tensor         # (B, K) float32
    chance: torch.Tensor    # (B,) float32 in [0, 1): a random number for whoever needs one


def encode(examples: Iterable[Example], tokenizer: Tokenizer, concepts: list[str],
           context: int) -> list[Row]:
    """Token ids for a model that reads at most `context` tokens.

    A text that is too long is cut and then has no END. Raises ValueError for a prompt that
    leaves no room for a single token of text.
    """
    rows = []
    for example in examples:
        prompt = [tokenizer.begin] + tokenizer.encode(example.prompt)
        if len(prompt) > context:
            start = example.prompt[:40]
            raise ValueError(f"the prompt {start!r}... has {len(prompt)} tokens with its first: "
                             f"more than the context of {context}; shorten it")
        text = tokenizer.encode(" " + example.text) + [tokenizer.end]
        label = tuple(float(concept in example.concepts) for concept in concepts)
        # the last token of the text is only predicted, never read: hence the + 1
        rows.append(Row(prompt, text[:context - len(prompt) + 1], label))
    return rows


def batch(rows: list[Row], step: int, size: int, seed: int, no_prompt: float = 0.0) -> Batch:
    """The batch of training step `step`: a pure function, so resuming needs no saved state.

    Every epoch goes through the rows in a new order (up to size - 1 of them sit it out; with
    fewer rows than `size`, each batch is all of them). Rows of similar length go together, so
    that little is padding. In a share `no_prompt` of the rows the prompt is not shown: of its tokens
    the first stands there alone (with the last row.stay).
    """
    per_epoch = max(1, len(rows) // size)
    epoch, i = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, 0, epoch])
    order = rng.permutation(len(rows))[:per_epoch * size]
    i = rng.permutation(per_epoch)[i]
    chunk, i = divmod(i, 32)   # sort within 32 batches, not all: company should change
    chosen = [rows[j] for j in order[chunk * 32 * size:(chunk + 1) * 32 * size].tolist()]
    chosen.sort(key=lambda row: len(row.prompt) + len(row.text))
    chosen = chosen[i * size:(i + 1) * size]
    drop, chance = np.random.default_rng([seed, 1, step]).random((2, len(chosen)), dtype=np.float32)
    hidden = lambda row: row.prompt[:1] + row.prompt[len(row.prompt) - row.stay:]
    chosen = [row._replace(prompt=hidden(row)) if draw < no_prompt else row for row, draw in zip(chosen, drop)]
    return pad(chosen)._replace(chance=torch.from_numpy(chance))


def pad(rows: list[Row]) -> Batch:
    """Rows as tensors, padded on the right with their first token.

    targets[b, t] is the token that follows idx[b, t] if it belongs to the text, else -100. So the
    positions with a target run from the last token of the prompt to the last but one of the whole.
    """
    lengths = [len(row.prompt) + len(row.text) - 1 for row in rows]
    longest = -(-max(lengths) // 8) * 8     # few different shapes: CPU kernels are made for each
    idx = np.full((len(rows), longest), rows[0].prompt[0], dtype=np.int64)
    targets = np.full_like(idx, -100)
    for b, (row, length) in enumerate(zip(rows, lengths)):
        idx[b, :length] = (row.prompt + row.text)[:-1]
        targets[b, len(row.prompt) - 1:length] = row.text
    y = torch.tensor([row.label for row in rows], dtype=torch.float32)
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), y, torch.zeros(len(rows)))


def predicted(targets: torch.Tensor) -> torch.Tensor:
    """Where targets (B, T) are to be predicted, (B, T) bool; and at a few more positions, so that
    their number is a multiple of 256 if that many are there: few different shapes, see `pad`."""
    at = (targets >= 0).flatten()
    at[(~at).nonzero()[:-at.sum() % 256]] = True
    return at.view_as(targets)

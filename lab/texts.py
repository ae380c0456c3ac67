"""Real labelled text, as .jsonl files for --data: from Python's packages and from Debian's.

    apt-get install wordnet-base fortunes dict-gcide manpages manpages-dev \\
        manpages-{cs,de,es,fr,hu,it,ja,nl,pl,ro,ru,zh}
    python -m lab.texts out/texts       # verbs, adjectives, packages, docstrings, languages, ...
    python flags.py --data out/texts/verbs.jsonl

Each set has at most 16 concepts, the most frequent ones. A set whose source is missing is left out.
"""
import argparse
import ast
import gzip
import json
import random
import re
import subprocess
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

WORDNET, FORTUNES = Path("/usr/share/wordnet"), Path("/usr/share/games/fortunes")
DICTIONARY, MANUAL = Path("/usr/share/dictd/gcide.dict.dz"), Path("/usr/share/man")


def wordnet(part):
    """"lemma:" -> its definition; the concept is the lexicographer file's number. An adjective's
    mark of syntax, as in "galore(ip)", is left out: it would tell the file."""
    for line in (WORDNET / f"data.{part}").read_text("utf-8", "replace").splitlines():
        fields = line.split(" ")
        if line[0] != " ":
            gloss = line.partition(" | ")[2].partition('; "')[0].strip()
            for lemma in fields[4:4 + 2 * int(fields[3], 16):2]:
                yield lemma.split("(")[0].replace("_", " ") + ":", gloss, f"file {fields[1]}"


def debian():
    """The entries of Debian's list of packages, as dictionaries."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True,
                            encoding="utf-8")
    for entry in listed.stdout.split("\n\n"):
        fields = re.findall(r"^(Package|Description|Section|Tag): (.*(?:\n .*)*)", entry, re.M)
        yield {name: text.split("\n")[0] if name != "Tag" else text for name, text in fields}


def packages():
    """A package's name -> its short description; the concept is its section."""
    for fields in debian():
        if {"Package", "Description", "Section"} <= fields.keys():
            yield fields["Package"] + ":", fields["Description"], fields["Section"].split("/")[-1]


def works():
    """A package's name -> its short description; concepts: all that it works with (its tags)."""
    for fields in debian():
        if tags := re.findall("works-with::([^, ]+)", fields.get("Tag", "")):
            yield fields["Package"] + ":", fields["Description"], tags


def fortunes():
    """A short fortune's first three words -> the rest; the concept is its file."""
    for file in sorted(FORTUNES.iterdir()):
        if file.is_file() and not file.suffix:
            for text in file.read_text("utf-8", "replace").split("\n%\n"):
                text = " ".join(text.split())
                if 20 < len(text) < 300:
                    yield " ".join(text.split()[:3]), " ".join(text.split()[3:]), file.name


def dictionary():
    """A word -> the first sentence of its definition; the concept is the label of its field."""
    content = gzip.open(DICTIONARY).read().decode("utf-8", "replace")
    for entry in content.split("\n\n"):
        found = re.match(r"(\S[^\\\n]*?) \\.*?\(([A-Z][a-z]{1,7}\.)\)\s+(.*?[.;])\s", entry, re.S)
        if found:
            yield found[1] + ":", " ".join(found[3].split()), found[2]


def docstrings():
    """A function's or class's name -> its docstring's first sentence; concept: its package."""
    site = Path(sysconfig.get_path("purelib"))
    warnings.simplefilter("ignore")     # of foreign code, as ast reads it
    for file in sorted(site.glob("[a-z]*/**/*.py")):
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                words = (ast.get_docstring(node) or "").split()
                text = re.match(r".*?\.(?= |$)|", " ".join(words))[0]
                if 20 < len(text) < 200:
                    yield node.name + ":", text, file.relative_to(site).parts[0]


def manual(pages, concept, most):
    """The beginning of a manual page's sentence -> the rest of it. At most so many, at random."""
    items = {}
    for file in pages:
        source = gzip.open(file).read().decode("utf-8", "replace")
        source = re.sub(r"^\.([BI]|BR|RB|IR|RI|BI|IB) +", "", source, flags=re.M)   # bold, italics
        for paragraph in re.split(r"^(?:[.'].*|\s*)$", source, flags=re.M):
            plain = re.sub(r"\\([*f]?\(..|f\[.*?\]|f.|.)", "", paragraph.replace(r"\-", "-"))
            sentence = re.split(r"(?<=[.!?]) |(?<=。)", " ".join(plain.split()))[0]
            cut = sentence.rfind(" ", 6, 24) + 1 or 8       # Chinese and Japanese have no spaces
            if 30 < len(sentence) < 200 or cut == 8 and 20 < len(sentence) < 200:
                items[sentence[cut:]] = sentence[:cut].strip(), sentence[cut:], concept
    return random.Random(0).sample(list(items.values()), min(most, len(items)))


def languages():
    """Manual pages; the concept is their language."""
    yield from manual(sorted(MANUAL.glob("man[1-8]/*.gz")), "en", 900)
    for name in "cs de es fr hu it ja nl pl ro ru sv tr uk zh_CN".split():
        yield from manual(sorted(MANUAL.glob(f"{name}/man[1-8]/*.gz")), name, 900)


def sections():
    """English manual pages; the concept is the section of the manual."""
    for folder in sorted(MANUAL.glob("man[1-8]")):
        yield from manual(sorted(folder.glob("*.gz")), f"section {folder.name[3]}", 600)


def save(path, items, most=16, least=100):
    """The items of the `most` frequent concepts that have `least` examples."""
    items = [(*rest, [of] if isinstance(of, str) else of) for *rest, of in items]
    counts = Counter(concept for *_, concepts in items for concept in concepts)
    kept = {concept for concept, n in counts.most_common(most) if n >= least}
    items = [(prompt, text, [concept for concept in concepts if concept in kept])
             for prompt, text, concepts in items if kept & {*concepts} and text.strip()]
    with open(path, "w", encoding="utf-8") as file:
        for prompt, text, concepts in items:
            line = {"prompt": prompt, "text": text, "concepts": concepts}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{path}: {len(items):,} lines, {len(kept)} concepts")
    return items


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    folder = p.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(error)
    sets = {"verbs": lambda: wordnet("verb"), "adjectives": lambda: wordnet("adj"),
            "packages": packages, "fortunes": fortunes, "dictionary": dictionary, "works": works,
            "docstrings": docstrings, "languages": languages, "sections": sections}
    for name, make in sets.items():
        print(f"reading {name}, up to a minute", flush=True)
        try:
            items = list(make())
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} is left out: {error}")
            continue
        kept = save(folder / f"{name}.jsonl", items)
        if name == "packages":
            some = random.Random(0).sample(kept, min(3000, len(kept)))
            save(folder / "packages-3000.jsonl", some, least=1)


if __name__ == "__main__":
    main()

"""Real labelled text from Debian packages, as .jsonl files for --data.

    apt-get install wordnet-base fortunes dict-gcide
    python -m lab.texts out/texts       # verbs, adjectives, packages, packages-3000, ...
    python flags.py --data out/texts/verbs.jsonl

Each set has at most 16 concepts, the most frequent ones. A set whose source is missing is left out.
"""
import argparse
import gzip
import json
import random
import re
import subprocess
from collections import Counter
from pathlib import Path

WORDNET, FORTUNES = Path("/usr/share/wordnet"), Path("/usr/share/games/fortunes")
DICTIONARY = Path("/usr/share/dictd/gcide.dict.dz")


def wordnet(part):
    """"lemma:" -> its definition; the concept is the lexicographer file's number."""
    for line in (WORDNET / f"data.{part}").read_text("utf-8", "replace").splitlines():
        fields = line.split(" ")
        if line[0] != " ":
            gloss = line.partition(" | ")[2].partition('; "')[0].strip()
            for lemma in fields[4:4 + 2 * int(fields[3], 16):2]:
                yield lemma.replace("_", " ") + ":", gloss, f"file {fields[1]}"


def packages():
    """A package's name -> its short description; the concept is its section."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    for entry in listed.stdout.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Description|Section): (.*)", entry, re.M))
        if len(fields) == 3:
            yield fields["Package"] + ":", fields["Description"], fields["Section"].split("/")[-1]


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


def save(path, items, most=16, least=100):
    """The items of the `most` frequent concepts that have `least` examples."""
    counts = Counter(concept for *_, concept in items)
    kept = {concept for concept, n in counts.most_common(most) if n >= least}
    items = [item for item in items if item[2] in kept and item[1].strip()]
    with open(path, "w") as file:
        for prompt, text, concept in items:
            line = {"prompt": prompt, "text": text, "concepts": [concept]}
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
            "packages": packages, "fortunes": fortunes, "dictionary": dictionary}
    for name, make in sets.items():
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

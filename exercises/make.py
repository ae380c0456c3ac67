"""Make a starter folder for one exercise: `python exercises/make.py 3 ../my-folder`.

The functions of the exercise are emptied below their docstrings; all else is solved. What prints
the answer is cut from the README; so is the lab book.
"""
import ast
import re
import shlex
import shutil
import sys
from pathlib import Path

OPEN = {"1": ["flags.py steer"], "2": ["data.py pad"], "3": ["flags.py install"],
        "4": ["flags.py install"], "5": ["lab/producing.py experiment"], "6": ["flags.py auc"],
        "7": ["lab/compare.py means"], "8": ["lab/probe.py ridge"], "9": ["lab/compare.py route"],
        "10": ["model.py Cache.append", "data.py train_bpe"], "11": []}
ROOT = Path(__file__).resolve().parent.parent


def find(source, name):
    """The node of a function, by its qualified name."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node


def empty(source, name):
    """The source with no body below the function's docstring, and the lines of the old one."""
    node, lines = find(source, name), source.splitlines()
    begin = node.body[0].end_lineno
    old = lines[begin:node.end_lineno]
    new = [" " * (node.col_offset + 4) + "raise NotImplementedError"]
    return "\n".join(lines[:begin] + new + lines[node.end_lineno:]) + "\n", old


def make(number, folder):
    Path(folder).mkdir(parents=True)
    told = "wrong_answers.txt", "planted.txt", "test_exercises.py", "answers.md"     # they tell
    for file in (x for part in ("", "lab", "exercises", "assets") for x in (ROOT / part).iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name not in told:
            copy = Path(folder, file.relative_to(ROOT))
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(file, copy)
    answers = set()
    for file, name in (entry.split() for entry in OPEN[number]):
        path = Path(folder, file)
        source, old = empty(path.read_text("utf-8"), name)
        path.write_text(source, "utf-8")
        bare = [line.split("#")[0].strip() for line in old]     # without comments
        answers |= {line for line in bare if len(line) > 20}

    def cut(block):
        return "(cut: it is the exercise)" if any(a in block[0] for a in answers) else block[0]
    readme = re.sub(r"```python\n.*?```", cut, (ROOT / "README.md").read_text("utf-8"), flags=re.S)
    if number != "11":      # what they ask to predict
        for part in (r"Four things to notice\..*?(?=## Use it)", r"## Results.*"):
            readme = re.sub(part, "(cut: it answers the exercises)\n\n", readme, flags=re.S)
        readme = re.sub(r"We do not claim that the concept.*", "(cut)", readme)
        for picture in ("compare.png", "probe.png", "sweep-supply.png"):
            Path(folder, "assets", picture).unlink()
        Path(folder, "lab/README.md").write_text("(cut: the lab book tells the answers)\n")
    Path(folder, "README.md").write_text(readme, "utf-8")
    sheet = Path(folder, "exercises/README.md")
    sheet.write_text(sheet.read_text("utf-8").split("## For instructors")[0], "utf-8")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # it may lack characters of the folder's name
    if len(sys.argv) != 3 or sys.argv[1] not in OPEN or Path(sys.argv[2]).exists():
        print("usage: python exercises/make.py NUMBER FOLDER, with a number of 1 to 11 and a new "
              "folder", file=sys.stderr)
        sys.exit(2)
    number, folder = sys.argv[1:]
    try:
        make(number, folder)
    except OSError as error:
        print(f"{folder} can't be made: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Wrote {folder}. Read exercises/README.md there. To check:\n"
          f"cd {shlex.quote(folder)} && python exercises/check.py {number}")

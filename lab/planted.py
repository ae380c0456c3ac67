"""Do the tests notice wrong versions? planted.txt has some; each is tried in a copy of its own.

    python -m lab.planted       # some twelve minutes on two cores; lab/test_init.py's packages
"""
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flags import counted

ROOT = Path(__file__).parent.parent
TESTS = {"lesson": ["test_flags.py"],
         "lab": ["lab/test_compare.py", "lab/test_probe.py"], "tools": ["lab/test_tools.py"],
         "init": ["lab/test_init.py", "-k", "schedule or processes or whole"]}


def errors():
    """(file, tests, old, new) of each wrong version: one with `new` for `old` in the file."""
    for line in Path(__file__).with_name("planted.txt").read_text().splitlines():
        if not line.startswith("#"):
            file, tests, change = line.split(maxsplit=2)
            old, new = change.replace(r"\n", "\n").split(" => ")
            if (ROOT / file).read_text().count(old) != 1:
                raise ValueError(f"not once in {file}: {old}")
            yield file, tests, old, new


def attempt(error):
    """Whether the tests notice this error, and the first that does."""
    file, tests, old, new = error
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, f"{folder}/copy", ignore=shutil.ignore_patterns(".*", "out"))
        path = Path(copy, file)
        path.write_text(path.read_text().replace(old, new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *TESTS[tests]], cwd=copy, text=True,
            capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, (failed or [""])[0][:80]


if __name__ == "__main__":
    planted = list(errors())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tried = pool.map(attempt, planted)
        for error, _ in zip(planted, counted("wrong version", planted)):
            noticed, by = next(tried)
            print("noticed" if noticed else "MISSED ", " => ".join(error[2:])[:120], by, flush=True)

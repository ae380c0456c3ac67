"""What lab.texts makes of a manual page, and which lines it keeps."""
import gzip
import json

from lab import texts

PAGE = r""".\" a comment that is no text
.TH LS 1
.SH NAME
ls \- list directory contents, in order, of each folder. And more.
.PP
.B ls
shows \fBnothing\fP at all, \(aqquoted\(aq, of files that are not there.

Short.
.PP
ls は、ディレクトリの内容を一覧表示する。
.PP
ファイルの情報を新しい順に並べて表示する。
"""


def test_a_manual_page_gives_plain_sentences_cut_in_two(tmp_path):
    page = tmp_path / "ls.1.gz"
    page.write_bytes(gzip.compress(PAGE.encode()))
    assert sorted(texts.manual([page], "en", 9)) == sorted([
        ("ls - list directory", "contents, in order, of each folder.", "en"),
        ("ls shows nothing at", "all, quoted, of files that are not there.", "en"),
        ("ls は、ディレ", "クトリの内容を一覧表示する。", "en"),
        ("ファイルの情報を", "新しい順に並べて表示する。", "en")])
    assert len(texts.manual([page], "en", 2)) == 2


def test_kept_are_the_frequent_concepts_of_each_line(tmp_path, capsys):
    items = [("a:", "one", "cat"), ("b:", "two", ["cat", "dog", "eel"]), ("c:", "three", "dog"),
             ("d:", "four", "eel"), ("e:", " ", "cat")]
    texts.save(tmp_path / "some.jsonl", items, most=2, least=2)
    kept = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["concepts"]) for line in kept] == [
        ("a:", ["cat"]), ("b:", ["cat", "dog"]), ("c:", ["dog"])]
    assert "3 lines, 2 concepts" in capsys.readouterr().out


def test_a_line_of_wordnet_gives_each_of_its_lemmas_without_marks(tmp_path, monkeypatch):
    (tmp_path / "data.adj").write_text(
        "  1 the licence is indented\n"
        "00013887 00 s 02 bountiful(a) 0 in_full_measure(ip) 0 001 & 00 a 0000 | in "
        'plenty; "cows galore"\n')
    monkeypatch.setattr(texts, "WORDNET", tmp_path)
    assert list(texts.wordnet("adj")) == [("bountiful:", "in plenty", "file 00"),
                                          ("in full measure:", "in plenty", "file 00")]

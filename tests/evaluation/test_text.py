"""Long texts: clean, in two disjoint parts, named by what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation import text as texts
from trt_razor.evaluation.text import PARTS, load_text, split_sentences

STORY = "\n\n".join(
    f"The keeper of house number {i} lit the lamp. She waited for ship {i}, which came late."
    for i in range(40)
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_parts_are_of_equal_size_and_share_nothing(source: str) -> None:
    calibration, test = (load_text(source, p) for p in PARTS)
    sizes = [sum(map(len, t.sentences)) for t in (calibration, test)]
    assert min(sizes) > 100_000
    assert max(sizes) < 1.1 * min(sizes)
    assert set(calibration.sentences).isdisjoint(test.sentences)
    assert calibration.sha256 != test.sha256


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_package_texts_are_prose(source: str) -> None:
    for part in PARTS:
        body = load_text(source, part)
        for paragraph in body.paragraphs:
            line = " ".join(paragraph)
            assert "\n" not in line
            assert ">>>" not in line
            assert "::=" not in line
            assert "-----" not in line
        words = re.findall(r"\w+", " ".join(body.sentences).lower())
        assert sum(w in {"the", "a", "of", "to", "is", "and"} for w in words) > 0.15 * len(words)


def test_one_text_is_loaded_once() -> None:
    assert load_text("python", "test") is load_text("python", "test")


def test_hash_names_the_cleaned_text_and_not_its_layout(tmp_path: Path) -> None:
    unix = load_text(write(tmp_path / "a.txt", STORY), "test")
    dos = load_text(write(tmp_path / "b.txt", "\ufeff" + STORY.replace("\n", "\r\n")), "test")
    other = load_text(write(tmp_path / "c.txt", STORY.replace("lamp", "fire")), "test")
    assert unix.describe() == {"text": "a.txt", "part": "test", "text_sha256": unix.sha256}
    assert dos.sha256 == unix.sha256 != other.sha256


def test_file_is_cut_in_two_at_a_paragraph(tmp_path: Path) -> None:
    path = write(tmp_path / "story.txt", STORY)
    first, second = (load_text(path, p).paragraphs for p in PARTS)
    assert [" ".join(p) for p in first + second] == STORY.split("\n\n")
    assert abs(len(first) - len(second)) <= 2


def test_licence_around_a_gutenberg_book_is_left_out(tmp_path: Path) -> None:
    book = (
        "Terms of use are written here at some length.\n\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n"
        f"{STORY}\n\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n"
        "More terms of use are written here at some length.\n"
    )
    path = write(tmp_path / "book.txt", book)
    plain = write(tmp_path / "plain.txt", STORY)
    for part in PARTS:
        assert load_text(path, part).paragraphs == load_text(plain, part).paragraphs


@pytest.mark.parametrize(
    "noise",
    [
        "The Name of a Chapter\n=====================\n",
        ">>> print the whole thing and look at what is there, then go on.",
        "rule ::= this is how one writes down a grammar and nobody reads it.",
        "and so a line begins that is only the end of some other paragraph.",
        "Name  1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23.",
        "THE END",
    ],
)
def test_what_is_no_prose_is_left_out(tmp_path: Path, noise: str) -> None:
    paragraphs = STORY.split("\n\n")
    noisy = write(tmp_path / "noisy.txt", "\n\n".join([*paragraphs[:9], noise, *paragraphs[9:]]))
    kept = [p for part in PARTS for p in load_text(noisy, part).paragraphs]
    assert [" ".join(p) for p in kept] == paragraphs


@pytest.mark.parametrize(
    "paragraph, sentences",
    [
        ("It rains. It pours! Why? Nobody knows.", 4),
        ("Mr. Bell met Dr. J. Watt, i.e. The engineer. They spoke.", 2),
        ('"Go." She went. (He stayed.) Then 3 others came.', 4),
        ("Version 3.11 has it, see sys.path. then on it goes", 1),
    ],
)
def test_sentences(paragraph: str, sentences: int) -> None:
    split = split_sentences(paragraph)
    assert len(split) == sentences
    assert " ".join(split) == paragraph


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part 'tset': did you mean test"):
        load_text("python", "tset")
    with pytest.raises(UsageError, match=r"no such file.*did you mean python"):
        load_text("pyhton", "test")
    with pytest.raises(UsageError, match="found a folder"):
        load_text(str(tmp_path), "test")
    with pytest.raises(UsageError, match="UTF-8, found byte 3"):
        load_text(write(tmp_path / "latin.txt", b"caf\xe9 au lait"), "test")
    with pytest.raises(UsageError, match="nothing for the part"):
        load_text(write(tmp_path / "short.txt", "Too short."), "test")


def test_a_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 100)
    with pytest.raises(UsageError, match="expected at most 100"):
        load_text(write(tmp_path / "huge.txt", STORY), "test")

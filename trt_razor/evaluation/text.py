"""Long natural texts, without a network: Python's and NumPy's documentation, or a file.

A text is blocks (topics, modules, halves of a book) of paragraphs of sentences. The blocks are
dealt to two disjoint parts by a fixed rule, so that settings chosen on ``calibration`` are reported
on ``test``. The texts that come with packages differ between versions: a report names what it used
by name and sha256.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from trt_razor.errors import RazorError, UsageError, did_you_mean

PARTS = ("calibration", "test")
MAX_FILE_BYTES = 64 << 20

Block = list[str]
"""Raw paragraphs that belong together; a block never falls into both parts."""

_UNDERLINE = re.compile(r"([*=\-~^#+_.])\1{3,}")
_BULLET = re.compile(r"^(?:[*\-•] +|\(?\d{1,2}[.)] +|\[\d+\] +)")
_MARKUP = re.compile(r"(?::[\w:]+:)?`+~?([^`]*)`+")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“])(?:e\.g|i\.e|cf|vs|etc|viz|Mr|Mrs|Ms|Dr|St|Messrs|Esq|Fig|Eq|Ref|No|[A-Z])\.$"
)
_NOT_DOCUMENTED = {"tests", "test", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
_GUTENBERG = re.compile(r"^\*{3} ?(START|END) OF TH[EI]S? PROJECT GUTENBERG.*$", re.M)


@dataclass(frozen=True)
class Text:
    """One part of a text.

    Attributes:
        name: of the source; for a file its name without folders.
        part: "calibration" or "test".
        paragraphs: in order, each the sentences it consists of.
        sha256: of this part's cleaned text, whatever it was made from.
    """

    name: str
    part: str
    paragraphs: tuple[tuple[str, ...], ...]
    sha256: str

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        return tuple(s for paragraph in self.paragraphs for s in paragraph)

    def describe(self) -> dict[str, str]:
        """What a sample's ``meta`` says about its text."""
        return {"text": self.name, "part": self.part, "text_sha256": self.sha256}


def check_part(part: str) -> None:
    """Raises UsageError for a part that does not exist."""
    if part not in PARTS:
        raise UsageError(f"part '{part}': {did_you_mean(str(part), PARTS)}")


def check_text(source: str, part: str) -> None:
    """Raises UsageError for a part or a source that does not exist; reads nothing."""
    check_part(part)
    if not isinstance(source, str) or not source:
        raise UsageError(
            f"text: expected one of {', '.join(sorted(SOURCES))} or a path, found {source!r}"
        )
    if source not in SOURCES and not Path(source).exists():
        raise UsageError(
            f"text '{source}': no such file, and no text of that name "
            f"({did_you_mean(source, SOURCES)})"
        )


def load_text(source: str, part: str) -> Text:
    """One part of a text, cleaned; the same object for the same arguments.

    Args:
        source: a name in ``SOURCES``, or the path of a UTF-8 file: paragraphs between empty lines.
        part: "calibration" or "test".

    Raises:
        UsageError: unknown source or part, a file that is not UTF-8 or too large.
        RazorError: the file cannot be read.
    """
    check_text(source, part)
    return _parts(source)[PARTS.index(part)]


@functools.lru_cache(maxsize=8)
def _parts(source: str) -> tuple[Text, Text]:
    if source in SOURCES:
        name, blocks = source, SOURCES[source]()
    else:
        name, blocks = Path(source).name, _file(Path(source))
    dealt: tuple[list[tuple[str, ...]], ...] = ([], [])
    sizes = [0, 0]
    for block in _clean(blocks):
        # The part that is behind takes the block: both get some of everything and end up alike.
        to = 0 if sizes[0] <= sizes[1] else 1
        dealt[to].extend(block)
        sizes[to] += sum(len(s) for p in block for s in p)
    made = []
    for part, paragraphs in zip(PARTS, dealt, strict=True):
        if not paragraphs:
            raise UsageError(
                f"text '{source}': nothing for the part '{part}'; "
                "expected at least two paragraphs of whole sentences, give a longer text"
            )
        digest = hashlib.sha256("\n\n".join(" ".join(p) for p in paragraphs).encode()).hexdigest()
        made.append(Text(name, part, tuple(paragraphs), digest))
    return made[0], made[1]


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph; joined with spaces they are the paragraph again.

    A full stop ends a sentence if a capital or a digit follows, and no usual abbreviation or
    initial precedes.
    """
    out, start = [], 0
    for end in _SENTENCE_END.finditer(paragraph):
        stop = end.start() + 1
        if paragraph[end.start()] == "." and _ABBREVIATION.search(paragraph[start:stop]):
            continue
        out.append(paragraph[start : end.end()].strip())
        start = end.end()
    if paragraph[start:].strip():
        out.append(paragraph[start:].strip())
    return out


# Cleaning ---------------------------------------------------------------------------------------
def _clean(blocks: Iterable[Block]) -> Iterable[list[tuple[str, ...]]]:
    """Blocks of prose: no headings, tables, code; nothing twice (topics quote each other)."""
    seen: set[str] = set()
    for block in blocks:
        out = []
        for raw in block:
            paragraph = _BULLET.sub("", _MARKUP.sub(r"\1", " ".join(raw.split())))
            if not _is_prose(raw, paragraph):
                continue
            sentences = [
                s for s in split_sentences(paragraph) if s not in seen and any(map(str.isalpha, s))
            ]
            seen.update(sentences)
            if sentences:
                out.append(tuple(sentences))
        if out:
            yield out


def _is_prose(raw: str, paragraph: str) -> bool:
    if len(paragraph) < 40 or _UNDERLINE.search(raw) or ">>>" in raw or "::=" in raw:
        return False
    if (
        not (paragraph[0].isupper() or paragraph[0] in "\"'“‘(")
        or paragraph[-1] not in ".!?:\"'”’)"
    ):
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.8 * len(paragraph)


def _paragraphs(text: str) -> Block:
    return re.split(r"\n[ \t]*\n", text)


# Sources ----------------------------------------------------------------------------------------
def _python() -> list[Block]:
    """The language reference inside Python; the longest topics first, others repeat pieces of them."""
    from pydoc_data.topics import topics

    return [_paragraphs(topics[k]) for k in sorted(topics, key=lambda k: (-len(topics[k]), k))]


def _stdlib() -> list[Block]:
    return _docstrings("stdlib", Path(sysconfig.get_paths()["stdlib"]))


def _numpy() -> list[Block]:
    spec = importlib.util.find_spec("numpy")
    return _docstrings("numpy", Path(spec.origin).parent if spec and spec.origin else None)


def _docstrings(name: str, root: Path | None) -> list[Block]:
    """Docstrings below a folder, one block a file; the files are parsed, not run."""
    blocks = []
    files = [] if root is None else [(p.relative_to(root).parts, p) for p in root.rglob("*.py")]
    for parts, path in sorted(files):
        if not _NOT_DOCUMENTED.isdisjoint(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # a template of a module, or not readable
            continue
        found = sorted(
            (node.lineno, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        texts = [inspect.cleandoc(value) for _, value in found if len(value) > 200]
        blocks.append([p for text in texts for p in _paragraphs(text)])
    if not blocks:
        raise RazorError(f"text '{name}': its sources are not installed here; name another text")
    return blocks


def _file(path: Path) -> list[Block]:
    """A file's first and second half: a story goes on within each."""
    try:
        info = path.stat()
        if not S_ISREG(info.st_mode):
            raise UsageError(f"text {path}: expected a file, found a folder or a device")
        if info.st_size > MAX_FILE_BYTES:
            raise UsageError(
                f"text {path}: {info.st_size} bytes, expected at most {MAX_FILE_BYTES}; cut it"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise RazorError(f"text {path}: cannot read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"text {path}: expected UTF-8, found byte {e.start} that is not") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for mark in list(_GUTENBERG.finditer(text))[::-1]:  # their licence is not the book
        text = text[: mark.start()] if mark[1] == "END" else text[mark.end() :]
    paragraphs = _paragraphs(text)
    half, size = sum(map(len, paragraphs)) / 2, 0
    for i, paragraph in enumerate(paragraphs):
        size += len(paragraph)
        if size >= half:
            cut = max(1, i + 1 if i + 1 < len(paragraphs) else i)
            return [paragraphs[:cut], paragraphs[cut:]]
    return [paragraphs]


SOURCES: dict[str, Callable[[], list[Block]]] = {
    "numpy": _numpy,
    "python": _python,
    "stdlib": _stdlib,
}
"""Texts that are everywhere trt-razor is, by name.

``python``: the language reference (running text, 50 thousand tokens in all); ``stdlib``: docstrings
of the standard library (170 thousand); ``numpy``: docstrings of NumPy (80 thousand).
"""

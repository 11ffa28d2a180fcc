"""ROUGE-L as LongBench and InfiniteBench have it: LCS over sentences (Lin 2004, section 3.2).

Two programs are behind the published numbers and they differ. LongBench's takes sentences to end
with a full stop and counts *distinct* words; InfiniteBench's has a sentence a line, words of a-z and
0-9 in lower case, and counts every occurrence once. Both take the union, over all sentences of the
answer, of the longest common subsequences with each sentence of the reference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l(text: str, references: Sequence[str]) -> float:
    """LongBench's ROUGE-L F1, the best over the references; 0 for an answer without a sentence.

    For long sentences (Chinese text is one) the published scorer gave 0 when its recursion became
    too deep; here such pairs get their score.
    """
    return max(_rouge_l(text, r) for r in references)


def rouge_lsum(text: str, references: Sequence[str]) -> float:
    """InfiniteBench's ``rougeLsum`` F1, without stemming; the best over the references."""
    return max(_rouge_lsum(text, r) for r in references)


def _rouge_l(text: str, reference: str) -> float:
    said, right = (
        [" ".join(s.split()).split(" ") for s in x.split(".") if s] for x in (text, reference)
    )
    if not said or not right:
        return 0.0
    union: set[str] = set()
    for sentence in right:
        for other in said:
            # Of several longest subsequences, the one that this order finds: they hold other words.
            union |= {sentence[i] for i in _lcs(sentence, other, skip_reference_on_ties=False)}
    recall = len(union) / len({w for s in right for w in s})
    precision = len(union) / len({w for s in said for w in s})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _rouge_lsum(text: str, reference: str) -> float:
    said, right = (
        [_WORD.findall(s.lower()) for s in x.split("\n") if s] for x in (text, reference)
    )
    left_said = Counter(w for s in said for w in s)
    left_right = Counter(w for s in right for w in s)
    n, m = left_said.total(), left_right.total()
    if not n or not m:
        return 0.0
    hits = 0
    for sentence in right:
        places = {i for other in said for i in _lcs(sentence, other, skip_reference_on_ties=True)}
        for word in (sentence[i] for i in sorted(places)):
            if left_said[word] > 0 and left_right[word] > 0:
                hits += 1
                left_said[word] -= 1
                left_right[word] -= 1
    return 2 * hits / (n + m)


def _lcs(reference: Sequence[str], said: Sequence[str], skip_reference_on_ties: bool) -> list[int]:
    """Places in ``reference`` of one longest common subsequence with ``said``, falling.

    Read from the end of both; where neither last word is needed, ``skip_reference_on_ties`` says
    which is left out.
    """
    rows = [[0] * (len(said) + 1)]
    for word in reference:
        above, row = rows[-1], [0]
        for j, other in enumerate(said):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    places = []
    i, j = len(reference), len(said)
    while i and j:
        without_reference, without_said = rows[i - 1][j], rows[i][j - 1]
        if reference[i - 1] == said[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif without_reference > without_said or (
            skip_reference_on_ties and without_reference == without_said
        ):
            i -= 1
        else:
            j -= 1
    return places

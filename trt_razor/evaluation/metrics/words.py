"""Words of answers, as the published scorers cut and clean them."""

from __future__ import annotations

import functools
import re
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trt_razor.errors import MissingExtra

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
# U+FF01..U+FF0F and so on: full-width forms, CJK punctuation, dashes and quotation marks.
_CHINESE = frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def english_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles (the normalisation of SQuAD)."""
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def chinese_clean(text: str) -> str:
    """Lower case, without punctuation and spaces."""
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION and c not in _CHINESE)
    return "".join(plain.split())


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them, in order; joined they are the text.

    Raises:
        MissingExtra: jieba is not installed.
    """
    return list(_jieba().cut(text, cut_all=False))


@functools.cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError:
        raise MissingExtra("jieba", "eval", "a metric for Chinese text") from None
    cutter = jieba.Tokenizer()
    jieba.setLogLevel("ERROR")
    # It keeps its dictionary in a file of the shared temporary folder and trusts what it finds there.
    with tempfile.TemporaryDirectory() as private:
        cutter.tmp_dir = private
        cutter.initialize()
    return cutter


def f1(said: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, each occurrence counted."""
    same = (Counter(said) & Counter(right)).total()
    return 2 * same / (len(said) + len(right)) if same else 0.0

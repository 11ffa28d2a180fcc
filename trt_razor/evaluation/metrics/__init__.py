"""Scores of answers: text and right answers in, 0 … 1 out.

* ``plain``: contains, exact, and the two string matches of RULER (arXiv 2404.06654).
* ``longbench``: the metrics of LongBench (arXiv 2308.14508).
* ``infinitebench``: those of InfiniteBench (arXiv 2402.13718).
* ``rouge``: the two ROUGE-L they use, which differ.

All were written from the published definitions, quirks included where they move a score: results
are to be compared with published ones. Where a published scorer fails (an exception, a recursion
that is too deep) the defined value is given here, and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.metrics import infinitebench, longbench, plain, rouge

Metric = Callable[[str, Sequence[str]], float]
"""metric(answer, references): 1 is right; any of the references counts unless the metric says other."""

METRICS: dict[str, Metric] = {
    "contains": plain.contains,
    "exact": plain.exact,
    "string_match_all": plain.string_match_all,
    "string_match_part": plain.string_match_part,
    # LongBench
    "qa_f1": longbench.qa_f1,
    "qa_f1_line": longbench.qa_f1_line,
    "qa_f1_zh": longbench.qa_f1_zh,
    "rouge_l": rouge.rouge_l,
    "rouge_l_line": longbench.rouge_l_line,
    "rouge_l_zh": longbench.rouge_l_zh,
    "classification": longbench.classification,
    "retrieval": longbench.retrieval,
    "retrieval_zh": longbench.retrieval_zh,
    "count": longbench.count,
    "code_similarity": longbench.code_similarity,
    # InfiniteBench
    "first_number": infinitebench.first_number,
    "kv_word": infinitebench.kv_word,
    "choice": infinitebench.choice,
    "qa_f1_characters": infinitebench.qa_f1_characters,
    "rouge_lsum": rouge.rouge_lsum,
    "code_debug": infinitebench.code_debug,
    "code_run": infinitebench.code_run,
    "math_find": infinitebench.math_find,
    "math_calc": infinitebench.math_calc,
    "dialogue": infinitebench.dialogue,
}


def metric(name: str) -> Metric:
    """The metric of that name. Raises UsageError with the nearest name that exists."""
    if name not in METRICS:
        raise UsageError(f"metric '{name}': {did_you_mean(name, METRICS)}")
    return METRICS[name]

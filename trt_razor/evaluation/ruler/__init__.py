"""The thirteen synthetic tasks of RULER (arXiv 2404.06654), made here.

Definitions, counts and lengths of answers are the paper's; words, texts and wordings are ours, so
scores compare with each other and not with published tables.

* ``problem``: what a generator gives, and how a document of a given number of tokens is found.
* ``needles``: the eight retrieval tasks.
* ``tracking``: variables that are assigned to each other.
* ``counting``: common words and frequent words.
* ``questions``: questions of SQuAD or HotpotQA among distracting paragraphs.
"""

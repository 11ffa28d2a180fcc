"""Head maps from other projects' published lists and scores. Files are untrusted: docs/heads.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.headmap import HeadMap, Scores
from trt_razor.heads.importers.base import Cut, Importer, choose
from trt_razor.heads.importers.gates import DUOATTENTION, FREEKV
from trt_razor.heads.importers.headkv import HEADKV
from trt_razor.heads.importers.kvzip import KVZIP
from trt_razor.heads.importers.msmodelslim import MSMODELSLIM
from trt_razor.heads.importers.razor import RAZOR
from trt_razor.heads.importers.source import Source, open_source
from trt_razor.models.spec import ModelSpec

IMPORTERS: dict[str, Importer] = {
    i.name: i for i in (DUOATTENTION, FREEKV, MSMODELSLIM, KVZIP, HEADKV, RAZOR)
}
AUTO = "auto"
_KINDS = {"torch": "a file of torch.save", "json": "JSON", "text": "a table (TSV)"}


@dataclass(frozen=True)
class ImportedHeads:
    """What :func:`import_heads` returns.

    Attributes:
        head_map: labelled with the method ``import``; its source names format, file and sha256.
        format: name of the format.
        notes: sentences for the user; also under ``head_map.options["warnings"]``.
    """

    head_map: HeadMap
    format: str
    notes: tuple[str, ...]


def import_heads(
    path: Path, spec: ModelSpec, format: str = AUTO, cut: Cut | None = None
) -> ImportedHeads:
    """A head map of ``spec`` from a file of another project.

    Args:
        path: the file, or DuoAttention's folder.
        spec: the model that the scores are of; their shape must fit it.
        format: a name of ``IMPORTERS``, or ``auto``: by content.
        cut: share or threshold to choose by; None: the format's own. Lists take none.

    Raises:
        UsageError: a file that is damaged, of an unknown or ambiguous format, or of another model.
        MissingExtra: a file of torch.save, and torch is not installed.
        RazorError: the file cannot be read.
    """
    if format != AUTO and format not in IMPORTERS:
        raise UsageError(f"format '{format}': {did_you_mean(format, IMPORTERS)}")
    source = open_source(path)
    importer = detect(source) if format == AUTO else IMPORTERS[format]
    if source.kind != importer.kind:
        raise UsageError(
            f"{source.path}: expected {_KINDS[importer.kind]}, as {importer.name} is, found "
            f"{_KINDS[source.kind]}; leave --format out to find the format by content"
        )
    imported = importer.read(source, spec)
    heads, settings, notes = choose(imported, cut or Cut(), str(source.path))
    count, total = sum(map(len, heads)), spec.num_layers * spec.num_kv_heads
    if count == total:
        notes.append("every KV head retrieves, so no cache is saved; give --share or --threshold")
    elif count == 0:
        notes.append("no KV head retrieves; long-range recall will fail")
    notes = [*imported.notes, *notes]
    head_map = HeadMap(
        model=spec.name,
        fingerprint=spec.fingerprint(),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        retrieval_heads=heads,
        method="import",
        source=f"{importer.name}: {source.path.name}, sha256 {source.sha256}",
        checkpoint=imported.checkpoint,
        scores={name: _rows(table) for name, table in imported.scores.items()},
        options={
            "format": importer.name,
            "file": source.path.name,
            "sha256": source.sha256,
            **settings,
            **imported.options,
            "warnings": notes,
        },
    )
    return ImportedHeads(head_map, importer.name, tuple(notes))


def detect(source: Source) -> Importer:
    """The format of a file, by content (and for tables by a ``config.json`` beside it).

    Raises:
        UsageError: none fits, or more than one does.
    """
    same = [i for i in IMPORTERS.values() if i.kind == source.kind]
    fitting = [i for i in same if i.fits(source)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(i.name for i in fitting or same)
    if fitting:
        raise UsageError(f"{source.path}: may be {names}: say which with --format NAME")
    raise UsageError(
        f"{source.path}: {_KINDS[source.kind]} of none of the known forms ({names}); see docs/heads.md"
    )


def _rows(table: np.ndarray) -> Scores:
    return tuple(tuple(float(x) for x in row) for row in table)

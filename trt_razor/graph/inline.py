"""Flatten a graph for builders: local functions inlined, equal computations made once.

Every layer brings its own copy of the same index arithmetic (positions, masks, ring rows). ONNX
Runtime does not mind; an ahead-of-time builder pays for each node, so equal nodes are merged.
Only the graph is touched: weights kept as external data are neither loaded nor moved.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx.shape_inference
from onnx import inliner

NONDETERMINISTIC = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)

_Key = tuple[Any, ...]


def inline_graph(model: onnx.ModelProto, in_place: bool = False) -> onnx.ModelProto:
    """The same computation without local functions, duplicate nodes and unused nodes.

    Node names come out unique over the graph and the bodies of its conditions; names of graph
    inputs, outputs and initialisers stay.

    Args:
        model: a valid model; it is not changed. Loaded with ``load_external_data=False`` it stays
            small, and the result is to be saved into the same folder.
        in_place: the executor gives cache outputs the memory of cache inputs. The operator orders
            the write of a cache after the copy (Slice) that is its last read by asking that copy
            for its size; such questions are left as they are.

    Returns:
        A new model.
    """
    flat: onnx.ModelProto = inliner.inline_local_functions(model)
    _share_dimensions(flat, in_place)
    _merge_equal(flat.graph, ChainMap(), ChainMap())
    _drop_unused(flat.graph)
    _name_nodes(flat.graph, set())
    # Domains of functions that are gone; a builder may refuse an import that it does not know.
    used = {node.domain for node in _all_nodes(flat.graph)}
    imports = [o for o in flat.opset_import if o.domain in used or o.domain in ("", "ai.onnx")]
    del flat.opset_import[:]
    flat.opset_import.extend(imports)
    return flat


def node_count(graph: onnx.GraphProto) -> int:
    """Nodes of a graph, those in the bodies of its conditions and loops included."""
    return sum(1 for _ in _all_nodes(graph))


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from _all_nodes(body)


def _share_dimensions(model: onnx.ModelProto, keep_slices: bool) -> None:
    """Read every named dimension from the first graph input that has it.

    A layer asks its own activations for batch and length. Shape inference knows that they are the
    dimensions of the inputs; with this written down the index arithmetic of all layers is equal.
    """
    source: dict[str, tuple[str, int]] = {}
    for value in model.graph.input:
        for axis, name in enumerate(_dimension_names(value)):
            if name:
                source.setdefault(name, (value.name, axis))
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    names = {v.name: _dimension_names(v) for v in (*inferred.input, *inferred.value_info)}
    slices = {node.output[0] for node in model.graph.node if node.op_type == "Slice"}
    for node in model.graph.node:
        if node.op_type != "Shape" or node.domain not in ("", "ai.onnx"):
            continue
        if keep_slices and node.input[0] in slices:
            continue
        known = names.get(node.input[0], [])
        attributes = {a.name: a for a in node.attribute}
        if set(attributes) != {"start", "end"}:
            continue
        axis = attributes["start"].i
        if attributes["end"].i != axis + 1 or not 0 <= axis < len(known):
            continue
        if known[axis] in source:
            node.input[0], axis = source[known[axis]]
            attributes["start"].i, attributes["end"].i = axis, axis + 1


def _dimension_names(value: onnx.ValueInfoProto) -> list[str]:
    return [d.dim_param for d in value.type.tensor_type.shape.dim]


def _key(node: onnx.NodeProto) -> _Key | None:
    """Equal keys mean equal outputs; None for a node that must stay as it is."""
    if node.domain not in ("", "ai.onnx") or node.op_type in NONDETERMINISTIC:
        return None
    attributes = []
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            return None
        plain = onnx.AttributeProto()
        plain.CopyFrom(attribute)
        plain.doc_string = ""
        if plain.HasField("t"):
            plain.t.name = plain.t.doc_string = ""
        attributes.append((plain.name, plain.SerializeToString(deterministic=True)))
    present = tuple(bool(name) for name in node.output)
    return node.op_type, tuple(node.input), tuple(sorted(attributes)), present


def _merge_equal(
    graph: onnx.GraphProto, seen: ChainMap[_Key, list[str]], renamed: ChainMap[str, str]
) -> None:
    """Common-subexpression elimination in place.

    Args:
        seen: key → outputs of the first such node that is visible here. A body sees what its outer
            graph computed before it; nothing gets out of a body.
        renamed: value → equal value that replaces it, with the same visibility.
    """
    fixed = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for body in _bodies(node):
            _merge_equal(body, seen.new_child(), renamed.new_child())
        key = _key(node)
        if key is not None:
            if key in seen and not fixed.intersection(node.output):
                renamed.update(zip(node.output, seen[key], strict=True))
                continue
            seen.setdefault(key, list(node.output))
        kept.append(node)
    _replace_nodes(graph, kept)


def _drop_unused(graph: onnx.GraphProto) -> set[str]:
    """Remove nodes and initialisers that no output depends on; returns all names in use."""
    needed = {o.name for o in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not needed.intersection(name for name in node.output if name):
            continue
        kept.append(node)
        needed.update(node.input)
        for body in _bodies(node):
            needed |= _drop_unused(body)
    if len(kept) < len(graph.node):
        _replace_nodes(graph, reversed(kept))
    initializers = [i for i in graph.initializer if i.name in needed]
    if len(initializers) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)
    # Shape notes of values that are gone, or that were made inside functions.
    del graph.value_info[:]
    return needed


def _name_nodes(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Unique node names; a name that is unique already stays."""
    for node in _all_nodes(graph):
        base = node.name or node.op_type
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = list(nodes)
    copies = []
    for node in kept:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)

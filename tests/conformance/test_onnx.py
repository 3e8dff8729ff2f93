"""ONNX's own node cases of the four operators, taken live from the installed ``onnx``."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import numbakern

onnx = pytest.importorskip("onnx")

OPERATORS = {
    "LogSoftmax": 7,
    "Softmax": 7,
    "NegativeLogLikelihoodLoss": 18,
    "SoftmaxCrossEntropyLoss": 34,
}

# The cases are random normal or uniform float32 numbers with expectations computed in float32.
RELATIVE, ABSOLUTE = 1e-5, 1e-6


def collect():
    with warnings.catch_warnings():
        # Importing the cases computes those of all operators: log of 0, casts that overflow.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"onnx\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    for case in found:
        # Cases of one node only: the others are expansions of the operator into simple ones.
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in OPERATORS:
            yield case


CASES = list(collect())


def attributes(node):
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}


def run_node(node, inputs, number_of_outputs):
    """The node as our calls; ONNX's defaults are ours but for ignore_index, which is none."""
    options = attributes(node)
    if node.op_type in ("LogSoftmax", "Softmax"):
        function = numbakern.log_softmax if node.op_type == "LogSoftmax" else numbakern.softmax
        return [function(inputs[0], options.pop("axis", -1))]
    weight = inputs[2] if len(inputs) > 2 else None
    options = {"reduction": options["reduction"], "ignore_index": options.get("ignore_index", -100)}
    if node.op_type == "NegativeLogLikelihoodLoss":
        return [numbakern.nll_loss(*inputs[:2], weight=weight, **options)]
    outputs = [numbakern.cross_entropy(*inputs[:2], weight=weight, **options)]
    if number_of_outputs == 2:
        outputs.append(numbakern.log_softmax(inputs[0], axis=1))
    return outputs


def test_all_66_cases_are_here():
    found = [case.model.graph.node[0].op_type for case in CASES]
    assert {name: found.count(name) for name in OPERATORS} == OPERATORS
    assert len(CASES) == 66


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case):
    node = case.model.graph.node[0]
    assert case.data_sets
    for inputs, wanted in case.data_sets:
        outputs = run_node(node, inputs, len(wanted))
        assert len(outputs) == len(wanted)
        for got, want in zip(outputs, wanted, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.model.graph.node[0].op_type == "SoftmaxCrossEntropyLoss"],
    ids=lambda case: case.name,
)
def test_fused_value(case):
    """The training step gives the same loss."""
    node, (inputs, wanted) = case.model.graph.node[0], case.data_sets[0]
    options = attributes(node)
    loss, grad = numbakern.cross_entropy_value_and_grad(
        *inputs[:2],
        weight=inputs[2] if len(inputs) > 2 else None,
        reduction=options["reduction"],
        ignore_index=options.get("ignore_index", -100),
    )
    np.testing.assert_allclose(loss, wanted[0], rtol=RELATIVE, atol=ABSOLUTE)
    assert grad.shape == inputs[0].shape

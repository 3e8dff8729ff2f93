"""The ten names, their signatures to the letter, and what their docstrings have to hold."""

from __future__ import annotations

import doctest
import inspect
import re
import types
from pathlib import Path

import pytest

import numbakern

SIGNATURES = """
log_softmax(x, axis=-1, *, dtype=None, out=None)
log_softmax_backward(grad_output, output, axis=-1, *, out=None)
softmax(x, axis=-1, *, dtype=None, out=None)
softmax_backward(grad_output, output, axis=-1, *, out=None)
logsumexp(x, axis=-1, *, keepdims=False, dtype=None, out=None)
nll_loss(log_probs, labels, *, weight=None, ignore_index=-100, reduction='mean', axis=1)
nll_loss_backward(grad_output, log_probs, labels, *, weight=None, ignore_index=-100, \
reduction='mean', axis=1, out=None)
cross_entropy(logits, labels, *, weight=None, ignore_index=-100, reduction='mean', \
label_smoothing=0.0, axis=1, return_lse=False)
cross_entropy_backward(grad_output, logits, labels, *, weight=None, ignore_index=-100, \
reduction='mean', label_smoothing=0.0, axis=1, lse=None, out=None)
cross_entropy_value_and_grad(logits, labels, *, weight=None, ignore_index=-100, \
reduction='mean', label_smoothing=0.0, axis=1, out=None)
"""

WANTED = dict(re.findall(r"^(\w+)(\(.*\))$", SIGNATURES, flags=re.MULTILINE))
SECTIONS = ["Parameters", "Returns", "Raises", "References", "Examples"]


def test_the_ten_names():
    assert len(WANTED) == 10
    assert {n for n in numbakern.__all__ if not n.startswith("__")} == set(WANTED)
    public = {
        name
        for name, value in vars(numbakern).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"annotations"} == set(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_signature(name):
    signature = inspect.signature(getattr(numbakern, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == WANTED[name]


@pytest.mark.parametrize("name", WANTED)
def test_docstring(name):
    function = getattr(numbakern, name)
    doc = inspect.getdoc(function)
    for section in SECTIONS:
        assert re.search(rf"^{section}\n-+$", doc, flags=re.MULTILINE), section
    parameters = re.search(r"^Parameters\n-+\n(.*?)\n\n\w+\n-+$", doc, re.MULTILINE | re.DOTALL)
    described = re.findall(r"^(\w[\w, ]*) : ", parameters.group(1), flags=re.MULTILINE)
    described = [name.strip() for names in described for name in names.split(",")]
    assert described == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", WANTED)
def test_the_examples_run(name):
    function = getattr(numbakern, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test)
    assert result.failed == 0


def test_types_are_announced():
    assert (Path(numbakern.__file__).parent / "py.typed").is_file()


def test_the_names_are_listed():
    assert set(WANTED) <= set(dir(numbakern))
    assert isinstance(numbakern.__version__, str)

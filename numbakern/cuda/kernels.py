"""The operations: a reduction, a finish, a map, over any walker (`rows`, `columns`).

An operation names what it reduces (`softmax`, or the sum of its `term`), what it makes of that for
the whole row (`finish`, which writes what there is one of a row) and of each element (`value`), of
which there may be one `exception`.
"""

import math

from numbakern import formulas
from numbakern.cuda.device import (
    atomic_min,
    constant,
    convert,
    distance,
    divide,
    float_of,
    fma,
    load,
    narrow,
    prefetch,
    store,
    sum_tree,
    when,
    where,
    within,
)
from numbakern.cuda.memory import ACCESS
from numbakern.cuda.reduce import WARP, Beside, offsets
from numbakern.cuda.softmax import (
    decay,
    exponentials,
    log_sum_exp,
    rough_exp,
    rough_root_of_exp,
    row_log_sum,
    safe,
    scaled_exp,
    total_of,
)
from numbakern.cuda.totals import divisor_of, node_of, put_result, quotient
from numbakern.vmath import (
    LN_2,
    exp_nonpositive,
    expm1_nonpositive,
    is_finite,
    log_softmax_grad,
    root_of_exp,
)

BAD_BITS = 24
"""A bad label is recorded as its row's number times 2**BAD_BITS plus its value, cut to fit."""


class Row:
    """A row of a lane's team: where it starts, its length, whether and by whom it is written.

    Attributes
    ----------
    places : dict of str to (Value, Value)
        Address of the first class and bytes between classes, of x, y, w and out.
    classes, width : Value
        Classes that are read, and that are written.
    divisor : Value or None
        What the sum of all rows' losses is divided by, where a warp has them all.
    ok, leader : Value
        Whether there is such a row; whether this lane writes what there is one of a row.
    number : Value
        Of the row in the batch.
    lane : Value
        Of the thread in its warp.
    lanes : int
        That the row has there.
    peek : function (j, read) -> Value
        What ``read(mask)`` gives of class j before anything is written, for those who need it.
    fold : function (values, lanes, combine) -> list of Value
        As `reduce.team_fold`, over the lanes of the row's team.
    team : memory.Team or None
        Those of a warp.
    tiles : tiles.Tiles or None
        Where its block has the rows that it copies.
    narrow : bool
        Whether numbers of classes and distances between them fit into 32 bits.
    beside : Beside
        The neighbouring rows that its lane has; it is number `turn` of them.
    at : dict of str to Value
        The addresses of what there is of it in the arrays.
    counts, skip : Value
        Whether its label is a class that is not ignored; whether it is ignored (`Labels.look`).
    prompt : bool
        Whether its label is read as it begins, else when it is looked at, if it is at all; who
        waits for something else before had better have it come to L1 meanwhile (`hint`).
    """

    x_label = fold = team = tiles = None

    def __init__(self, places, classes, ok, leader, number, lane, lanes, peek):
        self.places, self.classes, self.width = places, classes, classes
        self.ok, self.leader, self.peek = ok, leader & ok, peek
        self.number, self.narrow = convert(number, "i8"), number.elem == "i4"
        self.lane, self.lanes = lane, lanes

    def element(self, name, fmt, mask):
        """What an array has at the row's label; from the tile, if the block has copied it."""
        if self.tiles and name in self.tiles.found:
            return self.tiles.element(name, narrow(self.label), mask)
        start, step = self.places[name]
        return fmt.get(start + distance(self.label, step), mask)

    def or_void(self, v):
        """A float64 result where the label counts; 0 where it is ignored, NaN where it is bad."""
        return where(self.counts, v, where(self.skip, constant(v, 0.0, "f8"), math.nan))


class Operation:
    """What the operations share.

    Parameters
    ----------
    elem : {"f4", "f8"}
        What is computed in.
    dimensions : int
        Axes of the batch.
    arrays : tuple of str
        The arrays with a place for each row: x, y, out, labels, …

    Attributes
    ----------
    added : totals.Sums or None
        How the rows' losses are added up, if they are.
    result : (kind, division) or None
        Of what they add up to, if a warp has all of them: nothing is left to a step behind it.
    counted : tuple or None
        Parameters of the `Counted` that the gradients' scale comes from, if it does.
    narrow : bool
        Whether the numbers of rows and classes, and distances between them, fit into 32 bits.
    dense : tuple of str
        Arrays of one element a row that lie so that those of a lane's rows are words of an access.
    """

    added = result = counted = None
    narrow = False
    dense: tuple[str, ...] = ()
    softmax = sums = linear = False
    both: tuple[str, ...] = ("x", "y")  # inputs that the reduction and the map need
    twice: tuple[str, ...] = ()  # inputs that both the reduction and the map unpack
    exponential = False  # whether the map takes exponentials
    halves = False  # whether x is float16 or bfloat16
    rough = False  # whether a map writes halves, for which its own exponentials may be rough
    anew = False  # whether a map to halves takes exponentials that the reduction did not keep
    by_pairs = False  # whether the reduction takes halves two at a time, and nothing is kept of it
    keeps = False  # whether exponentials have the room of x, and may take its place

    def __init__(self, elem, dimensions, arrays):
        self.elem, self.dimensions, self.arrays = elem, dimensions, arrays

    @property
    def exact(self):
        """Whether sums of terms are in two parts, for they may cancel.

        Those of float32 or less, added in float64, have the bits to spare.
        """
        return self.sums and self.elem == "f8"

    @property
    def relative(self):
        """Whether the map takes them relative to a part's maximum; of long rows where it `keeps`.

        So did the reduction: they need not be taken twice. In float64 the factor in between would
        cost an ulp.
        """
        return self.exponential and self.softmax and self.elem == "f4" and not self.anew

    def row(self, frame, p, ok, leader, lanes, peek, turn=0, beside=None, prompt=True):
        """Row number p of the batch; an int32 if distances between rows and classes are, too.

        Or number `turn` of those that lie `beside` one another, the first of which that is.
        """
        starts = offsets(frame, p, self.dimensions, self.arrays, turn)
        at = dict(zip(self.arrays, starts, strict=True))
        p = at.pop("number", p + turn)
        if self.result:
            at["loss"] = constant(p, 0, "i8")
        elif self.added:
            node = convert(p >> (self.added.rows.bit_length() - 1), "i8")
            at["row_loss"] = node * self.added.size
        at = {name: getattr(frame, name) + offset for name, offset in at.items()}
        places = {n: (at[n], getattr(frame, f"{n}_class")) for n in ("x", "y", "out") if n in at}
        if "weight" in frame:
            places["w"] = frame.weight, frame.weight_class
        lane = frame.thread & (WARP - 1)
        row = Row(places, frame.classes, ok, leader, p, lane, lanes, peek)
        row.divisor = self.result and divisor_of(frame, self.result[1])
        row.at, row.turn, row.beside, row.prompt = at, turn, beside or Beside(), prompt
        self.begin(frame, row)
        return row

    def begin(self, frame, row):
        """Read what there is one of a row, without waiting."""

    def read(self, row, name, fmt):
        """What `load` gives of an array's one element of a row."""
        if name not in self.dense:
            return load(row.at[name], fmt.size, 1)[0]
        rows, known = row.beside.count, row.beside.known
        if name not in known:
            each = min(rows, ACCESS // fmt.size)
            starts = range(0, rows, each)
            words = (load(row.at[name] + i * fmt.size, fmt.size, each) for i in starts)
            known[name] = [word for some in words for word in some]
        return known[name][row.turn]

    def number(self, row, name, formats):
        """The number that an array has of a row."""
        return formats[name].number(self.read(row, name, formats[name]))

    def put(self, row, name, fmt, number):
        """Write a number as an array's one element of a row."""
        if name not in self.dense:
            fmt.put(row.at[name], number, row.leader)
            return
        found = row.beside.known.setdefault(name, [])
        found.append((row.at[name], fmt.word_of(number)))
        if len(found) == row.beside.count:
            each = min(len(found), ACCESS // fmt.size)
            for i in range(0, len(found), each):
                words = [word for _, word in found[i : i + each]]
                store(found[i][0], fmt.size, words, row.leader)

    def hint(self, row):
        """Have what `look` reads come to L1; a lane of the row sees to that."""

    def look(self, frame, row):
        """Whether the row is read at all; may wait for what `begin` reads."""

    def logit(self, _frame, _row):
        """How the logit at a row's label is read, where a mask holds; None if it has no part."""

    def settle(self, frame, row):
        """What else is to be known of a row before a result is written over it."""

    def put_loss(self, formats, row, loss, weight):
        """Write a row's loss: to the result, or with its label's weight to where they add up.

        `weight`: a mask says whether it is 1 or 0.
        """
        if not self.added:
            self.put(row, "loss", formats["loss"], loss)
            return
        found = node_of(self.added, row, [loss, weight][: self.added.terms])
        if found is None:  # the last one of the lane's rows has it
            return
        node, leader = found
        if not self.result:
            self.added.store(row.at["row_loss"], node, leader)
            return
        # As behind rows that there are not: no sum is −0.
        node = [(numbers[0] + 0.0, *numbers[1:]) for numbers in node]
        put_result(node, row.at["loss"], self.result[0], row.divisor, leader)

    def scale(self, frame):
        """What gradients are scaled by beside a row's own `row_scale`; None if a Counted says."""
        if "divisor" in frame:  # behind it is the scale by it
            return float_of(load(frame.divisor + 8, 8, 1)[0])
        return None if self.counted else frame.scale

    def in_part(self, params, _m):
        """What `finish` gave, for the map of a part with maximum m; None if it is the row's."""
        return params

    def exception(self, _params):
        """(class, its result) of the one element that `value` does not give; None for none."""
        return None


class LogSoftmax(Operation):
    """out = log softmax(x)."""

    softmax = True

    def finish(self, row, reduced):
        """The maximum and log Σ exp(x − m)."""
        m, share = reduced
        _, _, log_sum = row_log_sum(m, share, self.elem)
        return convert(m, self.elem), convert(log_sum, self.elem)

    def value(self, params, x, _y, _w):
        """log softmax(x)."""
        return formulas.log_softmax_value(x, *params)


class Softmax(Operation):
    """out = softmax(x)."""

    softmax = exponential = True

    def finish(self, row, reduced):
        """The maximum, Σ exp(x − m) and its logarithm."""
        m, share = reduced
        k, rest, log_sum = row_log_sum(m, share, self.elem)
        return m, k + rest, log_sum

    def in_part(self, params, m):
        """The parameters of `probability`."""
        return normalise(*params, self.elem, m)

    def value(self, params, x, y, w):
        """softmax(x); rounding may end one ulp above 1."""
        return self.value_of(params, exponential(self, x, *params), y, w)

    def value_of(self, params, e, _y, _w):
        """The same of the exponential that was kept of x."""
        p = probability(e, *params)
        return where(p > 1.0, 1.0, p)


def normalise(m, total, log_sum, elem, part=None):
    """The parameters of `probability`, of a total of 1 if None; NaN where log_sum is NaN.

    With the maximum of a part its exponentials are those that the reduction took.
    """
    params, factor = exponentials(m if part is None else part, elem, total is not None)
    scale = factor if total is None else divide(factor, total, elem)
    scale = convert(where(log_sum == log_sum, scale, math.nan), elem)
    return *params, scale, part if part is None else convert(decay(part, m), elem)


def exponential(op, x, base, magic, floor, _scale, _less):
    """exp(x − m), up to a factor of the row or part."""
    if op.anew:
        return rough_exp(x, base, magic)
    return scaled_exp(x, base, magic, floor, op.halves)


def probability(e, _base, _magic, _floor, scale, less):
    """exp(x − m) / Σ, of an exponential."""
    p = e * scale
    # Their product may be subnormal where the probability is not.
    return p if less is None else p * less


class LogSumExp(Operation):
    """row_lse = log Σ exp(x)."""

    softmax = True

    def __init__(self, elem, dimensions, arrays, lse_format):
        super().__init__(elem, dimensions, arrays)
        self.lse_format = lse_format

    def finish(self, row, reduced):
        """Write the row's log-sum-exp."""
        m, share = reduced
        _, _, log_sum = row_log_sum(m, share, self.elem)
        self.put(row, "row_lse", self.lse_format, log_sum_exp(m, log_sum))


class LogSoftmaxBackward(Operation):
    """out = x − exp(y)·Σx, for the gradient x and the output y of log_softmax."""

    sums = True
    both = twice = ("x",)

    def term(self, _row, grad, _y, _w):
        """What is summed, in float64; behind it what it was rounded by, if it was."""
        return [convert(grad, "f8")]

    def finish(self, row, reduced):
        """The sum."""
        return (convert(total_of(reduced), self.elem),)

    def value(self, params, grad, y, _w):
        """The gradient."""
        root = rough_root_of_exp(y) if self.rough else root_of_exp(y)
        return log_softmax_grad(grad, root, *params)


class SoftmaxBackward(Operation):
    """out = y·(x − Σ x·y), for the gradient x and the output y of softmax."""

    sums = True
    twice = ("x", "y")

    def term(self, _row, grad, y, _w):
        """As LogSoftmaxBackward.term."""
        grad, y = convert(grad, "f8"), convert(y, "f8")
        product = grad * y
        return [product, fma(grad, y, -product)] if self.exact else [product]

    def finish(self, row, reduced):
        """The sum in two parts, since grad − Σ cancels where a row is confident."""
        return in_two(self.elem, *reduced)

    def value(self, params, grad, y, _w):
        """The gradient."""
        high, low = params
        return formulas.softmax_grad(grad - high, y, low)


def in_two(elem, *sum_in_parts):
    """A float64, or one in two parts, as the sum of two numbers of `elem`."""
    high = convert(total_of(sum_in_parts), elem)
    first, *more = sum_in_parts
    low = sum(more, first - convert(high, "f8"))
    # An infinite sum has no low part.
    return high, convert(where(is_finite(high), low, 0.0), elem)


class Labels:
    """How class labels are read and checked.

    Parameters
    ----------
    fmt : memory.Format
        Of the labels.
    ignores : bool
        Whether `ignore_index` is a number that such a label can have.
    """

    def __init__(self, fmt, ignores):
        self.format, self.ignores = fmt, ignores

    def look(self, frame, row):
        """Set label, skip (is ignored) and counts; one that does not is class 0."""
        t = self.format.integer(row.raw_label)
        row.counts = within(t, frame.classes)
        if self.ignores:
            row.skip = t == frame.ignore_index
            row.counts = row.counts & ~row.skip
        else:
            row.skip = constant(t, False, "b1")
        row.label = where(row.counts, narrow(t) if row.narrow else t, 0)

    def weight_of(self, row, weights):
        """The weight of a label that counts, of weights in such a format."""
        start, step = row.places["w"]
        return weights.get(start + distance(row.label, step), row.counts)

    def record(self, frame, row):
        """Record a bad label."""
        t = self.format.integer(row.raw_label)

        def one():
            limit = 1 << (BAD_BITS - 1)
            cut = where(t < -limit, -limit, where(t > limit - 1, limit - 1, t))
            if self.format.kind == "u8":
                cut = where(t < 0, limit - 1, cut)
            number = (row.number << BAD_BITS) | (cut & ((1 << BAD_BITS) - 1))
            atomic_min(frame.bad, number, constant(t, True, "b1"))
            return []

        when(row.leader & ~row.counts & ~row.skip, one, [])


class CrossEntropy(Operation):
    """Loss and gradient of cross-entropy, in any combination.

    Parameters
    ----------
    soft : bool
        Targets are probabilities (y) instead of labels.
    smooth : bool
        Labels are smoothed; probabilities always may be.
    loss, lse : bool
        Whether each row's loss, and its log-sum-exp, is written.
    given : bool
        Whether the log-sum-exp comes from outside, which spares the reduction. Not with `loss`.
    grad : bool
        Whether the gradient is.
    mean : bool
        Whether the gradient is divided by the number of rows: of probabilities.
    formats : dict of str to memory.Format
        Of x, y, weight, row_scale, row_lse, loss, as far as they are there.
    labels : Labels or None
    """

    def __init__(
        self, elem, dimensions, arrays, formats, labels,
        *, soft, smooth, loss, lse, given, grad, mean,
    ):  # fmt: skip
        super().__init__(elem, dimensions, arrays)
        self.formats, self.labels = formats, labels
        self.soft, self.smooth, self.loss, self.lse = soft, smooth, loss, lse
        self.given, self.grad, self.mean = given, grad, mean
        self.weighted = "weight" in formats
        self.softmax, self.exponential = not given, True
        self.whole = not (soft or smooth)  # whether a label has all that its row has of targets
        # Σ of the targets over all classes: needed for a loss, and for a gradient unless known.
        self.summed = soft or (smooth and (loss or self.weighted))
        self.linear = self.softmax and self.summed
        self.both = ("y",) if given else ("x", "y")
        self.twice = ("x", "y") if soft else ()
        self.sums = given and self.summed

    def begin(self, frame, row):
        """As Operation.begin."""
        if not self.whole:
            row.keep, row.spread = frame.keep, frame.spread
            row.own_keep, row.own_spread = (convert(v, self.elem) for v in (row.keep, row.spread))
        row.total_classes = frame.classes
        if self.grad:
            row.scale = self.scale(frame)
        if self.labels and row.prompt:
            row.raw_label = self.read(row, "labels", self.labels.format)
        if self.given:
            row.lse = self.number(row, "row_lse", self.formats)
        if "row_scale" in row.at:
            row.own_scale = self.number(row, "row_scale", self.formats)

    def hint(self, row):
        """As Operation.hint."""
        if self.labels:
            prefetch(row.at["labels"], row.leader, level=1)

    def look(self, frame, row):
        """As Operation.look: of an ignored row nothing is read."""
        row.skip, row.counts = (constant(frame.classes, v, "b1") for v in (False, True))
        if not self.soft:
            if not row.prompt:
                row.raw_label = self.read(row, "labels", self.labels.format)
            self.labels.look(frame, row)
            if not self.lse:
                row.classes = where(row.skip, 0, row.classes)

    def logit(self, frame, row):
        """As Operation.logit."""
        if self.soft:
            return None
        there = row.ok & row.counts  # of no classes no label does

        def read(mask):
            return convert(row.element("x", self.formats["x"], there & mask), "f8")

        return read

    def settle(self, frame, row):
        """As Operation.settle: a bad label is recorded."""
        if self.given:
            row.lse = convert(row.lse, "f8")
        if not self.soft:
            self.labels.record(frame, row)
            row.x_label = row.peek(row.label, self.logit(frame, row))
            if self.weighted:
                row.w_label = convert(self.labels.weight_of(row, self.formats["weight"]), "f8")
        if "row_scale" in row.at:
            row.scale = row.scale * convert(row.own_scale, "f8")
        if self.mean and self.grad:
            row.scale = quotient(row.scale, convert(frame.rows, "f8"))

    def target(self, row, y, w):
        """The target of a class, of labels what does not depend on the label: (float64, elem)."""
        if not self.soft:
            q, own = row.spread, row.own_spread
        else:
            q = formulas.smoothed_target(convert(y, "f8"), row.keep, row.spread)
            own = formulas.smoothed_target(y, row.own_keep, row.own_spread)
        return (q * convert(w, "f8"), own * w) if self.weighted else (q, own)

    def term(self, row, _x, y, w):
        """What is summed where the log-sum-exp is given: the targets."""
        return [self.target(row, y, w)[0]]

    def finish(self, row, reduced):
        """Write the row's loss and log-sum-exp; the parameters of the gradient."""
        if self.given:
            m, q, nll = row.lse, total_of(reduced) if self.sums else None, None
            k, rest, log_sum = None, None, where(is_finite(m), m - m, math.nan)
        else:
            m, share = reduced
            k, rest, log_sum = row_log_sum(m, share, self.elem)
            q, nll = share.q, share.nll
        if self.lse:
            self.put(row, "row_lse", self.formats["row_lse"], log_sum_exp(m, log_sum))
        if self.smooth and not self.summed:
            q = row.spread * convert(row.total_classes, "f8")
        if self.loss:
            self._put_loss(row, m, log_sum, q, nll)
        if not self.grad:
            return None
        scale = row.or_void(where(log_sum == log_sum, row.scale, math.nan))
        total = None if self.given else k + rest
        if self.given:  # a row that is skipped has not been read
            m = where(row.skip, math.inf, m)
        sums = m, total, where(row.skip, 0.0, log_sum)
        if self.soft:
            return row.skip, sums, self._soft(row, m, k, rest, scale, q)
        return row.skip, sums, self._hard(row, m, k, rest, scale, q)

    def in_part(self, params, m):
        """The parameters of `probability`, and the others."""
        skip, sums, rest = params
        base, *factors, scale, less = normalise(*sums, self.elem, m)
        if self.anew:  # of a skipped row x is 0 by now (`forget`): it lies below whatever m was
            base = where(skip, math.inf, base)
        factors = base, *factors, where(skip, 0.0, scale), less
        if self.soft and not self.given:
            # The peak is told by its probability: the map needs no logits beside them.
            *before, peak, second, keep, spread = rest
            here = peak == (peak if m is None else convert(m, self.elem))
            p = probability(exponential(self, peak, *factors), *factors)
            p = where(here, p, math.nan)
            rest = *before, p, second, keep, spread
        return factors, rest

    def _put_loss(self, row, m, log_sum, q, nll):
        losses = []
        if self.summed:
            # An infinite weight is all that counts, of the maximum as well.
            losses.append(where(is_finite(q), nll, 0.0) + q * log_sum)
        if not self.soft:
            loss, own = formulas.nll_value(row.x_label, m, log_sum), self._own(row)
            losses.append(loss if own is None else own * loss)
        weight = row.counts
        if self.weighted and not self.soft:
            weight = where(weight, row.w_label, 0.0)
        self.put_loss(self.formats, row, row.or_void(sum_tree(losses)), weight)

    def _own(self, row):
        """A label's target without its share of the smoothing, times its weight; None for 1."""
        return self._weighed(row, None if self.whole else row.keep)

    def _weighed(self, row, target):
        """A target of the label (None for 1), times the label's weight."""
        if not self.weighted:
            return target
        return row.w_label if target is None else row.w_label * target

    def _hard(self, row, m, k, rest, scale, q):
        """(factor of p, target, label, gradient there): p − q cancels at a confident label.

        1 − p is known there as the share of all other classes, which at an improbable one cancels.
        """
        x = row.x_label
        if self.given:
            d = x - m
            others = -expm1_nonpositive(where(d > 0.0, 0.0, d))
        else:
            others = where(x == m, (k - 1.0) + rest, (k + rest) - exp_nonpositive(x - safe(m)))
            others = divide(others, k + rest, self.elem)
        total, target = self._own(row), None
        if self.whole:
            label_grad = -(others if total is None else total * others)
        else:
            if self.given:
                p = exp_nonpositive(where(d > 0.0, 0.0, d))
            else:
                p = divide(exp_nonpositive(x - safe(m)), k + rest, self.elem)
            total, own = total + q, self._weighed(row, row.keep + row.spread)
            label_grad = where(
                others > 0.5,
                formulas.cross_entropy_grad(p, total, own),
                (q - self._weighed(row, row.spread)) - total * others,
            )
            target = convert(scale * row.spread, self.elem)
        # 0 of either sign is +0.
        label_grad = where(row.skip, 0.0, fma(scale, label_grad, 0.0))
        return (
            convert(scale if total is None else scale * total, self.elem),
            target,
            narrow(where(row.skip, -1, row.label)),
            convert(label_grad, self.elem),
        )

    def _soft(self, row, m, k, rest, scale, q):
        """The same for probabilities: the class with more than half of the mass is the label."""
        elem = self.elem
        total = in_two(elem, q)
        if self.given:
            peak = in_two(elem, m)
        else:
            single = (k == 1.0) & (rest < 1.0)
            others = convert(divide(rest, k + rest, elem), elem)
            peak = convert(where(single, m, math.nan), elem), others
        own = row.own_keep, row.own_spread
        return convert(scale, elem), convert(scale * q, elem), *total, *peak, *own

    def value(self, params, x, y, w):
        """The gradient."""
        return self.value_of(params, exponential(self, x, *params[0]), y, w, x)

    def value_of(self, params, e, y, w, x=None):
        """The same of the exponential that was kept of x."""
        factors, rest = params
        p = probability(e, *factors)
        if self.soft:
            return self._soft_value(rest, p, x, y, w)
        factor, target, label, _ = rest
        if self.smooth and self.weighted:  # of a row to skip 0, whatever weights there are
            return where(label < 0, 0.0, formulas.cross_entropy_grad(p, factor, target * w))
        if self.smooth:
            return formulas.cross_entropy_grad(p, factor, target)
        return p * factor

    def exception(self, params):
        """The gradient at the label."""
        return None if self.soft else params[1][2:]

    def _soft_value(self, params, p, x, y, w):
        scale, factor, high, low, peak, second, keep, spread = params
        q = formulas.smoothed_target(y, keep, spread)
        q = q * w if self.weighted else q
        grad = formulas.cross_entropy_grad(p, factor, scale * q)
        if self.given:
            d = (convert(x, "f8") - convert(peak, "f8")) - convert(second, "f8")
            is_peak = d > -LN_2
            others = -expm1_nonpositive(where(is_peak, where(d > 0.0, 0.0, d), -1.0))
            others = convert(others, self.elem)
        else:
            is_peak, others = p == peak, second
        return where(is_peak, scale * (((high - q) + low) - high * others), grad)


class Nll(Operation):
    """row_loss = −weight[t]·x[t], 0 for an ignored label t."""

    def __init__(self, elem, dimensions, arrays, formats, labels):
        super().__init__(elem, dimensions, arrays)
        self.formats, self.labels = formats, labels

    def begin(self, frame, row):
        """As Operation.begin."""
        row.raw_label = self.read(row, "labels", self.labels.format)

    def look(self, frame, row):
        """As Operation.look."""
        self.labels.look(frame, row)

    def settle(self, frame, row):
        """As Operation.settle: a bad label is recorded, and read what it chooses."""
        self.labels.record(frame, row)
        there = row.ok & row.counts  # of no classes no label does
        row.x_label = row.element("x", self.formats["x"], there)
        if "weight" in self.formats:
            row.w_label = self.labels.weight_of(row, self.formats["weight"])

    def finish(self, row, reduced):
        """Write the row's loss."""
        loss, weight = -convert(row.x_label, "f8"), row.counts
        if "weight" in self.formats:
            w = convert(row.w_label, "f8")
            loss, weight = loss * w, where(weight, w, 0.0)
        self.put_loss(self.formats, row, row.or_void(loss), weight)


class NllBackward(Operation):
    """out = −weight[t]·scale at the label t, 0 elsewhere and for an ignored label."""

    def __init__(self, elem, dimensions, arrays, formats, labels):
        super().__init__(elem, dimensions, arrays)
        self.formats, self.labels = formats, labels

    def begin(self, frame, row):
        """As Operation.begin."""
        row.raw_label = self.read(row, "labels", self.labels.format)
        row.scale = self.scale(frame)
        if "row_scale" in row.at:
            row.scale = row.scale * convert(self.number(row, "row_scale", self.formats), "f8")

    def look(self, frame, row):
        """As Operation.look."""
        self.labels.look(frame, row)

    def settle(self, frame, row):
        """As Operation.settle: a bad label is recorded."""
        self.labels.record(frame, row)
        if "weight" in self.formats:
            w = self.labels.weight_of(row, self.formats["weight"])
            row.scale = row.scale * convert(w, "f8")

    def finish(self, row, reduced):
        """The gradient at the label, and elsewhere."""
        grad = convert(row.or_void(-row.scale), self.elem)
        zero = constant(row.scale, 0.0, "f8")
        elsewhere = convert(where(row.counts, zero, row.or_void(zero)), self.elem)
        return narrow(where(row.skip, -1, row.label)), grad, elsewhere

    def value(self, params, _x, _y, _w):
        """The gradient but at the label."""
        return params[2]

    def exception(self, params):
        """The gradient at the label."""
        return params[:2]

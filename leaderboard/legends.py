"""The prose of the board: how to read it, and the legend under each table. Line breaks are set when it is rendered."""

from __future__ import annotations

HOW_TO_READ = """
**How to read it.** A row is a way to make a *set* of networks from one trained network, the base. A member is accepted
if its loss on the validation part is at most epsilon above the base's; everything else is measured on the test part.
Multiplicity, how far equally good networks decide differently, is neither good nor bad, so it has no rank, and there is
no overall rank. Read every row against `retrain`, independent trainings by the same recipe, and against the controls,
which show what a metric does not mean: `identical` copies the base; `logit_noise` and `temperature` alter its outputs.
"""

CELLS = """
A cell is `value [low,high]`: the mean over base seeds with its 95% t interval, unless the text under the table says
otherwise. A *rank* is 1 + the number of rows that are significantly better (paired over base seeds, 95%, Holm within
the column); ties share a rank; controls have none. `missing` is a cell without a record, `stale` one whose record does
not agree with the rest of the table; neither enters a number.
"""

UNVERIFIED = """
Records from a tree with uncommitted changes: nobody can tell which code made them, and they enter no other table.
"""

PERFORMANCE = """
On test: the mean over accepted members; *ensemble*: the score of their mean probabilities. *loss*: cross-entropy, nats.
*Brier*: squared error of the probabilities (of two classes: of the positive one's; of more: summed). *ECE*: expected
calibration error.
"""

MEMBERSHIP = """
Share of the drawn members whose loss on val is at most *eps* above the base's. *accepted of drawn*: base seed by base
seed, at {epsilon:g}. *certified*, *possible*: accepted even at the upper, or only at the lower end of the one-sided
95% interval of the paired loss difference. *eps in s.e.*: {epsilon:g} in standard errors of that difference, lowest to
highest over base seeds; below 2 (marked !) val is too small to tell members from non-members. A share of 0 or 1 on
every base seed has Wilson's interval over all draws together.
"""

REFERENCE = """
*`{reference}`*: its acceptance for the same bases at {epsilon:g}; beside it, the paired difference.
"""

MULTIPLICITY = """
On test; no ranks. *ambiguity*: share of cases on which one of {k} members and the base differ; *discrepancy*: the
largest such share of one member; *conflict*: the mean one; *disagreement*: share of cases on which two members differ.
*@{k}*: expected for {k} of the accepted members. *vpr* and *score sd*: range and standard deviation of the predicted
probability. *capacity* and *mutual information*: bits. *effective verdicts*: mean of 2^capacity. With two classes
capacity is a function of the range's ends, no evidence beyond *vpr*.
"""

COST = """
First table: in trainings of the base network, timed in the same process; an accepted member costs (fixed + drawn ×
marginal) / accepted. Second table: means in seconds and bytes. *a member is*: deployable if it is one weight vector;
its BatchNorm policy. *resumed*: base seeds whose run was interrupted, times summed over attempts. Only runs on
{machine} are compared.
"""

"""Intervals and tests for rates; pure functions of numbers.

Every rate here is a mean of values in [0, 1]. Values that are not 0 or 1 (a seed average, a partial score) have a
smaller variance than a coin with the same mean, so intervals for coins are used: they can only be too wide. If that
costs too much, as for BERTScore and pass@k, prompts are resampled.

Prompts that are near-duplicates carry less evidence than their number suggests. They are grouped in clusters. For
decisions on safety, each cluster counts as one prompt. Elsewhere, n is replaced by an effective size: n over the design
effect of the values, as Korn and Graubard do for surveys, but at most the number of clusters, so that near-duplicates
count at most once.

| question | function |
|---|---|
| a rate over prompts | `wilson`, `rate_of` |
| a mean of scores | `bootstrap_interval` |
| a mean over seeds | `t_interval` |
| two models on the same prompts | `paired_difference`, `bootstrap_difference`, `sign_flip_p` |
| the same, near-duplicates counted as one | `clustered_difference` |
| how many prompts show that one is not worse by a margin | `prompts_needed`, `power_of` |
| several benchmarks together | `mean_interval`, `mean_difference` |
| several methods against one | `holm` |
| a judge against a person | `corrected_rate` |
| two judges | `agreement` |
"""

from backmerge.statistics.agreement import Agreement, agreement
from backmerge.statistics.bootstrap import (
    bootstrap_difference,
    bootstrap_interval,
    clustered_difference,
)
from backmerge.statistics.calibration import Corrected, corrected_rate
from backmerge.statistics.clusters import cluster_means, effective_size
from backmerge.statistics.intervals import (
    Interval,
    as_plain,
    rate_of,
    t_interval,
    wilson,
)
from backmerge.statistics.paired import (
    Discordance,
    PairedDifference,
    discordance,
    holm,
    lower_bound_among,
    mean_difference,
    mean_interval,
    paired_difference,
    sign_flip_p,
    tango_bound,
    tango_score,
    two_sided_flip_p,
)
from backmerge.statistics.power import (
    power_of,
    prompts_needed,
)

__all__ = [
    "Agreement",
    "Corrected",
    "Discordance",
    "Interval",
    "PairedDifference",
    "agreement",
    "as_plain",
    "bootstrap_difference",
    "bootstrap_interval",
    "cluster_means",
    "clustered_difference",
    "corrected_rate",
    "discordance",
    "effective_size",
    "holm",
    "lower_bound_among",
    "mean_difference",
    "mean_interval",
    "paired_difference",
    "power_of",
    "prompts_needed",
    "rate_of",
    "sign_flip_p",
    "t_interval",
    "tango_bound",
    "tango_score",
    "two_sided_flip_p",
    "wilson",
]

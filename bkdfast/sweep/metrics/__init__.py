"""Metrics: one number a sample from logits, read only where the metric looks.

A metric first turns prompts into what the model must see (`extend`: for teacher forcing the target tokens follow the
prompt) and says which columns of the logits it reads; then it turns those logits into a value per token (`token`) and
the values of a row into one number (`reduce`). See `Metric` for how to write one, or `custom` for a plain function.
"""

from bkdfast.sweep.metrics.base import Metric, Scored
from bkdfast.sweep.metrics.custom import custom
from bkdfast.sweep.metrics.divergence import js, kl
from bkdfast.sweep.metrics.tokens import accuracy, logit_diff, loss, rank, target_logprob, target_prob

__all__ = [
    "Metric",
    "Scored",
    "accuracy",
    "custom",
    "js",
    "kl",
    "logit_diff",
    "loss",
    "rank",
    "target_logprob",
    "target_prob",
]

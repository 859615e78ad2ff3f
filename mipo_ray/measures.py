"""Every held-out measure of results.json, in the order of its table, and its unit."""

from __future__ import annotations

UNITS = {
    "reward_accuracy": "share",
    "reward_margin": "nats",
    "context_pmi_initial": "nats per response",
    "pmi_initial": "nats per response",
    "pmi_initial_per_token": "nats per token",
    "infonce_initial": "nats",
    "retrieval_initial": "share",
    "context_pmi_policy": "nats per response",
    "pmi_policy": "nats per response",
    "pmi_policy_per_token": "nats per token",
    "infonce_policy": "nats",
    "retrieval_policy": "share",
    "response_tokens": "tokens",
    "truncated": "share",
    "copy_rate": "share",
    "only_copies": "share",
    "refusals": "share",
    "distinct_1": "share",
    "distinct_2": "share",
    "corpus_distinct_2": "share",
    "self_bleu": "share",
    "kl_per_token": "nats per token",
}

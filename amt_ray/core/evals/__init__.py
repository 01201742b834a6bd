"""Evaluation protocols, one a file.

The contract: a frozen object whose ``protocol`` names it with its settings (results of different protocols are never
mixed), called as ``protocol(model, bank, bank_index, queries, query_index, size, ranks) -> {metric: value}`` on a model
in any mode, which it leaves as it was.
"""

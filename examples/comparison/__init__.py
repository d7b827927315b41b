"""Adapters against full fine-tuning, in three modalities, with the trainer of `adapterkit train`.

python -m examples.comparison            # goes on where results.jsonl ends, then writes the table and the plot
"""

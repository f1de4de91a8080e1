"""Offline training: labelled text in, safety checkpoints out. Imports `model` only.

`ballast-train head` runs `command.py`, which reads aloud: corpus, answers, states, head, thresholds, report.
"""

"""Scoring: detectors, GenEval, win rate, report."""

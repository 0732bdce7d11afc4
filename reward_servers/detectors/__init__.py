"""Detectors and color models of photographs, which GenEval's rules judge by."""

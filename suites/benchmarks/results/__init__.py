"""What becomes of measurements.

measurements     measured now, or read from a journal
table            torch, the reference and the floor side by side
goals            what the reference is to reach, and what it reaches
baseline         counts that must not rise
reproducibility  whether two runs of one commit agree
cost_model       collectives and bytes of a call, as formulas
"""

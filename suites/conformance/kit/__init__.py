"""What checks are made of: exact data, layouts, bitwise comparison, counted collectives.

Nothing here may use a subject: an expected value comes from the plain tensor that the check
started with, cut by `layouts.part` with nothing but torch.chunk.
"""

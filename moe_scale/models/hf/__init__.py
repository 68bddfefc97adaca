"""Decoders of Hugging Face and ours: which of theirs computes what one of ours does, and what their parts are called.

``families`` names theirs, ``settings`` translates the settings, ``tensors`` the weights, both ways.
"""

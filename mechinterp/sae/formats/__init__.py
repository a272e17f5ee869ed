"""Sparse autoencoders in the field's file formats: SAELens's and sparsify's are read and written, dictionary_learning's
is read.

A folder of ours is a SAELens folder. What only we know (the rule of exclusion, the sites of a crosscoder, the settings
of the training) stands in it under a key of its own, which SAELens passes over.
"""

from mechinterp.sae.formats.loading import convert, load, read_sparsity
from mechinterp.sae.formats.saelens import save, save_saelens
from mechinterp.sae.formats.sparsify import save_sparsify

__all__ = ["convert", "load", "read_sparsity", "save", "save_saelens", "save_sparsify"]

"""Training data: examples in memory, SeqIO tasks over them, feature converters, batches.

This room imports TensorFlow and SeqIO; nothing on the search path imports it.
"""

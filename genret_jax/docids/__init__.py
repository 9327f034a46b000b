"""Document identifiers: from documents to token sequences.

`table` holds what the rest of the package works on, `build` makes it; every other module is one
family of identifiers or something that families share.
"""

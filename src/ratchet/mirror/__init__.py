"""A copy of the checkpoints elsewhere: what a run leaves in an object store, and how it comes back.

    store      what stands in a mirror, and the bytes there, through fsspec
    upload     a snapshot of a checkpoint with what must lie beside it ─► the store, in the background
    restore    the store ─► an empty run directory, every byte verified

What is in an entry, and why: docs/decisions/mirror.md.
"""

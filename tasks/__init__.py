"""SeqIO registrations, one file a collection: import one and its tasks are there."""

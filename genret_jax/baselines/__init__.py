"""Other ways to search, behind the interface of `protocol.Searcher`."""

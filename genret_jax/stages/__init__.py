"""The two stages of training a retriever: docids, then the nearness of queries and documents."""

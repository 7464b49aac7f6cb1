"""From a question about a photograph to a buried object: the shards that training reads, made offline ([A] 3.2)."""

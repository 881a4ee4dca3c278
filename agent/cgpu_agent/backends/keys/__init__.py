"""Key brokers: each speaks to one kind of keeper."""

"""AdamW flown by wire: a bounded, logged controller around any optax optimizer."""

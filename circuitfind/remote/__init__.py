"""Models on a server: a call on one is one job there."""

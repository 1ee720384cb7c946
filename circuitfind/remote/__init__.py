"""Models on a server: each call runs as one job there."""

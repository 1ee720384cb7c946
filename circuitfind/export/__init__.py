"""File formats and pictures, made from plain data (a graph, edge rows, node names, a record) without a model."""

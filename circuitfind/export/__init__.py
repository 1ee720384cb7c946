"""File formats and pictures, each made from plain data: a graph, edge rows, node names, a record."""

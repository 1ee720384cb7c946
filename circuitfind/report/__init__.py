"""The page that shows a search and its circuit: self-contained HTML, its own drawing and plots."""

"""Hugging Face models as they are: families, sites, backends, loading, and the embedded model."""

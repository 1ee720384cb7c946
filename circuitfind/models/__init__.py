"""Hugging Face models as they are: families, sites, backends, loading, and the embedded model."""

import warnings

with warnings.catch_warnings():  # transformers brings tqdm, which in notebooks asks for widgets that nothing here needs
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto as _  # noqa: F401

"""One latent scene from whatever modalities are observed; every wanted modality from it."""

__version__ = "0.1.0"

"""utilgen: generative data augmentation judged by what it does for the classifier."""

__version__ = "0.1.0"

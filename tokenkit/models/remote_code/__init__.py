"""Files that are written beside weights and run where this package is not: they import torch and transformers."""

"""From a model to a bundle: export, import, preprocess, verify."""

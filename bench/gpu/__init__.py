"""The checks of `python -m bench.gpu_check`, and the cascades that they run."""

"""TensorRT engines as stages: the module and its versions (`api`), and what runs (`stages`)."""

"""What each supported TensorRT version offers to Python, and how our code is held to it.

`scripts/tensorrt_api` writes the lists, one file per version; `listing` makes and reads them, and
`uses` finds TensorRT's names in source text. The lists hold names and the values of enums: what a
function's arguments are, or what it does, they don't say.
"""

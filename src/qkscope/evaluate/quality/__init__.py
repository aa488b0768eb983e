"""`qkscope bench quality`: how good a decomposition is, beside the published recipe, on the layers of real models."""
